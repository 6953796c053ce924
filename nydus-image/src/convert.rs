//! `convert`: an OCI image into a Nydus image, from and to registries and layouts.
//!
//! `plan` reads manifests and configurations. Then `job` converts all layers side by
//! side (`layer`) and sends them as they become ready. Last, each image gets its
//! bootstrap layer (`bootstrap`), configuration (`config`) and manifest
//! (`manifest`), and the target's name is set.
//!
//! Promises: the same source gives the same digests; memory does not grow with the
//! size of layers; temporary files have no names, and a target layout that was not
//! completed is left as it was, also after Ctrl-C.

use std::fs::File;
use std::io::{BufRead, BufReader};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context as _, bail};
use clap::Args as ClapArgs;
use indicatif::HumanBytes;
use storage::oci::{Access, ContentDigest, ImageRef, Images, Platform};
use storage::{BlobInfo, Compressor, Digester};

use crate::build::BuildOptions;
use crate::cli::{UsageError, parse_size};
use crate::create::is_chunk_size;
use crate::interrupt::{self, FAREWELL};
use crate::output::print;
use crate::pipeline::Engine;
use crate::prefetch::{Policy, Prefetch};
use crate::preheat;
use crate::reuse::{Known, Reused};

mod bootstrap;
mod config;
mod job;
mod layer;
mod manifest;
mod plan;
mod progress;
mod totals;

use job::Job;
use plan::Plan;
use progress::Progress;
use totals::Totals;

/// zstd level of converted images, which are sent over the network more often than made.
/// Against level 1 this takes twice the time for 15 % fewer bytes; three levels more take
/// twice the time again, for less than 1 %.
const LEVEL: i32 = 9;
/// Layers that are converted at a time, unless told otherwise. More cores than that are
/// used by the chunks of these layers.
const DEFAULT_JOBS: usize = 4;

/// Convert an OCI image into a Nydus image
///
/// SOURCE and TARGET are registry references (`HOST/REPOSITORY[:TAG]`) or OCI layouts
/// (`oci:DIR[:TAG]`). Registries on this machine are spoken to in plain HTTP, all
/// others in HTTPS. Credentials come from docker's configuration (`docker login`,
/// DOCKER_CONFIG).
///
/// Nothing is unpacked: layers stream from the source through the builder. Blobs that
/// the target has already are not sent again.
///
/// Examples:
///
///   nydus-image convert docker.io/library/nginx:1.27 localhost:5000/nginx:1.27-nydus
///   nydus-image convert --preheat --seed http://seed:4001 app:1 reg.example/app:1-nydus
#[derive(Debug, ClapArgs)]
#[command(verbatim_doc_comment)]
pub struct Args {
    /// Image to convert
    #[arg(value_name = "SOURCE")]
    source: String,

    /// Image to create
    #[arg(value_name = "TARGET")]
    target: String,

    /// Platforms to convert, as os/architecture[/variant]; repeat or separate by commas
    /// [default: all]
    #[arg(
        long,
        value_name = "platform",
        value_delimiter = ',',
        help_heading = "Input"
    )]
    platform: Vec<Platform>,

    /// Speak plain HTTP to registries on other machines too
    #[arg(long, help_heading = "Input")]
    plain_http: bool,

    /// How chunks are compressed: none, lz4_block or zstd
    #[arg(
        long,
        value_name = "compressor",
        default_value = "zstd",
        help_heading = "Format"
    )]
    compressor: Compressor,

    /// How hard zstd tries: 1 is fastest, 19 smallest
    #[arg(
        long,
        value_name = "level",
        default_value_t = LEVEL,
        value_parser = clap::value_parser!(i32).range(1..=19),
        help_heading = "Format"
    )]
    compression_level: i32,

    /// How chunks are identified and verified: blake3 or sha256
    #[arg(
        long,
        value_name = "digester",
        default_value = "blake3",
        help_heading = "Format"
    )]
    digester: Digester,

    /// Largest chunk in bytes: a power of two from 0x1000 to 0x1000000
    #[arg(
        long,
        value_name = "chunk-size",
        default_value = "0x100000",
        value_parser = parse_size,
        help_heading = "Format"
    )]
    chunk_size: u32,

    /// Bytes of small files that are compressed together, at most the chunk size;
    /// 0 for never
    #[arg(
        long,
        value_name = "batch-size",
        default_value = "0x20000",
        value_parser = parse_size,
        help_heading = "Format"
    )]
    batch_size: u32,

    /// File with the absolute paths, one a line, of files and directories that the
    /// daemon shall fetch right after mounting; `-` for standard input
    #[arg(long, value_name = "file", help_heading = "Format")]
    prefetch_patterns: Option<PathBuf>,

    /// Keep the layers as they are and make only indexes of them
    ///
    /// The target gets the original layers unless it has them; converting within one
    /// repository sends little but metadata. Layers that cannot be used in place are
    /// converted as without this option, and a warning says so: those compressed with
    /// zstd, and those that have a file with holes.
    #[arg(
        long,
        conflicts_with_all = ["compressor", "digester", "batch_size"],
        help_heading = "Format"
    )]
    oci_ref: bool,

    /// Do not store chunks that this image has: bootstrap=PATH or PATH
    ///
    /// The target must have the blobs of that image.
    #[arg(long, value_name = "chunk-dict", help_heading = "Format")]
    chunk_dict: Option<String>,

    /// Once the image is pushed, put what a start reads into Dragonfly's seed peers, as
    /// `nydus-image preheat` does; needs --seed or --manager
    #[arg(long, help_heading = "Preheat")]
    preheat: bool,

    #[command(flatten)]
    how: preheat::Options,

    /// Layers to convert at a time
    #[arg(
        long,
        value_name = "jobs",
        default_value_t = DEFAULT_JOBS,
        value_parser = parse_jobs,
        help_heading = "Resources"
    )]
    jobs: usize,

    /// Existing directory for temporary files, which need as much space as the blobs of
    /// the layers in work [default: TMPDIR or /tmp]
    #[arg(long, value_name = "work-dir", help_heading = "Resources")]
    work_dir: Option<PathBuf>,
}

fn parse_jobs(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(jobs @ 1..=64) => Ok(jobs),
        _ => Err("a number from 1 to 64 is expected".to_owned()),
    }
}

/// Runs the command.
///
/// # Errors
/// [`UsageError`]; anything else names the image, layer or file, and has left no output.
pub fn run(args: &Args) -> anyhow::Result<()> {
    let source = parse_reference(&args.source)?;
    let target = parse_reference(&args.target)?;
    check_references(&source, &target)?;
    check_preheat(args, &target)?;
    let options = options(args)?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        // Mostly waiting; the work is done by threads of their own.
        .worker_threads(2)
        .enable_all()
        .build()
        .context("cannot start the runtime")?;
    let interrupted = interrupt::first()?;
    let result = runtime.block_on(async {
        tokio::select! {
            result = convert_and_preheat(args, options, &source, &target) => result,
            // Dropping the conversion stops its transfers and removes its output.
            _ = interrupted => bail!("interrupted"),
        }
    });
    runtime.shutdown_timeout(FAREWELL);
    result
}

/// Converts, says so, and preheats if that is wanted.
async fn convert_and_preheat(
    args: &Args,
    options: BuildOptions,
    source: &ImageRef,
    target: &ImageRef,
) -> anyhow::Result<()> {
    let (summary, digest) = convert(args, options, source, target).await?;
    print(&format!("{summary}\n"))?;
    let (true, ImageRef::Registry(name)) = (args.preheat, target) else {
        return Ok(());
    };
    // What was pushed, whoever moves the tag meanwhile.
    let mut pushed = name.clone();
    pushed.digest = Some(digest);
    let access = Access {
        plain_http: args.plain_http,
        credentials: None,
    };
    let done = preheat::after_push(&ImageRef::Registry(pushed), &access, &args.how).await;
    let lines = done.with_context(|| {
        format!("{target} is pushed and complete, but it could not be preheated; nydus-image preheat tries again")
    })?;
    print(&format!("{lines}\n"))
}

/// Better now than after the conversion.
fn check_preheat(args: &Args, target: &ImageRef) -> anyhow::Result<()> {
    if args.preheat {
        return args.how.check(target);
    }
    if args.how.are_given() {
        let problem = "--seed and --manager need --preheat";
        return Err(UsageError(problem.to_owned()).into());
    }
    Ok(())
}

fn parse_reference(text: &str) -> Result<ImageRef, UsageError> {
    text.parse()
        .map_err(|error: storage::oci::OciError| UsageError(error.to_string()))
}

fn check_references(source: &ImageRef, target: &ImageRef) -> Result<(), UsageError> {
    if let ImageRef::Registry(target) = target
        && target.digest.is_some()
    {
        let problem = "TARGET cannot have a digest: it is not known before the conversion";
        return Err(UsageError(problem.to_owned()));
    }
    if source == target {
        let problem = "SOURCE and TARGET are the same: the original would lose its name";
        return Err(UsageError(problem.to_owned()));
    }
    Ok(())
}

/// Converts; returns the line that sums it up, and the digest of what was pushed.
async fn convert(
    args: &Args,
    mut options: BuildOptions,
    source: &ImageRef,
    target: &ImageRef,
) -> anyhow::Result<(String, ContentDigest)> {
    let start = Instant::now();
    let work_dir = args.work_dir.clone().unwrap_or_else(std::env::temp_dir);
    // Better now than after the first download.
    tempfile::tempfile_in(&work_dir)
        .with_context(|| format!("cannot write a temporary file in {}", work_dir.display()))?;
    let access = Access {
        plain_http: args.plain_http,
        credentials: None,
    };
    let from = Images::open(source, &access).await?;
    let dictionary = dictionary(args, &mut options)?;
    let plan = Plan::read(&from, source, &args.platform)
        .await
        .with_context(|| format!("cannot read the image {source}"))?;
    let job = Job {
        from,
        to: Images::open(target, &access).await?,
        engine: Engine::for_this_machine(),
        in_place: args.oci_ref.then(|| options.clone().in_place()),
        options,
        dictionary,
        work_dir,
        progress: Progress::new(),
    };
    let converted = job.convert_layers(plan.layers()?, args.jobs).await?;
    job.progress.clear();
    let published = job.publish(&plan, &converted, kept_name(source)).await?;
    let totals = Totals::of(&plan, &converted);
    let summary = format!(
        "{target}: {}, {}, {} -> {} ({} sent), {:.1} s, {}",
        count(plan.images.len(), "image"),
        count(totals.layers, "layer"),
        HumanBytes(totals.source),
        HumanBytes(totals.blobs),
        HumanBytes(totals.sent),
        start.elapsed().as_secs_f64(),
        published.digest
    );
    Ok((summary, published.digest))
}

fn options(args: &Args) -> anyhow::Result<BuildOptions> {
    check_sizes(args)?;
    Ok(BuildOptions {
        compressor: args.compressor,
        level: args.compression_level,
        digester: match args.oci_ref {
            // All layers of an image have the same, and those used in place have this one.
            true => Digester::Sha256,
            false => args.digester,
        },
        chunk_size: args.chunk_size,
        // A chunk size below the default batch size makes that pointless, not wrong.
        batch_size: args.batch_size.min(args.chunk_size),
        blob_toc: true,
        inline_bootstrap: true,
        prefetch: prefetch(args)?,
        ..BuildOptions::default()
    })
}

fn check_sizes(args: &Args) -> Result<(), UsageError> {
    let problem = if !is_chunk_size(args.chunk_size) {
        format!("--chunk-size {:#x}", args.chunk_size)
    } else if args.batch_size != 0 && !is_chunk_size(args.batch_size) {
        format!("--batch-size {:#x}", args.batch_size)
    } else {
        return Ok(());
    };
    Err(UsageError(format!(
        "{problem} is not a power of two from 0x1000 to 0x1000000"
    )))
}

fn prefetch(args: &Args) -> anyhow::Result<Prefetch> {
    let Some(path) = &args.prefetch_patterns else {
        return Ok(Prefetch::default());
    };
    let failed = || format!("cannot read the prefetch patterns {}", path.display());
    let read: Box<dyn BufRead> = if path.as_os_str() == "-" {
        Box::new(std::io::stdin().lock())
    } else {
        Box::new(BufReader::new(File::open(path).with_context(failed)?))
    };
    Prefetch::read(Policy::Fs, read).with_context(failed)
}

/// Reads the chunk dictionary into `options`; returns its blobs.
fn dictionary(args: &Args, options: &mut BuildOptions) -> anyhow::Result<Vec<BlobInfo>> {
    let Some(value) = &args.chunk_dict else {
        return Ok(Vec::new());
    };
    let dictionary = Reused::dictionary(value)?;
    let traits = match args.oci_ref {
        true => options.clone().in_place().traits(),
        false => options.traits(),
    };
    dictionary.check(&traits)?;
    let mut known = Known::default();
    known.add(&dictionary, options.digester)?;
    options.known = Arc::new(known);
    Ok(dictionary.image.blobs().to_vec())
}

/// How the source is recorded in the result. Paths of this machine are nobody's business,
/// and would make the digests depend on where a layout lies.
fn kept_name(source: &ImageRef) -> Option<String> {
    match source {
        ImageRef::Registry(name) => Some(name.to_string()),
        ImageRef::Layout(name) => name.tag.clone(),
    }
}

/// `1 layer`, `2 layers`.
fn count(number: usize, noun: &str) -> String {
    let plural = if number == 1 { "" } else { "s" };
    format!("{number} {noun}{plural}")
}
