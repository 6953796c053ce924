//! Other ways in which images come into being than by plain conversion, and many pods of
//! one image.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use support::command::succeed;
use support::cri::Cri;
use support::registry::Auth;

use crate::demo;
use crate::node::{COLD_LOOP, Node, convert, is_empty, patiently, start_image, sums};

/// How many pods are started at once.
const PODS: usize = 50;

/// Layers that stay in the registry as they are: containerd never fetches one, and
/// containers read them.
#[test]
fn layers_in_place_are_never_downloaded() {
    let node = Node::new(Auth::Open);
    convert(
        &node.registry,
        "app:original",
        "app:in-place",
        &["--oci-ref"],
    );
    let mut cri = node.containerd.cri().unwrap();
    let mark = node.registry.log().len();
    cri.pull(&node.registry.reference("app:in-place"), None)
        .unwrap();
    let pulled = node.registry.traffic_since(mark).bytes;
    // Metadata, with a window of 32 KiB per megabyte into which decompression can jump.
    assert!(pulled < 1_000_000, "{pulled}");
    let pod = cri.run_pod("in-place", &node.logs()).unwrap();
    let script = ("app:in-place", COLD_LOOP);
    let id = start_image(&node, &mut cri, &pod, "reader", script);
    node.wait_for_progress(&mut cri, &[("reader".to_owned(), id)]);
    let started = node.registry.traffic_since(mark).bytes;
    assert!(started < 6_000_000, "{started}");
    // Neither the layers nor what stands for them.
    let content = succeed(node.containerd.ctr("k8s.io").args(["content", "ls", "-q"])).unwrap();
    let mut layers = 0;
    for image in ["app:original", "app:in-place"] {
        let manifest = node.registry.manifest_json(image).unwrap();
        for layer in manifest["layers"].as_array().unwrap() {
            let is_bootstrap =
                !layer["annotations"]["containerd.io/snapshot/nydus-bootstrap"].is_null();
            let digest = layer["digest"].as_str().unwrap();
            assert_eq!(content.stdout.contains(digest), is_bootstrap, "{layer}");
            layers += 1;
        }
    }
    assert_eq!(layers, 3 + 4);
    cri.remove_pod(&pod).unwrap();
    node.wait_for_daemons(0);
}

/// What a container has written becomes an image: an ordinary layer on top of lazily
/// served ones.
#[test]
fn a_container_is_committed_and_run_again() {
    let node = Node::new(Auth::Open);
    let mut cri = node.containerd.cri().unwrap();
    cri.pull(&node.registry.reference("app:nydus"), None)
        .unwrap();
    let pod = cri.run_pod("commit", &node.logs()).unwrap();
    let writer = start_image(&node, &mut cri, &pod, "writer", ("app:nydus", "sleep 1000"));
    let script = "echo new > /data/new && echo changed > /data/text && mkdir /made";
    node.exec(&mut cri, &writer, &["sh", "-c", script]);
    let layer = node.directory.path().join("top.tar.gz");
    let diff = node.containerd.ctr("k8s.io");
    let mut shell = Command::new("sh");
    shell
        .args(["-c", "exec \"$0\" \"$@\" > \"$LAYER\""])
        .env("LAYER", &layer);
    shell.arg(diff.get_program()).args(diff.get_args());
    shell.args(["snapshots", "--snapshotter", "nydus", "diff", &writer]);
    succeed(&mut shell).unwrap();
    cri.remove_pod(&pod).unwrap();
    node.wait_for_daemons(0);
    push_on_top(&node, "app:nydus", &layer, "app:committed");

    // On the layers that are there, and on a node that has none.
    for round in 0..2 {
        if round == 1 {
            for image in ["app:nydus", "app:committed"] {
                cri.remove_image(&node.registry.reference(image)).unwrap();
            }
            node.containerd.collect_garbage().unwrap();
            let mut client = node.plugin.client().unwrap();
            let images = [r#"labels."containerd.io/snapshot/nydus-bootstrap""#];
            assert_eq!(client.list(&images).unwrap().len(), 0);
        }
        cri.pull(&node.registry.reference("app:committed"), None)
            .unwrap();
        let pod = cri
            .run_pod(&format!("again-{round}"), &node.logs())
            .unwrap();
        let image = ("app:committed", "sleep 1000");
        let container = start_image(&node, &mut cri, &pod, "again", image);
        let read = node.exec(&mut cri, &container, &["cat", "/data/new", "/data/text"]);
        assert_eq!(read, "new\nchanged\n");
        let used = node.exec(&mut cri, &container, &["sha256sum", "/data/used"]);
        assert_eq!(Some(used.trim_end()), sums(&node.tree).lines().next());
        node.exec(&mut cri, &container, &["ls", "/made"]);
        assert_eq!(node.wait_for_daemons(1).len(), 1);
        cri.remove_pod(&pod).unwrap();
        node.wait_for_daemons(0);
    }
}

/// Pushes `source` with one more layer as `target`.
fn push_on_top(node: &Node, source: &str, layer: &Path, target: &str) {
    let registry = &node.registry;
    let (repository, _) = target.split_once(':').unwrap();
    let size = |file: &Path| fs::metadata(file).unwrap().len();
    let mut unpacked = Command::new("sh");
    unpacked
        .args(["-c", "gzip -dc \"$LAYER\" | sha256sum"])
        .env("LAYER", layer);
    let diff_id = succeed(&mut unpacked).unwrap().stdout;
    let diff_id = format!("sha256:{}", diff_id.split_whitespace().next().unwrap());

    let mut manifest = registry.manifest_json(source).unwrap();
    let config = registry
        .blob_file(manifest["config"]["digest"].as_str().unwrap())
        .unwrap();
    let mut config: Value = serde_json::from_slice(&fs::read(config).unwrap()).unwrap();
    config["rootfs"]["diff_ids"]
        .as_array_mut()
        .unwrap()
        .push(json!(diff_id));
    if let Some(history) = config["history"].as_array_mut() {
        history.push(json!({"created_by": "a container"}));
    }
    let file = node.directory.path().join("config.json");
    fs::write(&file, config.to_string()).unwrap();
    manifest["config"]["digest"] = json!(registry.push_blob(repository, &file).unwrap());
    manifest["config"]["size"] = json!(size(&file));
    manifest["layers"].as_array_mut().unwrap().push(json!({
        "mediaType": "application/vnd.oci.image.layer.v1.tar+gzip",
        "digest": registry.push_blob(repository, layer).unwrap(),
        "size": size(layer),
    }));
    registry.push_manifest(target, &manifest).unwrap();
}

/// What each of the pods does: reads some large files whole, and starts a program that reads
/// a hundred small ones.
const SCRIPT: &str = "sha256sum /usr/bin/python3.11 /usr/sbin/nginx && \
    python3 -c 'import json,ssl,sqlite3,http.server,asyncio,decimal; print(json.dumps(\"started\"))'";

/// Puts the image of `make demo` into the registry, converted; returns what [`SCRIPT`]
/// prints.
fn push_demo(node: &Node) -> String {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("../out/demo");
    let layout = demo::find_or_make(&directory).unwrap();
    node.registry
        .push(&layout, demo::TAG, "demo:original")
        .unwrap();
    convert(&node.registry, "demo:original", "demo:nydus", &[]);
    let root = directory.join("root");
    let mut sums = Command::new("sha256sum");
    sums.current_dir(root)
        .args(["usr/bin/python3.11", "usr/sbin/nginx"]);
    let sums = succeed(&mut sums)
        .unwrap()
        .stdout
        .replace("  usr", "  /usr");
    format!("{sums}\"started\"\n")
}

#[test]
fn fifty_pods_at_once() {
    let node = Node::new(Auth::Open);
    let expected = push_demo(&node);
    let mut cri = node.containerd.cri().unwrap();
    cri.pull(&node.registry.reference("demo:nydus"), None)
        .unwrap();
    cri.pull(&node.registry.reference("pause:1"), None).unwrap();
    let before = snapshots(&node);
    let mark = node.registry.log().len();
    let began = Instant::now();
    let script = ("demo:nydus", SCRIPT);
    thread::scope(|scope| {
        for index in 0..PODS {
            let (node, expected) = (&node, &expected);
            scope.spawn(move || {
                let mut cri: Cri = node.containerd.cri().unwrap();
                let name = format!("pod-{index}");
                let pod = cri.run_pod(&name, &node.logs()).unwrap();
                let container = start_image(node, &mut cri, &pod, &name, script);
                wait_for_end(&mut cri, &container, &name);
                let log = fs::read_to_string(node.logs().join(format!("{name}.log"))).unwrap();
                // Time, stream and a mark come first.
                let output = log.lines().map(|line| line.splitn(4, ' ').nth(3).unwrap());
                assert!(output.eq(expected.lines()), "{name}: {log}");
            });
        }
    });
    let fetched = node.registry.traffic_since(mark).bytes;
    println!(
        "{PODS} pods in {:?}, {fetched} bytes fetched",
        began.elapsed()
    );
    // Once for all of them, and not the whole image.
    assert!(fetched < 40_000_000, "{fetched}");
    assert_eq!(node.wait_for_daemons(1).len(), 1);
    assert!(snapshots(&node).len() >= before.len() + 2 * PODS);
    patiently(|| cri.remove_all_pods());
    node.wait_for_daemons(0);
    node.containerd.collect_garbage().unwrap();
    assert_eq!(snapshots(&node), before);
    assert!(node.mounted_as().is_empty());
    let root = node.plugin.root();
    assert!(is_empty(&root.join("supervisor")) && is_empty(&root.join("config")));
    let directories = fs::read_dir(root.join("snapshots")).unwrap().count();
    assert_eq!(directories, before.len());
}

/// Waits for a container that ends well. Fifty of them share two processors.
#[track_caller]
fn wait_for_end(cri: &mut Cri, container: &str, name: &str) {
    let began = Instant::now();
    let code = loop {
        match cri.exit_code(container).unwrap() {
            Some(code) => break code,
            None => assert!(began.elapsed() < Duration::from_secs(180), "{name} goes on"),
        }
        thread::sleep(Duration::from_millis(100));
    };
    assert_eq!(code, 0, "{name}");
}

/// `ctr` passes no names of images, but runs what somebody else has pulled.
#[test]
fn ctr_runs_what_was_pulled_by_others() {
    let node = Node::new(Auth::Open);
    let mut cri = node.containerd.cri().unwrap();
    for image in ["app:nydus", "app:original"] {
        let image = node.registry.reference(image);
        cri.pull(&image, None).unwrap();
        let mut run = node.containerd.ctr("k8s.io");
        run.args(["run", "--rm", "--snapshotter", "nydus", &image, "by-ctr"]);
        run.args(["sha256sum", "/data/used", "/data/text"]);
        assert_eq!(
            succeed(&mut run).unwrap().stdout,
            sums(&node.tree),
            "{image}"
        );
    }
    // Nor is anything left of it.
    node.wait_for_daemons(0);
}

/// Names of all snapshots.
fn snapshots(node: &Node) -> Vec<String> {
    let mut client = node.plugin.client().unwrap();
    let list = client.list(&[]).unwrap();
    let mut names: Vec<String> = list.into_iter().map(|info| info.name).collect();
    names.sort();
    names
}
