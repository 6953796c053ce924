//! Lazily started pods, as kubelet starts them: a registry, containerd, runc, the
//! plugin and nydusd, all real.

use std::fs;
use std::process::Command;
use std::time::{Duration, Instant};

use support::cri::Cri;
use support::plugin::Mounted;
use support::registry::{Auth, PASSWORD, USER};
use support::tree::nasty;

use crate::node::{MODES, Node, check_part, is_empty, kill_the_daemon, reader, sums, wait_for};

#[test]
fn a_pod_starts_without_its_data() {
    for mode in MODES {
        let (pulled, started) = start_without_data(mode);
        println!("fetched {pulled} bytes to pull and {started} to run; 8000000 are never read");
    }
}

/// Returns what was fetched to pull an image and to run a program from it.
fn start_without_data(mode: &str) -> (u64, u64) {
    let node = Node::in_mode(Auth::Open, None, mode);
    let mut cri = node.containerd.cri().unwrap();
    let image = node.registry.reference("app:nydus");
    let pod = cri.run_pod("lazy", &node.logs()).unwrap();

    let mark = node.registry.log().len();
    cri.pull(&image, None).unwrap();
    let pulled = node.registry.traffic_since(mark).bytes;
    assert_eq!(
        node.plugin.daemons().unwrap().len(),
        0,
        "nothing is mounted for a pull"
    );
    let first = reader(&node, &mut cri, &pod, "first");
    let started = node.registry.traffic_since(mark).bytes;
    assert!(pulled < 200_000, "{pulled}");
    assert!(started < 6_000_000, "{started}");

    let expected = sums(&node.tree);
    let log = fs::read_to_string(node.logs().join("first.log")).unwrap();
    for line in expected.lines() {
        assert!(log.contains(line), "no {line:?} in\n{log}");
    }
    let gone = cri.exec(&first, &["cat", "/data/gone"]).unwrap();
    assert_ne!(gone.exit_code, 0);
    node.exec(
        &mut cri,
        &first,
        &["sh", "-c", "echo x > /data/new && cat /data/new"],
    );

    // One daemon for all containers of an image.
    let daemon = node.wait_for_daemons(1);
    let second = reader(&node, &mut cri, &pod, "second");
    assert_eq!(node.wait_for_daemons(1), daemon);
    cri.remove(&first).unwrap();
    assert_eq!(
        node.exec(&mut cri, &second, &["cat", "/data/text"]),
        "read lazily\n"
    );
    assert_eq!(node.wait_for_daemons(1), daemon);
    cri.remove(&second).unwrap();
    node.wait_for_daemons(0);

    // The cache is warm: nothing is fetched again.
    let mark = node.registry.log().len();
    reader(&node, &mut cri, &pod, "third");
    assert_eq!(node.registry.traffic_since(mark).bytes, 0);

    cri.remove_pod(&pod).unwrap();
    node.wait_for_daemons(0);
    cri.remove_image(&image).unwrap();
    // containerd collects its garbage soon, and with the last snapshot goes the cache.
    let cache = node.plugin.root().join("cache");
    // What remains is the directory in which mounts by the kernel have theirs.
    wait_for("an empty cache", || {
        let mut left = fs::read_dir(&cache).unwrap().map(|entry| entry.unwrap());
        left.all(|entry| entry.file_name() == "mounts" && is_empty(&entry.path()))
    });
    (pulled, started)
}

#[test]
fn ordinary_images_and_the_other_snapshotter() {
    let mut node = Node::new(Auth::Open);
    let image = node.registry.reference("app:original");
    let pause = node.registry.reference("pause:1");
    let logs = node.logs();
    let expected = sums(&node.tree);
    for snapshotter in ["nydus", "overlayfs", "nydus"] {
        node.containerd.kill().unwrap();
        node.containerd
            .configure(&node.plugin.address(), snapshotter, &pause)
            .unwrap();
        node.containerd.start_again().unwrap();
        let mut cri = node.containerd.cri().unwrap();
        // Also an image whose layers were unpacked for the other one only.
        cri.pull(&image, None).unwrap();
        let pod = cri.run_pod("ordinary", &logs).unwrap();
        let container = cri.run(&pod, "c", &image, &["sleep", "1000"]).unwrap();
        let found = node.exec(
            &mut cri,
            &container,
            &["sha256sum", "/data/used", "/data/text"],
        );
        assert_eq!(found, expected, "{snapshotter}");
        assert_eq!(node.plugin.daemons().unwrap().len(), 0);
        cri.remove_pod(&pod).unwrap();
    }
}

#[test]
fn credentials_are_used_and_never_written() {
    for mode in MODES {
        let node = Node::in_mode(Auth::Basic, None, mode);
        let mut images = node.containerd.cri().unwrap();
        run_with_credentials(&node, &mut images);
        images.remove_all_pods().unwrap();
    }
}

/// The plugin has no credentials of its own, and sees those of pulls.
#[test]
fn credentials_of_pulls_are_remembered_and_never_written() {
    for mode in MODES {
        remember_credentials(mode);
    }
}

fn remember_credentials(mode: &str) {
    let mut node = Node::with_image_service(Auth::Basic, mode);
    let mut images = Cri::connect(&node.plugin.address()).unwrap();
    let refused = images.pull(&node.registry.reference("app:nydus"), Some((USER, "wrong")));
    let refused = format!("{:#}", refused.unwrap_err());
    assert!(refused.contains("401"), "{refused}");
    let container = run_with_credentials(&node, &mut images);
    let mut cri = node.containerd.cri().unwrap();
    // Nobody knows them any more but the daemon, which dies, too.
    drop(images);
    node.plugin.kill().unwrap();
    node.plugin.start_again().unwrap();
    let mut images = Cri::connect(&node.plugin.address()).unwrap();
    wait_for("descriptors", || node.plugin.log().contains("holding "));
    kill_the_daemon(&node);
    check_part(&node, &mut cri, &container, 0);
    cri.remove_all_pods().unwrap();
    // What containerd says comes back as it is.
    let missing = images.pull(
        &node.registry.reference("app:missing"),
        Some((USER, PASSWORD)),
    );
    let missing = format!("{:#}", missing.unwrap_err());
    assert!(missing.contains("NotFound"), "{missing}");
    images
        .remove_image(&node.registry.reference("app:nydus"))
        .unwrap();
}

/// Runs a container, and returns its id.
///
/// * `images`: the image service that kubelet asks.
fn run_with_credentials(node: &Node, images: &mut Cri) -> String {
    let login = Some((USER, PASSWORD));
    for image in ["pause:1", "app:nydus"] {
        images.pull(&node.registry.reference(image), login).unwrap();
    }
    let mut cri = node.containerd.cri().unwrap();
    let pod = cri.run_pod("private", &node.logs()).unwrap();
    let container = reader(node, &mut cri, &pod, "c");
    // Neither as they are nor encoded, in no file of the plugin and on no command line.
    let mut grep = Command::new("grep");
    grep.args([
        "-rlaF",
        "-e",
        PASSWORD,
        "-e",
        "c29tZW9uZTpwNHNz",
        "--exclude-dir=snapshots",
        "--exclude-dir=cache",
    ]);
    let found = support::command::run(grep.arg(node.plugin.root())).unwrap();
    assert_eq!(found.code(), 1, "{}", found.stdout);
    for pid in node.plugin.daemons().unwrap() {
        let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap();
        assert!(!String::from_utf8_lossy(&line).contains(PASSWORD));
    }
    container
}

/// Plugin and containerd die and come back; containers read on, and what is found
/// is found again.
#[test]
fn restarts_are_not_noticed() {
    for mode in MODES {
        restart(mode);
    }
}

fn restart(mode: &str) {
    let mut node = Node::in_mode(Auth::Open, None, mode);
    let mut cri = node.containerd.cri().unwrap();
    cri.pull(&node.registry.reference("app:nydus"), None)
        .unwrap();
    let pod = cri.run_pod("steady", &node.logs()).unwrap();
    let container = reader(&node, &mut cri, &pod, "steady");
    let daemon = node.wait_for_daemons(1);
    for round in 0..2 {
        node.plugin.kill().unwrap();
        assert_eq!(
            node.exec(&mut cri, &container, &["cat", "/data/text"]),
            "read lazily\n"
        );
        node.plugin.start_again().unwrap();
        if round == 1 {
            node.containerd.kill().unwrap();
            node.containerd.start_again().unwrap();
            cri = node.containerd.cri().unwrap();
        }
        assert_eq!(
            node.exec(&mut cri, &container, &["cat", "/data/text"]),
            "read lazily\n"
        );
        wait_for("the daemon to be found", || {
            node.plugin.log().contains("still runs")
        });
        assert_eq!(node.wait_for_daemons(1), daemon);
        let name = format!("after-{round}");
        let other = reader(&node, &mut cri, &pod, &name);
        assert_eq!(node.wait_for_daemons(1), daemon);
        cri.remove(&other).unwrap();
    }
    assert_eq!(cri.exit_code(&container).unwrap(), None);
    let log = fs::read_to_string(node.logs().join("steady.log")).unwrap();
    let expected = sums(&node.tree);
    for line in log.lines() {
        // Time, stream and a mark come first.
        let text = line.splitn(4, ' ').nth(3).unwrap();
        assert!(expected.lines().any(|wanted| wanted == text), "{line}");
    }
    cri.remove_pod(&pod).unwrap();
    node.wait_for_daemons(0);
}

/// After a reboot, nothing runs and nothing is mounted; the registry is away. What
/// was read before can be read again.
#[test]
fn after_a_reboot_without_network() {
    let mut node = Node::new(Auth::Open);
    let mut cri = node.containerd.cri().unwrap();
    cri.pull(&node.registry.reference("app:nydus"), None)
        .unwrap();
    let pod = cri.run_pod("before", &node.logs()).unwrap();
    let container = reader(&node, &mut cri, &pod, "before");
    cri.remove(&container).unwrap();
    // containerd removes the snapshot a little later.
    node.wait_for_daemons(0);
    let mut client = node.plugin.client().unwrap();
    let images = [r#"labels."containerd.io/snapshot/nydus-bootstrap""#];
    let parent = client.list(&images).unwrap().remove(0).name;
    client.prepare("kept", &parent, &[]).unwrap();

    node.containerd.kill().unwrap();
    node.plugin.kill().unwrap();
    node.plugin.kill_daemons(&node.wait_for_daemons(1)).unwrap();
    node.wait_for_daemons(0);
    let began = Instant::now();
    node.plugin.start_again().unwrap();
    let mut client = node.plugin.client().unwrap();
    let mounts = client.mounts("kept").unwrap();
    println!(
        "mounted again {} ms after the start",
        began.elapsed().as_millis()
    );
    assert!(began.elapsed() < Duration::from_secs(5));
    let mark = node.registry.log().len();
    let mounted = Mounted::new(
        &mounts,
        &node.plugin.root(),
        &node.directory.path().join("point"),
    )
    .unwrap();
    assert_eq!(
        fs::read(mounted.path().join("data/text")).unwrap(),
        b"read lazily\n"
    );
    assert_eq!(
        fs::read(mounted.path().join("data/used")).unwrap(),
        nasty::noise(300_000, 1)
    );
    assert_eq!(node.registry.traffic_since(mark).requests, 0);
    drop(mounted);

    // And a daemon that dies is replaced.
    let old = node.wait_for_daemons(1);
    node.plugin.kill_daemons(&old).unwrap();
    wait_for("another daemon", || {
        let daemons = node.plugin.daemons().unwrap();
        daemons.len() == 1 && daemons != old
    });
    let mounts = client.mounts("kept").unwrap();
    let mounted = Mounted::new(
        &mounts,
        &node.plugin.root(),
        &node.directory.path().join("point"),
    )
    .unwrap();
    assert_eq!(
        fs::read(mounted.path().join("data/text")).unwrap(),
        b"read lazily\n"
    );
    drop(mounted);
    client.remove("kept").unwrap();
    node.wait_for_daemons(0);
}
