//! `check`: whether a bootstrap is valid and, with the blobs at hand, whether
//! every chunk is what the bootstrap says.

use std::fmt::Write as _;
use std::path::PathBuf;
use std::time::Instant;

use anyhow::Context as _;
use storage::{BlobFeatures, BlobInfo};

use crate::access;
use crate::report::Report;

mod blobs;

pub use blobs::{ChunkError, ChunkProblem};

/// Check a bootstrap and, with --blob-dir, all its data
///
/// Every inode, directory, attribute and chunk record of the bootstrap is checked.
/// With --blob-dir, every chunk of every blob is read, decompressed and compared
/// with its digest, on all processors.
///
/// Example:
///
///   nydus-image check --blob-dir blobs image.boot
#[derive(Debug, clap::Args)]
#[command(verbatim_doc_comment)]
pub struct Args {
    /// Bootstrap to check; or a blob that carries its bootstrap
    #[arg(value_name = "BOOTSTRAP", required_unless_present = "bootstrap")]
    positional: Option<PathBuf>,

    /// Bootstrap to check (older form)
    #[arg(
        short = 'B',
        long,
        value_name = "bootstrap",
        conflicts_with = "positional"
    )]
    bootstrap: Option<PathBuf>,

    /// Directory with the blobs, each in a file named by its id
    #[arg(short = 'D', long, value_name = "blob-dir", conflicts_with = "config")]
    blob_dir: Option<PathBuf>,

    /// Configuration file; accepted, without effect on this command
    #[arg(short = 'C', long, value_name = "config")]
    config: Option<PathBuf>,

    /// List every inode with its chunks
    #[arg(short = 'v', long)]
    verbose: bool,

    /// File to write a JSON report to
    #[arg(short = 'J', long, value_name = "output-json")]
    output_json: Option<PathBuf>,
}

/// Runs the command.
///
/// # Errors
/// Whatever is wrong with the image, or kept it from being read.
pub fn run(args: &Args) -> anyhow::Result<()> {
    let start = Instant::now();
    let path = access::either(args.positional.as_ref(), args.bootstrap.as_ref())?;
    let image = access::open_verified(path)?;
    if let Some(dir) = &args.blob_dir {
        blobs::verify(&image, dir)
            .with_context(|| format!("the data of {} is not valid", path.display()))?;
    }
    // The first line is what programs look at.
    let mut text = "RAFS filesystem metadata is valid, referenced data blobs: \n".to_owned();
    for (index, blob) in image.blobs().iter().enumerate() {
        describe(&mut text, index, blob);
    }
    if args.verbose {
        text.push_str(&rafs::dump::dump(&image).context("cannot list the image")?);
    }
    crate::output::print(&text)?;
    if let Some(json) = &args.output_json {
        Report::new(
            Some(path),
            image.blobs(),
            image.compressor(),
            "total_check",
            start,
        )
        .write_compact(json)?;
    }
    Ok(())
}

fn describe(text: &mut String, index: usize, blob: &BlobInfo) {
    // Writing to a string does not fail.
    let _ = writeln!(
        text,
        "\t {index}: {}, compressed size {}, uncompressed size {}, chunk size: {}, chunk count: {}, features: {}",
        blob.id,
        blob.compressed_size,
        blob.uncompressed_size,
        blob.chunk_size,
        blob.chunk_count,
        features(blob.features),
    );
}

/// Names of the bits that are set.
fn features(bits: BlobFeatures) -> String {
    let names = [
        (BlobFeatures::ALIGNED, "aligned"),
        (BlobFeatures::INLINED_FS_META, "fs-meta"),
        (BlobFeatures::CHUNK_INFO_V2, "chunk-v2"),
        (BlobFeatures::ZRAN, "zran"),
        (BlobFeatures::SEPARATE, "separate"),
        (BlobFeatures::INLINED_CHUNK_DIGEST, "chunk-digest"),
        (BlobFeatures::TARFS, "tarfs"),
        (BlobFeatures::BATCH, "batch"),
        (BlobFeatures::ENCRYPTED, "encrypted"),
        (BlobFeatures::CHUNKDICT_GENERATED, "chunk-dict"),
        (BlobFeatures::SEPARATED_PREFETCH, "prefetch"),
        (BlobFeatures::EXTERNAL, "external"),
        (BlobFeatures::HAS_TAR_HEADER, "tar-header"),
        (BlobFeatures::HAS_TOC, "toc"),
        (BlobFeatures::CAP_TAR_TOC, "cap-tar-toc"),
    ];
    let set = names
        .iter()
        .filter(|(bit, _)| bits.contains(*bit))
        .map(|(_, name)| *name);
    set.collect::<Vec<_>>().join(" ")
}
