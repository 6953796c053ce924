//! Cuts the power at random moments and looks at what the disk would hold.
//!
//! The cache lies on an ext4 of its own, whose image is a file. Readers fill the cache,
//! close and reopen it, and now and then parts of it are written back, in whatever order
//! serves us worst. At a random moment the image is copied as it is, mounted again, and
//! opened in another boot. What is believed then must be right, and what is not must
//! become so.
//!
//! A copy counts only if the image did not change while it was made, because a disk
//! does not mix moments; readers pause for it between two operations. To see that the test has teeth, each copy is also opened as if
//! the machine had not stopped: some of these must show wrong bytes.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use storage::backend::Priority;
use storage::cache::CacheDir;

use crate::sample::{Found, Random, Sample, open_cache};

const CHUNKS: u32 = 96;
const CHUNK_SIZE: u32 = 60_000;
const IMAGE_SIZE: u64 = 24 << 20;

/// Times that a copy is tried until the image stands still.
const TRIES: usize = 200;

/// What the thread that uses the cache is told.
#[derive(Default)]
struct User {
    pause: AtomicBool,
    stop: AtomicBool,
}

pub(crate) fn run() {
    let cuts: u64 = std::env::var("CACHE_CUTS").map_or(10, |text| text.parse().unwrap());
    let top = tempfile::tempdir().unwrap();
    let sample = Sample::write(top.path(), CHUNKS, CHUNK_SIZE);
    let image = top.path().join("disk");
    File::create(&image).unwrap().set_len(IMAGE_SIZE).unwrap();
    command(
        "mkfs.ext4",
        &["-q", "-F", "-E", "lazy_itable_init=0"],
        &[&image],
    );
    let disk = Mount::new(&image, &top.path().join("mnt"));
    let seed = std::env::var("CACHE_SEED").map_or(1, |text| text.parse().unwrap());
    println!("cuts: {cuts}, CACHE_SEED={seed}");
    let user = User::default();
    let (sum, unnoticed) = thread::scope(|scope| {
        let thread = scope.spawn(|| use_cache(&sample, &disk.at, &user, seed));
        let result =
            std::panic::catch_unwind(|| cut_often(&sample, &image, top.path(), &user, cuts, seed));
        user.stop.store(true, Ordering::Relaxed);
        thread.join().unwrap();
        result.unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    });
    println!(
        "{cuts} cuts: {sum:?}; if reboots went unnoticed: {} wrong chunks",
        unnoticed.wrong
    );
    assert_eq!(sum.wrong, 0);
    if cuts >= 100 {
        assert!(unnoticed.wrong > 0, "these cuts would not harm anybody");
        assert!(sum.believed > 0 && sum.rechecked > 0 && sum.lost > 0);
    }
}

/// Sums of what was found, by a process that knows of the reboot and by one that does not.
fn cut_often(
    sample: &Sample,
    image: &Path,
    top: &Path,
    user: &User,
    cuts: u64,
    seed: u64,
) -> (Found, Found) {
    let mut random = Random(seed);
    let (mut sum, mut unnoticed) = (Found::default(), Found::default());
    for _ in 0..cuts {
        thread::sleep(Duration::from_millis(random.below(60)));
        let copy = top.join("copy");
        user.pause.store(true, Ordering::Relaxed);
        copy_at_rest(image, &copy);
        user.pause.store(false, Ordering::Relaxed);
        let second = top.join("second");
        fs::copy(&copy, &second).unwrap();
        let found = inspect(sample, &copy, top, 2);
        assert_eq!(found.wrong, 0, "seed {seed}: {found:?}");
        add(&mut sum, &found);
        add(&mut unnoticed, &inspect(sample, &second, top, 1));
    }
    (sum, unnoticed)
}

fn add(sum: &mut Found, found: &Found) {
    sum.believed += found.believed;
    sum.wrong += found.wrong;
    sum.rechecked += found.rechecked;
    sum.lost += found.lost;
}

fn inspect(sample: &Sample, image: &Path, top: &Path, boot: u8) -> Found {
    let mount = Mount::new(image, &top.join("copy.mnt"));
    sample.inspect(&mount.at.join("cache"), boot)
}

/// What the disk holds at one moment.
fn copy_at_rest(image: &Path, copy: &Path) {
    for _ in 0..TRIES {
        let first = fs::read(image).unwrap();
        if fs::read(image).unwrap() == first {
            fs::write(copy, first).unwrap();
            return;
        }
    }
    panic!("the disk is never at rest");
}

/// Fills, syncs, closes, reopens and deletes until told to stop.
fn use_cache(sample: &Sample, disk: &Path, user: &User, seed: u64) {
    let dir = disk.join("cache");
    let mut random = Random(seed ^ 0xcac4e);
    let mut cache = open_cache(&dir, 1);
    let mut blob = sample.open(&cache);
    while !user.stop.load(Ordering::Relaxed) {
        if user.pause.load(Ordering::Relaxed) {
            thread::sleep(Duration::from_millis(1));
            continue;
        }
        match random.below(40) {
            // Closed as it should be: the next boot may believe it.
            0 => {
                drop(blob);
                blob = sample.open(&cache);
            }
            1 => {
                drop(blob);
                cache.remove(&sample.info().id).unwrap();
                cache = open_cache(&dir, 1);
                blob = sample.open(&cache);
            }
            // Bits without their data, as far as the file system lets them.
            2..6 => sync(&cache.map_path(&sample.info().id)),
            6 => sync(&cache.data_path(&sample.info().id)),
            7 => write_back_some(&cache, sample, &mut random),
            // Not by a command: its fork would hold files of the copies open.
            8 => sync_all_of(disk),
            _ => {
                let number = usize::try_from(random.below(CHUNKS.into())).unwrap();
                let plain = sample.chunk(number).plain.clone();
                blob.ensure(plain, Priority::Prefetch).unwrap();
            }
        }
        thread::sleep(Duration::from_micros(random.below(4000)));
    }
}

fn sync_all_of(disk: &Path) {
    use std::os::fd::AsRawFd as _;
    let dir = File::open(disk).unwrap();
    // SAFETY: the descriptor is open; no memory is passed.
    let result = unsafe { libc::syncfs(dir.as_raw_fd()) };
    assert_eq!(result, 0, "{}", std::io::Error::last_os_error());
}

fn sync(path: &Path) {
    File::open(path).unwrap().sync_all().unwrap();
}

/// Writes a part of the data file to the disk and nothing else.
fn write_back_some(cache: &CacheDir, sample: &Sample, random: &mut Random) {
    use std::os::fd::AsRawFd as _;
    let file = File::open(cache.data_path(&sample.info().id)).unwrap();
    let at = random.below(sample.info().uncompressed_size);
    let flags = libc::SYNC_FILE_RANGE_WRITE | libc::SYNC_FILE_RANGE_WAIT_AFTER;
    let (at, len) = (i64::try_from(at).unwrap(), 1 << 20);
    // SAFETY: the descriptor is open; no memory is passed.
    let result = unsafe { libc::sync_file_range(file.as_raw_fd(), at, len, flags) };
    assert_eq!(result, 0, "{}", std::io::Error::last_os_error());
}

/// An image that is mounted until dropped.
struct Mount {
    at: PathBuf,
}

impl Mount {
    fn new(image: &Path, at: &Path) -> Self {
        fs::create_dir_all(at).unwrap();
        command("mount", &["-o", "loop"], &[image, at]);
        Self { at: at.to_owned() }
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        for _ in 0..20 {
            let done = Command::new("umount").arg("-q").arg(&self.at).status();
            if done.is_ok_and(|status| status.success()) {
                return;
            }
            thread::sleep(Duration::from_millis(50));
        }
        let _ = Command::new("umount").arg("-l").arg(&self.at).status();
    }
}

fn command(name: &str, options: &[&str], paths: &[&Path]) {
    let status = Command::new(name)
        .args(options)
        .args(paths)
        .status()
        .unwrap();
    assert!(status.success(), "{name}: {status}");
}
