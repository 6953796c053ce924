//! What `--version` prints, and the version string of JSON reports.
//!
//! Programs parse both: the tag starts with `v`, every item has its own line, and
//! the value follows a tab.

/// Version tag of this build, as in `v0.1.0`.
pub const TAG: &str = concat!("v", env!("CARGO_PKG_VERSION"));

/// `TAG-COMMIT`: the `version` of a JSON report.
pub const TAG_AND_COMMIT: &str = concat!(
    "v",
    env!("CARGO_PKG_VERSION"),
    "-",
    env!("NYDUS_BUILD_COMMIT")
);

/// The block printed after the program's name by `--version`.
pub const BLOCK: &str = concat!(
    "\rVersion: \tv",
    env!("CARGO_PKG_VERSION"),
    "\nGit Commit: \t",
    env!("NYDUS_BUILD_COMMIT"),
    "\nBuild Time: \t",
    env!("NYDUS_BUILD_TIME"),
    "\nProfile: \t",
    env!("NYDUS_BUILD_PROFILE"),
    "\nRustc: \t\t",
    env!("NYDUS_BUILD_RUSTC"),
    "\n",
);
