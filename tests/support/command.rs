//! Runs a program to its end and keeps what it said.

use std::ffi::OsStr;
use std::fs::File;
use std::io::{Read, Seek};
use std::os::unix::process::CommandExt as _;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use nix::sys::signal::{Signal, killpg};
use signal_hook::consts::{SIGINT, SIGTERM};

use crate::process::pid_of;

/// Longer than any single step of a test takes on a slow machine.
const DEADLINE: Duration = Duration::from_secs(300);

/// How long a program may take to end after it was asked to.
const PATIENCE: Duration = Duration::from_secs(10);

/// Set by the signals that [`stop_on_signals`] takes over. A signal handler can
/// reach nothing but a static.
static INTERRUPTED: OnceLock<Arc<AtomicBool>> = OnceLock::new();

/// From now on SIGINT and SIGTERM end running commands with an error, so that the
/// program unwinds and its guards clean up. For programs, not for tests.
///
/// # Errors
/// The system refuses the handlers.
pub fn stop_on_signals() -> Result<()> {
    let flag = INTERRUPTED.get_or_init(Arc::default);
    for signal in [SIGINT, SIGTERM] {
        signal_hook::flag::register(signal, Arc::clone(flag))?;
    }
    Ok(())
}

/// Whether one of those signals has come.
#[must_use]
pub fn interrupted() -> bool {
    INTERRUPTED
        .get()
        .is_some_and(|flag| flag.load(Ordering::Relaxed))
}

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

/// Runs `command` without standard input.
///
/// # Errors
/// It cannot be started, with what to install; or it does not end within five
/// minutes, in which case it is ended with its children.
pub fn run(command: &mut Command) -> Result<Finished> {
    run_within(command, Stdio::null(), DEADLINE)
}

/// [`run`] with the given standard input and deadline.
///
/// # Errors
/// As [`run`].
pub fn run_within(command: &mut Command, stdin: Stdio, deadline: Duration) -> Result<Finished> {
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
    let status = match wait(&mut child, deadline, interrupted)? {
        Some(status) => status,
        None => {
            end_group(&mut child)?;
            let reason = if interrupted() {
                "was interrupted"
            } else {
                "took too long"
            };
            bail!(
                "{command:?} {reason}; its standard error:\n{}",
                read_all(&mut stderr)?
            );
        }
    };
    Ok(Finished {
        status,
        stdout: read_all(&mut stdout)?,
        stderr: read_all(&mut stderr)?,
    })
}

/// Waits for the end of `child`; `None` if `give_up` says so or the deadline passes.
fn wait(
    child: &mut Child,
    deadline: Duration,
    give_up: impl Fn() -> bool,
) -> Result<Option<ExitStatus>> {
    let began = Instant::now();
    while began.elapsed() < deadline && !give_up() {
        if let Some(status) = child.try_wait()? {
            return Ok(Some(status));
        }
        thread::sleep(Duration::from_millis(2));
    }
    Ok(child.try_wait()?)
}

/// Ends a program and its children: politely, then not.
fn end_group(child: &mut Child) -> Result<()> {
    let group = pid_of(child)?;
    killpg(group, Signal::SIGTERM)?;
    if wait(child, PATIENCE, || false)?.is_none() {
        killpg(group, Signal::SIGKILL)?;
        child.wait()?;
    }
    Ok(())
}

/// [`run`], where anything but success is an error that carries standard error.
///
/// # Errors
/// As [`run`]; or the program failed.
pub fn succeed(command: &mut Command) -> Result<Finished> {
    succeed_within(command, DEADLINE)
}

/// [`succeed`] with another deadline.
///
/// # Errors
/// As [`succeed`].
pub fn succeed_within(command: &mut Command, deadline: Duration) -> Result<Finished> {
    let finished = run_within(command, Stdio::null(), deadline)?;
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
