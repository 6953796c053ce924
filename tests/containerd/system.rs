//! The socket for people and their tools: what it tells, and daemons that are replaced by
//! another program while containers read.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::{Value, json};
use support::api::Answer;
use support::binaries::nydusd_path;
use support::command::succeed;
use support::cri::Cri;
use support::registry::Auth;

use crate::node::{
    DRIVERS, MODES, Node, check_part, cold_reader, convert, is_empty, kill_the_daemon, start_image,
    wait_for,
};

/// Answers as nydusd does, and serves nothing.
const IMPOSTOR: &str = "#!/bin/sh\n\
    [ \"$1\" = --version ] && { echo 'nydusd Version: v9.9.9'; exit; }\n\
    echo 'no, thank you' >&2\n\
    exit 1\n";

/// A program, written by another process: one that another test forks here meanwhile would
/// have it open for writing, and then nobody can execute it.
fn install(from: &Path, to: &Path) {
    let mut command = Command::new("install");
    succeed(command.args(["-m", "755"]).args([from, to])).unwrap();
}

/// A copy of nydusd with another path.
fn copy_of_nydusd(node: &Node, name: &str) -> PathBuf {
    let copy = node.directory.path().join(name);
    install(&nydusd_path().unwrap(), &copy);
    copy
}

fn impostor(node: &Node) -> PathBuf {
    let text = node.directory.path().join("impostor.sh");
    fs::write(&text, IMPOSTOR).unwrap();
    let program = node.directory.path().join("impostor");
    install(&text, &program);
    program
}

fn upgrade(node: &Node, program: &Path, version: &str) -> Answer {
    let body = json!({"nydusd_path": program, "version": version, "policy": "rolling"});
    let target = "/api/v1/daemons/upgrade";
    let mut answer = None;
    // A plugin that has just been started does not know all daemons.
    wait_for("all images", || {
        let said = node.plugin.ask("PUT", target, &body.to_string()).unwrap();
        let early = said.body.contains("are mounted yet");
        answer = Some(said);
        !early
    });
    answer.unwrap()
}

#[track_caller]
fn check_success(node: &Node, answer: &Answer) {
    assert_eq!(answer.status, 200, "{}\n{}", answer.body, node.plugin.log());
    assert_eq!(answer.body, "");
}

#[track_caller]
fn check_failure(answer: &Answer, status: u16, words: &[&str]) {
    let said = answer.json();
    assert_eq!((answer.status, &said["code"]), (status, &json!("Unknown")));
    let message = said["message"].as_str().unwrap();
    for words in words {
        assert!(message.contains(words), "no {words:?} in {message}");
    }
}

fn tell(node: &Node, target: &str) -> Value {
    let answer = node.plugin.ask("GET", target, "").unwrap();
    assert_eq!(answer.status, 200, "{}", answer.body);
    answer.json()
}

/// Every process of every daemon runs this program, and there are as many of both kinds as
/// there are daemons.
#[track_caller]
fn check_program(node: &Node, daemons: usize, program: &Path) {
    let program = fs::canonicalize(program).unwrap();
    let runs = |pid: &i32| fs::read_link(format!("/proc/{pid}/exe")).ok();
    // A worker that was just started may still be on its way to its own program.
    wait_for("keepers and workers of the program", || {
        let processes = node.plugin.processes().unwrap();
        processes.len() == 2 * daemons
            && processes
                .iter()
                .all(|pid| runs(pid).as_ref() == Some(&program))
    });
}

#[test]
fn daemons_are_replaced_while_containers_read() {
    for driver in DRIVERS {
        replace_daemons(driver, "shared", 1);
    }
}

#[test]
fn one_daemon_per_image_is_replaced_while_containers_read() {
    for driver in DRIVERS {
        replace_daemons(driver, "dedicated", 2);
    }
}

/// * `daemons`: how many there are for two images.
fn replace_daemons(driver: &str, mode: &str, daemons: usize) {
    let mut node = Node::in_mode(Auth::Open, Some(driver), mode);
    let mut cri = node.containerd.cri().unwrap();
    convert(
        &node.registry,
        "app:original",
        "other:nydus",
        &["--compressor", "lz4_block"],
    );
    for image in ["app:nydus", "other:nydus"] {
        cri.pull(&node.registry.reference(image), None).unwrap();
    }
    let pod = cri.run_pod("steady", &node.logs()).unwrap();
    let first = cold_reader(&node, &mut cri, &pod, "first");
    let script = crate::node::COLD_LOOP;
    let second = start_image(&node, &mut cri, &pod, "second", ("other:nydus", script));
    let containers = vec![first, ("second".to_owned(), second)];
    wait_for("the first round", || node.rounds("second") > 0);
    node.wait_for_daemons(daemons);
    check_program(&node, daemons, &nydusd_path().unwrap());
    for (round, name) in ["one", "two", "three"].into_iter().enumerate() {
        if round == 1 {
            // The next life of the plugin finds them, and has to ask for what they hold.
            node.plugin.stop().unwrap();
            node.plugin.start_again().unwrap();
        }
        let program = copy_of_nydusd(&node, name);
        let before = node.wait_for_daemons(daemons);
        check_success(&node, &upgrade(&node, &program, ""));
        let after = node.wait_for_daemons(daemons);
        assert!(before.iter().all(|pid| !after.contains(pid)), "{after:?}");
        check_program(&node, daemons, &program);
        node.wait_for_progress(&mut cri, &containers);
        for (_, container) in &containers {
            check_part(&node, &mut cri, container, round);
        }
        assert_eq!(node.mounted_as(), [driver, driver]);
    }
    // The same once more is nothing to do.
    let before = node.wait_for_daemons(daemons);
    check_success(
        &node,
        &upgrade(&node, &node.directory.path().join("three"), ""),
    );
    assert_eq!(node.wait_for_daemons(daemons), before);
    node.check_that_daemons_are_needed();
    cri.remove_pod(&pod).unwrap();
    node.wait_for_daemons(0);
    let root = node.plugin.root();
    wait_for("the end of the mounts", || node.mounted_as().is_empty());
    wait_for("no socket", || is_empty(&root.join("supervisor")));
}

#[test]
fn later_daemons_run_the_new_program() {
    let node = Node::new(Auth::Open);
    let program = copy_of_nydusd(&node, "nydusd-next");
    // With nothing to replace.
    check_success(&node, &upgrade(&node, &program, ""));
    let mut cri = node.containerd.cri().unwrap();
    cri.pull(&node.registry.reference("app:nydus"), None)
        .unwrap();
    let pod = cri.run_pod("steady", &node.logs()).unwrap();
    let containers = [cold_reader(&node, &mut cri, &pod, "first")];
    check_program(&node, 1, &program);
    let last = copy_of_nydusd(&node, "nydusd-last");
    check_success(&node, &upgrade(&node, &last, ""));
    kill_the_daemon(&node);
    node.wait_for_progress(&mut cri, &containers);
    check_program(&node, 1, &last);
    cri.remove_pod(&pod).unwrap();
    node.wait_for_daemons(0);
}

#[test]
fn what_is_no_better_program_changes_nothing() {
    for driver in DRIVERS {
        let node = Node::configured(Auth::Open, Some(driver));
        let mut cri = node.containerd.cri().unwrap();
        let image = node.registry.reference("app:nydus");
        cri.pull(&image, None).unwrap();
        let pod = cri.run_pod("steady", &node.logs()).unwrap();
        let containers = [cold_reader(&node, &mut cri, &pod, "first")];
        let before = node.wait_for_daemons(1);
        let copy = copy_of_nydusd(&node, "nydusd-next");
        let refused = [
            (Path::new("/bin/true"), "", "is not nydusd"),
            (Path::new("/nonexistent"), "", "No such file"),
            (&copy, "0.0.0-none", "not 0.0.0-none"),
        ];
        for (program, version, words) in refused {
            check_failure(&upgrade(&node, program, version), 400, &[words]);
        }
        let answer = node
            .plugin
            .ask("PUT", "/api/v1/daemons/upgrade", "{}")
            .unwrap();
        check_failure(&answer, 400, &["nydusd_path"]);
        assert_eq!(node.wait_for_daemons(1), before);
        // One that only shows when it is tried is taken back.
        for round in 0..3 {
            let before = node.wait_for_daemons(1);
            let answer = upgrade(&node, &impostor(&node), "v9.9.9");
            check_failure(&answer, 500, &[&image, "no, thank you"]);
            check_program(&node, 1, &nydusd_path().unwrap());
            assert_ne!(node.wait_for_daemons(1), before);
            node.wait_for_progress(&mut cri, &containers);
            check_part(&node, &mut cri, &containers[0].1, round);
        }
        // Nor do later ones use it.
        kill_the_daemon(&node);
        node.wait_for_progress(&mut cri, &containers);
        check_program(&node, 1, &nydusd_path().unwrap());
        check_success(&node, &upgrade(&node, &copy, &version_of(&copy)));
        check_program(&node, 1, &copy);
        node.wait_for_progress(&mut cri, &containers);
        assert_eq!(node.mounted_as(), [driver]);
        cri.remove_pod(&pod).unwrap();
        node.wait_for_daemons(0);
    }
}

/// What a nydusd says of itself, as people read it.
fn version_of(program: &Path) -> String {
    let said = succeed(Command::new(program).arg("--version")).unwrap();
    let line = said.stdout.lines().next().unwrap().to_owned();
    line.rsplit(char::is_whitespace).next().unwrap().to_owned()
}

#[test]
fn it_tells_what_is_there() {
    for mode in MODES {
        tell_what_is_there(mode);
    }
}

fn tell_what_is_there(mode: &str) {
    let node = Node::in_mode(Auth::Open, None, mode);
    let mut cri = node.containerd.cri().unwrap();
    let image = node.registry.reference("app:nydus");
    assert_eq!(tell(&node, "/api/v1/daemons"), json!([]));
    cri.pull(&image, None).unwrap();
    let unused = tell(&node, "/api/v1/images");
    let id = unused[0]["snapshot_id"].as_str().unwrap().to_owned();
    let known = json!({"reference": image, "snapshot_id": id, "mounted": false, "driver": null, "users": 0});
    assert_eq!(unused, json!([known]));
    let pod = cri.run_pod("steady", &node.logs()).unwrap();
    cold_reader(&node, &mut cri, &pod, "first");
    let used = tell(&node, "/api/v1/images");
    let driver = &node.mounted_as()[0];
    let known = json!({"reference": image, "snapshot_id": id, "mounted": true, "driver": driver, "users": 1});
    assert_eq!(used, json!([known]));

    let daemons = tell(&node, "/api/v1/daemons");
    let daemon = &daemons[0];
    assert_eq!(daemons.as_array().unwrap().len(), 1);
    let is_shared = mode == "shared";
    let name = if is_shared { "shared" } else { &id };
    assert_eq!(
        (&daemon["id"], &daemon["reference"]),
        (&json!(name), &json!(1))
    );
    assert_eq!(daemon["pid"], json!(node.wait_for_daemons(1)[0]));
    let instance = &daemon["instances"][&id];
    assert_eq!(instance["image_id"], json!(image));
    let point = daemon["mountpoint"].as_str().unwrap();
    let point = match is_shared {
        true => format!("{point}/{id}"),
        false => point.to_owned(),
    };
    assert_eq!(instance["mountpoint"], json!(point));
    let socket = Path::new(daemon["api_socket"].as_str().unwrap());
    assert_eq!(socket.exists(), is_shared);
    // Keeper and worker: a program of some megabytes, twice.
    assert!(
        daemon["memory_rss_kb"].as_u64().unwrap() > 4 << 10,
        "{daemon}"
    );

    let cache = tell(&node, "/api/v1/cache");
    let blobs = cache["blobs"].as_array().unwrap();
    let sizes = blobs.iter().map(|blob| blob["bytes"].as_u64().unwrap());
    let sum: u64 = sizes.sum();
    // What the container reads, and less than everything.
    assert!((300_000..8_000_000).contains(&sum), "{cache}");
    assert!(cache["bytes"].as_u64().unwrap() >= sum, "{cache}");
    let missing = node.plugin.ask("GET", "/api/v1/nothing", "").unwrap();
    check_failure(&missing, 404, &["no such path"]);
    remove(&mut cri, &node, &pod);
}

fn remove(cri: &mut Cri, node: &Node, pod: &support::cri::RunningPod) {
    cri.remove_pod(pod).unwrap();
    node.wait_for_daemons(0);
    assert_eq!(tell(node, "/api/v1/daemons"), json!([]));
}
