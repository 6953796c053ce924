//! A program that runs in the background and is stopped with its owner.
//!
//! The program gets a process group of its own, so that it and its children can
//! be addressed by id, and is told to end if the test program dies first.

use std::fs::{self, File};
use std::os::unix::process::{CommandExt as _, ExitStatusExt as _};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use nix::sys::prctl;
use nix::sys::signal::{Signal, kill, killpg};
use nix::unistd::Pid;

use crate::command::cannot_start;

/// How long a program may take to end after SIGTERM.
const PATIENCE: Duration = Duration::from_secs(15);
/// How often it is looked whether it has ended.
const LOOK: Duration = Duration::from_millis(5);

/// A running program and the file that its output goes to.
#[derive(Debug)]
pub struct Process {
    name: String,
    child: Child,
    log: PathBuf,
}

impl Process {
    /// Starts `command`, with both outputs going to the file `log`.
    ///
    /// # Errors
    /// The log cannot be made, or the program cannot be started.
    pub fn start(command: &mut Command, log: &Path) -> Result<Self> {
        let name = command.get_program().display().to_string();
        let output = File::create(log).with_context(|| format!("cannot make {}", log.display()))?;
        command
            .stdin(Stdio::null())
            .stdout(output.try_clone()?)
            .stderr(output);
        command.process_group(0);
        // SAFETY: between fork and exec only the async-signal-safe prctl system call is made.
        unsafe {
            command.pre_exec(|| Ok(prctl::set_pdeathsig(Signal::SIGTERM)?));
        }
        let child = command
            .spawn()
            .with_context(|| cannot_start(command.get_program()))?;
        Ok(Self {
            name,
            child,
            log: log.to_owned(),
        })
    }

    /// Everything that the program wrote so far.
    #[must_use]
    pub fn log(&self) -> String {
        fs::read(&self.log)
            .map(|b| String::from_utf8_lossy(&b).into_owned())
            .unwrap_or_default()
    }

    /// Its process id.
    #[must_use]
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// Sends `signal` to the program alone.
    ///
    /// # Errors
    /// It is gone already.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        kill(pid_of(&self.child)?, signal).with_context(|| format!("cannot signal {}", self.name))
    }

    /// Kills the program and everything it has started, at once, and waits for it.
    ///
    /// # Errors
    /// It is gone already.
    pub fn kill_group(&mut self) -> Result<()> {
        killpg(pid_of(&self.child)?, Signal::SIGKILL)
            .with_context(|| format!("cannot kill {}", self.name))?;
        self.child.wait()?;
        Ok(())
    }

    /// How it ended, if it did.
    ///
    /// # Errors
    /// The system does not tell.
    pub fn ended(&mut self) -> Result<Option<ExitStatus>> {
        Ok(self.child.try_wait()?)
    }

    /// Waits until the program ends by itself.
    ///
    /// # Errors
    /// It still runs after 15 seconds; it goes on running.
    pub fn wait(&mut self) -> Result<ExitStatus> {
        self.wait_for_end(|_| false)?;
        Ok(self.child.wait()?)
    }

    /// Waits until the program ends, or `refused` says that it will not.
    ///
    /// # Errors
    /// Neither happens for 15 seconds.
    pub(crate) fn wait_for_end(&mut self, mut refused: impl FnMut(&Self) -> bool) -> Result<()> {
        // Counted in looks: a machine that stands still for a while takes none.
        for _ in 0..PATIENCE.as_millis() / LOOK.as_millis() {
            if self.ended()?.is_some() || refused(self) {
                return Ok(());
            }
            thread::sleep(LOOK);
        }
        bail!(
            "{} still runs after {PATIENCE:?}; its log:\n{}",
            self.name,
            self.log()
        );
    }

    /// Waits until `ready` says yes.
    ///
    /// # Errors
    /// The program ends first, or a minute passes; with the log in both cases.
    pub fn wait_until(&mut self, mut ready: impl FnMut(&Self) -> bool) -> Result<()> {
        let began = Instant::now();
        while !ready(self) {
            if let Some(status) = self.ended()? {
                bail!(
                    "{} ended with {}; its log:\n{}",
                    self.name,
                    code(status),
                    self.log()
                );
            }
            if began.elapsed() > Duration::from_secs(60) {
                bail!(
                    "{} is not ready after a minute; its log:\n{}",
                    self.name,
                    self.log()
                );
            }
            thread::sleep(Duration::from_millis(2));
        }
        Ok(())
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if matches!(self.child.try_wait(), Ok(Some(_))) {
            return;
        }
        let Ok(group) = pid_of(&self.child) else {
            return;
        };
        let asked = killpg(group, Signal::SIGTERM).is_ok();
        if !asked || self.wait().is_err() {
            // Nothing can be reported from here; what is left is to insist.
            let _ = killpg(group, Signal::SIGKILL);
            let _ = self.child.wait();
        }
    }
}

/// The process id in the type that signals want.
pub(crate) fn pid_of(child: &Child) -> Result<Pid> {
    Ok(Pid::from_raw(
        i32::try_from(child.id()).context("process id beyond i32")?,
    ))
}

fn code(status: ExitStatus) -> String {
    match (status.code(), status.signal()) {
        (Some(code), _) => format!("exit code {code}"),
        (None, signal) => format!("signal {}", signal.unwrap_or_default()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dropping_ends_the_whole_group() {
        let directory = tempfile::tempdir().unwrap();
        let log = directory.path().join("log");
        let mut process = Process::start(
            Command::new("sh").args(["-c", "sleep 600 & echo $!; wait"]),
            &log,
        )
        .unwrap();
        process
            .wait_until(|process| process.log().ends_with('\n'))
            .unwrap();
        let child: i32 = process.log().trim().parse().unwrap();
        drop(process);
        let began = Instant::now();
        // The orphan is reaped by init, soon.
        while kill(Pid::from_raw(child), None).is_ok() && !is_zombie(child) {
            assert!(began.elapsed() < PATIENCE, "process {child} survived");
            thread::sleep(Duration::from_millis(5));
        }
    }

    fn is_zombie(pid: i32) -> bool {
        fs::read_to_string(format!("/proc/{pid}/stat")).is_ok_and(|stat| stat.contains(") Z "))
    }

    #[test]
    fn an_early_end_is_reported_with_the_log() {
        let directory = tempfile::tempdir().unwrap();
        let mut command = Command::new("sh");
        command.args(["-c", "echo sorry; exit 7"]);
        let mut process = Process::start(&mut command, &directory.path().join("log")).unwrap();
        let error = process.wait_until(|_| false).unwrap_err().to_string();
        assert!(
            error.contains("exit code 7") && error.contains("sorry"),
            "{error}"
        );
    }
}
