//! What Dragonfly makes of many nodes that start the same image: how long each takes, and
//! what the origin sends.
//!
//! - [`runs`]: the experiments
//! - [`report`]: the table, and the same as bars
//!
//! All machines are network namespaces of this one, so that only ratios within one run
//! mean anything: fifty daemons share its processors.

#[path = "../demo/image.rs"]
mod image;
mod report;
mod runs;

use std::fs;
use std::io::Write as _;
use std::path::PathBuf;
use std::thread;
use std::time::Duration;

use anyhow::{Result, ensure};
use clap::{Parser, ValueEnum};
use support::command::{interrupted, stop_on_signals};
use support::dragonfly::{Cluster, Options};

use runs::Bench;

/// Measure what peers bring to nodes that start the same image.
#[derive(Debug, Parser)]
struct Cli {
    /// What to measure; may be repeated
    #[arg(long = "part", value_enum, default_values_t = [Part::Start])]
    parts: Vec<Part>,

    /// Numbers of nodes that start the program
    #[arg(long, value_delimiter = ',', default_values_t = [1, 2, 4])]
    nodes: Vec<usize>,

    /// Numbers of daemons that start the program at once, on four nodes
    #[arg(long, value_delimiter = ',', default_values_t = [1, 5, 20, 50])]
    daemons: Vec<usize>,

    /// Numbers of daemons that read and compare a whole image, on four nodes
    #[arg(long, value_delimiter = ',', default_values_t = [1, 5])]
    readers: Vec<usize>,

    /// Size of that image, in MiB
    #[arg(long, default_value_t = 1024)]
    mib: usize,

    /// Largest number for which pulling and unpacking is measured, too
    #[arg(long, default_value_t = 5)]
    pulls: usize,

    /// What the origin can send, in Mbit/s
    #[arg(long, default_value_t = 100)]
    mbit: u32,

    /// Directory that keeps the image made from Debian packages
    #[arg(long, default_value = "out/demo")]
    directory: PathBuf,

    /// Draw the first part there
    #[arg(long)]
    svg: Option<PathBuf>,

    /// Measure nothing: say how to enter the machines of a cluster, and keep it running
    #[arg(long)]
    hold: bool,
}

/// An experiment.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Part {
    /// The program on several nodes, in turn and at once, by each route
    Start,
    /// The program in many daemons at once, against pulling and unpacking
    Daemons,
    /// A whole image read and compared, against pulling and unpacking
    Compare,
}

fn main() -> Result<()> {
    let cli = Cli::parse();
    stop_on_signals()?;
    ensure!(
        nix::unistd::geteuid().is_root(),
        "run it as root: it makes networks and mounts"
    );
    let most = cli.nodes.iter().copied().max().unwrap_or(0).max(4);
    let cluster = Cluster::start(&Options {
        nodes: most,
        seed: true,
        origin_mbit: cli.mbit,
        ..Options::default()
    })?;
    if cli.hold {
        return hold(&cluster);
    }
    image::find_or_make(&cli.directory)?;
    let mut bench = Bench::new(&cluster, &cli.directory)?;
    let mut rows = Vec::new();
    for part in &cli.parts {
        match part {
            Part::Start => bench.starts(&cli.nodes, &mut rows)?,
            Part::Daemons => bench.daemons(&cli.daemons, cli.pulls, &mut rows)?,
            Part::Compare => bench.compare(&cli.readers, cli.mib, cli.pulls, &mut rows)?,
        }
    }
    let table = report::table(&rows, cli.mbit)?;
    std::io::stdout().write_all(table.as_bytes())?;
    if let Some(file) = &cli.svg {
        fs::write(file, report::bars(&rows, cli.mbit)?)?;
    }
    Ok(())
}

/// Says where the machines are until a signal comes.
fn hold(cluster: &Cluster) -> Result<()> {
    let mut out = std::io::stdout();
    writeln!(out, "registry   {}", cluster.registry.host())?;
    writeln!(out, "scheduler  {}", cluster.scheduler.address())?;
    if let Some(seed) = &cluster.seed {
        writeln!(out, "seed       nsenter --net={}", seed.machine().path())?;
    }
    for node in &cluster.nodes {
        writeln!(
            out,
            "node       nsenter --net={}",
            node.agent.machine().path()
        )?;
    }
    writeln!(out, "origin     nsenter --net={}", cluster.origin.path())?;
    while !interrupted() {
        thread::sleep(Duration::from_millis(100));
    }
    Ok(())
}
