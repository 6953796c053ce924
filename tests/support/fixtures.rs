//! Images that Nydus v2.4 wrote: proof that images made elsewhere read back here.
//!
//! They are too big for this repository. `NYDUS_FIXTURES` names their directory;
//! by default it is `shared/fixtures` beside the checkout. Tests that need them
//! fail without them, unless `NYDUS_FIXTURES=none` says that this is meant.

use std::env;
use std::path::{Path, PathBuf};

use anyhow::{Result, bail};

/// The directory of the fixtures; `None` if the caller wants to go without.
///
/// # Errors
/// The directory is not there.
pub fn directory() -> Result<Option<PathBuf>> {
    let directory = match env::var_os("NYDUS_FIXTURES") {
        Some(value) if value == "none" => return Ok(None),
        Some(value) => value.into(),
        None => Path::new(env!("CARGO_MANIFEST_DIR")).join("../../shared/fixtures"),
    };
    if !directory.join("tree.jsonl").is_file() {
        bail!(
            "no images of Nydus v2.4 in {}: set NYDUS_FIXTURES to their directory, \
             or to `none` to go without these tests",
            directory.display()
        );
    }
    Ok(Some(directory))
}
