//! Mounts that go away with their owner: `nydusd` on a mount point, the kernel's
//! own EROFS, and a disk that is soon full.

use std::ffi::OsStr;
use std::fs;
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::signal::Signal;

use crate::command::succeed;
use crate::process::Process;

/// A `nydusd` that serves one mount point.
#[derive(Debug)]
pub struct Nydusd {
    process: Process,
    point: PathBuf,
}

impl Nydusd {
    /// Starts `command`, which mounts on `point`, and waits until the mount is
    /// there and the daemon has said that it is ready. Its log is kept in `log`.
    ///
    /// # Errors
    /// The daemon ends first, or a minute passes; with its log.
    pub fn start(command: &mut Command, point: &Path, log: &Path) -> Result<Self> {
        let process = Process::start(command, log)?;
        let mut daemon = Self {
            process,
            point: point.to_owned(),
        };
        daemon.process.wait_until(|process| {
            is_mounted(point) && process.log().to_lowercase().contains("ready")
        })?;
        Ok(daemon)
    }

    /// The mount point.
    #[must_use]
    pub fn point(&self) -> &Path {
        &self.point
    }

    /// Process id of the process that was started.
    #[must_use]
    pub fn process_id(&self) -> u32 {
        self.process.id()
    }

    /// Process id of the worker; [`Nydusd::process`] is its keeper.
    ///
    /// # Errors
    /// No worker has been started.
    pub fn worker(&self) -> Result<u32> {
        self.last_process("worker")
    }

    /// Process id of the last keeper that was started in the place of a dead one.
    ///
    /// # Errors
    /// There was none.
    pub fn next_keeper(&self) -> Result<u32> {
        self.last_process("keeper")
    }

    fn last_process(&self, role: &str) -> Result<u32> {
        let log = self.process.log();
        let text = format!(" {role} is process ");
        let (_, last) = log
            .rsplit_once(&text)
            .with_context(|| format!("no {role} in the log:\n{log}"))?;
        let digits = last.split(|c: char| !c.is_ascii_digit()).next();
        Ok(digits.unwrap_or_default().parse()?)
    }

    /// The daemon itself.
    pub fn process(&mut self) -> &mut Process {
        &mut self.process
    }

    /// Asks the daemon to stop, as a service manager would, and again if the mount
    /// was in use: a child of another test, before it becomes a program, has all of
    /// our files open.
    ///
    /// # Errors
    /// It does not end with exit code 0, or leaves the mount behind.
    pub fn stop(mut self) -> Result<()> {
        let refusals =
            |process: &Process| process.log().matches("goes on being served; used").count();
        for _ in 0..3 {
            let before = refusals(&self.process);
            self.process.signal(Signal::SIGTERM)?;
            self.process
                .wait_for_end(|process| refusals(process) > before)?;
            if self.process.ended()?.is_some() {
                break;
            }
        }
        self.expect_clean_end()
    }

    /// Waits for the end that something outside has caused.
    ///
    /// # Errors
    /// As [`Nydusd::stop`].
    pub fn expect_clean_end(mut self) -> Result<()> {
        let status = self.process.wait()?;
        ensure!(
            status.success(),
            "nydusd ended with {status}; its log:\n{}",
            self.process.log()
        );
        ensure!(
            !is_mounted(&self.point),
            "nydusd ended and left {} mounted",
            self.point.display()
        );
        Ok(())
    }
}

impl Drop for Nydusd {
    fn drop(&mut self) {
        // After a failed test the daemon may be stuck: free its readers first.
        detach(&self.point);
    }
}

/// An EROFS mount made by the kernel alone.
#[derive(Debug)]
pub struct KernelMount {
    point: PathBuf,
    // After `point` is unmounted; a loop device in use cannot be freed.
    _devices: Vec<LoopDevice>,
}

impl KernelMount {
    /// Mounts the EROFS image `bootstrap` on `point`, with the files `blobs` as
    /// its extra devices in blob table order. Loop devices carry the files: older
    /// kernels mount nothing else.
    ///
    /// # Errors
    /// The kernel refuses, or has no EROFS.
    pub fn erofs(bootstrap: &Path, blobs: &[PathBuf], point: &Path) -> Result<Self> {
        let image = LoopDevice::attach(bootstrap)?;
        let mut devices = blobs
            .iter()
            .map(|blob| LoopDevice::attach(blob))
            .collect::<Result<Vec<_>>>()?;
        let mut options = String::from("ro");
        for device in &devices {
            options.push_str(",device=");
            options.push_str(&device.0);
        }
        let mut mount = Command::new("mount");
        mount
            .args(["-t", "erofs", "-o", &options, &image.0])
            .arg(point);
        succeed(&mut mount)?;
        devices.push(image);
        Ok(Self {
            point: point.to_owned(),
            _devices: devices,
        })
    }
}

impl Drop for KernelMount {
    fn drop(&mut self) {
        detach(&self.point);
    }
}

/// An overlay, as a container's root is one.
#[derive(Debug)]
pub struct Overlay {
    point: PathBuf,
}

impl Overlay {
    /// Mounts one over the directory `lower`, with its own parts in `dir`.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn mount(lower: &Path, dir: &Path) -> Result<Self> {
        let [upper, work, point] = ["upper", "work", "merged"].map(|name| dir.join(name));
        for part in [&upper, &work, &point] {
            fs::create_dir_all(part)?;
        }
        let options = format!(
            "lowerdir={},upperdir={},workdir={}",
            lower.display(),
            upper.display(),
            work.display()
        );
        mount(
            Some("overlay"),
            &point,
            Some("overlay"),
            MsFlags::empty(),
            Some(options.as_str()),
        )
        .with_context(|| format!("cannot mount an overlay over {}", lower.display()))?;
        Ok(Self { point })
    }

    /// Where it is mounted.
    #[must_use]
    pub fn point(&self) -> &Path {
        &self.point
    }
}

impl Drop for Overlay {
    fn drop(&mut self) {
        detach(&self.point);
    }
}

/// A file system in memory that is soon full.
#[derive(Debug)]
pub struct Tmpfs {
    point: PathBuf,
}

impl Tmpfs {
    /// Mounts one with room for `bytes` on `point`.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn mount(point: &Path, bytes: u64) -> Result<Self> {
        let options = format!("size={bytes}");
        mount(
            Some("tmpfs"),
            point,
            Some("tmpfs"),
            MsFlags::empty(),
            Some(options.as_str()),
        )
        .with_context(|| format!("cannot mount a tmpfs on {}", point.display()))?;
        Ok(Self {
            point: point.to_owned(),
        })
    }

    /// Makes room for `bytes`.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn resize(&self, bytes: u64) -> Result<()> {
        let options = format!("size={bytes}");
        let nothing: Option<&str> = None;
        mount(
            nothing,
            &self.point,
            nothing,
            MsFlags::MS_REMOUNT,
            Some(options.as_str()),
        )
        .with_context(|| format!("cannot resize {}", self.point.display()))
    }
}

impl Drop for Tmpfs {
    fn drop(&mut self) {
        detach(&self.point);
    }
}

/// A read-only loop device, by path.
#[derive(Debug)]
struct LoopDevice(String);

impl LoopDevice {
    fn attach(file: &Path) -> Result<Self> {
        let mut losetup = Command::new("losetup");
        losetup.args(["--find", "--show", "--read-only"]).arg(file);
        Ok(Self(succeed(&mut losetup)?.stdout.trim().to_owned()))
    }
}

impl Drop for LoopDevice {
    fn drop(&mut self) {
        // Nothing can be reported from a destructor; the machine has more of them.
        let _ = Command::new("losetup").args(["--detach", &self.0]).status();
    }
}

/// Whether something is mounted exactly at `point`.
#[must_use]
pub fn is_mounted(point: &Path) -> bool {
    let table = fs::read("/proc/self/mountinfo").unwrap_or_default();
    table.split(|&byte| byte == b'\n').any(|line| {
        let field = line.split(|&byte| byte == b' ').nth(4).unwrap_or_default();
        Path::new(OsStr::from_bytes(field)) == point
    })
}

/// Unmounts `point` as its owner would, waiting while it is busy.
///
/// # Errors
/// It is still busy after ten seconds.
pub fn unmount(point: &Path) -> Result<()> {
    let began = Instant::now();
    loop {
        match umount2(point, MntFlags::empty()) {
            Ok(()) => return Ok(()),
            Err(nix::Error::EBUSY) if began.elapsed() < Duration::from_secs(10) => {
                thread::sleep(Duration::from_millis(20));
            }
            Err(error) => {
                return Err(error).with_context(|| format!("cannot unmount {}", point.display()));
            }
        }
    }
}

/// Takes down whatever is mounted at `point`, busy or not.
pub(crate) fn detach(point: &Path) {
    if is_mounted(point) {
        // Nothing can be reported from a destructor; the next test uses its own directory.
        let _ = umount2(point, MntFlags::MNT_DETACH);
    }
}
