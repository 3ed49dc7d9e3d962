//! Point 5: how registries are spoken to: tokens and the services that hand them out, and indexes of many platforms.

use joey_tests::image::{Entry, Image, Layer, Packing, digest};
use joey_tests::joey::pod;
use joey_tests::registry::{PASSWORD, USER, demo_layout};
use joey_tests::served::Served;
use joey_tests::tokens::Tokens;
use joey_tests::{Joey, Registry, Settings, seconds, wait_until};
use serde_json::{Value, json};

const OCI_MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
const OCI_INDEX: &str = "application/vnd.oci.image.index.v1+json";
const DOCKER_MANIFEST: &str = "application/vnd.docker.distribution.manifest.v2+json";
const DOCKER_LIST: &str = "application/vnd.docker.distribution.manifest.list.v2+json";

/// A Joey with a docker configuration file, and a way to write that.
fn with_docker_config(registry: &str) -> (Joey, impl Fn(&str) + use<>, tempfile::TempDir) {
    let dir = tempfile::TempDir::with_prefix("joey-docker-").expect("a temporary folder");
    let file = dir.path().join("config.json");
    let arguments = vec!["--docker-config".to_owned(), file.display().to_string()];
    let registry = registry.to_owned();
    let write = move |password: &str| {
        let auths = match password {
            "" => json!({}),
            password => json!({&registry: {"username": USER, "password": password}}),
        };
        std::fs::write(&file, json!({"auths": auths}).to_string()).expect("a fresh folder is writable");
    };
    write("");
    (Joey::start_with(Settings { arguments, ..Settings::default() }), write, dir)
}

/// What `kubectl describe` says of a Pod's events, once `part` is in them.
fn events(joey: &Joey, pod: &str, part: &str) -> String {
    wait_until(&format!("an event of Pod {pod} says {part:?}"), seconds(60), || {
        let text = joey.kubectl(&["describe", "pod", pod]).ok();
        let events = text.split_once("\nEvents:").map_or("", |(_, events)| events).to_owned();
        if events.contains(part) { Ok(events) } else { Err(text) }
    })
}

#[test]
fn tokens_of_a_real_registry() {
    let tokens = Tokens::start();
    let registry = Registry::with_tokens(&tokens);
    let (joey, write, _dir) = with_docker_config(&registry.address());
    let private = registry.demo();

    let refused = joey.joey(&["image", "pull", &private]).fails(1);
    assert!(refused.contains("without credentials") && refused.contains("imagePullSecrets"), "{refused}");
    assert!(tokens.asked().last().is_some_and(|asked| !asked.with_credentials));
    joey.joey(&["image", "pull", &registry.image("public/hello:1")]).ok();

    write("vinegar");
    let refused = joey.joey(&["image", "pull", &private]).fails(1);
    assert!(refused.contains("with the credentials given") && refused.contains("hint:"), "{refused}");
    write(PASSWORD);
    let before = tokens.asked().len();
    tokens.hand_out_stale(1);
    joey.joey(&["image", "pull", &private]).ok();
    let asked = tokens.asked();
    assert_eq!(asked.len() - before, 2, "a token that has expired is replaced: {asked:?}");
    assert!(asked[before..].iter().all(|asked| asked.scope == "repository:joey/hello:pull"), "{asked:?}");

    // The same by a Pod, whose Secret is the only credential.
    write("");
    let server = format!("--docker-server={}", registry.address());
    for (name, password) in [("wrong", "vinegar"), ("right", PASSWORD)] {
        let arguments = [format!("--docker-username={USER}"), format!("--docker-password={password}")];
        joey.kubectl(&["create", "secret", "docker-registry", name, &server, &arguments[0], &arguments[1]]).ok();
        let mut object = pod(name, &private, &[]);
        object["spec"]["imagePullSecrets"] = json!([{"name": name}]);
        object["spec"]["containers"][0]["imagePullPolicy"] = json!("Always");
        joey.apply(&object);
    }
    joey.wait_for("right", "Ready", seconds(60));
    let told = events(&joey, "wrong", "Failed");
    assert!(told.contains("with the credentials given") && told.contains(&registry.address()), "{told}");
    assert!(told.contains("check user and password"), "the way out is told: {told}");
    for secret in [PASSWORD, "vinegar"] {
        assert!(!joey.output().contains(secret) && !told.contains(secret), "a password is never told");
    }
}

#[test]
fn tokens_that_run_out_during_a_pull_are_replaced() {
    let (tokens, served) = (Tokens::start(), Served::start());
    let joey = Joey::start();
    let layers: Vec<_> =
        (0..6).map(|n: u8| Layer::new(&[Entry::file("n", &vec![n; 50_000])], Packing::Plain)).collect();
    let last = layers[5].digest();
    let image = served.add("guarded:1", &Image::new(layers, json!({})));
    served.guard(&tokens.realm(), 3);
    served.break_off(&last, 20_000);
    joey.joey(&["image", "pull", &image]).ok();
    // Nine requests, three to a token.
    assert!(tokens.asked().len() >= 3, "{:?}", tokens.asked());
    assert!(served.requests(&last).iter().any(|request| request.from.is_some()), "{:?}", served.requests(&last));
}

#[test]
fn many_starts_at_once_make_few_calls_for_tokens() {
    const PODS: usize = 200;
    let tokens = Tokens::start();
    let registry = Registry::with_tokens(&tokens);
    let dir = tempfile::TempDir::with_prefix("joey-docker-").expect("a temporary folder");
    let file = dir.path().join("config.json");
    let auths = json!({registry.address(): {"username": USER, "password": PASSWORD}});
    std::fs::write(&file, json!({"auths": auths}).to_string()).expect("a fresh folder is writable");
    let arguments = vec!["--docker-config".to_owned(), file.display().to_string()];
    let range = Some(format!("198.18.{}.0/22", rand::random::<u8>() & 0xfc));
    let joey = Joey::start_with(Settings { arguments, range, ..Settings::default() });
    let since = |before: usize| tokens.asked().len() - before;

    // A time that the service names is waited for, once.
    tokens.turn_away(1, "429 Too Many Requests", Some(2));
    let (before, begin) = (tokens.asked().len(), std::time::Instant::now());
    joey.joey(&["image", "pull", &registry.image("public/hello:1")]).ok();
    assert!(begin.elapsed() >= seconds(2) && since(before) == 2, "{:?} {}", begin.elapsed(), since(before));

    // While the service fails, few calls are made for all Pods together, and every Pod says why it waits.
    tokens.turn_away(usize::MAX, "503 Service Unavailable", None);
    let before = tokens.asked().len();
    let pods: Vec<Value> = (0..PODS)
        .map(|number| {
            let mut object = pod(&format!("many-{number}"), &registry.demo(), &["sleep", "1000"]);
            object["spec"]["containers"][0]["imagePullPolicy"] = "Always".into();
            object
        })
        .collect();
    joey.apply(&json!({"apiVersion": "v1", "kind": "List", "items": pods}));
    let in_state = |part: &str| {
        let table = joey.kubectl(&["get", "pods", "--no-headers"]).ok();
        table.lines().filter(|line| line.contains(part)).count()
    };
    wait_until("every Pod waits", seconds(60), || {
        let count = in_state("ErrImagePull") + in_state("ImagePullBackOff");
        joey_tests::holds(count == PODS, count)
    });
    let calls = since(before);
    assert!(calls <= 9, "{calls} calls for {PODS} Pods");
    let told = events(&joey, "many-0", "call guard");
    for part in ["token service", "503 Service Unavailable", "lets the next call through at 2"] {
        assert!(told.contains(part), "{part} in {told}");
    }

    // When it is well again all start, with one token.
    tokens.turn_away(0, "", None);
    let before = tokens.asked().len();
    wait_until("every Pod runs", seconds(120), || {
        let count = in_state("Running");
        joey_tests::holds(count == PODS, count)
    });
    assert_eq!(since(before), 1, "{:?}", &tokens.asked()[before..]);
}

#[test]
fn calls_for_tokens_keep_to_the_rate_of_each_service() {
    const CALLS: usize = 12;
    const BURST: usize = 2;
    let dir = tempfile::TempDir::with_prefix("joey-guards-").expect("a temporary folder");
    let file = dir.path().join("joey.yaml");
    let text = format!("guards:\n  registryTokens: {{perSecond: 1, burst: {BURST}}}\n");
    std::fs::write(&file, text).expect("a fresh folder is writable");
    let arguments = vec!["--config".to_owned(), file.display().to_string()];
    let joey = Joey::start_with(Settings { arguments, ..Settings::default() });
    // A token is good for two requests, so that pulls want more of them than the rate lets through; of two services at once, so
    // that neither holds up the other.
    let services = [(); 2].map(|()| {
        let (tokens, served) = (Tokens::start(), Served::start());
        served.guard(&tokens.realm(), 2);
        (tokens, served)
    });
    let puller = &joey;
    std::thread::scope(|scope| {
        for (tokens, served) in &services {
            scope.spawn(move || {
                for number in (0..).take_while(|_| tokens.asked().len() < CALLS) {
                    let name = format!("paced:{number}");
                    let layer = Layer::new(&[Entry::file("n", served.image(&name).as_bytes())], Packing::Plain);
                    puller.joey(&["image", "pull", &served.add(&name, &Image::new(vec![layer], json!({})))]).ok();
                }
            });
        }
    });
    for (tokens, _) in &services {
        let times: Vec<_> = tokens.asked().iter().map(|asked| asked.at).collect();
        let took = (times[times.len() - 1] - times[0]).as_secs_f64();
        let rate = (times.len() - BURST) as f64 / took;
        assert!((0.9..=1.1).contains(&rate), "{} calls in {took:.1} s: {rate:.2} a second after a burst", times.len());
        for (number, first) in times.iter().enumerate() {
            for (more, later) in times[number..].iter().enumerate() {
                let allowed = BURST as f64 + (*later - *first).as_secs_f64();
                assert!((more + 1) as f64 <= allowed + 0.3, "{} calls where {allowed:.1} may be made", more + 1);
            }
        }
    }
}

#[test]
fn credentials_go_to_nobody_else() {
    let served = Served::start();
    let (joey, write, _dir) = with_docker_config(&served.image("")[..served.image("").len() - 1]);
    write(PASSWORD);
    let image = served.add("elsewhere:1", &Image::new(vec![Layer::new(&[], Packing::Gzip)], json!({})));
    // TEST-NET-1 (RFC 5737): a call there would hang.
    for realm in ["http://192.0.2.1/token", "http://169.254.169.254/latest/meta-data", "file:///etc/shadow"] {
        served.guard(realm, 1);
        let refused = joey.joey(&["image", "pull", &image]).fails(1);
        assert!(refused.contains("is not asked") && refused.contains("https"), "{realm}: {refused}");
    }
    // A service that is away is named.
    let away = joey_tests::registry::free_address();
    served.guard(&format!("http://{away}/token"), 1);
    let refused = joey.joey(&["image", "pull", &image]).fails(1);
    assert!(refused.contains(&format!("token service {away}")), "{refused}");
    assert!(!joey.output().contains(PASSWORD));
}

/// An index or list of manifests: kind, architecture, bytes.
fn index(kind: &str, entries: &[(&str, Option<&str>, &str)]) -> String {
    let entries: Vec<Value> = entries
        .iter()
        .map(|(kind, architecture, bytes)| {
            let mut entry = json!({"mediaType": kind, "digest": digest(bytes.as_bytes()), "size": bytes.len()});
            if let Some(architecture) = architecture {
                entry["platform"] = json!({"os": "linux", "architecture": architecture});
            }
            entry
        })
        .collect();
    json!({"schemaVersion": 2, "mediaType": kind, "manifests": entries}).to_string()
}

#[test]
fn indexes_and_lists_of_a_real_registry() {
    let registry = Registry::with_demo_image();
    registry.push_as(&demo_layout(), "joey/hello:docker", "v2s2");
    let oci = registry.manifest("joey/hello:1", OCI_MANIFEST);
    let docker = registry.manifest("joey/hello:docker", DOCKER_MANIFEST);
    assert!(docker.contains(DOCKER_MANIFEST), "{docker}");
    let put = |tag: &str, kind: &str, entries: &[(&str, Option<&str>, &str)]| {
        let bytes = index(kind, entries);
        registry.put_manifest(&format!("joey/hello:{tag}"), kind, bytes.as_bytes());
        bytes
    };
    // The foreign architecture's entry is the other manifest: taking it would show in the digest.
    let entries = [(DOCKER_MANIFEST, Some("arm64"), &*docker), (OCI_MANIFEST, Some("amd64"), &*oci)];
    let plain = put("index", OCI_INDEX, &entries);
    let entries = [(OCI_MANIFEST, Some("s390x"), &*oci), (DOCKER_MANIFEST, Some("amd64"), &*docker)];
    put("list", DOCKER_LIST, &entries);
    let foreign = put("foreign", OCI_INDEX, &[(OCI_MANIFEST, Some("arm64"), &*oci)]);
    put("nested", OCI_INDEX, &[(OCI_INDEX, None, &*foreign), (OCI_INDEX, None, &*plain)]);

    let joey = Joey::start();
    let by_digest = format!("{}@{}", registry.image("joey/hello"), digest(plain.as_bytes()));
    for (image, manifest) in [
        (registry.image("joey/hello:index"), &oci),
        (registry.image("joey/hello:list"), &docker),
        (registry.image("joey/hello:nested"), &oci),
        (by_digest.clone(), &oci),
    ] {
        joey.joey(&["image", "pull", &image]).ok();
        let images = joey.joey(&["image", "ls", "-o", "json"]).json();
        let named = |entry: &&Value| entry["references"].as_array().is_some_and(|names| names.contains(&json!(image)));
        let entry = images.as_array().and_then(|images| images.iter().find(named)).expect("the image is listed");
        assert_eq!(entry["manifestDigest"], digest(manifest.as_bytes()), "{image}: {entry}");
    }
    joey.run_pod("by-index", &by_digest, &[]);

    let image = registry.image("joey/hello:foreign");
    let refused = joey.joey(&["image", "pull", &image]).fails(1);
    let words = "no variant for linux/amd64; available: linux/arm64";
    assert!(refused.contains(words) && refused.contains("hint:"), "{refused}");
    joey.apply(&pod("foreign", &image, &[]));
    let told = events(&joey, "foreign", "Failed");
    assert!(told.contains(words), "{told}");
}
