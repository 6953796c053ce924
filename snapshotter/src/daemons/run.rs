//! A daemon begins: found again, started with what a dead one has left, or from nothing.

use std::fs;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use nix::mount::{MntFlags, umount2};

use super::client::Client;
use super::holder::{self, Holder};
use super::process::{self, Process};
use super::service::Service;
use super::{Daemons, STOP, Slot, lock};
use crate::error::{Error, chain};
use crate::lifecycle::make_directory;
use crate::manager;

/// How long the first byte of an image may take: its metadata is on this disk.
pub(super) const START: Duration = Duration::from_secs(60);
/// Pause between two looks at a daemon that starts.
const LOOK: Duration = Duration::from_millis(2);

impl Daemons {
    /// Makes sure that a daemon runs for `service`, and is watched.
    pub(super) fn bring_up(
        self: &Arc<Self>,
        slot: &mut Slot,
        service: &Service,
    ) -> Result<(), Error> {
        let holder = self.hold(slot, service.id);
        match self.run(service, holder.as_deref()) {
            Ok(process) => {
                slot.process = Some(Arc::clone(&process));
                self.watch(service.id, Some(process));
                Ok(())
            }
            Err(error) => {
                slot.process = None;
                if holder.is_some_and(|holder| holder.has_mount()) {
                    // Its readers wait, whether or not somebody asks again.
                    if !std::mem::replace(&mut slot.retrying, true) {
                        self.watch(service.id, None);
                    }
                } else {
                    slot.wanted = None;
                }
                Err(error)
            }
        }
    }

    /// The third holder of the daemon `id`, if the system lets us be one.
    pub(super) fn hold(&self, slot: &mut Slot, id: u64) -> Option<Arc<Holder>> {
        if let Some(holder) = &slot.holder {
            return Some(Arc::clone(holder));
        }
        let path = self.settings.holder_socket(id);
        let made = path
            .parent()
            .map_or(Ok(()), |directory| make_directory(directory, 0o700))
            .and_then(|()| {
                let files = lock(&self.inherited).remove(&id).unwrap_or_default();
                Holder::new(id, &path, files, self.manager.clone())
                    .map_err(Error::io(&path, "cannot listen"))
            });
        slot.holder = made
            .inspect_err(|error| {
                tracing::error!(
                    "{}: {}; its mounts will not survive the death of their whole daemon",
                    path.display(),
                    chain(error)
                );
            })
            .ok();
        slot.holder.clone()
    }

    /// Finds the daemon of `service`, or starts one.
    pub(super) fn run(
        &self,
        service: &Service,
        holder: Option<&Holder>,
    ) -> Result<Arc<Process>, Error> {
        if let Some(process) = process::find(&service.mountpoint) {
            if self.serves(service, &process) {
                tracing::info!(
                    "image {}: its daemon, process {}, still runs",
                    service.name,
                    process.pid()
                );
                // First: when it has left everything, its successor must have these, too.
                self.settings.learn(service.id, &process);
                // We may have been away, and have nothing, or not the latest.
                process.signal_group(holder::AGAIN);
                return Ok(Arc::new(process));
            }
            process.end(STOP);
        }
        if let Some(holder) = holder {
            let held = holder.has_mount();
            if held && !process::mounts_in(&service.mountpoint).is_empty() {
                tracing::warn!(
                    "image {}: its whole daemon has died; the next one gets {} descriptors",
                    service.name,
                    holder.count()
                );
                let command = self.command(service, true)?;
                return self.resume(service, holder, command, START);
            }
            holder.clear();
        }
        self.mount(service, holder)
    }

    /// Whether a daemon that was found does its work, or is about to.
    fn serves(&self, service: &Service, process: &Process) -> bool {
        if service.image.is_some() {
            return process::is_mounted(&service.mountpoint);
        }
        let (began, client) = (Instant::now(), self.client().impatient());
        while process.is_alive() && began.elapsed() < START {
            if client.images().is_ok() {
                return true;
            }
            thread::sleep(LOOK);
        }
        false
    }

    /// The way to the daemon of all images.
    pub(super) fn client(&self) -> Client {
        Client::new(&self.settings.control_socket())
    }

    /// The command that serves with the program that is used now.
    fn command(&self, service: &Service, held: bool) -> Result<Command, Error> {
        let program = self.settings.program();
        self.settings.command(service, held, &program)
    }

    /// Starts a daemon that goes on with the mounts of one that is gone, and has this long
    /// to do so.
    pub(super) fn resume(
        &self,
        service: &Service,
        holder: &Holder,
        command: Command,
        patience: Duration,
    ) -> Result<Arc<Process>, Error> {
        let began = Instant::now();
        let files = holder.files().map_err(|error| Error::Mount {
            image: service.name.clone(),
            reason: format!("cannot copy what is held: {error}"),
        })?;
        let process = self.start(service, Some(holder), files, command)?;
        let goes_on = || process.is_alive() && began.elapsed() < patience;
        if !holder.wait_until_ready(goes_on) {
            // All of it, at once: it may have begun to answer, and the next one must not
            // be a second one. Nothing is lost, because everything is held.
            process.kill_group(STOP);
            return Err(self.useless(service, &process, "does not go on with it"));
        }
        tracing::info!(
            "image {}: served again by process {} after {} ms",
            service.name,
            process.pid(),
            began.elapsed().as_millis()
        );
        Ok(Arc::new(process))
    }

    /// Starts a daemon from nothing, which mounts its image if it has only one.
    fn mount(&self, service: &Service, holder: Option<&Holder>) -> Result<Arc<Process>, Error> {
        lament(service);
        detach(&service.mountpoint);
        fs::create_dir_all(&service.mountpoint)
            .map_err(Error::io(&service.mountpoint, "cannot make the directory"))?;
        let began = Instant::now();
        let command = self.command(service, holder.is_some())?;
        let process = self.start(service, holder, Vec::new(), command)?;
        match service.image {
            Some(_) => self.wait_for_image(service, &process)?,
            None => {
                if !self.serves(service, &process) {
                    return Err(self.useless(service, &process, "does not answer"));
                }
            }
        }
        tracing::info!(
            "image {}: served by process {} within {} ms",
            service.name,
            process.pid(),
            began.elapsed().as_millis()
        );
        Ok(Arc::new(process))
    }

    fn wait_for_image(&self, service: &Service, process: &Process) -> Result<(), Error> {
        let began = Instant::now();
        while !process::is_mounted(&service.mountpoint) {
            if !process.is_alive() || began.elapsed() > START {
                return Err(self.useless(service, process, "did not mount it"));
            }
            thread::sleep(LOOK);
        }
        // Answered by the daemon: from here on it serves.
        fs::metadata(&service.mountpoint)
            .map(drop)
            .map_err(|error| {
                let error = format!("does not serve it: {}", chain(&error));
                let error = self.useless(service, process, &error);
                detach(&service.mountpoint);
                error
            })
    }

    /// Starts a daemon with `files`, by name, as its own.
    fn start(
        &self,
        service: &Service,
        holder: Option<&Holder>,
        files: Vec<(String, OwnedFd)>,
        mut command: Command,
    ) -> Result<Process, Error> {
        let (names, files): (Vec<String>, Vec<OwnedFd>) = files.into_iter().unzip();
        manager::introduce(&mut command, holder.map(Holder::path), &names);
        let log = self.settings.log_file(service.id);
        Process::start(&command, &log, &files).map_err(|error| Error::Mount {
            image: service.name.clone(),
            reason: format!(
                "cannot start {}: {error}",
                Path::new(command.get_program()).display()
            ),
        })
    }

    /// Ends a daemon that does not do what it should.
    fn useless(&self, service: &Service, process: &Process, what: &str) -> Error {
        process.end(STOP);
        Error::Mount {
            image: service.name.clone(),
            reason: format!(
                "nydusd {what}: {}",
                last_words(&self.settings.log_file(service.id))
            ),
        }
    }
}

/// Says so if containers have lost their root: it is mounted, and nobody answers for it.
fn lament(service: &Service) {
    for (point, kind) in process::mounts_in(&service.mountpoint) {
        let cost = match kind.as_str() {
            "erofs" => "what they had not fetched reads as ZEROS",
            _ => "they cannot read any more",
        };
        tracing::error!(
            "image {}: its whole daemon has died, and nobody held the mount {}. Restart the \
             containers that run on it: {cost}",
            service.name,
            point.display()
        );
    }
}

/// Unmounts whatever is mounted on `point` and below it, in use or not.
pub(crate) fn detach(point: &Path) {
    loop {
        let mut mounts = process::mounts_in(point);
        let Some((last, _)) = mounts.pop() else {
            return;
        };
        if let Err(error) = umount2(&last, MntFlags::MNT_DETACH) {
            tracing::warn!("cannot unmount {}: {error}", last.display());
            return;
        }
    }
}

/// The last lines of a log, on one line.
fn last_words(log: &Path) -> String {
    let text = fs::read(log).unwrap_or_default();
    let text = String::from_utf8_lossy(&text);
    let mut lines: Vec<&str> = text.lines().rev().take(5).collect();
    lines.reverse();
    lines.join(" / ")
}
