//! Preheats through a manager, of which there is the part that is spoken to.

use std::fs;
use std::process::Command;

use serde_json::json;
use support::command::succeed;
use support::manager::{Manager, TOKEN};
use support::registry::Auth;

use super::Stage;
use crate::scene::assert_fails;

/// A preheat through a manager, with its token in a file.
fn through(stage: &Stage, manager: &Manager, token: &str) -> Command {
    let file = stage.scene.path("token");
    fs::write(&file, format!("{token}\n")).unwrap();
    let mut command = stage.command("preheat");
    command.arg(stage.registry.reference("app:1"));
    command.args(["--manager", &manager.url(), "--manager-token-file"]);
    command.arg(file);
    command
}

#[test]
fn a_manager_gets_a_job_and_is_asked_until_it_is_over() {
    let stage = Stage::pushed(Auth::Basic);
    let states = ["PENDING", "STARTED", "SUCCESS"].map(|state| json!({"state": state}));
    let manager = Manager::start(&states).unwrap();
    let mut command = through(&stage, &manager, TOKEN);
    let finished = succeed(command.args(["--replicas", "2"])).unwrap();
    for words in ["STARTED", "enableTaskIDBasedBlobDigest"] {
        assert!(finished.stderr.contains(words), "{}", finished.stderr);
    }
    assert!(
        finished.stdout.contains("job 7: 2 blobs"),
        "{}",
        finished.stdout
    );
    let [job] = manager.jobs().try_into().unwrap();
    assert_eq!(job["type"], "preheat");
    let args = &job["args"];
    assert_eq!(args["type"], "file");
    assert_eq!(
        (&args["scope"], &args["count"]),
        (&json!("all_seed_peers"), &json!(2))
    );
    let host = stage.registry.host();
    for (digest, _) in stage.layers() {
        let url = json!(format!("http://{host}/v2/app/blobs/{digest}"));
        assert!(args["urls"].as_array().unwrap().contains(&url), "{args}");
    }
    let login = args["headers"]["Authorization"].as_str().unwrap();
    assert!(login.starts_with("Basic "), "{args}");
    for secret in [login, TOKEN] {
        assert!(!finished.stderr.contains(secret) && !finished.stdout.contains(secret));
    }
}

#[test]
fn a_manager_is_not_taken_at_its_word() {
    let stage = Stage::pushed(Auth::Open);
    let failed = json!({"state": "SUCCESS", "result": {"job_states": [{"results": [
        {"success_tasks": [], "failure_tasks": [{"description": "no seed peer"}]}]}]}});
    let partial = json!({"state": "SUCCESS", "result": {"job_states": [{"results": [
        {"success_tasks": [{"url": "one"}], "failure_tasks": []}]}]}});
    for (story, words) in [
        (failed, "no seed peer"),
        (partial, "reports 1 of 2 blobs"),
        (
            json!({"state": "FAILURE", "result": {"error": "the scheduler is gone"}}),
            "scheduler is gone",
        ),
    ] {
        let manager = Manager::start(&[story]).unwrap();
        assert_fails(
            words,
            &mut through(&stage, &manager, TOKEN),
            &[words, "job 7"],
        );
    }
    let manager = Manager::start(&[json!({"state": "STARTED"})]).unwrap();
    let mut command = through(&stage, &manager, TOKEN);
    command.args(["--manager-timeout", "2"]);
    assert_fails("never over", &mut command, &["not over after 2 s"]);
    let finished = assert_fails(
        "a wrong token",
        &mut through(&stage, &manager, "wr0ng-t0ken"),
        &["401", "personal access token"],
    );
    assert!(!finished.stderr.contains("wr0ng-t0ken"));
    let mut command = stage.command("preheat");
    command.env_remove("DRAGONFLY_MANAGER_TOKEN");
    command.arg(stage.registry.reference("app:1"));
    command.args(["--manager", &manager.url()]);
    assert_fails("no token", &mut command, &["DRAGONFLY_MANAGER_TOKEN"]);
}
