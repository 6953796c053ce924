//! One blob in the container format, and what it must read as.

use std::sync::Arc;

use anyhow::{Context as _, Result};

use storage::blob_writer::{BlobOptions, BlobWriter, ChunkData, PreparedChunk};
use storage::digest::ChunkDigests;
use storage::{BlobInfo, ChunkIndex, Digest, Digester};

/// Size of its chunks, in bytes.
pub const CHUNK: usize = 64 << 10;

/// A blob of chunks that do not compress.
#[derive(Debug)]
pub struct SampleBlob {
    /// What an image would say about it.
    pub info: BlobInfo,
    /// The stored blob.
    pub file: Vec<u8>,
    /// What it reads as.
    pub plain: Vec<u8>,
    /// The digests of its chunks.
    pub digests: Arc<Digests>,
}

/// The digests that an image would vouch for.
#[derive(Debug)]
pub struct Digests(Vec<Digest>);

impl ChunkDigests for Digests {
    fn chunk_digest(&self, index: ChunkIndex) -> Option<Digest> {
        self.0.get(index.as_usize()).copied()
    }

    fn chunk_plain_offset(&self, index: ChunkIndex) -> Option<u64> {
        // All chunks have the same size.
        u64::try_from(index.as_usize().checked_mul(CHUNK)?).ok()
    }
}

impl SampleBlob {
    /// Makes a blob of so many chunks.
    ///
    /// # Errors
    /// Never, unless memory runs out.
    pub fn new(chunks: usize, seed: u64) -> Result<Self> {
        let options = BlobOptions {
            chunk_size: u32::try_from(CHUNK)?,
            digester: Digester::Blake3,
            ..BlobOptions::default()
        };
        let mut file = Vec::new();
        let mut writer = BlobWriter::new(&mut file, options)?;
        let (mut plain, mut digests) = (Vec::new(), Vec::new());
        let mut random = Random(seed);
        for _ in 0..chunks {
            let data: Vec<u8> = (0..CHUNK / 8)
                .flat_map(|_| random.next().to_le_bytes())
                .collect();
            let digest = Digest::of(options.digester, &data);
            writer.append(&PreparedChunk {
                digest,
                uncompressed_size: options.chunk_size,
                crc32c: crc32c::crc32c(&data),
                data: ChunkData::Raw(&data),
            })?;
            digests.push(digest);
            plain.extend(data);
        }
        let finished = writer.finish(|_| Ok(Vec::new()))?;
        Ok(Self {
            info: finished.info.context("a blob without chunks")?,
            file,
            plain,
            digests: Arc::new(Digests(digests)),
        })
    }
}

/// Numbers that look random and are the same for the same seed (splitmix64).
#[derive(Clone, Debug)]
pub struct Random(pub u64);

impl Random {
    /// The next number.
    #[allow(clippy::should_implement_trait, reason = "it never ends")]
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    /// A number below `limit`, which is not 0.
    pub fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit
    }
}
