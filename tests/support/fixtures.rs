//! Images that Nydus v2.4 wrote: proof that images made elsewhere read back here.
//!
//! They are too big for this repository. `NYDUS_FIXTURES` names their directory; tests
//! that need them fail without it, unless `NYDUS_FIXTURES=none` says that going without
//! is meant. `misc/test.sh` sets it, and says to what.

use std::env;
use std::path::PathBuf;

use anyhow::{Result, bail};

/// The directory of the fixtures; `None` if the caller wants to go without.
///
/// # Errors
/// The variable is not set, or does not name such a directory.
pub fn directory() -> Result<Option<PathBuf>> {
    let problem = match env::var_os("NYDUS_FIXTURES") {
        Some(value) if value == "none" => return Ok(None),
        Some(value) if PathBuf::from(&value).join("tree.jsonl").is_file() => {
            return Ok(Some(value.into()));
        }
        Some(value) => format!("there are none in {}", PathBuf::from(value).display()),
        None => "NYDUS_FIXTURES is not set".to_owned(),
    };
    bail!(
        "no images of Nydus v2.4, {problem}: set NYDUS_FIXTURES to their directory, or to \
         `none` to go without these tests"
    );
}
