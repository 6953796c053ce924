//! The JSON report of a command (`--output-json`), which other programs read.
//!
//! Keys and types are an interface: they may be added to, never changed.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Instant;

use anyhow::Context as _;
use serde::Serialize;
use storage::{BlobInfo, Compressor};

use crate::output::write_file;
use crate::version;

/// What a command made of which blobs.
#[derive(Debug, Serialize)]
pub struct Report {
    version: &'static str,
    /// Path of the bootstrap; empty if it is embedded in the blob.
    bootstrap: String,
    /// Blob ids in the order of the bootstrap's table.
    blobs: Vec<String>,
    external_bootstrap: String,
    external_blobs: Vec<String>,
    trace: Trace,
    fs_version: &'static str,
    compressor: String,
}

#[derive(Debug, Serialize)]
struct Trace {
    /// Seconds by name of a step.
    consumed_time: BTreeMap<&'static str, f64>,
    /// Facts about the run.
    registered_events: BTreeMap<&'static str, String>,
}

impl Report {
    /// A report about a command that started at `start`.
    #[must_use]
    pub fn new<'a>(
        bootstrap: Option<&Path>,
        blobs: impl IntoIterator<Item = &'a BlobInfo>,
        compressor: Compressor,
        step: &'static str,
        start: Instant,
    ) -> Self {
        let ids = [
            ("euid", nix::unistd::geteuid().to_string()),
            ("egid", nix::unistd::getegid().to_string()),
        ];
        Self {
            version: version::TAG_AND_COMMIT,
            bootstrap: bootstrap
                .map(|path| path.display().to_string())
                .unwrap_or_default(),
            blobs: blobs.into_iter().map(|blob| blob.id.to_string()).collect(),
            external_bootstrap: String::new(),
            external_blobs: Vec::new(),
            trace: Trace {
                consumed_time: BTreeMap::from([(step, start.elapsed().as_secs_f64())]),
                registered_events: BTreeMap::from(ids),
            },
            fs_version: "6",
            compressor: compressor.to_string(),
        }
    }

    /// Writes the report for people to read, indented.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn write_pretty(&self, path: &Path) -> anyhow::Result<()> {
        let text = serde_json::to_vec_pretty(self).context("cannot encode the report")?;
        write_file(path, &text)
    }

    /// Writes the report on one line.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn write_compact(&self, path: &Path) -> anyhow::Result<()> {
        let text = serde_json::to_vec(self).context("cannot encode the report")?;
        write_file(path, &text)
    }
}
