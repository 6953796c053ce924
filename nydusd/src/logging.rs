//! Log messages out: one line each, to standard error or appended to a file.
//!
//! `[2026-01-31 12:00:00.000000 +00:00] LEVEL message key=value`, with file and
//! line before the message for every level but `INFO`. Messages of the FUSE
//! library are left out below `trace`: it logs whole replies when a reader was
//! killed while it waited, which is no fault of anybody.

mod recent;

use std::fmt;
use std::fs::OpenOptions;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::Context as _;
use clap::ValueEnum as _;
use tracing::{Event, Level, Subscriber};
use tracing_subscriber::fmt::format::{FormatEvent, FormatFields, Writer};
use tracing_subscriber::fmt::time::{FormatTime, SystemTime};
use tracing_subscriber::fmt::{FmtContext, FormattedFields, MakeWriter};
use tracing_subscriber::registry::LookupSpan;
use tracing_subscriber::{
    EnvFilter, Registry, layer::SubscriberExt as _, reload, util::SubscriberInitExt as _,
};

use crate::cli::LogLevel;
use recent::Recent;

/// The running log.
#[derive(Clone, Debug)]
pub(crate) struct Logs {
    filter: reload::Handle<EnvFilter, Registry>,
    recent: Arc<Recent>,
}

impl Logs {
    /// Changes what is logged from now on; `false` if there is no such level.
    pub(crate) fn set_level(&self, name: &str) -> bool {
        let filter = match name {
            "off" => "off",
            name => match LogLevel::from_str(name, true) {
                Ok(level) => filter(level),
                Err(_) => return false,
            },
        };
        let changed = self.filter.reload(EnvFilter::new(filter)).is_ok();
        tracing::info!("log level is {name}");
        changed
    }

    /// The latest warnings and errors.
    pub(crate) fn events(&self) -> serde_json::Value {
        self.recent.report()
    }
}

/// Starts logging for the whole process; call once.
///
/// # Errors
/// When the file cannot be opened.
pub(crate) fn start(level: LogLevel, file: Option<&Path>) -> anyhow::Result<Logs> {
    match file {
        None => init(level, std::io::stderr),
        Some(path) => {
            let path = with_extension(path);
            let file = OpenOptions::new()
                .create(true)
                .append(true)
                .open(&path)
                .with_context(|| format!("cannot open log file {}", path.display()))?;
            init(level, Arc::new(file))
        }
    }
}

fn init<W>(level: LogLevel, writer: W) -> anyhow::Result<Logs>
where
    W: for<'w> MakeWriter<'w> + Send + Sync + 'static,
{
    let layer = tracing_subscriber::fmt::layer()
        .event_format(Line)
        .with_ansi(false)
        .with_writer(writer);
    let (filter, handle) = reload::Layer::new(EnvFilter::new(filter(level)));
    let recent = Arc::new(Recent::default());
    tracing_subscriber::registry()
        .with(filter)
        .with(layer)
        .with(Arc::clone(&recent).layer())
        .try_init()
        .context("cannot start logging")?;
    Ok(Logs {
        filter: handle,
        recent,
    })
}

/// A log that nobody reads.
#[cfg(test)]
pub(crate) fn for_tests() -> Logs {
    let (filter, handle) = reload::Layer::new(EnvFilter::new("off"));
    // The handle works while its layer lives.
    std::mem::forget(tracing_subscriber::registry().with(filter));
    Logs {
        filter: handle,
        recent: Arc::default(),
    }
}

/// What to log at `level`: everything of ours, less of the libraries.
fn filter(level: LogLevel) -> &'static str {
    match level {
        LogLevel::Trace => "trace",
        LogLevel::Debug => "debug,fuse_backend_rs=off,hyper=info,hyper_util=info,reqwest=info",
        LogLevel::Info => "info,fuse_backend_rs=off",
        LogLevel::Warn => "warn,fuse_backend_rs=off",
        LogLevel::Error => "error,fuse_backend_rs=off",
    }
}

fn with_extension(path: &Path) -> PathBuf {
    if path.extension().is_some() {
        path.to_owned()
    } else {
        path.with_extension("log")
    }
}

/// The line format.
struct Line;

impl<S, N> FormatEvent<S, N> for Line
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
{
    fn format_event(
        &self,
        ctx: &FmtContext<'_, S, N>,
        mut out: Writer<'_>,
        event: &Event<'_>,
    ) -> fmt::Result {
        let meta = event.metadata();
        write!(out, "[{} +00:00] {}", now()?, meta.level())?;
        if *meta.level() != Level::INFO
            && let (Some(file), Some(line)) = (meta.file(), meta.line())
        {
            write!(out, " [{file}:{line}]")?;
        }
        out.write_char(' ')?;
        ctx.field_format().format_fields(out.by_ref(), event)?;
        // Which request it belongs to, from the outside in.
        for span in ctx
            .event_scope()
            .into_iter()
            .flat_map(|scope| scope.from_root())
        {
            let extensions = span.extensions();
            if let Some(fields) = extensions.get::<FormattedFields<N>>() {
                write!(out, " {}{{{fields}}}", span.name())?;
            }
        }
        writeln!(out)
    }
}

/// `2026-01-31 12:00:00.000000`, in UTC.
fn now() -> Result<String, fmt::Error> {
    let mut text = String::new();
    SystemTime.format_time(&mut Writer::new(&mut text))?;
    Ok(text.replacen('T', " ", 1).trim_end_matches('Z').to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_without_extension_gets_one() {
        assert_eq!(
            with_extension(Path::new("dir.d/nydusd")),
            Path::new("dir.d/nydusd.log")
        );
        assert_eq!(with_extension(Path::new("a.txt")), Path::new("a.txt"));
    }

    #[test]
    fn time_stamps_have_the_agreed_shape() {
        let text = now().unwrap();
        let shape: String = text
            .chars()
            .map(|c| if c.is_ascii_digit() { '0' } else { c })
            .collect();
        assert_eq!(shape, "0000-00-00 00:00:00.000000");
    }
}
