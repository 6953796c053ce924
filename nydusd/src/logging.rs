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

/// A point in time as `2026-01-31T12:00:00Z`, in UTC.
pub(crate) fn rfc3339(time: std::time::SystemTime) -> String {
    let since = time.duration_since(std::time::UNIX_EPOCH);
    let seconds = since.unwrap_or_default().as_secs();
    let (days, rest) = (seconds / 86_400, seconds % 86_400);
    // The calendar repeats every 400 years of 146,097 days; its years begin in March,
    // so that a leap day is the last of its year.
    let shifted = days + 719_468;
    let (era, of_era) = (shifted / 146_097, shifted % 146_097);
    let year_of_era = (of_era - of_era / 1460 + of_era / 36_524 - of_era / 146_096) / 365;
    let of_year = of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let from_march = (5 * of_year + 2) / 153;
    let day = of_year - (153 * from_march + 2) / 5 + 1;
    let month = if from_march < 10 {
        from_march + 3
    } else {
        from_march - 9
    };
    let year = era * 400 + year_of_era + u64::from(month <= 2);
    let (hour, minute, second) = (rest / 3600, rest / 60 % 60, rest % 60);
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}Z")
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
    fn points_in_time() {
        let at = |seconds| std::time::UNIX_EPOCH + std::time::Duration::from_secs(seconds);
        assert_eq!(rfc3339(at(0)), "1970-01-01T00:00:00Z");
        assert_eq!(rfc3339(at(951_827_696)), "2000-02-29T12:34:56Z");
        assert_eq!(rfc3339(at(1_767_225_599)), "2025-12-31T23:59:59Z");
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
