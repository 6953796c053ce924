//! What the demo prints.

use std::fmt;
use std::io::{self, Write as _};
use std::time::Duration;

use anyhow::Result;

/// What one way of getting at an image cost.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Cost {
    /// Bytes that the registry sent before the program had ended.
    pub bytes: u64,
    /// From the first command to the first byte of a file.
    pub first_byte: Duration,
    /// From there to the end of the program.
    pub run: Duration,
}

/// Both ways side by side.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Report {
    /// Bytes of the layers of the original image.
    pub original_size: u64,
    /// Bytes of the layers of the converted image.
    pub converted_size: u64,
    /// Mounted with `nydusd`.
    pub lazy: Cost,
    /// Pulled and unpacked.
    pub whole: Cost,
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut row = |name: &str, lazy: String, whole: String| {
            write!(f, "\n{name:<26}{lazy:>14}{whole:>18}")
        };
        row("", "lazy mount".to_owned(), "pull and unpack".to_owned())?;
        row(
            "size of the image",
            megabytes(self.converted_size),
            megabytes(self.original_size),
        )?;
        row(
            "fetched",
            megabytes(self.lazy.bytes),
            megabytes(self.whole.bytes),
        )?;
        row(
            "share of the image",
            percent(self.lazy.bytes, self.converted_size),
            percent(self.whole.bytes, self.original_size),
        )?;
        row(
            "time to the first byte",
            time(self.lazy.first_byte),
            time(self.whole.first_byte),
        )?;
        row(
            "time for the program",
            time(self.lazy.run),
            time(self.whole.run),
        )?;
        row(
            "both",
            time(self.lazy.first_byte.saturating_add(self.lazy.run)),
            time(self.whole.first_byte.saturating_add(self.whole.run)),
        )
    }
}

/// Tenths of a megabyte, in integers: no rounding that needs an explanation.
fn megabytes(bytes: u64) -> String {
    let tenths = bytes.saturating_add(50_000) / 100_000;
    format!("{}.{} MB", tenths / 10, tenths % 10)
}

fn percent(part: u64, whole: u64) -> String {
    let percent = part
        .saturating_mul(100)
        .checked_div(whole)
        .unwrap_or_default();
    format!("{percent} %")
}

fn time(duration: Duration) -> String {
    format!("{:.2} s", duration.as_secs_f64())
}

/// Prints a line at once.
pub(crate) fn say(line: &str) -> Result<()> {
    let mut out = io::stdout().lock();
    writeln!(out, "{line}")?;
    Ok(out.flush()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_lines_up() {
        let cost = |bytes, milliseconds| Cost {
            bytes,
            first_byte: Duration::from_millis(milliseconds),
            run: Duration::from_millis(2 * milliseconds),
        };
        let report = Report {
            original_size: 80_000_000,
            converted_size: 70_000_000,
            lazy: cost(7_040_000, 50),
            whole: cost(80_000_000, 4000),
        };
        let text = report.to_string();
        assert!(
            text.contains("fetched                           7.0 MB           80.0 MB"),
            "{text}"
        );
        assert!(
            text.contains("share of the image                  10 %             100 %"),
            "{text}"
        );
        assert!(
            text.contains("both                              0.15 s           12.00 s"),
            "{text}"
        );
    }
}
