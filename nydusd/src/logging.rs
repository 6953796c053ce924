//! Log messages out: one line each, to standard error or appended to a file.
//!
//! `[2026-01-31 12:00:00.000000 +00:00] LEVEL message key=value`, with file and
//! line before the message for every level but `INFO`. Messages of the FUSE
//! library are left out below `trace`: it logs whole replies when a reader was
//! killed while it waited, which is no fault of anybody.

use std::fmt;
use std::fs::OpenOptions;
use std::path::{Path, PathBuf};

use anyhow::Context as _;
use tracing::{Event, Level, Subscriber};
use tracing_subscriber::fmt::format::{FormatEvent, FormatFields, Writer};
use tracing_subscriber::fmt::time::{FormatTime, SystemTime};
use tracing_subscriber::fmt::{FmtContext, FormattedFields, MakeWriter};
use tracing_subscriber::registry::LookupSpan;
use tracing_subscriber::{EnvFilter, layer::SubscriberExt as _, util::SubscriberInitExt as _};

use crate::cli::LogLevel;

/// Starts logging for the whole process; call once.
///
/// # Errors
/// When the file cannot be opened.
pub(crate) fn start(level: LogLevel, file: Option<&Path>) -> anyhow::Result<()> {
    match file {
        None => init(level, std::io::stderr),
        Some(path) => {
            let path = with_extension(path);
            let file = OpenOptions::new()
                .create(true)
                .append(true)
                .open(&path)
                .with_context(|| format!("cannot open log file {}", path.display()))?;
            init(level, std::sync::Arc::new(file))
        }
    }
}

fn init<W>(level: LogLevel, writer: W) -> anyhow::Result<()>
where
    W: for<'w> MakeWriter<'w> + Send + Sync + 'static,
{
    let layer = tracing_subscriber::fmt::layer()
        .event_format(Line)
        .with_ansi(false)
        .with_writer(writer);
    tracing_subscriber::registry()
        .with(EnvFilter::new(filter(level)))
        .with(layer)
        .try_init()
        .context("cannot start logging")
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
