//! The data of an image, chunk by chunk, straight from where its blobs are.
//!
//! A reader of chunks names them in the order in which it wants them. Neighbours in
//! the blob are fetched together; each is decoded and compared with the digest that
//! the bootstrap records before anybody sees it. Nothing is cached but the last
//! unit that was decoded, because small chunks share one.
//!
//! The bootstrap says where a chunk is stored, so a blob without its chunk table
//! will do: just the `image.blob` section of a layer. Only blobs with batches, and
//! layers that are used in place, need their table; it is fetched when first used.
//!
//! Memory: one fetch (4 MiB, or one unit) and one decoded unit (16 MiB) a reader.

use std::ops::Range;
use std::sync::{Arc, OnceLock};

use rafs::Image;
use rafs::tree::ChunkRecord;
use storage::backend::{Backend, Fetch, Priority, fetch_to_vec};
use storage::chunk::Encoding;
use storage::codec::{self, CodecError, decompress_into};
use storage::error::ReadError;
use storage::format::chunk_table::ChunkTable;
use storage::format::{FormatError, stored_table};
use storage::{BlobFeatures, BlobId, BlobIndex, BlobInfo, ChunkIndex, Digest};

use crate::pipeline::item::len;

/// Longest joined fetch in bytes.
const MAX_FETCH: u64 = 4 << 20;

/// Largest gap between two units that is fetched along.
const MAX_GAP: u64 = 64 << 10;

/// Longest stored unit accepted, in bytes. Compression never makes one longer than
/// the 16 MiB that it decodes to; the input of a gzip seek context has at most 32.
const MAX_STORED: u64 = 33 << 20;

/// Longest stored chunk table that is fetched, in bytes.
const MAX_TABLE: u64 = 256 << 20;

/// Part of a chunk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Span {
    /// The blob that holds it: one of the image.
    pub blob: BlobIndex,
    /// The chunk.
    pub chunk: ChunkIndex,
    /// Bytes of the chunk that are wanted.
    pub within: Range<u64>,
}

/// An image with its blobs. Shared by all threads that read it.
#[derive(Debug)]
pub struct ImageData {
    image: Arc<Image>,
    backend: Arc<dyn Backend>,
    /// The chunk table of every blob that needs one, once it is fetched.
    tables: Vec<OnceLock<Result<ChunkTable, ReadError>>>,
}

/// Where a chunk is and how to decode it.
#[derive(Clone, Debug)]
struct Located {
    unit: Unit,
    chunk: ChunkIndex,
    digest: Digest,
    /// Start of the chunk in the decoded unit.
    start: usize,
    size: usize,
    /// The bytes of the chunk that are wanted.
    within: Range<usize>,
}

/// The smallest part of a blob that can be decoded.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Unit {
    blob: BlobIndex,
    stored: Range<u64>,
    decode: Decode,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Decode {
    Raw,
    /// One compressed unit of this many bytes.
    Compressed(usize),
    /// A gzip seek context.
    Zran(u32),
}

impl ImageData {
    /// * `image`: has passed [`Image::verify_tree`].
    /// * `backend`: where its blobs are. Nothing is fetched yet.
    #[must_use]
    pub fn new(image: Arc<Image>, backend: Arc<dyn Backend>) -> Self {
        let tables = image.blobs().iter().map(|_| OnceLock::new()).collect();
        Self {
            image,
            backend,
            tables,
        }
    }

    /// A reader for one thread.
    #[must_use]
    pub fn reader(&self) -> Reader<'_> {
        Reader {
            data: self,
            unit: None,
            verified: None,
            plain: Vec::new(),
        }
    }

    fn info(&self, blob: BlobIndex) -> &BlobInfo {
        &self.image.blobs()[blob.as_usize()]
    }

    /// The record of a chunk; the whole image was verified, so it is there.
    fn record(&self, blob: BlobIndex, chunk: ChunkIndex) -> Result<ChunkRecord, ReadError> {
        let position = self.image.chunk_position(blob, chunk);
        position
            .and_then(|position| self.image.chunk_record(position).ok())
            .ok_or_else(|| ReadError::NoDigest {
                blob: self.info(blob).id.clone(),
                index: chunk,
            })
    }

    fn table(&self, blob: BlobIndex) -> Result<&ChunkTable, ReadError> {
        let table = self.tables[blob.as_usize()].get_or_init(|| self.fetch_table(blob));
        table.as_ref().map_err(Clone::clone)
    }

    fn fetch_table(&self, blob: BlobIndex) -> Result<ChunkTable, ReadError> {
        let info = self.info(blob);
        let wrong = |error: FormatError| ReadError::Table {
            blob: info.id.clone(),
            source: Arc::new(error),
        };
        let file = if info.features.contains(BlobFeatures::SEPARATE) {
            BlobId::from_digest(&info.meta_blob_digest)
        } else {
            info.id.clone()
        };
        let range = stored_table::stored_range(info).map_err(wrong)?;
        let stored = self.fetch(&file, range, MAX_TABLE)?;
        stored_table::open(info, &stored).map_err(wrong)
    }

    fn fetch(&self, blob: &BlobId, range: Range<u64>, limit: u64) -> Result<Vec<u8>, ReadError> {
        let request = Fetch {
            blob,
            range: range.clone(),
            priority: Priority::OnDemand,
            served_by: None,
            direct: false,
            blob_len: None,
        };
        fetch_to_vec(&*self.backend, &request, limit).map_err(|error| ReadError::Fetch {
            blob: blob.clone(),
            stored: range,
            source: Arc::new(error),
        })
    }

    fn locate(&self, span: &Span) -> Result<Located, ReadError> {
        let info = self.info(span.blob);
        let record = self.record(span.blob, span.chunk)?;
        let with_table = BlobFeatures::BATCH | BlobFeatures::ZRAN;
        let (unit, start) = if info.features.intersects(with_table) {
            self.by_table(span, &record)?
        } else {
            (by_record(span.blob, &record), 0)
        };
        let within = range_in_memory(&span.within);
        if within.end > len(record.uncompressed_size) || within.start > within.end {
            return Err(ReadError::OutOfRange {
                blob: info.id.clone(),
                range: span.within.clone(),
                size: record.uncompressed_size.into(),
            });
        }
        Ok(Located {
            unit,
            chunk: span.chunk,
            digest: record.digest,
            start,
            size: len(record.uncompressed_size),
            within,
        })
    }

    fn by_table(&self, span: &Span, record: &ChunkRecord) -> Result<(Unit, usize), ReadError> {
        let table = self.table(span.blob)?;
        let wrong = |error: FormatError| ReadError::Table {
            blob: self.info(span.blob).id.clone(),
            source: Arc::new(error),
        };
        let chunk = table.chunk(span.chunk).map_err(wrong)?;
        let start = record.uncompressed_offset;
        let place = start..start.saturating_add(record.uncompressed_size.into());
        if chunk.plain_range() != place {
            return Err(ReadError::Mismatch {
                blob: self.info(span.blob).id.clone(),
                index: span.chunk,
                image: place,
                table: chunk.plain_range(),
            });
        }
        let size = len(chunk.plain_size);
        let (stored, decode, start) = match chunk.encoding {
            Encoding::Raw { offset } => (extent(offset, chunk.plain_size), Decode::Raw, 0),
            Encoding::Compressed {
                offset,
                size: stored,
            } => (extent(offset, stored), Decode::Compressed(size), 0),
            Encoding::Batch {
                offset,
                context,
                within,
            } => {
                let batch = table.batch_context(context).map_err(wrong)?;
                let decode = match batch.is_raw() {
                    true => Decode::Raw,
                    false => Decode::Compressed(len(batch.uncompressed_size)),
                };
                (extent(offset, batch.compressed_size), decode, len(within))
            }
            Encoding::Zran { context, within } => {
                let input = table.zran_context(context).map_err(wrong)?.input;
                (input, Decode::Zran(context), len(within))
            }
        };
        let unit = Unit {
            blob: span.blob,
            stored,
            decode,
        };
        Ok((unit, start))
    }
}

fn by_record(blob: BlobIndex, record: &ChunkRecord) -> Unit {
    let size = record.uncompressed_size;
    let (stored, decode) = match record.compressed {
        true => (record.compressed_size, Decode::Compressed(len(size))),
        false => (size, Decode::Raw),
    };
    Unit {
        blob,
        stored: extent(record.compressed_offset, stored),
        decode,
    }
}

fn extent(offset: u64, size: u32) -> Range<u64> {
    offset..offset.saturating_add(size.into())
}

/// Chunks have at most 16 MiB; what lies beyond fails the check that follows.
fn range_in_memory(range: &Range<u64>) -> Range<usize> {
    let at = |position| usize::try_from(position).unwrap_or(usize::MAX);
    at(range.start)..at(range.end)
}

/// Reads chunks for one thread; keeps the unit that was decoded last.
#[derive(Debug)]
pub struct Reader<'a> {
    data: &'a ImageData,
    /// The unit that is in `plain`.
    unit: Option<Unit>,
    /// The chunk of it that was verified last.
    verified: Option<ChunkIndex>,
    plain: Vec<u8>,
}

impl Reader<'_> {
    /// Hands the bytes of every span to `each`, in order.
    ///
    /// # Errors
    /// [`ReadError`]: a span outside its chunk, a blob that cannot be read, and data
    /// that does not match the bootstrap.
    pub fn read(
        &mut self,
        spans: &[Span],
        mut each: impl FnMut(usize, &[u8]),
    ) -> Result<(), ReadError> {
        let located: Vec<_> = spans
            .iter()
            .map(|span| self.data.locate(span))
            .collect::<Result<_, _>>()?;
        let mut done = 0;
        while let Some(first) = located.get(done) {
            let stored = joined(&located[done..]);
            let count = located[done..]
                .iter()
                .take_while(|next| belongs(&stored, &first.unit, &next.unit))
                .count()
                .max(1);
            let group = &located[done..done + count];
            let known = group
                .iter()
                .all(|one| self.unit.as_ref() == Some(&one.unit));
            let bytes = match known {
                true => Vec::new(),
                false => {
                    let info = self.data.info(first.unit.blob);
                    self.data.fetch(&info.id, stored.clone(), MAX_STORED)?
                }
            };
            for (index, one) in group.iter().enumerate() {
                each(done + index, self.chunk(one, &bytes, stored.start)?);
            }
            done += count;
        }
        Ok(())
    }

    /// The wanted bytes of a chunk, verified.
    ///
    /// * `bytes`: what was fetched, starting at `base` of the stored blob.
    fn chunk(&mut self, one: &Located, bytes: &[u8], base: u64) -> Result<&[u8], ReadError> {
        if self.unit.as_ref() != Some(&one.unit) {
            self.unit = None;
            self.verified = None;
            self.decode(one, bytes, base)?;
            self.unit = Some(one.unit.clone());
        }
        let info = self.data.info(one.unit.blob);
        let chunk = self
            .plain
            .get(one.start..)
            .and_then(|rest| rest.get(..one.size));
        let wrong = || ReadError::Digest {
            blob: info.id.clone(),
            index: one.chunk,
        };
        let chunk = chunk.ok_or_else(wrong)?;
        if self.verified != Some(one.chunk) {
            if Digest::of(info.digester, chunk) != one.digest {
                return Err(wrong());
            }
            self.verified = Some(one.chunk);
        }
        Ok(&chunk[one.within.clone()])
    }

    fn decode(&mut self, one: &Located, bytes: &[u8], base: u64) -> Result<(), ReadError> {
        let range = range_in_memory(&(one.unit.stored.start - base..one.unit.stored.end - base));
        let stored = bytes.get(range).unwrap_or_default();
        let info = self.data.info(one.unit.blob);
        let failed = |error: CodecError| ReadError::Decode {
            blob: info.id.clone(),
            index: one.chunk,
            source: Arc::new(error),
        };
        match one.unit.decode {
            Decode::Raw => {
                self.plain.clear();
                self.plain.extend_from_slice(stored);
                Ok(())
            }
            Decode::Compressed(size) => {
                self.plain.resize(size, 0);
                decompress_into(info.compressor, stored, &mut self.plain).map_err(failed)
            }
            Decode::Zran(context) => {
                let table = self.data.table(one.unit.blob)?;
                let context = table
                    .zran_context(context)
                    .map_err(|error| ReadError::Table {
                        blob: info.id.clone(),
                        source: Arc::new(error),
                    })?;
                self.plain.resize(len(context.output_size), 0);
                codec::zran::decode(&context, stored, &mut self.plain).map_err(failed)
            }
        }
    }
}

/// What one fetch covers: the first unit, and those that follow closely.
fn joined(located: &[Located]) -> Range<u64> {
    let Some(first) = located.first() else {
        return 0..0;
    };
    let mut stored = first.unit.stored.clone();
    for next in located {
        let (start, end) = (next.unit.stored.start, next.unit.stored.end);
        let fits = next.unit.blob == first.unit.blob
            && start >= stored.start
            && start <= stored.end.saturating_add(MAX_GAP)
            && end.saturating_sub(stored.start) <= MAX_FETCH;
        if !fits {
            break;
        }
        stored.end = stored.end.max(end);
    }
    stored
}

fn belongs(stored: &Range<u64>, first: &Unit, next: &Unit) -> bool {
    next.blob == first.blob && next.stored.start >= stored.start && next.stored.end <= stored.end
}
