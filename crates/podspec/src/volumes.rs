//! Volumes and their mounts: emptyDir, images, and everything that is files whose contents are known (configMap, secret,
//! projected, downwardAPI). What files hold is made again while the Pod runs: [`files`].

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use joey_api::instance::{FileContent, Mount, PullPolicy, Volume, VolumeSource};
use joey_model::ImageRef;
use joey_model::quantity::parse_units;
use k8s_openapi::api::core::v1 as core;

use crate::node::Node;
use crate::objects::{Kind, Missing, Objects};
use crate::{Notes, Refusal, all_containers, environment};

const DEFAULT_MODE: i32 = 0o644;

/// What is said of volumes that are kept elsewhere than in the Pod.
const KEPT_ELSEWHERE: &str = "there are no volumes yet that outlive a Pod; use an emptyDir, and keep what must last in a service that is reached over the network";
/// What is said of volumes that a kernel must mount.
const MOUNTED_BY_KERNEL: &str =
    "a tenant's file system is mounted by a kernel of its own only: choose runtimeClassName: rund, or use an emptyDir";
/// What is said of volumes that are a provider's or a driver's.
const NO_DRIVER: &str =
    "there are no storage drivers here; use emptyDir, configMap, secret, projected, downwardAPI or image";

pub(crate) fn volumes(
    pod: &core::Pod,
    spec: &core::PodSpec,
    objects: &Objects,
    notes: &mut Notes,
) -> Result<Vec<Volume>, Refusal> {
    let mut volumes = Vec::new();
    for volume in spec.volumes.iter().flatten() {
        let source = source(pod, spec, volume, objects, notes)
            .map_err(|missing| Refusal::Unmounted { volume: volume.name.clone(), missing })?;
        if let Some(source) = source {
            volumes.push(Volume { name: volume.name.clone(), source });
        }
    }
    Ok(volumes)
}

/// The volumes of files as they are to be now, and those that cannot be for want of an object. What else is asked for was judged
/// when the instance was made.
pub fn files(pod: &core::Pod, objects: &Objects) -> (Vec<Volume>, Vec<(String, Missing)>) {
    let (mut found, mut missing) = (Vec::new(), Vec::new());
    let empty = core::PodSpec::default();
    let spec = pod.spec.as_ref().unwrap_or(&empty);
    for volume in spec.volumes.iter().flatten() {
        match source(pod, spec, volume, objects, &mut Notes::default()) {
            Ok(Some(source @ VolumeSource::Files(_))) => found.push(Volume { name: volume.name.clone(), source }),
            Err(object) => missing.push((volume.name.clone(), object)),
            Ok(_) => {}
        }
    }
    (found, missing)
}

/// The group that owns what is in the volumes.
pub(crate) fn fs_group(security: &core::PodSecurityContext, notes: &mut Notes) -> Option<u32> {
    let group = u32::try_from(security.fs_group?).ok();
    if group.is_none() {
        notes.faults.push("spec.securityContext.fsGroup is not an id".to_owned());
    }
    group
}

/// What a container is shown of the volumes, and where.
pub(crate) fn mounts(at: &str, container: &core::Container, notes: &mut Notes) -> Vec<Mount> {
    let mut mounts = Vec::new();
    for mount in container.volume_mounts.iter().flatten() {
        let core::VolumeMount {
            mount_path,
            mount_propagation,
            name,
            read_only,
            recursive_read_only,
            sub_path,
            sub_path_expr,
        } = mount;
        let read_only = *read_only == Some(true);
        let at = format!("{at}mount at {mount_path}");
        // Nothing is ever mounted into a volume from outside, so that what would come from there has come.
        notes.refuse_if(
            mount_propagation.as_deref() == Some("Bidirectional"),
            format!("{at}: mountPropagation Bidirectional"),
            "leave it out; no container may mount anything, and nothing is shared with the host",
        );
        let place = std::path::Path::new(mount_path);
        let kernels = ["/proc", "/sys"].iter().any(|own| place.starts_with(own));
        notes.refuse_if(
            kernels || place == std::path::Path::new("/"),
            format!("{at}: a volume over {mount_path}"),
            "mount it elsewhere; what the kernel shows of itself, and the root, are never covered",
        );
        // No volume has mounts within itself: what is read-only is so all the way down.
        if recursive_read_only.as_deref() == Some("Enabled") && !read_only {
            notes.faults.push(format!("{at}: recursiveReadOnly needs readOnly: true"));
        }
        let filled = |text: &Option<String>| text.clone().filter(|text| !text.is_empty());
        let sub_path = filled(sub_path).and_then(|path| match inside(&path) {
            Ok(path) => path,
            Err(why) => {
                notes.faults.push(format!("{at}: subPath \"{path}\" {why}"));
                None
            }
        });
        mounts.push(Mount {
            volume: name.clone(),
            path: mount_path.clone(),
            read_only,
            sub_path,
            sub_path_expr: filled(sub_path_expr),
        });
    }
    mounts
}

/// A path within a volume without what says nothing; `None`: the volume itself.
fn inside(path: &str) -> Result<Option<String>, &'static str> {
    let parts: Vec<&str> = path.split('/').filter(|part| !matches!(*part, "" | ".")).collect();
    match () {
        () if path.starts_with('/') => Err("must be relative"),
        () if parts.contains(&"..") => Err("must not contain \"..\""),
        () => Ok(Some(parts.join("/")).filter(|path| !path.is_empty())),
    }
}

/// Goes through every kind of volume; `None`: a kind that was refused.
fn source(
    pod: &core::Pod,
    spec: &core::PodSpec,
    volume: &core::Volume,
    objects: &Objects,
    notes: &mut Notes,
) -> Result<Option<VolumeSource>, Missing> {
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
        (fc.is_some(), "fc"),
        (flex_volume.is_some(), "flexVolume"),
        (flocker.is_some(), "flocker"),
        (gce_persistent_disk.is_some(), "gcePersistentDisk"),
        (glusterfs.is_some(), "glusterfs"),
        (iscsi.is_some(), "iscsi"),
        (photon_persistent_disk.is_some(), "photonPersistentDisk"),
        (portworx_volume.is_some(), "portworxVolume"),
        (quobyte.is_some(), "quobyte"),
        (rbd.is_some(), "rbd"),
        (scale_io.is_some(), "scaleIO"),
        (storageos.is_some(), "storageos"),
        (vsphere_volume.is_some(), "vsphereVolume"),
    ] {
        notes.refuse_if(present, format!("volume \"{name}\": {kind}"), NO_DRIVER);
    }
    for (present, kind, alternative) in [
        (nfs.is_some() && !own_kernel(spec), "nfs", MOUNTED_BY_KERNEL),
        (persistent_volume_claim.is_some(), "persistentVolumeClaim", KEPT_ELSEWHERE),
        (ephemeral.is_some(), "ephemeral", "claims come later; use an emptyDir with a sizeLimit"),
        (host_path.is_some(), "hostPath", "there is no node to look into; use emptyDir, configMap, secret or image"),
        (git_repo.is_some(), "gitRepo", "clone into an emptyDir in an init container, or use an image volume"),
    ] {
        notes.refuse_if(present, format!("volume \"{name}\": {kind}"), alternative);
    }
    let far = nfs.as_ref().filter(|_| own_kernel(spec)).map(of_nfs);
    if let Some(source) = far.or_else(|| image.as_ref().map(|source| of_image(name, source, notes))) {
        return Ok(Some(source));
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

/// Whether the Pod asks for a class whose sandboxes have kernels of their own.
fn own_kernel(spec: &core::PodSpec) -> bool {
    spec.runtime_class_name.as_deref() == Some("rund")
}

fn of_nfs(source: &core::NFSVolumeSource) -> VolumeSource {
    let core::NFSVolumeSource { path, read_only, server } = source;
    VolumeSource::Nfs { server: server.clone(), path: path.clone(), read_only: *read_only == Some(true) }
}

fn of_image(name: &str, source: &core::ImageVolumeSource, notes: &mut Notes) -> VolumeSource {
    let core::ImageVolumeSource { pull_policy, reference } = source;
    let reference = reference.clone().unwrap_or_default();
    notes.refuse_if(reference.is_empty(), format!("volume \"{name}\": an image without a reference"), "name one");
    let pull_policy = match pull_policy.as_deref() {
        Some("Always") => PullPolicy::Always,
        Some("Never") => PullPolicy::Never,
        Some("IfNotPresent") => PullPolicy::IfNotPresent,
        _ if ImageRef::parse(&reference).is_ok_and(|image| image.is_latest()) => PullPolicy::Always,
        _ => PullPolicy::IfNotPresent,
    };
    VolumeSource::Image { reference, pull_policy }
}

/// The user who owns tokens: the one whom all containers run as, where they say so.
fn common_user(spec: &core::PodSpec) -> Option<u32> {
    let of_pod = spec.security_context.as_ref().and_then(|context| context.run_as_user);
    let mut users = all_containers(spec)
        .map(|(_, container)| container.security_context.as_ref().and_then(|context| context.run_as_user).or(of_pod));
    let first = users.next()??;
    users.all(|user| user == Some(first)).then(|| u32::try_from(first).ok()).flatten()
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
        self.files.push(FileContent { path: path.to_owned(), base64: STANDARD.encode(bytes), mode, user: None });
    }

    /// A token is for its user alone where the Pod says who that is, and for the group of the volumes.
    fn add_token(&mut self, path: &str, token: &str) {
        let user = common_user(self.spec);
        let group = self.spec.security_context.as_ref().and_then(|context| context.fs_group);
        self.add(path, token.as_bytes(), (user.is_some() || group.is_some()).then_some(0o600));
        if let Some(file) = self.files.last_mut() {
            file.user = user;
        }
    }

    fn object(
        &mut self,
        kind: Kind,
        name: &str,
        items: Option<&Vec<core::KeyToPath>>,
        optional: Option<bool>,
    ) -> Result<(), Missing> {
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
        let node = Node::new("", std::net::IpAddr::V4(std::net::Ipv4Addr::UNSPECIFIED));
        for core::DownwardAPIVolumeFile { field_ref, mode, path, resource_field_ref } in items.into_iter().flatten() {
            let allowed = |field: &&core::ObjectFieldSelector| field.field_path.starts_with("metadata.");
            let value = match (field_ref, resource_field_ref) {
                (Some(field), _) => Some(field)
                    .filter(allowed)
                    .and_then(|field| environment::pod_field(self.pod, self.spec, &field.field_path, &node)),
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

    fn projection(&mut self, projection: &core::VolumeProjection) -> Result<(), Missing> {
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
                self.add_token(&source.path, token);
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;
    use crate::convert;

    use crate::objects::Token;

    fn pod(spec: Value, mounts: Value) -> core::Pod {
        let container = json!({ "name": "main", "image": "app:1", "volumeMounts": mounts });
        let mut whole = json!({ "containers": [container] });
        whole.as_object_mut().unwrap().extend(spec.as_object().unwrap().clone());
        let metadata = json!({ "name": "web", "namespace": "shop", "uid": "u-1", "labels": { "app": "web" } });
        serde_json::from_value(json!({ "metadata": metadata, "spec": whole })).unwrap()
    }

    fn converted(pod: &core::Pod, objects: &Objects) -> Result<joey_api::instance::InstanceSpec, Refusal> {
        let node = Node::new("virtual", "192.0.2.1".parse().unwrap());
        convert(pod, objects, &node).map(|converted| converted.spec)
    }

    fn fault(pod: &core::Pod) -> String {
        match converted(pod, &Objects::default()) {
            Err(Refusal::Unsupported(faults)) => faults.join("; "),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn what_is_kept_elsewhere_is_refused_with_an_alternative() {
        for (source, word) in [
            (json!({ "nfs": { "server": "s", "path": "/" } }), "emptyDir"),
            (json!({ "persistentVolumeClaim": { "claimName": "c" } }), "emptyDir"),
            (json!({ "hostPath": { "path": "/" } }), "no node"),
            (json!({ "csi": { "driver": "d" } }), "drivers"),
            (json!({ "gitRepo": { "repository": "r" } }), "init container"),
            (json!({ "image": {} }), "without a reference"),
        ] {
            let mut volume = source.clone();
            volume["name"] = json!("v");
            let text = fault(&pod(json!({ "volumes": [volume] }), json!([])));
            let kind = source.as_object().unwrap().keys().next().unwrap().clone();
            assert!(text.contains("volume \"v\"") && text.contains(&kind) && text.contains(word), "{text}");
        }
    }

    #[test]
    fn what_a_server_has_is_for_those_with_a_kernel_of_their_own() {
        let nfs = json!({"name": "v", "nfs": {"server": "files", "path": "/x", "readOnly": true}});
        let of_class = |class: &str| pod(json!({"volumes": [nfs], "runtimeClassName": class}), json!([]));
        assert!(fault(&of_class("runc")).contains("runtimeClassName: rund"));
        let found = converted(&of_class("rund"), &Objects::default()).unwrap().volumes;
        let wanted = VolumeSource::Nfs { server: "files".to_owned(), path: "/x".to_owned(), read_only: true };
        assert_eq!(found[0].source, wanted);
    }

    #[test]
    fn mounts_within_volumes() {
        let volumes = json!({ "volumes": [{ "name": "v", "emptyDir": {} }] });
        let mount = |more: Value| {
            let mut mount = json!({ "name": "v", "mountPath": "/v" });
            mount.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
            pod(volumes.clone(), json!([mount]))
        };
        let made = |more: Value| converted(&mount(more), &Objects::default()).unwrap().containers[0].mounts[0].clone();
        assert_eq!(made(json!({ "subPath": "./a//b/" })).sub_path.as_deref(), Some("a/b"));
        assert_eq!(made(json!({ "subPath": "." })).sub_path, None);
        assert_eq!(made(json!({ "subPathExpr": "$(POD)/a" })).sub_path_expr.as_deref(), Some("$(POD)/a"));
        assert!(made(json!({ "readOnly": true, "recursiveReadOnly": "Enabled" })).read_only);
        made(json!({ "mountPropagation": "HostToContainer" }));
        for (more, word) in [
            (json!({ "subPath": "a/../b" }), "subPath"),
            (json!({ "subPath": "/a" }), "relative"),
            (json!({ "recursiveReadOnly": "Enabled" }), "needs readOnly"),
            (json!({ "mountPropagation": "Bidirectional" }), "Bidirectional"),
        ] {
            let text = fault(&mount(more));
            assert!(text.contains("mount at /v") && text.contains(word), "{text}");
        }
    }

    #[test]
    fn images_as_volumes() {
        let of = |source: Value| {
            let spec = json!({ "volumes": [{ "name": "v", "image": source }] });
            converted(&pod(spec, json!([])), &Objects::default()).unwrap().volumes[0].source.clone()
        };
        let image = |reference: &str, pull_policy| VolumeSource::Image { reference: reference.to_owned(), pull_policy };
        assert_eq!(of(json!({ "reference": "data:1" })), image("data:1", PullPolicy::IfNotPresent));
        assert_eq!(of(json!({ "reference": "data" })), image("data", PullPolicy::Always));
        assert_eq!(of(json!({ "reference": "data", "pullPolicy": "Never" })), image("data", PullPolicy::Never));
    }

    fn projected() -> core::Pod {
        pod(
            json!({ "securityContext": { "runAsUser": 1000 }, "volumes": [
                { "name": "all", "projected": { "sources": [
                    { "serviceAccountToken": { "path": "token", "expirationSeconds": 600 } },
                    { "configMap": { "name": "cm" } },
                    { "secret": { "name": "s", "optional": true } },
                    { "downwardAPI": { "items": [{ "path": "labels", "fieldRef": { "fieldPath": "metadata.labels" } }] } }] } },
                { "name": "e", "emptyDir": {} },
                { "name": "late", "configMap": { "name": "late" } }] }),
            json!([{ "name": "all", "mountPath": "/all" }]),
        )
    }

    #[test]
    fn files_are_made_again_one_volume_at_a_time() {
        let mut objects = Objects::default();
        let (due, expires) = (jiff::Timestamp::UNIX_EPOCH, jiff::Timestamp::MAX);
        objects.tokens.insert((None, Some(600)), Token { text: "t".to_owned(), due, expires });
        objects.values.insert((Kind::ConfigMap, "cm".into()), [("k".to_owned(), b"1".to_vec())].into());
        let (found, missing) = files(&projected(), &objects);
        assert_eq!(
            missing.iter().map(|(volume, missing)| (volume.as_str(), missing.name.as_str())).collect::<Vec<_>>(),
            [("late", "late")]
        );
        let VolumeSource::Files(made) = &found[0].source else { panic!("{found:?}") };
        assert_eq!(found.len(), 1, "an empty directory holds nothing of ours");
        let names: Vec<_> = made.iter().map(|file| (file.path.as_str(), file.mode, file.user)).collect();
        // A token is its user's alone.
        assert_eq!(names, [("token", 0o600, Some(1000)), ("k", 0o644, None), ("labels", 0o644, None)]);
        objects.values.insert((Kind::Secret, "s".into()), [("k".to_owned(), b"2".to_vec())].into());
        let (found, _) = files(&projected(), &objects);
        let VolumeSource::Files(made) = &found[0].source else { panic!("{found:?}") };
        let key = made.iter().find(|file| file.path == "k").unwrap();
        assert_eq!((made.len(), key.base64.as_str()), (3, "Mg=="), "what comes later takes the place");
    }

    #[test]
    fn the_owner_of_tokens() {
        let spec = |users: [Option<i64>; 2], of_pod: Option<i64>| -> core::PodSpec {
            let container = |user: Option<i64>| json!({ "name": "c", "securityContext": { "runAsUser": user } });
            let containers = users.map(container);
            serde_json::from_value(json!({ "containers": containers, "securityContext": { "runAsUser": of_pod } }))
                .unwrap()
        };
        assert_eq!(common_user(&spec([Some(1), Some(1)], None)), Some(1));
        assert_eq!(common_user(&spec([Some(1), None], Some(1))), Some(1));
        assert_eq!(common_user(&spec([Some(1), Some(2)], None)), None);
        assert_eq!(common_user(&spec([Some(1), None], None)), None);
        assert_eq!(common_user(&spec([None, None], None)), None);
    }
}
