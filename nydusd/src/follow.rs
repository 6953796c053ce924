//! Follows programs to their libraries: when the beginning of a program is fetched,
//! the libraries that it names are wanted next, and theirs.
//!
//! The dynamic linker asks for one library after the other, each a few round trips
//! away. The names are in the program, so they can all be fetched at once
//! ([`elf`](crate::elf)). A library is found by its file name alone, wherever it lies
//! in the image: a wrong guess costs its bytes, nothing else.
//!
//! One background thread does the work; misses that come while it is busy wait in a
//! short queue or are dropped.

use std::collections::{HashMap, HashSet};
use std::io;
use std::ops::ControlFlow;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};

use rafs::image::Image;
use rafs::units::{FileKind, Nid};
use storage::backend::Priority;
use storage::blob::{Blob, ChunkSpan};
use storage::speculate::Observer;
use storage::{BlobIndex, ChunkIndex};

use crate::elf::{ReadAt, needs};

/// Misses that may wait.
const QUEUE: usize = 64;

/// Larger libraries are not fetched on a guess, in bytes.
const MAX_SIZE: u64 = 16 << 20;

/// Symbolic links between the name of a library and its file.
const MAX_LINKS: u32 = 8;

/// The programs and libraries of an image.
#[derive(Debug, Default)]
struct Programs {
    /// By their first chunk.
    by_chunk: HashMap<(BlobIndex, ChunkIndex), Nid>,
    /// By file name, with the directory that they are in.
    by_name: HashMap<Vec<u8>, (Nid, Nid)>,
}

/// Sends the misses of one blob to the thread.
#[derive(Debug)]
struct Tap {
    blob: BlobIndex,
    misses: SyncSender<(BlobIndex, ChunkIndex)>,
}

impl Observer for Tap {
    fn missed(&self, chunk: ChunkIndex) {
        // Full: there is enough to do. Ended: there are no programs.
        let _ = self.misses.try_send((self.blob, chunk));
    }
}

/// Begins to watch `blobs`, which are those of `image`, until they are dropped.
pub(crate) fn start(image: &Arc<Image>, blobs: &[Arc<Blob>]) {
    let (sender, receiver) = sync_channel(QUEUE);
    for (index, blob) in (0..).zip(blobs) {
        blob.set_observer(Arc::new(Tap {
            blob: BlobIndex::new(index),
            misses: sender.clone(),
        }));
    }
    let follower = Follower {
        image: Arc::clone(image),
        blobs: blobs.iter().map(Arc::downgrade).collect(),
        programs: Programs::default(),
        seen: HashSet::new(),
    };
    let thread = std::thread::Builder::new().name("follow".to_owned());
    if let Err(error) = thread.spawn(move || follower.run(&receiver)) {
        tracing::debug!("programs are not followed: {error}");
    }
}

struct Follower {
    image: Arc<Image>,
    /// Weak: who watches a blob must not keep it.
    blobs: Vec<std::sync::Weak<Blob>>,
    programs: Programs,
    seen: HashSet<Nid>,
}

impl Follower {
    fn run(mut self, misses: &Receiver<(BlobIndex, ChunkIndex)>) {
        match Programs::of(&self.image) {
            Ok(programs) => self.programs = programs,
            Err(error) => {
                tracing::debug!("programs are not followed: {error}");
                return;
            }
        }
        while let Ok(miss) = misses.recv() {
            if let Some(program) = self.programs.by_chunk.get(&miss) {
                self.follow(*program);
            }
        }
    }

    /// Fetches what a program needs, and what that needs.
    fn follow(&mut self, program: Nid) {
        let mut pending = vec![program];
        while let Some(nid) = pending.pop() {
            if !self.seen.insert(nid) {
                continue;
            }
            let names = match needs(&File { of: self, nid }) {
                Ok(names) => names,
                Err(error) => {
                    tracing::debug!("what a program needs cannot be read: {error}");
                    continue;
                }
            };
            for name in names {
                if let Some(library) = self.find(&name)
                    && !self.seen.contains(&library)
                {
                    self.fetch(library);
                    pending.insert(0, library);
                }
            }
        }
    }

    /// The file that a name leads to.
    fn find(&self, name: &[u8]) -> Option<Nid> {
        let mut name = base(name).to_vec();
        for _ in 0..MAX_LINKS {
            let (dir, nid) = *self.programs.by_name.get(&name)?;
            let inode = self.image.inode(nid).ok()?;
            match inode.kind() {
                FileKind::File => return Some(nid),
                FileKind::Symlink => {
                    let target = self.image.readlink(nid).ok()?;
                    name = base(&target).to_vec();
                    // Usually beside it, even if there are others of that name.
                    if let Ok(Some(nid)) = self.image.lookup(dir, &target)
                        && self.image.inode(nid).ok()?.kind() == FileKind::File
                    {
                        return Some(nid);
                    }
                }
                _ => return None,
            }
        }
        None
    }

    fn fetch(&self, nid: Nid) {
        let Ok(inode) = self.image.inode(nid) else {
            return;
        };
        if inode.size() > MAX_SIZE {
            return;
        }
        for extent in self.image.extents(nid, 0..u64::MAX).map_while(Result::ok) {
            let chunk = extent.chunk.get();
            if let Some(blob) = self.blob(extent.blob) {
                blob.speculate(chunk..chunk.saturating_add(1));
            }
        }
    }

    fn blob(&self, index: BlobIndex) -> Option<Arc<Blob>> {
        self.blobs.get(index.as_usize())?.upgrade()
    }
}

/// What follows the last slash.
fn base(path: &[u8]) -> &[u8] {
    path.rsplit(|byte| *byte == b'/').next().unwrap_or(path)
}

/// A file of the image, read at the priority of speculation.
struct File<'a> {
    of: &'a Follower,
    nid: Nid,
}

impl ReadAt for File<'_> {
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
        let len = u64::try_from(buffer.len()).map_err(io::Error::other)?;
        let range = offset..offset.saturating_add(len);
        let size = self
            .of
            .image
            .inode(self.nid)
            .map_err(io::Error::other)?
            .size();
        let done = len.min(size.saturating_sub(offset));
        // What no extent covers is a hole, and the buffer may be used already.
        buffer.fill(0);
        for extent in self.of.image.extents(self.nid, range) {
            let extent = extent.map_err(io::Error::other)?;
            let at = |offset: u64| usize::try_from(offset).map_err(io::Error::other);
            let start = at(extent.file_offset.saturating_sub(offset))?;
            let len = at(extent.plain.end.saturating_sub(extent.plain.start))?;
            let part = buffer.get_mut(start..start.saturating_add(len));
            let (Some(part), Some(blob)) = (part, self.of.blob(extent.blob)) else {
                break;
            };
            let span = ChunkSpan {
                chunk: extent.chunk,
                plain: extent.plain,
            };
            blob.read_span(&span, part, Priority::Speculation)
                .map_err(io::Error::other)?;
        }
        usize::try_from(done).map_err(io::Error::other)
    }
}

impl Programs {
    /// Walks the image once.
    fn of(image: &Image) -> Result<Self, rafs::Error> {
        let mut programs = Self::default();
        let (mut pending, mut dirs) = (vec![image.root()], HashSet::new());
        while let Some(dir) = pending.pop() {
            if !dirs.insert(dir) {
                continue;
            }
            let mut candidates = Vec::new();
            image.readdir(dir, 0, |entry| {
                let is_library = entry.name.windows(3).any(|part| part == b".so");
                match entry.kind {
                    FileKind::Directory => pending.push(entry.nid),
                    FileKind::Symlink if is_library => {
                        programs
                            .by_name
                            .entry(entry.name.to_vec())
                            .or_insert((dir, entry.nid));
                    }
                    FileKind::File => candidates.push((entry.nid, is_library)),
                    _ => {}
                }
                if is_library && entry.kind == FileKind::File {
                    programs
                        .by_name
                        .entry(entry.name.to_vec())
                        .or_insert((dir, entry.nid));
                }
                ControlFlow::Continue(())
            })?;
            for (nid, is_library) in candidates {
                programs.add(image, nid, is_library)?;
            }
        }
        Ok(programs)
    }

    fn add(&mut self, image: &Image, nid: Nid, is_library: bool) -> Result<(), rafs::Error> {
        let inode = image.inode(nid)?;
        if !is_library && inode.attr().permissions & 0o111 == 0 {
            return Ok(());
        }
        if let Some(extent) = image.extents(nid, 0..1).next() {
            let extent = extent?;
            self.by_chunk
                .entry((extent.blob, extent.chunk))
                .or_insert(nid);
        }
        Ok(())
    }
}
