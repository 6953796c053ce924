//! Mirrors that are no Dragonfly serve with the same configuration.

use std::sync::Arc;

use support::dragonfly::node::{Client, Image, Route};
use support::netns::{Machine, Network};
use support::proxy::{Fault, Proxy};
use support::registry::Registry;

use crate::alone;
use crate::content::{Tree, compare};

const FILES: usize = 12;
const SIZE: usize = 512 << 10;

/// A registry on a machine of its own, and a machine that reads from it.
struct Stage {
    scratch: tempfile::TempDir,
    network: Network,
    client: Client,
    registry: Registry,
    origin: Arc<Machine>,
}

impl Stage {
    fn new() -> Self {
        let scratch = tempfile::tempdir().unwrap();
        let mut network = Network::new().unwrap();
        let origin = Arc::new(network.machine().unwrap());
        let reader = Arc::new(network.machine().unwrap());
        Self {
            client: Client::new(reader, scratch.path().join("reader")).unwrap(),
            registry: Registry::start_on(&origin, None).unwrap(),
            scratch,
            network,
            origin,
        }
    }

    fn image(&self, name: &str, seed: usize) -> Image {
        let tree = Tree::new(self.scratch.path().join(name), FILES, SIZE, seed);
        let scratch = self.scratch.path();
        Image::publish(&self.registry, scratch, name, &tree.root, &[]).unwrap()
    }

    /// Reads all of an image from nothing; bytes that the origin sent meanwhile.
    fn read(&self, image: &Image, mirror: &str) -> u64 {
        let before = self.origin.sent().unwrap();
        let route = Route::Mirror(mirror.to_owned());
        let mounted = self.client.mount(image, &route).unwrap();
        compare(&image.source, mounted.point(), 0..FILES).unwrap();
        mounted.stop().unwrap();
        self.origin.sent().unwrap() - before
    }
}

/// A small part of an image: what requests without content cost.
fn next_to_nothing(image: &Image) -> u64 {
    image.size / 20
}

#[test]
fn a_mirror_that_has_some_blobs_and_not_others() {
    let _alone = alone();
    let mut stage = Stage::new();
    let (held, missing) = (stage.image("held", 1), stage.image("missing", 2));
    // A node's store of whole blobs: it has some, and says at once if it does not.
    let machine = Arc::new(stage.network.machine().unwrap());
    let store = Registry::start_on(&machine, None).unwrap();
    let blob = stage.registry.blob_file(&held.digest).unwrap();
    store.push_blob("p2p/held", &blob).unwrap();
    let upstream = store.host().to_owned();
    let proxy = machine.inside(|| Proxy::start_at(machine.address(), &upstream));
    let proxy = proxy.unwrap().unwrap();
    proxy.fail(&missing.digest, Fault::Status(404, Vec::new()));
    let url = format!("http://{}", proxy.host());

    let sent = stage.read(&held, &url);
    assert!(
        sent < next_to_nothing(&held),
        "the origin sent {sent} bytes"
    );
    let sent = stage.read(&missing, &url);
    assert!(sent >= missing.size, "the origin sent only {sent} bytes");
    let asked = |image: &Image| {
        let path = image.path();
        let requests = proxy.requests();
        requests.iter().filter(|head| head.target == path).count()
    };
    assert!(asked(&held) > 0 && asked(&missing) > 0);
    // What it does not have is no reason to leave it alone.
    let sent = stage.read(&held, &url);
    assert!(
        sent < next_to_nothing(&held),
        "the origin sent {sent} bytes"
    );
}

#[test]
fn a_registry_that_pulls_through() {
    let _alone = alone();
    let mut stage = Stage::new();
    let image = stage.image("pulled", 3);
    let machine = Arc::new(stage.network.machine().unwrap());
    let remote = format!("http://{}", stage.registry.host());
    let cache = Registry::start_on(&machine, Some(&remote)).unwrap();
    let url = format!("http://{}", cache.host());

    // It fetches a blob whole, once, while readers get theirs from either.
    let sent = stage.read(&image, &url);
    assert!(sent >= image.size, "the origin sent only {sent} bytes");
    // It keeps what it has fetched.
    let began = std::time::Instant::now();
    while cache.blob_file(&image.digest).is_err() {
        assert!(began.elapsed().as_secs() < 60, "{}", cache.log());
        std::thread::sleep(std::time::Duration::from_millis(50));
    }
    let sent = stage.read(&image, &url);
    assert!(
        sent < next_to_nothing(&image),
        "the origin sent {sent} bytes"
    );
}
