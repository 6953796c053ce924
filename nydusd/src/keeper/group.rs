//! Control groups for keeper and worker, so that what is done to the worker's group
//! (a limit, a freeze, a kill) is not done to the keeper.
//!
//! Groups are made only where that is our right: in one that was handed over to this
//! program, which systemd and container runtimes mark with the extended attribute
//! `trusted.delegate` or `user.delegate`. Below it, `keeper` and `worker` are for the
//! processes of all daemons that were started there. Everywhere else, and with version 1
//! of control groups, both stay where they are.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, bail, ensure};

use super::{KEEPER, WORKER};
use crate::mountinfo;

/// The marks of a group that was handed over.
const DELEGATED: [&str; 2] = ["trusted.delegate", "user.delegate"];
/// The mark of a group that was made here, and may be removed.
const MADE: &str = "user.nydusd";
/// The processes of a group.
const MEMBERS: &str = "cgroup.procs";
/// This process, for [`MEMBERS`].
const MYSELF: &str = "0";

/// Two groups below one that was handed over.
#[derive(Debug)]
pub(super) struct Groups {
    base: PathBuf,
}

impl Groups {
    /// Moves this process, a keeper, to its group. `None` if there is no place for one;
    /// the log says why.
    pub(super) fn enter() -> Option<Self> {
        match Self::try_enter() {
            Ok(groups) => {
                tracing::info!(
                    "keeper and worker have groups below {}",
                    groups.base.display()
                );
                Some(groups)
            }
            Err(error) => {
                tracing::debug!("keeper and worker share a group: {error:#}");
                None
            }
        }
    }

    fn try_enter() -> anyhow::Result<Self> {
        let own = own_group()?;
        let groups = Self {
            base: base(&own).context("it was not handed over to this program")?,
        };
        groups.join(KEEPER, MYSELF)?;
        Ok(groups)
    }

    /// Moves a worker to its group.
    pub(super) fn take_in(&self, worker: u32) {
        if let Err(error) = self.join(WORKER, &worker.to_string()) {
            tracing::warn!("the worker stays in the keeper's group: {error:#}");
        }
    }

    fn join(&self, group: &str, process: &str) -> anyhow::Result<()> {
        let group = self.base.join(group);
        let members = group.join(MEMBERS);
        let enter = || {
            match fs::create_dir(&group) {
                Ok(()) => xattr::set(&group, MADE, b"1")?,
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
                Err(error) => return Err(error),
            }
            fs::write(&members, process)
        };
        let mut done = enter();
        // Another daemon may have removed it as its last user.
        if matches!(&done, Err(error) if error.kind() == io::ErrorKind::NotFound) {
            done = enter();
        }
        done.with_context(|| group.display().to_string())
    }

    /// Moves this process back, and removes what no other daemon uses.
    pub(super) fn leave(self) {
        let back = fs::write(self.base.join(MEMBERS), MYSELF);
        let groups = [WORKER, KEEPER].map(|group| self.base.join(group));
        let ours = groups.iter().filter(|group| is_marked(group, MADE));
        let gone: Vec<_> = ours.map(fs::remove_dir).collect();
        for error in gone.into_iter().chain([back]).filter_map(Result::err) {
            // Usually other daemons are in there.
            tracing::debug!("groups below {}: {error}", self.base.display());
        }
    }
}

/// The group that was handed over, given the one that this process is in: that one, or
/// the one above it.
fn base(own: &Path) -> Option<PathBuf> {
    own.ancestors()
        .take(2)
        .find(|group| is_delegated(group))
        .map(Path::to_owned)
}

fn is_delegated(group: &Path) -> bool {
    DELEGATED.iter().any(|name| is_marked(group, name))
}

fn is_marked(group: &Path, name: &str) -> bool {
    matches!(xattr::get(group, name), Ok(Some(value)) if value == b"1")
}

/// Directory of the group that this process is in.
fn own_group() -> anyhow::Result<PathBuf> {
    let table = fs::read_to_string("/proc/self/cgroup").context("/proc/self/cgroup")?;
    let path = table.lines().find_map(|line| line.strip_prefix("0::/"));
    let path = path.context("there is no version 2 of control groups")?;
    ensure!(
        !Path::new(path).starts_with(".."),
        "it is outside of this namespace"
    );
    let mounts = mountinfo::of("self").context("the mount table")?;
    let me = std::process::id().to_string();
    for mount in mounts.iter().filter(|mount| mount.kind == "cgroup2") {
        let group = mount.mountpoint.join(path);
        // A part of the hierarchy may be mounted, in which the path means another group.
        let members = fs::read_to_string(group.join(MEMBERS)).unwrap_or_default();
        if members.lines().any(|member| member == me) {
            return Ok(group);
        }
    }
    bail!("it is mounted nowhere")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_was_handed_over_is_used() {
        let dir = tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR")).unwrap();
        let base_of_ours = dir.path().join("service");
        let own = base_of_ours.join("main");
        fs::create_dir_all(own.join("below")).unwrap();
        assert_eq!(base(&own), None);
        xattr::set(&base_of_ours, "user.delegate", b"1").unwrap();
        assert_eq!(base(&own).as_ref(), Some(&base_of_ours));
        assert_eq!(base(&base_of_ours).as_ref(), Some(&base_of_ours));
        // Further up it belongs to somebody else.
        assert_eq!(base(&own.join("below")), None);
        xattr::set(&own, "user.delegate", b"1").unwrap();
        assert_eq!(base(&own), Some(own));
    }
}
