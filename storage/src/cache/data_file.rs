//! Opens the files of a blob so that the ready map never says more than the data
//! file holds, and nothing that this image did not vouch for.
//!
//! All of it happens under [`Opening`], held for a few system calls and never during
//! a fetch. What does not fit together is replaced by new files, never repaired in
//! place: another process may have the old ones open and believe them.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use super::locks::{self, Mode, Opening};
use super::vouched::{self, Admission, View};
use super::{CacheDir, CacheError, OpenFiles};
use crate::blob_id::BlobId;
use crate::ready_map::{BootId, Candidate, DataFileId, Found, ReadyMap};

/// Attempts to open files that others keep deleting.
const ATTEMPTS: u32 = 5;

/// Paths of the files of a blob.
#[derive(Clone, Debug)]
pub(super) struct Paths {
    pub(super) data: PathBuf,
    pub(super) map: PathBuf,
    pub(super) suspects: PathBuf,
    pub(super) vouched: PathBuf,
}

impl Paths {
    /// * `name`: the blob id, or what stands for it.
    pub(super) fn new(dir: &CacheDir, name: &str) -> Self {
        let path = |suffix| dir.path().join(format!("{name}{suffix}"));
        Self {
            data: path(super::DATA),
            map: path(super::MAP),
            suspects: path(super::SUSPECTS),
            vouched: path(super::VOUCHED),
        }
    }

    /// Deletes what says that the data file holds something, then the data file.
    pub(super) fn discard(&self) -> Result<(), CacheError> {
        for path in [&self.map, &self.suspects, &self.vouched, &self.data] {
            remove(path).map_err(|source| CacheError::new(path, "removing", source))?;
        }
        Ok(())
    }
}

/// Opens the files of a blob: the usual ones or, if another image says something
/// else about the blob, those of the images that say the same as this one.
pub(super) fn open(
    dir: &CacheDir,
    blob: &BlobId,
    view: &View<'_>,
    boot: &BootId,
) -> Result<OpenFiles, CacheError> {
    let name = blob.to_string();
    if let Some(files) = open_named(dir, &name, view, boot)? {
        return Ok(files);
    }
    let other = format!("{name}.{}", vouched::fingerprint(view));
    tracing::warn!(
        %blob,
        files = %other,
        "cached for an image with other digests of the same blob; this image gets files of its own"
    );
    open_named(dir, &other, view, boot)?.ok_or_else(|| {
        let path = Paths::new(dir, &other).data;
        let source = io::Error::other("in use for an image with other digests of the same blob");
        CacheError::new(&path, "opening", source)
    })
}

/// `None` if the files belong to an image that contradicts this one.
fn open_named(
    dir: &CacheDir,
    name: &str,
    view: &View<'_>,
    boot: &BootId,
) -> Result<Option<OpenFiles>, CacheError> {
    let paths = Paths::new(dir, name);
    for _ in 0..ATTEMPTS {
        match Attempt::new(&paths, view, boot)?.run()? {
            Step::Done(files) => return Ok(Some(files)),
            Step::Contradiction => return Ok(None),
            Step::Again => {}
        }
    }
    let source = io::Error::other("the file keeps vanishing");
    Err(CacheError::new(&paths.data, "opening", source))
}

enum Step {
    Done(OpenFiles),
    Contradiction,
    /// Files were removed, by somebody else or by us.
    Again,
}

struct Attempt<'a> {
    paths: &'a Paths,
    view: &'a View<'a>,
    boot: &'a BootId,
    data: File,
}

impl<'a> Attempt<'a> {
    fn new(paths: &'a Paths, view: &'a View<'a>, boot: &'a BootId) -> Result<Self, CacheError> {
        let data = open_data(&paths.data)
            .map_err(|source| CacheError::new(&paths.data, "opening", source))?;
        Ok(Self {
            paths,
            view,
            boot,
            data,
        })
    }

    fn failed(&self, action: &'static str) -> impl Fn(io::Error) -> CacheError {
        let path = self.paths.data.clone();
        move |source| CacheError::new(&path, action, source)
    }

    fn run(self) -> Result<Step, CacheError> {
        let guard = Opening::take(&self.data).map_err(self.failed("locking"))?;
        let meta = self
            .data
            .metadata()
            .map_err(self.failed("reading the length"))?;
        if meta.nlink() == 0 {
            return Ok(Step::Again); // Deleted between opening and locking.
        }
        if let Some(step) = self.check_length(meta.len())? {
            return Ok(step);
        }
        let step = self.open_map()?;
        drop(guard);
        match step {
            Ok(map) => {
                let chunk_locks = open_again(&self.data).map_err(self.failed("opening again"))?;
                let paths = self.paths.clone();
                Ok(Step::Done(OpenFiles::new(
                    self.data,
                    chunk_locks,
                    map,
                    paths,
                )))
            }
            Err(step) => Ok(step),
        }
    }

    /// Gives a new data file its length. `Some` if the file cannot be used.
    fn check_length(&self, len: u64) -> Result<Option<Step>, CacheError> {
        let size = self.view.size;
        if len == size && len > 0 {
            return Ok(None);
        }
        if len == 0 && !self.paths.map.exists() {
            self.data
                .set_len(size)
                .map_err(self.failed("setting the length"))?;
            return Ok(None);
        }
        if len > 0 && vouched::is_of_size(&self.paths.vouched, len).unwrap_or(false) {
            return Ok(Some(Step::Contradiction));
        }
        // Somebody shortened it, or it was never ours. Not extended in place: to others
        // who have it open the new part would look like data.
        tracing::warn!(
            path = %self.paths.data.display(),
            found = len,
            expected = size,
            "cache file has a wrong length; starting from empty"
        );
        self.paths.discard()?;
        Ok(Some(Step::Again))
    }

    /// The map, if this image may believe it.
    fn open_map(&self) -> Result<Result<ReadyMap, Step>, CacheError> {
        let opening = |path: &Path| {
            let path = path.to_owned();
            move |source| CacheError::new(&path, "opening", source)
        };
        let id = DataFileId::of(&self.data).map_err(self.failed("opening"))?;
        let map = ReadyMap::find(&self.paths.map, self.view.chunks, id, self.boot)
            .map_err(opening(&self.paths.map))?;
        match self.admit(&map).map_err(opening(&self.paths.vouched))? {
            Admission::Admitted => {}
            Admission::Contradiction => return Ok(Err(Step::Contradiction)),
            Admission::NoRecord => {
                // Chunks that are believed, but nobody knows for which image.
                self.paths.discard()?;
                return Ok(Err(Step::Again));
            }
        }
        // From here on nobody deletes the files; nobody does now, who would be opening.
        if !locks::try_lock(&self.data, locks::IN_USE, Mode::Shared)
            .map_err(self.failed("locking"))?
        {
            return Ok(Err(Step::Again));
        }
        map.open(&self.paths.suspects)
            .map(Ok)
            .map_err(opening(&self.paths.map))
    }

    fn admit(&self, map: &Candidate) -> io::Result<Admission> {
        let believed = matches!(map.found(), Found::Current | Found::Synced);
        // Others may believe what is doubted here: the map may have been deleted, or
        // there may be no boot id. What they vouched for stays valid.
        let alone = locks::try_lock(&self.data, locks::IN_USE, Mode::Exclusive)?;
        if believed || !alone {
            return vouched::admit(&self.paths.vouched, self.view);
        }
        vouched::start(&self.paths.vouched, self.view)
    }
}

fn open_data(path: &Path) -> io::Result<File> {
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        // A pipe in this place must not block the open.
        .custom_flags(libc::O_NONBLOCK | libc::O_NOFOLLOW)
        .open(path)?;
    if file.metadata()?.is_file() {
        Ok(super::unwatched::reopen(file))
    } else {
        Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            "not a regular file",
        ))
    }
}

/// Opens the very file again, whatever is at its path by now.
fn open_again(file: &File) -> io::Result<File> {
    let path = format!("/proc/self/fd/{}", file.as_raw_fd());
    OpenOptions::new().read(true).write(true).open(path)
}

pub(super) fn remove(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}
