//! Runs our `nydus-image`: the program named by `NYDUS_IMAGE`, or the debug
//! build of this repository.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::build::Built;
use crate::matrix::{Options, Source};

/// Builds `source` with `options` into `out`, which is created, as
/// [`crate::build::image`] does with the other builder.
pub fn create(source: &Path, options: &Options, out: &Path) -> Result<Built> {
    let blob_dir = out.join("blobs");
    std::fs::create_dir_all(&blob_dir)?;
    let boot = out.join("boot");
    let mut command = command()?;
    command
        .args(["create", "--log-level", "warn"])
        .args(options.arguments());
    command.arg("--blob-dir").arg(&blob_dir);
    if !options.inline_meta {
        command.arg("--bootstrap").arg(&boot);
    }
    run(command.arg(source))?;
    let boot = if options.inline_meta {
        only_file(&blob_dir)?
    } else {
        boot
    };
    if options.source == Source::TargzRef {
        let id = crate::describe::hash(std::fs::File::open(source)?)?.1;
        std::fs::copy(source, blob_dir.join(crate::describe::hex(&id)))?;
    }
    Ok(Built { boot, blob_dir })
}

/// `nydus-image check BOOT --blob-dir DIR`.
pub fn check(image: &Built) -> Result<()> {
    run(command()?
        .arg("check")
        .arg(&image.boot)
        .arg("--blob-dir")
        .arg(&image.blob_dir))
}

fn command() -> Result<Command> {
    let default = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../target/debug/nydus-image");
    let program = std::env::var_os("NYDUS_IMAGE").map_or(default, PathBuf::from);
    if !program.is_file() {
        bail!(
            "{} is missing: build it, or set NYDUS_IMAGE",
            program.display()
        );
    }
    Ok(Command::new(program))
}

fn run(command: &mut Command) -> Result<()> {
    let output = command
        .output()
        .with_context(|| format!("run {command:?}"))?;
    if !output.status.success() {
        let shown: Vec<_> = command.get_args().map(OsStr::to_string_lossy).collect();
        let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
        bail!(
            "nydus-image {}: {}\n{stderr}",
            shown.join(" "),
            output.status
        );
    }
    Ok(())
}

fn only_file(dir: &Path) -> Result<PathBuf> {
    let entries: Vec<_> = std::fs::read_dir(dir)?.collect::<Result<_, _>>()?;
    match entries.as_slice() {
        [one] => Ok(one.path()),
        _ => bail!(
            "{} files in {}, expected one blob",
            entries.len(),
            dir.display()
        ),
    }
}
