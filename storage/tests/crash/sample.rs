//! A blob with known content, and the question whether a cache directory lies about it.

use std::fs::{self, File};
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::sync::Arc;

use storage::backend::Priority;
use storage::backend::local::LocalBackend;
use storage::blob::{Blob, ChunkSpan};
use storage::blob_writer::{BlobOptions, BlobWriter, ChunkData, PreparedChunk};
use storage::cache::{CacheDir, CacheState, Limits, Settings};
use storage::digest::ChunkDigests;
use storage::metrics::Metrics;
use storage::ready_map::BootId;
use storage::{BlobInfo, ChunkIndex, Compressor, Digest};

/// The blob as its image describes it.
pub(crate) struct Sample {
    info: BlobInfo,
    /// The uncompressed address space.
    plain: Vec<u8>,
    spans: Vec<ChunkSpan>,
    digests: Arc<Digests>,
    backend: Arc<LocalBackend>,
}

struct Digests(Vec<(Digest, u64)>);

impl ChunkDigests for Digests {
    fn chunk_digest(&self, index: ChunkIndex) -> Option<Digest> {
        Some(self.0.get(index.as_usize())?.0)
    }

    fn chunk_plain_offset(&self, index: ChunkIndex) -> Option<u64> {
        Some(self.0.get(index.as_usize())?.1)
    }
}

/// What was found in a cache directory.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Found {
    /// Chunks that were believed without a fetch or a check.
    pub(crate) believed: u64,
    /// Of these, chunks that do not hold what they must.
    pub(crate) wrong: u64,
    /// Suspect chunks that were checked and found good.
    pub(crate) rechecked: u64,
    /// Suspect chunks that were not.
    pub(crate) lost: u64,
}

impl Sample {
    /// Writes the blob into `dir`; the same content every time.
    pub(crate) fn write(dir: &Path, chunks: u32, chunk_size: u32) -> Self {
        let options = BlobOptions {
            compressor: Compressor::None,
            chunk_size: chunk_size.next_power_of_two(),
            ..BlobOptions::default()
        };
        let mut file = Vec::new();
        let mut writer = BlobWriter::new(&mut file, options).unwrap();
        let (mut plain, mut digests, mut spans) = (Vec::new(), Vec::new(), Vec::new());
        for number in 0..chunks {
            let data = noise(number.into(), usize::try_from(chunk_size).unwrap());
            let digest = Digest::of(options.digester, &data);
            let chunk = PreparedChunk {
                digest,
                uncompressed_size: chunk_size,
                crc32c: crc32c::crc32c(&data),
                data: ChunkData::Raw(&data),
            };
            let stored = writer.append(&chunk).unwrap();
            let start = stored.uncompressed_offset;
            digests.push((digest, start));
            spans.push(ChunkSpan {
                chunk: stored.index,
                plain: start..start + u64::from(chunk_size),
            });
            plain.extend_from_slice(&data);
            plain.resize(plain.len().next_multiple_of(4096), 0);
        }
        let info = writer.finish(|_| Ok(Vec::new())).unwrap().info.unwrap();
        fs::write(dir.join(info.id.to_string()), file).unwrap();
        Self {
            info,
            plain,
            spans,
            digests: Arc::new(Digests(digests)),
            backend: Arc::new(LocalBackend::new(vec![dir.to_owned()])),
        }
    }

    pub(crate) fn open(&self, cache: &CacheDir) -> Arc<Blob> {
        let (backend, digests) = (Arc::clone(&self.backend), Arc::clone(&self.digests));
        Blob::open(cache, self.info.clone(), backend, digests).unwrap()
    }

    pub(crate) fn info(&self) -> &BlobInfo {
        &self.info
    }

    pub(crate) fn chunk(&self, number: usize) -> &ChunkSpan {
        &self.spans[number % self.spans.len()]
    }

    /// Opens what is in `dir` in another run of the machine, and reads all of it.
    ///
    /// # Panics
    /// If anything that was checked is wrong, or the directory cannot be used.
    pub(crate) fn inspect(&self, dir: &Path, boot: u8) -> Found {
        let cache = open_cache(dir, boot);
        let blob = self.open(&cache);
        let mut found = Found::default();
        for span in self.spans.iter().filter(|span| blob.is_span_resident(span)) {
            found.believed += 1;
            found.wrong += u64::from(!self.is_right(blob.cache_file().unwrap(), span));
        }
        blob.ensure(0..self.info.uncompressed_size, Priority::Prefetch)
            .unwrap_or_else(|error| panic!("boot {boot}: {error}: {:?}", blob.cache_state()));
        assert!(matches!(blob.cache_state(), CacheState::Writable) && blob.is_complete());
        if found.wrong == 0 {
            let file = blob.cache_file().unwrap();
            assert!(self.spans.iter().all(|span| self.is_right(file, span)));
        }
        for (metric, value) in cache.metrics().snapshot() {
            match metric.name {
                "cache.chunks_rechecked" => found.rechecked = value,
                "cache.recheck_failures" => found.lost = value,
                _ => {}
            }
        }
        found
    }

    fn is_right(&self, file: &File, span: &ChunkSpan) -> bool {
        let range =
            usize::try_from(span.plain.start).unwrap()..usize::try_from(span.plain.end).unwrap();
        let mut bytes = vec![0; range.len()];
        file.read_exact_at(&mut bytes, span.plain.start).unwrap();
        bytes == self.plain[range]
    }
}

/// A cache directory as a process of that run of the machine opens it.
pub(crate) fn open_cache(dir: &Path, boot: u8) -> CacheDir {
    let settings = Settings {
        metrics: Arc::new(Metrics::default()),
        // No thread in the background.
        limits: Limits::NONE,
        boot: Some(BootId::invented(boot)),
        ..Settings::default()
    };
    CacheDir::open_as(dir, settings).unwrap()
}

/// Bytes without a zero page among them.
fn noise(seed: u64, len: usize) -> Vec<u8> {
    let mut random = Random(seed + 1);
    (0..len)
        .map(|_| random.below(255).to_le_bytes()[0] + 1)
        .collect()
}

/// Numbers that look random and are the same every time.
pub(crate) struct Random(pub(crate) u64);

impl Random {
    pub(crate) fn below(&mut self, end: u64) -> u64 {
        self.0 = self
            .0
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % end
    }
}
