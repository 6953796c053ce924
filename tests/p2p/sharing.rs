//! The same image read on one node and on four: Dragonfly keeps the origin's bytes what
//! they are for one, and later nodes are no slower than the first.

use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use support::dragonfly::agent::PROXY_PORT;
use support::dragonfly::node::{Image, Node, Route};
use support::dragonfly::{Cluster, Options};

use crate::alone;
use crate::content::{Tree, compare, say};

/// What the origin can send.
const MBIT: u32 = 100;
/// Files of 512 KiB each. All are read: nodes differ in what they read ahead of a part.
const FILES: usize = 96;
const SIZE: usize = 512 << 10;

/// What reading on some nodes cost.
#[derive(Debug)]
struct Cost {
    /// Bytes that left the origin.
    origin: u64,
    /// How long each node took.
    times: Vec<Duration>,
}

/// When nodes begin.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Order {
    InTurn,
    AtOnce,
}

struct Stage {
    cluster: Cluster,
    images: usize,
}

impl Stage {
    /// A new image: whatever was cached of others is of no use for it.
    fn image(&mut self) -> Image {
        self.images += 1;
        let name = format!("image-{}", self.images);
        let tree = Tree::new(self.cluster.path(&name), FILES, SIZE, self.images);
        self.cluster.publish(&name, &tree.root, &[]).unwrap()
    }

    /// Reads a new image on the first `nodes` nodes.
    fn read(&mut self, nodes: usize, order: Order, route: &Route) -> Cost {
        let image = self.image();
        let before = self.cluster.origin.sent().unwrap();
        let nodes = &self.cluster.nodes[..nodes];
        let times = match order {
            Order::InTurn => nodes
                .iter()
                .map(|node| start(node, &image, route))
                .collect(),
            Order::AtOnce => thread::scope(|scope| {
                let threads: Vec<_> = nodes
                    .iter()
                    .map(|node| scope.spawn(|| start(node, &image, route)))
                    .collect();
                threads.into_iter().map(|t| t.join().unwrap()).collect()
            }),
        };
        let origin = self.cluster.origin.sent().unwrap() - before;
        let cost = Cost { origin, times };
        let count = nodes.len();
        say(format_args!("{count} nodes {order:?} {route:?}: {cost:?}"));
        std::fs::remove_dir_all(&image.source).unwrap();
        cost
    }
}

/// Mounts the image from nothing and reads a third of it.
fn start(node: &Node, image: &Image, route: &Route) -> Duration {
    let began = Instant::now();
    let mounted = node.client.mount(image, route).unwrap();
    compare_all(&image.source, mounted.point());
    let took = began.elapsed();
    let count = |name| mounted.count(name).unwrap();
    say(format_args!(
        "  {} hedges, {} requests to agents, {} past them",
        count("backend_hedges_total"),
        count("backend_mirror_requests_total"),
        count("backend_fallbacks_total"),
    ));
    mounted.stop().unwrap();
    took
}

fn compare_all(source: &Path, mount: &Path) {
    compare(source, mount, 0..FILES).unwrap();
}

fn at_most(bytes: u64, percent: u64, of: u64) -> bool {
    bytes * 100 <= of * percent
}

#[track_caller]
fn expect_as_for_one(one: &Cost, many: &Cost) {
    assert!(
        at_most(many.origin, 115, one.origin),
        "many nodes cost the origin {many:?}, one node {one:?}"
    );
}

#[test]
fn four_nodes_cost_the_origin_what_one_does() {
    let _alone = alone();
    let options = Options {
        nodes: 4,
        seed: true,
        origin_mbit: MBIT,
        ..Options::default()
    };
    let cluster = Cluster::start(&options).unwrap();
    let mut stage = Stage { cluster, images: 0 };
    let (direct, ours) = (Route::Direct, Route::dragonfly());
    let payload = (FILES * SIZE) as u64;

    let one = stage.read(1, Order::InTurn, &direct);
    let four = stage.read(4, Order::AtOnce, &direct);
    // What the measure is worth: without peers each node costs as much as the first.
    assert!(one.origin >= payload, "{one:?}");
    assert!(four.origin >= 4 * payload, "{four:?}");

    let seed = stage.cluster.seed.as_ref().unwrap().machine().address();
    let seed = Route::Seed(format!("http://{seed}:{PROXY_PORT}"));
    for route in [&ours, &seed] {
        let one = stage.read(1, Order::InTurn, route);
        assert!(one.origin >= payload, "{one:?}");
        for nodes in [2, 4] {
            let many = stage.read(nodes, Order::InTurn, route);
            expect_as_for_one(&one, &many);
            let slower = many.times[1..].iter().filter(|time| **time > many.times[0]);
            assert_eq!(slower.count(), 0, "later nodes were slower: {many:?}");
            expect_as_for_one(&one, &stage.read(nodes, Order::AtOnce, route));
        }
    }

    // Beside it, for whoever reads the output: small ranges by-pass peers unless asked not to.
    stage.read(4, Order::AtOnce, &Route::dragonfly_as_is());
}
