//! Which way of serving a mount gets: the ladder.
//!
//! From the top: the kernel's EROFS, which reads what was fetched once at its own
//! speed, and FUSE, which works everywhere. What the top rung needs cannot be told from
//! version numbers, so [`choose`] tries it and says why it took the other one.

use std::fmt;
use std::path::Path;

use clap::ValueEnum;
use serde::{Deserialize, Serialize};

use crate::erofs::probe::probe;

/// What the user asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Choice {
    /// The first of the others that works here.
    Auto,
    /// The kernel's EROFS, filled as it is read.
    Erofs,
    /// FUSE.
    Fuse,
}

/// What serves a mount.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Driver {
    /// The kernel's EROFS.
    Erofs,
    /// This process, through FUSE.
    Fuse,
}

impl Choice {
    /// The values as configuration files spell them.
    pub(crate) const NAMES: &'static str = "\"auto\", \"erofs\" or \"fuse\"";

    /// The choice with this name.
    pub(crate) fn named(name: &str) -> Option<Self> {
        Self::from_str(name, false).ok()
    }
}

impl fmt::Display for Driver {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Erofs => "erofs",
            Self::Fuse => "fuse",
        })
    }
}

/// Chooses for a mount whose cache is in `cache`, and logs the reason. A driver that
/// was asked for by name is not tried first: mounting says what is wrong.
pub(crate) fn choose(choice: Choice, cache: &Path) -> Driver {
    match choice {
        Choice::Erofs => Driver::Erofs,
        Choice::Fuse => Driver::Fuse,
        Choice::Auto => match probe(cache) {
            Ok(()) => {
                tracing::info!("driver erofs: a scratch image could be read on demand");
                Driver::Erofs
            }
            Err(error) => {
                tracing::info!("driver fuse: erofs does not work here: {error:#}");
                Driver::Fuse
            }
        },
    }
}
