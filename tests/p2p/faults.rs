//! Anything between a reader and its bytes fails while nodes read, and comes back.
//!
//! The same for every fault: each node mounts a new image and reads a part of it; readers
//! go on with the next part on all nodes at once, and after their first files the fault
//! strikes; then it is repaired, and the same mounts must use their agents again. No read
//! fails and no byte is wrong, for as long as either way to the bytes exists.

use std::fs::{self, OpenOptions};
use std::ops::Range;
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::json;
use support::dragonfly::agent::PROXY_PORT;
use support::dragonfly::node::{Image, Mounted, Route};
use support::dragonfly::{Cluster, Options};
use support::proxy::{Fault, Proxy};

use crate::alone;
use crate::content::{Tree, compare, say};

/// Size of every file.
const SIZE: usize = 512 << 10;
/// Files that are read while all is well.
const BEFORE: Range<usize> = 0..8;
/// Files that are read while the fault lasts.
const DURING: Range<usize> = 8..32;
/// Files that are read until agents are used again, one at a time.
const AFTER: Range<usize> = 32..96;
/// How long it is waited at least between two of them.
const PAUSE: Duration = Duration::from_millis(50);
/// How long it may take until they are.
const RECOVERY: Duration = Duration::from_secs(60);

/// A cluster and the images made so far.
struct Stage {
    cluster: Cluster,
    images: usize,
}

/// An image mounted on every node, partly read.
struct Load {
    name: &'static str,
    image: Image,
    mounts: Vec<Mounted>,
}

impl Stage {
    fn new(seed: bool) -> Self {
        let options = Options {
            nodes: 3,
            seed,
            origin_mbit: 200,
            ..Options::default()
        };
        Self {
            cluster: Cluster::start(&options).unwrap(),
            images: 0,
        }
    }

    /// A new image, mounted on all nodes by `routes` and read in part.
    fn load(&mut self, name: &'static str, routes: &[Route]) -> Load {
        say(format_args!("{name}"));
        self.images += 1;
        let root = self.cluster.path(&format!("tree-{}", self.images));
        let tree = Tree::new(root, AFTER.end, SIZE, 1000 + self.images);
        let label = format!("faults-{}", self.images);
        let image = self.cluster.publish(&label, &tree.root, &[]).unwrap();
        let mount = |(node, route)| -> Mounted {
            let node: &support::dragonfly::node::Node = node;
            node.client.mount(&image, route).unwrap()
        };
        let nodes = self.cluster.nodes.iter();
        let mounts = nodes.zip(routes).map(mount).collect();
        let load = Load {
            name,
            image,
            mounts,
        };
        load.read_on_all(BEFORE, || ());
        load
    }

    /// The same through each node's own agent.
    fn load_through_agents(&mut self, name: &'static str) -> Load {
        let routes = vec![Route::dragonfly(); self.cluster.nodes.len()];
        self.load(name, &routes)
    }

    fn requests(&self) -> Vec<u64> {
        let nodes = self.cluster.nodes.iter();
        nodes.map(|node| node.agent.requests().unwrap()).collect()
    }

    /// Reads on until the agents of all nodes are asked again, and ends the mounts.
    fn expect_recovery(&self, load: Load) {
        let began = Instant::now();
        let before = self.requests();
        let mut files = AFTER;
        loop {
            let file = files.next().expect("more files to read");
            load.read_on_all(file..file + 1, || ());
            let now = self.requests();
            if now.iter().zip(&before).all(|(now, before)| now > before) {
                break;
            }
            assert!(
                began.elapsed() < RECOVERY,
                "{}: agents are not used again: requests {before:?}, then {now:?}",
                load.name
            );
            // Soon at first, and then no more than there are files.
            thread::sleep((began.elapsed() / 4).clamp(PAUSE, Duration::from_secs(2)));
        }
        say(format_args!("  used again after {:.1?}", began.elapsed()));
        load.end();
    }
}

impl Load {
    /// Reads `files` on all nodes at once; runs `fault` after the first file was read.
    fn read_on_all(&self, files: Range<usize>, fault: impl FnOnce()) {
        let read = AtomicUsize::new(0);
        let count = files.len();
        let one_by_one = |mount: &Path| -> Result<Duration, String> {
            let mut longest = Duration::ZERO;
            for file in files.clone() {
                let began = Instant::now();
                compare(&self.image.source, mount, file..file + 1)?;
                longest = longest.max(began.elapsed());
                read.fetch_add(1, Ordering::Relaxed);
            }
            Ok(longest)
        };
        let results: Vec<_> = thread::scope(|scope| {
            let threads: Vec<_> = self
                .mounts
                .iter()
                .map(|mounted| scope.spawn(|| one_by_one(mounted.point())))
                .collect();
            while count > 1
                && read.load(Ordering::Relaxed) == 0
                && !threads.iter().all(thread::ScopedJoinHandle::is_finished)
            {
                thread::sleep(Duration::from_millis(1));
            }
            fault();
            threads.into_iter().map(|t| t.join().unwrap()).collect()
        });
        let failed: Vec<_> = results.iter().filter(|result| result.is_err()).collect();
        assert!(failed.is_empty(), "{}: {failed:?}", self.name);
        let longest = results.into_iter().flatten().max();
        if count > 1 {
            say(format_args!("  longest read {longest:.1?}"));
        }
    }

    fn end(self) {
        for mounted in self.mounts {
            mounted.stop().unwrap();
        }
        fs::remove_dir_all(self.image.source).unwrap();
    }
}

#[test]
fn every_part_may_fail_and_come_back() {
    let _alone = alone();
    let mut stage = Stage::new(true);
    // While the scheduler knows the seed: one that has been away is not used for half a
    // minute, and then has nothing that a node's agent could be spared the origin for.
    origin_down(&mut stage);
    agent_killed(&mut stage);
    agent_frozen(&mut stage);
    scheduler_killed(&mut stage);
    seed_killed(&mut stage);
    nodes_apart(&mut stage);
    too_many_requests(&mut stage);
    answers(&mut stage, &errors_of_the_agent());
}

#[test]
fn wrong_bytes_go_no_further() {
    let _alone = alone();
    let mut stage = Stage::new(false);
    pieces_tampered_with(&mut stage);
    answers(
        &mut stage,
        &[("the agents send wrong bytes", Fault::Garble)],
    );
}

fn agent_killed(stage: &mut Stage) {
    let load = stage.load_through_agents("the agent of a node is killed");
    load.read_on_all(DURING, || stage.cluster.nodes[0].agent.kill().unwrap());
    stage.cluster.nodes[0].agent.start_again().unwrap();
    stage.expect_recovery(load);
}

fn agent_frozen(stage: &mut Stage) {
    let load = stage.load_through_agents("the agent of a node stands still");
    let agent = &stage.cluster.nodes[0].agent;
    load.read_on_all(DURING, || agent.freeze(true).unwrap());
    agent.freeze(false).unwrap();
    stage.expect_recovery(load);
}

fn scheduler_killed(stage: &mut Stage) {
    let load = stage.load_through_agents("the scheduler is killed");
    load.read_on_all(DURING, || stage.cluster.scheduler.kill().unwrap());
    stage.cluster.scheduler.start_again().unwrap();
    stage.expect_recovery(load);
}

fn seed_killed(stage: &mut Stage) {
    let load = stage.load_through_agents("the seed is killed");
    let seed = stage.cluster.seed.as_mut().unwrap();
    load.read_on_all(DURING, || seed.kill().unwrap());
    seed.start_again().unwrap();
    stage.expect_recovery(load);
}

/// What peers have must come without the origin. A node's own agent wants to hear from the
/// origin how long a blob is before it asks anybody for a piece; the seed knows.
fn origin_down(stage: &mut Stage) {
    let seed = stage.cluster.seed.as_ref().unwrap();
    let route = Route::dragonfly_and_seed(seed.machine());
    let routes = vec![route; stage.cluster.nodes.len()];
    let load = stage.load("the origin is away", &routes);
    // Two nodes have the next part; the third must get it from them.
    for mounted in &load.mounts[..2] {
        compare(&load.image.source, mounted.point(), DURING).unwrap();
    }
    stage.cluster.registry.kill().unwrap();
    load.read_on_all(DURING, || ());
    stage.cluster.registry.start_again().unwrap();
    stage.expect_recovery(load);
}

fn nodes_apart(stage: &mut Stage) {
    let load = stage.load_through_agents("two nodes do not reach each other");
    let nodes = &stage.cluster.nodes;
    let (one, two) = (nodes[0].agent.machine(), nodes[1].agent.machine());
    load.read_on_all(DURING, || {
        one.cut(two).unwrap();
        two.cut(one).unwrap();
    });
    one.heal(two).unwrap();
    two.heal(one).unwrap();
    stage.expect_recovery(load);
}

/// Wrong bytes on the disk of one agent, which it serves to its node and to its peers.
fn pieces_tampered_with(stage: &mut Stage) {
    let load = stage.load_through_agents("the pieces of an agent are tampered with");
    let first = &stage.cluster.nodes[0];
    compare(&load.image.source, load.mounts[0].point(), DURING).unwrap();
    let mut changed = 0;
    for file in first.agent.pieces().unwrap() {
        changed += spoil(&file);
    }
    assert!(changed > 0, "no piece was found");
    // The node itself once more, from an empty cache, and its peers.
    let again = first
        .client
        .mount(&load.image, &Route::dragonfly())
        .unwrap();
    compare(&load.image.source, again.point(), DURING).unwrap();
    load.read_on_all(DURING, || ());
    again.stop().unwrap();
    stage.expect_recovery(load);
}

/// Turns over a bit of every 512 bytes.
fn spoil(file: &Path) -> usize {
    let bytes = fs::read(file).unwrap();
    let file = OpenOptions::new().write(true).open(file).unwrap();
    let mut changed = 0;
    for at in (0..bytes.len()).step_by(512) {
        file.write_all_at(&[bytes[at] ^ 1], at as u64).unwrap();
        changed += 1;
    }
    changed
}

/// The agent's own limit, as operators set it.
fn too_many_requests(stage: &mut Stage) {
    let agent = &mut stage.cluster.nodes[0].agent;
    agent.kill().unwrap();
    let limit = |rate: u32| json!({"proxy": {"server": {"requestRateLimit": rate}}});
    agent.configure(&limit(1)).unwrap();
    agent.start_again().unwrap();
    let load = stage.load_through_agents("the agent of a node has enough");
    load.read_on_all(DURING, || ());
    let agent = &mut stage.cluster.nodes[0].agent;
    let limited = agent.count("dragonfly_client_proxy_request_rate_limited_total");
    assert!(limited.unwrap() > 0, "the limit was never reached");
    agent.kill().unwrap();
    agent.configure(&limit(4000)).unwrap();
    agent.start_again().unwrap();
    stage.expect_recovery(load);
}

/// Answers that agents give, but not when they are told to.
fn errors_of_the_agent() -> [(&'static str, Fault); 5] {
    let kind = |kind: &str| vec![("X-Dragonfly-Error-Type", kind.to_owned())];
    [
        ("the agents answer 429", Fault::Status(429, kind("proxy"))),
        ("the agents answer 403", Fault::Status(403, kind("proxy"))),
        (
            "the agents answer 500",
            Fault::Status(500, kind("dfdaemon")),
        ),
        (
            "the agents answer 200 without bytes",
            Fault::Status(200, kind("backend")),
        ),
        ("the agents break off", Fault::CloseAfter(100_000)),
    ]
}

/// All agents answer every request for a blob in one way, then in another.
fn answers(stage: &mut Stage, faults: &[(&'static str, Fault)]) {
    let nodes = &stage.cluster.nodes;
    let agent = format!("127.0.0.1:{PROXY_PORT}");
    let proxies: Vec<_> = nodes
        .iter()
        .map(|node| node.agent.machine().inside(|| Proxy::start(&agent)))
        .map(|proxy| proxy.unwrap().unwrap())
        .collect();
    let route = |proxy: &Proxy| Route::Dragonfly(format!("http://{}", proxy.host()));
    let routes: Vec<_> = proxies.iter().map(route).collect();
    for (name, fault) in faults {
        let load = stage.load(name, &routes);
        let fail = || {
            for proxy in &proxies {
                proxy.fail("/blobs/", fault.clone());
            }
        };
        load.read_on_all(DURING, fail);
        for proxy in &proxies {
            proxy.heal();
        }
        stage.expect_recovery(load);
    }
}
