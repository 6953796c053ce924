//! Records what the binary was built from, for `--version`.
//!
//! Nothing here may fail the build: a source tree without git still compiles,
//! and then says `unknown`. `SOURCE_DATE_EPOCH` makes the build time reproducible.

use std::process::Command;
use std::time::{SystemTime, UNIX_EPOCH};

fn main() {
    // Not at every file change: the commit and the profile decide, not the minute.
    for path in ["build.rs", "../.git/HEAD", "../.git/logs/HEAD"] {
        if std::path::Path::new(path).exists() {
            emit("rerun-if-changed", path);
        }
    }
    emit("rerun-if-env-changed", "SOURCE_DATE_EPOCH");
    emit("rerun-if-env-changed", "NYDUS_GIT_COMMIT");

    let commit = std::env::var("NYDUS_GIT_COMMIT")
        .ok()
        .or_else(|| output("git", &["rev-parse", "HEAD"]))
        .unwrap_or_else(|| "unknown".to_owned());
    let rustc = std::env::var("RUSTC").unwrap_or_else(|_| "rustc".to_owned());
    let compiler = output(&rustc, &["--version"]).unwrap_or_else(|| "unknown".to_owned());
    let profile = std::env::var("PROFILE").unwrap_or_else(|_| "unknown".to_owned());

    emit("rustc-env", &format!("NYDUS_BUILD_COMMIT={commit}"));
    emit("rustc-env", &format!("NYDUS_BUILD_TIME={}", build_time()));
    emit("rustc-env", &format!("NYDUS_BUILD_PROFILE={profile}"));
    emit("rustc-env", &format!("NYDUS_BUILD_RUSTC={compiler}"));
}

#[allow(
    clippy::print_stdout,
    reason = "this is how a build script talks to cargo"
)]
fn emit(key: &str, value: &str) {
    println!("cargo:{key}={value}");
}

/// First line of a command's standard output, if it succeeds.
fn output(program: &str, args: &[&str]) -> Option<String> {
    let out = Command::new(program).args(args).output().ok()?;
    let text = String::from_utf8(out.stdout).ok()?;
    let line = text.lines().next()?.trim();
    (out.status.success() && !line.is_empty()).then(|| line.to_owned())
}

/// Now, or `SOURCE_DATE_EPOCH`, as RFC 3339 in UTC.
fn build_time() -> String {
    let seconds = std::env::var("SOURCE_DATE_EPOCH")
        .ok()
        .and_then(|text| text.parse().ok())
        .or_else(|| Some(SystemTime::now().duration_since(UNIX_EPOCH).ok()?.as_secs()))
        .unwrap_or(0);
    let (days, rest) = (seconds / 86_400, seconds % 86_400);
    let (year, month, day) = civil(days);
    let (hour, minute, second) = (rest / 3600, rest / 60 % 60, rest % 60);
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}Z")
}

/// Calendar date of a day counted from 1970-01-01 (proleptic Gregorian).
fn civil(days: u64) -> (u64, u64, u64) {
    // Counted from 0000-03-01, so that the leap day ends a year and eras repeat.
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
    (era * 400 + year_of_era + u64::from(month <= 2), month, day)
}
