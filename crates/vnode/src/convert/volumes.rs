//! Volumes: emptyDir, and everything that is files known beforehand (configMap, secret, projected, downwardAPI).

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use joey_api::instance::{FileContent, Volume, VolumeSource};
use joey_model::quantity::parse_units;
use k8s_openapi::api::core::v1 as core;

use super::{Notes, Refusal, environment};
use crate::config::Config;
use crate::resolve::{Kind, Objects};

const DEFAULT_MODE: i32 = 0o644;

pub(super) fn volumes(
    pod: &core::Pod,
    spec: &core::PodSpec,
    objects: &Objects,
    notes: &mut Notes,
) -> Result<Vec<Volume>, Refusal> {
    let mut volumes = Vec::new();
    for volume in spec.volumes.iter().flatten() {
        if let Some(source) = source(pod, spec, volume, objects, notes)? {
            volumes.push(Volume { name: volume.name.clone(), source });
        }
    }
    Ok(volumes)
}

/// Goes through every kind of volume; `None`: a kind that was refused.
fn source(
    pod: &core::Pod,
    spec: &core::PodSpec,
    volume: &core::Volume,
    objects: &Objects,
    notes: &mut Notes,
) -> Result<Option<VolumeSource>, Refusal> {
    let core::Volume {
        name,
        config_map,
        downward_api,
        empty_dir,
        projected,
        secret,
        aws_elastic_block_store,
        azure_disk,
        azure_file,
        cephfs,
        cinder,
        csi,
        ephemeral,
        fc,
        flex_volume,
        flocker,
        gce_persistent_disk,
        git_repo,
        glusterfs,
        host_path,
        image,
        iscsi,
        nfs,
        persistent_volume_claim,
        photon_persistent_disk,
        portworx_volume,
        quobyte,
        rbd,
        scale_io,
        storageos,
        vsphere_volume,
    } = volume;
    for (present, kind) in [
        (aws_elastic_block_store.is_some(), "awsElasticBlockStore"),
        (azure_disk.is_some(), "azureDisk"),
        (azure_file.is_some(), "azureFile"),
        (cephfs.is_some(), "cephfs"),
        (cinder.is_some(), "cinder"),
        (csi.is_some(), "csi"),
        (ephemeral.is_some(), "ephemeral"),
        (fc.is_some(), "fc"),
        (flex_volume.is_some(), "flexVolume"),
        (flocker.is_some(), "flocker"),
        (gce_persistent_disk.is_some(), "gcePersistentDisk"),
        (git_repo.is_some(), "gitRepo"),
        (glusterfs.is_some(), "glusterfs"),
        (host_path.is_some(), "hostPath"),
        (image.is_some(), "image"),
        (iscsi.is_some(), "iscsi"),
        (nfs.is_some(), "nfs"),
        (persistent_volume_claim.is_some(), "persistentVolumeClaim"),
        (photon_persistent_disk.is_some(), "photonPersistentDisk"),
        (portworx_volume.is_some(), "portworxVolume"),
        (quobyte.is_some(), "quobyte"),
        (rbd.is_some(), "rbd"),
        (scale_io.is_some(), "scaleIO"),
        (storageos.is_some(), "storageos"),
        (vsphere_volume.is_some(), "vsphereVolume"),
    ] {
        let alternative = "use emptyDir, configMap, secret, projected or downwardAPI";
        notes.refuse_if(present, format!("volume \"{name}\": {kind}"), alternative);
    }
    let mut files = Files { pod, spec, objects, notes, volume: name, files: Vec::new(), mode: DEFAULT_MODE };
    if let Some(source) = empty_dir {
        return Ok(Some(empty(name, source, files.notes)));
    } else if let Some(source) = config_map {
        files.mode = source.default_mode.unwrap_or(DEFAULT_MODE);
        files.object(Kind::ConfigMap, &source.name, source.items.as_ref(), source.optional)?;
    } else if let Some(source) = secret {
        files.mode = source.default_mode.unwrap_or(DEFAULT_MODE);
        let name = source.secret_name.as_deref().unwrap_or_default();
        files.object(Kind::Secret, name, source.items.as_ref(), source.optional)?;
    } else if let Some(source) = downward_api {
        files.mode = source.default_mode.unwrap_or(DEFAULT_MODE);
        files.downward(source.items.as_ref());
    } else if let Some(source) = projected {
        files.mode = source.default_mode.unwrap_or(DEFAULT_MODE);
        for projection in source.sources.iter().flatten() {
            files.projection(projection)?;
        }
    } else {
        return Ok(None);
    }
    Ok(Some(VolumeSource::Files(files.files)))
}

fn empty(name: &str, source: &core::EmptyDirVolumeSource, notes: &mut Notes) -> VolumeSource {
    let core::EmptyDirVolumeSource { medium, size_limit } = source;
    let medium = medium.as_deref().unwrap_or_default();
    notes.refuse_if(!matches!(medium, "" | "Memory"), format!("volume \"{name}\": medium {medium}"), "use Memory");
    let size_limit_bytes = size_limit.as_ref().and_then(|limit| {
        parse_units(&limit.0).map_err(|error| notes.faults.push(format!("volume \"{name}\": {error}"))).ok()
    });
    VolumeSource::EmptyDir { memory: medium == "Memory", size_limit_bytes }
}

/// The files of one volume as they are put together; a later file takes the place of an earlier one of the same path.
struct Files<'a> {
    pod: &'a core::Pod,
    spec: &'a core::PodSpec,
    objects: &'a Objects,
    notes: &'a mut Notes,
    volume: &'a str,
    files: Vec<FileContent>,
    mode: i32,
}

impl Files<'_> {
    fn add(&mut self, path: &str, bytes: &[u8], mode: Option<i32>) {
        let mode = u32::try_from(mode.unwrap_or(self.mode)).unwrap_or(0o644) & 0o777;
        self.files.retain(|file| file.path != path);
        self.files.push(FileContent { path: path.to_owned(), base64: STANDARD.encode(bytes), mode });
    }

    fn object(
        &mut self,
        kind: Kind,
        name: &str,
        items: Option<&Vec<core::KeyToPath>>,
        optional: Option<bool>,
    ) -> Result<(), Refusal> {
        match items.filter(|items| !items.is_empty()) {
            None => {
                for (key, value) in self.objects.all(kind, name, optional)? {
                    self.add(&key, &value, None);
                }
            }
            Some(items) => {
                for item in items {
                    if let Some(value) = self.objects.one(kind, name, &item.key, optional)? {
                        self.add(&item.path, &value, item.mode);
                    }
                }
            }
        }
        Ok(())
    }

    fn downward(&mut self, items: Option<&Vec<core::DownwardAPIVolumeFile>>) {
        let config = Config::new("", std::net::IpAddr::V4(std::net::Ipv4Addr::UNSPECIFIED));
        for core::DownwardAPIVolumeFile { field_ref, mode, path, resource_field_ref } in items.into_iter().flatten() {
            let allowed = |field: &&core::ObjectFieldSelector| field.field_path.starts_with("metadata.");
            let value = match (field_ref, resource_field_ref) {
                (Some(field), _) => Some(field)
                    .filter(allowed)
                    .and_then(|field| environment::pod_field(self.pod, self.spec, &field.field_path, &config)),
                (None, Some(field)) => environment::resource_field(self.spec, None, field, self.objects),
                (None, None) => None,
            };
            match value {
                Some(value) => self.add(path, value.as_bytes(), *mode),
                None => {
                    let field = format!("volume \"{}\": the field of \"{path}\"", self.volume);
                    self.notes.refuse_if(true, field, "use fields of metadata or a container's resources");
                }
            }
        }
    }

    fn projection(&mut self, projection: &core::VolumeProjection) -> Result<(), Refusal> {
        let core::VolumeProjection {
            cluster_trust_bundle,
            config_map,
            downward_api,
            pod_certificate,
            secret,
            service_account_token,
        } = projection;
        let at = format!("volume \"{}\": ", self.volume);
        self.notes.refuse_if(
            cluster_trust_bundle.is_some(),
            format!("{at}clusterTrustBundle"),
            "put the certificates into a ConfigMap",
        );
        self.notes.refuse_if(pod_certificate.is_some(), format!("{at}podCertificate"), "use a Secret");
        if let Some(source) = config_map {
            self.object(Kind::ConfigMap, &source.name, source.items.as_ref(), source.optional)?;
        }
        if let Some(source) = secret {
            self.object(Kind::Secret, &source.name, source.items.as_ref(), source.optional)?;
        }
        if let Some(source) = downward_api {
            self.downward(source.items.as_ref());
        }
        if let Some(source) = service_account_token {
            let token = self.objects.token(source.audience.as_deref(), source.expiration_seconds);
            if let Some(token) = token {
                self.add(&source.path, token.as_bytes(), None);
            }
        }
        Ok(())
    }
}
