//! Build script of every program here: passes the facts that `--version` prints to the
//! compiler.
//!
//! Nothing here may fail the build: a source tree without git compiles too, and then says
//! `unknown`, or what `NYDUS_GIT_COMMIT` says. The commit's time stands for the build
//! time, so that equal sources give equal programs.

use std::process::Command;

#[allow(
    clippy::print_stdout,
    reason = "this is how a build script talks to cargo"
)]
fn main() {
    let unknown = || "unknown".to_owned();
    let git = |arguments: &[&str]| output("git", arguments);
    println!("cargo::rerun-if-changed=../misc/build.rs");
    println!("cargo::rerun-if-env-changed=NYDUS_GIT_COMMIT");
    // Grows with every commit and checkout.
    if let Some(log) = git(&["rev-parse", "--git-path", "logs/HEAD"]) {
        println!("cargo::rerun-if-changed={log}");
    }
    let commit = std::env::var("NYDUS_GIT_COMMIT").ok();
    let commit = commit.or_else(|| git(&["rev-parse", "HEAD"]));
    let rustc = std::env::var("RUSTC").unwrap_or_else(|_| "rustc".to_owned());
    let facts = [
        ("COMMIT", commit),
        ("TIME", git(&["show", "-s", "--format=%cI", "HEAD"])),
        ("PROFILE", std::env::var("PROFILE").ok()),
        ("RUSTC", output(&rustc, &["--version"])),
    ];
    for (name, value) in facts {
        let value = value.unwrap_or_else(unknown);
        println!("cargo::rustc-env=NYDUS_BUILD_{name}={value}");
    }
}

/// First line that a command prints, if it succeeds.
fn output(program: &str, arguments: &[&str]) -> Option<String> {
    let out = Command::new(program).args(arguments).output().ok()?;
    let text = String::from_utf8(out.stdout).ok()?;
    let line = text.lines().next()?.trim();
    (out.status.success() && !line.is_empty()).then(|| line.to_owned())
}
