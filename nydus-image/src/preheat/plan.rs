//! Which ranges of which blobs are warmed, and how it is known that they are right.
//!
//! Always: the bootstrap layer, and the chunk table of each blob. Of the data, the hot
//! chunks rounded out to pieces; all of a blob if that is more than half of it. Blobs that
//! are warmed whole are compared with their digest, parts by the digests of the chunks.

use std::ops::Range;
use std::path::PathBuf;
use std::sync::Arc;

use anyhow::{Context as _, ensure};
use rafs::Image;
use storage::error::ReadError;
use storage::format::chunk_table::ChunkTable;
use storage::format::stored_table::stored_range;
use storage::mapped::Mapped;
use storage::oci::bootstrap::{NydusManifest, fetch_bootstrap};
use storage::oci::manifest::MAX_CONFIG;
use storage::oci::{ContentDigest, Images};
use storage::{BlobFeatures, BlobIndex, BlobInfo};

use super::check::Nothing;
use super::hot::{self, Chunks};
use super::pieces::{rounded, total};
use crate::access::open_verified;
use crate::data::{ImageData, Span};

/// What is wanted of an image.
#[derive(Clone, Debug, Default)]
pub(super) struct Wish {
    /// All of every blob.
    pub(super) whole: bool,
    /// Files that are hot, beside those that the image names.
    pub(super) files: Vec<PathBuf>,
}

/// A blob to warm.
#[derive(Clone, Debug)]
pub(super) struct Target {
    pub(super) digest: ContentDigest,
    pub(super) size: u64,
    /// The length that the image gives for a blob of data, by which daemons divide it
    /// into tasks; `None` for what is one task.
    pub(super) stored: Option<u64>,
    /// In order, and whole pieces.
    pub(super) ranges: Vec<Range<u64>>,
    pub(super) proof: Proof,
}

/// By what the bytes are verified.
#[derive(Clone, Debug)]
pub(super) enum Proof {
    /// By the digest of the blob.
    Digest,
    /// By the digests of these chunks.
    Chunks(Parts),
}

/// Chunks of one blob.
#[derive(Clone, Debug)]
pub(super) struct Parts {
    pub(super) image: Arc<Image>,
    pub(super) tables: Arc<[Option<ChunkTable>]>,
    /// With the bytes that each needs, by their end.
    pub(super) spans: Vec<(Range<u64>, Span)>,
}

impl Target {
    fn whole(digest: ContentDigest, size: u64) -> Self {
        let all = 0..size;
        Self {
            digest,
            size,
            stored: None,
            ranges: vec![all],
            proof: Proof::Digest,
        }
    }

    /// All of a blob of data.
    fn data(digest: ContentDigest, size: u64, info: &BlobInfo) -> Self {
        Self {
            stored: Some(info.compressed_size),
            ..Self::whole(digest, size)
        }
    }

    /// Bytes to fetch.
    pub(super) fn bytes(&self) -> u64 {
        total(&self.ranges)
    }

    pub(super) fn is_whole(&self) -> bool {
        matches!(self.proof, Proof::Digest)
    }
}

/// Reads the bootstrap of an image and plans for it.
pub(super) async fn of_image(
    images: &Images,
    manifest: &NydusManifest,
    wish: &Wish,
) -> anyhow::Result<Vec<Target>> {
    let directory = tempfile::tempdir().context("cannot make a temporary directory")?;
    let files = fetch_bootstrap(images, manifest, directory.path()).await?;
    let config = &manifest.manifest.config;
    let config = images.small_blob(config, MAX_CONFIG).await?;
    let (manifest, wish) = (manifest.clone(), wish.clone());
    let work = tokio::task::spawn_blocking(move || {
        let image = open_verified(&files.bootstrap)?;
        let mut tables = Vec::new();
        for info in image.blobs() {
            let file = files.blob_metas.iter().find(|(id, _)| *id == info.id);
            let table = file.map(|(_, path)| {
                let open = || anyhow::Ok(ChunkTable::open(Mapped::open(path)?, info)?);
                open().with_context(|| format!("the chunk table of blob {} is damaged", info.id))
            });
            tables.push(table.transpose()?);
        }
        let hot = match wish.whole {
            true => Chunks::new(),
            false => hot::chunks(&image, &config, &wish.files)?,
        };
        let plan = Plan {
            data: ImageData::with_tables(Arc::clone(&image), Arc::new(Nothing), &tables),
            tables: tables.into(),
            image,
            hot,
            manifest,
            whole: wish.whole,
        };
        // The files stay mapped when the directory is gone.
        drop(directory);
        plan.targets()
    });
    work.await.context("planning crashed")?
}

struct Plan {
    image: Arc<Image>,
    data: ImageData,
    tables: Arc<[Option<ChunkTable>]>,
    hot: Chunks,
    manifest: NydusManifest,
    whole: bool,
}

impl Plan {
    fn targets(&self) -> anyhow::Result<Vec<Target>> {
        let bootstrap = &self.manifest.bootstrap;
        let mut targets = vec![Target::whole(bootstrap.digest.clone(), bootstrap.size)];
        for (index, info) in (0..).map(BlobIndex::new).zip(self.image.blobs()) {
            if info.features.contains(BlobFeatures::SEPARATE) {
                let digest = ContentDigest::from_sha256(&info.meta_blob_digest);
                let size = self.listed(&digest).unwrap_or(info.meta_blob_size);
                targets.push(Target::whole(digest, size));
            }
            let target = self
                .of_blob(index, info)
                .with_context(|| format!("blob {} cannot be preheated", info.id))?;
            targets.extend(target);
        }
        targets.retain(|target| target.size > 0);
        Ok(targets)
    }

    fn of_blob(&self, index: BlobIndex, info: &BlobInfo) -> anyhow::Result<Option<Target>> {
        let digest: ContentDigest = format!("sha256:{}", info.id)
            .parse()
            .context("its id is no SHA-256, so it is in no registry")?;
        let size = self.listed(&digest).unwrap_or(info.compressed_size);
        if self.whole {
            return Ok(Some(Target::data(digest, size, info)));
        }
        let spans = match self.spans(index) {
            Ok(spans) => spans,
            Err(error) => {
                tracing::warn!(
                    "blob {}: where its chunks are is not known ({error}); all of it is warmed",
                    info.id
                );
                return Ok(Some(Target::data(digest, size, info)));
            }
        };
        let mut wanted: Vec<_> = spans.iter().map(|(stored, _)| stored.clone()).collect();
        if !info.features.contains(BlobFeatures::SEPARATE) && info.meta.compressed_size > 0 {
            wanted.push(stored_range(info)?);
        }
        let last = wanted.iter().map(|range| range.end).max();
        let last = last.unwrap_or_default();
        ensure!(
            last <= size,
            "it has {size} bytes, and the image uses {last}"
        );
        let ranges = rounded(&wanted, size);
        if ranges.is_empty() {
            return Ok(None);
        }
        if total(&ranges) > size / 2 {
            return Ok(Some(Target::data(digest, size, info)));
        }
        let proof = Proof::Chunks(Parts {
            image: Arc::clone(&self.image),
            tables: Arc::clone(&self.tables),
            spans,
        });
        Ok(Some(Target {
            digest,
            size,
            stored: Some(info.compressed_size),
            ranges,
            proof,
        }))
    }

    /// The hot chunks of a blob.
    fn spans(&self, blob: BlobIndex) -> Result<Vec<(Range<u64>, Span)>, ReadError> {
        let mut spans = Vec::new();
        for (_, chunk) in self.hot.iter().filter(|(of, _)| *of == blob) {
            spans.push(self.data.whole(blob, *chunk)?);
        }
        spans.sort_by_key(|(stored, _)| (stored.end, stored.start));
        Ok(spans)
    }

    /// The length of a blob that the manifest lists.
    fn listed(&self, digest: &ContentDigest) -> Option<u64> {
        let layers = &self.manifest.manifest.layers;
        let layer = layers.iter().find(|layer| layer.digest == *digest)?;
        Some(layer.size)
    }
}

/// Each blob that several images warm whole once.
pub(super) fn without_repetitions(targets: Vec<Target>) -> Vec<Target> {
    let mut kept: Vec<Target> = Vec::new();
    let (whole, parts): (Vec<_>, Vec<_>) = targets.into_iter().partition(Target::is_whole);
    for target in whole.into_iter().chain(parts) {
        let done = |known: &Target| known.is_whole() && known.digest == target.digest;
        if !kept.iter().any(done) {
            kept.push(target);
        }
    }
    kept
}
