//! Builds an image with the published `nydus-builder` crate.
//!
//! [`image`] is the crate's `create` for the option sets of the matrix; the
//! feature words it passes are those that the reference command line passes
//! (`docs/format.md`, "Blob features"). Where to read next: `matrix.rs`.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use anyhow::{Context, Result, anyhow};
use nydus_builder::attributes::Attributes;
use nydus_builder::{
    ArtifactStorage, BlobManager, BootstrapManager, BuildContext, Builder, ConversionType,
    DirectoryBuilder, Feature, Features, Prefetch, TarballBuilder, WhiteoutSpec,
};
use nydus_rafs::metadata::RafsVersion;
use nydus_storage::device::BlobFeatures;
use nydus_storage::meta::BatchContextGenerator;
use nydus_utils::{compress, digest};

use crate::matrix::{Options, Source};

/// An image on disk.
#[derive(Clone, Debug)]
pub struct Built {
    /// The bootstrap, or the blob that contains it.
    pub boot: PathBuf,
    /// Where the blobs are, each named by its id.
    pub blob_dir: PathBuf,
}

/// Builds `source` (a directory, or a tar when `options` says so) into `out`,
/// which is created: the bootstrap `boot` and a directory `blobs`.
pub fn image(source: &Path, options: &Options, out: &Path) -> Result<Built> {
    let blob_dir = out.join("blobs");
    fs::create_dir_all(&blob_dir)?;
    let boot = out.join("boot");
    let mut context = context(source, options, &blob_dir)?;
    let storage = (!options.inline_meta).then(|| ArtifactStorage::SingleFile(boot.clone()));
    let mut bootstraps = BootstrapManager::new(storage, None);
    let mut blobs = BlobManager::new(context.digester, false);
    let mut builder: Box<dyn Builder> = match options.source {
        Source::Dir => Box::new(DirectoryBuilder::new()),
        _ => Box::new(TarballBuilder::new(context.conversion_type)),
    };
    builder
        .build(&mut context, &mut bootstraps, &mut blobs)
        .with_context(|| format!("build {} with {options}", source.display()))?;
    if options.source == Source::TargzRef {
        link_layer(source, &blobs, &blob_dir)?;
    }
    let boot = if options.inline_meta {
        only_image(&blob_dir, &blobs)?
    } else {
        boot
    };
    Ok(Built { boot, blob_dir })
}

fn context(source: &Path, options: &Options, blob_dir: &Path) -> Result<BuildContext> {
    let mut features = Features::new();
    if options.blob_toc {
        features = Features::try_from("blob-toc")?;
        assert!(features.is_enabled(Feature::BlobToc));
    }
    let kind = match options.source {
        Source::Dir => ConversionType::DirectoryToRafs,
        Source::Tar => ConversionType::TarToRafs,
        Source::Targz => ConversionType::TargzToRafs,
        Source::TargzRef => ConversionType::TargzToRef,
    };
    let compressor: compress::Algorithm = options.compressor.name().parse()?;
    let digester: digest::Algorithm = options.digester.name().parse()?;
    let mut context = BuildContext::new(
        String::new(),
        true,
        0,
        compressor,
        digester,
        true,
        WhiteoutSpec::None,
        kind,
        source.to_path_buf(),
        Prefetch::default(),
        Some(ArtifactStorage::FileDir((
            blob_dir.to_path_buf(),
            String::new(),
        ))),
        None,
        options.inline_meta,
        features,
        false,
        Attributes::default(),
    );
    context.set_fs_version(RafsVersion::V6);
    context.set_chunk_size(options.chunk_size);
    context.blob_features.insert(BlobFeatures::ALIGNED);
    if options.blob_toc {
        context
            .blob_features
            .insert(BlobFeatures::INLINED_CHUNK_DIGEST);
    }
    if options.batch_size > 0 {
        context.set_batch_size(options.batch_size);
        let generator = BatchContextGenerator::new(options.batch_size)?;
        context.blob_batch_generator = Some(Mutex::new(generator));
        context
            .blob_features
            .insert(BlobFeatures::BATCH | BlobFeatures::CHUNK_INFO_V2);
    }
    if options.source == Source::TargzRef {
        context
            .blob_features
            .insert(BlobFeatures::SEPARATE | BlobFeatures::CHUNK_INFO_V2);
    }
    Ok(context)
}

/// A reference image reads chunk data from the layer itself, stored by its id.
fn link_layer(layer: &Path, blobs: &BlobManager, blob_dir: &Path) -> Result<()> {
    let id = blobs
        .get_blob_ids()
        .pop()
        .ok_or_else(|| anyhow!("no blob in the image"))?;
    fs::copy(layer, blob_dir.join(id))?;
    Ok(())
}

/// The blob with the bootstrap inside. For reference images the directory also
/// holds the layer, whose id is the one the builder reports.
fn only_image(blob_dir: &Path, blobs: &BlobManager) -> Result<PathBuf> {
    let ids = blobs.get_blob_ids();
    let mut found = Vec::new();
    for entry in fs::read_dir(blob_dir)? {
        found.push(entry?.path());
    }
    if found.len() > 1 {
        found.retain(|p| !ids.iter().any(|id| p.ends_with(id)));
    }
    found
        .pop()
        .ok_or_else(|| anyhow!("the builder wrote no blob"))
}
