//! `nydus-image preheat`: what is asked of seeds, and what becomes of their answers.
//!
//! A seed is stood in for by a proxy of the registry that says that it is one, and fails
//! as told; a manager by the part of one that is spoken to. With the real Dragonfly:
//! `tests/p2p`.

use std::fs;
use std::path::PathBuf;
use std::process::Command;

use serde_json::{Value, json};
use support::binaries::nydus_image;
use support::command::{run, succeed};
use support::image::layer::write_tree;
use support::image::layout::{self, Image};
use support::manager::{Manager, TOKEN};
use support::proxy::{Fault, Head, Proxy};
use support::registry::{Auth, Registry};
use support::tokens::TokenServer;
use support::tree::nasty::noise;

use crate::scene::{Scene, assert_fails};

const PIECE: u64 = 4 << 20;
/// Files of a mebibyte in the one layer.
const FILES: usize = 40;
/// The one that is read first, in the middle.
const HOT: &str = "/data/20";

/// A registry with an image of 40 MiB, of which a little is hot.
struct Stage {
    scene: Scene,
    registry: Registry,
}

impl Stage {
    fn new(auth: Auth) -> Self {
        let scene = Scene::new();
        let tree = scene.dir("tree");
        fs::create_dir(tree.join("data")).unwrap();
        for number in 0..FILES {
            let bytes = noise(1 << 20, number << 20);
            fs::write(tree.join(format!("data/{number:02}")), bytes).unwrap();
        }
        let tar = scene.path("layer.tar");
        write_tree(&tree, &tar).unwrap();
        layout::write(&scene.path("layout"), "test", &[Image::new(&[&tar])]).unwrap();
        fs::write(scene.path("patterns"), format!("{HOT}\n")).unwrap();
        let registry = Registry::start(auth).unwrap();
        Self { scene, registry }
    }

    /// With the converted image pushed.
    fn pushed(auth: Auth) -> Self {
        let stage = Self::new(auth);
        succeed(&mut stage.convert("app:1")).unwrap();
        stage
    }

    fn convert(&self, name: &str) -> Command {
        let mut command = self.command("convert");
        command.arg("--prefetch-patterns");
        command.arg(self.scene.path("patterns"));
        command.arg(format!("oci:{}:test", self.scene.path("layout").display()));
        command.arg(self.registry.reference(name));
        command
    }

    fn preheat(&self, seeds: &[&Proxy]) -> Command {
        let mut command = self.command("preheat");
        command.arg(self.registry.reference("app:1"));
        command.arg("--output-json").arg(self.scene.path("report"));
        with_seeds(command, seeds)
    }

    fn command(&self, name: &str) -> Command {
        let mut command = nydus_image().unwrap();
        let config = self.registry.docker_config(self.registry.host()).unwrap();
        command.arg(name).env("DOCKER_CONFIG", config);
        command
    }

    fn report(&self) -> Value {
        let bytes = fs::read(self.scene.path("report")).unwrap();
        serde_json::from_slice(&bytes).unwrap()
    }

    /// A stand-in for a seed.
    fn seed(&self) -> Proxy {
        let proxy = Proxy::start(self.registry.host()).unwrap();
        proxy.add_header("X-Dragonfly-Task-ID", "0123");
        proxy
    }

    /// Digest and size of the data and of the bootstrap.
    fn layers(&self) -> [(String, u64); 2] {
        let manifest = self.registry.manifest_json("app:1").unwrap();
        [0, 1].map(|index| {
            let layer = &manifest["layers"][index];
            let digest = layer["digest"].as_str().unwrap().to_owned();
            (digest, layer["size"].as_u64().unwrap())
        })
    }
}

fn with_seeds(mut command: Command, seeds: &[&Proxy]) -> Command {
    for seed in seeds {
        command.args(["--seed", &format!("http://{}", seed.host())]);
    }
    command
}

/// What was asked of a blob: first byte and the one after the last.
fn ranges(requests: &[Head], digest: &str) -> Vec<(u64, u64)> {
    let of = requests.iter().filter(|head| head.target.ends_with(digest));
    let mut ranges: Vec<_> = of
        .map(|head| {
            let range = head.header("range").unwrap();
            let (first, last) = range
                .strip_prefix("bytes=")
                .unwrap()
                .split_once('-')
                .unwrap();
            (first.parse().unwrap(), last.parse::<u64>().unwrap() + 1)
        })
        .collect();
    ranges.sort_unstable();
    ranges
}

#[test]
fn the_hot_part_is_asked_for_as_nodes_ask() {
    let stage = Stage::pushed(Auth::Bearer(TokenServer::start().unwrap()));
    let seed = stage.seed();
    let finished = succeed(&mut stage.preheat(&[&seed])).unwrap();
    let [(data, size), (bootstrap, bootstrap_size)] = stage.layers();
    let requests = seed.requests();
    for head in &requests {
        // Log-ins in particular are none of a seed's business.
        assert_eq!(head.method, "GET");
        assert!(head.target.starts_with("/v2/app/blobs/sha256:"), "{head:?}");
        let origin = format!("http://{}", stage.registry.host());
        assert_eq!(head.header("x-dragonfly-registry"), Some(origin.as_str()));
        for (name, value) in [
            ("x-dragonfly-scheduling-policy", "always"),
            ("accept-encoding", "identity"),
        ] {
            assert_eq!(head.header(name), Some(value), "{head:?}");
        }
        let authorization = head.header("authorization").unwrap();
        assert!(authorization.starts_with("Bearer "), "{head:?}");
        assert!(!finished.stderr.contains(authorization), "a token is shown");
    }
    assert_eq!(ranges(&requests, &bootstrap), [(0, bootstrap_size)]);
    let asked = ranges(&requests, &data);
    let bytes: u64 = asked.iter().map(|(start, end)| end - start).sum();
    assert!(
        bytes >= 1 << 20 && bytes <= 4 * PIECE && size >= 10 * PIECE,
        "{asked:?} of {size}"
    );
    for (start, end) in &asked {
        assert!(start % PIECE == 0 && (end % PIECE == 0 || *end == size));
    }
    // The table of chunks is at the end.
    assert_eq!(asked.last().unwrap().1, size);

    let report = stage.report();
    assert_eq!(report["seeds"][0]["bytes"], json!(bytes + bootstrap_size));
    let blobs = report["blobs"].as_array().unwrap();
    let of_data = blobs.iter().find(|blob| blob["digest"] == data.as_str());
    let of_data = of_data.unwrap();
    assert_eq!(of_data["whole"], false);
    assert_eq!(of_data["chunks_verified"], 1);
    assert!(
        finished
            .stdout
            .contains("2 blobs preheated, 1 of them whole"),
        "{}",
        finished.stdout
    );
}

#[test]
fn a_list_of_files_and_whole_blobs() {
    let stage = Stage::pushed(Auth::Open);
    let seed = stage.seed();
    let [(data, size), _] = stage.layers();
    let list = stage.scene.path("list");
    fs::write(&list, "/data/00\n/data/39\n/not/there\n").unwrap();
    let finished = succeed(stage.preheat(&[&seed]).arg("--files").arg(&list)).unwrap();
    assert!(
        finished.stderr.contains("1 of the 3 files"),
        "{}",
        finished.stderr
    );
    let asked = ranges(&seed.requests(), &data);
    assert_eq!(asked.first().unwrap().0, 0, "{asked:?}");

    let seed = stage.seed();
    succeed(stage.preheat(&[&seed]).arg("--whole")).unwrap();
    let asked = ranges(&seed.requests(), &data);
    let mut at = 0;
    for (start, end) in &asked {
        assert_eq!(*start, at, "{asked:?}");
        at = *end;
    }
    assert_eq!(at, size);
    assert!(asked.len() > 1, "more than one request: {asked:?}");

    // A list of more than half of it has the same end.
    let seed = stage.seed();
    fs::write(&list, "/data\n").unwrap();
    succeed(stage.preheat(&[&seed]).arg("--files").arg(&list)).unwrap();
    assert_eq!(ranges(&seed.requests(), &data), asked);
}

#[test]
fn every_copy_has_a_seed_of_its_own() {
    let stage = Stage::pushed(Auth::Basic);
    let seeds = [stage.seed(), stage.seed(), stage.seed()];
    let [first, second, third] = &seeds;
    succeed(
        stage
            .preheat(&[first, second, third])
            .args(["--replicas", "2"]),
    )
    .unwrap();
    for (digest, _) in stage.layers() {
        let holders = seeds
            .iter()
            .filter(|seed| !ranges(&seed.requests(), &digest).is_empty());
        assert_eq!(holders.count(), 2, "{digest}");
    }
    let report = stage.report();
    for blob in report["blobs"].as_array().unwrap() {
        assert_eq!(blob["seeds"].as_array().unwrap().len(), 2, "{blob}");
    }
}

fn typed(status: u16, kind: &str) -> Fault {
    Fault::Status(status, vec![("X-Dragonfly-Error-Type", kind.to_owned())])
}

#[test]
fn what_passes_is_tried_again() {
    let stage = Stage::pushed(Auth::Bearer(TokenServer::start().unwrap()));
    for fault in [
        typed(429, "proxy"),
        typed(500, "dfdaemon"),
        typed(503, "backend"),
        typed(401, "backend"),
        typed(200, "backend"),
        Fault::Hangup,
        Fault::CloseAfter(1000),
    ] {
        let seed = stage.seed();
        seed.fail_times(1, "/blobs/", fault.clone());
        let result = succeed(&mut stage.preheat(&[&seed]));
        assert!(result.is_ok(), "{fault:?}: {result:?}");
    }
}

#[test]
fn failures_name_seed_blob_range_and_cause() {
    let stage = Stage::pushed(Auth::Open);
    let [(data, _), _] = stage.layers();
    for (fault, words) in [
        (typed(403, "proxy"), "block list"),
        (typed(507, "dfdaemon"), "disk of the seed is full"),
        (typed(404, "backend"), "no such blob"),
        (typed(200, "backend"), "could not reach the registry"),
        (Fault::Status(200, vec![]), "X-Dragonfly-Task-ID"),
        (Fault::Garble, "wrong bytes"),
        (Fault::Shorten(1000), "1000 bytes announced"),
        (Fault::ResetAfter(1000), "(attempt 4)"),
        (Fault::OtherRange(1), "other bytes than asked for"),
        (Fault::IgnoreRange, "no Content-Range"),
        (Fault::ShiftRange(1), "other bytes than asked for"),
    ] {
        let seed = stage.seed();
        seed.fail(&data, fault.clone());
        let place = format!("seed http://{}: blob {data}, bytes ", seed.host());
        let failed = [
            "cannot preheat",
            "1 of 2 blobs are not there",
            words,
            &place,
        ];
        let case = format!("{fault:?}");
        assert_fails(&case, &mut stage.preheat(&[&seed]), &failed);
        // The rest was not given up.
        let [_, (bootstrap, _)] = stage.layers();
        assert!(!ranges(&seed.requests(), &bootstrap).is_empty());
    }
}

#[test]
fn what_keeps_nothing_is_no_seed() {
    let stage = Stage::pushed(Auth::Open);
    let plain = Proxy::start(stage.registry.host()).unwrap();
    let words = ["no Dragonfly proxy"];
    assert_fails("a plain proxy", &mut stage.preheat(&[&plain]), &words);
    let mut command = stage.command("preheat");
    command.arg(stage.registry.reference("app:1"));
    command.args(["--seed", "http://127.0.0.1:1"]);
    assert_fails("nobody", &mut command, &["127.0.0.1:1", "2 of 2 blobs"]);
    let mut command = stage.command("preheat");
    command.arg(stage.registry.reference("other:1"));
    assert_fails(
        "no image",
        &mut with_seeds(command, &[&plain]),
        &["other", "not found"],
    );
}

#[test]
fn a_conversion_preheats_what_it_has_pushed() {
    let stage = Stage::new(Auth::Open);
    let seed = stage.seed();
    let mut convert = with_seeds(stage.convert("app:1"), &[&seed]);
    let finished = succeed(convert.arg("--preheat")).unwrap();
    let lines: Vec<_> = finished.stdout.lines().collect();
    assert_eq!(lines.len(), 3, "{}", finished.stdout);
    assert!(lines[2].contains("2 blobs preheated"), "{}", lines[2]);
    let [(data, _), (bootstrap, size)] = stage.layers();
    let requests = seed.requests();
    assert!(!ranges(&requests, &data).is_empty());
    assert_eq!(ranges(&requests, &bootstrap), [(0, size)]);

    seed.fail("/blobs/", typed(403, "proxy"));
    let mut convert = with_seeds(stage.convert("app:2"), &[&seed]);
    let finished = run(convert.arg("--preheat")).unwrap();
    assert_eq!(finished.code(), 1);
    assert!(finished.stdout.contains("app:2"), "{}", finished.stdout);
    for words in [
        "is pushed and complete",
        "could not be preheated",
        "block list",
    ] {
        assert!(finished.stderr.contains(words), "{}", finished.stderr);
    }
    stage.registry.manifest("app:2").unwrap();
}

#[test]
fn options_that_cannot_work_are_refused_at_once() {
    let stage = Stage::new(Auth::Open);
    let seed = stage.seed();
    let layout = format!("oci:{}:test", stage.scene.path("layout").display());
    let mut cases = vec![
        stage.convert("a"),
        stage.convert("a"),
        stage.command("preheat"),
    ];
    cases[0].arg("--preheat");
    cases[1].args(["--seed", "http://seed:4001"]);
    cases[2].arg(stage.registry.reference("a"));
    let mut command = stage.command("preheat");
    command.arg(&layout);
    cases.push(with_seeds(command, &[&seed]));
    for bad in ["seed:4001", "http://user:s3cret@seed:4001"] {
        let mut command = stage.command("preheat");
        command.args(["--seed", bad, "registry.example/a"]);
        cases.push(command);
    }
    for mut command in cases {
        let finished = run(&mut command).unwrap();
        assert_eq!(finished.code(), 2, "{command:?}: {}", finished.stderr);
    }
    assert!(seed.requests().is_empty());
    assert!(stage.registry.manifest("a").is_err());
}

/// A preheat through a manager, with its token in a file.
fn through(stage: &Stage, manager: &Manager, token: &str) -> Command {
    let file: PathBuf = stage.scene.path("token");
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
