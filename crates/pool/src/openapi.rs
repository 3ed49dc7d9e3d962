//! The API's description in OpenAPI 3.1: paths and what they answer. Bodies are described by `joey-api`'s types.

use serde_json::{Map, Value, json};

/// Method, path, what it does.
const CALLS: [(&str, &str, &str); 25] = [
    ("get", "/v1/instances", "List instances; with watch=true a WatchEvent a line, present ones first"),
    ("post", "/v1/instances", "Create an instance from an InstanceSpec; 200 when the client token is known already"),
    ("get", "/v1/instances/{name}", "Read an instance by id or name"),
    ("patch", "/v1/instances/{name}", "Change what may change of a living instance (InstanceChange)"),
    ("delete", "/v1/instances/{name}", "End an instance; grace in seconds"),
    ("post", "/v1/instances/{name}/restart", "Restart every container"),
    ("post", "/v1/instances/{name}/renew", "End the containers with their grace and make the sandbox anew"),
    ("get", "/v1/instances/{name}/usage", "CPU, memory and traffic used"),
    ("post", "/v1/instances/{name}/forward", "Connect to a port on loopback of the instance; bytes both ways"),
    ("post", "/v1/instances/{name}/capture", "Capture packets (CaptureRequest) as pcapng until a byte is sent"),
    ("get", "/v1/instances/{name}/cores", "What is done with cores, and those that are kept (Cores)"),
    ("put", "/v1/instances/{name}/cores", "Change what is done with cores (CoreSettings)"),
    ("get", "/v1/instances/{name}/cores/{core}", "A core that is kept"),
    ("get", "/v1/instances/{name}/containers/{container}/files", "What is at a path of a container, as tar"),
    ("put", "/v1/instances/{name}/containers/{container}/files", "Unpack an archive into a container"),
    ("get", "/v1/instances/{name}/containers/{container}/logs", "Log of a container (LogOptions)"),
    ("post", "/v1/instances/{name}/containers/{container}/exec", "Run a command (ExecRequest), frames both ways"),
    ("post", "/v1/instances/{name}/containers/{container}/attach", "Join the main process, frames both ways"),
    ("get", "/v1/images", "List images"),
    ("post", "/v1/images/pull", "Pull an image (PullRequest), a PullEvent a line"),
    ("post", "/v1/images/import", "Take in an archive under the name in reference"),
    ("delete", "/v1/images/{name}", "Remove an image by reference or id"),
    ("get", "/v1/hosts", "List hosts"),
    ("get", "/v1/version", "Version of the service"),
    ("get", "/v1/openapi.json", "This document"),
];

/// The document.
pub(crate) fn document() -> Value {
    let mut paths = Map::new();
    for (method, path, summary) in CALLS {
        let parameters: Vec<Value> = path
            .split('/')
            .filter_map(|part| part.strip_prefix('{')?.strip_suffix('}'))
            .map(|name| json!({ "name": name, "in": "path", "required": true, "schema": { "type": "string" } }))
            .collect();
        let item = paths.entry(path.to_string()).or_insert_with(|| json!({ "parameters": parameters }));
        item[method] = json!({
            "summary": summary,
            "responses": { "2XX": { "description": "done" }, "default": { "$ref": "#/components/responses/Refused" } },
        });
    }
    let text = json!({ "type": "string" });
    json!({
        "openapi": "3.1.0",
        "info": { "title": "Joey instance service", "version": env!("CARGO_PKG_VERSION") },
        "paths": paths,
        "components": { "responses": { "Refused": {
            "description": "refused",
            "content": { "application/json": { "schema": { "type": "object", "properties": { "error": {
                "type": "object",
                "required": ["kind", "reason", "message"],
                "properties": { "kind": text, "reason": text, "message": text, "hint": text },
            } } } } },
        } } },
    })
}
