//! HTTP/1.1 on the socket, by `hyper`: it is in the build already, kept well, and
//! bounds and checks what it parses.
//!
//! A connection that is silent is never closed: clients take the end of one as the end
//! of the daemon. What a client can use up is bounded instead: connections, the size of
//! heads and bodies, and the time a body takes. Answers have no reason phrase.

use std::convert::Infallible;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::sync::Arc;
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
use nix::unistd::Pid;
use tokio::sync::Semaphore;

use super::error::ApiError;
use super::socket::{self, SocketFile};
use super::{Answer, Api, request};

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

/// A running server. Dropping it removes the socket and ends its thread.
#[derive(Debug)]
pub(crate) struct Server {
    _file: SocketFile,
    // Closing it tells the thread to end.
    _stop: tokio::sync::oneshot::Sender<()>,
}

impl Server {
    /// Starts to serve `api` on the socket `path`.
    ///
    /// # Errors
    /// The socket cannot be had, or a thread cannot be started.
    pub(crate) fn start(path: &Path, api: Api) -> anyhow::Result<Self> {
        let (listener, file) = socket::open(path)?;
        let (stop, stopped) = tokio::sync::oneshot::channel();
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .max_blocking_threads(MAX_CALLS)
            .thread_keep_alive(Duration::from_secs(5))
            .build()
            .context("cannot start the control API")?;
        std::thread::Builder::new()
            .name("api".to_owned())
            .spawn(move || {
                runtime.block_on(async {
                    tokio::select! {
                        _ = stopped => {}
                        () = serve(listener, Arc::new(api)) => {}
                    }
                });
                // A mount under way must not keep the daemon from its end.
                runtime.shutdown_background();
            })
            .context("cannot start a thread")?;
        Ok(Self {
            _file: file,
            _stop: stop,
        })
    }
}

async fn serve(listener: UnixListener, api: Arc<Api>) {
    let listener = match tokio::net::UnixListener::from_std(listener) {
        Ok(listener) => listener,
        Err(err) => {
            tracing::error!("the control API does not work: {err}");
            return;
        }
    };
    let room = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    loop {
        // Fails when the semaphore is closed, which nobody does.
        let Ok(permit) = Arc::clone(&room).acquire_owned().await else {
            return;
        };
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(err) => {
                tracing::warn!("control API: cannot accept a connection: {err}");
                tokio::time::sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        let api = Arc::clone(&api);
        tokio::spawn(async move {
            let service = service_fn(|request| handle(&api, request));
            let served = hyper::server::conn::http1::Builder::new()
                .max_buf_size(MAX_HEAD)
                .serve_connection(TokioIo::new(stream), service)
                .await;
            if let Err(err) = served {
                tracing::debug!("control API: {err}");
            }
            drop(permit);
        });
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
    if answer == Ok(Answer::Exit) {
        // The answer goes first.
        tokio::spawn(async {
            tokio::time::sleep(Duration::from_millis(50)).await;
            let _ = kill(Pid::this(), Signal::SIGTERM);
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
        Ok(Answer::Nothing | Answer::Exit) => (204, None, String::new()),
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
