//! The threads on a real mount, over a file system whose reads can be stalled.
//! Needs root and `/dev/fuse`.

use std::ffi::CStr;
use std::path::Path;
use std::sync::mpsc::channel;
use std::time::Instant;

use fuse_backend_rs::abi::fuse_abi::stat64;
use fuse_backend_rs::api::filesystem::{
    Context, DirEntry, Entry, FsOptions, OpenOptions, ZeroCopyWriter,
};
use zerocopy::FromZeros as _;

use super::*;

#[test]
fn only_reads_are_recognised() {
    let mut request = ReadRequest::new_zeroed();
    request.opcode = Opcode::Read as u32;
    (request.nodeid, request.offset, request.size) = (7, 4096, 10);
    let found = as_read(request.as_bytes()).unwrap();
    assert_eq!((found.nodeid, found.offset, found.size), (7, 4096, 10));
    assert!(
        as_read(&request.as_bytes()[..40]).is_none(),
        "arguments are missing"
    );
    request.opcode = Opcode::Lookup as u32;
    assert!(as_read(request.as_bytes()).is_none());
}

/// Length of every file, and so of every read.
const LEN: u32 = 4096;
/// Node 1 is the root, 2 to `FILES` + 1 are files.
const FILES: u64 = 700;
/// A node whose data cannot be had.
const BROKEN: u64 = 9;

/// `FILES` files named by their node number; reads wait while `gate` is shut.
#[derive(Default)]
struct Stalled {
    open: Mutex<bool>,
    opened: Condvar,
    waiting: AtomicUsize,
}

impl Stalled {
    fn let_go(&self) {
        *self.open.lock().unwrap() = true;
        self.opened.notify_all();
    }
}

impl Residency for Stalled {
    fn is_resident(&self, _node: u64, _offset: u64, _size: u32) -> bool {
        *self.open.lock().unwrap()
    }

    fn make_resident(&self, read: &Wanted) -> io::Result<()> {
        let node = read.node;
        self.waiting.fetch_add(1, Ordering::SeqCst);
        let mut open = self.open.lock().unwrap();
        while !*open {
            open = self.opened.wait(open).unwrap();
        }
        if node == BROKEN {
            Err(io::Error::from_raw_os_error(libc::EIO))
        } else {
            Ok(())
        }
    }
}

fn attr(node: u64) -> stat64 {
    let mut stat = Entry::default().attr;
    stat.st_ino = node;
    stat.st_nlink = 2;
    stat.st_mode = if node == 1 {
        libc::S_IFDIR | 0o755
    } else {
        libc::S_IFREG | 0o444
    };
    stat.st_size = LEN.into();
    stat
}

impl FileSystem for Stalled {
    type Inode = u64;
    type Handle = u64;

    fn init(&self, _capable: FsOptions) -> io::Result<FsOptions> {
        Ok(FsOptions::ASYNC_READ | FsOptions::MAX_PAGES | FsOptions::ZERO_MESSAGE_OPEN)
    }

    fn lookup(&self, _ctx: &Context, _parent: u64, name: &CStr) -> io::Result<Entry> {
        let node = name.to_str().unwrap().parse().unwrap();
        Ok(Entry {
            inode: node,
            attr: attr(node),
            ..Entry::default()
        })
    }

    fn getattr(&self, _: &Context, node: u64, _: Option<u64>) -> io::Result<(stat64, Duration)> {
        Ok((attr(node), Duration::ZERO))
    }

    fn open(
        &self,
        _: &Context,
        _: u64,
        _: u32,
        _: u32,
    ) -> io::Result<(Option<u64>, OpenOptions, Option<u32>)> {
        Err(io::Error::from_raw_os_error(libc::ENOSYS))
    }

    fn readdir(
        &self,
        _: &Context,
        _: u64,
        _: u64,
        _: u32,
        offset: u64,
        add: &mut dyn FnMut(DirEntry<'_>) -> io::Result<usize>,
    ) -> io::Result<()> {
        for node in offset.max(1) + 1..=FILES + 1 {
            let name = node.to_string();
            let entry = DirEntry {
                ino: node,
                offset: node,
                type_: u32::from(libc::DT_REG),
                name: name.as_bytes(),
            };
            if add(entry)? == 0 {
                break;
            }
        }
        Ok(())
    }

    fn read(
        &self,
        _: &Context,
        node: u64,
        _: u64,
        out: &mut dyn ZeroCopyWriter,
        size: u32,
        offset: u64,
        _: Option<u64>,
        _: u32,
    ) -> io::Result<usize> {
        let left = u64::from(LEN).saturating_sub(offset).min(size.into());
        let data = vec![u8::try_from(node % 251).unwrap(); usize::try_from(left).unwrap()];
        out.write_all(&data)?;
        Ok(data.len())
    }
}

/// Releases and detaches whatever happens, so that a failed test ends.
struct Mounted {
    files: Arc<Stalled>,
    workers: Option<Workers>,
    dir: tempfile::TempDir,
}

impl Mounted {
    fn new(threads: u16) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let device = Session::open_device().expect("needs /dev/fuse");
        let session = Arc::new(Session::mount(dir.path(), device).expect("needs root"));
        let files = Arc::new(Stalled::default());
        let workers = Some(Workers::start(&session, &files, threads).unwrap());
        Self {
            files,
            workers,
            dir,
        }
    }

    fn path(&self) -> &Path {
        self.dir.path()
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        self.files.let_go();
        let _ = nix::mount::umount2(self.dir.path(), nix::mount::MntFlags::MNT_DETACH);
        if let Some(workers) = self.workers.take()
            && !std::thread::panicking()
        {
            workers.join();
        }
    }
}

/// Runs `work` on a thread of its own and panics when it takes too long.
fn within<T: Send + 'static>(
    limit: Duration,
    what: &str,
    work: impl FnOnce() -> T + Send + 'static,
) -> T {
    let (sender, receiver) = channel();
    std::thread::spawn(move || sender.send(work()));
    receiver
        .recv_timeout(limit)
        .unwrap_or_else(|_| panic!("{what} took more than {limit:?}"))
}

/// Readers that wait for the network leave metadata alone, however many they
/// are: with 64, and with more than there may be threads.
#[test]
fn stalled_readers_do_not_block_metadata() {
    for readers in [64, FILES] {
        let mounted = Mounted::new(2);
        let handles: Vec<_> = (2..readers + 2)
            .map(|node| {
                let path = mounted.path().join(node.to_string());
                std::thread::spawn(move || std::fs::read(path))
            })
            .collect();
        let expected = usize::try_from(readers).unwrap().min(MAX_FETCHERS);
        let start = Instant::now();
        while mounted.files.waiting.load(Ordering::SeqCst) < expected {
            assert!(
                start.elapsed() < Duration::from_secs(20),
                "readers do not start"
            );
            std::thread::sleep(Duration::from_millis(5));
        }
        let path = mounted.path().to_owned();
        let listed = within(Duration::from_secs(5), "listing and stat", move || {
            let listed = std::fs::read_dir(&path).unwrap().count();
            for node in 2..66 {
                std::fs::metadata(path.join(node.to_string())).unwrap();
            }
            listed
        });
        assert_eq!(listed, usize::try_from(FILES).unwrap());
        mounted.files.let_go();
        for (handle, node) in handles.into_iter().zip(2u64..) {
            let data = handle.join().unwrap().unwrap();
            assert_eq!(
                data,
                vec![u8::try_from(node % 251).unwrap(); 4096],
                "file {node}"
            );
        }
    }
}

/// An unmount from outside ends the threads.
#[test]
fn threads_end_with_the_mount() {
    let mut mounted = Mounted::new(3);
    std::fs::metadata(mounted.path()).unwrap();
    let status = std::process::Command::new("umount")
        .arg(mounted.path())
        .status()
        .unwrap();
    assert!(status.success());
    let workers = mounted.workers.take().unwrap();
    within(Duration::from_secs(5), "the end of the threads", || {
        workers.join()
    });
}

/// A `dd` that waits for the data of file 2, past the page cache.
fn waiting_dd(mounted: &Mounted) -> std::process::Child {
    let before = mounted.files.waiting.load(Ordering::SeqCst);
    let dd = std::process::Command::new("dd")
        .arg(format!("if={}", mounted.path().join("2").display()))
        .args(["bs=4096", "count=1", "iflag=direct", "status=none"])
        .stdout(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    let start = Instant::now();
    while mounted.files.waiting.load(Ordering::SeqCst) == before {
        assert!(
            start.elapsed() < Duration::from_secs(20),
            "dd does not read"
        );
        std::thread::sleep(Duration::from_millis(5));
    }
    dd
}

fn signal(child: &std::process::Child, signal: nix::sys::signal::Signal) {
    let pid = nix::unistd::Pid::from_raw(child.id().try_into().unwrap());
    nix::sys::signal::kill(pid, signal).unwrap();
}

/// Whoever is killed while data is on the way is gone at once, also when another
/// signal came first.
#[test]
fn killed_readers_need_not_wait() {
    use nix::sys::signal::Signal::{SIGCONT, SIGKILL, SIGSTOP, SIGTERM};
    for signals in [&[SIGKILL][..], &[SIGTERM], &[SIGSTOP, SIGCONT, SIGKILL]] {
        let mounted = Mounted::new(2);
        let mut dd = waiting_dd(&mounted);
        for one in signals {
            signal(&dd, *one);
            std::thread::sleep(Duration::from_millis(50));
        }
        within(Duration::from_secs(5), "the end of a reader", move || {
            assert!(!dd.wait().unwrap().success());
        });
        // What was answered is not answered again, and the mount lives.
        mounted.files.let_go();
        assert_eq!(std::fs::read(mounted.path().join("3")).unwrap().len(), 4096);
    }
}

/// A signal that does not kill takes nothing from a reader.
#[test]
fn readers_that_live_get_their_data() {
    use nix::sys::signal::Signal::{SIGCONT, SIGSTOP};
    let mounted = Mounted::new(2);
    let dd = waiting_dd(&mounted);
    signal(&dd, SIGSTOP);
    std::thread::sleep(PERIOD * 3);
    signal(&dd, SIGCONT);
    std::thread::sleep(PERIOD);
    mounted.files.let_go();
    let output = dd.wait_with_output().unwrap();
    assert!(output.status.success());
    assert_eq!(output.stdout, vec![2; 4096]);
}
