//! The chunk table of a blob, read in place from its cache file form.
//!
//! Opening checks sizes, the header and that chunks are in order and disjoint in
//! the uncompressed address space; everything else about a chunk is checked when
//! that chunk is asked for. The table itself stays in the map it came from, so
//! memory use does not depend on its length.
//!
//! Promises: a [`Chunk`] that is returned lies within both address spaces and is
//! at most one chunk size long; a context that is returned lies within the blob
//! and its output is at most 16 MiB. No two chunks share a byte of the cache file.
//!
//! Layout: `docs/format-blob.md`, "Chunk table" and "Cache directory". Writing
//! one: [`Builder`]. From a blob to the cache file form:
//! [`stored_table`](super::stored_table).

mod builder;
mod row;
#[cfg(test)]
mod tests;

use std::ops::Range;

use zerocopy::FromBytes as _;

pub use builder::{Builder, Layout};
use row::Row;

use super::context::{BatchContext, CONTEXT_SIZE, ZranContext};
use super::entry::{Entry, EntryV1, EntryV2};
use super::header::{HEADER_SIZE, Header};
use super::{FormatError, expect_equal};
use crate::blob_info::{BlobFeatures, BlobInfo};
use crate::chunk::Chunk;
use crate::codec::as_u64;
use crate::mapped::Mapped;
use crate::units::{ChunkIndex, round_up_to_block};

const OBJECT: &str = "chunk table";
const CHUNK: &str = "chunk";

/// Most chunks of one blob.
pub const MAX_CHUNKS: u32 = (1 << 24) - 1;

/// The chunk table of one blob.
#[derive(Clone, Debug)]
pub struct ChunkTable {
    data: Mapped,
    version: Version,
    contexts: Contexts,
    limits: Limits,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Version {
    V1,
    V2,
}

/// Where contexts are in the table, checked to be inside it.
#[derive(Clone, Debug)]
enum Contexts {
    None,
    Batch {
        area: Range<usize>,
        count: u32,
    },
    Zran {
        area: Range<usize>,
        count: u32,
        dictionaries: Range<usize>,
    },
}

/// What the bootstrap says that chunks are checked against.
#[derive(Clone, Copy, Debug)]
struct Limits {
    count: u32,
    chunk_size: u32,
    /// Length of the compressed address space.
    data_size: u64,
    /// Length of the uncompressed address space.
    plain_size: u64,
}

/// Length in bytes of the cache file form of a blob's table: the uncompressed
/// table, zero padded to whole blocks, then the header. `None` on overflow.
#[must_use]
pub fn cache_form_size(info: &BlobInfo) -> Option<u64> {
    round_up_to_block(info.meta.uncompressed_size)?.checked_add(as_u64(HEADER_SIZE))
}

impl ChunkTable {
    /// Opens the table of `info`'s blob.
    ///
    /// * `data`: the cache file form, see [`cache_form_size`].
    ///
    /// Reads every entry once to check their order, a few nanoseconds each.
    ///
    /// # Errors
    /// [`FormatError::Size`], [`FormatError::Mismatch`] and [`FormatError::Corrupt`]
    /// for data that is not this blob's table; fetching it again may help.
    /// [`FormatError::Unsupported`] for encrypted, external and raw tar blobs.
    pub fn open(data: Mapped, info: &BlobInfo) -> Result<Self, FormatError> {
        check_supported(info.features)?;
        let version = if info.features.contains(BlobFeatures::CHUNK_INFO_V2) {
            Version::V2
        } else {
            Version::V1
        };
        let got = as_u64(data.len());
        let expected = cache_form_size(info).unwrap_or(u64::MAX);
        if got != expected {
            return Err(FormatError::Size {
                object: OBJECT,
                expected,
                got,
            });
        }
        let header = data
            .len()
            .checked_sub(HEADER_SIZE)
            .and_then(|at| data.get(at..));
        let header = Header::decode(header.unwrap_or_default(), info)?;
        let table_len = usize_of(info.meta.uncompressed_size);
        let contexts = check_areas(version, info, &header, table_len)?;
        let limits = Limits {
            count: info.chunk_count,
            chunk_size: info.chunk_size,
            data_size: info.data_size(),
            plain_size: info.uncompressed_size,
        };
        let table = Self {
            data,
            version,
            contexts,
            limits,
        };
        table.check_order()?;
        Ok(table)
    }

    /// Number of chunks.
    #[must_use]
    pub fn len(&self) -> u32 {
        self.limits.count
    }

    /// Whether there are no chunks.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.limits.count == 0
    }

    /// Number of batch or seek contexts.
    #[must_use]
    pub fn context_count(&self) -> u32 {
        match self.contexts {
            Contexts::None => 0,
            Contexts::Batch { count, .. } | Contexts::Zran { count, .. } => count,
        }
    }

    /// Decodes and checks one chunk. Costs two cache lines at most.
    ///
    /// # Errors
    /// [`FormatError::NoSuch`] for an index beyond the table,
    /// [`FormatError::Corrupt`] for an entry that breaks a rule of
    /// `docs/format-blob.md`, "Table entries".
    pub fn chunk(&self, index: ChunkIndex) -> Result<Chunk, FormatError> {
        let entry = self.entry(index.get()).ok_or(FormatError::NoSuch {
            object: CHUNK,
            index: index.get().into(),
            count: self.limits.count.into(),
        })?;
        let row = Row {
            index: index.get(),
            entry,
            table: self,
        };
        row.check_plain_range()?;
        Ok(Chunk {
            plain_offset: entry.plain_offset,
            plain_size: entry.plain_size,
            encoding: row.encoding()?,
            crc32c: row.crc32c()?,
        })
    }

    /// Indexes of the chunks that have data in `plain`, a range of the
    /// uncompressed address space. The gap between the end of a chunk and the next
    /// block belongs to no chunk. Costs a binary search.
    ///
    /// # Errors
    /// None in practice: the order was checked when the table was opened. A table
    /// that lost entries since then is reported as [`FormatError::Size`].
    pub fn covering(&self, plain: Range<u64>) -> Result<Range<u32>, FormatError> {
        let first = self.partition(|entry| plain_end(entry) <= plain.start)?;
        let end = self.partition(|entry| entry.plain_offset < plain.end)?;
        Ok(first..end.max(first))
    }

    /// The batch context with number `index`, as [`Encoding::Batch`](crate::chunk::Encoding::Batch) names it.
    ///
    /// # Errors
    /// [`FormatError::NoSuch`], [`FormatError::Corrupt`].
    pub fn batch_context(&self, index: u32) -> Result<BatchContext, FormatError> {
        match &self.contexts {
            Contexts::Batch { area, count } if index < *count => {
                BatchContext::decode(self.context(area, index)?, index)
            }
            _ => Err(self.no_context("batch context", index)),
        }
    }

    /// The seek context with number `index`, as [`Encoding::Zran`](crate::chunk::Encoding::Zran) names it.
    ///
    /// # Errors
    /// [`FormatError::NoSuch`], [`FormatError::Corrupt`].
    pub fn zran_context(&self, index: u32) -> Result<ZranContext<'_>, FormatError> {
        match &self.contexts {
            Contexts::Zran {
                area,
                count,
                dictionaries,
            } if index < *count => {
                let dictionaries = self.data.get(dictionaries.clone()).unwrap_or_default();
                let raw = self.context(area, index)?;
                ZranContext::decode(raw, index, dictionaries, self.limits.data_size)
            }
            _ => Err(self.no_context("seek context", index)),
        }
    }

    fn no_context(&self, object: &'static str, index: u32) -> FormatError {
        let count = self.context_count().into();
        FormatError::NoSuch {
            object,
            index: index.into(),
            count,
        }
    }

    fn context(&self, area: &Range<usize>, index: u32) -> Result<&[u8; CONTEXT_SIZE], FormatError> {
        let area = self.data.get(area.clone()).unwrap_or_default();
        let (contexts, _) = area.as_chunks::<CONTEXT_SIZE>();
        contexts
            .get(usize_of(index.into()))
            .ok_or_else(|| self.no_context("context", index))
    }

    /// The entry with number `index`, unchecked; `None` beyond the last.
    fn entry(&self, index: u32) -> Option<Entry> {
        if index >= self.limits.count {
            return None;
        }
        let index = usize_of(index.into());
        match self.version {
            Version::V1 => {
                let (entries, _) = self.data.as_chunks::<{ size_of::<EntryV1>() }>();
                Some(EntryV1::read_from_bytes(entries.get(index)?).ok()?.into())
            }
            Version::V2 => {
                let (entries, _) = self.data.as_chunks::<{ size_of::<EntryV2>() }>();
                Some(EntryV2::read_from_bytes(entries.get(index)?).ok()?.into())
            }
        }
    }

    /// The first index whose entry does not match; entries that match come first.
    fn partition(&self, matches: impl Fn(&Entry) -> bool) -> Result<u32, FormatError> {
        let (mut low, mut high) = (0, self.limits.count);
        while low < high {
            let middle = low + (high - low) / 2;
            let entry = self.entry(middle).ok_or(FormatError::Size {
                object: OBJECT,
                expected: self.limits.count.into(),
                got: middle.into(),
            })?;
            if matches(&entry) {
                low = middle + 1;
            } else {
                high = middle;
            }
        }
        Ok(low)
    }

    /// Chunks that overlapped would overwrite each other in the cache file, after
    /// both had been verified.
    fn check_order(&self) -> Result<(), FormatError> {
        let mut end = 0;
        for index in 0..self.limits.count {
            let entry = self.entry(index).unwrap_or_default();
            if entry.plain_offset < end {
                return Err(FormatError::corrupt(
                    CHUNK,
                    index,
                    "plain offset",
                    entry.plain_offset,
                    "lies before the end of the previous chunk",
                ));
            }
            end = plain_end(&entry);
        }
        Ok(())
    }
}

/// End of the data of an entry in the uncompressed address space: at most 2^44 + 2^24.
fn plain_end(entry: &Entry) -> u64 {
    entry.plain_offset + u64::from(entry.plain_size)
}

/// Positions in the table; callers have bounded them, saturation ends in "no such entry".
fn usize_of(value: u64) -> usize {
    usize::try_from(value).unwrap_or(usize::MAX)
}

fn check_supported(features: BlobFeatures) -> Result<(), FormatError> {
    for (feature, name) in [
        (BlobFeatures::ENCRYPTED, "encryption"),
        (BlobFeatures::EXTERNAL, "an external data store"),
        (BlobFeatures::TARFS, "a raw tar used in place"),
    ] {
        if features.contains(feature) {
            return Err(FormatError::Unsupported {
                object: "blob",
                feature: name,
            });
        }
    }
    let with_contexts = BlobFeatures::BATCH.union(BlobFeatures::ZRAN);
    if features.contains(with_contexts)
        || features.intersects(with_contexts) && !features.contains(BlobFeatures::CHUNK_INFO_V2)
    {
        let problem = "batch and gzip exclude each other and need v2 entries";
        return Err(FormatError::corrupt(
            "blob",
            0_u32,
            "features",
            features.bits(),
            problem,
        ));
    }
    Ok(())
}

/// Checks that entries and contexts fill the table, and finds the contexts.
fn check_areas(
    version: Version,
    info: &BlobInfo,
    header: &Header,
    table_len: usize,
) -> Result<Contexts, FormatError> {
    let entry_size = match version {
        Version::V1 => size_of::<EntryV1>(),
        Version::V2 => size_of::<EntryV2>(),
    };
    // 2^32 entries of 24 bytes at most: no overflow.
    let entries = u64::from(info.chunk_count) * as_u64(entry_size);
    let batch = info.features.contains(BlobFeatures::BATCH);
    let zran = info.features.contains(BlobFeatures::ZRAN);
    // Generated dictionaries keep the size of another table.
    let may_be_longer = batch || zran || info.features.contains(BlobFeatures::CHUNKDICT_GENERATED);
    let got = info.meta.uncompressed_size;
    if got < entries || got > entries && !may_be_longer {
        return Err(FormatError::Size {
            object: OBJECT,
            expected: entries,
            got,
        });
    }
    if !batch && !zran {
        return Ok(Contexts::None);
    }
    let area = header.contexts;
    if batch && area.count == 0 {
        // No chunk was small enough; such tables say nothing about contexts.
        return Ok(Contexts::Batch {
            area: 0..0,
            count: 0,
        });
    }
    expect_equal("chunk table header", "context offset", area.offset, entries)?;
    if u64::from(area.count) > u64::from(info.chunk_count) {
        let problem = "more than there are chunks";
        let object = "chunk table header";
        return Err(FormatError::corrupt(
            object,
            0_u32,
            "context count",
            area.count,
            problem,
        ));
    }
    let contexts = u64::from(area.count) * as_u64(CONTEXT_SIZE);
    let end = area.offset.checked_add(area.size).filter(|&end| end <= got);
    let (Some(end), true) = (end, contexts <= area.size) else {
        let problem = "too small for the contexts, or ends beyond the table";
        let object = "chunk table header";
        return Err(FormatError::corrupt(
            object,
            0_u32,
            "context size",
            area.size,
            problem,
        ));
    };
    let start = usize_of(area.offset);
    let dictionaries = start + usize_of(contexts);
    debug_assert!(usize_of(end) <= table_len);
    let (count, area) = (area.count, start..dictionaries);
    Ok(if zran {
        Contexts::Zran {
            area,
            count,
            dictionaries: dictionaries..usize_of(end),
        }
    } else {
        Contexts::Batch { area, count }
    })
}
