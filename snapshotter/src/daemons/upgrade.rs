//! Daemons replaced by another program, in place, while containers read.
//!
//! This is the death of a whole daemon, on purpose: everything that its mount needs is
//! held, so its processes are killed, and the new program goes on. A process that is asked
//! to end would unmount first, and one that is killed can spoil nothing, because whoever
//! goes on is made for that. What a keeper may just be passing on is waited for before.
//!
//! Whatever can fail is tried before anything is changed; and if the new program does not
//! serve, the old one goes on with the same.

use std::fs::{self, File};
use std::io::{self, Read as _, Seek as _};
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::Ordering;
use std::sync::{Arc, TryLockError};
use std::thread;
use std::time::{Duration, Instant};

use super::holder::Holder;
use super::process::{self, Process};
use super::service::{SHARED, Service};
use super::{Daemons, Place, STOP, Slot, lock};
use crate::error::{Error, chain};
use crate::manager;

/// How long a program may take to say its version.
const ANSWER: Duration = Duration::from_secs(10);
/// Most bytes that are read of that.
const MAX_ANSWER: u64 = 4 << 10;
/// Pause between two looks at a program that says it.
const LOOK: Duration = Duration::from_millis(2);
/// How long a keeper may take to leave everything once more.
const LEAVE: Duration = Duration::from_secs(10);
/// How long the new program may take to go on. Containers wait.
const GO_ON: Duration = Duration::from_secs(20);

/// A program that says it is nydusd.
#[derive(Debug)]
struct Program {
    path: PathBuf,
    /// Device and inode: another program may have had the same name.
    file: (u64, u64),
}

impl Program {
    /// * `version`: the version it must have; any if empty.
    fn check(path: &Path, version: &str) -> Result<Self, Error> {
        let refused = |reason: String| Error::Invalid(format!("{}: {reason}", path.display()));
        if !path.is_absolute() {
            return Err(refused("is not an absolute path".to_owned()));
        }
        let metadata = fs::metadata(path).map_err(|error| refused(error.to_string()))?;
        if !metadata.is_file() || metadata.mode() & 0o111 == 0 {
            return Err(refused("is not an executable file".to_owned()));
        }
        let line = version_line(path).map_err(|error| refused(format!("--version: {error}")))?;
        let mut words = line.split_whitespace();
        let (name, known) = (words.next(), words.last());
        let (Some("nydusd"), Some(known)) = (name, known) else {
            return Err(refused(format!("is not nydusd: --version says {line:?}")));
        };
        let bare = |version: &str| version.trim_start_matches('v').to_owned();
        if !version.is_empty() && bare(version) != bare(known) {
            return Err(refused(format!("is version {known}, not {version}")));
        }
        Ok(Self {
            path: path.to_owned(),
            file: identity(&metadata),
        })
    }

    /// Whether `process` runs it.
    fn is_of(&self, process: &Process) -> bool {
        fs::metadata(executable(process)).is_ok_and(|found| identity(&found) == self.file)
    }
}

impl Daemons {
    /// Replaces all daemons by the program `path`, one after the other, and starts later
    /// ones with it.
    ///
    /// * `version`: the version it must have; any if empty.
    ///
    /// # Errors
    /// [`Error::Invalid`]: it is refused, and nothing has changed. [`Error::Upgrade`]: one
    /// image is still served by the old program, and so are those after it.
    pub fn upgrade(self: &Arc<Self>, path: &Path, version: &str) -> Result<(), Error> {
        let _alone = match self.upgrading.try_lock() {
            Ok(alone) => alone,
            Err(TryLockError::Poisoned(alone)) => alone.into_inner(),
            Err(TryLockError::WouldBlock) => {
                return Err(Error::Invalid("another upgrade is under way".to_owned()));
            }
        };
        if !self.complete.load(Ordering::Acquire) {
            let reason = "not all images that are in use are mounted yet; try again";
            return Err(Error::Invalid(reason.to_owned()));
        }
        let program = Program::check(path, version)?;
        for id in self.ids() {
            self.visit(id, |slot| prepared(slot).map(drop))?;
        }
        for id in self.ids() {
            self.visit(id, |slot| self.exchange(slot, &program))?;
        }
        let old = self.settings.set_program(&program.path);
        // Those that were started meanwhile.
        for id in self.ids() {
            self.visit(id, |slot| self.exchange(slot, &program))
                .inspect_err(|_| drop(self.settings.set_program(&old)))?;
        }
        tracing::info!("all daemons run {}", program.path.display());
        Ok(())
    }

    /// Starts daemons with the program of an earlier upgrade, if that is still good. Call
    /// before any is started.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn start_with(&self, path: &Path) -> Result<(), Error> {
        let program = Program::check(path, "")?;
        self.settings.set_program(&program.path);
        Ok(())
    }

    fn ids(&self) -> Vec<u64> {
        let places = lock(&self.places);
        let own = places
            .iter()
            .filter(|(_, place)| matches!(place, Place::Own(_)));
        own.map(|(id, _)| *id).chain([SHARED]).collect()
    }

    /// Has `what` done to a daemon, if it is still there, while nobody starts or stops it.
    fn visit(
        &self,
        id: u64,
        what: impl FnOnce(&mut Slot) -> Result<(), Error>,
    ) -> Result<(), Error> {
        let slot = self.slot(id);
        let mut slot = lock(&slot);
        slot.wanted = slot.wanted.take().map(|service| self.current(service));
        what(&mut slot)
    }

    /// Replaces one daemon, unless it runs this program. One that has just died is left to
    /// who watches it.
    fn exchange(self: &Arc<Self>, slot: &mut Slot, program: &Program) -> Result<(), Error> {
        let Some(replaceable) = prepared(slot)? else {
            return Ok(());
        };
        let Replaceable {
            service,
            process: old,
            holder,
        } = replaceable;
        if program.is_of(&old) {
            return Ok(());
        }
        let (previous, _open) = program_of(&old).map_err(|error| {
            failed(
                &service,
                format!("the program that it runs is not known: {error}"),
            )
        })?;
        let next = self.settings.command(&service, true, &program.path)?;
        let back = self.settings.command(&service, true, &previous)?;
        let began = Instant::now();
        let outcome = self.pass_on(&service, &holder, &old, next);
        let error = match outcome {
            Ok(process) => {
                tracing::info!(
                    "image {}: process {} has made room for {} within {} ms",
                    service.name,
                    old.pid(),
                    process.pid(),
                    began.elapsed().as_millis()
                );
                self.settle(slot, &service, Some(process));
                return Ok(());
            }
            Err(error) => chain(&error),
        };
        tracing::error!("image {}: {error}; back to the old program", service.name);
        let outcome = self.pass_on(&service, &holder, &old, back);
        let reason = match &outcome {
            Ok(_) => error,
            Err(worse) => format!("{error}; nor does the old one go on: {}", chain(worse)),
        };
        self.settle(slot, &service, outcome.ok());
        Err(failed(&service, reason))
    }

    /// Ends what is left of a daemon, and has another one go on with its mount.
    fn pass_on(
        &self,
        service: &Service,
        holder: &Holder,
        old: &Process,
        next: Command,
    ) -> Result<Arc<Process>, Error> {
        old.kill_group(STOP);
        let began = Instant::now();
        // Nobody else may read the requests of the mount.
        while let Some(left) = process::find(&service.mountpoint) {
            if began.elapsed() > STOP {
                let reason = format!("process {} cannot be killed", left.pid());
                return Err(failed(service, reason));
            }
            left.kill_group(STOP);
        }
        self.resume(service, holder, next, GO_ON)
    }

    /// From here on `process` serves the image; somebody tries to make that true if there
    /// is none.
    fn settle(self: &Arc<Self>, slot: &mut Slot, service: &Service, process: Option<Arc<Process>>) {
        slot.process.clone_from(&process);
        if process.is_some() || !std::mem::replace(&mut slot.retrying, true) {
            self.watch(service.id, process);
        }
    }
}

/// A daemon that can be replaced: its mount would outlive it now.
struct Replaceable {
    service: Service,
    process: Arc<Process>,
    holder: Arc<Holder>,
}

/// A daemon; none if it does not run.
fn prepared(slot: &Slot) -> Result<Option<Replaceable>, Error> {
    let (Some(service), Some(process)) = (&slot.wanted, &slot.process) else {
        return Ok(None);
    };
    if !process.is_alive() {
        return Ok(None);
    }
    let Some(holder) = &slot.holder else {
        return Err(failed(service, "nobody holds its descriptors".to_owned()));
    };
    if !holder.renew(process, LEAVE) {
        let reason = "it does not leave the descriptors of its mount".to_owned();
        return Err(failed(service, reason));
    }
    Ok(Some(Replaceable {
        service: service.clone(),
        process: Arc::clone(process),
        holder: Arc::clone(holder),
    }))
}

fn failed(service: &Service, reason: String) -> Error {
    Error::Upgrade {
        image: service.name.clone(),
        reason,
    }
}

fn identity(metadata: &fs::Metadata) -> (u64, u64) {
    (metadata.dev(), metadata.ino())
}

fn executable(process: &Process) -> PathBuf {
    format!("/proc/{}/exe", process.pid()).into()
}

/// The program of a process, by a path that is good as long as the file is open: another
/// program may have its name by now.
fn program_of(process: &Process) -> io::Result<(PathBuf, File)> {
    let link = executable(process);
    let file = File::open(&link)?;
    let path = fs::read_link(&link)?;
    let known = identity(&file.metadata()?);
    if fs::metadata(&path).is_ok_and(|found| identity(&found) == known) {
        return Ok((path, file));
    }
    let path = format!("/proc/{}/fd/{}", std::process::id(), file.as_raw_fd());
    Ok((path.into(), file))
}

/// The first line that a program prints when it is asked for its version.
fn version_line(path: &Path) -> io::Result<String> {
    let mut output = tempfile::tempfile()?;
    let mut command = Command::new(path);
    command.arg("--version");
    command.stdin(Stdio::null()).stderr(Stdio::null());
    command.stdout(output.try_clone()?);
    manager::introduce(&mut command, None, &[]);
    let mut child = command.spawn()?;
    let began = Instant::now();
    let status = loop {
        if let Some(status) = child.try_wait()? {
            break status;
        }
        if began.elapsed() > ANSWER {
            child.kill()?;
            child.wait()?;
            return Err(io::Error::other(format!("no answer within {ANSWER:?}")));
        }
        thread::sleep(LOOK);
    };
    if !status.success() {
        return Err(io::Error::other(status.to_string()));
    }
    let mut text = Vec::new();
    output.rewind()?;
    output.take(MAX_ANSWER).read_to_end(&mut text)?;
    let text = String::from_utf8_lossy(&text);
    Ok(text.lines().next().unwrap_or_default().trim().to_owned())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    fn script(directory: &Path, name: &str, text: &str) -> PathBuf {
        let path = directory.join(name);
        // By another process: one that another test forks here meanwhile would have the
        // file open for writing, and nobody could execute it.
        let write = format!("cat >'{}' <<'END'\n{text}\nEND", path.display());
        assert!(
            Command::new("sh")
                .args(["-c", &write])
                .status()
                .unwrap()
                .success()
        );
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
        path
    }

    #[test]
    fn only_nydusd_of_the_right_version_is_taken() {
        let directory = tempfile::tempdir().unwrap();
        let directory = directory.path();
        let good = script(
            directory,
            "good",
            "#!/bin/sh\nprintf 'nydusd Version: \\tv1.2.3\\nx\\n'",
        );
        for version in ["", "1.2.3", "v1.2.3"] {
            assert_eq!(Program::check(&good, version).unwrap().path, good);
        }
        let plain = directory.join("plain");
        fs::write(&plain, "x").unwrap();
        let refused = [
            (good.clone(), "1.2.4", "is version v1.2.3, not 1.2.4"),
            ("/bin/true".into(), "", "is not nydusd"),
            (
                script(directory, "fails", "#!/bin/sh\necho nydusd v1; exit 3"),
                "",
                "exit status: 3",
            ),
            (
                script(directory, "silent", "#!/bin/sh"),
                "",
                "is not nydusd: --version says \"\"",
            ),
            (plain, "", "is not an executable file"),
            (directory.to_owned(), "", "is not an executable file"),
            (directory.join("missing"), "", "No such file"),
            ("nydusd".into(), "", "is not an absolute path"),
        ];
        for (path, version, words) in refused {
            let error = Program::check(&path, version).unwrap_err().to_string();
            assert!(error.contains(words), "{error}");
            assert!(error.starts_with(path.to_str().unwrap()), "{error}");
        }
    }

    #[test]
    fn a_daemon_whose_descriptors_nobody_holds_is_refused() {
        let directory = tempfile::tempdir().unwrap();
        let mut command = Command::new("sleep");
        command.arg("600");
        let process = Process::start(&command, &directory.path().join("log"), &[]);
        let process = Arc::new(process.unwrap());
        let service = Service {
            id: 1,
            name: "registry.example/app:1".to_owned(),
            mountpoint: PathBuf::new(),
            image: None,
        };
        let slot = Slot {
            wanted: Some(service),
            process: Some(Arc::clone(&process)),
            ..Slot::default()
        };
        let refused = prepared(&slot).err();
        process.kill_group(STOP);
        let refused = refused.unwrap().to_string();
        assert!(refused.contains("registry.example/app:1"), "{refused}");
        assert!(refused.contains("nobody holds"), "{refused}");
        // Whoever watches it replaces it now.
        assert!(prepared(&slot).unwrap().is_none());
    }

    #[test]
    fn a_program_is_known_although_another_one_has_its_name() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("program");
        let copy = |from: &str| {
            let partial = path.with_extension("new");
            let copied = Command::new("cp").arg(from).arg(&partial).status();
            assert!(copied.unwrap().success());
            fs::rename(partial, &path).unwrap();
        };
        copy("/bin/sleep");
        let mut command = Command::new(&path);
        command.arg("600");
        let log = directory.path().join("log");
        let process = Process::start(&command, &log, &[]).unwrap();
        let began = Instant::now();
        while fs::read_link(executable(&process)).unwrap() != path {
            assert!(began.elapsed() < Duration::from_secs(30));
            thread::sleep(LOOK);
        }
        let before = program_of(&process).unwrap();
        copy("/bin/true");
        let after = program_of(&process).unwrap();
        process.kill_group(STOP);
        assert_eq!(before.0, path);
        let same = |other: &File| identity(&other.metadata().unwrap());
        assert_eq!(identity(&fs::metadata(&after.0).unwrap()), same(&before.1));
        assert_ne!(identity(&fs::metadata(&path).unwrap()), same(&before.1));
    }
}
