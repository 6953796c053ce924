//! `preheat`: what a start of an image reads is put into Dragonfly's seed peers before
//! anybody starts it.
//!
//! `plan` decides which ranges of which blobs (`hot`: which files; `pieces`: rounded how),
//! `seeds` who gets them; `warm` asks for them (`request`), judges the answers (`answer`)
//! and verifies the bytes (`check`). With a manager, that does the work (`manager`).
//!
//! Promises: success means that every byte that was wanted has come through each of its
//! seeds, and was right. Credentials reach the registry, its token service and the
//! seeds, and no log.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use clap::Args as ClapArgs;
use storage::backend::registry::Tasks;
use storage::oci::bootstrap::find_nydus_manifests;
use storage::oci::registry::Registry;
use storage::oci::{Access, ImageRef, Images, Platform};

use crate::cli::UsageError;
use crate::interrupt::{self, FAREWELL};
use crate::output::{print, write_file};

mod answer;
mod check;
mod hot;
mod manager;
mod pieces;
mod plan;
mod progress;
mod report;
mod request;
mod seeds;
mod warm;

use manager::Manager;
use plan::{Target, Wish};
use progress::Progress;
use report::Report;
use request::{Client, Failed};
use seeds::Seed;
use warm::Warmed;

/// Blobs that are fetched at a time.
const JOBS: usize = 4;

/// Put the hot part of an image into Dragonfly's seed peers
///
/// IMAGE is a Nydus image in a registry. Its bootstrap, the chunk tables of its blobs and
/// the files that a start reads are fetched through the proxy of seed peers, which keep
/// them: nodes that start the image later get them from there, and the registry is
/// hardly asked. Hot are the files that the image lists (convert --prefetch-patterns),
/// those in --files, the program that the image starts, and what the C library reads.
/// Of a blob of which more than half is hot, all is fetched.
///
/// Everything comes back here and is verified, so success means that the seeds hold it.
/// Preheat before nodes use the image.
///
/// Examples:
///
///   nydus-image preheat --seed http://seed-1:4001 --seed http://seed-2:4001 reg.example/app:1
///   nydus-image preheat --seed http://seed-1:4001 --files hot.txt reg.example/app:1
#[derive(Debug, ClapArgs)]
#[command(verbatim_doc_comment)]
pub struct Args {
    /// Image to preheat: HOST/REPOSITORY[:TAG][@DIGEST]
    #[arg(value_name = "IMAGE")]
    image: String,

    /// Platforms to preheat, as os/architecture[/variant]; repeat or separate by commas
    /// [default: all]
    #[arg(long, value_name = "platform", value_delimiter = ',')]
    platform: Vec<Platform>,

    /// Speak plain HTTP to registries on other machines too
    #[arg(long)]
    plain_http: bool,

    /// File with the absolute paths, one a line, of files and directories that are hot:
    /// what `nydusd mount --record-files` writes
    #[arg(long, value_name = "file")]
    files: Option<PathBuf>,

    /// Write a report to this file, as JSON
    #[arg(short = 'J', long, value_name = "file")]
    output_json: Option<PathBuf>,

    #[command(flatten)]
    how: Options,
}

/// Where to preheat. `convert` has these options as well.
#[derive(Clone, Debug, ClapArgs)]
pub struct Options {
    /// Proxy of a seed peer, like http://seed:4001; repeat for several, which share
    /// the blobs
    #[arg(
        long,
        value_name = "url",
        conflicts_with = "manager",
        help_heading = "Preheat"
    )]
    seed: Vec<Seed>,

    /// Seed peers that get a copy of each blob
    #[arg(
        long,
        value_name = "count",
        default_value_t = 1,
        value_parser = parse_replicas,
        help_heading = "Preheat"
    )]
    replicas: usize,

    /// Preheat whole blobs, not only what a start reads
    #[arg(long, help_heading = "Preheat")]
    whole: bool,

    /// What daemons share as one thing: `window`, as they do unless their configuration
    /// has `tasks = "blob"` or `seed = true` in section `p2p`; or `blob`
    #[arg(
        long,
        value_name = "unit",
        default_value = "window",
        value_parser = ["window", "blob"],
        help_heading = "Preheat"
    )]
    tasks: String,

    /// Longest time that a seed may be silent, in seconds
    #[arg(
        long,
        value_name = "seconds",
        default_value_t = 120,
        value_parser = clap::value_parser!(u64).range(1..=86_400),
        help_heading = "Preheat"
    )]
    seed_timeout: u64,

    /// Have the manager at this URL do it, like http://manager:8080
    ///
    /// It knows whole blobs only, and what it says about them is all that is known. Nodes
    /// find them only if all daemons have
    /// `proxy.registryMirror.enableTaskIDBasedBlobDigest: false`. Better use --seed.
    #[arg(
        long,
        value_name = "url",
        value_parser = seeds::server,
        help_heading = "Preheat"
    )]
    manager: Option<String>,

    /// File with a personal access token for the manager
    /// [default: the environment variable DRAGONFLY_MANAGER_TOKEN]
    #[arg(
        long,
        value_name = "file",
        requires = "manager",
        help_heading = "Preheat"
    )]
    manager_token_file: Option<PathBuf>,

    /// How long the manager's job may take, in seconds
    #[arg(
        long,
        value_name = "seconds",
        default_value_t = 3600,
        value_parser = clap::value_parser!(u64).range(1..=604_800),
        help_heading = "Preheat"
    )]
    manager_timeout: u64,
}

fn parse_replicas(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(count @ 1..=100) => Ok(count),
        _ => Err("a number from 1 to 100 is expected".to_owned()),
    }
}

impl Options {
    /// Whether they say where.
    #[must_use]
    pub fn are_given(&self) -> bool {
        !self.seed.is_empty() || self.manager.is_some()
    }

    fn tasks(&self) -> Tasks {
        match self.tasks.as_str() {
            "blob" => Tasks::Blobs,
            _ => Tasks::default(),
        }
    }

    /// Refuses what cannot work, before anything is done.
    ///
    /// # Errors
    /// [`UsageError`]; a token that cannot be read.
    pub fn check(&self, image: &ImageRef) -> anyhow::Result<()> {
        let problem = if !self.are_given() {
            "say where to preheat: --seed or --manager"
        } else if matches!(image, ImageRef::Layout(_)) {
            "an OCI layout cannot be preheated: seed peers fetch from registries"
        } else {
            if self.manager.is_some() {
                manager::token(self.manager_token_file.as_deref())?;
            }
            return Ok(());
        };
        Err(UsageError(problem.to_owned()).into())
    }
}

/// Runs the command.
///
/// # Errors
/// [`UsageError`]; anything else names the image, or the seed, blob and range.
pub fn run(args: &Args) -> anyhow::Result<()> {
    let image: ImageRef = args
        .image
        .parse()
        .map_err(|error: storage::oci::OciError| UsageError(error.to_string()))?;
    args.how.check(&image)?;
    let wish = Wish {
        whole: args.how.whole || args.how.manager.is_some(),
        files: match &args.files {
            Some(path) => hot::read_list(path)?,
            None => Vec::new(),
        },
    };
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .context("cannot start the runtime")?;
    let access = Access {
        plain_http: args.plain_http,
        credentials: None,
    };
    let interrupted = interrupt::first()?;
    let result = runtime.block_on(async {
        tokio::select! {
            result = preheat(&image, &access, &args.platform, (&args.how, &wish)) => result,
            _ = interrupted => bail!("interrupted"),
        }
    });
    runtime.shutdown_timeout(FAREWELL);
    let report = result.with_context(|| format!("cannot preheat {image}"))?;
    if let Some(path) = &args.output_json {
        write_file(path, &serde_json::to_vec_pretty(&report)?)?;
    }
    print(&format!("{report}\n"))
}

/// Preheats an image that was pushed just now; returns lines that say what was done.
///
/// # Errors
/// As for [`run`].
pub async fn after_push(
    image: &ImageRef,
    access: &Access,
    options: &Options,
) -> anyhow::Result<String> {
    let wish = Wish {
        whole: options.whole || options.manager.is_some(),
        files: Vec::new(),
    };
    let report = preheat(image, access, &[], (options, &wish)).await?;
    Ok(report.to_string())
}

async fn preheat(
    image: &ImageRef,
    access: &Access,
    platforms: &[Platform],
    (options, wish): (&Options, &Wish),
) -> anyhow::Result<Report> {
    let began = Instant::now();
    let images = Images::open(image, access).await?;
    let Images::Registry(registry) = &images else {
        bail!("it is in no registry");
    };
    let manifests = find_nydus_manifests(&images, image, platforms).await?;
    let mut targets = Vec::new();
    for manifest in &manifests {
        targets.extend(plan::of_image(&images, manifest, wish).await?);
    }
    let targets = plan::without_repetitions(targets);
    let name = image.to_string();
    let about = (name.as_str(), manifests.len());
    if let Some(url) = &options.manager {
        let progress = Progress::new(0);
        let token = manager::token(options.manager_token_file.as_deref())?;
        let limit = Duration::from_secs(options.manager_timeout);
        let manager = Manager::new(url, token)?;
        let done = manager
            .warm(registry, &targets, options.replicas, (limit, &progress))
            .await;
        progress.clear();
        return Ok(Report::of_manager(about, &targets, done?, began.elapsed()));
    }
    let warmed = through_seeds(registry, &targets, options).await?;
    Ok(Report::of_seeds(about, &targets, &warmed, began.elapsed()))
}

/// Everything through each of its seeds; an error if a part of it failed.
async fn through_seeds(
    registry: &Registry,
    targets: &[Target],
    options: &Options,
) -> anyhow::Result<Vec<Warmed>> {
    let timeout = Duration::from_secs(options.seed_timeout);
    let client = Client::new(registry.clone(), timeout, options.tasks())?;
    let copies = options.replicas.min(options.seed.len());
    let bytes: u64 = targets.iter().map(Target::bytes).sum();
    let progress = Progress::new(bytes.saturating_mul(copies as u64));
    let seeds = (options.seed.as_slice(), options.replicas);
    let results = warm::all(&client, targets, seeds, (JOBS, &progress)).await;
    progress.clear();
    let total = results.len();
    let (mut warmed, mut failed): (Vec<Warmed>, Vec<Failed>) = (Vec::new(), Vec::new());
    for result in results {
        match result {
            Ok(one) => warmed.push(one),
            Err(one) => failed.push(one),
        }
    }
    let count = failed.len();
    let mut failed = failed.into_iter();
    let Some(first) = failed.next() else {
        return Ok(warmed);
    };
    for other in failed {
        tracing::error!("{other}");
    }
    Err(anyhow::Error::new(first).context(format!("{count} of {total} blobs are not there")))
}
