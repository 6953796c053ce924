//! What a worker leaves with the keeper about a mount: the note of a deposit.
//!
//! The descriptors that go with it, in this order:
//!
//! * FUSE: `/dev/fuse`; the images in the mount are deposits of their own
//!   ([`manager::saved`](crate::manager::saved)), but for one that has the mount to
//!   itself: then its bootstrap;
//! * EROFS: the bootstrap, the lock of the mount's directory, the watch for its end,
//!   and the cache file of every blob.
//!
//! The deposit [`EVENTS`] has no note; with it are the fanotify group and the journal.

use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, ensure};
use serde::{Deserialize, Serialize};

use super::Source;
use crate::driver::{Choice, Driver};
use crate::keeper::text;
use crate::manager::saved::Origin;
use crate::mountinfo;

/// Name of the deposit with the fanotify group of all mounts.
pub(crate) const EVENTS: &str = "events";
/// What the names of mounts' deposits begin with: as long as there is one, there is
/// something to keep.
pub(crate) const MOUNT: &str = "mount-";
/// Version of the note. Raised when an older reader would misunderstand.
const VERSION: u32 = 1;
/// Version of a note that readers of the first one would misunderstand.
const NEWER: u32 = 2;

/// How far a mount has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Phase {
    /// It may be in the mount table, or not.
    Mounting,
    /// It may be in the mount table, below the one that it replaces or instead of it, or
    /// not.
    Replacing,
    /// It works.
    Served,
}

/// The note.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Saved {
    version: u32,
    /// Number of the mount in the daemon.
    pub id: u64,
    /// What serves it.
    pub driver: Driver,
    /// How far it has come.
    pub phase: Phase,
    /// The image as the user named it.
    pub image: String,
    /// The bootstrap that is served, if it is one image.
    pub bootstrap: PathBuf,
    /// Where it is mounted.
    pub mountpoint: PathBuf,
    /// Device number of the file system; 0 if it is not known before it is served.
    pub device: u64,
    /// Directory of an EROFS mount.
    pub place: Option<PathBuf>,
    /// Threads that answer FUSE requests.
    pub threads: u16,
    /// Whether it is a directory for images that the control API mounts below it;
    /// nothing is mounted on it then, and no descriptor goes with the note.
    #[serde(default)]
    pub directory: bool,
    /// What serves the images below such a directory, unless they say so themselves.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub choice: Option<Choice>,
    /// Path of an image that was mounted so. The body of the request goes with the
    /// note, as the last descriptor.
    #[serde(default)]
    pub path: Option<String>,
}

impl Saved {
    /// Of a mount that is about to be made.
    pub(crate) fn new(id: u64, driver: Driver, source: Option<&Source>, mountpoint: &Path) -> Self {
        Self {
            version: VERSION,
            id,
            driver,
            phase: Phase::Mounting,
            image: image_name(source),
            bootstrap: source.map_or_else(PathBuf::new, |source| source.bootstrap.clone()),
            mountpoint: mountpoint.to_owned(),
            device: 0,
            place: None,
            threads: 4,
            directory: false,
            choice: None,
            path: None,
        }
    }

    /// Whether it is at its mount point, above or below others.
    pub(crate) fn is_mounted(&self) -> bool {
        let mut stack = mountinfo::stack(&self.mountpoint).into_iter();
        stack.any(|entry| entry.device_number() == self.device)
    }

    /// How the image came into the mount.
    ///
    /// * `files`: the descriptors that go with the note; those of an image remain.
    ///
    /// # Errors
    /// When a descriptor is missing or not what it should be.
    pub(crate) fn origin(&self, files: &mut Vec<OwnedFd>) -> anyhow::Result<Origin> {
        if self.path.is_none() {
            return Ok(Origin::CommandLine);
        }
        let body = files.pop().context("a descriptor is missing")?;
        Ok(Origin::Api(text::load(&body)?))
    }

    /// As text.
    ///
    /// # Errors
    /// When a path is not UTF-8.
    pub(crate) fn note(&self) -> anyhow::Result<String> {
        let newer = self.driver == Driver::Fuse && self.path.is_some();
        let noted = Self {
            version: if newer { NEWER } else { VERSION },
            ..self.clone()
        };
        serde_json::to_string(&noted).context("cannot save the state of a mount")
    }

    /// From text.
    ///
    /// # Errors
    /// When it is none, or of a newer version.
    pub(crate) fn parse(note: &str) -> anyhow::Result<Self> {
        let saved: Self =
            serde_json::from_str(note).context("the saved state of a mount cannot be read")?;
        ensure!(
            (VERSION..=NEWER).contains(&saved.version),
            "the saved state of a mount has version {}, this program knows {VERSION} to {NEWER}",
            saved.version
        );
        Ok(saved)
    }
}

/// The image of a mount, for messages.
pub(crate) fn image_name(source: Option<&Source>) -> String {
    source.map_or_else(|| "no image yet".to_owned(), |source| source.name.clone())
}

/// Name of the deposit of a mount.
pub(crate) fn name(id: u64) -> String {
    format!("{MOUNT}{id}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn notes_of_another_version_are_refused() {
        let saved = Saved {
            version: VERSION,
            id: 3,
            driver: Driver::Erofs,
            phase: Phase::Served,
            image: "image".into(),
            bootstrap: "/b".into(),
            mountpoint: "/m".into(),
            device: 40,
            place: None,
            threads: 4,
            directory: false,
            choice: None,
            path: Some("/12".into()),
        };
        let note = saved.note().unwrap();
        assert_eq!(Saved::parse(&note).unwrap(), saved);
        let newer = note.replace("\"version\":1", "\"version\":3");
        let error = Saved::parse(&newer).unwrap_err().to_string();
        assert!(error.contains("version 3"), "{error}");
        let fuse = Saved {
            driver: Driver::Fuse,
            ..saved
        };
        let note = fuse.note().unwrap();
        assert!(note.contains("\"version\":2"), "{note}");
        assert_eq!(Saved::parse(&note).unwrap().driver, Driver::Fuse);
        assert!(Saved::parse("{}").is_err());
    }
}
