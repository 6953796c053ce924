//! Blobs from real servers: Debian's registry with passwords and tokens, nginx with
//! TLS and signed links, an S3-compatible store.

use std::ops::Range;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use storage::BlobId;
use storage::backend::object::{Keys, Login, ObjectBackend, ObjectConfig, Store};
use storage::backend::registry::{
    ClientCertificate, Credentials, Mirror, RegistryBackend, RegistryConfig, Scheme,
};
use storage::backend::{Backend, BackendError, Fetch, Priority, fetch_to_vec};
use storage::metrics::Metrics;
use support::binaries::nydus_image;
use support::command::succeed;
use support::image::layout::{self, Image};
use support::nginx::{Authority, Nginx};
use support::object_store::{ACCESS_KEY, BUCKET, ObjectStore, SECRET_KEY};
use support::registry::{Auth, PASSWORD, Registry, USER, free_port};
use support::tokens::TokenServer;
use support::tree::nasty::noise;

use crate::scene::{Scene, assert_same_tree};

const SIZE: usize = 1_000_000;

/// A registry with one blob in the repository `some/app`.
struct Stage {
    registry: Registry,
    blob: BlobId,
    bytes: Vec<u8>,
}

impl Stage {
    fn new(auth: Auth) -> Self {
        let tokens = matches!(auth, Auth::Bearer(_));
        let registry = Registry::start(auth).unwrap();
        let scene = Scene::new();
        let file = scene.path("blob");
        std::fs::write(&file, noise(SIZE, 7)).unwrap();
        let digest = if tokens {
            push_with_skopeo(&scene, &registry, &file)
        } else {
            registry.push_blob("some/app", &file).unwrap()
        };
        let blob = BlobId::new(digest.trim_start_matches("sha256:")).unwrap();
        // Layers of images are compressed on the way.
        let bytes = std::fs::read(registry.blob_file(&digest).unwrap()).unwrap();
        Self {
            registry,
            blob,
            bytes,
        }
    }

    fn config(&self) -> RegistryConfig {
        let mut config = RegistryConfig::new(self.registry.host(), "some/app");
        config.scheme = Scheme::Http;
        config
    }

    fn expect(&self, backend: &dyn Backend) {
        for range in [0..1, 17..70_000, 999_000..1_000_000] {
            let got = fetch(backend, &self.blob, range.clone());
            let got = got.unwrap_or_else(|error| panic!("{:#}", anyhow::Error::new(error)));
            assert!(got == self.bytes[usize_range(&range)], "{range:?}");
        }
        let size = u64::try_from(self.bytes.len()).unwrap();
        assert_eq!(backend.size(&self.blob).unwrap(), size);
    }
}

/// Where only whole images can be pushed: as the layer of one.
fn push_with_skopeo(scene: &Scene, registry: &Registry, file: &Path) -> String {
    let layout = scene.path("layout");
    support::image::layout::write(&layout, "x", &[support::image::layout::Image::new(&[file])])
        .unwrap();
    registry.push(&layout, "x", "some/app:x").unwrap();
    let manifest = registry.manifest_json("some/app:x").unwrap();
    manifest["layers"][0]["digest"].as_str().unwrap().to_owned()
}

fn usize_range(range: &Range<u64>) -> Range<usize> {
    usize::try_from(range.start).unwrap()..usize::try_from(range.end).unwrap()
}

fn fetch(backend: &dyn Backend, blob: &BlobId, range: Range<u64>) -> Result<Vec<u8>, BackendError> {
    let priority = Priority::OnDemand;
    let request = Fetch {
        blob,
        range,
        priority,
        served_by: None,
        direct: false,
        blob_len: None,
    };
    fetch_to_vec(backend, &request, 1 << 24)
}

fn someone(password: &str) -> Credentials {
    Credentials::Basic {
        username: USER.to_owned(),
        password: password.to_owned(),
    }
}

fn counter(metrics: &Metrics, name: &str) -> u64 {
    let all = metrics.snapshot();
    all.iter()
        .find(|(metric, _)| metric.name == name)
        .unwrap()
        .1
}

#[test]
fn a_registry_with_passwords() {
    let stage = Stage::new(Auth::Basic);
    let mut config = stage.config();
    config.auth = someone("wrong");
    let backend = RegistryBackend::new(config).unwrap();
    let error = fetch(&backend, &stage.blob, 0..1).unwrap_err();
    assert!(matches!(error, BackendError::Auth { .. }), "{error}");
    backend.set_credentials(someone(PASSWORD)).unwrap();
    stage.expect(&backend);
}

#[test]
fn a_registry_with_tokens() {
    let stage = Stage::new(Auth::Bearer(TokenServer::start().unwrap()));
    let mut config = stage.config();
    let anonymous = RegistryBackend::new(config.clone()).unwrap();
    let error = fetch(&anonymous, &stage.blob, 0..1).unwrap_err();
    assert!(matches!(error, BackendError::Auth { .. }), "{error}");
    config.auth = someone(PASSWORD);
    let backend = RegistryBackend::new(config).unwrap();
    stage.expect(&backend);
    // Sixteen at once share one token.
    thread::scope(|scope| {
        for _ in 0..16 {
            scope.spawn(|| stage.expect(&backend));
        }
    });
}

/// Credentials come from a helper, as docker's configuration names it.
#[test]
fn an_image_behind_a_credential_helper() {
    let scene = Scene::new();
    let registry = Registry::start(Auth::Basic).unwrap();
    let source = scene.small_tree();
    let (tar, layout) = (scene.path("layer.tar"), scene.path("layout"));
    support::image::layer::write_tree(&source, &tar).unwrap();
    layout::write(&layout, "x", &[Image::new(&[&tar])]).unwrap();

    let helper = scene.dir("bin").join("docker-credential-test");
    let script = format!(
        "#!/bin/sh\nread host\necho \"$host\" >> {}\n\
         echo '{{\"ServerURL\":\"\",\"Username\":\"{USER}\",\"Secret\":\"{PASSWORD}\"}}'\n",
        scene.path("asked").display()
    );
    std::fs::write(&helper, script).unwrap();
    succeed(Command::new("chmod").arg("755").arg(&helper)).unwrap();
    let docker = scene.dir("docker");
    let config = format!(r#"{{"credHelpers":{{"{}":"test"}}}}"#, registry.host());
    std::fs::write(docker.join("config.json"), config).unwrap();
    let paths = std::env::var("PATH").unwrap();
    let with_helper = |command: &mut Command| {
        let path = format!("{}:{paths}", scene.dir("bin").display());
        command.env("DOCKER_CONFIG", &docker).env("PATH", path);
    };

    let image = registry.reference("app:nydus");
    let mut convert = nydus_image().unwrap();
    with_helper(
        convert
            .arg("convert")
            .arg(format!("oci:{}:x", layout.display())),
    );
    succeed(convert.arg(&image)).unwrap();
    let point = scene.new_point();
    let mut mount = scene.mount_command(&image, &point);
    with_helper(&mut mount);
    let daemon = scene.start(&mut mount, &point);
    assert_same_tree(&source, &point);
    drop(daemon);
    let asked = std::fs::read_to_string(scene.path("asked")).unwrap();
    assert!(asked.lines().all(|line| line == registry.host()) && asked.lines().count() >= 2);
}

/// A link to the blob that nginx accepts until `end`, signed as its module wants.
fn link(path: &str, end: u64) -> String {
    let text = format!("{end}{path} secret");
    let mut openssl = Command::new("sh");
    openssl.args([
        "-c",
        "printf %s \"$0\" | openssl md5 -binary | base64",
        &text,
    ]);
    let digest = succeed(&mut openssl).unwrap().stdout;
    let digest = digest.trim().replace('+', "-").replace('/', "_");
    format!("{path}?md5={}&expires={end}", digest.trim_end_matches('='))
}

fn now() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap()
        .as_secs()
}

/// Two servers: one sends readers of the blob to the other, with a link that is good
/// until `end`.
fn signing_servers(stage: &Stage, front: u16, store: u16, end: u64) -> String {
    let blob = &stage.blob;
    let file = stage.registry.blob_file(&format!("sha256:{blob}")).unwrap();
    let target = link("/object", end);
    format!(
        "server {{ listen 127.0.0.1:{front};
           location / {{ return 307 http://127.0.0.1:{store}{target}; }}
         }}
         server {{ listen 127.0.0.1:{store};
           location = /object {{
             secure_link $arg_md5,$arg_expires;
             secure_link_md5 \"$secure_link_expires$uri secret\";
             if ($secure_link = \"\") {{ return 403; }}
             if ($secure_link = \"0\") {{ return 403; }}
             alias {};
           }}
         }}\n",
        file.display()
    )
}

#[test]
fn signed_links_to_a_second_host_end_and_are_renewed() {
    let stage = Stage::new(Auth::Open);
    let (front, store) = (free_port().unwrap(), free_port().unwrap());
    let hosts = [format!("127.0.0.1:{front}"), format!("127.0.0.1:{store}")];
    let servers = |end| signing_servers(&stage, front, store, end);
    let nginx = Nginx::start(&servers(now() + 6), &[&hosts[0], &hosts[1]]).unwrap();
    let metrics = Arc::new(Metrics::default());
    let mut config = stage.config();
    config.host.clone_from(&hosts[0]);
    config.headers = vec![("authorization".into(), "Basic c2VjcmV0".into())];
    let backend = RegistryBackend::with_metrics(config.clone(), Arc::clone(&metrics)).unwrap();
    stage.expect(&backend);
    stage.expect(&backend);
    let asked = |port: u16, status: &str| {
        let (port, status) = (format!("{port} GET"), format!(" {status} "));
        let requests = nginx.requests();
        let hit = |line: &&String| line.starts_with(&port) && line.contains(&status);
        requests.iter().filter(hit).count()
    };
    assert_eq!(asked(front, "307"), 1, "{:?}", nginx.requests());

    // It ends: the store would refuse it, so it is not even tried.
    nginx.reload(&servers(now() + 600)).unwrap();
    thread::sleep(Duration::from_millis(3500));
    stage.expect(&backend);
    assert_eq!(asked(front, "307"), 2, "{:?}", nginx.requests());
    assert_eq!(asked(store, "403"), 0, "{:?}", nginx.requests());

    // The store's secret changes: what is refused is renewed, readers see nothing.
    let other = |end| servers(end).replace(" secret\";", " other\";");
    nginx.reload(&other(now() + 600)).unwrap();
    thread::sleep(Duration::from_millis(500));
    let error = fetch(&backend, &stage.blob, 0..1);
    assert!(
        error.is_err(),
        "the links of the registry are signed with the old secret"
    );
    nginx.reload(&servers(now() + 600)).unwrap();
    thread::sleep(Duration::from_millis(500));
    stage.expect(&backend);
    assert!(counter(&metrics, "backend.redirects_renewed") >= 1);
    let at_store = format!("{store} ");
    for line in nginx.requests() {
        let to_store = line.starts_with(&at_store);
        assert!(!to_store || line.ends_with("auth=-"), "{line}");
    }
}

#[test]
fn tls_with_an_authority_of_its_own_and_client_certificates() {
    let stage = Stage::new(Auth::Basic);
    let authority = Authority::new().unwrap();
    let (certificate, key) = authority.issue("server", "IP:127.0.0.1,IP:::1").unwrap();
    let (client, client_key) = authority.issue("client", "DNS:client").unwrap();
    let port = free_port().unwrap();
    let plain = free_port().unwrap();
    let servers = format!(
        "server {{ listen 127.0.0.1:{port} ssl http2; listen [::1]:{port} ssl http2;
           ssl_certificate {}; ssl_certificate_key {};
           ssl_client_certificate {}; ssl_verify_client on;
           location / {{ proxy_pass http://{}; proxy_set_header Host $http_host; }} }}
         server {{ listen [::1]:{plain};
           location / {{ proxy_pass http://{}; proxy_set_header Host $http_host; }} }}\n",
        certificate.display(),
        key.display(),
        authority.certificate().display(),
        stage.registry.host(),
        stage.registry.host(),
    );
    let hosts = [format!("127.0.0.1:{port}"), format!("[::1]:{port}")];
    let nginx = Nginx::start(&servers, &[&hosts[0], &hosts[1]]).unwrap();
    let mut config = stage.config();
    config.auth = someone(PASSWORD);
    config.retry.retries = 0;
    config.scheme = Scheme::Https;
    for host in &hosts {
        config.host.clone_from(host);
        config.ca_files = vec![authority.certificate()];
        config.client_certificate = Some(ClientCertificate {
            certificate: client.clone(),
            key: client_key.clone(),
        });
        stage.expect(&RegistryBackend::new(config.clone()).unwrap());
    }
    let requests = nginx.requests();
    let good = requests.iter().filter(|line| line.contains(" 206 "));
    let mut count = 0;
    for line in good {
        assert!(line.contains("HTTP/2.0 CN=client"), "{line}");
        count += 1;
    }
    assert!(count >= 6, "{requests:?}");

    // Without each of the two it does not work.
    let mut without = config.clone();
    without.client_certificate = None;
    let error = fetch(&RegistryBackend::new(without).unwrap(), &stage.blob, 0..1).unwrap_err();
    assert!(error.to_string().contains("400") || chain(error).contains("400"));
    config.ca_files.clear();
    let error = fetch(
        &RegistryBackend::new(config.clone()).unwrap(),
        &stage.blob,
        0..1,
    );
    let text = chain(error.unwrap_err()).to_lowercase();
    assert!(text.contains("certificate"), "{text}");
    config.skip_verify = true;
    stage.expect(&RegistryBackend::new(config.clone()).unwrap());

    // Without TLS, at an address of version 6.
    config.scheme = Scheme::Http;
    config.host = format!("[::1]:{plain}");
    config.client_certificate = None;
    stage.expect(&RegistryBackend::new(config).unwrap());
}

fn chain(error: BackendError) -> String {
    format!("{:#}", anyhow::Error::new(error))
}

#[test]
fn a_mirror_that_goes_away_and_comes_back() {
    let stage = Stage::new(Auth::Basic);
    let port = free_port().unwrap();
    let host = format!("127.0.0.1:{port}");
    let servers = format!(
        "server {{ listen {host};
           location = /ping {{ return 200; }}
           location / {{ proxy_pass http://{}; proxy_set_header Host $http_host; }} }}\n",
        stage.registry.host()
    );
    let mut config = stage.config();
    config.auth = someone(PASSWORD);
    config.mirrors = vec![Mirror {
        ping_url: Some(format!("http://{host}/ping")),
        health_check_interval: Duration::from_millis(100),
        ..Mirror::new(&format!("http://{host}"))
    }];
    let backend = RegistryBackend::new(config).unwrap();
    stage.expect(&backend);
    let nginx = Nginx::start(&servers, &[&host]).unwrap();
    thread::sleep(Duration::from_millis(1000));
    stage.expect(&backend);
    let served = |nginx: &Nginx| {
        let requests = nginx.requests();
        requests
            .iter()
            .filter(|line| line.contains(" 206 "))
            .count()
    };
    assert!(served(&nginx) >= 3, "{:?}", nginx.requests());
    drop(nginx);
    stage.expect(&backend);
}

#[test]
fn an_s3_compatible_store() {
    let store = ObjectStore::start().unwrap();
    let bytes = noise(SIZE, 8);
    let blob = BlobId::new(&"cd".repeat(32)).unwrap();
    store.put(&format!("some/prefix/{blob}"), &bytes).unwrap();
    let region = "us-east-1".to_owned();
    let mut config = ObjectConfig::new(Store::S3 { region }, store.host(), BUCKET);
    config.scheme = Scheme::Http;
    config.prefix = "some/prefix/".to_owned();
    config.retry.retries = 0;
    let keys = |secret: &str| {
        Login::Keys(Keys {
            id: ACCESS_KEY.to_owned(),
            secret: secret.to_owned(),
        })
    };
    config.login = keys(SECRET_KEY);
    let backend = ObjectBackend::new(&config).unwrap();
    for range in [0..1, 17..70_000, 999_000..1_000_000] {
        let got = fetch(&backend, &blob, range.clone());
        let got = got.unwrap_or_else(|error| panic!("{}: {}", chain(error), store.log()));
        assert!(got == bytes[usize_range(&range)], "{range:?}");
    }
    assert_eq!(backend.size(&blob).unwrap(), 1_000_000);

    let none = BlobId::new(&"ef".repeat(32)).unwrap();
    let error = fetch(&backend, &none, 0..1).unwrap_err();
    assert!(
        matches!(error, BackendError::Status { status: 404, .. }),
        "{error}"
    );
    for login in [keys("wrong"), Login::Anonymous] {
        config.login = login;
        let backend = ObjectBackend::new(&config).unwrap();
        let error = fetch(&backend, &blob, 0..1).unwrap_err();
        assert!(
            matches!(error, BackendError::Status { status: 403, .. }),
            "{error}"
        );
        let shown = format!("{error} {error:?} {backend:?}");
        assert!(
            !shown.contains(SECRET_KEY) && !shown.contains("X-Amz-Signature"),
            "{shown}"
        );
    }
}
