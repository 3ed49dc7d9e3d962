//! What a Pod is called inside: its host name and what follows it, as the kubelet makes them.

use joey_api::validate::MAX_HOSTNAME;
use k8s_openapi::api::core::v1 as core;

use crate::Notes;

/// Longest host name that is made from a Pod's name.
const LONGEST: usize = 63;

/// How a Pod is called inside.
pub(crate) struct Naming {
    pub(crate) hostname: String,
    pub(crate) domain: Option<String>,
    /// Programs are told both when they ask for the host name.
    pub(crate) full: bool,
}

/// A name that overrides all others stands alone; else it is the given name or the Pod's, below the subdomain where there is one.
pub(crate) fn naming(
    spec: &core::PodSpec,
    (name, namespace): (&str, &str),
    cluster_domain: &str,
    notes: &mut Notes,
) -> Naming {
    let filled = |text: &Option<String>| text.clone().filter(|text| !text.is_empty());
    let full = spec.set_hostname_as_fqdn == Some(true);
    if let Some(hostname) = filled(&spec.hostname_override) {
        notes.refuse_if(full, "spec.setHostnameAsFQDN with spec.hostnameOverride", "give one of them");
        return Naming { hostname, domain: None, full: false };
    }
    let wanted = filled(&spec.hostname).unwrap_or_else(|| name.to_owned());
    let hostname = wanted[..wanted.len().min(LONGEST)].trim_end_matches(['-', '.']).to_owned();
    let domain = filled(&spec.subdomain).map(|subdomain| format!("{subdomain}.{namespace}.svc.{cluster_domain}"));
    if let Some(domain) = domain.as_ref().filter(|_| full) {
        let name = format!("{hostname}.{domain}");
        notes.refuse_if(
            name.len() > MAX_HOSTNAME,
            format!("spec.setHostnameAsFQDN: {name}"),
            "a host name has at most 64 characters; give a shorter spec.hostname or spec.subdomain",
        );
    }
    Naming { hostname, domain, full }
}
