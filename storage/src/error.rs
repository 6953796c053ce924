//! Why bytes of a blob could not be served.
//!
//! One enum for the whole read path. It is `Clone`, because the thread that
//! fetches a chunk shares its failure with those that wait for the same chunk.
//! Nothing here is remembered: the next read tries again.
#![forbid(unsafe_code)]

use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use crate::backend::BackendError;
use crate::blob_id::BlobId;
use crate::cache::CacheError;
use crate::codec::CodecError;
use crate::format::FormatError;
use crate::units::ChunkIndex;

/// Why bytes of a blob could not be served.
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ReadError {
    /// The backend could not deliver; a later read may succeed.
    #[error("blob {blob}: fetching bytes {} to {}", stored.start, stored.end)]
    Fetch {
        /// The blob the bytes were wanted from.
        blob: BlobId,
        /// Range of the stored (compressed) blob.
        stored: Range<u64>,
        /// What the backend said.
        source: Arc<BackendError>,
    },
    /// The bytes arrived but are not the ones the image was built from.
    #[error("blob {blob}: chunk {index} does not match its digest")]
    Digest {
        /// The blob.
        blob: BlobId,
        /// The chunk.
        index: ChunkIndex,
    },
    /// The image records no digest for the chunk, so it cannot be verified.
    #[error("blob {blob}: the image has no digest for chunk {index}")]
    NoDigest {
        /// The blob.
        blob: BlobId,
        /// The chunk.
        index: ChunkIndex,
    },
    /// The bytes arrived but do not decode.
    #[error("blob {blob}: decoding chunk {index}")]
    Decode {
        /// The blob.
        blob: BlobId,
        /// The chunk.
        index: ChunkIndex,
        /// What the decoder said.
        source: Arc<CodecError>,
    },
    /// The chunk table, or the table of contents that vouches for it, is not usable.
    #[error("blob {blob}: chunk table")]
    Table {
        /// The blob.
        blob: BlobId,
        /// What is wrong with it.
        source: Arc<FormatError>,
    },
    /// Image and chunk table disagree about where a chunk is: one of them is corrupt.
    #[error("blob {blob}: the image puts chunk {index} at {image:?}, the chunk table at {table:?}")]
    Mismatch {
        /// The blob.
        blob: BlobId,
        /// The chunk.
        index: ChunkIndex,
        /// Bytes of the uncompressed address space according to the image.
        image: Range<u64>,
        /// The same according to the chunk table.
        table: Range<u64>,
    },
    /// The range is not inside the uncompressed address space.
    #[error("blob {blob}: bytes {range:?} wanted, there are {size}")]
    OutOfRange {
        /// The blob.
        blob: BlobId,
        /// The range.
        range: Range<u64>,
        /// Length of the uncompressed address space.
        size: u64,
    },
    /// The local cache failed; the backend was not at fault.
    #[error("blob {blob}: local cache")]
    Cache {
        /// The blob.
        blob: BlobId,
        /// Which file, and what happened.
        source: CacheError,
    },
    /// Another reader was fetching the chunk and did not finish in time.
    #[error("blob {blob}: no result for chunk {index} after {waited:?}")]
    TimedOut {
        /// The blob.
        blob: BlobId,
        /// The chunk.
        index: ChunkIndex,
        /// How long this reader waited.
        waited: Duration,
    },
    /// The reader that was fetching the bytes vanished without a result.
    #[error("blob {blob}: the fetch was abandoned")]
    Abandoned {
        /// The blob.
        blob: BlobId,
    },
    /// The blob is being closed.
    #[error("blob {blob}: closing")]
    Stopped {
        /// The blob.
        blob: BlobId,
    },
}
