//! What is in an image and where its bytes are, from the bootstrap alone.
//!
//! A file counts once, however many names it has, and for the directory of the name
//! that is met first. A chunk that several files share is content of each of them,
//! but stored once. How many bytes a chunk takes in its blob is known exactly unless
//! it shares a compressed unit with others (batches, layers used in place): then those
//! chunks divide what is left of the blob by their lengths.

use std::collections::{HashMap, HashSet};

use rafs::tree::ChunkRecord;
use rafs::{FileKind, Image, Nid};
use serde::Serialize;
use storage::{BlobFeatures, BlobInfo};

use crate::listing;

/// The report of one image. A stable form: keys are only ever added. Sizes are in
/// bytes; bytes of names that are no UTF-8 are replaced.
#[derive(Clone, Debug, Serialize)]
pub struct Summary {
    /// Version of this form.
    pub version: u32,
    /// Settings of the image.
    pub image: Settings,
    /// Numbers of names.
    pub names: Names,
    /// Totals.
    pub content: Content,
    /// Every blob: usually one a layer, the lowest first.
    pub blobs: Vec<Blob>,
    /// Directories by size, the largest first.
    pub directories: Vec<Item>,
    /// Files by size, the largest first.
    pub files: Vec<Item>,
    /// What the builder asked to prefetch.
    pub prefetch: Vec<String>,
}

/// Settings of the image.
#[derive(Clone, Debug, Serialize)]
pub struct Settings {
    /// `6`.
    pub fs_version: &'static str,
    /// Largest chunk.
    pub chunk_size: u32,
    /// How the newest layer's chunks are compressed.
    pub compressor: String,
    /// How the newest layer's chunks are identified.
    pub digester: String,
    /// Length of the bootstrap.
    pub bootstrap_size: u64,
}

/// Numbers of names.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Names {
    /// Directories, the root included.
    pub directories: u64,
    /// Regular files.
    pub files: u64,
    /// Further names of regular files.
    pub hard_links: u64,
    /// Symbolic links.
    pub symlinks: u64,
    /// Devices, pipes and sockets.
    pub specials: u64,
}

/// Totals of the whole image.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Content {
    /// Sum of the lengths of all files.
    pub file_size: u64,
    /// The same without chunks that occur again.
    pub unique_size: u64,
    /// `file_size / unique_size`: 1 if no chunk occurs twice.
    pub dedup_ratio: f64,
    /// Bytes that the chunks take in the blobs.
    pub stored_size: u64,
    /// `stored_size / unique_size`.
    pub compression_ratio: f64,
    /// References from files to chunks.
    pub chunk_references: u64,
    /// Different chunks.
    pub chunks: u64,
}

/// One blob.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Blob {
    /// Its id.
    pub id: String,
    /// Chunks that it holds.
    pub chunks: u64,
    /// Those that files of this image use.
    pub used_chunks: u64,
    /// Uncompressed bytes of the used chunks.
    pub used_size: u64,
    /// Bytes of all its chunks as they are stored.
    pub stored_size: u64,
    /// Those of the used chunks.
    pub used_stored_size: u64,
    /// Part of the image's stored bytes that is in this blob, 0 to 1.
    pub share: f64,
}

/// A directory with everything below it, or a file.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Item {
    /// Its path.
    pub path: String,
    /// Length of the file, or of all files below the directory.
    pub size: u64,
    /// Bytes in the blobs; a chunk counts for the file that is met first.
    pub stored_size: u64,
    /// Number of files: 1 for a file.
    pub files: u64,
}

/// Sizes that are summed up.
#[derive(Clone, Copy, Debug, Default)]
struct Sum {
    size: u64,
    stored: u64,
    files: u64,
}

impl Sum {
    fn add(&mut self, other: Self) {
        self.size += other.size;
        self.stored += other.stored;
        self.files += other.files;
    }
}

impl Summary {
    /// Looks at the whole image.
    ///
    /// * `image`: has passed [`Image::verify_tree`].
    /// * `depth`: levels of directories that get sums of their own.
    /// * `top`: number of directories and of files that are kept.
    ///
    /// # Errors
    /// The image is damaged.
    pub fn of(image: &Image, depth: usize, top: usize) -> Result<Self, rafs::Error> {
        let mut count = Count::new(image)?;
        listing::walk(image, |name| count.name(&name, depth, top))?;
        count.finish(top)
    }
}

/// The walk over an image.
struct Count<'a> {
    image: &'a Image,
    stored: StoredSizes,
    names: Names,
    content: Content,
    blobs: Vec<Blob>,
    seen_files: HashSet<Nid>,
    /// By position in the chunk table.
    seen_chunks: Vec<bool>,
    directories: HashMap<Vec<u8>, Sum>,
    files: Vec<(Vec<u8>, Sum)>,
}

impl<'a> Count<'a> {
    fn new(image: &'a Image) -> Result<Self, rafs::Error> {
        let blob = |info: &BlobInfo| Blob {
            id: info.id.to_string(),
            chunks: info.chunk_count.into(),
            used_chunks: 0,
            used_size: 0,
            stored_size: info.data_size(),
            used_stored_size: 0,
            share: 0.0,
        };
        Ok(Self {
            image,
            stored: StoredSizes::new(image)?,
            names: Names::default(),
            content: Content::default(),
            blobs: image.blobs().iter().map(blob).collect(),
            seen_files: HashSet::new(),
            seen_chunks: vec![false; image.chunk_record_count()],
            directories: HashMap::new(),
            files: Vec::new(),
        })
    }

    fn name(&mut self, name: &listing::Name, depth: usize, top: usize) -> Result<(), rafs::Error> {
        let inode = &name.inode;
        match inode.kind() {
            FileKind::Directory => self.names.directories += 1,
            FileKind::Symlink => self.names.symlinks += 1,
            FileKind::File if inode.nlink() > 1 && !self.seen_files.insert(inode.nid()) => {
                self.names.hard_links += 1;
            }
            FileKind::File => {
                self.names.files += 1;
                let sum = self.file(inode.nid(), inode.size())?;
                for dir in ancestors(&name.path, depth) {
                    // Allocates only for the first file of a directory.
                    match self.directories.get_mut(dir) {
                        Some(known) => known.add(sum),
                        None => drop(self.directories.insert(dir.to_vec(), sum)),
                    }
                }
                self.files.push((name.path.clone(), sum));
                if self.files.len() > top.saturating_mul(2).max(1024) {
                    keep_largest(&mut self.files, top);
                }
            }
            _ => self.names.specials += 1,
        }
        Ok(())
    }

    fn file(&mut self, nid: Nid, size: u64) -> Result<Sum, rafs::Error> {
        let mut stored = 0;
        for extent in self.image.extents(nid, 0..size) {
            let extent = extent?;
            self.content.chunk_references += 1;
            let position = self.image.chunk_position(extent.blob, extent.chunk);
            let Some(position) = position else { continue };
            if std::mem::replace(&mut self.seen_chunks[position], true) {
                continue;
            }
            let record = self.image.chunk_record(position)?;
            let info = &self.image.blobs()[extent.blob.as_usize()];
            let bytes = self.stored.of(&record, info);
            let blob = &mut self.blobs[extent.blob.as_usize()];
            blob.used_chunks += 1;
            blob.used_size += u64::from(record.uncompressed_size);
            blob.used_stored_size += bytes;
            stored += bytes;
        }
        self.content.file_size += size;
        Ok(Sum {
            size,
            stored,
            files: 1,
        })
    }

    fn finish(mut self, top: usize) -> Result<Summary, rafs::Error> {
        let sum = |field: fn(&Blob) -> u64| self.blobs.iter().map(field).sum();
        let unique_size = sum(|blob| blob.used_size);
        let stored_size = sum(|blob| blob.used_stored_size);
        let content = Content {
            unique_size,
            stored_size,
            chunks: sum(|blob| blob.used_chunks),
            dedup_ratio: ratio(self.content.file_size, unique_size, 1.0),
            compression_ratio: ratio(stored_size, unique_size, 1.0),
            ..self.content
        };
        for blob in &mut self.blobs {
            blob.share = ratio(blob.used_stored_size, stored_size, 0.0);
        }
        let mut directories: Vec<_> = self.directories.into_iter().collect();
        keep_largest(&mut directories, top);
        keep_largest(&mut self.files, top);
        let items = |list: Vec<(Vec<u8>, Sum)>| list.into_iter().map(item).collect();
        Ok(Summary {
            version: 1,
            image: settings(self.image),
            names: self.names,
            content,
            blobs: self.blobs,
            directories: items(directories),
            files: items(self.files),
            prefetch: prefetch(self.image)?,
        })
    }
}

fn settings(image: &Image) -> Settings {
    Settings {
        fs_version: "6",
        chunk_size: image.chunk_size(),
        compressor: image.compressor().to_string(),
        digester: image.digester().to_string(),
        bootstrap_size: u64::try_from(image.bytes().len()).unwrap_or(u64::MAX),
    }
}

/// How many bytes chunks take in their blobs.
#[derive(Debug)]
pub struct StoredSizes(Vec<Shared>);

/// The chunks of one blob that share compressed units with others.
#[derive(Clone, Copy, Debug, Default)]
struct Shared {
    /// Bytes that they take together.
    stored: u64,
    /// Their uncompressed bytes.
    plain: u64,
}

impl StoredSizes {
    /// Looks at all chunks of an image.
    ///
    /// What is known of single chunks is subtracted from blob and address space; the
    /// rest of the blob belongs to the rest of the space, of which this image may use
    /// a part only.
    ///
    /// # Errors
    /// The image is damaged.
    pub fn new(image: &Image) -> Result<Self, rafs::Error> {
        let mut shared = vec![Shared::default(); image.blobs().len()];
        let mut space = vec![0_u64; shared.len()];
        let mut left: Vec<_> = image
            .blobs()
            .iter()
            .map(|info| (info.data_size(), info.uncompressed_size))
            .collect();
        for position in 0..image.chunk_record_count() {
            let record = image.chunk_record(position)?;
            let blob = record.blob.as_usize();
            let blocks = u64::from(record.uncompressed_size).next_multiple_of(4096);
            match exact_size(&record, &image.blobs()[blob]) {
                Some(stored) => {
                    left[blob].0 = left[blob].0.saturating_sub(stored);
                    left[blob].1 = left[blob].1.saturating_sub(blocks);
                }
                None => {
                    shared[blob].plain += u64::from(record.uncompressed_size);
                    space[blob] += blocks;
                }
            }
        }
        for ((shared, used), (stored, space)) in shared.iter_mut().zip(space).zip(left) {
            shared.stored = scale(stored, used, space);
        }
        Ok(Self(shared))
    }

    /// Bytes that a chunk takes in its blob.
    #[must_use]
    pub fn of(&self, record: &ChunkRecord, info: &BlobInfo) -> u64 {
        exact_size(record, info).unwrap_or_else(|| {
            let shared = self
                .0
                .get(record.blob.as_usize())
                .copied()
                .unwrap_or_default();
            scale(shared.stored, record.uncompressed_size.into(), shared.plain)
        })
    }
}

/// Stored bytes of a chunk that is a unit of its own.
fn exact_size(record: &ChunkRecord, info: &BlobInfo) -> Option<u64> {
    let shared = info.features.contains(BlobFeatures::ZRAN)
        || info.features.contains(BlobFeatures::BATCH) && record.compressed_size == 0;
    match (shared, record.compressed) {
        (true, _) => None,
        (false, true) => Some(record.compressed_size.into()),
        (false, false) => Some(record.uncompressed_size.into()),
    }
}

/// `bytes * part / whole`, not more than `bytes`.
fn scale(bytes: u64, part: u64, whole: u64) -> u64 {
    let scaled = u128::from(bytes) * u128::from(part) / u128::from(whole.max(1));
    u64::try_from(scaled).unwrap_or(u64::MAX).min(bytes)
}

/// What the builder asked to prefetch: the first name of every entry.
fn prefetch(image: &Image) -> Result<Vec<String>, rafs::Error> {
    let names = super::request::names_of(image, &image.prefetch().collect::<Vec<_>>())?;
    let first = |(_, names): super::request::Names| names.into_iter().next();
    Ok(names
        .into_iter()
        .filter_map(first)
        .map(|path| String::from_utf8_lossy(&path).into_owned())
        .collect())
}

/// The directories above `path`, without the root, at most `depth` of them.
fn ancestors(path: &[u8], depth: usize) -> impl Iterator<Item = &[u8]> {
    let slashes = path.iter().enumerate().skip(1);
    let ends = slashes.filter(|(_, byte)| **byte == b'/').map(|(at, _)| at);
    ends.take(depth).map(|end| &path[..end])
}

/// The largest first; equal ones by name.
fn keep_largest(list: &mut Vec<(Vec<u8>, Sum)>, top: usize) {
    list.sort_by(|(a, x), (b, y)| y.size.cmp(&x.size).then_with(|| a.cmp(b)));
    list.truncate(top);
}

fn item((path, sum): (Vec<u8>, Sum)) -> Item {
    Item {
        path: String::from_utf8_lossy(&path).into_owned(),
        size: sum.size,
        stored_size: sum.stored,
        files: sum.files,
    }
}

/// `part / whole` to four digits; `empty` if there is nothing to divide by.
pub(crate) fn ratio(part: u64, whole: u64, empty: f64) -> f64 {
    if whole == 0 {
        return empty;
    }
    (to_float(part) / to_float(whole) * 10_000.0).round() / 10_000.0
}

/// Exact up to 2^53, and close enough beyond.
#[allow(
    clippy::cast_precision_loss,
    reason = "for display; sizes beyond 8 PiB may be off by some bytes"
)]
fn to_float(number: u64) -> f64 {
    number as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ancestors_stop_at_the_depth() {
        let of = |depth| ancestors(b"/a/bc/d/file", depth).collect::<Vec<_>>();
        assert_eq!(of(9), [&b"/a"[..], b"/a/bc", b"/a/bc/d"]);
        assert_eq!(of(1), [&b"/a"[..]]);
        assert_eq!(of(0), [&b""[..]; 0]);
        assert_eq!(ancestors(b"/file", 9).count(), 0);
    }
}
