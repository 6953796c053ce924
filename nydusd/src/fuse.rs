//! One image as a FUSE file system: kernel requests in, answers from the image
//! and its blobs out.
//!
//! Nothing here has state. A node number is a function of the image
//! ([`node`]), handles do not exist (`open` and `opendir` answer `ENOSYS`, which
//! the kernel takes as "no need to ask"), and everything the kernel learns it
//! may keep for ever. So a successor can answer the requests of a dead daemon,
//! and most system calls on the mount never reach us at all.
//!
//! A `read` is planned from the image alone, made resident by the blobs it
//! touches, and copied from their cache files into the reply buffer; it never
//! answers less than asked for, because the kernel would take a short answer as
//! zeros. Errors become numbers in [`errno`](crate::errno).
//!
//! The threads that call this: [`workers`]. The mount itself: [`session`].
//! The next step of a read: `rafs::fs`.

mod interrupts;
pub(crate) mod node;
pub(crate) mod notify;
pub(crate) mod read_only;
pub(crate) mod session;
pub(crate) mod teach;
pub(crate) mod workers;

use std::ffi::CStr;
use std::io;
use std::ops::{ControlFlow, Range};
use std::sync::Arc;
use std::time::Duration;

use fuse_backend_rs::abi::fuse_abi::{stat64, statvfs64};
use fuse_backend_rs::api::filesystem::{
    Context, DirEntry, Entry, FileSystem, FsOptions, GetxattrReply, ListxattrReply, OpenOptions,
    ZeroCopyWriter,
};
use rafs::image::Image;
use rafs::units::Nid;
use storage::BlobIndex;
use storage::backend::Priority;
use storage::blob::{Blob, ChunkSpan};
use storage::error::ReadError;
use storage::prefetch::Prefetch;

use crate::errno::{Failures, FsError};
use crate::record::Recorder;
use node::{Slot, attributes, dirent_type};

/// How long the kernel may keep what it was told: the image never changes.
const FOR_EVER: Duration = Duration::from_secs(100 * 365 * 24 * 3600);

/// One image, mounted.
#[derive(Debug)]
pub(crate) struct RafsFs {
    slot: Slot,
    image: Arc<Image>,
    /// In the order of the image's blob table.
    blobs: Vec<Arc<Blob>>,
    failures: Failures,
    background: Background,
}

/// What goes on beside the answers, until the mount ends.
#[derive(Debug, Default)]
pub(crate) struct Background {
    /// What is fetched before it is read.
    #[expect(dead_code, reason = "it is here to end with the mount")]
    pub prefetch: Option<Prefetch>,
    /// Who is told which files are read.
    pub recorder: Option<Recorder>,
}

/// What a read needs from one blob: consecutive in the file, in file order.
#[derive(Debug, PartialEq, Eq)]
struct Part {
    blob: BlobIndex,
    spans: Vec<ChunkSpan>,
}

impl RafsFs {
    /// * `blobs`: one for each entry of the image's blob table, in its order.
    pub(crate) fn new(
        slot: Slot,
        image: Arc<Image>,
        blobs: Vec<Arc<Blob>>,
        background: Background,
    ) -> Self {
        Self {
            slot,
            image,
            blobs,
            failures: Failures::default(),
            background,
        }
    }

    /// The image.
    pub(crate) fn image(&self) -> &Arc<Image> {
        &self.image
    }

    /// Its blobs, in the order of the image's blob table.
    pub(crate) fn blobs(&self) -> &[Arc<Blob>] {
        &self.blobs
    }

    /// The node number of the image's root, as a directory below another one.
    pub(crate) fn root_node(&self) -> u64 {
        self.slot.node(self.image.root())
    }

    /// What a file range still lacks, by blob: the chunks that are not resident.
    pub(crate) fn missing(&self, node: u64, offset: u64, size: u32) -> Vec<(String, Vec<u32>)> {
        let parts = self.plan(node, offset, size).unwrap_or_default();
        let lacking = parts.iter().filter_map(|part| {
            let blob = self.blob(part.blob).ok()?;
            let spans = part.spans.iter();
            let missing = spans.filter(|span| !blob.is_span_resident(span));
            let chunks: Vec<u32> = missing.map(|span| span.chunk.get()).collect();
            (!chunks.is_empty()).then(|| (blob.info().id.to_string(), chunks))
        });
        lacking.collect()
    }

    fn fail(&self, op: &'static str, node: u64, err: FsError) -> io::Error {
        self.failures.answer(op, node, err)
    }

    fn nid(&self, node: u64) -> Result<Nid, FsError> {
        self.slot
            .nid(node, self.image.root())
            .ok_or(FsError::UnknownNode(node))
    }

    fn entry(&self, nid: Nid) -> Result<Entry, FsError> {
        let inode = self.image.inode(nid)?;
        let node = self.slot.node(nid);
        Ok(Entry {
            inode: node,
            attr: attributes(node, &inode),
            attr_timeout: FOR_EVER,
            entry_timeout: FOR_EVER,
            ..Entry::default()
        })
    }

    fn find(&self, parent: u64, name: &[u8]) -> Result<Entry, FsError> {
        match self.image.lookup(self.nid(parent)?, name)? {
            Some(nid) => self.entry(nid),
            // Node 0 and a lifetime: the kernel remembers that there is nothing.
            None => Ok(Entry {
                entry_timeout: FOR_EVER,
                ..Entry::default()
            }),
        }
    }

    /// Calls `each` with every entry of a directory from `cookie` on, until it breaks.
    fn list(
        &self,
        node: u64,
        cookie: u64,
        mut each: impl FnMut(DirEntry<'_>, Nid) -> ControlFlow<()>,
    ) -> Result<(), FsError> {
        let dir = self.nid(node)?;
        self.image.readdir(dir, cookie, |entry| {
            let listed = DirEntry {
                ino: self.slot.node(entry.nid),
                offset: entry.next,
                type_: dirent_type(entry.kind),
                name: entry.name,
            };
            each(listed, entry.nid)
        })?;
        Ok(())
    }

    /// What a directory entry of this name leads to, for a listing with attributes.
    fn listed_entry(&self, name: &[u8], nid: Nid) -> Entry {
        // The kernel knows `.` and `..`. For an inode that is damaged node 0 says
        // "no attributes": the name stays listed, and using it tells the error.
        if name == b"." || name == b".." {
            return Entry::default();
        }
        self.entry(nid).unwrap_or_default()
    }

    /// The parts that hold a file range, in order, without holes; the range is
    /// cut at the end of the file.
    fn plan(&self, node: u64, offset: u64, size: u32) -> Result<Vec<Part>, FsError> {
        let range = offset..offset.saturating_add(u64::from(size));
        let mut parts: Vec<Part> = Vec::new();
        for extent in self.image.extents(self.nid(node)?, range) {
            let extent = extent?;
            let span = ChunkSpan {
                chunk: extent.chunk,
                plain: extent.plain,
            };
            match parts.last_mut() {
                Some(part) if part.blob == extent.blob => part.spans.push(span),
                _ => parts.push(Part {
                    blob: extent.blob,
                    spans: vec![span],
                }),
            }
        }
        Ok(parts)
    }

    fn blob(&self, index: BlobIndex) -> Result<&Blob, FsError> {
        self.blobs
            .get(index.as_usize())
            .map(Arc::as_ref)
            .ok_or(FsError::UnknownBlob(index))
    }

    /// Waits until a part is in the cache, as far as the cache takes it.
    fn fill(&self, part: &Part) -> Result<(), FsError> {
        match self
            .blob(part.blob)?
            .ensure_spans(&part.spans, Priority::OnDemand)
        {
            // Could be fetched but not kept: the copy goes by way of memory.
            Ok(()) | Err(ReadError::Cache { .. }) => Ok(()),
            Err(err) => Err(err.into()),
        }
    }

    /// Copies one part into the reply; waits until it is resident.
    fn copy(&self, part: &Part, out: &mut dyn ZeroCopyWriter) -> Result<usize, FsError> {
        let blob = self.blob(part.blob)?;
        let mut done = 0;
        match (
            blob.ensure_spans(&part.spans, Priority::OnDemand),
            blob.cache_file(),
        ) {
            (Ok(()), Some(file)) => {
                for run in joined(&part.spans) {
                    done += copy_file(file, &run, out).map_err(|error| {
                        blob.check_length();
                        FsError::Reply(error)
                    })?;
                }
            }
            // The cache cannot be written: the bytes come by way of memory.
            (Ok(()) | Err(ReadError::Cache { .. }), _) => {
                for span in &part.spans {
                    let mut bytes = vec![0; len(&span.plain)?];
                    blob.read_span(span, &mut bytes, Priority::OnDemand)?;
                    out.write_all(&bytes).map_err(FsError::Reply)?;
                    done += bytes.len();
                }
            }
            (Err(error), _) => return Err(error.into()),
        }
        Ok(done)
    }
}

/// What is asked of the kernel when a session begins.
pub(crate) fn options() -> FsOptions {
    FsOptions::ASYNC_READ
            | FsOptions::ASYNC_DIO
            | FsOptions::PARALLEL_DIROPS
            | FsOptions::MAX_PAGES
            // Always, not where the kernel thinks fit: it would ask for each entry of what
            // it had thought a mere listing, and attributes are at hand.
            | FsOptions::DO_READDIRPLUS
            | FsOptions::CACHE_SYMLINKS
            | FsOptions::ZERO_MESSAGE_OPEN
            | FsOptions::ZERO_MESSAGE_OPENDIR
            | FsOptions::EXPLICIT_INVAL_DATA
            // The kernel checks permissions; without this it would ignore ACLs.
            | FsOptions::POSIX_ACL
            // Bit 39 only counts together with the bit that says there are so many.
            | FsOptions::INIT_EXT
            | FsOptions::HAS_RESEND
}

/// The bytes of spans, with neighbours joined: one system call each.
fn joined(spans: &[ChunkSpan]) -> impl Iterator<Item = Range<u64>> + '_ {
    let touching = |a: &ChunkSpan, b: &ChunkSpan| a.plain.end == b.plain.start;
    spans
        .chunk_by(touching)
        .filter_map(|run| Some(run.first()?.plain.start..run.last()?.plain.end))
}

fn len(range: &Range<u64>) -> Result<usize, FsError> {
    // Never fails: a request is for at most a few MiB.
    usize::try_from(range.end.saturating_sub(range.start))
        .map_err(|_too_large| FsError::Reply(io::ErrorKind::InvalidInput.into()))
}

/// Reads a range of `file` straight into the reply buffer; says how long it was.
fn copy_file(
    file: &std::fs::File,
    range: &Range<u64>,
    out: &mut dyn ZeroCopyWriter,
) -> io::Result<usize> {
    use std::mem::ManuallyDrop;
    use std::os::fd::{AsRawFd as _, FromRawFd as _};
    let len = usize::try_from(range.end.saturating_sub(range.start)).map_err(io::Error::other)?;
    // The library wants `&mut File` although it only ever calls preadv on it.
    // SAFETY: the descriptor is open while `file` is borrowed, and ManuallyDrop
    // keeps this second owner from closing it.
    let mut alias = ManuallyDrop::new(unsafe { std::fs::File::from_raw_fd(file.as_raw_fd()) });
    out.write_all_from(&mut *alias, len, range.start)?;
    Ok(len)
}

impl workers::Residency for RafsFs {
    fn is_resident(&self, node: u64, offset: u64, size: u32) -> bool {
        let Ok(parts) = self.plan(node, offset, size) else {
            return true;
        };
        parts.iter().all(|part| {
            // What cannot be planned or found fails at once.
            let Ok(blob) = self.blob(part.blob) else {
                return true;
            };
            part.spans.iter().all(|span| blob.is_span_resident(span))
        })
    }

    fn make_resident(&self, read: &workers::Wanted) -> io::Result<()> {
        let made = self
            .plan(read.node, read.offset, read.size)
            .and_then(|parts| parts.iter().try_for_each(|part| self.fill(part)));
        made.map_err(|err| self.fail("read", read.node, err))
    }
}

impl FileSystem for RafsFs {
    type Inode = u64;
    type Handle = u64;

    fn init(&self, _capable: FsOptions) -> io::Result<FsOptions> {
        Ok(options())
    }

    fn lookup(&self, _ctx: &Context, parent: u64, name: &CStr) -> io::Result<Entry> {
        self.find(parent, name.to_bytes())
            .map_err(|err| self.fail("lookup", parent, err))
    }

    fn getattr(
        &self,
        _ctx: &Context,
        node: u64,
        _handle: Option<u64>,
    ) -> io::Result<(stat64, Duration)> {
        let entry = self.nid(node).and_then(|nid| self.entry(nid));
        entry
            .map(|entry| (entry.attr, FOR_EVER))
            .map_err(|err| self.fail("getattr", node, err))
    }

    fn readlink(&self, _ctx: &Context, node: u64) -> io::Result<Vec<u8>> {
        let target = self.nid(node).and_then(|nid| Ok(self.image.readlink(nid)?));
        target.map_err(|err| self.fail("readlink", node, err))
    }

    fn open(
        &self,
        _ctx: &Context,
        node: u64,
        _flags: u32,
        _fuse_flags: u32,
    ) -> io::Result<(Option<u64>, OpenOptions, Option<u32>)> {
        Err(self.fail("open", node, FsError::NotNeeded))
    }

    fn opendir(
        &self,
        _ctx: &Context,
        node: u64,
        _flags: u32,
    ) -> io::Result<(Option<u64>, OpenOptions)> {
        Err(self.fail("opendir", node, FsError::NotNeeded))
    }

    fn flush(&self, _ctx: &Context, node: u64, _handle: u64, _owner: u64) -> io::Result<()> {
        Err(self.fail("flush", node, FsError::NotNeeded))
    }

    fn read(
        &self,
        _ctx: &Context,
        node: u64,
        _handle: u64,
        out: &mut dyn ZeroCopyWriter,
        size: u32,
        offset: u64,
        _owner: Option<u64>,
        _flags: u32,
    ) -> io::Result<usize> {
        if let (Some(recorder), Ok(nid)) = (&self.background.recorder, self.nid(node)) {
            recorder.note(nid);
        }
        let copied = self.plan(node, offset, size).and_then(|parts| {
            parts
                .iter()
                .try_fold(0, |done, part| Ok(done + self.copy(part, out)?))
        });
        copied.map_err(|err| self.fail("read", node, err))
    }

    fn readdir(
        &self,
        _ctx: &Context,
        node: u64,
        _handle: u64,
        _size: u32,
        offset: u64,
        add: &mut dyn FnMut(DirEntry<'_>) -> io::Result<usize>,
    ) -> io::Result<()> {
        let mut added = Ok(());
        let listed = self.list(node, offset, |entry, _nid| more(add(entry), &mut added));
        listed
            .and(added.map_err(FsError::Reply))
            .map_err(|err| self.fail("readdir", node, err))
    }

    fn readdirplus(
        &self,
        _ctx: &Context,
        node: u64,
        _handle: u64,
        _size: u32,
        offset: u64,
        add: &mut dyn FnMut(DirEntry<'_>, Entry) -> io::Result<usize>,
    ) -> io::Result<()> {
        let mut added = Ok(());
        let listed = self.list(node, offset, |entry, nid| {
            let found = self.listed_entry(entry.name, nid);
            more(add(entry, found), &mut added)
        });
        listed
            .and(added.map_err(FsError::Reply))
            .map_err(|err| self.fail("readdirplus", node, err))
    }

    fn getxattr(
        &self,
        _ctx: &Context,
        node: u64,
        name: &CStr,
        size: u32,
    ) -> io::Result<GetxattrReply> {
        let value = self.nid(node).and_then(|nid| {
            self.image
                .xattr(nid, name.to_bytes())?
                .ok_or(FsError::NoSuchAttribute)
        });
        let sized = value.and_then(|value| match sized(value.len(), size)? {
            Some(count) => Ok(GetxattrReply::Count(count)),
            None => Ok(GetxattrReply::Value(value.to_vec())),
        });
        sized.map_err(|err| self.fail("getxattr", node, err))
    }

    fn listxattr(&self, _ctx: &Context, node: u64, size: u32) -> io::Result<ListxattrReply> {
        let names = self.nid(node).and_then(|nid| {
            let mut names = Vec::new();
            for xattr in self.image.xattrs(nid)? {
                names.extend_from_slice(&xattr.key());
                names.push(0);
            }
            Ok(names)
        });
        let sized = names.and_then(|names| match sized(names.len(), size)? {
            Some(count) => Ok(ListxattrReply::Count(count)),
            None => Ok(ListxattrReply::Names(names)),
        });
        sized.map_err(|err| self.fail("listxattr", node, err))
    }

    fn statfs(&self, _ctx: &Context, _node: u64) -> io::Result<statvfs64> {
        Ok(node::usage(&self.image))
    }

    read_only::changes_are_refused!();
}

/// Whether a listing goes on: 0 bytes added means that the reply is full.
fn more(added: io::Result<usize>, result: &mut io::Result<()>) -> ControlFlow<()> {
    match added {
        Ok(0) => ControlFlow::Break(()),
        Ok(_) => ControlFlow::Continue(()),
        Err(err) => {
            *result = Err(err);
            ControlFlow::Break(())
        }
    }
}

/// The length, if only that was asked for (`room` 0); an error if it does not fit.
fn sized(len: usize, room: u32) -> Result<Option<u32>, FsError> {
    let len = u32::try_from(len).map_err(|_too_large| FsError::AttributeTooLarge)?;
    match room {
        0 => Ok(Some(len)),
        room if len > room => Err(FsError::AttributeTooLarge),
        _ => Ok(None),
    }
}

#[cfg(test)]
mod tests;
