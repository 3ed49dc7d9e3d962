//! What every cluster has from the first moment: its namespaces, and the authority of client certificates in a ConfigMap.

use joey_store::Op;
use serde_json::json;

use crate::kinds::{self, Resource};
use crate::object;
use crate::status::{ApiError, ApiResult};
use crate::strategy::namespace::STANDARD;
use crate::{State, strategy};

/// Makes what is missing; safe to repeat.
pub async fn bootstrap(state: &State) -> ApiResult<()> {
    let namespaces = kinds::find("", "v1", "namespaces").ok_or_else(ApiError::no_such_path)?;
    for name in STANDARD {
        ensure(state, namespaces, "", name, json!({})).await?;
    }
    let maps = kinds::find("", "v1", "configmaps").ok_or_else(ApiError::no_such_path)?;
    let authority = json!({"data": {"client-ca-file": state.authority}});
    ensure(state, maps, "kube-system", "extension-apiserver-authentication", authority).await
}

async fn ensure(
    state: &State,
    resource: &'static Resource,
    namespace: &str,
    name: &str,
    mut value: serde_json::Value,
) -> ApiResult<()> {
    let key = resource.key(namespace, name);
    if state.read(&key).await?.is_some() {
        return Ok(());
    }
    value["metadata"] = json!({"name": name, "uid": object::uid(), "creationTimestamp": object::now()});
    if resource.namespaced {
        value["metadata"]["namespace"] = namespace.into();
    }
    let strategy: &dyn strategy::Strategy = resource.strategy;
    strategy.prepare_create(&mut value);
    let op = Op::Put { key: key.clone(), value: object::encode(resource, &value), lease: None };
    // Refused: somebody else made it meanwhile.
    state.commit(&key, 0, op).await.map(drop)
}
