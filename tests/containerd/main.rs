//! The snapshotter on real parts: containerd, runc and a registry, each with its
//! state in a temporary directory.
//!
//! They need root, FUSE, overlayfs and the tools that `misc/install.sh` installs;
//! whatever is missing makes them fail and say so.
//!
//! - [`suite`]: what containerd's own tests demand of a snapshotter, over gRPC
//! - [`layers`]: changes of layers, seen through the mounts
//! - [`crash`]: the plugin killed at any moment, and its directory damaged
//! - [`pods`]: lazily started pods, as kubelet starts them, on a [`node`]
//! - [`shared`]: one daemon that serves all images, or one for each, and the change
//! - [`images`]: other ways in which images are made, and many pods of one
//! - [`mirrors`]: daemons read through the mirrors that containerd uses
//! - [`chaos`]: everything on the node dies, one after the other
//! - [`deaths`]: all processes of a daemon die at once, and containers read on
//! - [`system`]: what the plugin tells, and its daemons replaced while containers read
//! - [`wishes`]: what the plugin is told at run time

#![allow(
    clippy::unwrap_used,
    reason = "a test that cannot go on fails where it stands"
)]

mod chaos;
mod crash;
mod deaths;
#[path = "../bin/demo/image.rs"]
mod demo;
mod images;
mod layers;
mod mirrors;
mod node;
mod pods;
mod shared;
mod suite;
mod system;
mod wishes;

use std::path::{Path, PathBuf};

use support::plugin::{Client, Mounted, Plugin};
use tempfile::TempDir;

/// A plugin without containerd, and a place for mounts.
struct Bench {
    // Dropped first: the plugin waits for requests of its clients.
    client: Client,
    plugin: Plugin,
    // Dropped last: the others live in it.
    directory: TempDir,
}

impl Bench {
    fn new() -> Self {
        Self::configured("")
    }

    fn configured(configuration: &str) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let plugin = Plugin::start(directory.path(), configuration, &[]).unwrap();
        let client = plugin.client().unwrap();
        Self {
            plugin,
            client,
            directory,
        }
    }

    /// Mounts a snapshot somewhere.
    fn mount(&mut self, key: &str) -> Mounted {
        let mounts = self.client.mounts(key).unwrap();
        let point = self
            .directory
            .path()
            .join("points")
            .join(key.replace('/', "-"));
        Mounted::new(&mounts, &self.plugin.root(), &point).unwrap()
    }

    /// Adds the layer `name` on top of `parent`, with what `change` does to the
    /// mounted directory.
    fn layer(&mut self, name: &str, parent: &str, change: impl FnOnce(&Path)) {
        let key = format!("work-{name}");
        self.client.prepare(&key, parent, &[]).unwrap();
        let mounted = self.mount(&key);
        change(mounted.path());
        drop(mounted);
        self.client.commit(name, &key, &[]).unwrap();
    }

    /// A directory of this snapshot, by its mounts.
    fn upper(&mut self, key: &str) -> PathBuf {
        let mounts = self.client.mounts(key).unwrap();
        let mount = mounts.first().unwrap();
        let upper = mount
            .options
            .iter()
            .find_map(|option| option.strip_prefix("upperdir="));
        PathBuf::from(upper.unwrap_or(&mount.source))
    }
}
