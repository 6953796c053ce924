//! Limits of this process.
//!
//! Open files: many blobs, many sockets, and the default soft limit of 1024 is soon used
//! up. Memory: what the allocator keeps for threads that are idle.

use nix::sys::resource::{Resource, getrlimit, setrlimit};

/// More is never useful.
const MAX_FILES: u64 = 1_000_000;
/// Blocks from here on are mapped one by one, and unmapped when they are freed, in bytes.
#[cfg(target_env = "gnu")]
const MMAP_THRESHOLD: libc::c_int = 128 << 10;
/// Files of the whole machine that are left to others.
const RESERVED: u64 = 16_384;

/// Asks for `wanted` open files; 0 leaves the limit alone.
///
/// Without the privilege to raise the hard limit, the soft limit is raised to
/// the hard one, which is said in the log and good enough to go on.
pub(crate) fn raise_open_files(wanted: u64) {
    if wanted == 0 {
        return;
    }
    let wanted = clamp(wanted, machine_limit());
    let Ok((soft, hard)) = getrlimit(Resource::RLIMIT_NOFILE) else {
        tracing::warn!("cannot read the limit of open files");
        return;
    };
    if soft >= wanted {
        return;
    }
    if setrlimit(Resource::RLIMIT_NOFILE, wanted, hard.max(wanted)).is_ok() {
        return;
    }
    let soft = wanted.min(hard);
    match setrlimit(Resource::RLIMIT_NOFILE, soft, hard) {
        Ok(()) => tracing::warn!(
            "open files limited to {soft} instead of {wanted}: \
             raising the hard limit needs CAP_SYS_RESOURCE"
        ),
        Err(err) => tracing::warn!("cannot raise the limit of open files to {soft}: {err}"),
    }
}

/// Raises the soft limit to the hard one, before anything is known about options.
pub(crate) fn raise_soft() {
    if let Ok((_, hard)) = getrlimit(Resource::RLIMIT_NOFILE) {
        // What it is good for fails by itself if this does.
        let _ = setrlimit(Resource::RLIMIT_NOFILE, hard, hard);
    }
}

/// Memory that is free again goes back to the system, and does not stay with one of many
/// arenas. To be called while there is one thread.
///
/// glibc makes up to eight arenas a processor, and keeps larger and larger blocks once
/// some have been freed: tens of megabytes in a daemon whose threads come and go with
/// bursts of fetches. Two are enough: data is read into a few large buffers.
pub(crate) fn keep_little_memory() {
    #[cfg(target_env = "gnu")]
    for (parameter, value) in [
        (libc::M_ARENA_MAX, 2),
        (libc::M_MMAP_THRESHOLD, MMAP_THRESHOLD),
    ] {
        // SAFETY: sets a number of the allocator (mallopt(3)).
        unsafe { libc::mallopt(parameter, value) };
    }
}

fn clamp(wanted: u64, machine: Option<u64>) -> u64 {
    let machine = machine.map_or(MAX_FILES, |limit| limit.saturating_sub(RESERVED));
    wanted.min(machine).min(MAX_FILES)
}

/// `fs.file-max`, if it can be read.
fn machine_limit() -> Option<u64> {
    std::fs::read_to_string("/proc/sys/fs/file-max")
        .ok()?
        .trim()
        .parse()
        .ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_machine_keeps_its_share() {
        assert_eq!(clamp(5_000_000, None), MAX_FILES);
        assert_eq!(clamp(50_000, Some(60_000)), 60_000 - RESERVED);
        assert_eq!(clamp(100, Some(60_000)), 100);
        assert_eq!(clamp(100, Some(1)), 0);
    }
}
