//! What this class cannot do for an instance: said before anything of it starts, with the field and what to do instead.

use joey_api::instance::InstanceSpec;

/// Why an instance is not made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refusal {
    pub message: String,
    pub hint: &'static str,
}

/// The first thing that cannot be done, if there is one.
pub fn refusal(spec: &InstanceSpec) -> Option<Refusal> {
    let refused =
        |field: String, why: &str, hint| Some(Refusal { message: format!("{field}: class gvisor {why}"), hint });
    if let Some(name) = spec.sysctls.keys().next() {
        let why = "has a network of its own, which knows no such settings";
        return refused(format!("sysctl {name}"), why, "leave it out, or choose class runc or rund");
    }
    if spec.core_pattern.is_some() {
        let why = "has a kernel of its own, which writes no cores";
        return refused("core dumps".to_owned(), why, "leave them out, or choose class runc");
    }
    for container in &spec.containers {
        let name = &container.name;
        for mount in &container.mounts {
            let path = mount.path.trim_end_matches('/');
            if path == "/dev" || path == "/dev/pts" || path == "/dev/fd" {
                let field = format!("containers[{name}].volumeMounts at {path}");
                return refused(field, "makes that place itself", "mount the volume elsewhere");
            }
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_cannot_be_done_is_named() {
        let spec = InstanceSpec::new("i", Vec::new());
        assert_eq!(refusal(&spec), None);
        let sysctls = [("net.core.somaxconn".to_owned(), "1".to_owned())].into();
        let refused = refusal(&InstanceSpec { sysctls, ..spec.clone() });
        assert!(refused.unwrap().message.starts_with("sysctl net.core.somaxconn: class gvisor"));
        let refused = refusal(&InstanceSpec { core_pattern: Some("core".to_owned()), ..spec });
        assert!(refused.unwrap().message.starts_with("core dumps"));
    }
}
