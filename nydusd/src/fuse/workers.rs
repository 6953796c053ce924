//! The threads that answer FUSE requests.
//!
//! Two kinds, so that metadata never waits behind the network:
//!
//! * **front** threads, a fixed number, read requests from the device and answer
//!   what can be answered from this machine: metadata, and data that is in the
//!   cache already;
//! * **fetch** threads wait for data that is not. A front thread hands such a
//!   read over and turns to the next request. They are started when all are
//!   busy, up to [`MAX_FETCHERS`], and end when there was nothing to do for a
//!   while. More reads than that wait in a queue, which the kernel bounds: each
//!   entry is a request of a process that waits, or read-ahead of one.
//!
//! A handed-over request is its raw bytes. A fetch thread first makes its data
//! resident, holding nothing but its stack, and only then borrows one of a few
//! reply buffers to answer like a front thread does. So memory does not grow with
//! the number of reads that wait. Readers that are killed meanwhile: `interrupts.rs`.

use std::collections::VecDeque;
use std::io::{self, Read as _, Write as _};
use std::os::fd::AsRawFd as _;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::Context as _;
use fuse_backend_rs::abi::fuse_abi::Opcode;
use fuse_backend_rs::api::filesystem::FileSystem;
use fuse_backend_rs::api::server::Server;
use fuse_backend_rs::transport::{FuseBuf, FuseDevWriter, Reader, Writer};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use super::interrupts::{Interrupted, PERIOD, Waiting};
use super::session::{BUFFER_SIZE, Session};

/// Most threads that wait for the network at once.
const MAX_FETCHERS: usize = 512;
/// Replies that fetch threads copy at once; copying is quick, waiting is not.
const REPLY_BUFFERS: usize = 4;
/// How long a fetch thread waits for work before it ends.
const FETCHER_PATIENCE: Duration = Duration::from_secs(10);
/// Stack of a thread, in bytes. Requests are handled without deep recursion.
const STACK_SIZE: usize = 512 << 10;

/// Tells which reads can be answered without waiting for the network.
pub(crate) trait Residency {
    /// Whether the bytes at `offset` of node `node` can be read at once.
    /// An error is as good as an answer: it will be found again and reported.
    fn is_resident(&self, node: u64, offset: u64, size: u32) -> bool;

    /// Waits until they can.
    ///
    /// # Errors
    /// The answer to the read, if they cannot be had. It has been logged.
    fn make_resident(&self, read: &Wanted) -> io::Result<()>;
}

/// A read whose data has to be waited for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Wanted {
    /// The kernel's number of the request.
    pub unique: u64,
    /// Process that reads, in our process namespace; 0 for the kernel's own read-ahead.
    pub pid: u32,
    /// Node number of the file.
    pub node: u64,
    /// Position in the file, in bytes.
    pub offset: u64,
    /// Length, in bytes.
    pub size: u32,
}

/// What the threads share.
struct Shared<F: FileSystem + Send + Sync> {
    session: Arc<Session>,
    server: Server<Arc<F>>,
    files: Arc<F>,
    fetches: Mutex<Fetches>,
    work: Condvar,
    /// Reads that were handed over and not answered.
    waiting: Waiting,
    /// Buffers for the replies of fetch threads.
    replies: [Mutex<Vec<u8>>; REPLY_BUFFERS],
    /// Whose turn it is.
    next_reply: AtomicUsize,
}

/// Reads that wait for a fetch thread, and the threads there are.
#[derive(Default)]
struct Fetches {
    queue: VecDeque<Vec<u8>>,
    threads: usize,
    idle: usize,
    closed: bool,
}

/// The running threads of one session.
#[derive(Debug)]
pub(crate) struct Workers {
    front: Vec<JoinHandle<()>>,
}

impl Workers {
    /// Starts `count` front threads that serve `session` from `files`.
    ///
    /// # Errors
    /// When a thread cannot be started; those that were end with the session.
    pub(crate) fn start<F>(
        session: &Arc<Session>,
        files: &Arc<F>,
        count: u16,
    ) -> anyhow::Result<Self>
    where
        F: FileSystem + Residency + Send + Sync + 'static,
    {
        let shared = Arc::new(Shared {
            session: Arc::clone(session),
            server: Server::new(Arc::clone(files)),
            files: Arc::clone(files),
            fetches: Mutex::default(),
            work: Condvar::new(),
            waiting: Waiting::default(),
            replies: Default::default(),
            next_reply: AtomicUsize::new(0),
        });
        let front = (0..count)
            .map(|index| {
                let shared = Arc::clone(&shared);
                spawn(format!("fuse-{index}"), move || shared.serve())
            })
            .collect::<anyhow::Result<_>>()?;
        Ok(Self { front })
    }

    /// Waits until the session has ended, by whatever cause.
    pub(crate) fn join(self) {
        for thread in self.front {
            // A panic was printed by the thread itself.
            let _ = thread.join();
        }
    }
}

fn spawn(name: String, body: impl FnOnce() + Send + 'static) -> anyhow::Result<JoinHandle<()>> {
    std::thread::Builder::new()
        .name(name)
        .stack_size(STACK_SIZE)
        .spawn(body)
        .context("cannot start a thread")
}

impl<F> Shared<F>
where
    F: FileSystem + Residency + Send + Sync + 'static,
{
    /// Body of a front thread: one request after the other until the end.
    fn serve(self: Arc<Self>) {
        let mut request = vec![0; BUFFER_SIZE];
        let mut reply = vec![0; BUFFER_SIZE];
        loop {
            let mut device = self.session.device();
            let read = device.read(&mut request);
            let len = match read {
                Ok(0) => break,
                Ok(len) => len,
                Err(err) => match err.raw_os_error() {
                    // ENOENT: the requester died while its request was on the way.
                    Some(libc::ENOENT | libc::EINTR | libc::EAGAIN) => continue,
                    Some(libc::ENODEV) => break,
                    _ => {
                        tracing::error!("reading requests from /dev/fuse: {err}");
                        break;
                    }
                },
            };
            let Some(message) = request.get_mut(..len) else {
                break;
            };
            if let Some(unique) = number(message).filter(|unique| self.session.refuses(*unique)) {
                self.refuse(unique, libc::EIO);
            } else if let Some(read) = self.would_wait(message) {
                self.waiting.insert(read.unique, read.pid);
                self.hand_over(message.to_vec());
            } else if let Some(interrupt) = as_interrupt(message) {
                self.interrupt(&interrupt);
            } else {
                self.answer(message, &mut reply);
                self.session.begin();
            }
        }
        self.session.begin();
        self.lock().closed = true;
        self.work.notify_all();
    }

    /// The read that `message` is, if answering it means waiting for the network.
    fn would_wait(&self, message: &[u8]) -> Option<ReadRequest> {
        as_read(message).filter(|read| !self.files.is_resident(read.nodeid, read.offset, read.size))
    }

    /// Sees to it that a reader which is killed need not wait for its data.
    fn interrupt(self: &Arc<Self>, interrupt: &InterruptRequest) {
        match self.waiting.interrupt(interrupt.target) {
            Interrupted::Watched => {}
            Interrupted::Watch => {
                let shared = Arc::clone(self);
                if let Err(err) = spawn("fuse-watch".to_owned(), move || shared.watch()) {
                    self.waiting.unwatched();
                    tracing::warn!("{err:#}; readers that are killed wait for their data");
                }
            }
            // Another thread may be about to hand the read over. If it has been
            // answered instead, the kernel drops this.
            Interrupted::Unknown => self.refuse(interrupt.unique, libc::EAGAIN),
        }
    }

    /// Body of the thread that lets the dying go; there is one while readers that
    /// got a signal wait.
    fn watch(self: Arc<Self>) {
        while let Some(dying) = self.waiting.dying() {
            for unique in dying {
                self.refuse(unique, libc::EINTR);
            }
            std::thread::sleep(PERIOD);
        }
    }

    /// Answers one request. Failures to reply concern a requester that is gone.
    fn answer(&self, message: &mut [u8], reply: &mut [u8]) {
        let Ok(reader) = Reader::<()>::from_fuse_buffer(FuseBuf::new(message)) else {
            return;
        };
        let fd = self.session.device().as_raw_fd();
        let Ok(writer) = FuseDevWriter::<()>::new(fd, reply) else {
            return;
        };
        if let Err(err) = self
            .server
            .handle_message(reader, Writer::from(writer), None, None)
        {
            tracing::debug!("request not answered: {err}");
        }
    }

    /// Queues a read for the fetch threads, with one more of them if all are busy.
    fn hand_over(self: &Arc<Self>, message: Vec<u8>) {
        let start = {
            let mut fetches = self.lock();
            fetches.queue.push_back(message);
            let start = fetches.idle < fetches.queue.len() && fetches.threads < MAX_FETCHERS;
            fetches.threads += usize::from(start);
            start
        };
        self.work.notify_one();
        if start {
            let shared = Arc::clone(self);
            if let Err(err) = spawn("fuse-fetch".to_owned(), move || shared.fetch()) {
                self.lock().threads -= 1;
                tracing::warn!("{err:#}; reads wait for the threads there are");
            }
        }
    }

    /// Body of a fetch thread: queued reads until there are none for a while.
    fn fetch(self: Arc<Self>) {
        while let Some(mut message) = self.next_fetch() {
            let Some(read) = as_read(&message) else {
                continue;
            };
            if !self.waiting.contains(read.unique) {
                continue;
            }
            let span = tracing::info_span!(
                "read",
                req = read.unique,
                ino = read.nodeid,
                offset = read.offset,
                size = read.size,
                pid = read.pid,
            );
            let wanted = Wanted {
                unique: read.unique,
                pid: read.pid,
                node: read.nodeid,
                offset: read.offset,
                size: read.size,
            };
            let result = span.in_scope(|| self.files.make_resident(&wanted));
            if !self.waiting.take(read.unique) {
                continue;
            }
            match result {
                Ok(()) => {
                    let turn = self.next_reply.fetch_add(1, Ordering::Relaxed) % REPLY_BUFFERS;
                    let Some(buffer) = self.replies.get(turn) else {
                        continue;
                    };
                    let mut reply = buffer.lock().unwrap_or_else(PoisonError::into_inner);
                    reply.resize(BUFFER_SIZE, 0);
                    self.answer(&mut message, &mut reply);
                }
                Err(err) => self.refuse(read.unique, err.raw_os_error().unwrap_or(libc::EIO)),
            }
        }
        if self.lock().threads == 0 {
            self.give_memory_back();
        }
    }

    /// After the last of a burst of fetches: an idle mount should cost little.
    fn give_memory_back(&self) {
        for buffer in &self.replies {
            *buffer.lock().unwrap_or_else(PoisonError::into_inner) = Vec::new();
        }
        // Threads that ended leave behind what their allocations had grown to.
        #[cfg(target_env = "gnu")]
        // SAFETY: may be called at any time from any thread.
        unsafe {
            libc::malloc_trim(0);
        }
    }

    /// Answers a request with an error number.
    fn refuse(&self, unique: u64, error: i32) {
        let refusal = ErrorReply {
            len: ErrorReply::LEN,
            error: error.saturating_neg(),
            unique,
        };
        let mut device = self.session.device();
        if let Err(err) = device.write(refusal.as_bytes()) {
            tracing::debug!("request not answered: {err}");
        }
    }

    /// The next queued read; `None` when the thread should end, which is counted.
    fn next_fetch(&self) -> Option<Vec<u8>> {
        let mut fetches = self.lock();
        loop {
            if let Some(message) = fetches.queue.pop_front() {
                return Some(message);
            }
            if fetches.closed {
                fetches.threads -= 1;
                return None;
            }
            fetches.idle += 1;
            let (guard, timeout) = self
                .work
                .wait_timeout(fetches, FETCHER_PATIENCE)
                .unwrap_or_else(PoisonError::into_inner);
            fetches = guard;
            fetches.idle -= 1;
            if timeout.timed_out() && fetches.queue.is_empty() {
                fetches.threads -= 1;
                return None;
            }
        }
    }

    /// The state is plain counters, valid whatever a panicking thread did.
    fn lock(&self) -> MutexGuard<'_, Fetches> {
        self.fetches.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The start of a READ request as the kernel sends it (`struct fuse_in_header`,
/// then `struct fuse_read_in`), in the machine's byte order.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct ReadRequest {
    len: u32,
    opcode: u32,
    unique: u64,
    nodeid: u64,
    uid: u32,
    gid: u32,
    pid: u32,
    padding: u32,
    fh: u64,
    offset: u64,
    size: u32,
    read_flags: u32,
}

/// An INTERRUPT as the kernel sends it (`struct fuse_in_header`, then
/// `struct fuse_interrupt_in`), in the machine's byte order.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct InterruptRequest {
    len: u32,
    opcode: u32,
    unique: u64,
    nodeid: u64,
    uid: u32,
    gid: u32,
    pid: u32,
    padding: u32,
    /// The request whose reader got a signal.
    target: u64,
}

/// An answer that is only an error (`struct fuse_out_header`).
#[derive(Clone, Copy, Debug, IntoBytes, Immutable)]
#[repr(C)]
struct ErrorReply {
    len: u32,
    error: i32,
    unique: u64,
}

impl ErrorReply {
    const LEN: u32 = 16;
}

const _: () = assert!(size_of::<ErrorReply>() == 16, "ErrorReply::LEN");

/// The kernel's number of a request.
fn number(message: &[u8]) -> Option<u64> {
    // Behind length and kind.
    let (number, _) = u64::read_from_prefix(message.get(8..)?).ok()?;
    Some(number)
}

/// `message` as a READ request; `None` for every other request.
fn as_read(message: &[u8]) -> Option<ReadRequest> {
    let (request, _) = ReadRequest::read_from_prefix(message).ok()?;
    (request.opcode == Opcode::Read as u32).then_some(request)
}

/// `message` as an INTERRUPT; `None` for every other request.
fn as_interrupt(message: &[u8]) -> Option<InterruptRequest> {
    let (request, _) = InterruptRequest::read_from_prefix(message).ok()?;
    (request.opcode == Opcode::Interrupt as u32).then_some(request)
}

#[cfg(test)]
mod tests;
