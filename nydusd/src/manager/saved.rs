//! What a worker leaves with the keeper about the images in its FUSE mount.
//!
//! * Deposit `image-<generation>`, one for each image: a note with its place in the
//!   mount; the bootstrap; and, for an image of the control API, the body of the request
//!   that mounted it.
//! * Deposit [`TABLE`]: the images that count, directories, and settings that were made
//!   at run time, in memory.
//!
//! An image is deposited before the table that names it, and withdrawn after one that
//! does not: so the table is right at every moment, and a deposit that it does not name
//! is left from a change that a death has interrupted.

use std::fs::File;
use std::os::fd::AsFd as _;
use std::path::PathBuf;

use anyhow::{Context as _, ensure};
use serde::{Deserialize, Serialize};

use super::Scopes;
use crate::keeper::{Deposit, Holder as Keeper, text};
use crate::vfs::pseudo::{Pseudo, SavedDirectory};

/// Name of the deposit with the table.
pub(crate) const TABLE: &str = "images";
/// What the names of images' deposits begin with.
pub(crate) const IMAGE: &str = "image-";
/// Version of both notes. Raised when an older reader would misunderstand.
const VERSION: u32 = 1;

/// How an image came into the mount.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Origin {
    /// The command line names it.
    CommandLine,
    /// By the control API, with this body.
    Api(Vec<u8>),
}

/// One image.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct SavedImage {
    version: u32,
    /// Path inside the mount.
    pub path: String,
    /// Its slot: a part of every node number that the kernel knows.
    pub slot: u8,
    /// Its generation.
    pub generation: u64,
    /// The image as the user named it.
    pub image: String,
    /// Where its bootstrap was.
    pub bootstrap: PathBuf,
}

/// The table.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct SavedTable {
    version: u32,
    /// Generations of the images.
    pub images: Vec<u64>,
    /// As [`Table::counters`](crate::vfs::Table::counters).
    pub counters: (u8, u64),
    /// The daemon's own directories.
    pub directories: Vec<SavedDirectory>,
    /// Settings that were made at run time.
    pub scopes: Scopes,
}

/// An image as a predecessor has left it.
#[derive(Debug)]
pub(super) struct Left {
    pub saved: SavedImage,
    pub origin: Origin,
    pub bootstrap: File,
}

/// Name of the deposit of an image.
pub(super) fn name(generation: u64) -> String {
    format!("{IMAGE}{generation}")
}

impl SavedImage {
    pub(super) fn new(path: &str, slot: u8, generation: u64, image: &str) -> Self {
        Self {
            version: VERSION,
            path: path.to_owned(),
            slot,
            generation,
            image: image.to_owned(),
            bootstrap: PathBuf::new(),
        }
    }

    /// Leaves the image with the keeper.
    ///
    /// # Errors
    /// When its bootstrap cannot be opened, or the system is out of memory or
    /// descriptors.
    pub(super) fn deposit(&self, keeper: &Keeper, origin: &Origin) -> anyhow::Result<()> {
        let path = &self.bootstrap;
        let bootstrap =
            File::open(path).with_context(|| format!("bootstrap {}", path.display()))?;
        let note = serde_json::to_string(self).context("cannot save the state of an image")?;
        let body = match origin {
            Origin::CommandLine => None,
            Origin::Api(body) => Some(text::store(body)?),
        };
        let mut files = vec![bootstrap.as_fd()];
        files.extend(body.as_ref().map(|body| body.as_fd()));
        keeper.deposit(&name(self.generation), note, &files)
    }
}

impl SavedTable {
    pub(super) fn new(
        images: Vec<u64>,
        counters: (u8, u64),
        directories: Vec<SavedDirectory>,
        scopes: Scopes,
    ) -> Self {
        Self {
            version: VERSION,
            images,
            counters,
            directories,
            scopes,
        }
    }

    /// Leaves the table with the keeper, in the place of an earlier one.
    ///
    /// # Errors
    /// When the system is out of memory or descriptors.
    pub(super) fn deposit(&self, keeper: &Keeper) -> anyhow::Result<()> {
        let memory = text::store(&serde_json::to_vec(self)?)?;
        keeper.deposit(TABLE, String::new(), &[memory.as_fd()])
    }

    /// # Errors
    /// When it is none, or of another version.
    pub(super) fn parse(deposit: &Deposit) -> anyhow::Result<Self> {
        let memory = deposit.files.first().context("no table of images")?;
        let table: Self = serde_json::from_slice(&text::load(memory)?)
            .context("the saved table of images cannot be read")?;
        check("table of images", table.version)?;
        Ok(table)
    }
}

impl Left {
    /// # Errors
    /// When it is none, or of another version.
    pub(super) fn parse(deposit: Deposit) -> anyhow::Result<Self> {
        let saved: SavedImage = serde_json::from_str(&deposit.note)
            .context("the saved state of an image cannot be read")?;
        check("state of an image", saved.version)?;
        let mut files = deposit.files.into_iter();
        let bootstrap = files.next().context("a bootstrap is missing")?;
        let origin = match files.next() {
            None => Origin::CommandLine,
            Some(body) => Origin::Api(text::load(&body)?),
        };
        Ok(Self {
            saved,
            origin,
            bootstrap: bootstrap.into(),
        })
    }
}

/// An image of a table, to be tried out.
#[derive(Debug)]
pub(crate) struct Candidate {
    /// Path inside the mount.
    pub path: String,
    /// How it came into the mount.
    pub origin: Origin,
    /// Where its bootstrap was.
    pub bootstrap: PathBuf,
    /// Its bootstrap.
    pub file: File,
}

/// The images that count among `deposits`, which are of this module.
///
/// # Errors
/// When something cannot be read, or is of another version, or not there.
pub(crate) fn mounted<'a>(
    deposits: impl IntoIterator<Item = (&'a str, &'a Deposit)>,
) -> anyhow::Result<Vec<Candidate>> {
    let mut table = None;
    let mut found = Vec::new();
    for (name, deposit) in deposits {
        if name == TABLE {
            let saved = SavedTable::parse(deposit)?;
            Pseudo::restore(&saved.directories)?;
            table = Some(saved);
        } else {
            found.push(Left::parse(deposit.try_clone()?)?);
        }
    }
    let wanted = table.map(|table| table.images).unwrap_or_default();
    found.retain(|left| wanted.contains(&left.saved.generation));
    ensure!(
        found.len() == wanted.len(),
        "{} of {} images are there",
        found.len(),
        wanted.len()
    );
    let candidates = found.into_iter().map(|left| Candidate {
        path: left.saved.path,
        origin: left.origin,
        bootstrap: left.saved.bootstrap,
        file: left.bootstrap,
    });
    Ok(candidates.collect())
}

fn check(what: &str, version: u32) -> anyhow::Result<()> {
    ensure!(
        version == VERSION,
        "the saved {what} has version {version}, this program knows {VERSION}"
    );
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_left_is_read_again_unless_it_is_of_another_version() {
        let mut image = SavedImage::new("/a", 3, 9, "name");
        image.bootstrap = "/b".into();
        let deposit = |note: String, body: Option<&[u8]>| Deposit {
            note,
            files: std::iter::once(File::open("/dev/null").unwrap().into())
                .chain(body.map(|body| text::store(body).unwrap()))
                .collect(),
        };
        let note = serde_json::to_string(&image).unwrap();
        let left = Left::parse(deposit(note.clone(), Some(b"body"))).unwrap();
        assert_eq!(left.saved, image);
        assert_eq!(left.origin, Origin::Api(b"body".to_vec()));
        let left = Left::parse(deposit(note.clone(), None)).unwrap();
        assert_eq!(left.origin, Origin::CommandLine);
        let newer = note.replace("\"version\":1", "\"version\":2");
        let error = Left::parse(deposit(newer, None)).unwrap_err().to_string();
        assert!(error.contains("version 2"), "{error}");
        assert!(Left::parse(deposit("{}".to_owned(), None)).is_err());

        let mut table = SavedTable::new(vec![9], (3, 9), Vec::new(), Scopes::new());
        let saved = |table: &SavedTable| Deposit {
            note: String::new(),
            files: vec![text::store(&serde_json::to_vec(table).unwrap()).unwrap()],
        };
        assert_eq!(SavedTable::parse(&saved(&table)).unwrap().images, [9]);
        table.version = 2;
        assert!(SavedTable::parse(&saved(&table)).is_err());
    }
}
