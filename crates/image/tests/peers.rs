//! Images through real tools: Debian's docker-registry with passwords, skopeo, umoci. What is mounted here must be what umoci
//! unpacks. Needs root and docker-registry, skopeo, umoci, python3; says what is missing and passes.

mod registry;

use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use joey_image::{Config, Images};
use joey_model::ImageRef;
use registry::{Layer, sha256};

/// Ends the registry with the test.
struct Served(Child);

impl Drop for Served {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn run(program: &str, arguments: &[&str]) -> String {
    let output = Command::new(program).args(arguments).output().unwrap();
    assert!(output.status.success(), "{program} {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

/// Password "secret" of user "joey", as `htpasswd -B` writes it.
const HTPASSWD: &str = "joey:$2b$05$abcdefghijklmnopqrstuuOQiyCxlgf/oeuTqixKmWdcYUh4Hjl0a\n";

fn serve(dir: &Path) -> (Served, String) {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap().to_string();
    drop(listener);
    std::fs::write(dir.join("htpasswd"), HTPASSWD).unwrap();
    let config = format!(
        "version: 0.1\nstorage:\n  filesystem:\n    rootdirectory: {0}/storage\nhttp:\n  addr: {address}\n\
         auth:\n  htpasswd:\n    realm: test\n    path: {0}/htpasswd\n",
        dir.display()
    );
    std::fs::write(dir.join("config.yml"), config).unwrap();
    let child = Command::new("docker-registry")
        .arg("serve")
        .arg(dir.join("config.yml"))
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let served = Served(child);
    let deadline = Instant::now() + Duration::from_secs(20);
    while std::net::TcpStream::connect(&address).is_err() {
        assert!(Instant::now() < deadline, "docker-registry did not start");
        std::thread::yield_now();
    }
    (served, address)
}

/// An OCI layout of two layers, tagged `1`.
fn layout(dir: &Path) {
    let mut lower = Layer::new();
    lower.file("etc/conf", b"lower", 0o644, (0, 0));
    lower.file("etc/gone", b"gone", 0o644, (0, 0));
    lower.file("cache/old", b"old", 0o644, (0, 0));
    lower.file("bin/tool", &[9; 10_000], 0o6755, (0, 12));
    lower.link("bin/alias", "bin/tool");
    lower.device("dev/zero", b'3', (1, 5));
    lower.pax(&[("SCHILY.xattr.user.mark", b"a\0b")]);
    lower.file("marked", b"m", 0o600, (70_000, 70_001));
    lower.directory("usr", 0o755, (0, 0));
    lower.directory("usr/lib", 0o751, (7, 7));
    lower.file("usr/lib/old", b"old", 0o644, (0, 0));
    lower.file("usr/lib/kept", b"kept", 0o644, (0, 0));
    lower.symlink("lib", "usr/lib");
    lower.directory("run", 0o755, (0, 0));
    lower.directory("var", 0o755, (0, 0));
    lower.symlink("var/run", "/run");
    lower.symlink("up", "var/../../../run/./");
    lower.symlink("replaced", "/run");
    let mut upper = Layer::new();
    // Through links of the layer below, which stay.
    upper.file("lib/new", &vec![b'n'; 10_000], 0o644, (1, 2));
    upper.link("lib/same", "lib/new");
    upper.file("lib/.wh.old", b"", 0, (0, 0));
    upper.directory("lib/listed", 0o700, (3, 3));
    upper.symlink("lib/listed/link", "../new");
    upper.device("lib/listed/null", b'3', (1, 3));
    upper.pax(&[("SCHILY.xattr.user.colour", b"red")]);
    upper.file("var/run/lock", b"", 0o600, (0, 0));
    upper.file("up/there", b"x", 0o640, (0, 9));
    upper.directory("replaced", 0o711, (0, 0));
    upper.file("replaced/here", b"x", 0o644, (0, 0));
    upper.file("etc/conf", b"upper", 0o600, (5, 6));
    upper.file("etc/.wh.gone", b"", 0, (0, 0));
    upper.file("cache/.wh..wh..opq", b"", 0, (0, 0));
    upper.file("cache/new", b"new", 0o644, (0, 0));
    let layers = [lower.gzip(), upper.gzip()];
    let blobs = dir.join("blobs/sha256");
    std::fs::create_dir_all(&blobs).unwrap();
    let put = |bytes: &[u8], kind: &str| {
        let digest = sha256(bytes);
        std::fs::write(blobs.join(&digest[7..]), bytes).unwrap();
        format!(r#"{{"mediaType":"application/vnd.oci.image.{kind}","digest":"{digest}","size":{}"#, bytes.len())
    };
    let architecture = if cfg!(target_arch = "aarch64") { "arm64" } else { "amd64" };
    let config = format!(
        r#"{{"architecture":"{architecture}","os":"linux","config":{{"Env":["A=b"]}},
        "rootfs":{{"type":"layers","diff_ids":["{}","{}"]}}}}"#,
        layers[0].diff_id, layers[1].diff_id
    );
    let of_layers: Vec<String> = layers.iter().map(|layer| put(&layer.blob, "layer.v1.tar+gzip") + "}").collect();
    let config = put(config.as_bytes(), "config.v1+json") + "}";
    let manifest = format!(
        r#"{{"schemaVersion":2,"mediaType":"application/vnd.oci.image.manifest.v1+json","config":{config},"layers":[{}]}}"#,
        of_layers.join(",")
    );
    let entry = put(manifest.as_bytes(), "manifest.v1+json");
    let index = format!(
        r#"{{"schemaVersion":2,"manifests":[{entry},"annotations":{{"org.opencontainers.image.ref.name":"1"}}}}]}}"#
    );
    std::fs::write(dir.join("index.json"), index).unwrap();
    std::fs::write(dir.join("oci-layout"), r#"{"imageLayoutVersion":"1.0.0"}"#).unwrap();
}

/// Everything below a folder as text: path, mode, owner, links, device, size, target, attributes, contents' hash.
const LISTING: &str = r#"
import os, sys, hashlib
root = sys.argv[1]
for folder, folders, files in os.walk(root):
    for name in folders + files:
        path = os.path.join(folder, name)
        s = os.lstat(path)
        directory = os.path.isdir(path) and not os.path.islink(path)
        content = hashlib.sha256(open(path, 'rb').read()).hexdigest() if (s.st_mode & 0o170000) == 0o100000 else ''
        target = os.readlink(path) if os.path.islink(path) else ''
        xattrs = [(x, os.getxattr(path, x, follow_symlinks=False)) for x in sorted(os.listxattr(path, follow_symlinks=False))]
        links, size, time = (0, 0, 0) if directory else (s.st_nlink, s.st_size, int(s.st_mtime))
        print(os.path.relpath(path, root), oct(s.st_mode), s.st_uid, s.st_gid, links, s.st_rdev, size, time, target, xattrs, content)
"#;

fn listing(dir: &Path) -> Vec<String> {
    let text = run("python3", &["-c", LISTING, dir.to_str().unwrap()]);
    let mut lines: Vec<String> = text.lines().map(str::to_owned).collect();
    lines.sort();
    lines
}

#[tokio::test(flavor = "multi_thread")]
async fn mounted_images_are_what_umoci_unpacks() {
    let has = |program: &str| Command::new(program).arg("--version").output().is_ok();
    if !nix::unistd::geteuid().is_root()
        || !["docker-registry", "skopeo", "umoci", "python3"].iter().all(|program| has(program))
    {
        return eprintln!("SKIPPED: root, docker-registry, skopeo, umoci and python3 are needed");
    }
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
    layout(Path::new(&at("layout")));
    run("umoci", &["unpack", "--image", &format!("{}:1", at("layout")), &at("bundle")]);
    let (_served, address) = serve(dir.path());
    let source = format!("oci:{}:1", at("layout"));
    let pushed = format!("docker://{address}/team/app:1");
    run("skopeo", &["copy", "--dest-tls-verify=false", "--dest-creds", "joey:secret", &source, &pushed]);
    std::fs::write(at("docker.json"), format!(r#"{{"auths":{{"{address}":{{"auth":"am9leTpzZWNyZXQ="}}}}}}"#)).unwrap();
    let mut config = Config::new(at("images"), at("layers"));
    config.docker_config = Some(at("docker.json").into());
    let images = Images::open(config).await.unwrap();
    let name = ImageRef::parse(&format!("{address}/team/app:1")).unwrap();
    let image = images.pull(&name, &[], |_| {}).await.unwrap();
    let exact = ImageRef::parse(&format!("{address}/team/app@{}", image.manifest)).unwrap();
    assert_eq!(images.pull(&exact, &[], |_| {}).await.unwrap().id, image.id);

    let mounts = images.mount(&image).await.unwrap();
    let lower: Vec<&str> = mounts.iter().map(|mount| mount.folder.to_str().unwrap()).collect();
    std::fs::create_dir(at("merged")).unwrap();
    run("mount", &["-t", "overlay", "overlay", "-o", &format!("ro,lowerdir={}", lower.join(":")), &at("merged")]);
    let (ours, theirs) = (listing(Path::new(&at("merged"))), listing(Path::new(&at("bundle/rootfs"))));
    run("umount", &[&at("merged")]);
    images.unmount_all().await.unwrap();
    // Directories that no entry names get their owner and mode from the tool; times of the link target differ in none.
    assert_eq!(ours, theirs);

    for (kind, file) in [("oci-archive", "oci.tar"), ("docker-archive", "docker.tar")] {
        run("skopeo", &["copy", &source, &format!("{kind}:{}:team/app:2", at(file))]);
        let name = ImageRef::parse("team/app:2").unwrap();
        let imported = images.import(at(file), &name).await.unwrap();
        assert_eq!(imported.layers, image.layers, "{kind}");
    }
    assert_eq!(images.list().iter().map(|image| image.references.len()).sum::<usize>(), 3);
}
