//! `inspect`: look into an image: a report, a prompt, or one answer for a program.
//!
//! * [`summary`] and [`report`]: what is in the image and where its bytes are, for
//!   people and as JSON;
//! * [`prompt`]: walk through the tree by hand;
//! * [`request`]: one command of the prompt, with the answers that programs parse.

use std::path::PathBuf;

use crate::access;
use crate::output::print;

pub mod prompt;
pub mod report;
pub mod request;
pub mod summary;

/// Look into an image
///
/// With --summary: how many files, how large, how much is shared between them, what
/// every layer contributes, which directories and files are the largest. With --json
/// the same for programs. No blob is needed for any of it.
///
/// With --request: one command of the prompt. Otherwise a prompt; `help` lists its
/// commands.
///
/// Examples:
///
///   nydus-image inspect --summary image.boot
///   nydus-image inspect --summary --depth 3 --top 25 image.boot
///   nydus-image inspect --json image.boot | jq .content.dedup_ratio
///   nydus-image inspect --request blobs image.boot
#[derive(Debug, clap::Args)]
#[command(verbatim_doc_comment)]
pub struct Args {
    /// Bootstrap of the image
    #[arg(value_name = "BOOTSTRAP", required_unless_present = "bootstrap")]
    positional: Option<PathBuf>,

    /// Bootstrap of the image (older form)
    #[arg(
        short = 'B',
        long,
        value_name = "bootstrap",
        conflicts_with = "positional"
    )]
    bootstrap: Option<PathBuf>,

    /// Directory with the blobs; accepted, nothing is read from it
    #[arg(short = 'D', long, value_name = "blob-dir", conflicts_with = "config")]
    blob_dir: Option<PathBuf>,

    /// Configuration file; accepted, without effect on this command
    #[arg(short = 'C', long, value_name = "config")]
    config: Option<PathBuf>,

    /// Run one command of the prompt and exit
    ///
    /// blobs, stats and prefetch answer with one line of JSON, the others with text
    /// and `null`.
    #[arg(
        short = 'R',
        long,
        value_name = "request",
        conflicts_with_all = ["summary", "json"]
    )]
    request: Option<String>,

    /// Print a report and exit
    #[arg(long, help_heading = "Report")]
    summary: bool,

    /// Print the report as JSON; sizes in bytes
    #[arg(long, help_heading = "Report")]
    json: bool,

    /// Levels of directories to show
    #[arg(long, value_name = "N", default_value_t = 2, help_heading = "Report")]
    depth: usize,

    /// How many directories and files to show, the largest ones
    #[arg(long, value_name = "N", default_value_t = 10, help_heading = "Report")]
    top: usize,
}

/// Runs the command.
///
/// # Errors
/// The bootstrap is not valid, or the request is none.
pub fn run(args: &Args) -> anyhow::Result<()> {
    let path = access::either(args.positional.as_ref(), args.bootstrap.as_ref())?;
    let image = access::open_verified(path)?;
    if let Some(request) = &args.request {
        return print(&request::answer(&image, request)?);
    }
    if !args.summary && !args.json {
        let input = std::io::stdin().lock();
        return prompt::run(&image, input);
    }
    let summary = summary::Summary::of(&image, args.depth, args.top)?;
    let text = match args.json {
        true => serde_json::to_string_pretty(&summary)? + "\n",
        false => report::text(&summary),
    };
    print(&text)
}
