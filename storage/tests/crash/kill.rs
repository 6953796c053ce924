//! Kills a process before each of its system calls in turn.
//!
//! The process is this program under `ptrace`: it fills a cache and ends. Run number n
//! ends before system call number n; then a new process of the same boot must find a
//! cache that does not lie, and be able to complete it. That includes everything
//! between two calls: bits are set by stores into a map.

use std::fs;
use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::{Child, Command};

use storage::backend::Priority;
use storage::cache::Removal;

use crate::sample::{Sample, open_cache};

/// First argument of the process that is killed.
pub(crate) const CHILD: &str = "--child";

const CHUNKS: u32 = 5;
const CHUNK_SIZE: u32 = 20_000;

/// What the process does.
const DEEDS: [&str; 3] = ["fill", "fill-after-reboot", "remove"];

/// What the process that is killed does: `DEED BLOBS CACHE`.
pub(crate) fn child(args: &[String]) {
    let [deed, blobs, cache] = args else {
        panic!("usage: {CHILD} DEED BLOBS CACHE")
    };
    let sample = Sample::write(Path::new(blobs), CHUNKS, CHUNK_SIZE);
    // SAFETY: raise has no requirements; the tracer lets us go on.
    unsafe { libc::raise(libc::SIGSTOP) };
    let cache = open_cache(Path::new(cache), 2);
    if deed == "remove" {
        cache.remove(&sample.info().id).unwrap();
        return;
    }
    let blob = sample.open(&cache);
    for number in [3, 0, 4] {
        let plain = sample.chunk(number).plain.clone();
        blob.ensure(plain, Priority::Prefetch).unwrap();
    }
    // Closing it is part of what is interrupted.
}

pub(crate) fn run() {
    for deed in DEEDS {
        let mut before = 0;
        while interrupted(deed, before) {
            before += 1;
            assert!(before < 5000, "the process does not end");
        }
        println!("{deed}: killed before each of {before} system calls, nothing wrong");
        assert!(before > 10, "hardly anything was interrupted");
    }
}

/// One run; `false` if the process ended before it could be killed.
fn interrupted(deed: &str, before: u64) -> bool {
    let top = tempfile::tempdir().unwrap();
    let (blobs, cache) = (top.path().join("blobs"), top.path().join("cache"));
    fs::create_dir(&blobs).unwrap();
    let sample = Sample::write(&blobs, CHUNKS, CHUNK_SIZE);
    if deed != "fill" {
        let boot = if deed == "remove" { 2 } else { 1 };
        let earlier = open_cache(&cache, boot);
        let blob = sample.open(&earlier);
        // Not closed when the machine stops: chunks are suspect in the next boot.
        std::mem::forget(Clone::clone(&blob));
        let plain = sample.chunk(1).plain.start..sample.chunk(3).plain.end;
        blob.ensure(plain, Priority::Prefetch).unwrap();
        if deed == "remove" {
            drop(blob);
            // In a process of its own nothing would be open; here it is.
            let all = earlier.remove(&sample.info().id).unwrap();
            assert_eq!(all, Removal::InUse);
        }
    }
    let child = traced(&[deed.as_ref(), blobs.as_os_str(), cache.as_os_str()]);
    let killed = kill_before(child, before);
    let found = sample.inspect(&cache, 2);
    assert_eq!(found.wrong, 0, "{deed}, killed before system call {before}");
    killed
}

fn traced(args: &[&std::ffi::OsStr]) -> Child {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.arg(CHILD).args(args);
    let trace_me = || {
        // SAFETY: this request has no other arguments.
        let result = unsafe { libc::ptrace(libc::PTRACE_TRACEME, 0, 0, 0) };
        if result == 0 {
            Ok(())
        } else {
            Err(std::io::Error::last_os_error())
        }
    };
    // SAFETY: between fork and exec it makes one system call and nothing else.
    unsafe { command.pre_exec(trace_me) };
    command.spawn().unwrap()
}

/// Kills the process before one of its system calls, counted from where it stops
/// itself; `false` if it ended first.
fn kill_before(mut child: Child, before: u64) -> bool {
    let pid = i32::try_from(child.id()).unwrap();
    // It stops after exec, and once more by itself.
    while wait(pid).expect("stops first") != libc::SIGSTOP {
        request(
            libc::PTRACE_SETOPTIONS,
            pid,
            libc::PTRACE_O_TRACESYSGOOD | libc::PTRACE_O_EXITKILL,
        );
        request(libc::PTRACE_CONT, pid, 0);
    }
    // Two stops for each call: before and after. We stand outside of any.
    for _ in 0..=2 * before {
        request(libc::PTRACE_SYSCALL, pid, 0);
        if wait(pid).is_none() {
            return false;
        }
    }
    child.kill().unwrap();
    while wait(pid).is_some() {}
    true
}

fn request(what: libc::c_uint, pid: i32, data: i32) {
    // SAFETY: none of the requests used here takes an address.
    let result = unsafe { libc::ptrace(what, pid, 0, i64::from(data)) };
    assert_eq!(result, 0, "ptrace: {}", std::io::Error::last_os_error());
}

/// The signal or marker that the process stopped with; `None` if it is gone.
fn wait(pid: i32) -> Option<i32> {
    let mut status = 0;
    // SAFETY: `status` is a valid place for the result.
    let result = unsafe { libc::waitpid(pid, &raw mut status, 0) };
    assert_eq!(result, pid, "waitpid: {}", std::io::Error::last_os_error());
    if libc::WIFSTOPPED(status) {
        return Some(libc::WSTOPSIG(status));
    }
    let fine = libc::WIFSIGNALED(status) || libc::WEXITSTATUS(status) == 0;
    assert!(fine, "the process failed: {status:#x}");
    None
}
