//! What lies in the cache directory: which blobs, how large, when used last, by whom.
//!
//! Everything is read from the directory itself, so that several processes, and tools
//! that know the names of the files, always see the same. Other files are left alone.

use std::collections::BTreeMap;
use std::fs::{self, File, Metadata};
use std::io;
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use super::locks;
use super::{CacheDir, CacheError, DATA, MAP, SUSPECTS, TABLE, VOUCHED};

/// Ends of names, longest first where one ends with another.
const SUFFIXES: [&str; 5] = [MAP, SUSPECTS, VOUCHED, DATA, TABLE];

/// A temporary file that is older was left behind by a process that died.
const STALE: Duration = Duration::from_secs(3600);

/// A blob in the cache directory.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct CachedBlob {
    /// The blob id; with a fingerprint behind it if an image contradicted others.
    pub name: String,
    /// Disk space of all its files, in bytes.
    pub bytes: u64,
    /// When it was opened, closed or written to last.
    pub last_used: SystemTime,
    /// Whether any process has it open.
    pub in_use: bool,
    /// Whether its files are of a kind that [`CacheDir::gc`] deletes.
    pub collectable: bool,
}

/// How much space the cache takes and how much there is, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// Disk space of all blobs.
    pub bytes: u64,
    /// Number of blobs.
    pub blobs: u64,
    /// Of those bytes, what belongs to blobs that some process has open.
    pub bytes_in_use: u64,
    /// Size of the file system.
    pub disk_size: u64,
    /// Free space of the file system.
    pub disk_free: u64,
}

/// The files of one blob.
#[derive(Debug, Default)]
struct Files {
    bytes: u64,
    data: Option<(PathBuf, Metadata)>,
    vouched: bool,
    /// Map files, which mean nothing without a data file.
    maps: Vec<(PathBuf, Metadata)>,
}

impl CacheDir {
    /// Every blob in the directory, the least recently used first.
    ///
    /// # Errors
    /// If the directory cannot be read.
    pub fn list(&self) -> Result<Vec<CachedBlob>, CacheError> {
        let mut blobs: Vec<_> = self
            .scan()?
            .into_iter()
            .map(|(name, files)| files.describe(name))
            .collect();
        blobs.sort_by_key(|blob| blob.last_used);
        Ok(blobs)
    }

    /// Space taken and space left.
    ///
    /// # Errors
    /// If the directory cannot be read.
    pub fn usage(&self) -> Result<Usage, CacheError> {
        let mut usage = Usage::default();
        for blob in self.list()? {
            usage.blobs += 1;
            usage.bytes = usage.bytes.saturating_add(blob.bytes);
            if blob.in_use {
                usage.bytes_in_use = usage.bytes_in_use.saturating_add(blob.bytes);
            }
        }
        (usage.disk_size, usage.disk_free) = self.disk()?;
        Ok(usage)
    }

    /// Size and free space of the file system, in bytes.
    pub(super) fn disk(&self) -> Result<(u64, u64), CacheError> {
        let stat = nix::sys::statvfs::statvfs(self.path())
            .map_err(|errno| self.failed("reading the free space", errno.into()))?;
        let unit = stat.fragment_size();
        let bytes = |blocks: u64| blocks.saturating_mul(unit);
        Ok((bytes(stat.blocks()), bytes(stat.blocks_available())))
    }

    pub(super) fn failed(&self, action: &'static str, source: io::Error) -> CacheError {
        CacheError::new(self.path(), action, source)
    }

    fn scan(&self) -> Result<BTreeMap<String, Files>, CacheError> {
        let failed = |source| self.failed("reading the directory", source);
        let mut found: BTreeMap<String, Files> = BTreeMap::new();
        for entry in fs::read_dir(self.path()).map_err(failed)? {
            let entry = entry.map_err(failed)?;
            let Ok(file_name) = entry.file_name().into_string() else {
                continue;
            };
            let Some((name, suffix)) = split(&file_name) else {
                continue;
            };
            // Gone meanwhile: somebody else is clearing up.
            let Ok(meta) = entry.metadata() else { continue };
            if meta.is_file() {
                let files = found.entry(name.to_owned()).or_default();
                files.add(entry.path(), suffix, meta);
            }
        }
        Ok(found)
    }

    /// Deletes what processes that died left behind: temporary files, and maps
    /// without a data file.
    pub(super) fn clear_up(&self) -> Result<(), CacheError> {
        let stale = |meta: &Metadata| {
            let age = meta.modified().ok().and_then(|at| at.elapsed().ok());
            age.is_some_and(|age| age > STALE)
        };
        for entry in fs::read_dir(self.path())
            .map_err(|source| self.failed("reading the directory", source))?
            .flatten()
        {
            let ours = entry.file_name().to_str().is_some_and(is_temporary);
            if ours && entry.metadata().is_ok_and(|meta| stale(&meta)) {
                // If it is gone already, so much the better.
                let _ = fs::remove_file(entry.path());
            }
        }
        for files in self.scan()?.into_values() {
            if files.data.is_none() {
                for (path, meta) in files.maps {
                    if stale(&meta) {
                        let _ = fs::remove_file(path);
                    }
                }
            }
        }
        Ok(())
    }
}

impl Files {
    fn add(&mut self, path: PathBuf, suffix: &str, meta: Metadata) {
        // In units of 512 bytes, whatever the file system.
        self.bytes = self.bytes.saturating_add(meta.blocks().saturating_mul(512));
        match suffix {
            DATA => self.data = Some((path, meta)),
            VOUCHED => {
                self.vouched = true;
                self.maps.push((path, meta));
            }
            MAP | SUSPECTS => self.maps.push((path, meta)),
            _ => {}
        }
    }

    fn describe(self, name: String) -> CachedBlob {
        let data = self.data.as_ref();
        let last_used = data.map_or(SystemTime::UNIX_EPOCH, |(_, meta)| last_used(meta));
        CachedBlob {
            name,
            bytes: self.bytes,
            last_used,
            in_use: data.is_some_and(|(path, _)| in_use(path)),
            collectable: data.is_some() && self.vouched,
        }
    }
}

/// A file name of the cache as name of the blob and kind of file.
fn split(file_name: &str) -> Option<(&str, &'static str)> {
    let suffix = SUFFIXES.iter().find(|end| file_name.ends_with(**end))?;
    let name = file_name.strip_suffix(suffix)?;
    let allowed = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-');
    (!name.is_empty() && !name.starts_with('.') && name.bytes().all(allowed))
        .then_some((name, *suffix))
}

/// Whether the name is one that [`temporary_name`](super::temporary_name) gives to a
/// file of the cache.
fn is_temporary(file_name: &str) -> bool {
    let Some(rest) = file_name.strip_suffix(".tmp") else {
        return false;
    };
    let digits = |text: &str| !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
    rest.rsplit_once('.').is_some_and(|(target, owner)| {
        let owner = owner.split_once('-');
        split(target).is_some() && owner.is_some_and(|(pid, n)| digits(pid) && digits(n))
    })
}

fn last_used(meta: &Metadata) -> SystemTime {
    let time = |time: io::Result<SystemTime>| time.unwrap_or(SystemTime::UNIX_EPOCH);
    time(meta.accessed()).max(time(meta.modified()))
}

fn in_use(data: &Path) -> bool {
    // Who cannot ask must assume that it is.
    open_existing(data).is_none_or(|file| locks::is_locked(&file, locks::IN_USE).unwrap_or(true))
}

/// A data file, without making one.
pub(super) fn open_existing(data: &Path) -> Option<File> {
    let mut options = File::options();
    options.read(true).write(true);
    options.custom_flags(libc::O_NONBLOCK | libc::O_NOFOLLOW);
    options.open(data).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_told_apart() {
        assert_eq!(split("a.blob.data"), Some(("a", DATA)));
        assert_eq!(split("a.blob.data.chunk_map"), Some(("a", MAP)));
        assert_eq!(split("a.b-c.blob.meta"), Some(("a.b-c", TABLE)));
        for other in ["a", ".blob.data", "..blob.data", "a b.blob.data", "a.data"] {
            assert_eq!(split(other), None, "{other}");
        }
        assert!(is_temporary("a.blob.meta.17-3.tmp"));
        for other in ["a.tmp", "a.17-3.tmp", "a.blob.meta.x-3.tmp", "a.blob.meta"] {
            assert!(!is_temporary(other), "{other}");
        }
    }
}
