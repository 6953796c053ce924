//! x
use anyhow::Result;
use clap::Parser;
use std::fs;
use std::io::Write as _;
use support::dragonfly::{Cluster, Options};

/// Measure starts of a program through a Dragonfly cluster.
#[derive(Debug, Parser)]
struct Cli {
    #[arg(long, default_value_t = 2)]
    nodes: usize,
    #[arg(long)]
    seed: bool,
    #[arg(long, default_value_t = 100)]
    mbit: u32,
}

fn main() -> Result<()> {
    let cli = Cli::parse();
    support::command::stop_on_signals()?;
    let began = std::time::Instant::now();
    let cluster = Cluster::start(&Options {
        nodes: cli.nodes,
        seed: cli.seed,
        origin_mbit: cli.mbit,
        ..Options::default()
    })?;
    let mut out = std::io::stdout();
    writeln!(out, "started in {:?}", began.elapsed())?;
    let dir = cluster.path("tree");
    for n in 0..10 {
        let _ = fs::remove_dir_all(&dir);
        fs::create_dir_all(&dir)?;
        fs::write(
            dir.join("data"),
            support::tree::nasty::noise(64 << 20, 77 + n),
        )?;
        let image = cluster.publish(&format!("i{n}"), &dir, &[])?;
        writeln!(out, "image {n} {} {}", image.path(), image.size)?;
    }
    writeln!(
        out,
        "origin {} {}",
        cluster.registry.host(),
        cluster.origin.path()
    )?;
    writeln!(out, "scheduler {}", cluster.scheduler.address())?;
    for (n, node) in cluster.nodes.iter().enumerate() {
        writeln!(out, "node {n} {}", node.agent.machine().path())?;
    }
    if let Some(seed) = &cluster.seed {
        writeln!(out, "seed {}", seed.machine().path())?;
    }
    while !support::command::interrupted() {
        std::thread::sleep(std::time::Duration::from_millis(100));
    }
    Ok(())
}
