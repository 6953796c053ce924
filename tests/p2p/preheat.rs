//! Images that are put into the seed before any node wants them: nodes read the hot part
//! from the seed, and the origin is not asked for it.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;
use support::binaries::nydus_image;
use support::command::succeed;
use support::dragonfly::agent::PROXY_PORT;
use support::dragonfly::{Cluster, Options};
use support::image::layer::write_tree;
use support::image::layout::{self, Image};
use support::tree::nasty::noise;

use crate::alone;

const PIECE: u64 = 4 << 20;
/// Files of a mebibyte in the one layer.
const FILES: usize = 48;
/// What the origin sends for questions, and answers without content.
const SMALL: u64 = 256 << 10;

/// A cluster, and an image of which the first files are hot.
struct Stage {
    cluster: Cluster,
    repository: String,
}

impl Stage {
    fn new(name: &str) -> Self {
        let options = Options {
            nodes: 1,
            seed: true,
            ..Options::default()
        };
        let stage = Self {
            cluster: Cluster::start(&options).unwrap(),
            repository: format!("p2p/{name}"),
        };
        stage.push();
        stage
    }

    fn path(&self, name: &str) -> PathBuf {
        self.cluster.path(name)
    }

    fn reference(&self) -> String {
        format!("{}/{}:1", self.cluster.registry.host(), self.repository)
    }

    /// Converts the image into the registry.
    fn push(&self) {
        let tree = self.path("preheat-tree");
        fs::create_dir_all(tree.join("data")).unwrap();
        for number in 0..FILES {
            let bytes = noise(1 << 20, (number + 7_000) << 20);
            fs::write(tree.join(format!("data/{number:02}")), bytes).unwrap();
        }
        let (tar, layout, patterns) = (
            self.path("preheat.tar"),
            self.path("preheat-layout"),
            self.path("patterns"),
        );
        write_tree(&tree, &tar).unwrap();
        layout::write(&layout, "test", &[Image::new(&[&tar])]).unwrap();
        fs::write(&patterns, "/data/00\n/data/01\n").unwrap();
        let mut command = nydus_image().unwrap();
        self.cluster.origin.enter(&mut command);
        command.args(["convert", "--plain-http", "--prefetch-patterns"]);
        command.arg(patterns);
        command.arg(format!("oci:{}:test", layout.display()));
        succeed(without_credentials(&mut command, &tree).arg(self.reference())).unwrap();
    }

    /// Preheats, from the machine of the seed; returns the report on the data blob.
    fn preheat(&self, arguments: &[&str]) -> Value {
        let seed = self.cluster.seed.as_ref().unwrap();
        let report = self.path("report");
        let mut command = nydus_image().unwrap();
        seed.machine().enter(&mut command);
        command.args(["preheat", "--plain-http", "--seed"]);
        command.arg(format!("http://127.0.0.1:{PROXY_PORT}"));
        command.arg("--output-json").arg(&report).args(arguments);
        let scratch = self.path("");
        succeed(without_credentials(&mut command, &scratch).arg(self.reference())).unwrap();
        let report: Value = serde_json::from_slice(&fs::read(report).unwrap()).unwrap();
        let mut blobs = report["blobs"].as_array().unwrap().clone();
        blobs.sort_by_key(|blob| blob["size"].as_u64());
        blobs.pop().unwrap()
    }

    /// Has the node's agent read a range of a blob; bytes that the origin sent for it.
    fn read(&self, digest: &str, start: u64, end: u64) -> u64 {
        let before = self.cluster.origin.sent().unwrap();
        let registry = format!(
            "X-Dragonfly-Registry: http://{}",
            self.cluster.registry.host()
        );
        let range = format!("Range: bytes={start}-{}", end - 1);
        let path = format!("/v2/{}/blobs/{digest}", self.repository);
        // As daemons do: each piece is a task of its own.
        let (hex, piece) = (
            digest.strip_prefix("sha256:").unwrap(),
            start / PIECE * PIECE,
        );
        let task = format!(
            "X-Dragonfly-Content-For-Calculating-Task-ID: nydus {hex} {piece}-{}",
            piece + PIECE
        );
        let headers = [
            &registry,
            &range,
            &task,
            "X-Dragonfly-Scheduling-Policy: always",
        ];
        let answer = self.cluster.nodes[0].agent.get(&path, &headers).unwrap();
        assert_eq!(
            (answer.status, answer.length),
            (206, end - start),
            "{answer:?}"
        );
        self.cluster.origin.sent().unwrap() - before
    }
}

fn without_credentials<'a>(command: &'a mut Command, directory: &Path) -> &'a mut Command {
    command.env("DOCKER_CONFIG", directory)
}

fn ranges(blob: &Value) -> Vec<(u64, u64)> {
    let ranges = blob["ranges"].as_array().unwrap().iter();
    let number = |range: &Value, key| range[key].as_u64().unwrap();
    ranges
        .map(|range| (number(range, "start"), number(range, "end")))
        .collect()
}

#[test]
fn nodes_read_the_hot_part_from_the_seed() {
    let _alone = alone();
    let stage = Stage::new("hot");
    let blob = stage.preheat(&[]);
    assert_eq!(blob["whole"], false, "{blob}");
    assert!(blob["chunks_verified"].as_u64().unwrap() >= 2, "{blob}");
    let digest = blob["digest"].as_str().unwrap();
    let hot = ranges(&blob);
    for (start, end) in &hot {
        // As a reader asks: a little at a time.
        for at in [*start, (start + end) / 2, end - 4096] {
            let sent = stage.read(digest, at, at + 4096);
            assert!(sent < SMALL, "the origin sent {sent} bytes for {at}");
        }
    }
    let traffic = stage.cluster.nodes[0].agent.traffic().unwrap();
    assert!(traffic.from_peers > 0, "{traffic:?}");
    // What the measure is worth: anything else comes from the origin.
    let cold = hot[0].1;
    assert!(hot.iter().all(|(start, end)| cold < *start || cold >= *end));
    let sent = stage.read(digest, cold, cold + 4096);
    assert!(sent >= PIECE, "the origin sent {sent} bytes");
}

/// A seed that has a part of a blob takes itself for complete.
#[test]
fn what_is_there_already_does_not_hide_what_is_missing() {
    let _alone = alone();
    let stage = Stage::new("again");
    stage.preheat(&[]);
    let blob = stage.preheat(&["--whole"]);
    assert_eq!(blob["whole"], true, "{blob}");
    let digest = blob["digest"].as_str().unwrap();
    let size = blob["size"].as_u64().unwrap();
    for at in (0..size).step_by(usize::try_from(PIECE).unwrap()) {
        let sent = stage.read(digest, at, (at + 4096).min(size));
        assert!(sent < SMALL, "the origin sent {sent} bytes for {at}");
    }
}
