//! Runs a program to its end and keeps what it said.

use std::ffi::OsStr;
use std::fs::File;
use std::io::{Read, Seek};
use std::os::unix::process::CommandExt as _;
use std::process::{Command, ExitStatus, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use nix::sys::signal::{Signal, killpg};

use crate::process::pid_of;

/// Longer than any single step takes on a slow machine; shorter than a job's patience.
const DEADLINE: Duration = Duration::from_secs(300);

/// What a program that came to its end left behind.
#[derive(Debug)]
pub struct Finished {
    /// How it ended.
    pub status: ExitStatus,
    /// Its standard output.
    pub stdout: String,
    /// Its standard error.
    pub stderr: String,
}

impl Finished {
    /// The exit code; -1 if a signal ended the program.
    #[must_use]
    pub fn code(&self) -> i32 {
        self.status.code().unwrap_or(-1)
    }
}

/// Runs `command` without standard input, unless the caller has set one.
///
/// # Errors
/// It cannot be started, with what to install; or it does not end within five
/// minutes, in which case it is killed with its children.
pub fn run(command: &mut Command) -> Result<Finished> {
    run_with(command, Stdio::null())
}

/// [`run`] with the given standard input.
///
/// # Errors
/// As [`run`].
pub fn run_with(command: &mut Command, stdin: Stdio) -> Result<Finished> {
    // Files rather than pipes: nothing to drain, so nothing to block on.
    let mut stdout = tempfile::tempfile().context("cannot make a temporary file")?;
    let mut stderr = tempfile::tempfile().context("cannot make a temporary file")?;
    command
        .stdin(stdin)
        .stdout(stdout.try_clone()?)
        .stderr(stderr.try_clone()?);
    command.process_group(0);
    let mut child = command
        .spawn()
        .with_context(|| cannot_start(command.get_program()))?;
    let began = Instant::now();
    let status = loop {
        if let Some(status) = child.try_wait()? {
            break status;
        }
        if began.elapsed() > DEADLINE {
            killpg(pid_of(&child)?, Signal::SIGKILL)?;
            child.wait()?;
            bail!(
                "{command:?} ran for {DEADLINE:?}; stderr: {}",
                read_all(&mut stderr)?
            );
        }
        thread::sleep(Duration::from_millis(2));
    };
    Ok(Finished {
        status,
        stdout: read_all(&mut stdout)?,
        stderr: read_all(&mut stderr)?,
    })
}

/// [`run`], where anything but success is an error that carries standard error.
///
/// # Errors
/// As [`run`]; or the program failed.
pub fn succeed(command: &mut Command) -> Result<Finished> {
    let finished = run(command)?;
    ensure!(
        finished.status.success(),
        "{command:?} ended with {}\n{}{}",
        finished.status,
        finished.stdout,
        finished.stderr
    );
    Ok(finished)
}

/// The error text for a tool that is not there.
pub(crate) fn cannot_start(program: &OsStr) -> String {
    format!(
        "cannot start {}: run misc/install.sh, or look there for its package",
        program.display()
    )
}

fn read_all(file: &mut File) -> Result<String> {
    let mut bytes = Vec::new();
    file.rewind()?;
    file.read_to_end(&mut bytes)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn output_and_status_are_kept() {
        let finished =
            run(Command::new("sh").args(["-c", "echo out; echo err >&2; exit 3"])).unwrap();
        assert_eq!(finished.code(), 3);
        assert_eq!(
            (finished.stdout.as_str(), finished.stderr.as_str()),
            ("out\n", "err\n")
        );
    }

    #[test]
    fn failure_carries_standard_error() {
        let error = succeed(Command::new("sh").args(["-c", "echo reason >&2; false"])).unwrap_err();
        assert!(error.to_string().contains("reason"), "{error}");
    }

    #[test]
    fn a_missing_tool_says_what_to_do() {
        let error = run(&mut Command::new("no-such-tool")).unwrap_err();
        assert!(error.to_string().contains("misc/install.sh"), "{error}");
    }
}
