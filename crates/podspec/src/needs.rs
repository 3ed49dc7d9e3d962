//! Which objects a Pod names.

use std::collections::BTreeSet;

use k8s_openapi::api::core::v1::Pod;

use crate::all_containers;
use crate::objects::{Kind, TokenWish};

/// What a Pod names.
#[derive(Default)]
pub struct Needs {
    pub objects: BTreeSet<(Kind, String)>,
    pub tokens: BTreeSet<TokenWish>,
    /// It shows fields of its own, some of which change.
    pub fields: bool,
}

impl Needs {
    /// What it is made from and what its volumes show.
    pub fn of(pod: &Pod) -> Self {
        let mut needs = Self::shown(pod);
        let Some(spec) = &pod.spec else { return needs };
        let mut object = |kind, name: &str| {
            needs.objects.insert((kind, name.to_owned()));
        };
        for (_, container) in all_containers(spec) {
            for source in container.env_from.iter().flatten() {
                source.config_map_ref.iter().for_each(|r| object(Kind::ConfigMap, &r.name));
                source.secret_ref.iter().for_each(|r| object(Kind::Secret, &r.name));
            }
            for source in container.env.iter().flatten().filter_map(|variable| variable.value_from.as_ref()) {
                source.config_map_key_ref.iter().for_each(|r| object(Kind::ConfigMap, &r.name));
                source.secret_key_ref.iter().for_each(|r| object(Kind::Secret, &r.name));
            }
        }
        needs
    }

    /// What its volumes show: this is kept up to date while it runs.
    pub fn shown(pod: &Pod) -> Self {
        let mut needs = Self::default();
        let Some(spec) = &pod.spec else { return needs };
        let mut object = |kind, name: &str| {
            needs.objects.insert((kind, name.to_owned()));
        };
        for volume in spec.volumes.iter().flatten() {
            needs.fields |= volume.downward_api.is_some();
            volume.config_map.iter().for_each(|r| object(Kind::ConfigMap, &r.name));
            volume.secret.iter().filter_map(|r| r.secret_name.as_ref()).for_each(|n| object(Kind::Secret, n));
            for source in volume.projected.iter().flat_map(|projected| projected.sources.iter().flatten()) {
                source.config_map.iter().for_each(|r| object(Kind::ConfigMap, &r.name));
                source.secret.iter().for_each(|r| object(Kind::Secret, &r.name));
                needs.fields |= source.downward_api.is_some();
                if let Some(token) = &source.service_account_token {
                    needs.tokens.insert((token.audience.clone(), token.expiration_seconds));
                }
            }
        }
        needs
    }
}
