//! What must hold before anything is set up: a configuration that makes sense and a range that is nobody else's.

use std::path::Path;

use ipnet::Ipv4Net;
use nix::net::if_::if_nametoindex;

use crate::error::NetworkError;
use crate::links::Links;
use crate::networks::{Config, FORWARDING};

pub(crate) fn configuration(config: &Config) -> Result<(), NetworkError> {
    let wrong = |what: String| Err(NetworkError::Configuration(what));
    if let Err(error) = joey_model::id::check_label("network name", &config.name) {
        return wrong(error.to_string());
    }
    if !config.name.starts_with(|c: char| c.is_ascii_lowercase()) {
        return wrong(format!("network name \"{}\" must begin with a letter", config.name));
    }
    if !(8..=29).contains(&config.range.prefix_len()) {
        return wrong(format!("range {} must have between 8 and 2^24 addresses", config.range));
    }
    if config.range.network() != config.range.addr() {
        return wrong(format!("range {} must begin at its network address {}", config.range, config.range.trunc()));
    }
    if !Path::new(FORWARDING).exists() {
        return wrong("this kernel has no IPv4 forwarding".to_owned());
    }
    Ok(())
}

/// No route of the host but the default one and those of interfaces with our `prefix` may share an address with the range:
/// what it leads to would be out of the host's reach, or instances would be.
pub(crate) async fn range_is_free(range: Ipv4Net, prefix: &str, links: &Links) -> Result<(), NetworkError> {
    // Before the routes are listed: one that goes meanwhile, as those of an earlier daemon may, takes its routes with it.
    let own: Vec<_> = Links::with_prefix(prefix).iter().filter_map(|name| if_nametoindex(name.as_str()).ok()).collect();
    let routes = links.routes().await?;
    let stranger = routes.iter().find(|(net, interface)| {
        let overlaps = net.contains(&range) || range.contains(net);
        overlaps && !interface.is_some_and(|index| own.contains(&index))
    });
    match stranger {
        Some((net, _)) => Err(NetworkError::Configuration(format!(
            "range {range} overlaps {net}, which the host already routes; choose another range"
        ))),
        None => Ok(()),
    }
}
