//! One daemon for all images of the node: what they have in common, and what they do not.

use std::collections::BTreeSet;
use std::fs::{self, OpenOptions};
use std::path::PathBuf;
use std::thread;
use std::time::{Duration, Instant};

use serde_json::Value;
use support::cri::{Cri, RunningPod};
use support::registry::Auth;

use crate::chaos::{Victim, kill_one_of_all};
use crate::node::{
    COLD_LOOP, DRIVERS, MODES, Node, check_part, cold_reader, configuration, convert, is_empty,
    start_image, wait_for,
};

/// Images of the same content that have nothing in common for the node.
const COMPRESSORS: [&str; 3] = ["zstd", "lz4_block", "none"];
const CHUNK_SIZES: [&str; 4] = ["0x10000", "0x20000", "0x40000", "0x80000"];

/// Makes a second image of the same tree, and pulls both.
fn pull_two(node: &Node, cri: &mut Cri) {
    let options = ["--compressor", "lz4_block"];
    convert(&node.registry, "app:original", "other:nydus", &options);
    for image in ["app:nydus", "other:nydus"] {
        cri.pull(&node.registry.reference(image), None).unwrap();
    }
}

/// A container of the second image, as [`cold_reader`].
fn other_reader(node: &Node, cri: &mut Cri, pod: &RunningPod, name: &str) -> (String, String) {
    let id = start_image(node, cri, pod, name, ("other:nydus", COLD_LOOP));
    wait_for("the first round", || node.rounds(name) > 0);
    (name.to_owned(), id)
}

fn tell(node: &Node, what: &str) -> Value {
    let target = format!("/api/v1/{what}");
    node.plugin.ask("GET", &target, "").unwrap().json()
}

/// The mount points of all images, as the plugin tells them.
fn mountpoints(node: &Node) -> BTreeSet<PathBuf> {
    let daemons = tell(node, "daemons");
    let daemons = daemons.as_array().unwrap().iter();
    let instances = daemons.flat_map(|daemon| daemon["instances"].as_object().unwrap().values());
    let points = instances.map(|image| image["mountpoint"].as_str().unwrap().into());
    points.collect()
}

#[track_caller]
fn wait_for_mounts(node: &Node, kinds: &[&str]) {
    let began = Instant::now();
    while node.mounted_as() != kinds {
        // containerd removes the snapshot of a container when it collects garbage.
        let _ = node.containerd.collect_garbage();
        assert!(
            began.elapsed() < Duration::from_secs(30),
            "{:?}:\n{}",
            node.mounted_as(),
            node.plugin.log()
        );
        thread::sleep(Duration::from_millis(50));
    }
}

#[test]
fn images_come_and_go_while_others_are_read() {
    for driver in DRIVERS {
        let node = Node::configured(Auth::Open, Some(driver));
        let mut cri = node.containerd.cri().unwrap();
        pull_two(&node, &mut cri);
        let pod = cri.run_pod("steady", &node.logs()).unwrap();
        let first = cold_reader(&node, &mut cri, &pod, "first");
        let daemon = node.wait_for_daemons(1);
        let shared = node.plugin.root().join("mnt");
        for round in 0..2 {
            let name = format!("second-{round}");
            let second = other_reader(&node, &mut cri, &pod, &name);
            assert_eq!(node.mounted_as(), [driver, driver]);
            let points = mountpoints(&node);
            assert_eq!(points.len(), 2, "{points:?}");
            for point in &points {
                assert_eq!(point.parent(), Some(shared.as_path()));
                assert!(point.join("data/text").exists(), "{}", point.display());
            }
            node.wait_for_progress(&mut cri, &[first.clone(), second.clone()]);
            check_part(&node, &mut cri, &second.1, round);
            cri.remove(&second.1).unwrap();
            wait_for_mounts(&node, &[driver]);
            check_part(&node, &mut cri, &first.1, 2 + round);
            assert_eq!(node.wait_for_daemons(1), daemon);
        }
        cri.remove_pod(&pod).unwrap();
        node.wait_for_daemons(0);
        wait_for_mounts(&node, &[]);
        // Nothing is left of it.
        let root = node.plugin.root();
        for directory in ["mnt", "config", "socket", "supervisor"] {
            wait_for(directory, || is_empty(&root.join(directory)));
        }
    }
}

#[test]
fn containers_of_several_images_survive_any_death() {
    use Victim::{Daemon, Keeper, Plugin, PluginAndWorker, Worker};
    for driver in DRIVERS {
        let mut node = Node::configured(Auth::Open, Some(driver));
        let mut cri = node.containerd.cri().unwrap();
        pull_two(&node, &mut cri);
        let pod = cri.run_pod("steady", &node.logs()).unwrap();
        let mut containers = vec![
            cold_reader(&node, &mut cri, &pod, "first"),
            other_reader(&node, &mut cri, &pod, "second"),
            cold_reader(&node, &mut cri, &pod, "third"),
            other_reader(&node, &mut cri, &pod, "fourth"),
        ];
        let mut parts = 0..8;
        for (round, victim) in [Worker, Keeper, Daemon, Plugin, Daemon, PluginAndWorker]
            .into_iter()
            .enumerate()
        {
            kill_one_of_all(&mut node, victim);
            node.wait_for_progress(&mut cri, &containers);
            for container in containers.iter().take(2) {
                if matches!(victim, Daemon | PluginAndWorker) {
                    let part = parts.start;
                    check_part(&node, &mut cri, &container.1, part);
                }
            }
            parts.next();
            assert_eq!(node.mounted_as(), [driver, driver], "{victim:?}");
            let name = format!("after-{round}");
            containers.push(other_reader(&node, &mut cri, &pod, &name));
        }
        node.check_that_daemons_are_needed();
        cri.remove_pod(&pod).unwrap();
        node.wait_for_daemons(0);
    }
}

/// The metadata of the image that is not `app:nydus`.
fn other_bootstrap(node: &Node) -> PathBuf {
    let images = tell(node, "images");
    let mut images = images.as_array().unwrap().iter();
    let reference = node.registry.reference("other:nydus");
    let image = images.find(|image| image["reference"] == reference.as_str());
    let id = image.unwrap()["snapshot_id"].as_str().unwrap();
    let directory = node.plugin.root().join("snapshots").join(id);
    directory.join("fs/image/image.boot")
}

#[test]
fn an_image_that_cannot_be_had_disturbs_no_other() {
    for driver in DRIVERS {
        let mut node = Node::configured(Auth::Open, Some(driver));
        let mut cri = node.containerd.cri().unwrap();
        pull_two(&node, &mut cri);
        let pod = cri.run_pod("steady", &node.logs()).unwrap();
        let first = cold_reader(&node, &mut cri, &pod, "first");
        let daemon = node.wait_for_daemons(1);
        let second = node.registry.reference("other:nydus");

        // Its metadata is none.
        let bootstrap = other_bootstrap(&node);
        let length = fs::metadata(&bootstrap).unwrap().len();
        let saved = fs::read(&bootstrap).unwrap();
        let file = OpenOptions::new().write(true).open(&bootstrap).unwrap();
        file.set_len(1000).unwrap();
        let command = ["sh", "-c", COLD_LOOP];
        let refused = cri.run(&pod, "damaged", &second, &command).unwrap_err();
        let refused = format!("{refused:#}");
        assert!(refused.contains("nydusd refuses"), "{refused}");
        node.wait_for_progress(&mut cri, std::slice::from_ref(&first));
        fs::write(&bootstrap, saved).unwrap();
        assert_eq!(fs::metadata(&bootstrap).unwrap().len(), length);

        // Nothing of it was fetched, and nobody has it.
        node.registry.kill().unwrap();
        if let Ok(far) = cri.run(&pod, "far", &second, &command) {
            // Its program is read when it is said to run.
            wait_for("its end", || cri.exit_code(&far).unwrap().is_some());
            assert_ne!(cri.exit_code(&far).unwrap(), Some(0));
        }
        node.wait_for_progress(&mut cri, std::slice::from_ref(&first));
        node.registry.start_again().unwrap();
        let containers = [first, other_reader(&node, &mut cri, &pod, "second")];
        node.wait_for_progress(&mut cri, &containers);
        assert_eq!(node.mounted_as(), [driver, driver]);
        assert_eq!(node.wait_for_daemons(1), daemon);
        cri.remove_pod(&pod).unwrap();
        node.wait_for_daemons(0);
    }
}

/// Memory of all daemons in KiB, with one image and with all.
fn memory_in(mode: &str) -> (u64, u64) {
    let node = Node::in_mode(Auth::Open, None, mode);
    let mut cri = node.containerd.cri().unwrap();
    let memory = || {
        let daemons = tell(&node, "daemons");
        let daemons = daemons.as_array().unwrap().iter();
        daemons
            .map(|daemon| daemon["memory_rss_kb"].as_u64().unwrap())
            .sum()
    };
    let mut client = node.plugin.client().unwrap();
    let mut known = BTreeSet::new();
    let mut after_first = 0;
    for compressor in COMPRESSORS {
        for size in CHUNK_SIZES {
            let name = format!("many:{compressor}-{size}");
            let options = ["--compressor", compressor, "--chunk-size", size];
            convert(&node.registry, "app:original", &name, &options);
            cri.pull(&node.registry.reference(&name), None).unwrap();
            let images = [r#"labels."containerd.io/snapshot/nydus-bootstrap""#];
            let list = client.list(&images).unwrap().into_iter();
            let new: Vec<_> = list
                .filter(|info| known.insert(info.name.clone()))
                .collect();
            assert_eq!(new.len(), 1, "{name}");
            client.prepare(&name, &new[0].name, &[]).unwrap();
            if after_first == 0 {
                after_first = memory();
            }
        }
    }
    let count = known.len();
    assert_eq!(node.mounted_as().len(), count);
    node.wait_for_daemons(if mode == "shared" { 1 } else { count });
    let after_all = memory();
    for compressor in COMPRESSORS {
        for size in CHUNK_SIZES {
            client.remove(&format!("many:{compressor}-{size}")).unwrap();
        }
    }
    node.wait_for_daemons(0);
    (after_first, after_all)
}

#[test]
fn many_images_take_less_memory_in_one_daemon() {
    let [shared, dedicated] = MODES.map(memory_in);
    println!("KiB with one image and with twelve: {shared:?} in one daemon, {dedicated:?} in many");
    assert!(dedicated.1 > 6 * dedicated.0, "{dedicated:?}");
    assert!(shared.1 < 3 * shared.0, "{shared:?}");
    assert!(shared.1 < dedicated.1 / 3, "{shared:?} {dedicated:?}");
}

/// Containers that run keep what serves them, and it serves their image until they end.
#[test]
fn a_change_of_mode_is_for_images_that_nobody_uses() {
    for (driver, modes) in [
        ("fuse", ["dedicated", "shared"]),
        ("erofs", ["dedicated", "shared"]),
        ("fuse", ["shared", "dedicated"]),
        ("erofs", ["shared", "dedicated"]),
    ] {
        change_mode(driver, modes);
    }
}

fn change_mode(driver: &str, [before, after]: [&str; 2]) {
    let mut node = Node::in_mode(Auth::Open, Some(driver), before);
    let mut cri = node.containerd.cri().unwrap();
    pull_two(&node, &mut cri);
    let old = cri.run_pod("old", &node.logs()).unwrap();
    let mut containers = vec![cold_reader(&node, &mut cri, &old, "first")];
    let daemon = node.wait_for_daemons(1);
    node.plugin.stop().unwrap();
    let changed = configuration(node.directory.path(), Some(driver), after);
    node.plugin.configure(&changed);
    node.plugin.start_again().unwrap();
    containers.push(cold_reader(&node, &mut cri, &old, "second"));
    assert_eq!(node.wait_for_daemons(1), daemon);
    let new = cri.run_pod("new", &node.logs()).unwrap();
    containers.push(other_reader(&node, &mut cri, &new, "third"));
    assert_eq!(node.mounted_as(), [driver, driver]);
    // Both survive, and the next life of the plugin knows which is which.
    for round in 0..2 {
        let daemons = node.wait_for_daemons(2);
        wait_for("descriptors", || {
            node.plugin.log().matches("holding ").count() >= 2
        });
        node.plugin.kill_daemons(&daemons).unwrap();
        let began = Instant::now();
        loop {
            let now = node.plugin.daemons().unwrap();
            if now.len() == 2 && !now.iter().any(|pid| daemons.contains(pid)) {
                break;
            }
            let log = node.plugin.log();
            let late = began.elapsed() > Duration::from_secs(30);
            assert!(!late, "{now:?} after {daemons:?}:\n{log}");
            thread::sleep(Duration::from_millis(20));
        }
        node.wait_for_progress(&mut cri, &containers);
        for (_, container) in &containers {
            check_part(&node, &mut cri, container, round);
        }
        node.plugin.kill().unwrap();
        node.plugin.start_again().unwrap();
    }
    cri.remove_pod(&old).unwrap();
    wait_for_mounts(&node, &[driver]);
    node.wait_for_daemons(1);
    // The image again, as the configuration says now.
    let pod = cri.run_pod("again", &node.logs()).unwrap();
    let last = [
        containers.remove(2),
        cold_reader(&node, &mut cri, &pod, "last"),
    ];
    node.wait_for_daemons(if after == "shared" { 1 } else { 2 });
    node.wait_for_progress(&mut cri, &last);
    for pod in [new, pod] {
        cri.remove_pod(&pod).unwrap();
    }
    node.wait_for_daemons(0);
}
