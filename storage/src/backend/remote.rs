//! A server behind blocking calls: what all backends that ask one have in common.
//!
//! [`Source`] is the asynchronous part, which differs. It runs on threads that do nothing
//! but move bytes; whoever calls waits, decodes and verifies ([`bridge`]).

use std::future::Future;

use tokio::runtime::Runtime;

use super::bridge::{self, Vanished};
use super::registry::hedge::Manner;
use super::registry::transfer::{Source, transfer};
use super::{BackendError, Fetch, Sink};
use crate::blob_id::BlobId;
use crate::sync::Arc;

/// A source and the threads that it runs on.
pub(super) struct Remote<S> {
    source: Arc<S>,
    /// Always there, but while it is dropped.
    runtime: Option<Runtime>,
}

impl<S: Source> Remote<S> {
    /// * `name`: of the threads.
    ///
    /// # Errors
    /// [`BackendError::Config`] when they cannot be started.
    pub(super) fn new(source: S, name: &str, threads: usize) -> Result<Self, BackendError> {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(threads)
            .thread_name(name)
            .enable_all()
            .build()
            .map_err(|error| BackendError::Config(format!("starting threads: {error}")))?;
        Ok(Self {
            source: Arc::new(source),
            runtime: Some(runtime),
        })
    }

    pub(super) fn source(&self) -> &Arc<S> {
        &self.source
    }

    /// Has something done that nobody waits for.
    pub(super) fn spawn(&self, work: impl Future<Output = ()> + Send + 'static) {
        if let Ok(runtime) = self.runtime() {
            runtime.spawn(work);
        }
    }

    /// As [`Backend::fetch`](super::Backend::fetch).
    pub(super) fn fetch(
        &self,
        request: &Fetch<'_>,
        sink: &mut Sink<'_>,
    ) -> Result<(), BackendError> {
        let (source, blob) = (Arc::clone(&self.source), request.blob.clone());
        let range = request.range.clone();
        let manner = Manner::of(request);
        bridge::fetch(self.runtime()?, request, sink, |out| async move {
            transfer(&source, &blob, range, manner, out).await;
        })
        .unwrap_or_else(|Vanished| Err(self.vanished(request.blob)))
    }

    /// As [`Backend::size`](super::Backend::size).
    pub(super) fn size(&self, blob: &BlobId) -> Result<u64, BackendError> {
        let (source, id) = (Arc::clone(&self.source), blob.clone());
        bridge::answer(self.runtime()?, async move { source.size(&id).await })
            .unwrap_or_else(|Vanished| Err(self.vanished(blob)))
    }

    fn runtime(&self) -> Result<&Runtime, BackendError> {
        let stopped = || BackendError::Config("the backend is shutting down".to_owned());
        self.runtime.as_ref().ok_or_else(stopped)
    }

    fn vanished(&self, blob: &BlobId) -> BackendError {
        BackendError::Transport {
            url: self.source.name(blob),
            action: "the transfer ended without a result",
            source: "its task is gone".into(),
        }
    }
}

impl<S> Drop for Remote<S> {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            // Does not wait for transfers that nobody wants any more.
            runtime.shutdown_background();
        }
    }
}
