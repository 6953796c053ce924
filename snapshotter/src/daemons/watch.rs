//! The end of a daemon: whoever is needed is replaced.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread;
use std::time::{Duration, Instant};

use super::process::Process;
use super::service::SHARED;
use super::{Daemons, lock};
use crate::error::chain;

/// A daemon that lived as long as this did not fail to start.
const HEALTHY: Duration = Duration::from_secs(60);
/// First pause between two attempts to replace a daemon.
pub(super) const FIRST_PAUSE: Duration = Duration::from_millis(100);
/// Longest pause.
pub(super) const MAX_PAUSE: Duration = Duration::from_secs(30);

impl Daemons {
    /// Waits, in a thread, for the end of a daemon, and replaces it if it is still wanted.
    /// Without a daemon, only the latter.
    pub(super) fn watch(self: &Arc<Self>, id: u64, process: Option<Arc<Process>>) {
        let daemons = Arc::clone(self);
        let watch = move || {
            let mut process = process;
            let mut pause = FIRST_PAUSE;
            if process.is_none() {
                thread::sleep(pause);
            }
            loop {
                let began = Instant::now();
                if let Some(process) = &process {
                    process.wait();
                }
                if began.elapsed() > HEALTHY {
                    pause = FIRST_PAUSE;
                }
                process = daemons.replace(id, process.as_ref(), &mut pause);
                if process.is_none() {
                    return;
                }
                if id == SHARED {
                    daemons.restore();
                }
            }
        };
        if let Err(error) = thread::Builder::new()
            .name(format!("watch-{id}"))
            .spawn(watch)
        {
            tracing::error!("daemon {id}: it will not be replaced if it ends: {error}");
        }
    }

    /// Replaces `dead` until that works; `None` if it was ended on purpose, or replaced
    /// by somebody else.
    fn replace(
        &self,
        id: u64,
        dead: Option<&Arc<Process>>,
        pause: &mut Duration,
    ) -> Option<Arc<Process>> {
        loop {
            let slot = self.slot(id);
            let mut slot = lock(&slot);
            slot.retrying &= dead.is_some();
            let same = match (&slot.process, dead) {
                (Some(process), Some(dead)) => Arc::ptr_eq(process, dead),
                (None, None) => true,
                _ => false,
            };
            if !same {
                return None;
            }
            let service = self.current(slot.wanted.clone()?);
            if let Some(dead) = dead {
                tracing::warn!(
                    "image {}: process {} of its daemon has ended",
                    service.name,
                    dead.pid()
                );
            }
            let holder = self.hold(&mut slot, id);
            match self.run(&service, holder.as_deref()) {
                Ok(process) => {
                    if !process.was_found() {
                        self.restarts.fetch_add(1, Ordering::Relaxed);
                    }
                    slot.process = Some(Arc::clone(&process));
                    return Some(process);
                }
                Err(error) => tracing::error!("{}; trying again in {pause:?}", chain(&error)),
            }
            slot.retrying = dead.is_none();
            drop(slot);
            thread::sleep(*pause);
            *pause = (*pause * 2).min(MAX_PAUSE);
        }
    }
}
