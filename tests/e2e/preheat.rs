//! `nydus-image preheat`: what is asked of seeds, and what becomes of their answers.
//!
//! A seed is stood in for by a proxy of the registry that says that it is one, and fails
//! as told; a manager by the part of one that is spoken to. With the real Dragonfly:
//! `tests/p2p`.

use std::fs;
use std::process::Command;
use std::time::Duration;

use nix::sys::signal::Signal;
use serde_json::{Value, json};
use support::binaries::nydus_image;
use support::command::{run, succeed};
use support::image::layer::write_tree;
use support::image::layout::{self, Image};
use support::process::Process;
use support::proxy::{Fault, Head, Proxy};
use support::registry::{Auth, Registry};
use support::tokens::TokenServer;
use support::tree::nasty::noise;

use crate::scene::{Scene, assert_empty, assert_fails};
use faults::typed;

mod faults;
mod manager;

const PIECE: u64 = 4 << 20;
/// Files of a mebibyte in the one layer, beside the program.
const FILES: usize = 56;
/// The one that is read first, in the middle.
const HOT: &str = "/data/20";

/// A registry with an image of 57 MiB, of which a little is hot.
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
        fs::create_dir_all(tree.join("usr/bin")).unwrap();
        fs::write(tree.join("usr/bin/sh"), noise(1 << 20, FILES << 20)).unwrap();
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
        self.convert_layout("layout", name)
    }

    fn convert_layout(&self, layout: &str, name: &str) -> Command {
        let mut command = self.command("convert");
        // Noise is as long at any level.
        command.args(["--compression-level", "1", "--prefetch-patterns"]);
        command.arg(self.scene.path("patterns"));
        command.arg(format!("oci:{}:test", self.scene.path(layout).display()));
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
        (2 << 20..=5 * PIECE).contains(&bytes) && size >= 14 * PIECE,
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
    // The file of the list, and the program that the image starts.
    assert_eq!(of_data["chunks_verified"], 2);
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
    fs::write(&list, "/data/00\n/data/55\n/not/there\n").unwrap();
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

/// The data are in the original layer, and the table of its chunks in a blob of its own.
#[test]
fn layers_that_stay_what_they_are() {
    let stage = Stage::new(Auth::Open);
    succeed(stage.convert("app:1").arg("--oci-ref")).unwrap();
    let seed = stage.seed();
    succeed(&mut stage.preheat(&[&seed])).unwrap();
    let manifest = stage.registry.manifest_json("app:1").unwrap();
    let index = &manifest["layers"][0];
    let original = index["annotations"]["containerd.io/snapshot/nydus-ref"].as_str();
    let requests = seed.requests();
    let table = ranges(&requests, index["digest"].as_str().unwrap());
    assert_eq!(table, [(0, index["size"].as_u64().unwrap())]);
    let asked = ranges(&requests, original.unwrap());
    let bytes: u64 = asked.iter().map(|(start, end)| end - start).sum();
    assert!((2 << 20..=5 * PIECE).contains(&bytes), "{asked:?}");
    let report = stage.report();
    let blobs = report["blobs"].as_array().unwrap();
    let data = blobs.iter().find(|blob| blob["whole"] == false).unwrap();
    assert_eq!(data["chunks_verified"], 2, "{report}");
}

#[test]
fn all_platforms_or_those_that_are_asked_for() {
    let stage = Stage::new(Auth::Open);
    let small = stage.scene.dir("small");
    fs::write(small.join("file"), "in another layer\n").unwrap();
    let (lower, upper) = (stage.scene.path("layer.tar"), stage.scene.path("small.tar"));
    write_tree(&small, &upper).unwrap();
    let mut arm = Image::new(&[&lower, &upper]);
    arm.architecture = "arm".to_owned();
    let images = [Image::new(&[&lower]), arm];
    layout::write(&stage.scene.path("two"), "test", &images).unwrap();
    succeed(&mut stage.convert_layout("two", "app:1")).unwrap();
    let index = stage.registry.manifest_json("app:1").unwrap();
    let bootstraps = [0, 1].map(|entry| {
        let digest = index["manifests"][entry]["digest"].as_str().unwrap();
        let manifest = stage.registry.manifest_json(&format!("app@{digest}"));
        let layers = manifest.unwrap()["layers"].as_array().unwrap().clone();
        layers.last().unwrap()["digest"]
            .as_str()
            .unwrap()
            .to_owned()
    });
    for (platform, wanted) in [(None, [true, true]), (Some("linux/arm"), [false, true])] {
        let seed = stage.seed();
        let mut command = stage.preheat(&[&seed]);
        command.args(platform.map(|platform| format!("--platform={platform}")));
        succeed(&mut command).unwrap();
        let requests = seed.requests();
        let asked = bootstraps
            .each_ref()
            .map(|it| !ranges(&requests, it).is_empty());
        assert_eq!(asked, wanted, "{platform:?}");
    }
    let mut command = stage.preheat(&[&stage.seed()]);
    command.arg("--platform=linux/s390x");
    assert_fails(
        "another platform",
        &mut command,
        &["linux/s390x", "no Nydus image"],
    );
}

#[test]
fn an_interrupted_preheat_leaves_nothing() {
    let stage = Stage::pushed(Auth::Open);
    let seed = stage.seed();
    seed.fail("/blobs/", Fault::Stall(Duration::from_secs(60)));
    let temporary = stage.scene.dir("temporary");
    let mut command = stage.preheat(&[&seed]);
    command.env("TMPDIR", &temporary);
    let mut process = Process::start(&mut command, &stage.scene.path("log")).unwrap();
    process.wait_until(|_| !seed.requests().is_empty()).unwrap();
    process.signal(Signal::SIGINT).unwrap();
    assert_eq!(process.wait().unwrap().code(), Some(1), "{}", process.log());
    assert!(process.log().contains("interrupted"), "{}", process.log());
    assert_empty("temporary files", &temporary);
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
