//! Get: one object, from the store itself, so that it is never older than a write before it.

use super::{Answer, Call};
use crate::convert;
use crate::status::ApiResult;

pub async fn get(call: &Call<'_>) -> ApiResult<Answer> {
    let current = call.current().await?;
    Ok(Answer::ok(convert::outgoing(call.target.resource, current.value)))
}
