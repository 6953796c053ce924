//! The image of the demo: Debian, then python3, then nginx, as three layers.
//!
//! Made from the packages of this machine's own Debian mirror by mmdebstrap and
//! apt, as root but without user namespaces. It is kept in a directory; the next
//! run finds it there.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use serde_json::json;
use support::command::{succeed, succeed_within};
use support::image::layer::{changes, write_tar};
use support::image::layout::{self, Image};

/// Downloads may take their time on a slow line.
const DEADLINE: Duration = Duration::from_secs(1800);

/// Directories whose content, state of the package manager, no image should carry.
const LEFT_OUT: [&str; 2] = ["var/lib/apt/lists", "var/cache/apt"];

/// The name of the image inside its layout.
pub(crate) const TAG: &str = "demo";

/// Finds the image in `directory`, or makes it there; returns its OCI layout, in
/// which it is called [`TAG`]. The tree that the layers add up to is beside it in
/// `root`, for benches.
///
/// # Errors
/// Not root, no network, or the mirror does not work.
pub(crate) fn find_or_make(directory: &Path) -> Result<PathBuf> {
    let layout = directory.join("layout");
    if layout.is_dir() {
        return Ok(layout);
    }
    ensure!(
        nix::unistd::geteuid().is_root(),
        "making the image needs root"
    );
    let partial = directory.with_extension("partial");
    if partial.exists() {
        fs::remove_dir_all(&partial).context("cannot remove what an earlier run left")?;
    }
    fs::create_dir_all(&partial)?;
    // apt changes directory before it uses paths.
    make(&partial.canonicalize()?)?;
    fs::rename(&partial, directory)?;
    Ok(layout)
}

fn make(directory: &Path) -> Result<()> {
    let root = directory.join("root");
    let mut image = Image::new(&[]);
    image.config = json!({
        "Env": ["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"],
        "Cmd": ["python3"],
    });

    debian(&root)?;
    image
        .layers
        .push((layer(directory, None, &root)?, "minimal Debian".to_owned()));

    let lower = snapshot(directory, &root)?;
    install(&root, "python3")?;
    image
        .layers
        .push((layer(directory, Some(&lower), &root)?, "python3".to_owned()));

    let lower = snapshot(directory, &root)?;
    install(&root, "nginx")?;
    slim(&root)?;
    image
        .layers
        .push((layer(directory, Some(&lower), &root)?, "nginx".to_owned()));

    layout::write(&directory.join("layout"), TAG, std::slice::from_ref(&image))?;
    fs::remove_dir_all(lower)?;
    for (tar, _) in image.layers {
        fs::remove_file(tar)?;
    }
    for path in LEFT_OUT {
        fs::remove_dir_all(root.join(path))?;
        fs::create_dir(root.join(path))?;
    }
    Ok(())
}

/// A minimal Debian of the release and from the mirrors that this machine uses.
fn debian(root: &Path) -> Result<()> {
    succeed_within(Command::new("apt-get").args(["update", "-qq"]), DEADLINE)?;
    let mut targets = Command::new("apt-get");
    targets.args([
        "indextargets",
        "--format",
        "deb $(REPO_URI) $(CODENAME) $(COMPONENT)",
    ]);
    let listed = succeed(targets.args(["Created-By: Packages", "Origin: Debian"]))?.stdout;
    let mut sources: Vec<&str> = listed.lines().collect();
    sources.sort_unstable();
    sources.dedup();
    // The plain name of the release, beside `-security` and `-updates`.
    let suite = sources
        .iter()
        .filter_map(|line| line.split(' ').nth(2))
        .min_by_key(|suite| suite.len())
        .context("this machine has no Debian package sources")?;
    let file = tempfile::Builder::new().suffix(".list").tempfile()?;
    fs::write(&file, sources.join("\n"))?;
    let mut mmdebstrap = Command::new("mmdebstrap");
    mmdebstrap.args(["--quiet", "--mode=root", "--variant=minbase"]);
    mmdebstrap
        .args(["--skip=cleanup/apt/lists", suite])
        .arg(root)
        .arg(file.path());
    succeed_within(&mut mmdebstrap, DEADLINE)?;
    Ok(())
}

/// Installs a package into `root` with this machine's network and that root's state.
fn install(root: &Path, package: &str) -> Result<()> {
    // Nothing may start a service from here.
    let policy = root.join("usr/sbin/policy-rc.d");
    fs::write(&policy, "#!/bin/sh\nexit 101\n")?;
    fs::set_permissions(&policy, std::os::unix::fs::PermissionsExt::from_mode(0o755))?;
    let mut apt = Command::new("apt-get");
    apt.env("DEBIAN_FRONTEND", "noninteractive")
        .env("LC_ALL", "C.UTF-8");
    apt.args(["install", "-y", "-qq", "--no-install-recommends", "-o"]);
    apt.arg(format!("Dir={}", root.display()));
    apt.arg("-o")
        .arg(format!("DPkg::Chroot-Directory={}", root.display()));
    let installed = succeed_within(apt.arg(package), DEADLINE);
    fs::remove_file(policy)?;
    installed.map(drop)
}

/// Removes what a server does not need; the layers below keep it, so the image
/// gets whiteouts of files and of directories.
fn slim(root: &Path) -> Result<()> {
    for directory in ["usr/share/lintian", "usr/share/bug"] {
        fs::remove_dir_all(root.join(directory))?;
    }
    for package in fs::read_dir(root.join("usr/share/doc"))? {
        let package = package?;
        if !package.file_type()?.is_dir() {
            continue;
        }
        for file in fs::read_dir(package.path())? {
            let file = file?;
            if file.file_name().to_string_lossy().starts_with("changelog") {
                fs::remove_file(file.path())?;
            }
        }
    }
    Ok(())
}

/// Copies the tree as it is now, in place of an earlier copy.
fn snapshot(directory: &Path, root: &Path) -> Result<PathBuf> {
    let lower = directory.join("lower");
    if lower.exists() {
        fs::remove_dir_all(&lower)?;
    }
    succeed(
        Command::new("cp")
            .args(["-a", "--reflink=auto"])
            .arg(root)
            .arg(&lower),
    )?;
    Ok(lower)
}

/// Writes the tar of what `root` adds to `lower`.
fn layer(directory: &Path, lower: Option<&Path>, root: &Path) -> Result<PathBuf> {
    let mut changes = changes(lower, root)?;
    let left_out = |path: &PathBuf, directory: &str| {
        path.starts_with(directory) && path.as_path() != Path::new(directory)
    };
    let kept = |path: &PathBuf| !LEFT_OUT.iter().any(|directory| left_out(path, directory));
    changes.present.retain(kept);
    changes.removed.retain(kept);
    let name = if lower.is_none() { "base" } else { "layer" };
    let tar = tempfile::Builder::new()
        .prefix(name)
        .suffix(".tar")
        .tempfile_in(directory)?;
    let (_, tar) = tar.keep()?;
    write_tar(root, &changes, &tar)?;
    Ok(tar)
}
