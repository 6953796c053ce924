//! Reads an image with the published `nydus-rafs` crate, as its daemon would.
//!
//! [`image`] loads the bootstrap (or a blob with an inlined one), walks the tree,
//! runs the crate's own validation on every inode, looks up the record of every
//! chunk, and reads every byte through the crate's FUSE entry points over a local
//! blob directory and a file cache. Chunk validation is on.
//!
//! Promises: the cache is a fresh directory, because the crate believes whatever
//! an older cache says. The crate may panic on images it dislikes; [`image`]
//! turns that into an error. Where to read next: `build.rs`.

use std::ffi::{OsStr, OsString};
use std::io::{self, Read, Write};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::panic::{self, AssertUnwindSafe};
use std::path::Path;
use std::str::FromStr;
use std::sync::Arc;

use anyhow::{Context, Result, anyhow, bail};
use fuse_backend_rs::api::filesystem::{Context as Caller, FileSystem, ZeroCopyWriter};
use fuse_backend_rs::file_buf::FileVolatileSlice;
use fuse_backend_rs::file_traits::FileReadWriteVolatile;
use nydus_api::ConfigV2;
use nydus_rafs::fs::Rafs;
use nydus_rafs::metadata::{RafsInodeExt, RafsInodeWalkAction, RafsSuper};
use serde_json::json;
use vm_memory::VolatileSlice;

use crate::describe::{Entry, FileFacts, hash, join, name_hard_links, text};

/// Bytes asked for at once: what the kernel asks of a FUSE server at most.
const PIECE: u32 = 1 << 20;

/// Reads the image at `boot` (a bootstrap, or a blob with an inlined one) whose
/// blobs are in `blob_dir`, and describes all of it.
pub fn image(boot: &Path, blob_dir: &Path) -> Result<Vec<Entry>> {
    let read = AssertUnwindSafe(|| Reader::open(boot, blob_dir)?.tree());
    panic::catch_unwind(read).unwrap_or_else(|cause| {
        let text = cause.downcast_ref::<String>().cloned();
        let text = text.or_else(|| cause.downcast_ref::<&str>().map(|s| (*s).to_string()));
        Err(anyhow!("the reader panicked: {}", text.unwrap_or_default()))
    })
}

struct Reader {
    /// Metadata exactly as stored.
    meta: RafsSuper,
    /// The same image behind the FUSE interface, which alters some attributes.
    fs: Rafs,
    /// Keeps the cache directory until the reading is over.
    _cache: tempfile::TempDir,
}

impl Reader {
    fn open(boot: &Path, blob_dir: &Path) -> Result<Self> {
        let cache = tempfile::tempdir()?;
        let config = config(blob_dir, cache.path())?;
        let (mut fs, file) = Rafs::new(&config, "oracle", boot)
            .map_err(|e| anyhow!("load {}: {e:?}", boot.display()))?;
        fs.import(file, None)
            .map_err(|e| anyhow!("import: {e:?}"))?;
        let (meta, _) = RafsSuper::load_from_file(boot, config, false)
            .with_context(|| format!("load metadata of {}", boot.display()))?;
        Ok(Self {
            meta,
            fs,
            _cache: cache,
        })
    }

    fn tree(&self) -> Result<Vec<Entry>> {
        let root = self.meta.superblock.root_ino();
        let root = self
            .meta
            .get_extended_inode(root, true)
            .context("root inode")?;
        let mut found = Vec::new();
        self.walk(&root, b"/", &mut found)?;
        found.sort_by(|a, b| a.0.path.cmp(&b.0.path));
        let (mut tree, inodes): (Vec<_>, Vec<_>) = found.into_iter().unzip();
        name_hard_links(&mut tree, &inodes);
        Ok(tree)
    }

    /// Children are reached by name: looked up by number, the crate only knows directories.
    fn walk(
        &self,
        inode: &Arc<dyn RafsInodeExt>,
        path: &[u8],
        found: &mut Vec<(Entry, u64)>,
    ) -> Result<()> {
        let limit = self.meta.get_max_ino();
        inode
            .validate(limit, u64::from(self.meta.meta.chunk_size))
            .with_context(|| format!("validate {}", text(path)))?;
        let entry = self
            .entry(inode.as_ref(), path)
            .with_context(|| text(path))?;
        let is_dir = entry.is_dir();
        found.push((entry, inode.ino()));
        if is_dir {
            for (name, number) in children(inode.as_ref()).with_context(|| text(path))? {
                let path = join(path, name.as_bytes());
                let child = inode
                    .get_child_by_name(&name)
                    .with_context(|| text(&path))?;
                if child.ino() != number {
                    let found = child.ino();
                    bail!(
                        "{}: lookup finds inode {found}, listing {number}",
                        text(&path)
                    );
                }
                self.walk(&child, &path, found)?;
            }
        }
        Ok(())
    }

    fn entry(&self, inode: &dyn RafsInodeExt, path: &[u8]) -> Result<Entry> {
        let attr = inode.get_attr();
        // Stored as two's complement for times before 1970.
        let seconds = i64::from_ne_bytes(attr.mtime.to_ne_bytes());
        let mut entry = Entry {
            path: path.to_vec(),
            mode: attr.mode,
            uid: attr.uid,
            gid: attr.gid,
            mtime_ns: i128::from(seconds) * 1_000_000_000 + i128::from(attr.mtimensec),
            ..Entry::default()
        };
        if entry.is_file() {
            check_chunks(inode)?;
            let content = Content {
                fs: &self.fs,
                ino: inode.ino(),
                at: 0,
            };
            let (size, sha256) = hash(content).context("read content")?;
            if size != attr.size {
                bail!("read {size} bytes, the size says {}", attr.size);
            }
            let nlink = u64::from(attr.nlink);
            entry.file = Some(FileFacts {
                size,
                sha256,
                nlink,
                same_as: None,
            });
        } else if entry.is_symlink() {
            entry.target = Some(inode.get_symlink()?.into_vec());
        } else if entry.is_device() {
            let dev = u64::from(inode.rdev());
            // Linux's 32-bit "new" device encoding.
            entry.rdev = Some(((dev >> 8) & 0xfff, dev & 0xff | (dev >> 12) & 0xf_ff00));
        }
        for key in inode.get_xattrs().context("list xattrs")? {
            let value = inode.get_xattr(OsStr::from_bytes(&key))?;
            let value = value.with_context(|| format!("listed xattr {key:?} has no value"))?;
            entry.xattrs.insert(key, value);
        }
        Ok(entry)
    }
}

/// Name and inode number of everything in a directory but `.` and `..`.
fn children(dir: &dyn RafsInodeExt) -> Result<Vec<(OsString, u64)>> {
    let mut all = Vec::new();
    dir.walk_children_inodes(0, &mut |_, name, ino, _| {
        if name != "." && name != ".." {
            all.push((name, ino));
        }
        Ok(RafsInodeWalkAction::Continue)
    })?;
    Ok(all)
}

/// Every chunk of a file has a record, and they add up to its size.
fn check_chunks(file: &dyn RafsInodeExt) -> Result<()> {
    let mut total = 0;
    for index in 0..file.get_chunk_count() {
        let chunk = file
            .get_chunk_info(index)
            .with_context(|| format!("chunk {index}"))?;
        total += u64::from(chunk.uncompressed_size());
    }
    if total != file.size() {
        bail!("chunks hold {total} bytes, the file {}", file.size());
    }
    Ok(())
}

/// A regular file's content as a stream, one FUSE read per piece.
struct Content<'a> {
    fs: &'a Rafs,
    ino: u64,
    at: u64,
}

impl Read for Content<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let want = u32::try_from(buffer.len()).unwrap_or(PIECE).min(PIECE);
        let mut sink = Sink {
            space: buffer,
            used: 0,
        };
        let caller = Caller::default();
        let n = self
            .fs
            .read(&caller, self.ino, 0, &mut sink, want, self.at, None, 0)?;
        if n != sink.used {
            return Err(io::Error::other(format!(
                "reports {n} bytes, gave {}",
                sink.used
            )));
        }
        self.at += u64::try_from(n).map_err(io::Error::other)?;
        Ok(n)
    }
}

/// Where the crate puts the bytes of one read.
struct Sink<'a> {
    space: &'a mut [u8],
    used: usize,
}

impl Write for Sink<'_> {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        let n = (&mut self.space[self.used..]).write(data)?;
        self.used += n;
        Ok(n)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl ZeroCopyWriter for Sink<'_> {
    fn write_from(
        &mut self,
        from: &mut dyn FileReadWriteVolatile,
        count: usize,
        offset: u64,
    ) -> io::Result<usize> {
        let end = self.space.len().min(self.used.saturating_add(count));
        let slice = VolatileSlice::from(&mut self.space[self.used..end]);
        let n = from.read_at_volatile(FileVolatileSlice::from_volatile_slice(&slice), offset)?;
        self.used += n;
        Ok(n)
    }

    fn available_bytes(&self) -> usize {
        self.space.len() - self.used
    }
}

/// Local blobs, a file cache in `cache`, chunk validation on, no prefetch.
fn config(blob_dir: &Path, cache: &Path) -> Result<Arc<ConfigV2>> {
    let settings = json!({
        "version": 2,
        "backend": { "type": "localfs", "localfs": { "dir": blob_dir } },
        "cache": {
            "type": "filecache",
            "validate": true,
            "filecache": { "work_dir": cache },
        },
        "rafs": { "mode": "direct", "enable_xattr": true },
    });
    let config =
        ConfigV2::from_str(&settings.to_string()).context("configuration of the reader")?;
    Ok(Arc::new(config))
}
