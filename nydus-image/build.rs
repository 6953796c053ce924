//! Passes the facts that `--version` prints to the compiler: commit, its time, profile, rustc.
//!
//! The commit's time stands for the build time, so that equal sources give equal
//! binaries. Without git (a source archive) both are `unknown`.

use std::process::Command;

fn main() {
    // Grows with every commit and checkout.
    println!(
        "cargo::rerun-if-changed={}",
        output("git", &["rev-parse", "--git-path", "logs/HEAD"])
    );
    println!("cargo::rerun-if-changed=build.rs");
    let commit = output("git", &["rev-parse", "HEAD"]);
    let time = output("git", &["show", "-s", "--format=%cI", "HEAD"]);
    let rustc = std::env::var("RUSTC").unwrap_or_else(|_| "rustc".to_owned());
    println!("cargo::rustc-env=NYDUS_GIT_COMMIT={commit}");
    println!("cargo::rustc-env=NYDUS_BUILD_TIME={time}");
    println!(
        "cargo::rustc-env=NYDUS_RUSTC={}",
        output(&rustc, &["--version"])
    );
    let profile = std::env::var("PROFILE").unwrap_or_else(|_| "unknown".to_owned());
    println!("cargo::rustc-env=NYDUS_PROFILE={profile}");
}

/// First line that `program` prints; `unknown` if it cannot be run or fails.
fn output(program: &str, args: &[&str]) -> String {
    Command::new(program)
        .args(args)
        .output()
        .ok()
        .filter(|output| output.status.success())
        .and_then(|output| {
            let text = String::from_utf8(output.stdout).ok()?;
            text.lines().next().map(str::to_owned)
        })
        .unwrap_or_else(|| "unknown".to_owned())
}
