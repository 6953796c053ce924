//! The images of the daemon that serves all of them.
//!
//! It is started for the first image and ended after the last one. Each image is mounted
//! and unmounted by a request of its own, with its own lock, so one that fails or takes
//! long is nobody else's affair. The daemon keeps its images when any of its processes
//! dies, and passes them on to its successor; [`Daemons::restore`] compares what a new one
//! has with what it should have.
//!
//! Locks are taken in this order: a member, the daemon's slot, the table of places.

use std::fs;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Instant;

use super::client::Failure;
use super::process;
use super::run::{START, detach};
use super::service::{SHARED, Service};
use super::watch::{FIRST_PAUSE, MAX_PAUSE};
use super::{Daemons, Place, STOP, lock};
use crate::error::{Error, chain};
use crate::images::Image;

/// An image of the daemon.
#[derive(Debug)]
pub(super) struct Member {
    pub(super) id: u64,
    pub(super) reference: String,
    state: Mutex<State>,
}

/// Locked while the image is mounted or unmounted.
#[derive(Debug, Default)]
struct State {
    /// None if nobody has asked for it in this life.
    wanted: Option<Image>,
    /// The credentials that the daemon was given last.
    auth: Option<String>,
    /// Whether it was released: another member may have its place.
    gone: bool,
}

impl Member {
    pub(super) fn new(id: u64, reference: &str) -> Arc<Self> {
        Arc::new(Self {
            id,
            reference: reference.to_owned(),
            state: Mutex::default(),
        })
    }

    /// The image, if it was asked for.
    pub(super) fn image(&self) -> Option<Image> {
        lock(&self.state).wanted.clone()
    }
}

impl Daemons {
    /// Makes sure that a member is mounted and can be read; `None` if it was released
    /// meanwhile.
    pub(super) fn attach_member(
        self: &Arc<Self>,
        member: &Arc<Member>,
        image: &Image,
    ) -> Option<Result<PathBuf, Error>> {
        let mut state = lock(&member.state);
        if state.gone {
            return None;
        }
        let first = state.wanted.is_none();
        let mut wanted = state.wanted.clone().unwrap_or_else(|| image.clone());
        wanted.account = image.account.clone().or(wanted.account);
        state.wanted = Some(wanted.clone());
        let served = self.serve(&wanted, &mut state);
        if served.is_err() && first {
            state.wanted = None;
            self.drop_member(member, &mut state);
            drop(state);
            self.retire();
        }
        let point = self.settings.layout().shared_mountpoint(image.id);
        Some(served.map(|()| point))
    }

    /// Unmounts a member, unless `is_used`.
    pub(super) fn release_member(&self, member: &Arc<Member>, is_used: impl FnOnce() -> bool) {
        let mut state = lock(&member.state);
        if state.gone || is_used() {
            return;
        }
        tracing::info!("image {}: no user left", member.reference);
        self.unserve(member.id);
        self.drop_member(member, &mut state);
        drop(state);
        self.retire();
    }

    fn drop_member(&self, member: &Arc<Member>, state: &mut State) {
        state.gone = true;
        let mut places = lock(&self.places);
        if let Some(Place::Shared(known)) = places.get(&member.id)
            && Arc::ptr_eq(known, member)
        {
            places.remove(&member.id);
        }
    }

    /// The images that there are, by number.
    pub(super) fn members(&self) -> Vec<Arc<Member>> {
        let places = lock(&self.places);
        let shared = places.values().filter_map(|place| match place {
            Place::Shared(member) => Some(Arc::clone(member)),
            Place::Own(_) => None,
        });
        shared.collect()
    }

    /// The task of the daemon of all images, as it is now; that of others stays.
    pub(super) fn current(&self, service: Service) -> Service {
        if service.id != SHARED {
            return service;
        }
        let members = self.members().into_iter();
        let references: Vec<String> = members.map(|member| member.reference.clone()).collect();
        Service::all(&references, self.settings.layout())
    }

    /// Makes sure that the daemon runs.
    fn ensure(self: &Arc<Self>) -> Result<(), Error> {
        let mut slot = lock(&self.shared);
        let is_alive = |process: &Arc<process::Process>| process.is_alive();
        if slot.process.as_ref().is_some_and(is_alive) {
            return Ok(());
        }
        slot.process = None;
        let service = self.current(Service::all(&[], self.settings.layout()));
        slot.wanted = Some(service.clone());
        self.bring_up(&mut slot, &service)?;
        // Not here: whoever calls this has a member locked.
        self.restore_later();
        Ok(())
    }

    /// Mounts an image unless it is there, however often the daemon dies meanwhile.
    fn serve(self: &Arc<Self>, image: &Image, state: &mut State) -> Result<(), Error> {
        let began = Instant::now();
        loop {
            self.ensure()?;
            match self.try_serve(image, state) {
                Ok(()) => return Ok(()),
                Err(Attempt::Failed(error)) => return Err(error),
                Err(Attempt::Lost(error)) if began.elapsed() > START => {
                    return Err(failed(image, &error));
                }
                Err(Attempt::Lost(error)) => {
                    tracing::debug!("image {}: {}", image.reference, chain(&error));
                    thread::sleep(FIRST_PAUSE);
                }
            }
        }
    }

    fn try_serve(&self, image: &Image, state: &mut State) -> Result<(), Attempt> {
        let client = self.client();
        let attempt = |failure| match failure {
            Failure::Unreachable(_) => Attempt::Lost(failure),
            Failure::Refused(_) => Attempt::Failed(failed(image, &failure)),
        };
        if client.has(image.id).map_err(attempt)? {
            let given = self.settings.given(image);
            if let Some(auth) = given.filter(|given| state.auth.as_ref() != Some(given)) {
                client.renew(image.id, &auth).map_err(attempt)?;
                state.auth = Some(auth);
            }
            return Ok(());
        }
        let point = self.settings.layout().shared_mountpoint(image.id);
        if process::is_mounted(&point) {
            tracing::error!(
                "image {}: nobody answers for {}; containers that run on it must be restarted",
                image.reference,
                point.display()
            );
            detach(&point);
        }
        let (request, auth) = self.settings.request(image).map_err(Attempt::Failed)?;
        let asked = Instant::now();
        client.mount(image.id, &request).map_err(attempt)?;
        tracing::info!(
            "image {}: mounted in {} ms",
            image.reference,
            asked.elapsed().as_millis()
        );
        state.auth = auth;
        Ok(())
    }

    /// Has an image unmounted by the daemon, if that lives, and in any case.
    fn unserve(&self, id: u64) {
        let client = self.client();
        let point = self.settings.layout().shared_mountpoint(id);
        let began = Instant::now();
        loop {
            match client.has(id) {
                Ok(true) => {}
                Ok(false) => break,
                Err(error) => {
                    // Its successor is told by `restore`.
                    tracing::warn!("image {id}: not unmounted by its daemon: {}", chain(&error));
                    break;
                }
            }
            match client.unmount(id) {
                Ok(()) => break,
                Err(error) if began.elapsed() > STOP => {
                    tracing::warn!("image {id}: {}; unmounting it anyway", chain(&error));
                    break;
                }
                Err(_) => thread::sleep(FIRST_PAUSE),
            }
        }
        detach_own(&point);
        let _ = fs::remove_dir(&point);
    }

    /// Ends the daemon if it has no image.
    pub(super) fn retire(&self) {
        let mut slot = lock(&self.shared);
        if self.members().is_empty() {
            self.end(&mut slot, SHARED);
            let point = self.settings.layout().shared();
            for entry in fs::read_dir(&point).into_iter().flatten().flatten() {
                let _ = fs::remove_dir(entry.path());
            }
            let _ = fs::remove_dir(&point);
            let socket = self.settings.control_socket();
            let _ = fs::remove_file(&socket);
            let _ = socket.parent().map(fs::remove_dir);
        }
    }

    /// Compares the images of the daemon with those that it should have, and makes them the
    /// same, for as long as that takes.
    pub(super) fn restore(self: &Arc<Self>) {
        let mut pause = FIRST_PAUSE;
        while !self.is_restored() {
            thread::sleep(pause);
            pause = (pause * 2).min(MAX_PAUSE);
        }
    }

    /// The same in a thread of its own.
    pub(super) fn restore_later(self: &Arc<Self>) {
        let daemons = Arc::clone(self);
        let restore = thread::Builder::new().name("restore".to_owned());
        if let Err(error) = restore.spawn(move || daemons.restore()) {
            tracing::error!("images of the daemon before are not mounted again: {error}");
        }
    }

    /// Unmounts an image of the daemon that nobody knows.
    fn turn_out(&self, id: u64) {
        let stranger = Member::new(id, "");
        let mut state = lock(&stranger.state);
        {
            let mut places = lock(&self.places);
            if matches!(places.get(&id), Some(Place::Shared(_))) {
                return;
            }
            // Whoever asks for it meanwhile waits. One with a daemon of its own does not
            // look here.
            let known = Place::Shared(Arc::clone(&stranger));
            places.entry(id).or_insert(known);
        }
        tracing::warn!("repair: nobody uses image {id} any more");
        self.unserve(id);
        self.drop_member(&stranger, &mut state);
    }

    /// One attempt at that. True if there is nothing left to do.
    fn is_restored(self: &Arc<Self>) -> bool {
        let Ok(there) = self.client().images() else {
            // Gone again: whoever replaces it comes here, too.
            return true;
        };
        for id in there {
            self.turn_out(id);
        }
        let mut done = true;
        for member in self.members() {
            let mut state = lock(&member.state);
            if let Some(image) = state.wanted.clone().filter(|_| !state.gone)
                && let Err(error) = self.serve(&image, &mut state)
            {
                tracing::error!("{}; trying again", chain(&error));
                done = false;
            }
        }
        done
    }
}

/// Why an image is not served yet.
enum Attempt {
    /// Nobody knows: the daemon may have died.
    Lost(Failure),
    /// It cannot be.
    Failed(Error),
}

fn failed(image: &Image, failure: &Failure) -> Error {
    Error::Mount {
        image: image.reference.clone(),
        reason: format!("nydusd refuses: {}", chain(failure)),
    }
}

/// Unmounts what is mounted exactly there: below a mount of all images nothing is.
fn detach_own(point: &std::path::Path) {
    if process::is_mounted(point) {
        detach(point);
    }
}
