//! From asynchronous transfers to blocking callers.
//!
//! Bytes come out through a bounded channel, so a slow receiver slows the transfer
//! down instead of filling memory.

use std::future::Future;
use std::time::Duration;

use bytes::Bytes;
use tokio::runtime::Runtime;
use tokio::sync::mpsc;
use tokio::time::timeout;
use tracing::Instrument as _;

use super::{BackendError, Fetch, ServedBy, Sink, Stop};
use crate::codec::as_u64;
use crate::sync::Arc;

/// Pieces of a body that wait for the receiver. Each is what one read of the socket
/// gave, some ten KiB.
const QUEUE: usize = 16;

/// How often the receiver is asked whether it still waits while nothing comes.
const TICK: Duration = Duration::from_millis(100);

/// Where a transfer puts its bytes; the last message may be the error.
#[derive(Clone, Debug)]
pub(super) struct Output {
    messages: Sender,
    served_by: Arc<ServedBy>,
}

pub(super) type Sender = mpsc::Sender<Result<Bytes, BackendError>>;

impl Output {
    pub(super) fn new(messages: Sender) -> Self {
        Self {
            messages,
            served_by: Arc::default(),
        }
    }

    /// Passes a message on; an error if nobody is there.
    pub(super) async fn send(&self, message: Result<Bytes, BackendError>) -> Result<(), Stop> {
        self.messages.send(message).await.map_err(|_gone| Stop)
    }

    /// Notes where the bytes that follow come from.
    pub(super) fn comes_from(&self, server: &ServedBy) {
        self.served_by.add(server);
    }

    /// What was noted.
    pub(super) fn served_by(&self) -> &Arc<ServedBy> {
        &self.served_by
    }
}

/// The task ended without a result, which only a panic or a shutdown can do.
pub(super) struct Vanished;

/// Runs a transfer and feeds `sink` until all bytes of `request` are there.
pub(super) fn fetch<F>(
    runtime: &Runtime,
    request: &Fetch<'_>,
    sink: &mut Sink<'_>,
    transfer: impl FnOnce(Output) -> F,
) -> Result<Result<(), BackendError>, Vanished>
where
    F: Future<Output = ()> + Send + 'static,
{
    let (sender, mut receiver) = mpsc::channel(QUEUE);
    let out = Output::new(sender);
    let served_by = Arc::clone(out.served_by());
    // What is logged on the way belongs to the request of the caller.
    let task = runtime.spawn(transfer(out).instrument(tracing::Span::current()));
    let mut missing = request.range.end.saturating_sub(request.range.start);
    let result = loop {
        // Not `blocking_recv`, which could not be left while a server is silent.
        let waited = runtime.block_on(async { timeout(TICK, receiver.recv()).await });
        let Ok(message) = waited else {
            match sink(&[]) {
                Ok(()) => continue,
                Err(Stop) => break Ok(Err(BackendError::Stopped)),
            }
        };
        match message {
            Some(Ok(bytes)) => {
                missing = missing.saturating_sub(as_u64(bytes.len()));
                if let Some(wanted) = request.served_by {
                    wanted.add(&served_by);
                }
                if let Err(Stop) = sink(&bytes) {
                    break Ok(Err(BackendError::Stopped));
                }
            }
            Some(Err(error)) => break Ok(Err(error)),
            None if missing == 0 => break Ok(Ok(())),
            None => break Err(Vanished),
        }
    };
    // Whatever it is waiting for, nobody else does.
    task.abort();
    if let Some(wanted) = request.served_by {
        wanted.add(&served_by);
    }
    result
}

/// Waits for one value.
pub(super) fn answer<T: Send + 'static>(
    runtime: &Runtime,
    work: impl Future<Output = T> + Send + 'static,
) -> Result<T, Vanished> {
    let (sender, mut receiver) = mpsc::channel(1);
    runtime.spawn(async move {
        let _ = sender.send(work.await).await;
    });
    receiver.blocking_recv().ok_or(Vanished)
}
