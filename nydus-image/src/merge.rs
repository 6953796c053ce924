//! `merge`: bootstraps of single layers into the bootstrap of an image.
//!
//! Layers are applied lowest first with OCI whiteouts. Blobs are not touched; the
//! result refers to them by id. The id inside a layer's bootstrap is not believed,
//! because it was written before the blob was complete: it is taken from the name
//! of the layer's file, or from the lists on the command line.

use std::io::BufReader;
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context as _, bail, ensure};
use rafs::merge::{WhiteoutSpec, apply};
use rafs::writer::{BlobOrder, WriteOptions, write};
use rafs::{Image, Tree};
use sha2::{Digest as _, Sha256};
use storage::{BlobFeatures, BlobId, BlobInfo, Digest};

use crate::cli::{UsageError, path_or_empty};
use crate::output::write_file;
use crate::prefetch::{Policy, Prefetch};
use crate::report::Report;
use crate::reuse::{Reused, Traits, id_from_name};

/// Merge layer bootstraps into one image bootstrap
///
/// Sources are listed lowest layer first. Whiteouts of upper layers (`.wh.` names)
/// remove files of lower ones. Unless told otherwise, the id of a layer's blob is
/// the name of its bootstrap file up to the first dot.
///
/// Exit code 2 means that the layers were built with different options and cannot
/// be merged.
///
/// Example:
///
///   nydus-image merge --bootstrap image.boot layers/BASE_ID layers/TOP_ID
#[derive(Debug, clap::Args)]
#[command(verbatim_doc_comment)]
pub struct Args {
    /// Bootstraps of the layers, lowest first
    #[arg(value_name = "SOURCE", required = true)]
    sources: Vec<PathBuf>,

    /// Image that lies below all sources
    #[arg(
        long,
        value_name = "parent-bootstrap",
        value_parser = path_or_empty(),
        help_heading = "Input"
    )]
    parent_bootstrap: Option<PathBuf>,

    /// Image whose blobs layers may refer to, under their own ids: bootstrap=PATH or PATH
    #[arg(long, value_name = "chunk-dict", help_heading = "Input")]
    chunk_dict: Option<String>,

    /// What to do with the prefetch patterns on standard input
    #[arg(
        long,
        value_name = "prefetch-policy",
        default_value = "none",
        help_heading = "Input"
    )]
    prefetch_policy: Policy,

    /// Configuration file; if given, blob ids are taken from the bootstraps
    #[arg(short = 'C', long, value_name = "config", help_heading = "Input")]
    config: Option<PathBuf>,

    /// File to write the bootstrap to
    #[arg(short = 'B', long, value_name = "bootstrap", help_heading = "Output")]
    bootstrap: Option<PathBuf>,

    /// Existing directory for the bootstrap, if --bootstrap is not given
    #[arg(short = 'D', long, value_name = "blob-dir", help_heading = "Output")]
    blob_dir: Option<PathBuf>,

    /// File to write a JSON report to
    #[arg(short = 'J', long, value_name = "output-json", help_heading = "Output")]
    output_json: Option<PathBuf>,

    /// Blob id per source; for layers used in place, the digest of their metadata blob
    #[arg(
        long,
        value_name = "blob-digests",
        value_delimiter = ',',
        help_heading = "Blobs"
    )]
    blob_digests: Vec<String>,

    /// Blob id per source, before --blob-digests is applied
    #[arg(
        long,
        value_name = "original-blob-ids",
        value_delimiter = ',',
        help_heading = "Blobs"
    )]
    original_blob_ids: Vec<String>,

    /// Length of the blob per source; for layers used in place, of their metadata blob
    #[arg(
        long,
        value_name = "blob-sizes",
        value_delimiter = ',',
        help_heading = "Blobs"
    )]
    blob_sizes: Vec<u64>,

    /// SHA-256 of the blob's table of contents per source
    #[arg(
        long,
        value_name = "blob-toc-digests",
        value_delimiter = ',',
        help_heading = "Blobs"
    )]
    blob_toc_digests: Vec<String>,

    /// Length of the blob's table of contents per source
    #[arg(
        long,
        value_name = "blob-toc-sizes",
        value_delimiter = ',',
        help_heading = "Blobs"
    )]
    blob_toc_sizes: Vec<u32>,
}

/// Layers that were built with options which one image cannot have.
#[derive(Debug, thiserror::Error)]
#[error("Inconsistent RAFS Filesystem: {} has {what} {found}, but {} has {expected}",
    path.display(), first.display())]
pub struct Incompatible {
    /// The layer that differs.
    path: PathBuf,
    /// The layer it was compared with.
    first: PathBuf,
    what: &'static str,
    found: String,
    expected: String,
}

/// Runs the command.
///
/// # Errors
/// [`Incompatible`]; [`UsageError`]; anything else has left no output.
pub fn run(args: &Args) -> anyhow::Result<()> {
    let start = Instant::now();
    check_usage(args)?;
    let prefetch = Prefetch::read(args.prefetch_policy, BufReader::new(std::io::stdin()))
        .context("cannot read prefetch patterns from standard input")?;
    let dictionary = args.chunk_dict.as_deref().map(Reused::dictionary);
    let dictionary = dictionary.transpose()?;
    let mut merged: Option<Merged> = None;
    if let Some(path) = args
        .parent_bootstrap
        .as_deref()
        .filter(|p| !p.as_os_str().is_empty())
    {
        let Reused { path, image } = Reused::open(path)?;
        let tree = load(&path, &image)?;
        merged = Some(Merged { path, image, tree });
    }
    for (index, path) in args.sources.iter().enumerate() {
        let image = open(path)?;
        let mut tree = load(path, &image)?;
        if let Some(known) = &dictionary {
            compare((path, &image), (&known.path, &known.image))?;
        }
        name_blobs(args, index, path, &mut tree, dictionary.as_ref())?;
        merged = Some(match merged {
            None => Merged {
                path: path.clone(),
                image,
                tree,
            },
            Some(lower) => lower.add(path, image, tree)?,
        });
    }
    let Some(merged) = merged else {
        bail!("there is nothing to merge")
    };
    let options = WriteOptions {
        chunk_size: merged.image.chunk_size(),
        compressor: merged.image.compressor(),
        digester: merged.image.digester(),
        explicit_uid_gid: merged.image.has_explicit_owners(),
        prefetch: prefetch.table(&merged.tree),
        blob_order: BlobOrder::FirstUse,
    };
    let bytes = write(&merged.tree, &options).context("cannot write the merged bootstrap")?;
    let output = output_path(args, &bytes)?;
    write_file(&output, &bytes)?;
    if let Some(json) = &args.output_json {
        // Read back, because writing decides which blobs are listed.
        let image = Image::from_bytes(bytes).context("cannot read the merged bootstrap")?;
        Report::new(
            Some(&output),
            image.blobs(),
            options.compressor,
            "total_merge",
            start,
        )
        .write_pretty(json)?;
    }
    Ok(())
}

/// The layers merged so far.
struct Merged {
    /// The layer that others are compared with.
    path: PathBuf,
    /// The uppermost layer: its options are those of the result.
    image: Image,
    tree: Tree,
}

impl Merged {
    fn add(mut self, path: &Path, image: Image, tree: Tree) -> anyhow::Result<Self> {
        compare((path, &image), (&self.path, &self.image))?;
        apply(&mut self.tree, tree, WhiteoutSpec::Oci)
            .with_context(|| format!("cannot merge {}", path.display()))?;
        self.image = image;
        Ok(self)
    }
}

/// Refuses to merge what one image cannot have.
fn compare(
    (path, image): (&Path, &Image),
    (first, expected): (&Path, &Image),
) -> anyhow::Result<()> {
    let (image, expected) = (Traits::of(image), Traits::of(expected));
    let Some((what, found, expected)) = image.difference(&expected) else {
        return Ok(());
    };
    // Clients tell the kinds of differences apart by the exit code.
    ensure!(
        what != "chunk size",
        "{} has chunks of {found} bytes, but {} of {expected}",
        path.display(),
        first.display(),
    );
    let (path, first) = (path.to_owned(), first.to_owned());
    let error = Incompatible {
        path,
        first,
        what,
        found,
        expected,
    };
    // In the words that clients look for.
    tracing::error!("message:{error}");
    Err(error.into())
}

fn check_usage(args: &Args) -> Result<(), UsageError> {
    if args.bootstrap.is_none() && args.blob_dir.is_none() {
        return Err(UsageError(
            "one of --bootstrap and --blob-dir is needed".to_owned(),
        ));
    }
    let lists = [
        ("--blob-digests", args.blob_digests.len()),
        ("--original-blob-ids", args.original_blob_ids.len()),
        ("--blob-sizes", args.blob_sizes.len()),
        ("--blob-toc-digests", args.blob_toc_digests.len()),
        ("--blob-toc-sizes", args.blob_toc_sizes.len()),
    ];
    let sources = args.sources.len();
    match lists.iter().find(|(_, len)| *len != 0 && *len != sources) {
        Some((option, len)) => Err(UsageError(format!(
            "{option} has {len} items for {sources} sources"
        ))),
        None => Ok(()),
    }
}

/// Corrects what the bootstrap of source number `index` says about its own blob.
fn name_blobs(
    args: &Args,
    index: usize,
    path: &Path,
    tree: &mut Tree,
    dictionary: Option<&Reused>,
) -> anyhow::Result<()> {
    if args.config.is_some() {
        return Ok(());
    }
    let mut own = tree
        .blobs
        .iter_mut()
        .filter(|blob| !is_known(dictionary, &blob.id));
    let Some(blob) = own.next() else {
        return Ok(());
    };
    ensure!(
        own.next().is_none(),
        "{} has more than one blob; merge takes bootstraps of single layers",
        path.display()
    );
    correct(args, index, path, blob).with_context(|| format!("blob of {}", path.display()))
}

/// Whether the chunk dictionary has a blob of this id.
fn is_known(dictionary: Option<&Reused>, id: &BlobId) -> bool {
    dictionary.is_some_and(|known| known.image.blobs().iter().any(|blob| blob.id == *id))
}

fn correct(args: &Args, index: usize, path: &Path, blob: &mut BlobInfo) -> anyhow::Result<()> {
    blob.id = match args.original_blob_ids.get(index) {
        Some(id) => BlobId::new(id)?,
        None => id_from_name(path)?,
    };
    let separate = blob.features.contains(BlobFeatures::SEPARATE);
    match args.blob_digests.get(index) {
        Some(digest) if separate => blob.meta_blob_digest = parse_digest(digest)?,
        Some(digest) => blob.id = BlobId::new(digest)?,
        None => {}
    }
    match args.blob_sizes.get(index) {
        Some(size) if separate => blob.meta_blob_size = *size,
        Some(size) => blob.compressed_size = *size,
        None => {}
    }
    if let Some(digest) = args.blob_toc_digests.get(index) {
        blob.toc_digest = parse_digest(digest)?;
    }
    if let Some(size) = args.blob_toc_sizes.get(index) {
        blob.toc_size = *size;
    }
    Ok(())
}

pub(crate) fn parse_digest(hex: &str) -> anyhow::Result<Digest> {
    let byte = |at: usize| u8::from_str_radix(hex.get(at..at + 2)?, 16).ok();
    let mut bytes = [0; Digest::LEN];
    let valid = hex.len() == 2 * Digest::LEN && hex.bytes().all(|b| b.is_ascii_hexdigit());
    ensure!(valid, "`{hex}` is no SHA-256 in hexadecimal");
    for (at, slot) in bytes.iter_mut().enumerate() {
        *slot = byte(2 * at).unwrap_or_default();
    }
    Ok(Digest::from_bytes(bytes))
}

fn open(path: &Path) -> anyhow::Result<Image> {
    Image::open(path).with_context(|| format!("cannot load the bootstrap {}", path.display()))
}

fn load(path: &Path, image: &Image) -> anyhow::Result<Tree> {
    Tree::from_image(image).with_context(|| format!("cannot load the bootstrap {}", path.display()))
}

fn output_path(args: &Args, bytes: &[u8]) -> anyhow::Result<PathBuf> {
    match (&args.bootstrap, &args.blob_dir) {
        (Some(path), _) => Ok(path.clone()),
        (None, Some(dir)) => {
            let id = Digest::from_bytes(Sha256::digest(bytes).into());
            Ok(dir.join(id.to_string()))
        }
        (None, None) => bail!("there is no place for the bootstrap"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn digests_are_64_hexadecimal_digits() {
        let text = "0b".repeat(32);
        assert_eq!(parse_digest(&text).unwrap().to_string(), text);
        assert!(parse_digest("0b").is_err());
        assert!(parse_digest(&"+b".repeat(32)).is_err());
        assert!(parse_digest(&"é".repeat(32)).is_err());
    }
}
