//! A directory to work in, and running the program in it the way its callers do.

use std::fs::{self, File};
use std::io::{self, Read as _, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::Duration;

use flate2::Compression;
use flate2::write::GzEncoder;
use nix::libc::O_NONBLOCK;
use nix::sys::stat::Mode;
use sha2::{Digest as _, Sha256};
use tempfile::TempDir;

/// A directory with a tree `rootfs`, the same as `layer.tar` and `layer.tar.gz`, and
/// an empty directory `blobs`.
pub(crate) struct Place(TempDir);

/// How a command ended and what it wrote.
#[derive(Debug)]
pub(crate) struct Run {
    pub(crate) code: i32,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
    /// What came out of the FIFO.
    pub(crate) blob: Vec<u8>,
}

/// One command line, and what its caller does around it.
#[derive(Clone, Debug, Default)]
pub(crate) struct Call {
    words: Vec<String>,
    stdin: Option<&'static str>,
    feed: Option<(&'static str, &'static str)>,
    drain: Option<&'static str>,
}

impl Call {
    /// The words of `line`, in single quotes where one has white space.
    pub(crate) fn new(line: &str) -> Self {
        let pieces = line.split('\'').enumerate();
        let words = pieces.flat_map(|(index, piece)| match index % 2 {
            0 => piece.split_whitespace().map(str::to_owned).collect(),
            _ => vec![piece.to_owned()],
        });
        Self {
            words: words.collect(),
            ..Self::default()
        }
    }

    /// Prefetch patterns on standard input; without, it is `/dev/null`.
    pub(crate) const fn patterns(mut self, patterns: &'static str) -> Self {
        self.stdin = Some(patterns);
        self
    }

    /// Writes a file into a FIFO while the command runs.
    pub(crate) const fn feed(mut self, file: &'static str, fifo: &'static str) -> Self {
        self.feed = Some((file, fifo));
        self
    }

    /// Reads a FIFO until the command ends.
    pub(crate) const fn drain(mut self, fifo: &'static str) -> Self {
        self.drain = Some(fifo);
        self
    }
}

impl Place {
    pub(crate) fn new() -> Self {
        let place = Self(tempfile::tempdir().unwrap());
        let tree = place.path("rootfs");
        fs::create_dir_all(tree.join("usr/bin")).unwrap();
        fs::write(tree.join("hello"), "hello\n").unwrap();
        fs::write(tree.join("usr/bin/tool"), "0123456789".repeat(300_000)).unwrap();
        fs::hard_link(tree.join("hello"), tree.join("usr/same")).unwrap();
        std::os::unix::fs::symlink("bin/tool", tree.join("usr/link")).unwrap();
        place.archive("rootfs", "layer");
        fs::create_dir(place.path("blobs")).unwrap();
        place
    }

    /// Packs a directory as `NAME.tar` and `NAME.tar.gz`.
    pub(crate) fn archive(&self, directory: &str, name: &str) {
        // The `tar` crate would store the content of every hard link.
        let tar = Command::new("tar")
            .arg("--directory")
            .arg(self.path(directory))
            .args(["--sort=name", "--create", "--file=-", "."])
            .output()
            .unwrap();
        assert!(tar.status.success(), "{tar:?}");
        let gzip = File::create(self.path(&format!("{name}.tar.gz"))).unwrap();
        let mut gzip = GzEncoder::new(gzip, Compression::default());
        gzip.write_all(&tar.stdout).unwrap();
        gzip.finish().unwrap();
        fs::write(self.path(&format!("{name}.tar")), tar.stdout).unwrap();
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    pub(crate) fn read(&self, name: &str) -> Vec<u8> {
        fs::read(self.path(name)).unwrap_or_else(|error| panic!("{name}: {error}"))
    }

    pub(crate) fn json(&self, name: &str) -> serde_json::Value {
        serde_json::from_slice(&self.read(name)).unwrap()
    }

    /// Names in a directory, sorted.
    pub(crate) fn names(&self, dir: &str) -> Vec<String> {
        let entries = fs::read_dir(self.path(dir)).unwrap();
        let mut names: Vec<_> = entries
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }

    pub(crate) fn fifo(&self, name: &str) {
        nix::unistd::mkfifo(&self.path(name), Mode::S_IRUSR | Mode::S_IWUSR).unwrap();
    }

    /// Runs the words of `line` without input.
    pub(crate) fn run(&self, line: &str) -> Run {
        self.call(&Call::new(line))
    }

    /// Runs `line`, which must succeed and say nothing on standard output.
    pub(crate) fn quiet(&self, line: &str) {
        let run = self.run(line).ok(line);
        assert_eq!(run.stdout, "", "{line}");
    }

    pub(crate) fn spawn(&self, words: &[String]) -> Child {
        Command::new(env!("CARGO_BIN_EXE_nydus-image"))
            .current_dir(self.0.path())
            .args(words)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap()
    }

    /// Runs a call with everything that belongs to it.
    pub(crate) fn call(&self, call: &Call) -> Run {
        for fifo in [call.feed.map(|(_, fifo)| fifo), call.drain]
            .into_iter()
            .flatten()
        {
            // A new one for each run: a process that another test is just starting can
            // hold the old one's reading end open for a moment, and be fed.
            let _ = fs::remove_file(self.path(fifo));
            self.fifo(fifo);
        }
        // As the converter does: opened before the program starts, and never waited for.
        let drain = call.drain.map(|fifo| {
            let mut options = File::options();
            let options = options.read(true).custom_flags(O_NONBLOCK);
            options.open(self.path(fifo)).unwrap()
        });
        let mut child = self.spawn(&call.words);
        let mut stdin = child.stdin.take().unwrap();
        // A command that fails may never read it.
        let _ = stdin.write_all(call.stdin.unwrap_or_default().as_bytes());
        drop(stdin);
        let feeder = call.feed.map(|(file, fifo)| {
            let (file, fifo) = (self.read(file), self.path(fifo));
            thread::spawn(move || feed(&fifo, &file))
        });
        let blob = drain.map_or_else(Vec::new, |fifo| read_to_exit(fifo, &mut child));
        let output = child.wait_with_output().unwrap();
        if let (Some((_, fifo)), Some(feeder)) = (call.feed, feeder) {
            // Lets a feeder go that nobody opened the other end for, whenever it comes.
            while !feeder.is_finished() {
                let mut options = File::options();
                let end = options.read(true).custom_flags(O_NONBLOCK);
                let end = end.open(self.path(fifo)).unwrap();
                thread::sleep(Duration::from_millis(1));
                drop(end);
            }
            feeder.join().unwrap();
        }
        Run {
            code: output.status.code().unwrap_or(-1),
            stdout: String::from_utf8(output.stdout).unwrap(),
            stderr: String::from_utf8(output.stderr).unwrap(),
            blob,
        }
    }
}

/// A command that fails leaves the rest unread; what it says is what counts.
fn feed(fifo: &std::path::Path, bytes: &[u8]) {
    match File::options()
        .write(true)
        .open(fifo)
        .unwrap()
        .write_all(bytes)
    {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => panic!("{error}"),
        _ => {}
    }
}

/// Everything from a FIFO, whose end is the end of the program: until its writer
/// comes, a FIFO without one looks as if it had ended.
fn read_to_exit(mut fifo: File, child: &mut Child) -> Vec<u8> {
    let mut bytes = Vec::new();
    loop {
        let exited = child.try_wait().unwrap().is_some();
        match fifo.read_to_end(&mut bytes) {
            Err(error) if error.kind() != io::ErrorKind::WouldBlock => panic!("{error}"),
            _ if exited => return bytes,
            _ => thread::sleep(Duration::from_millis(1)),
        }
    }
}

impl Run {
    /// The run, which succeeded and logged nothing at the level `warn`.
    pub(crate) fn ok(self, what: &str) -> Self {
        assert_eq!(self.code, 0, "{what}\n{}", self.stderr);
        self
    }

    /// Asserts a failure that names what is not there: on standard error, with nothing
    /// on standard output.
    pub(crate) fn refused(&self, code: i32, words: &[&str], what: &str) {
        assert_eq!(self.code, code, "{what}\n{}", self.stderr);
        assert_eq!(self.stdout, "", "{what}");
        let start = if code == 2 { "error: " } else { "Error: " };
        assert!(self.stderr.starts_with(start), "{what}\n{}", self.stderr);
        for word in words {
            assert!(
                self.stderr.contains(word),
                "{what}: {word}\n{}",
                self.stderr
            );
        }
    }
}

/// SHA-256 in hexadecimal digits.
pub(crate) fn sha256(bytes: &[u8]) -> String {
    Sha256::digest(bytes)
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect()
}
