//! HTTP/1.1 on the socket, by `hyper`: it is in the build already, kept well, and
//! bounds and checks what it parses.
//!
//! A connection that is silent is never closed: clients take the end of one as the end
//! of the daemon. What a client can use up is bounded instead: connections, the size of
//! heads and bodies, and the time a body takes. Answers have no reason phrase.
//!
//! The socket, and connections on which nothing was said yet, are left with the keeper:
//! a successor goes on with them, and clients do not notice ([`Control`]).

use std::convert::Infallible;
use std::io;
use std::os::fd::{AsFd as _, AsRawFd as _};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::Context as _;
use http_body_util::{BodyExt as _, Full, Limited};
use hyper::body::{Bytes, Incoming};
use hyper::ext::ReasonPhrase;
use hyper::header::{CONTENT_TYPE, HeaderValue, SERVER};
use hyper::service::service_fn;
use hyper::{Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use nix::sys::signal::{Signal, kill};
use nix::sys::socket::{MsgFlags, recv};
use nix::unistd::Pid;
use tokio::io::Interest;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::error::ApiError;
use super::socket::{self, SocketFile};
use super::{Answer, Api, request};
use crate::keeper::{Deposit, Holder as Keeper};

/// Longest body of a request, in bytes. A configuration may have 1 MiB, and grows a
/// little as a string in JSON.
const MAX_BODY: usize = 3 << 20;
/// Longest head of a request, in bytes.
const MAX_HEAD: usize = 16 << 10;
/// Connections at once; further ones wait to be accepted.
const MAX_CONNECTIONS: usize = 256;
/// Calls that are carried out at once.
const MAX_CALLS: usize = 16;
/// How long a body may take to arrive.
const BODY_PATIENCE: Duration = Duration::from_secs(10);
/// Pause after the system refused a connection, for want of descriptors for example.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Name of the deposit with the socket.
pub(crate) const SOCKET: &str = "api";
/// What the names of silent connections' deposits begin with.
pub(crate) const SILENT: &str = "client-";
/// Most silent connections that are left with the keeper.
const MAX_SILENT: usize = 64;
/// How long a connection says nothing before it counts as silent.
const SILENCE: Duration = Duration::from_secs(1);

/// A running server. Dropping it removes the socket and ends its thread.
#[derive(Debug)]
pub(crate) struct Server {
    /// `None` if the socket is a successor's.
    file: Option<SocketFile>,
    keeper: Arc<Keeper>,
    // Closing it tells the thread to end.
    stop: Option<tokio::sync::oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Server {
    /// Ends the thread, and leaves the socket and silent connections, which the keeper
    /// has, to a successor. Who connects from now on waits for that one.
    pub(crate) fn pass_on(mut self) {
        // To be found there by the successor.
        if let Some(file) = self.file.take() {
            file.leave();
        }
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            // A panic was printed by the thread itself.
            let _ = thread.join();
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if self.file.is_some() {
            self.keeper.withdraw(SOCKET);
        }
    }
}

/// What a server works with: new, or left by a predecessor.
#[derive(Debug)]
pub(crate) struct Control {
    listener: UnixListener,
    file: SocketFile,
    /// Silent connections, by the names of their deposits.
    silent: Vec<(String, UnixStream)>,
}

impl Control {
    /// Listens on a new socket.
    ///
    /// # Errors
    /// The socket cannot be had.
    pub(crate) fn new(path: &Path, keeper: &Keeper) -> anyhow::Result<Self> {
        let (listener, file) = socket::open(path)?;
        let files = [listener.as_fd(), file.file().as_fd()];
        keeper.deposit(SOCKET, String::new(), &files)?;
        Ok(Self {
            listener,
            file,
            silent: Vec::new(),
        })
    }

    /// Goes on with what a predecessor has left; `None` if it had no socket.
    ///
    /// * `left`: the deposits of this module.
    ///
    /// # Errors
    /// When it cannot be understood.
    pub(crate) fn recover(
        path: &Path,
        left: Vec<(String, Deposit)>,
    ) -> anyhow::Result<Option<Self>> {
        let mut socket = None;
        let mut silent = Vec::new();
        for (name, deposit) in left {
            let mut files = deposit.files.into_iter();
            let mut next = || files.next().context("a descriptor is missing");
            let first = next()?;
            if name == SOCKET {
                let file = SocketFile::adopt(path.to_owned(), next()?);
                socket = Some((UnixListener::from(first), file));
            } else {
                silent.push((name, UnixStream::from(first)));
            }
        }
        Ok(socket.map(|(listener, file)| Self {
            listener,
            file,
            silent,
        }))
    }
}

impl Server {
    /// Starts to serve `api`.
    ///
    /// # Errors
    /// A thread cannot be started.
    pub(crate) fn start(control: Control, api: Api, keeper: Arc<Keeper>) -> anyhow::Result<Self> {
        let Control {
            listener,
            file,
            silent,
        } = control;
        let (stop, stopped) = tokio::sync::oneshot::channel();
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .max_blocking_threads(MAX_CALLS)
            .thread_keep_alive(Duration::from_secs(5))
            .build()
            .context("cannot start the control API")?;
        let clients = Arc::new(Clients {
            api: Arc::new(api),
            keeper: Arc::clone(&keeper),
            silent: Semaphore::new(MAX_SILENT),
            next: AtomicU64::new(0),
        });
        let thread = std::thread::Builder::new()
            .name("api".to_owned())
            .spawn(move || {
                runtime.block_on(async {
                    tokio::select! {
                        _ = stopped => {}
                        () = serve(listener, silent, clients) => {}
                    }
                });
                // A mount under way must not keep the daemon from its end.
                runtime.shutdown_background();
            })
            .context("cannot start a thread")?;
        Ok(Self {
            file: Some(file),
            keeper,
            stop: Some(stop),
            thread: Some(thread),
        })
    }
}

/// What all connections share.
struct Clients {
    api: Arc<Api>,
    keeper: Arc<Keeper>,
    /// Room for silent ones with the keeper.
    silent: Semaphore,
    /// Number of the next silent one.
    next: AtomicU64,
}

async fn serve(listener: UnixListener, silent: Vec<(String, UnixStream)>, clients: Arc<Clients>) {
    let listener = match tokio::net::UnixListener::from_std(listener) {
        Ok(listener) => listener,
        Err(err) => {
            tracing::error!("the control API does not work: {err}");
            return;
        }
    };
    let room = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    for (name, stream) in silent {
        if let Ok(stream) = tokio::net::UnixStream::from_std(stream)
            && let Ok(permit) = Arc::clone(&room).try_acquire_owned()
        {
            tokio::spawn(Arc::clone(&clients).attend(stream, permit, Some(name)));
        } else {
            clients.keeper.withdraw(&name);
        }
    }
    loop {
        // Fails when the semaphore is closed, which nobody does.
        let Ok(permit) = Arc::clone(&room).acquire_owned().await else {
            return;
        };
        match listener.accept().await {
            Ok((stream, _)) => {
                tokio::spawn(Arc::clone(&clients).attend(stream, permit, None));
            }
            Err(err) => {
                tracing::warn!("control API: cannot accept a connection: {err}");
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

impl Clients {
    /// Serves one connection until its end.
    ///
    /// * `deposit`: the name of its deposit, if it has one.
    async fn attend(
        self: Arc<Self>,
        stream: tokio::net::UnixStream,
        _room: OwnedSemaphorePermit,
        deposit: Option<String>,
    ) {
        let waited = match deposit {
            Some(name) => self.wait_as(&name, &stream).await,
            None => self.wait_for_words(&stream).await,
        };
        if let Err(err) = waited {
            tracing::debug!("control API: {err:#}");
        }
        let service = service_fn(|request| handle(&self.api, request));
        let served = hyper::server::conn::http1::Builder::new()
            .max_buf_size(MAX_HEAD)
            .serve_connection(TokioIo::new(stream), service)
            .await;
        if let Err(err) = served {
            tracing::debug!("control API: {err}");
        }
    }

    /// Waits until something was said. A connection on which that takes long outlives
    /// this process meanwhile.
    async fn wait_for_words(&self, stream: &tokio::net::UnixStream) -> anyhow::Result<()> {
        // A daemon that waits to take over is about to be followed by another process.
        let patience = match self.api.life.waits() {
            Some(_) => Duration::ZERO,
            None => SILENCE,
        };
        let quick = tokio::time::timeout(patience, words(stream)).await;
        if let Ok(said) = quick {
            return Ok(said?);
        }
        let Ok(_room) = self.silent.try_acquire() else {
            return Ok(());
        };
        // The names of a predecessor's are free again, or belong to this process.
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        let name = format!("{SILENT}{}-{number}", std::process::id());
        self.keeper
            .deposit(&name, String::new(), &[stream.as_fd()])?;
        self.wait_as(&name, stream).await
    }

    /// Waits until something was said on a connection that is a deposit.
    async fn wait_as(&self, name: &str, stream: &tokio::net::UnixStream) -> anyhow::Result<()> {
        let said = words(stream).await;
        // Before anything is read of it: a successor must not find half a request.
        self.keeper.withdraw(name);
        Ok(said?)
    }
}

/// Waits for the first byte, or the end, of a connection, and leaves it there.
async fn words(stream: &tokio::net::UnixStream) -> io::Result<()> {
    loop {
        // May be wrong: a connection that was just accepted counts as readable.
        stream.readable().await?;
        let said = stream.try_io(Interest::READABLE, || {
            recv(stream.as_raw_fd(), &mut [0], MsgFlags::MSG_PEEK).map_err(io::Error::from)
        });
        match said {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            said => return said.map(drop),
        }
    }
}

async fn handle(
    api: &Arc<Api>,
    request: Request<Incoming>,
) -> Result<Response<Full<Bytes>>, Infallible> {
    let line = format!("{} {}", request.method(), request.uri());
    let answer = carry_out(api, request).await;
    match &answer {
        Ok(_) => tracing::debug!("control API: {line}"),
        Err(err) => tracing::debug!("control API: {line}: {} {}", err.status, err.message),
    }
    let end: Option<fn(&Api)> = match &answer {
        Ok(Answer::Exit) => Some(|_| {
            let _ = kill(Pid::this(), Signal::SIGTERM);
        }),
        Ok(Answer::Leave) => Some(|api| api.life.leave()),
        Ok(Answer::PassOn) => Some(|api| api.life.pass_on()),
        _ => None,
    };
    if let Some(end) = end {
        let api = Arc::clone(api);
        // The answer goes first.
        tokio::spawn(async move {
            tokio::time::sleep(Duration::from_millis(50)).await;
            end(&api);
        });
    }
    Ok(response(answer))
}

async fn carry_out(api: &Arc<Api>, request: Request<Incoming>) -> Result<Answer, ApiError> {
    let target = request.uri().path_and_query();
    let target = target.map_or("", |target| target.as_str());
    let call = request::parse(request.method().as_str(), target)?;
    let body = Limited::new(request.into_body(), MAX_BODY).collect();
    let body = tokio::time::timeout(BODY_PATIENCE, body)
        .await
        .map_err(|_elapsed| ApiError::bad("the body took too long"))?
        .map_err(|err| ApiError::bad(format!("body: {err}")))?
        .to_bytes();
    let api = Arc::clone(api);
    tokio::task::spawn_blocking(move || api.answer(&call, &body))
        .await
        .unwrap_or_else(|err| Err(ApiError::failed(format!("the call broke off: {err}"))))
}

fn response(answer: Result<Answer, ApiError>) -> Response<Full<Bytes>> {
    let (status, kind, body) = match answer {
        Ok(Answer::Nothing | Answer::Exit | Answer::Leave | Answer::PassOn) => {
            (204, None, String::new())
        }
        Ok(Answer::Json(value)) => (200, Some("application/json"), value.to_string()),
        Ok(Answer::Text(text)) => (200, Some("text/plain; version=0.0.4"), text),
        Err(err) => (err.status, Some("application/json"), err.body()),
    };
    let mut response = Response::new(Full::new(Bytes::from(body)));
    *response.status_mut() =
        StatusCode::from_u16(status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    let headers = response.headers_mut();
    headers.insert(SERVER, HeaderValue::from_static("Nydus API"));
    if let Some(kind) = kind {
        headers.insert(CONTENT_TYPE, HeaderValue::from_static(kind));
    }
    let no_phrase = ReasonPhrase::from_static(b"");
    response.extensions_mut().insert(no_phrase);
    response
}
