//! Trees whose files do not compress, and readers that compare what they read.
//!
//! Every file has a directory of its own, so that a read brings nothing but its file.

use std::fmt::Arguments;
use std::fs;
use std::io::Write as _;
use std::ops::Range;
use std::path::{Path, PathBuf};

use support::tree::nasty::noise;

/// A tree of files of the same size.
pub(crate) struct Tree {
    pub root: PathBuf,
}

impl Tree {
    /// Makes one of `files` files of `size` bytes, different for every `seed`.
    pub(crate) fn new(root: PathBuf, files: usize, size: usize, seed: usize) -> Self {
        for number in 0..files {
            let path = root.join(name(number));
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            // Far apart: neighbouring seeds of the generator must not be the same bytes.
            fs::write(path, noise(size, (seed * 10_000 + number) << 20)).unwrap();
        }
        Self { root }
    }
}

fn name(number: usize) -> PathBuf {
    PathBuf::from(format!("{number:04}/data"))
}

/// Reads these files of `mount`, in order, and compares each with that of `source`.
///
/// # Errors
/// What is the matter with the first one that cannot be read or is different.
pub(crate) fn compare(source: &Path, mount: &Path, files: Range<usize>) -> Result<(), String> {
    for number in files {
        let name = name(number);
        let wanted = fs::read(source.join(&name)).map_err(|error| error.to_string())?;
        let path = mount.join(&name);
        let got = fs::read(&path).map_err(|error| format!("{}: {error}", path.display()))?;
        if got != wanted {
            return Err(format!("{}: wrong bytes", path.display()));
        }
    }
    Ok(())
}

/// Says what was measured or is being done, for whoever reads the output of a run.
pub(crate) fn say(what: Arguments<'_>) {
    // Whoever closed the output does not want it.
    let _ = writeln!(std::io::stderr(), "{what}");
}
