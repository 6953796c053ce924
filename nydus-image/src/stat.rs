//! `stat`: what images hold, and how much a chunk dictionary would save.
//!
//! Images are the base; a target is compared with them. The counting is in
//! [`counts`]; no blob is needed.

use std::io::Read as _;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, bail};
use clap::ValueEnum;
use serde::Serialize;

use crate::access;
use crate::cli::UsageError;
use crate::output::{print, write_file};
use counts::{Base, Counts};

pub mod counts;
mod report;

/// Report what images hold, and what a chunk dictionary would save
///
/// The images together are the base. Reported is how many chunks are stored by
/// several of their blobs: a chunk dictionary would store those once. With --target,
/// how much of that image is in the base already.
///
/// Examples:
///
///   nydus-image stat debian.boot python.boot node.boot
///   nydus-image stat --blob-dir bootstraps --target new.boot --output-json stat.json
#[derive(Debug, clap::Args)]
#[command(verbatim_doc_comment)]
pub struct Args {
    /// Bootstraps of the base images
    #[arg(value_name = "BOOTSTRAP")]
    positional: Vec<PathBuf>,

    /// Bootstrap of a base image
    #[arg(short = 'B', long, value_name = "bootstrap")]
    bootstrap: Option<PathBuf>,

    /// Directory with bootstraps of base images: all files whose name has no
    /// extension; other files, like blobs, are skipped
    #[arg(
        short = 'D',
        long,
        value_name = "blob-dir",
        conflicts_with = "bootstrap"
    )]
    blob_dir: Option<PathBuf>,

    /// Bootstrap of the image to compare with the base
    #[arg(short = 'T', long, value_name = "target")]
    target: Option<PathBuf>,

    /// Configuration file; accepted, without effect on this command
    #[arg(short = 'C', long, value_name = "config")]
    config: Option<PathBuf>,

    /// How chunks are identified; accepted, the images say it
    #[arg(long, value_name = "digester", default_value = "blake3")]
    digester: Digester,

    /// File to write the numbers to as JSON, instead of printing a report
    #[arg(short = 'J', long, value_name = "output-json")]
    output_json: Option<PathBuf>,
}

/// Names of digest algorithms.
#[derive(Clone, Copy, Debug, ValueEnum)]
enum Digester {
    Blake3,
    Sha256,
}

/// What `--output-json` writes. Sizes are in bytes.
#[derive(Debug, Serialize)]
struct Json<'a> {
    dedup_enabled: bool,
    target_enabled: bool,
    base_image: &'a Counts,
    target_image: &'a Counts,
}

/// Runs the command.
///
/// # Errors
/// An image is not valid, or there is none.
pub fn run(args: &Args) -> anyhow::Result<()> {
    let mut images = args.positional.clone();
    images.extend(args.bootstrap.clone());
    if let Some(dir) = &args.blob_dir {
        images.extend(bootstraps(dir)?);
    }
    if images.is_empty() {
        let text = match &args.blob_dir {
            Some(dir) => bail!("there is no bootstrap in {}", dir.display()),
            None => "give bootstraps, or --blob-dir with a directory of them",
        };
        return Err(UsageError(text.to_owned()).into());
    }
    let mut base = Base::default();
    for path in &images {
        base.add(&*access::open_verified(path)?)?;
    }
    let target = match &args.target {
        Some(path) => Some(base.compare(&*access::open_verified(path)?)?),
        None => None,
    };
    let counts = base.counts();
    let Some(path) = &args.output_json else {
        return print(&report::text(images.len(), &counts, target.as_ref()));
    };
    let json = Json {
        dedup_enabled: images.len() > 1 || target.is_some(),
        target_enabled: target.is_some(),
        base_image: &counts,
        target_image: &target.unwrap_or_default(),
    };
    write_file(path, &serde_json::to_vec_pretty(&json)?)
}

/// The files of `dir` that have no extension and are bootstraps, by name.
fn bootstraps(dir: &Path) -> anyhow::Result<Vec<PathBuf>> {
    let read = || -> anyhow::Result<Vec<PathBuf>> {
        let mut paths = Vec::new();
        for entry in std::fs::read_dir(dir)? {
            let path = entry?.path();
            if path.extension().is_none() && path.is_file() && looks_like_bootstrap(&path)? {
                paths.push(path);
            }
        }
        paths.sort();
        Ok(paths)
    };
    read().with_context(|| format!("cannot look for bootstraps in {}", dir.display()))
}

/// Whether the superblock of EROFS is where it belongs.
fn looks_like_bootstrap(path: &Path) -> anyhow::Result<bool> {
    let mut head = Vec::new();
    std::fs::File::open(path)?
        .take(1028)
        .read_to_end(&mut head)?;
    Ok(head.get(1024..) == Some(&[0xe2, 0xe1, 0xf5, 0xe0]))
}
