//! A layer from a directory: first the names and attributes of all files, on all
//! cores, then the data of the regular ones, in the order in which an image stores
//! them.
//!
//! Symbolic links are never followed. Files with several names are found by their
//! device and inode number. Holes are asked for and skipped. The next files are
//! opened early and the kernel is told to read them, so that a slow disk works
//! while the processors do.

use std::collections::{HashMap, HashSet, VecDeque};
use std::ffi::{OsStr, OsString};
use std::fs::{File, Metadata, OpenOptions};
use std::io;
use std::ops::Range;
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};
use std::os::unix::fs::{FileExt as _, FileTypeExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use nix::errno::Errno;
use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};
use nix::sys::stat::{major, minor};
use nix::unistd::{Whence, lseek};
use rafs::merge::WhiteoutSpec;
use rafs::tree::{Attr, Content, Inode, InodeId, Tree, Xattrs};

use super::{Scanned, SourceError, encode_device, xattr_problem};
use crate::build::BuildOptions;
use crate::pipeline::feeder::{FeedError, Feeder};

/// Files that are open ahead of the one being read.
const AHEAD: usize = 8;

/// Bytes of each of them that the kernel is asked to read.
const AHEAD_BYTES: i64 = 4 << 20;

/// Why a directory could not be read.
#[derive(Debug, thiserror::Error)]
pub enum DirError {
    /// The system refused something.
    #[error("cannot {action} {}", path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// With which file.
        path: PathBuf,
        /// What the system says.
        source: io::Error,
    },
    /// A file was written to or replaced while it was read.
    #[error("{} changed while it was being read: {what}", path.display())]
    Changed {
        /// The file.
        path: PathBuf,
        /// How that was noticed.
        what: &'static str,
    },
    /// Something that an image cannot hold.
    #[error("{}: {what}", path.display())]
    Unsupported {
        /// The file.
        path: PathBuf,
        /// Why not.
        what: String,
    },
}

type Result<T, E = DirError> = std::result::Result<T, E>;

/// Reads everything below `root`.
pub(super) fn scan(
    root: &Path,
    feeder: &mut Feeder,
    options: &BuildOptions,
) -> Result<Scanned, SourceError> {
    let tree = Walker::walk(root, options)?;
    let order = Order::new(&tree, options);
    let files = feed(
        ReadAhead {
            root,
            order,
            open: VecDeque::new(),
        },
        feeder,
        options,
    )?;
    Ok(Scanned {
        tree,
        files,
        original: None,
    })
}

fn feed(
    mut reading: ReadAhead<'_>,
    feeder: &mut Feeder,
    options: &BuildOptions,
) -> Result<Vec<(InodeId, u64)>, SourceError> {
    let mut files = Vec::new();
    while let Some(mut file) = reading.next()? {
        let chunks = file.feed(feeder)?;
        if let Some(progress) = &options.progress {
            progress.add(file.size);
        }
        files.push((file.id, chunks));
    }
    Ok(files)
}

/// What a directory holds, as the system tells it.
type Listing = Vec<(OsString, Metadata, Xattrs, Content)>;

/// Makes a tree of what directories hold.
struct Walker {
    tree: Tree,
    /// Files with several names by device and inode number.
    links: HashMap<(u64, u64), InodeId>,
}

impl Walker {
    fn walk(root: &Path, options: &BuildOptions) -> Result<Tree> {
        let metadata = io_result("read", root, std::fs::metadata(root))?;
        if !metadata.is_dir() {
            let source = io::Error::from(Errno::ENOTDIR);
            return Err(DirError::Io {
                action: "list",
                path: root.to_owned(),
                source,
            });
        }
        let mut attr = attributes(&metadata);
        if !options.explicit_uid_gid {
            // The time of the root changes whenever a tree is copied or unpacked, so a
            // repeatable image does not have it.
            (attr.mtime, attr.mtime_nsec) = (0, 0);
        }
        let mut walker = Self {
            tree: Tree::new(attr),
            links: HashMap::new(),
        };
        let id = walker.tree.root();
        walker.tree.inode_mut(id).xattrs = xattrs(root, options)?;
        let mut listings = list_all(root, options)?;
        let mut pending = vec![(root.to_owned(), id)];
        while let Some((path, id)) = pending.pop() {
            let listing = listings.remove(&path).unwrap_or_default();
            walker.add(&path, id, listing, &mut pending)?;
        }
        Ok(walker.tree)
    }

    fn add(
        &mut self,
        path: &Path,
        dir: InodeId,
        listing: Listing,
        pending: &mut Vec<(PathBuf, InodeId)>,
    ) -> Result<()> {
        for (name, metadata, xattrs, content) in listing {
            let path = path.join(&name);
            if let Some(id) = self.links.get(&(metadata.dev(), metadata.ino())) {
                self.tree
                    .link(dir, name.as_bytes(), *id)
                    .map_err(|e| unsupported(&path, &e))?;
                continue;
            }
            let inode = Inode {
                attr: attributes(&metadata),
                xattrs,
                content,
                implied: false,
            };
            let id = self
                .tree
                .insert(dir, name.as_bytes(), inode)
                .map_err(|error| unsupported(&path, &error))?;
            if metadata.is_dir() {
                pending.push((path, id));
            } else if metadata.is_file() && metadata.nlink() > 1 {
                self.links.insert((metadata.dev(), metadata.ino()), id);
            }
        }
        Ok(())
    }
}

/// Lists everything below `root`, by directory.
fn list_all(root: &Path, options: &BuildOptions) -> Result<HashMap<PathBuf, Listing>> {
    let listings = Mutex::new(Ok(HashMap::new()));
    rayon::scope(|scope| list(scope, root.to_owned(), options, &listings));
    listings
        .into_inner()
        .unwrap_or_else(PoisonError::into_inner)
}

/// Lists a directory here and those in it wherever a core is free.
fn list<'a>(
    scope: &rayon::Scope<'a>,
    dir: PathBuf,
    options: &'a BuildOptions,
    listings: &'a Mutex<Result<HashMap<PathBuf, Listing>>>,
) {
    let found = list_one(&dir, options);
    for (name, metadata, ..) in found.iter().flatten() {
        if metadata.is_dir() {
            let path = dir.join(name);
            scope.spawn(move |scope| list(scope, path, options, listings));
        }
    }
    let mut listings = listings.lock().unwrap_or_else(PoisonError::into_inner);
    match (&mut *listings, found) {
        (Ok(listings), Ok(found)) => {
            listings.insert(dir, found);
        }
        (Ok(_), Err(error)) => *listings = Err(error),
        (Err(_), _) => {}
    }
}

fn list_one(dir: &Path, options: &BuildOptions) -> Result<Listing> {
    let mut listing = Listing::new();
    for entry in io_result("list", dir, std::fs::read_dir(dir))? {
        let entry = io_result("list", dir, entry)?;
        let (path, name) = (entry.path(), entry.file_name());
        let metadata = io_result("read the attributes of", &path, entry.metadata())?;
        if is_whiteout(&name, &metadata, options) {
            continue;
        }
        let xattrs = xattrs(&path, options)?;
        let content = content(&path, &metadata)?;
        listing.push((name, metadata, xattrs, content));
    }
    Ok(listing)
}

/// Whether the entry removes something from lower layers, of which there are none.
fn is_whiteout(name: &OsStr, metadata: &Metadata, options: &BuildOptions) -> bool {
    match options.whiteouts {
        WhiteoutSpec::Oci => name.as_bytes().starts_with(b".wh."),
        WhiteoutSpec::Overlayfs => metadata.file_type().is_char_device() && metadata.rdev() == 0,
        WhiteoutSpec::None => false,
    }
}

fn xattrs(path: &Path, options: &BuildOptions) -> Result<Xattrs> {
    let mut found = Xattrs::new();
    let keys = match xattr::list(path) {
        Ok(keys) => keys,
        Err(error) if error.raw_os_error() == Some(libc::EOPNOTSUPP) => return Ok(found),
        result => io_result("list the extended attributes of", path, result)?,
    };
    for key in keys {
        let value = io_result(
            "read an extended attribute of",
            path,
            xattr::get(path, &key),
        )?;
        // Removed since it was listed.
        let Some(value) = value else { continue };
        let overlay = options.whiteouts == WhiteoutSpec::Overlayfs;
        if overlay && key == "trusted.overlay.opaque" {
            continue;
        }
        if let Some(what) = xattr_problem(key.as_bytes(), &value) {
            return Err(DirError::Unsupported {
                path: path.to_owned(),
                what,
            });
        }
        found.insert(key.into_vec().into(), value.into());
    }
    Ok(found)
}

fn content(path: &Path, metadata: &Metadata) -> Result<Content> {
    let kind = metadata.file_type();
    let device = || {
        let number = metadata.rdev();
        encode_device(major(number), minor(number))
            .ok_or_else(|| unsupported(path, &"its device number is too large"))
    };
    Ok(if kind.is_dir() {
        Content::directory()
    } else if kind.is_file() {
        Content::File {
            size: metadata.size(),
            chunks: Vec::new(),
        }
    } else if kind.is_symlink() {
        let target = io_result("read the link", path, std::fs::read_link(path))?;
        Content::Symlink(target.into_os_string().into_vec().into())
    } else if kind.is_char_device() {
        Content::CharDevice(device()?)
    } else if kind.is_block_device() {
        Content::BlockDevice(device()?)
    } else if kind.is_fifo() {
        Content::Fifo
    } else if kind.is_socket() {
        Content::Socket
    } else {
        return Err(unsupported(path, &"a file of an unknown type"));
    })
}

fn attributes(metadata: &Metadata) -> Attr {
    Attr {
        // The mask leaves 12 bits.
        permissions: u16::try_from(metadata.mode() & 0o7777).unwrap_or_default(),
        uid: metadata.uid(),
        gid: metadata.gid(),
        mtime: metadata.mtime(),
        mtime_nsec: u32::try_from(metadata.mtime_nsec()).unwrap_or_default(),
    }
}

/// Regular files with data, each once, in the order in which an image stores them.
struct Order<'a> {
    tree: &'a Tree,
    walk: Box<dyn Iterator<Item = (Vec<u8>, InodeId)> + 'a>,
    seen: HashSet<InodeId>,
}

impl<'a> Order<'a> {
    fn new(tree: &'a Tree, options: &'a BuildOptions) -> Self {
        let all = tree.walk().map(|entry| (entry.path, entry.id));
        // What is prefetched comes first, so that prefetching reads one run of bytes.
        let first = options.prefetch.first_in_blob(tree);
        Self {
            tree,
            walk: Box::new(first.chain(all)),
            seen: HashSet::new(),
        }
    }

    fn next(&mut self) -> Option<(Vec<u8>, InodeId, u64)> {
        self.walk
            .by_ref()
            .find_map(|(path, id)| match &self.tree.inode(id).content {
                Content::File { size, .. } if *size > 0 && self.seen.insert(id) => {
                    Some((path, id, *size))
                }
                _ => None,
            })
    }
}

/// Opens files some steps before they are read.
struct ReadAhead<'a> {
    root: &'a Path,
    order: Order<'a>,
    open: VecDeque<OpenFile>,
}

impl ReadAhead<'_> {
    fn next(&mut self) -> Result<Option<OpenFile>> {
        while self.open.len() < AHEAD {
            let Some((path, id, size)) = self.order.next() else {
                break;
            };
            let relative = path.strip_prefix(b"/").unwrap_or(&path);
            let path = self.root.join(OsStr::from_bytes(relative));
            self.open.push_back(OpenFile::open(path, id, size)?);
        }
        Ok(self.open.pop_front())
    }
}

struct OpenFile {
    path: PathBuf,
    id: InodeId,
    /// Length when the tree was walked.
    size: u64,
    file: File,
    blocks: u64,
}

impl OpenFile {
    fn open(path: PathBuf, id: InodeId, size: u64) -> Result<Self> {
        // Without O_NONBLOCK a FIFO that took the file's place would block the build.
        let flags = libc::O_NOFOLLOW | libc::O_NONBLOCK | libc::O_CLOEXEC;
        let file = io_result(
            "open",
            &path,
            OpenOptions::new()
                .read(true)
                .custom_flags(flags)
                .open(&path),
        )?;
        let metadata = io_result("read the attributes of", &path, file.metadata())?;
        if !metadata.is_file() {
            return Err(DirError::Changed {
                path,
                what: "it is no regular file any more",
            });
        }
        if metadata.size() < size {
            return Err(DirError::Changed {
                path,
                what: "it became shorter",
            });
        }
        // Only a hint; a file system without it is no reason to fail.
        let _ = posix_fadvise(
            &file,
            0,
            AHEAD_BYTES,
            PosixFadviseAdvice::POSIX_FADV_WILLNEED,
        );
        Ok(Self {
            path,
            id,
            size,
            file,
            blocks: metadata.blocks(),
        })
    }

    fn feed(&mut self, feeder: &mut Feeder) -> Result<u64, SourceError> {
        let data = self.data_ranges()?;
        let read = |offset, buf: &mut [u8]| {
            self.file
                .read_exact_at(buf, offset)
                .map_err(|source| match source.kind() {
                    io::ErrorKind::UnexpectedEof => DirError::Changed {
                        path: self.path.clone(),
                        what: "it became shorter",
                    },
                    _ => DirError::Io {
                        action: "read",
                        path: self.path.clone(),
                        source,
                    },
                })
        };
        feeder
            .file(self.size, &data, read)
            .map_err(|error| match error {
                FeedError::Source(error) => error.into(),
                FeedError::Stopped => SourceError::Stopped,
                FeedError::TooLarge { .. } => unsupported(&self.path, &error).into(),
            })
    }

    /// The ranges of the file that are not holes.
    fn data_ranges(&self) -> Result<Vec<Range<u64>>> {
        if self.blocks.saturating_mul(512) >= self.size {
            return Ok(std::iter::once(0..self.size).collect());
        }
        let mut ranges = Vec::new();
        let mut at = 0;
        while at < self.size {
            let Some(start) = self.seek(at, Whence::SeekData)? else {
                break;
            };
            let Some(end) = self.seek(start, Whence::SeekHole)? else {
                break;
            };
            if start >= self.size || end <= start {
                break;
            }
            ranges.push(start..end.min(self.size));
            at = end;
        }
        Ok(ranges)
    }

    /// The next data or hole at or after `at`; `None` if there is none.
    fn seek(&self, at: u64, whence: Whence) -> Result<Option<u64>> {
        let failed = |errno: Errno| DirError::Io {
            action: "find the holes of",
            path: self.path.clone(),
            source: errno.into(),
        };
        let offset = i64::try_from(at).map_err(|_range| failed(Errno::EOVERFLOW))?;
        match lseek(&self.file, offset, whence) {
            Ok(found) => Ok(u64::try_from(found).ok()),
            Err(Errno::ENXIO) => Ok(None),
            Err(errno) => Err(failed(errno)),
        }
    }
}

fn io_result<T>(action: &'static str, path: &Path, result: io::Result<T>) -> Result<T> {
    result.map_err(|source| DirError::Io {
        action,
        path: path.to_owned(),
        source,
    })
}

fn unsupported(path: &Path, what: &impl std::fmt::Display) -> DirError {
    DirError::Unsupported {
        path: path.to_owned(),
        what: what.to_string(),
    }
}
