//! Follows programs to what they will want next: libraries and modules.
//!
//! The dynamic linker asks for one library after the other, each a few round trips
//! away. The names are in the program, so they can all be fetched at once, and theirs
//! ([`elf`](crate::elf)). A library is found by its file name alone, wherever it lies
//! in the image: a wrong guess costs its bytes, nothing else. Interpreters do the same
//! with modules ([`names`]).
//!
//! Two background threads do the work: one hears what is read and looks into modules,
//! which are there by then; the other looks into programs, which it may have to wait
//! for. What comes while they are busy waits in a short queue or is dropped.

use std::collections::{HashMap, HashSet};
use std::io;
use std::ops::ControlFlow;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, OnceLock, Weak};

use rafs::image::Image;
use rafs::paths::{self, USUAL};
use rafs::units::{FileKind, Nid};
use storage::backend::Priority;
use storage::blob::{Blob, ChunkSpan};
use storage::speculate::Observer;
use storage::{BlobIndex, ChunkIndex};

use crate::elf::{ReadAt, needs};
use crate::names::{self, Module, Names};

/// What may wait for each thread.
const QUEUE: usize = 256;

/// Larger files are not fetched on a guess, in bytes.
const MAX_SIZE: u64 = 16 << 20;

/// Symbolic links between the name of a library and its file.
const MAX_LINKS: u32 = 8;

/// Programs that are known, and libraries: bounds what an image can make us remember.
const MAX_KNOWN: usize = 1 << 15;

/// A chunk of an image.
type Place = (BlobIndex, ChunkIndex);

/// What a reader did.
#[derive(Clone, Copy, Debug)]
enum Event {
    /// Missed a chunk.
    Missed(Place),
    /// Read the beginning of a module for the first time.
    Read(Place),
}

/// One bit for each chunk of one blob: the beginning of a module that nobody has read.
type Unread = Vec<AtomicU64>;

/// Hears of the readers of one blob.
#[derive(Debug)]
struct Tap {
    blob: BlobIndex,
    events: SyncSender<Event>,
    /// Of all blobs; set once the image has been looked through.
    unread: Arc<OnceLock<Vec<Unread>>>,
}

impl Observer for Tap {
    fn missed(&self, chunk: ChunkIndex) {
        // Full: there is enough to do. Ended: there are no programs.
        let _ = self.events.try_send(Event::Missed((self.blob, chunk)));
    }

    fn read(&self, chunk: ChunkIndex) {
        let unread = self.unread.get();
        let word = unread.and_then(|all| all.get(self.blob.as_usize())?.get(chunk.as_usize() / 64));
        let Some(word) = word else { return };
        let bit = 1 << (chunk.as_usize() % 64);
        // Looked at first: what is read again and again should cost nothing.
        if word.load(Ordering::Relaxed) & bit != 0
            && word.fetch_and(!bit, Ordering::Relaxed) & bit != 0
        {
            let _ = self.events.try_send(Event::Read((self.blob, chunk)));
        }
    }
}

/// Begins to watch `blobs`, which are those of `image`, until they are dropped.
pub(crate) fn start(image: &Arc<Image>, blobs: &[Arc<Blob>]) {
    let (sender, receiver) = sync_channel(QUEUE);
    let unread = Arc::default();
    for (index, blob) in (0..).zip(blobs) {
        blob.set_observer(Arc::new(Tap {
            blob: BlobIndex::new(index),
            events: sender.clone(),
            unread: Arc::clone(&unread),
        }));
    }
    let parts = Arc::new(Parts {
        image: Arc::clone(image),
        blobs: blobs.iter().map(Arc::downgrade).collect(),
    });
    spawn("follow", move || follow(&parts, &unread, &receiver));
}

fn spawn(name: &str, body: impl FnOnce() + Send + 'static) {
    let thread = std::thread::Builder::new().name(name.to_owned());
    if let Err(error) = thread.spawn(body) {
        tracing::debug!("programs are not followed: {error}");
    }
}

/// Body of the thread that hears what is read.
fn follow(parts: &Arc<Parts>, unread: &OnceLock<Vec<Unread>>, events: &Receiver<Event>) {
    let found = match Found::of(&parts.image) {
        Ok(found) => found,
        Err(error) => {
            tracing::debug!("programs are not followed: {error}");
            return;
        }
    };
    let (to_linker, programs) = sync_channel(QUEUE);
    let linker = Linker {
        parts: Arc::clone(parts),
        libraries: found.libraries,
        seen: HashSet::new(),
    };
    spawn("follow-elf", move || linker.run(&programs));
    // Nobody else sets it.
    let _ = unread.set(parts.bits(found.modules.keys()));
    let mut seen = HashSet::new();
    let mut usual = USUAL.iter();
    while let Ok(event) = events.recv() {
        match event {
            Event::Missed(place) => {
                if let Some(program) = found.programs.get(&place) {
                    let _ = to_linker.try_send(*program);
                    // With the first program, and once.
                    for path in usual.by_ref() {
                        parts.fetch_path(Path::new(path));
                    }
                }
            }
            Event::Read(place) => {
                let Some(module) = found.modules.get(&place) else {
                    continue;
                };
                seen.insert(module.nid);
                let mut wishes = parts.wishes(&found.names, module);
                wishes.retain(|wish| seen.insert(wish.nid));
                // What is asked for last comes first.
                for wish in wishes.iter().rev() {
                    parts.fetch(wish.nid);
                }
                for wish in wishes.iter().filter(|wish| wish.kind.is_library()) {
                    let _ = to_linker.try_send(wish.nid);
                }
            }
        }
    }
}

/// An image and its blobs.
struct Parts {
    image: Arc<Image>,
    /// Weak: who watches a blob must not keep it.
    blobs: Vec<Weak<Blob>>,
}

impl Parts {
    /// Bits for the chunks of all blobs, with those at `places` set.
    fn bits<'a>(&self, places: impl Iterator<Item = &'a Place>) -> Vec<Unread> {
        let words = |blob: &Weak<Blob>| {
            let chunks = blob.upgrade().map_or(0, |blob| blob.info().chunk_count);
            let words = ChunkIndex::new(chunks).as_usize().div_ceil(64);
            (0..words).map(|_| AtomicU64::new(0)).collect()
        };
        let mut bits: Vec<Unread> = self.blobs.iter().map(words).collect();
        for (blob, chunk) in places {
            let words = bits.get_mut(blob.as_usize());
            if let Some(word) = words.and_then(|words| words.get_mut(chunk.as_usize() / 64)) {
                *word.get_mut() |= 1 << (chunk.as_usize() % 64);
            }
        }
        bits
    }

    /// What a module that has been read names.
    fn wishes(&self, names: &Names, module: &Module) -> Vec<Module> {
        let file = File {
            of: self,
            nid: module.nid,
        };
        match file.content() {
            Ok(content) => names.wishes(module, &content),
            Err(error) => {
                tracing::debug!("what a module names cannot be read: {error}");
                Vec::new()
            }
        }
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

    fn fetch_path(&self, path: &Path) {
        if let Some(nid) = paths::find(&self.image, path) {
            self.fetch(nid);
        }
    }

    fn blob(&self, index: BlobIndex) -> Option<Arc<Blob>> {
        self.blobs.get(index.as_usize())?.upgrade()
    }
}

/// Fetches what programs are linked with.
struct Linker {
    parts: Arc<Parts>,
    libraries: HashMap<Vec<u8>, (Nid, Nid)>,
    seen: HashSet<Nid>,
}

impl Linker {
    fn run(mut self, programs: &Receiver<Nid>) {
        while let Ok(program) = programs.recv() {
            self.follow(program);
        }
    }

    /// Fetches what a program needs, and what that needs.
    fn follow(&mut self, program: Nid) {
        let mut pending = vec![program];
        while let Some(nid) = pending.pop() {
            if !self.seen.insert(nid) {
                continue;
            }
            let file = File {
                of: &self.parts,
                nid,
            };
            let names = match needs(&file) {
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
                    self.parts.fetch(library);
                    pending.insert(0, library);
                }
            }
        }
    }

    /// The file that a name leads to.
    fn find(&self, name: &[u8]) -> Option<Nid> {
        let image = &self.parts.image;
        let mut name = base(name).to_vec();
        for _ in 0..MAX_LINKS {
            let (dir, nid) = *self.libraries.get(&name)?;
            let inode = image.inode(nid).ok()?;
            match inode.kind() {
                FileKind::File => return Some(nid),
                FileKind::Symlink => {
                    let target = image.readlink(nid).ok()?;
                    name = base(&target).to_vec();
                    // Usually beside it, even if there are others of that name.
                    if let Ok(Some(nid)) = image.lookup(dir, &target)
                        && image.inode(nid).ok()?.kind() == FileKind::File
                    {
                        return Some(nid);
                    }
                }
                _ => return None,
            }
        }
        None
    }
}

/// What follows the last slash.
fn base(path: &[u8]) -> &[u8] {
    path.rsplit(|byte| *byte == b'/').next().unwrap_or(path)
}

/// A file of the image, read at the priority of speculation.
struct File<'a> {
    of: &'a Parts,
    nid: Nid,
}

impl File<'_> {
    /// All of it, as far as a module is looked into.
    fn content(&self) -> io::Result<Vec<u8>> {
        let inode = self.of.image.inode(self.nid).map_err(io::Error::other)?;
        let size = inode.size().min(names::MAX_SIZE);
        let mut content = vec![0; usize::try_from(size).map_err(io::Error::other)?];
        let len = self.read_at(&mut content, 0)?;
        content.truncate(len);
        Ok(content)
    }
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

/// The programs, libraries and modules of an image.
#[derive(Debug, Default)]
struct Found {
    /// By their first chunk.
    programs: HashMap<Place, Nid>,
    /// By file name, with the directory that they are in.
    libraries: HashMap<Vec<u8>, (Nid, Nid)>,
    /// By their first chunk.
    modules: HashMap<Place, Module>,
    names: Names,
}

impl Found {
    /// Walks the image once.
    fn of(image: &Image) -> Result<Self, rafs::Error> {
        let mut found = Self::default();
        // Without a path: too far down for modules.
        let mut pending = vec![(image.root(), Some(names::Path::from([])))];
        let mut dirs = HashSet::new();
        while let Some((dir, path)) = pending.pop() {
            if !dirs.insert(dir) {
                continue;
            }
            let mut files = Vec::new();
            image.readdir(dir, 0, |entry| {
                let is_library = entry.name.windows(3).any(|part| part == b".so");
                match entry.kind {
                    FileKind::Directory => {
                        let path = path.as_ref();
                        let path = path.and_then(|path| names::below(path, entry.name));
                        pending.push((entry.nid, path));
                    }
                    FileKind::File => files.push((entry.nid, entry.name.to_vec())),
                    _ => {}
                }
                if is_library
                    && matches!(entry.kind, FileKind::Symlink | FileKind::File)
                    && found.libraries.len() < MAX_KNOWN
                {
                    found
                        .libraries
                        .entry(entry.name.to_vec())
                        .or_insert((dir, entry.nid));
                }
                ControlFlow::Continue(())
            })?;
            for (nid, name) in files {
                found.add(image, (nid, &name), path.as_ref())?;
            }
        }
        Ok(found)
    }

    fn add(
        &mut self,
        image: &Image,
        (nid, name): (Nid, &[u8]),
        dir: Option<&names::Path>,
    ) -> Result<(), rafs::Error> {
        let inode = image.inode(nid)?;
        let is_library = name.windows(3).any(|part| part == b".so");
        let is_program = is_library || inode.attr().permissions & 0o111 != 0;
        let module = dir.and_then(|dir| self.names.add(nid, name, dir));
        let module = module.filter(|it| !it.kind.is_library() && inode.size() <= names::MAX_SIZE);
        if !is_program && module.is_none() {
            return Ok(());
        }
        let Some(extent) = image.extents(nid, 0..1).next() else {
            return Ok(());
        };
        let extent = extent?;
        let place = (extent.blob, extent.chunk);
        if is_program && self.programs.len() < MAX_KNOWN {
            self.programs.entry(place).or_insert(nid);
        }
        if let Some(module) = module {
            self.modules.entry(place).or_insert(module);
        }
        Ok(())
    }
}
