//! The experiments: images that nobody has yet, started on nodes in turn and at once.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use support::command::{interrupted, succeed};
use support::dragonfly::Cluster;
use support::dragonfly::node::{Image, Node, Route};
use support::image::layer::write_tree;
use support::image::layout;
use support::tree::nasty::noise;
use support::tree::{Detail, describe, difference};

/// What is run in the image.
const PROGRAM: &str = "import json,ssl,sqlite3,http.server,asyncio,xml.dom.minidom,decimal";

/// How an image gets to a node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Way {
    /// Downloaded whole and unpacked.
    Pull,
    /// Lazily, from the registry.
    Direct,
    /// Lazily, through the agent with what makes ranges travel from peer to peer.
    Dragonfly,
    /// Lazily, through the agent with nothing but the registry's name.
    AsIs,
}

impl Way {
    pub(crate) fn label(self) -> &'static str {
        match self {
            Self::Pull => "pull and unpack",
            Self::Direct => "direct",
            Self::Dragonfly => "Dragonfly",
            Self::AsIs => "Dragonfly, default headers",
        }
    }

    fn route(self) -> Result<Route> {
        match self {
            Self::Pull => anyhow::bail!("nothing is mounted"),
            Self::Direct => Ok(Route::Direct),
            Self::Dragonfly => Ok(Route::dragonfly()),
            Self::AsIs => Ok(Route::dragonfly_as_is()),
        }
    }
}

/// What was done, and what it cost.
#[derive(Clone, Debug)]
pub(crate) struct Row {
    pub what: &'static str,
    pub way: Way,
    pub count: usize,
    pub at_once: bool,
    /// Of each, from nothing to its end, shortest first.
    pub times: Vec<Duration>,
    /// Until the last one had ended.
    pub whole: Duration,
    /// Bytes that left the origin.
    pub origin: u64,
}

pub(crate) struct Bench<'c> {
    cluster: &'c Cluster,
    /// The tree of the demo with a file that differs each time.
    tree: PathBuf,
    images: u32,
}

/// What is done with an image, by which way it comes.
#[derive(Clone, Copy)]
enum Work {
    Run,
    Compare,
}

impl<'c> Bench<'c> {
    pub(crate) fn new(cluster: &'c Cluster, demo: &Path) -> Result<Self> {
        let scratch = tempfile::tempdir_in(demo)?.keep();
        let tree = scratch.join("tree");
        let mut copy = Command::new("cp");
        // Links instead of bytes: same file system.
        succeed(copy.arg("-al").arg(demo.join("root")).arg(&tree))?;
        Ok(Self {
            cluster,
            tree,
            images: 0,
        })
    }

    /// The demo's image, with a blob that no agent has seen.
    fn demo(&mut self) -> Result<Image> {
        self.images += 1;
        fs::write(self.tree.join("salt"), self.images.to_string())?;
        let name = format!("demo-{}", self.images);
        let arguments = ["--batch-size", "0x20000"];
        self.cluster.publish(&name, &self.tree, &arguments)
    }

    /// The program on so many nodes, in turn and at once, by each way.
    pub(crate) fn starts(&mut self, nodes: &[usize], rows: &mut Vec<Row>) -> Result<()> {
        for way in [Way::Direct, Way::Dragonfly, Way::AsIs] {
            for &count in nodes {
                for at_once in [false, true] {
                    if count == 1 && at_once {
                        continue;
                    }
                    let image = self.demo()?;
                    let row = self.measure("start", &image, way, count, at_once, Work::Run)?;
                    rows.push(row);
                }
            }
        }
        Ok(())
    }

    /// The program in so many daemons at once.
    pub(crate) fn daemons(
        &mut self,
        counts: &[usize],
        pulls: usize,
        rows: &mut Vec<Row>,
    ) -> Result<()> {
        let tree = self.tree.clone();
        let archive = self.push_archive("demo", &tree)?;
        for &count in counts {
            if count <= pulls {
                rows.push(self.pull("start", &archive, &tree, count, Work::Run)?);
            }
            for way in [Way::Direct, Way::Dragonfly] {
                let image = self.demo()?;
                rows.push(self.measure("start", &image, way, count, true, Work::Run)?);
            }
        }
        Ok(())
    }

    /// All of a big image, read and compared by so many daemons at once.
    pub(crate) fn compare(
        &mut self,
        counts: &[usize],
        mib: usize,
        pulls: usize,
        rows: &mut Vec<Row>,
    ) -> Result<()> {
        const FILE: usize = 4 << 20;
        for (turn, &count) in counts.iter().enumerate() {
            for way in [Way::Pull, Way::Direct, Way::Dragonfly] {
                if way == Way::Pull && count > pulls {
                    continue;
                }
                self.images += 1;
                let name = format!("big-{}", self.images);
                let tree = self.cluster.path(&name);
                fs::create_dir(&tree)?;
                for number in 0..(mib << 20) / FILE {
                    let seed = (turn << 32) + (number << 8) + way as usize + 1;
                    fs::write(tree.join(format!("{number:04}")), noise(FILE, seed << 20))?;
                }
                if way == Way::Pull {
                    let archive = self.push_archive(&name, &tree)?;
                    rows.push(self.pull("compare", &archive, &tree, count, Work::Compare)?);
                } else {
                    let image = self.cluster.publish(&name, &tree, &[])?;
                    let row = self.measure("compare", &image, way, count, true, Work::Compare)?;
                    rows.push(row);
                }
                fs::remove_dir_all(tree)?;
            }
        }
        Ok(())
    }

    /// A tree as one tar.gz in the registry; its URL.
    fn push_archive(&self, name: &str, tree: &Path) -> Result<String> {
        let (tar, at) = (
            self.cluster.path(&format!("{name}.tar")),
            self.cluster.path(&format!("{name}.layout")),
        );
        write_tree(tree, &tar)?;
        layout::write(&at, "whole", &[layout::Image::new(&[&tar])])?;
        fs::remove_file(tar)?;
        let repository = format!("whole/{name}");
        let registry = &self.cluster.registry;
        registry.push(&at, "whole", &format!("{repository}:whole"))?;
        fs::remove_dir_all(at)?;
        let manifest = registry.manifest_json(&format!("{repository}:whole"))?;
        let digest = manifest["layers"][0]["digest"].as_str();
        let digest = digest.context("no layer")?;
        Ok(format!(
            "http://{}/v2/{repository}/blobs/{digest}",
            registry.host()
        ))
    }

    fn measure(
        &self,
        what: &'static str,
        image: &Image,
        way: Way,
        count: usize,
        at_once: bool,
        work: Work,
    ) -> Result<Row> {
        let route = way.route()?;
        let one = |number: usize| -> Result<Duration> {
            let node = self.node(number)?;
            let began = Instant::now();
            let mounted = node.client.mount(image, &route)?;
            work.of(mounted.point(), &image.source)?;
            let took = began.elapsed();
            mounted.stop()?;
            Ok(took)
        };
        self.all(what, way, count, at_once, &one)
    }

    fn pull(
        &self,
        what: &'static str,
        url: &str,
        tree: &Path,
        count: usize,
        work: Work,
    ) -> Result<Row> {
        let one = |number: usize| -> Result<Duration> {
            let root = self.cluster.path(&format!("root-{number}"));
            fs::create_dir(&root)?;
            let began = Instant::now();
            let mut curl = self.node(number)?.agent.machine().command("curl");
            let mut curl = curl.args(["-sSf", url]).stdout(Stdio::piped()).spawn()?;
            let tar = Command::new("tar")
                .args(["-xz", "--numeric-owner", "-C"])
                .arg(&root)
                .stdin(curl.stdout.take().context("no pipe")?)
                .status();
            ensure!(curl.wait()?.success() && tar?.success(), "download failed");
            work.of(&root, tree)?;
            let took = began.elapsed();
            fs::remove_dir_all(root)?;
            Ok(took)
        };
        self.all(what, Way::Pull, count, true, &one)
    }

    fn node(&self, number: usize) -> Result<&Node> {
        let nodes = &self.cluster.nodes;
        nodes.get(number % nodes.len()).context("no nodes")
    }

    /// Does `one` so many times, in turn or at once.
    fn all(
        &self,
        what: &'static str,
        way: Way,
        count: usize,
        at_once: bool,
        one: &(impl Fn(usize) -> Result<Duration> + Sync),
    ) -> Result<Row> {
        ensure!(!interrupted(), "interrupted");
        let before = self.cluster.origin.sent()?;
        let began = Instant::now();
        let times: Result<Vec<_>> = if at_once {
            thread::scope(|scope| {
                let threads: Vec<_> = (0..count).map(|n| scope.spawn(move || one(n))).collect();
                let joined = threads.into_iter().map(|thread| {
                    thread
                        .join()
                        .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
                });
                joined.collect()
            })
        } else {
            (0..count).map(one).collect()
        };
        let whole = began.elapsed();
        let mut times = times?;
        times.sort();
        Ok(Row {
            what,
            way,
            count,
            at_once,
            times,
            whole,
            origin: self.cluster.origin.sent()? - before,
        })
    }
}

impl Drop for Bench<'_> {
    fn drop(&mut self) {
        if let Some(scratch) = self.tree.parent() {
            // The next run makes another one.
            let _ = fs::remove_dir_all(scratch);
        }
    }
}

impl Work {
    fn of(self, root: &Path, source: &Path) -> Result<()> {
        match self {
            Self::Run => {
                let mut program = Command::new("chroot");
                program.arg(root).args(["/usr/bin/python3", "-c", PROGRAM]);
                succeed(program.env("PYTHONDONTWRITEBYTECODE", "1"))?;
            }
            Self::Compare => {
                let wanted = describe(source, Detail::WithoutTimes)?;
                let got = describe(root, Detail::WithoutTimes)?;
                let difference = difference(&wanted, &got);
                ensure!(difference.is_none(), "wrong bytes: {difference:?}");
            }
        }
        Ok(())
    }
}
