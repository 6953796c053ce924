//! A stand-in for the supervisor of a daemon: keeps what the daemon sends, a text and one
//! descriptor, and sends it on as often as it is asked.
//!
//! It listens while a transfer is expected, and only then, as `nydus-snapshotter` of
//! Nydus v2 does.

use std::fs;
use std::io::{IoSlice, IoSliceMut, Read as _, Write as _};
use std::os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd, RawFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use nix::sys::socket::{ControlMessage, ControlMessageOwned, MsgFlags, recvmsg, sendmsg};

/// How much is taken and sent at a time.
const PART: usize = 256 << 10;

/// What the supervisor has.
#[derive(Debug)]
pub struct State {
    /// The text.
    pub text: Vec<u8>,
    /// What came with it.
    pub file: Option<OwnedFd>,
}

/// The stand-in.
#[derive(Debug)]
pub struct Supervisor {
    path: PathBuf,
    /// What it has, if it has anything.
    pub state: Option<State>,
}

impl Supervisor {
    /// Will listen on `path`.
    #[must_use]
    pub fn new(path: &Path) -> Self {
        Self {
            path: path.to_owned(),
            state: None,
        }
    }

    /// Where it listens.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Takes what a daemon sends while `ask` asks it to. Nothing changes if it sends
    /// nothing.
    ///
    /// # Errors
    /// The socket cannot be made, or what comes breaks off.
    pub fn take<T>(&mut self, ask: impl FnOnce() -> T) -> Result<T> {
        let (answer, came) = self.listen(ask, |stream| receive(&stream))?;
        if let Some(state) = came {
            self.state = Some(state);
        }
        Ok(answer)
    }

    /// Offers what it has while `ask` asks a daemon to fetch it.
    ///
    /// # Errors
    /// It has nothing, or the socket cannot be made.
    pub fn offer<T>(&self, ask: impl FnOnce() -> T) -> Result<T> {
        let state = self.state.as_ref().context("there is no state")?;
        let (answer, _) = self.listen(ask, |stream| send(stream, state))?;
        Ok(answer)
    }

    /// Serves at most one connection while `ask` runs.
    fn listen<T, S: Send>(
        &self,
        ask: impl FnOnce() -> T,
        serve: impl FnOnce(UnixStream) -> Result<S> + Send,
    ) -> Result<(T, Option<S>)> {
        let listener = UnixListener::bind(&self.path)
            .with_context(|| format!("cannot listen on {}", self.path.display()))?;
        listener.set_nonblocking(true)?;
        let asked = AtomicBool::new(false);
        let done = thread::scope(|scope| {
            let served = scope.spawn(|| {
                // A daemon can be done before it is noticed: one more look after that.
                let mut last = false;
                while !last {
                    last = asked.load(Ordering::Acquire);
                    if let Ok((stream, _)) = listener.accept() {
                        stream.set_nonblocking(false)?;
                        stream.set_read_timeout(Some(Duration::from_secs(30)))?;
                        return serve(stream).map(Some);
                    }
                    thread::sleep(Duration::from_millis(2));
                }
                Ok(None)
            });
            let answer = ask();
            asked.store(true, Ordering::Release);
            (answer, served.join())
        });
        fs::remove_file(&self.path)?;
        match done {
            (answer, Ok(served)) => Ok((answer, served?)),
            (_, Err(_)) => bail!("the supervisor panicked"),
        }
    }
}

fn receive(mut stream: &UnixStream) -> Result<State> {
    let mut text = vec![0; PART];
    let mut space = nix::cmsg_space!([RawFd; 8]);
    let mut files = Vec::new();
    let mut parts = [IoSliceMut::new(&mut text)];
    let flags = MsgFlags::MSG_CMSG_CLOEXEC;
    let received = recvmsg::<()>(stream.as_raw_fd(), &mut parts, Some(&mut space), flags)?;
    for control in received.cmsgs()? {
        if let ControlMessageOwned::ScmRights(numbers) = control {
            for number in numbers {
                // SAFETY: the kernel has just opened it for us.
                files.push(unsafe { OwnedFd::from_raw_fd(number) });
            }
        }
    }
    let len = received.bytes;
    text.truncate(len);
    stream.read_to_end(&mut text)?;
    if files.len() != 1 {
        bail!("{} descriptors came with {} bytes", files.len(), text.len());
    }
    Ok(State {
        text,
        file: files.pop(),
    })
}

fn send(mut stream: UnixStream, state: &State) -> Result<()> {
    let numbers: Vec<RawFd> = state.file.iter().map(|file| file.as_raw_fd()).collect();
    let rights = [ControlMessage::ScmRights(&numbers)];
    let control = if numbers.is_empty() {
        &[][..]
    } else {
        &rights[..]
    };
    let parts = [IoSlice::new(&state.text)];
    let sent = match state.text.is_empty() {
        true => 0,
        false => {
            let flags = MsgFlags::MSG_NOSIGNAL;
            sendmsg::<()>(stream.as_raw_fd(), &parts, control, flags, None)?
        }
    };
    // A daemon that has seen enough may have hung up.
    let _ = stream.write_all(state.text.get(sent..).unwrap_or_default());
    Ok(())
}
