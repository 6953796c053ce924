//! Where our programs are.
//!
//! Cargo builds the programs of a package for that package's own tests only, so
//! this module has cargo build ours once per test run: a test never meets a stale
//! program. `NYDUS_BIN_DIR` names a directory to take them from instead.

use std::env;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

use anyhow::{Context as _, Result, anyhow, ensure};

/// A command that runs `nydusd`.
///
/// # Errors
/// The program does not build.
pub fn nydusd() -> Result<Command> {
    command("nydusd")
}

/// A command that runs `nydus-image`.
///
/// # Errors
/// The program does not build.
pub fn nydus_image() -> Result<Command> {
    command("nydus-image")
}

/// A command that runs `nydus-snapshotter`.
///
/// # Errors
/// The program does not build.
pub fn nydus_snapshotter() -> Result<Command> {
    command("nydus-snapshotter")
}

/// Where `nydusd` is.
///
/// # Errors
/// The program does not build.
pub fn nydusd_path() -> Result<PathBuf> {
    Ok(directory()?.join("nydusd"))
}

fn command(name: &str) -> Result<Command> {
    let mut command = Command::new(directory()?.join(name));
    // Errors are judged as a user sees them.
    command.env_remove("RUST_BACKTRACE");
    Ok(command)
}

/// The directory of the programs, built on the first call.
fn directory() -> Result<&'static Path> {
    static DIRECTORY: OnceLock<Result<PathBuf, String>> = OnceLock::new();
    DIRECTORY
        .get_or_init(|| locate().map_err(|error| format!("{error:#}")))
        .as_deref()
        .map_err(|error| anyhow!("{error}"))
}

fn locate() -> Result<PathBuf> {
    if let Some(directory) = env::var_os("NYDUS_BIN_DIR") {
        return Ok(directory.into());
    }
    let directory = profile_directory()?;
    let mut build = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    build.args([
        "build",
        "--quiet",
        "--locked",
        "-p",
        "nydusd",
        "-p",
        "nydus-image",
        "-p",
        "snapshotter",
    ]);
    build.current_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/.."));
    if directory.ends_with("release") {
        build.arg("--release");
    }
    let status = build.status().context("cannot run cargo")?;
    ensure!(
        status.success(),
        "nydusd, nydus-image and nydus-snapshotter do not build: {status}"
    );
    Ok(directory)
}

/// `target/debug` or `target/release`: where this very program was built.
fn profile_directory() -> Result<PathBuf> {
    let program = env::current_exe().context("cannot find the running program")?;
    let mut directory = program
        .parent()
        .context("the running program has no directory")?;
    if directory.ends_with("deps") {
        directory = directory.parent().context("`deps` has no parent")?;
    }
    Ok(directory.to_owned())
}
