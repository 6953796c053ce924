//! `convert`: an OCI image into a Nydus image, from and to registries and layouts.
//!
//! [`plan`] reads manifests and configurations. Then all layers are converted side by
//! side ([`layer`]) and sent as they become ready. Last, each image gets its
//! bootstrap layer ([`bootstrap`]), configuration ([`config`]) and manifest
//! ([`manifest`]), and the target's name is set.
//!
//! Promises: the same source gives the same digests; memory does not grow with the
//! size of layers; temporary files have no names, and a target layout that was not
//! completed is left as it was, also after Ctrl-C.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use bytes::Bytes;
use clap::Args as ClapArgs;
use futures_util::{StreamExt as _, TryStreamExt as _, stream};
use indicatif::HumanBytes;
use storage::oci::{Access, BlobSource, ContentDigest, Descriptor, ImageRef, Images, Platform};
use storage::{Compressor, Digester};

use crate::build::BuildOptions;
use crate::cli::{UsageError, parse_size};
use crate::pipeline::Engine;

mod bootstrap;
mod config;
mod layer;
mod manifest;
mod plan;
mod progress;

use layer::Converted;
use plan::{Plan, SourceImage, SourceLayer};
use progress::Progress;

/// Layers that are converted at a time, unless told otherwise. More cores than that are
/// used by the chunks of these layers.
const DEFAULT_JOBS: usize = 4;
/// How long threads may take to notice that the command was interrupted.
const FAREWELL: Duration = Duration::from_secs(2);

/// Convert an OCI image into a Nydus image
///
/// SOURCE and TARGET are registry references (HOST/REPOSITORY[:TAG]) or OCI layouts
/// (oci:DIR[:TAG]). Registries on this machine are spoken to in plain HTTP, all others
/// in HTTPS. Credentials come from docker's configuration (`docker login`, DOCKER_CONFIG).
///
/// Nothing is unpacked: layers stream from the source through the builder. Blobs that
/// the target has already are not sent again.
///
/// Example:
///
///   nydus-image convert docker.io/library/nginx:1.27 localhost:5000/nginx:1.27-nydus
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
#[allow(clippy::print_stdout, reason = "the result of this command")]
pub fn run(args: &Args) -> anyhow::Result<()> {
    let source = parse_reference(&args.source)?;
    let target = parse_reference(&args.target)?;
    check_references(&source, &target)?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        // Mostly waiting; the work is done by threads of their own.
        .worker_threads(2)
        .enable_all()
        .build()
        .context("cannot start the runtime")?;
    let interrupted = interruption()?;
    let summary = runtime.block_on(async {
        tokio::select! {
            result = convert(args, &source, &target) => result,
            // Dropping the conversion stops its transfers and removes its output.
            _ = interrupted => bail!("interrupted"),
        }
    });
    runtime.shutdown_timeout(FAREWELL);
    println!("{}", summary?);
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

/// Becomes ready at the first SIGINT or SIGTERM. The second one ends the process at once.
fn interruption() -> anyhow::Result<impl Future<Output = ()>> {
    let (sender, receiver) = tokio::sync::oneshot::channel();
    let mut signals = signal_hook::iterator::Signals::new([
        signal_hook::consts::SIGINT,
        signal_hook::consts::SIGTERM,
    ])
    .context("cannot watch for signals")?;
    std::thread::Builder::new()
        .name("signals".to_owned())
        .spawn(move || {
            let mut sender = Some(sender);
            for signal in signals.forever() {
                match sender.take() {
                    Some(sender) => drop(sender.send(())),
                    None => drop(signal_hook::low_level::emulate_default_handler(signal)),
                }
            }
        })
        .context("cannot start a thread")?;
    Ok(async move {
        if receiver.await.is_err() {
            // The thread is gone, which is no signal.
            std::future::pending::<()>().await;
        }
    })
}

/// Converts, and returns the line that sums it up.
async fn convert(args: &Args, source: &ImageRef, target: &ImageRef) -> anyhow::Result<String> {
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
    let plan = Plan::read(&from, source, &args.platform)
        .await
        .with_context(|| format!("cannot read the image {source}"))?;
    let job = Job {
        from,
        to: Images::open(target, &access).await?,
        engine: Engine::for_this_machine(),
        options: options(args),
        work_dir,
        progress: Progress::new(),
    };
    let converted = job.convert_layers(plan.layers()?, args.jobs).await?;
    job.progress.clear();
    let published = job.publish(&plan, &converted, kept_name(source)).await?;
    let totals = Totals::of(&plan, &converted);
    Ok(format!(
        "{target}: {}, {}, {} -> {} ({} sent), {:.1} s, {}",
        count(plan.images.len(), "image"),
        count(totals.layers, "layer"),
        HumanBytes(totals.source),
        HumanBytes(totals.blobs),
        HumanBytes(totals.sent),
        start.elapsed().as_secs_f64(),
        published.digest
    ))
}

fn options(args: &Args) -> BuildOptions {
    BuildOptions {
        compressor: args.compressor,
        digester: args.digester,
        chunk_size: args.chunk_size,
        blob_toc: true,
        inline_bootstrap: true,
        ..BuildOptions::default()
    }
}

/// How the source is recorded in the result. Paths of this machine are nobody's business,
/// and would make the digests depend on where a layout lies.
fn kept_name(source: &ImageRef) -> Option<String> {
    match source {
        ImageRef::Registry(name) => Some(name.to_string()),
        ImageRef::Layout(name) => name.tag.clone(),
    }
}

/// A conversion at work.
struct Job {
    from: Images,
    to: Images,
    engine: Engine,
    options: BuildOptions,
    work_dir: PathBuf,
    progress: Progress,
}

/// A converted layer, and whether it had to be sent.
struct Done {
    layer: Arc<Converted>,
    sent: bool,
}

/// Converted layers by the digest of their source.
type Layers = HashMap<ContentDigest, Done>;

impl Job {
    /// Converts and sends all layers, `jobs` at a time.
    async fn convert_layers(
        &self,
        layers: Vec<SourceLayer>,
        jobs: usize,
    ) -> anyhow::Result<Layers> {
        let total = layers.len();
        let work = layers
            .into_iter()
            .enumerate()
            .map(|(index, layer)| async move {
                let digest = layer.descriptor.digest.clone();
                let done = self.convert_layer((index + 1, total), layer).await;
                let done = done.with_context(|| format!("cannot convert layer {digest}"))?;
                anyhow::Ok((digest, done))
            });
        stream::iter(work)
            .buffer_unordered(jobs)
            .try_collect()
            .await
    }

    async fn convert_layer(
        &self,
        number: (usize, usize),
        source: SourceLayer,
    ) -> anyhow::Result<Done> {
        let SourceLayer {
            descriptor,
            diff_id,
        } = source;
        let progress = self
            .progress
            .layer(number, &descriptor.digest, descriptor.size);
        let reader = self.from.blob_stream(&descriptor)?.into_reader();
        let reader = progress.fetching(reader);
        let (engine, options) = (self.engine.clone(), self.options.clone());
        let work_dir = self.work_dir.clone();
        let work = tokio::task::spawn_blocking(move || {
            let digests = (&descriptor.digest, &diff_id);
            layer::convert(&engine, reader, digests, &options, &work_dir)
        });
        let mut layer = work.await.context("the conversion crashed")??;
        let blob = manifest::blob_layer(layer.digest.clone(), layer.size);
        // Frees the disk space as soon as the blob is sent.
        let source = BlobSource::File(layer.file.take().context("the blob is gone")?);
        let sent = self
            .send(&source, &blob, progress.sending(layer.size))
            .await?;
        progress.done(layer.size, sent);
        Ok(Done {
            layer: Arc::new(layer),
            sent,
        })
    }

    /// Sends a blob unless the target has it. Returns whether it was sent.
    async fn send(
        &self,
        source: &BlobSource,
        blob: &Descriptor,
        progress: storage::oci::Progress,
    ) -> anyhow::Result<bool> {
        if self.to.has_blob(blob).await? {
            return Ok(false);
        }
        self.to.push_blob(source, blob, progress).await?;
        Ok(true)
    }

    /// Sends manifests and what they need, and names the result.
    async fn publish(
        &self,
        plan: &Plan,
        layers: &Layers,
        name: Option<String>,
    ) -> anyhow::Result<Descriptor> {
        let mut entries = Vec::new();
        let mut last = None;
        for image in &plan.images {
            let (bytes, descriptor) = self
                .complete(image, layers, name.as_deref())
                .await
                .with_context(|| format!("cannot complete the image {}", image.entry.digest))?;
            if plan.index.is_some() {
                self.to.push_manifest(&bytes, &descriptor).await?;
                entries.push(manifest::index_entry(&image.entry, descriptor.clone()));
            }
            last = Some((bytes, descriptor));
        }
        let (bytes, descriptor) = match &plan.index {
            Some((media_type, rest)) => {
                let bytes = serde_json::to_vec(&manifest::index(rest, entries))?;
                let descriptor = Descriptor::of(media_type, &bytes);
                (Bytes::from(bytes), descriptor)
            }
            None => last.context("there is no image")?,
        };
        self.to.publish(&bytes, &descriptor).await?;
        Ok(descriptor)
    }

    /// Makes and sends the bootstrap layer and the configuration of one image. Returns its
    /// manifest, which is not sent yet.
    async fn complete(
        &self,
        image: &SourceImage,
        layers: &Layers,
        name: Option<&str>,
    ) -> anyhow::Result<(Bytes, Descriptor)> {
        let converted = image
            .layers()
            .map(|(layer, _)| Some(Arc::clone(&layers.get(&layer.digest)?.layer)))
            .collect::<Option<Vec<_>>>()
            .context("a layer is missing")?;
        let packed = pack(converted.clone(), self.options.clone(), &self.work_dir).await?;
        let bootstrap =
            manifest::bootstrap_layer(&image.manifest, packed.digest.clone(), packed.size);
        self.send(&BlobSource::File(packed.file), &bootstrap, silent())
            .await?;

        // A blob is not compressed as a whole, so its digest is its diff_id too.
        let mut diff_ids: Vec<_> = converted.iter().map(|layer| layer.digest.clone()).collect();
        diff_ids.push(packed.diff_id);
        let config = Bytes::from(image.config.converted(&diff_ids)?);
        let mut list: Vec<_> = converted
            .iter()
            .map(|layer| manifest::blob_layer(layer.digest.clone(), layer.size))
            .collect();
        list.push(bootstrap);
        let origin = (&image.entry.digest, name);
        let manifest = manifest::manifest(&image.manifest, &config, list, origin);
        self.send(&BlobSource::Bytes(config), &manifest.config, silent())
            .await?;
        let bytes = Bytes::from(serde_json::to_vec(&manifest)?);
        let descriptor = Descriptor::of(manifest::media_type(&manifest), &bytes);
        Ok((bytes, descriptor))
    }
}

/// Merging and packing take time, so they get a thread.
async fn pack(
    layers: Vec<Arc<Converted>>,
    options: BuildOptions,
    work_dir: &Path,
) -> anyhow::Result<bootstrap::Packed> {
    let work_dir = work_dir.to_owned();
    let work = tokio::task::spawn_blocking(move || {
        let bytes = bootstrap::merged(&layers, &options)?;
        bootstrap::pack(&bytes, &layers, &work_dir)
    });
    work.await.context("packing crashed")?
}

/// For small transfers that nobody watches.
fn silent() -> storage::oci::Progress {
    Arc::new(|_| ())
}

/// `1 layer`, `2 layers`.
fn count(number: usize, noun: &str) -> String {
    let plural = if number == 1 { "" } else { "s" };
    format!("{number} {noun}{plural}")
}

/// Sums for the last line.
struct Totals {
    layers: usize,
    source: u64,
    blobs: u64,
    sent: u64,
}

impl Totals {
    fn of(plan: &Plan, converted: &Layers) -> Self {
        let mut totals = Self {
            layers: converted.len(),
            source: 0,
            blobs: 0,
            sent: 0,
        };
        for layer in plan.layers().unwrap_or_default() {
            totals.source = totals.source.saturating_add(layer.descriptor.size);
        }
        for done in converted.values() {
            totals.blobs += done.layer.size;
            totals.sent += if done.sent { done.layer.size } else { 0 };
        }
        totals
    }
}
