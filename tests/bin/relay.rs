//! A slower, longer link in front of a server, for trying things out by hand.
//!
//! `relay --to 127.0.0.1:5000 --mbit 100 --rtt-ms 20` prints the address to use instead.

use std::io::Write as _;
use std::net::{SocketAddr, ToSocketAddrs as _};
use std::time::Duration;

use anyhow::{Context as _, Result};
use clap::Parser;
use support::relay::{Link, Relay};

/// Relay TCP connections over a link of a given rate and length.
#[derive(Debug, Parser)]
struct Cli {
    /// Server to forward to, as HOST:PORT
    #[arg(long)]
    to: String,

    /// Address to listen on; port 0 picks one
    #[arg(long, default_value = "127.0.0.1:0")]
    listen: SocketAddr,

    /// Rate in each direction, in Mbit/s; 0 for no limit
    #[arg(long, default_value_t = 100)]
    mbit: u64,

    /// Round trip time, in milliseconds
    #[arg(long, default_value_t = 20)]
    rtt_ms: u64,
}

fn main() -> Result<()> {
    let cli = Cli::parse();
    let upstream = cli
        .to
        .to_socket_addrs()
        .with_context(|| format!("--to {}", cli.to))?
        .next()
        .with_context(|| format!("--to {}: no such host", cli.to))?;
    let link = Link {
        rate: cli.mbit.saturating_mul(1_000_000),
        round_trip: Duration::from_millis(cli.rtt_ms),
    };
    let relay = Relay::start(cli.listen, upstream, link)?;
    writeln!(std::io::stdout(), "{}", relay.address())?;
    loop {
        std::thread::park();
    }
}
