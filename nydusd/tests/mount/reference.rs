//! `nydusd mount IMAGE DIR`: registries and layouts, with and without the network.

use std::fs;
use std::io::Write as _;
use std::path::Path;
use std::sync::atomic::Ordering;
use std::sync::mpsc::channel;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use storage::Compressor;
use storage::oci::manifest::{
    ANNOTATION_BLOB, ANNOTATION_BOOTSTRAP, ANNOTATION_REF_NAME, NYDUS_BLOB, OCI_CONFIG, OCI_INDEX,
    OCI_LAYER_GZIP, OCI_MANIFEST,
};
use storage::oci::{ContentDigest, Descriptor};

use crate::daemon::{Daemon, PATIENCE, command, run};
use crate::image::{Image, build, content};
use crate::registry::Registry;

fn sample() -> Image {
    let files = (0u32..80)
        .map(|n| (format!("f{n}"), content(n, 30_000)))
        .collect();
    build(Compressor::Zstd, 16 << 10, files)
}

/// The layer that carries bootstrap and chunk table.
fn bootstrap_layer(image: &Image) -> Vec<u8> {
    let gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    let mut tar = tar::Builder::new(gzip);
    let table = format!("image/{}.blob.meta", image.blob_id);
    for (path, data) in [
        ("image/image.boot", &image.bootstrap),
        (&table, &image.table),
    ] {
        let mut header = tar::Header::new_gnu();
        header.set_size(data.len().try_into().unwrap());
        header.set_mode(0o444);
        tar.append_data(&mut header, path, data.as_slice()).unwrap();
    }
    tar.into_inner().unwrap().finish().unwrap()
}

/// A manifest of `layers`, the last one marked as bootstrap if asked for.
fn manifest(config: &Descriptor, mut layers: Vec<Descriptor>, nydus: bool) -> Vec<u8> {
    if nydus {
        layers[0].annotate(ANNOTATION_BLOB, "true");
        layers
            .last_mut()
            .unwrap()
            .annotate(ANNOTATION_BOOTSTRAP, "true");
    }
    serde_json::to_vec(&serde_json::json!({
        "schemaVersion": 2, "mediaType": OCI_MANIFEST, "config": config, "layers": layers,
    }))
    .unwrap()
}

/// Pushes `image` as `app:v1`, inside an index; returns the index's digest.
fn push(registry: &Registry, image: &Image) -> ContentDigest {
    let config = registry.put(OCI_CONFIG, b"{}");
    let blob = registry.put(NYDUS_BLOB, &image.blob);
    assert_eq!(blob.digest.hex(), image.blob_id);
    let bootstrap = registry.put(OCI_LAYER_GZIP, &bootstrap_layer(image));
    let manifest = manifest(&config, vec![blob, bootstrap], true);
    let mut amd = registry.put(OCI_MANIFEST, &manifest);
    amd.rest.insert(
        "platform".into(),
        serde_json::json!({"os":"linux","architecture":"amd64"}),
    );
    let index = serde_json::json!({
        "schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": [amd],
    });
    let index = serde_json::to_vec(&index).unwrap();
    registry.name("v1", OCI_INDEX, &index);
    registry.put(OCI_INDEX, &index).digest
}

fn mount(image: &str, cache: &Path) -> Daemon {
    let cache = cache.to_str().unwrap();
    let args = [
        "mount",
        image,
        "MNT",
        "--cache-dir",
        cache,
        "--platform",
        "linux/amd64",
    ];
    Daemon::start(&args)
}

#[test]
fn from_a_registry_and_again_from_the_cache() {
    let (registry, image) = (Registry::start(), sample());
    let digest = push(&registry, &image);
    let cache = tempfile::tempdir().unwrap();
    let by_tag = format!("{}/app:v1", registry.host);
    let daemon = mount(&by_tag, cache.path());
    let before = registry.state.blob_requests.load(Ordering::SeqCst);
    assert_eq!(
        before, 1,
        "the bootstrap layer, and no byte of data before it is read"
    );
    image.check(&daemon.mountpoint);
    daemon.stop();

    let (manifests, blobs) = (
        &registry.state.manifest_requests,
        &registry.state.blob_requests,
    );
    let known = blobs.load(Ordering::SeqCst);
    let daemon = mount(&by_tag, cache.path());
    image.check(&daemon.mountpoint);
    daemon.stop();
    assert_eq!(
        blobs.load(Ordering::SeqCst),
        known,
        "everything is in the cache"
    );

    let by_digest = format!("{}/app@{digest}", registry.host);
    mount(&by_digest, cache.path()).stop();
    let asked = manifests.load(Ordering::SeqCst);
    let daemon = mount(&by_digest, cache.path());
    image.check(&daemon.mountpoint);
    daemon.stop();
    assert_eq!(
        manifests.load(Ordering::SeqCst),
        asked,
        "a digest never changes its meaning"
    );
}

#[test]
fn from_a_layout() {
    let image = sample();
    let dir = tempfile::tempdir().unwrap();
    let blobs = dir.path().join("layout/blobs/sha256");
    fs::create_dir_all(&blobs).unwrap();
    let put = |media_type: &str, bytes: &[u8]| {
        let descriptor = Descriptor::of(media_type, bytes);
        fs::write(blobs.join(descriptor.digest.hex()), bytes).unwrap();
        descriptor
    };
    let config = put(OCI_CONFIG, b"{}");
    let layers = vec![
        put(NYDUS_BLOB, &image.blob),
        put(OCI_LAYER_GZIP, &bootstrap_layer(&image)),
    ];
    let mut entry = put(OCI_MANIFEST, &manifest(&config, layers, true));
    entry.annotate(ANNOTATION_REF_NAME, "v1");
    let plain = vec![put(OCI_LAYER_GZIP, b"no bootstrap")];
    let mut other = put(OCI_MANIFEST, &manifest(&config, plain, false));
    other.annotate(ANNOTATION_REF_NAME, "plain");
    let index = serde_json::json!({ "schemaVersion": 2, "manifests": [entry, other] });
    let layout = dir.path().join("layout");
    fs::write(
        layout.join("oci-layout"),
        r#"{"imageLayoutVersion":"1.0.0"}"#,
    )
    .unwrap();
    fs::write(
        layout.join("index.json"),
        serde_json::to_vec(&index).unwrap(),
    )
    .unwrap();

    let cache = dir.path().join("cache");
    let name = |tag: &str| format!("oci:{}:{tag}", layout.display());
    let daemon = mount(&name("v1"), &cache);
    image.check(&daemon.mountpoint);
    let mnt = daemon.scratch().join("other");
    fs::create_dir(&mnt).unwrap();
    let (mnt, cache) = (mnt.to_str().unwrap(), cache.to_str().unwrap());
    for (tag, part) in [("plain", "nydus-image convert"), ("absent", "not found")] {
        let (code, text) = run(&["mount", &name(tag), mnt, "--cache-dir", cache]);
        assert_eq!(code, Some(1), "{text}");
        assert!(text.contains(part), "{text}");
    }
    daemon.stop();
}

#[test]
fn what_cannot_be_pulled() {
    let (registry, image) = (Registry::start(), sample());
    push(&registry, &image);
    let dir = tempfile::tempdir().unwrap();
    let mnt = dir.path().join("mnt");
    fs::create_dir(&mnt).unwrap();
    let cache = dir.path().join("cache");
    let host = &registry.host;
    for (name, platform, parts) in [
        (
            format!("{host}/app:absent"),
            "linux/amd64",
            vec!["app", "absent", "not found"],
        ),
        (
            format!("{host}/app:v1"),
            "linux/arm64",
            vec!["no Nydus image for linux/arm64"],
        ),
        (
            format!("{host}/app:v1"),
            "linux",
            vec!["--platform", "linux/amd64"],
        ),
        (
            format!("http://{host}/app:v1"),
            "linux/amd64",
            vec!["leave out the scheme"],
        ),
        (
            "oci:/absent:v1".to_owned(),
            "linux/amd64",
            vec!["/absent", "not found"],
        ),
    ] {
        let (mnt, cache) = (mnt.to_str().unwrap(), cache.to_str().unwrap());
        let args = [
            "mount",
            &name,
            mnt,
            "--cache-dir",
            cache,
            "--platform",
            platform,
        ];
        let (code, text) = run(&args);
        assert_eq!(code, Some(1), "{text}");
        for part in parts {
            assert!(text.contains(part), "{part:?} is not in:\n{text}");
        }
        let left = fs::read_dir(cache.to_owned() + "/images").map_or(0, Iterator::count);
        assert_eq!(left, 0, "{name} left something behind");
    }
}

/// Many readers that wait for the registry leave metadata alone.
#[test]
fn a_stalled_registry_stalls_only_its_readers() {
    let (registry, image) = (Registry::start(), sample());
    push(&registry, &image);
    let cache = tempfile::tempdir().unwrap();
    let daemon = mount(&format!("{}/app:v1", registry.host), cache.path());
    registry.stall(true);
    let readers: Vec<_> = (0..64)
        .map(|n| {
            let path = daemon.mountpoint.join(format!("f{n}"));
            std::thread::spawn(move || fs::read(path).unwrap())
        })
        .collect();
    let start = Instant::now();
    while registry.state.waiting.load(Ordering::SeqCst) == 0 {
        assert!(start.elapsed() < PATIENCE, "no request arrives");
        std::thread::sleep(Duration::from_millis(5));
    }
    // Until the others have queued up behind it, too.
    std::thread::sleep(Duration::from_millis(300));
    let root = daemon.mountpoint.clone();
    let (sender, receiver) = channel();
    std::thread::spawn(move || {
        let entries: Vec<_> = fs::read_dir(&root).unwrap().collect();
        let count = entries
            .into_iter()
            .flatten()
            .flat_map(|entry| entry.metadata())
            .count();
        sender.send(count)
    });
    let count = receiver.recv_timeout(Duration::from_secs(3));
    registry.stall(false);
    assert_eq!(count, Ok(82), "metadata waits behind data");
    for (reader, n) in readers.into_iter().zip(0..) {
        assert!(reader.join().unwrap() == content(n, 30_000), "f{n}");
    }
    daemon.stop();
}

/// A signal ends the program while it waits for the registry, without leavings.
#[test]
fn a_signal_ends_a_stalled_pull() {
    let (registry, image) = (Registry::start(), sample());
    push(&registry, &image);
    registry.stall(true);
    let dir = tempfile::tempdir().unwrap();
    let (mnt, cache) = (dir.path().join("mnt"), dir.path().join("cache"));
    fs::create_dir(&mnt).unwrap();
    let image = format!("{}/app:v1", registry.host);
    let args = [
        "mount",
        &image,
        mnt.to_str().unwrap(),
        "--platform",
        "linux/amd64",
    ];
    let mut child = command(&args)
        .arg("--cache-dir")
        .arg(&cache)
        .spawn()
        .unwrap();
    let start = Instant::now();
    while registry.state.waiting.load(Ordering::SeqCst) == 0 && start.elapsed() < PATIENCE {
        std::thread::sleep(Duration::from_millis(5));
    }
    kill(
        Pid::from_raw(child.id().try_into().unwrap()),
        Signal::SIGTERM,
    )
    .unwrap();
    let start = Instant::now();
    let status = loop {
        match child.try_wait().unwrap() {
            Some(status) => break status,
            None if start.elapsed() > PATIENCE => {
                child.kill().unwrap();
                panic!("the signal is ignored");
            }
            None => std::thread::sleep(Duration::from_millis(5)),
        }
    };
    registry.stall(false);
    assert_eq!(status.code(), Some(1));
    assert_eq!(fs::read_dir(cache.join("images")).unwrap().count(), 0);
}

/// Errors are answered, not cached: reads work again with the registry.
#[test]
fn a_broken_registry_fails_reads_until_it_is_repaired() {
    let (registry, image) = (Registry::start(), sample());
    push(&registry, &image);
    let dir = tempfile::tempdir().unwrap();
    let daemon = mount(
        &format!("{}/app:v1", registry.host),
        &dir.path().join("cache"),
    );
    registry.state.broken.store(true, Ordering::SeqCst);
    let err = fs::read(daemon.mountpoint.join("f7")).unwrap_err();
    assert_eq!(err.raw_os_error(), Some(libc::EIO));
    assert!(daemon.log().contains("500"), "{}", daemon.log());
    registry.state.broken.store(false, Ordering::SeqCst);
    image.check(&daemon.mountpoint);
    daemon.stop();
}

/// The registry back end as a configuration file describes it.
#[test]
fn a_configured_registry() {
    let (registry, image) = (Registry::start(), sample());
    push(&registry, &image);
    let dir = tempfile::tempdir().unwrap();
    image.write_to(dir.path());
    let config = dir.path().join("config.json");
    let text = serde_json::json!({
        "version": 2,
        "backend": {"type": "registry", "registry": {
            "host": registry.host, "repo": "app", "scheme": "http", "auth": "dTpw",
        }},
        "cache": {"type": "filecache", "filecache": {"work_dir": dir.path().join("cache")}},
        "rafs": {"mode": "direct"},
    });
    let mut file = fs::File::create(&config).unwrap();
    file.write_all(text.to_string().as_bytes()).unwrap();
    let (config, boot) = (config.to_str().unwrap(), dir.path().join("boot"));
    let boot = boot.to_str().unwrap();
    let daemon = Daemon::start(&[
        "--config",
        config,
        "--bootstrap",
        boot,
        "--mountpoint",
        "MNT",
    ]);
    image.check(&daemon.mountpoint);
    assert!(registry.state.blob_requests.load(Ordering::SeqCst) > 0);
    daemon.stop();
}
