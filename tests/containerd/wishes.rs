//! What the plugin is told at run time: what to fetch first, whom to be to a registry, and
//! which program to run, also in its next life; and where images come from.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use base64::Engine as _;
use serde_json::json;
use support::binaries::nydusd_path;
use support::command::succeed;
use support::cri::{Auth as Account, Cri};
use support::registry::{Auth, PASSWORD, USER};
use support::tokens::{IDENTITY, TokenServer};

use crate::node::{
    MODES, Node, check_part, cold_reader, convert, kill_the_daemon, start_image, wait_for,
};

/// Base64 of what is needed to log in.
fn encoded(username: &str, password: &str) -> String {
    base64::engine::general_purpose::STANDARD.encode(format!("{username}:{password}"))
}

#[test]
fn what_is_asked_for_is_fetched_first() {
    for mode in MODES {
        let node = Node::in_mode(Auth::Open, None, mode);
        let mut cri = node.containerd.cri().unwrap();
        let image = node.registry.reference("app:nydus");
        cri.pull(&image, None).unwrap();
        let list = node.directory.path().join("list");
        fs::write(&list, "/data/unused\n").unwrap();
        let put = |file: &Path| {
            let body = json!([{"image": image, "prefetch": file}]).to_string();
            node.plugin.ask("PUT", "/api/v1/prefetch", &body).unwrap()
        };
        let refused = put(Path::new("/nonexistent"));
        assert_eq!(refused.status, 400, "{}", refused.body);
        assert!(refused.body.contains("/nonexistent"), "{}", refused.body);
        assert_eq!(put(&list).status, 200);
        // It was read already.
        fs::remove_file(&list).unwrap();
        let mark = node.registry.log().len();
        let pod = cri.run_pod("eager", &node.logs()).unwrap();
        let script = ("app:nydus", "sleep 1000");
        start_image(&node, &mut cri, &pod, "idle", script);
        // Nobody reads it.
        wait_for("all of the file", || {
            node.registry.traffic_since(mark).bytes > 8_000_000
        });
        cri.remove_pod(&pod).unwrap();
        node.wait_for_daemons(0);
    }
}

#[test]
fn it_tells_where_images_come_from() {
    for mode in MODES {
        let node = Node::in_mode(Auth::Basic, None, mode);
        let ask = |name: &str| {
            let target = format!("/api/v1/daemons/{name}");
            node.plugin.ask("GET", &target, "").unwrap()
        };
        assert_eq!(ask("records").status, 501);
        assert_eq!(ask("shared/backend").status, 404);
        let mut cri = node.containerd.cri().unwrap();
        let options = ["--compressor", "lz4_block"];
        convert(&node.registry, "app:original", "other:nydus", &options);
        let pause = node.registry.reference("pause:1");
        cri.pull(&pause, Some((USER, PASSWORD))).unwrap();
        let pod = cri.run_pod("steady", &node.logs()).unwrap();
        for (index, name) in ["app", "other"].into_iter().enumerate() {
            let image = format!("{name}:nydus");
            let reference = node.registry.reference(&image);
            cri.pull(&reference, Some((USER, PASSWORD))).unwrap();
            start_image(&node, &mut cri, &pod, name, (&image, "sleep 1000"));
            let images = node.plugin.ask("GET", "/api/v1/images", "").unwrap();
            let images = images.json();
            let mut images = images.as_array().unwrap().iter();
            let image = images.find(|known| known["reference"] == json!(reference));
            let id = image.unwrap()["snapshot_id"].as_str().unwrap();
            let backend = ask(&format!("{id}/backend")).json();
            assert_eq!(backend["type"], json!("registry"), "{backend}");
            let config = &backend["config"];
            assert_eq!(config["host"], json!(node.registry.host()));
            assert_eq!(config["repo"], json!(name));
            assert_eq!(config["auth"], json!(encoded(USER, PASSWORD)));
            let of_all = ask("shared/backend");
            match (mode, index) {
                ("shared", 0) => assert_eq!(of_all.json(), backend),
                ("shared", _) => {
                    assert_eq!(of_all.status, 400);
                    assert!(of_all.body.contains(id), "{}", of_all.body);
                }
                _ => assert_eq!(of_all.status, 404),
            }
        }
        cri.remove_all_pods().unwrap();
        node.wait_for_daemons(0);
    }
}

/// What kubelet has is handed on: an identity token for a token service, or name and
/// password in one word. The first reader of the data is a daemon.
#[test]
fn tokens_of_pulls_are_used() {
    for mode in MODES {
        let tokens = TokenServer::start().unwrap();
        let node = Node::with_image_service(Auth::Bearer(tokens), mode);
        let mut images = Cri::connect(&node.plugin.address()).unwrap();
        let token = Account {
            identity_token: IDENTITY.to_owned(),
            ..Account::default()
        };
        let word = Account {
            auth: encoded(USER, PASSWORD),
            ..Account::default()
        };
        for (image, account) in [("pause:1", &word), ("app:nydus", &token)] {
            let image = node.registry.reference(image);
            images.pull_as(&image, Some(account.clone())).unwrap();
        }
        let mut cri = node.containerd.cri().unwrap();
        let pod = cri.run_pod("private", &node.logs()).unwrap();
        let (_, container) = cold_reader(&node, &mut cri, &pod, "first");
        check_part(&node, &mut cri, &container, 0);
        // Later ones of the image are good for the one that runs, too.
        let image = node.registry.reference("app:nydus");
        images.pull_as(&image, Some(word)).unwrap();
        cold_reader(&node, &mut cri, &pod, "second");
        check_part(&node, &mut cri, &container, 1);
        let mut grep = Command::new("grep");
        grep.args(["-rlaF", "-e", IDENTITY, "-e", PASSWORD]);
        grep.args([
            "--exclude-dir=snapshots",
            "--exclude-dir=cache",
            "--exclude-dir=mnt",
        ]);
        let found = support::command::run(grep.arg(node.plugin.root())).unwrap();
        assert_eq!(found.code(), 1, "{}", found.stdout);
        cri.remove_all_pods().unwrap();
        node.wait_for_daemons(0);
    }
}

/// A copy of nydusd with another path.
fn copy_of_nydusd(node: &Node, name: &str) -> PathBuf {
    let copy = node.directory.path().join(name);
    let mut install = Command::new("install");
    install.args(["-m", "755"]);
    succeed(install.args([nydusd_path().unwrap(), copy.clone()])).unwrap();
    copy
}

/// Has a new daemon started, which runs `program`.
#[track_caller]
fn check_next_daemon(node: &Node, program: &Path) {
    let program = fs::canonicalize(program).unwrap();
    kill_the_daemon(node);
    wait_for("the program", || {
        let daemons = node.plugin.processes().unwrap();
        let runs = |pid: &i32| fs::read_link(format!("/proc/{pid}/exe")).ok();
        !daemons.is_empty()
            && daemons
                .iter()
                .all(|pid| runs(pid).as_ref() == Some(&program))
    });
}

#[test]
fn an_upgrade_lasts_until_the_configuration_changes() {
    let mut node = Node::new(Auth::Open);
    let mut cri = node.containerd.cri().unwrap();
    cri.pull(&node.registry.reference("app:nydus"), None)
        .unwrap();
    let pod = cri.run_pod("steady", &node.logs()).unwrap();
    let containers = [cold_reader(&node, &mut cri, &pod, "first")];
    let next = copy_of_nydusd(&node, "nydusd-next");
    let body = json!({"nydusd_path": next}).to_string();
    let answer = node.plugin.ask("PUT", "/api/v1/daemons/upgrade", &body);
    assert_eq!(answer.unwrap().status, 200, "{}", node.plugin.log());
    let restart = |node: &mut Node| {
        node.plugin.kill().unwrap();
        node.plugin.start_again().unwrap();
        wait_for("descriptors", || node.plugin.log().contains("holding "));
    };
    restart(&mut node);
    check_next_daemon(&node, &next);
    node.wait_for_progress(&mut cri, &containers);
    // It is away, and then it is back.
    let aside = next.with_extension("aside");
    fs::rename(&next, &aside).unwrap();
    restart(&mut node);
    check_next_daemon(&node, &nydusd_path().unwrap());
    node.wait_for_progress(&mut cri, &containers);
    fs::rename(&aside, &next).unwrap();
    restart(&mut node);
    check_next_daemon(&node, &next);
    // The administrator has chosen another one, and then the first one again.
    let other = copy_of_nydusd(&node, "nydusd-other");
    for program in [other, nydusd_path().unwrap()] {
        node.plugin.configure_program(&program);
        restart(&mut node);
        check_next_daemon(&node, &program);
        node.wait_for_progress(&mut cri, &containers);
    }
    cri.remove_pod(&pod).unwrap();
    node.wait_for_daemons(0);
}
