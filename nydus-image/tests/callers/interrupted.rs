//! A command that is told to end leaves nothing behind.

use std::fs::File;
use std::io::Write as _;
use std::os::unix::process::ExitStatusExt as _;
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::place::Place;

/// Names in the directory and in `blobs`, but for the FIFO.
fn names(place: &Place) -> Vec<String> {
    let mut names = place.names(".");
    names.retain(|name| name != "source");
    names.extend(place.names("blobs"));
    names
}

#[test]
fn a_signal_leaves_no_file() {
    for signal in [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP] {
        for line in [
            "create -t tar-rafs -B boot -D blobs source",
            "create -t tar-rafs -B blobs/boot -b blobs/blob source",
        ] {
            let place = Place::new();
            place.fifo("source");
            let before = names(&place);
            let words: Vec<String> = line.split_whitespace().map(str::to_owned).collect();
            let mut child = place.spawn(&words);
            let mut source = File::options()
                .write(true)
                .open(place.path("source"))
                .unwrap();
            // Half of an archive: the build cannot end by itself.
            let archive = place.read("layer.tar");
            source.write_all(&archive[..archive.len() / 2]).unwrap();
            let patience = Instant::now() + Duration::from_secs(30);
            while names(&place) == before {
                assert!(Instant::now() < patience, "no temporary file appears");
                assert!(child.try_wait().unwrap().is_none(), "ended too early");
                thread::sleep(Duration::from_millis(2));
            }
            kill(Pid::from_raw(child.id().try_into().unwrap()), signal).unwrap();
            let status = child.wait().unwrap();
            assert_eq!(status.signal(), Some(signal as i32), "{line}: {status}");
            assert_eq!(names(&place), before, "{line}, {signal}");
            drop(source);
        }
    }
}
