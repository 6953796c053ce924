//! What a crash leaves in the cache directory: never a wrong byte.
//!
//! * `kill`: a process is killed between any two of its system calls ([`kill`]).
//! * `cuts`: the power goes, at random moments ([`cut`]). `CACHE_CUTS` says how often,
//!   10 times if it is not set; `make soak` sets 200.
//!
//! Needs root: it mounts file systems. Its own `main`, because the process that is
//! killed must be single-threaded and is this program once more.

#![allow(
    clippy::print_stdout,
    clippy::unwrap_used,
    reason = "a test program: it reports to the terminal, and a panic is how it fails"
)]

mod cut;
mod kill;
mod sample;

use std::time::Instant;

fn main() {
    let args: Vec<String> = std::env::args().skip(1).collect();
    if let [first, rest @ ..] = args.as_slice()
        && first == kill::CHILD
    {
        kill::child(rest);
        return;
    }
    // As other tests do: names that are given select.
    let names: Vec<&String> = args.iter().filter(|arg| !arg.starts_with('-')).collect();
    let tests: [(&str, fn()); 2] = [("kill", kill::run), ("cuts", cut::run)];
    for (name, test) in tests {
        if args.iter().any(|arg| arg == "--list") {
            println!("{name}: test");
        } else if names.is_empty() || names.iter().any(|wanted| name.contains(wanted.as_str())) {
            let start = Instant::now();
            test();
            println!(
                "test {name} ... ok ({:.1} s)",
                start.elapsed().as_secs_f64()
            );
        }
    }
}
