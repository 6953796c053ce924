//! Counting the names, files and chunks of images, and which chunks they share.
//!
//! Two chunks are the same if digest algorithm, digest and length are. A blob stores
//! each of its chunks once, and images that use the same blob share it already: what
//! a dictionary could save are chunks that several blobs store.

use std::collections::HashMap;
use std::collections::HashSet;

use rafs::{FileKind, Image};
use serde::Serialize;
use storage::{BlobId, BlobIndex, BlobInfo, Digester};

use crate::inspect::summary::StoredSizes;
use crate::listing;

/// Number of classes of chunk sizes.
const CHUNK_CLASSES: usize = 9;

/// Number of classes of file sizes.
const FILE_CLASSES: usize = 45;

/// The numbers of one image, or of several together. Sizes are in bytes.
#[derive(Clone, Debug, Serialize)]
pub struct Counts {
    /// Directories.
    pub dirs: u64,
    /// Regular files; a hard link counts once.
    pub files: u64,
    /// Symbolic links.
    pub symlinks: u64,
    /// Chunks, for each blob that stores them.
    pub chunks: u64,
    /// Lengths of all files.
    pub file_size: u64,
    /// The chunks as they are stored.
    pub comp_size: u64,
    /// The chunks uncompressed.
    pub uncomp_size: u64,
    /// What is missing to whole blocks of 4096 bytes, over all files.
    pub padding_size: u64,
    /// Chunks by length: class `i` has those of at most 4 KiB × 2^i; the last one
    /// has all that are longer than 512 KiB.
    pub chunk_sizes: [u64; CHUNK_CLASSES],
    /// Files by length: class 0 has empty ones, class `i` those of 2^(i-1) to
    /// 2^i - 1 bytes; the last one has all longer ones.
    pub file_sizes: Vec<u64>,
    /// Chunks that a dictionary would save.
    pub dedup_chunks: u64,
    /// Their stored bytes.
    pub dedup_comp_size: u64,
    /// Their uncompressed bytes.
    pub dedup_uncomp_size: u64,
    /// Base: chunks that one blob stores. Target: chunks that the base has not.
    pub own_chunks: u64,
    /// Their stored bytes.
    pub own_comp_size: u64,
    /// Their uncompressed bytes.
    pub own_uncomp_size: u64,
    /// Base: different chunks that several blobs store. Target: chunks that the
    /// base has.
    pub ref_chunks: u64,
    /// Their stored bytes.
    pub ref_comp_size: u64,
    /// Their uncompressed bytes.
    pub ref_uncomp_size: u64,
}

impl Default for Counts {
    fn default() -> Self {
        Self {
            dirs: 0,
            files: 0,
            symlinks: 0,
            chunks: 0,
            file_size: 0,
            comp_size: 0,
            uncomp_size: 0,
            padding_size: 0,
            chunk_sizes: [0; CHUNK_CLASSES],
            file_sizes: vec![0; FILE_CLASSES],
            dedup_chunks: 0,
            dedup_comp_size: 0,
            dedup_uncomp_size: 0,
            own_chunks: 0,
            own_comp_size: 0,
            own_uncomp_size: 0,
            ref_chunks: 0,
            ref_comp_size: 0,
            ref_uncomp_size: 0,
        }
    }
}

/// What makes two chunks the same.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Key {
    digester: u8,
    digest: [u8; 32],
    size: u32,
}

/// A chunk of the base.
#[derive(Clone, Debug)]
struct Known {
    /// Stored length in the blob that was met first.
    stored: u64,
    /// Blobs that store it, by number; few.
    blobs: Vec<u32>,
    /// Stored bytes of all blobs together.
    stored_sum: u64,
}

/// Images that others are compared with.
#[derive(Debug, Default)]
pub struct Base {
    counts: Counts,
    chunks: HashMap<Key, Known>,
    /// Numbers of the blobs met so far.
    blobs: HashMap<BlobId, u32>,
    /// Blobs met so far.
    blob_count: u32,
}

impl Base {
    /// Counts one more image.
    ///
    /// * `image`: has passed [`Image::verify_tree`].
    ///
    /// # Errors
    /// It is damaged.
    pub fn add(&mut self, image: &Image) -> Result<(), rafs::Error> {
        names(image, &mut self.counts)?;
        let numbers = self.number(image);
        let (counts, chunks) = (&mut self.counts, &mut self.chunks);
        each_chunk(image, |key, blob, stored| {
            let number = numbers[blob.as_usize()];
            let known = chunks.entry(key).or_insert(Known {
                stored,
                blobs: Vec::new(),
                stored_sum: 0,
            });
            if !known.blobs.contains(&number) {
                known.blobs.push(number);
                known.stored_sum += stored;
                counts.chunk(key.size, stored);
            }
        })
    }

    /// Numbers for the blobs of an image. A placeholder stands for another blob in
    /// every image.
    fn number(&mut self, image: &Image) -> Vec<u32> {
        let mut number = |info: &BlobInfo| {
            let next = self.blob_count;
            let number = match info.id.is_placeholder() {
                true => next,
                false => *self.blobs.entry(info.id.clone()).or_insert(next),
            };
            self.blob_count += u32::from(number == next);
            number
        };
        image.blobs().iter().map(&mut number).collect()
    }

    /// The numbers of all images together.
    #[must_use]
    pub fn counts(&self) -> Counts {
        let mut counts = self.counts.clone();
        for (key, known) in &self.chunks {
            let size = u64::from(key.size);
            let copies = u64::try_from(known.blobs.len()).unwrap_or(u64::MAX);
            if copies == 1 {
                counts.own_chunks += 1;
                counts.own_comp_size += known.stored;
                counts.own_uncomp_size += size;
                continue;
            }
            counts.ref_chunks += 1;
            counts.ref_comp_size += known.stored;
            counts.ref_uncomp_size += size;
            counts.dedup_chunks += copies - 1;
            counts.dedup_comp_size += known.stored_sum.saturating_sub(known.stored);
            counts.dedup_uncomp_size += size * (copies - 1);
        }
        counts
    }

    /// The numbers of another image, seen against the base.
    ///
    /// # Errors
    /// As for [`Base::add`].
    pub fn compare(&self, image: &Image) -> Result<Counts, rafs::Error> {
        let mut counts = Counts::default();
        names(image, &mut counts)?;
        each_chunk(image, |key, _blob, stored| {
            counts.chunk(key.size, stored);
            let size = u64::from(key.size);
            if self.chunks.contains_key(&key) {
                counts.ref_chunks += 1;
                counts.ref_comp_size += stored;
                counts.ref_uncomp_size += size;
            } else {
                counts.own_chunks += 1;
                counts.own_comp_size += stored;
                counts.own_uncomp_size += size;
            }
        })?;
        counts.dedup_chunks = counts.ref_chunks;
        counts.dedup_comp_size = counts.ref_comp_size;
        counts.dedup_uncomp_size = counts.ref_uncomp_size;
        Ok(counts)
    }
}

impl Counts {
    fn chunk(&mut self, size: u32, stored: u64) {
        self.chunks += 1;
        self.comp_size += stored;
        self.uncomp_size += u64::from(size);
        let class = |limit: &usize| u64::from(size) <= 4096 << limit;
        let class = (0..CHUNK_CLASSES - 1)
            .find(class)
            .unwrap_or(CHUNK_CLASSES - 1);
        self.chunk_sizes[class] += 1;
    }

    fn file(&mut self, size: u64) {
        self.files += 1;
        self.file_size += size;
        self.padding_size += size.next_multiple_of(4096) - size;
        let class = usize::try_from(u64::BITS - size.leading_zeros()).unwrap_or(FILE_CLASSES);
        self.file_sizes[class.min(FILE_CLASSES - 1)] += 1;
    }
}

fn names(image: &Image, counts: &mut Counts) -> Result<(), rafs::Error> {
    let mut seen = HashSet::new();
    listing::walk(image, |name| {
        let inode = &name.inode;
        match inode.kind() {
            FileKind::Directory => counts.dirs += 1,
            FileKind::Symlink => counts.symlinks += 1,
            FileKind::File if inode.nlink() == 1 || seen.insert(inode.nid()) => {
                counts.file(inode.size());
            }
            _ => {}
        }
        Ok(())
    })
}

/// Calls `each` for every different chunk of an image, with a blob that stores it and
/// its stored length.
fn each_chunk(image: &Image, mut each: impl FnMut(Key, BlobIndex, u64)) -> Result<(), rafs::Error> {
    let mut seen = HashSet::new();
    let stored = StoredSizes::new(image)?;
    for position in 0..image.chunk_record_count() {
        let record = image.chunk_record(position)?;
        let info = &image.blobs()[record.blob.as_usize()];
        let key = Key {
            digester: match info.digester {
                Digester::Blake3 => 0,
                Digester::Sha256 => 1,
            },
            digest: *record.digest.as_bytes(),
            size: record.uncompressed_size,
        };
        if seen.insert(key) {
            each(key, record.blob, stored.of(&record, info));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn classes_have_the_limits_that_are_documented() {
        let mut counts = Counts::default();
        for size in [1, 4096, 4097, 8192, 512 << 10, (512 << 10) + 1, 16 << 20] {
            counts.chunk(size, 1);
        }
        assert_eq!(counts.chunk_sizes, [2, 2, 0, 0, 0, 0, 0, 1, 2]);
        for size in [0, 1, 2, 3, 4, 4095, 4096, u64::MAX / 2] {
            counts.file_size = 0;
            counts.file(size);
        }
        let set: Vec<_> = (0..FILE_CLASSES)
            .filter(|class| counts.file_sizes[*class] > 0)
            .map(|class| (class, counts.file_sizes[class]))
            .collect();
        assert_eq!(
            set,
            [(0, 1), (1, 1), (2, 2), (3, 1), (12, 1), (13, 1), (44, 1)]
        );
        assert_eq!(Counts::default().file_sizes.len(), 45);
    }
}
