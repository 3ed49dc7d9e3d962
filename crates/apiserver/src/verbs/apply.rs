//! Server-side apply: refused until the schemas can say which manager owns which field.

use bytes::Bytes;

use super::{Answer, Call};
use crate::status::{ApiError, ApiResult};

pub async fn apply(_call: &Call<'_>, _body: &Bytes) -> ApiResult<Answer> {
    let mut error = ApiError::unsupported_media_type(
        "application/json-patch+json, application/merge-patch+json, application/strategic-merge-patch+json",
    );
    error.message = "server-side apply is not available yet; use client-side apply (kubectl apply without \
        --server-side, helm with --server-side=false)"
        .into();
    Err(error)
}
