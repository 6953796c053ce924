//! Whether the bytes that a seed sent are those of the image.
//!
//! A daemon believes whatever the registry, or another daemon, gave it. What it holds will
//! be sent to nodes, which refuse wrong bytes, each for itself; better to know it now.
//!
//! Memory: one window, and the chunk that its end cuts in two.

use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

use storage::BlobId;
use storage::backend::{Backend, BackendError, Fetch, Sink, Stop};
use storage::oci::content::Verifier;

use super::plan::{Parts, Proof, Target};
use crate::data::{ImageData, Span};

/// Takes the bytes of a target in order.
pub(super) enum Check {
    /// Of a whole blob.
    Digest(Box<Verifier>),
    /// Of parts of one.
    Chunks(Chunks),
}

impl Check {
    pub(super) fn new(target: &Target) -> Self {
        match &target.proof {
            Proof::Digest => {
                let name = format!("blob {}", target.digest);
                Self::Digest(Box::new(Verifier::new(name, &target.digest, target.size)))
            }
            Proof::Chunks(parts) => Self::Chunks(Chunks::new(parts)),
        }
    }

    /// Takes what begins at byte `start` of the blob. Blocks; decodes.
    ///
    /// # Errors
    /// What is wrong with it.
    pub(super) fn take(&mut self, start: u64, bytes: Vec<u8>) -> Result<(), String> {
        match self {
            Self::Digest(verifier) => verifier.update(&bytes).map_err(|error| error.to_string()),
            Self::Chunks(chunks) => chunks.take(start, bytes),
        }
    }

    /// After the last byte: the number of chunks that were compared, if it was by chunks.
    ///
    /// # Errors
    /// What is wrong with all of it.
    pub(super) fn finish(self) -> Result<usize, String> {
        match self {
            Self::Digest(verifier) => verifier
                .finish()
                .map(|()| 0)
                .map_err(|error| error.to_string()),
            Self::Chunks(chunks) if chunks.rest.is_empty() => Ok(chunks.verified),
            Self::Chunks(chunks) => Err(format!("{} chunks did not come", chunks.rest.len())),
        }
    }
}

/// Chunks that wait for their bytes.
pub(super) struct Chunks {
    data: ImageData,
    held: Arc<Held>,
    /// By the end of the bytes that they need.
    rest: Vec<(Range<u64>, Span)>,
    verified: usize,
}

impl Chunks {
    fn new(parts: &Parts) -> Self {
        let held = Arc::new(Held::default());
        let backend: Arc<dyn Backend> = held.clone();
        Self {
            data: ImageData::with_tables(Arc::clone(&parts.image), backend, &parts.tables),
            held,
            rest: parts.spans.clone(),
            verified: 0,
        }
    }

    fn take(&mut self, start: u64, bytes: Vec<u8>) -> Result<(), String> {
        let end = self.held.append(start, bytes);
        let ready = self.rest.partition_point(|(stored, _)| stored.end <= end);
        let ready: Vec<_> = self.rest.drain(..ready).map(|(_, span)| span).collect();
        let read = self.data.reader().read(&ready, |_, _| ());
        read.map_err(|error| format!("{:#}", anyhow::Error::new(error)))?;
        self.verified += ready.len();
        // The next chunks may have begun here.
        let keep = self.rest.iter().map(|(stored, _)| stored.start).min();
        self.held.drop_before(keep.unwrap_or(u64::MAX).min(end));
        Ok(())
    }
}

/// A blob of which a part is in memory.
#[derive(Debug, Default)]
struct Held(Mutex<(u64, Vec<u8>)>);

impl Held {
    /// Adds bytes, in place of what is there unless they follow it; returns their end.
    fn append(&self, start: u64, bytes: Vec<u8>) -> u64 {
        let mut held = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if held.1.is_empty() || end(&held) != start {
            *held = (start, bytes);
        } else {
            held.1.extend_from_slice(&bytes);
        }
        end(&held)
    }

    fn drop_before(&self, at: u64) {
        let mut held = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let count = at.saturating_sub(held.0).min(end(&held) - held.0);
        held.0 += count;
        held.1.drain(..usize::try_from(count).unwrap_or(usize::MAX));
    }
}

fn end(held: &(u64, Vec<u8>)) -> u64 {
    held.0.saturating_add(held.1.len() as u64)
}

impl Backend for Held {
    fn fetch(&self, request: &Fetch<'_>, sink: &mut Sink<'_>) -> Result<(), BackendError> {
        let held = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let slice = || {
            let start = usize::try_from(request.range.start.checked_sub(held.0)?).ok()?;
            let end = usize::try_from(request.range.end.checked_sub(held.0)?).ok()?;
            held.1.get(start..end)
        };
        match slice() {
            Some(bytes) => sink(bytes).map_err(|Stop| BackendError::Stopped),
            None => Err(absent(request)),
        }
    }

    fn size(&self, _blob: &BlobId) -> Result<u64, BackendError> {
        let held = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        Ok(end(&held))
    }
}

/// A blob of which nothing is there, for those who only want to know where chunks are.
#[derive(Debug)]
pub(super) struct Nothing;

impl Backend for Nothing {
    fn fetch(&self, request: &Fetch<'_>, _sink: &mut Sink<'_>) -> Result<(), BackendError> {
        Err(absent(request))
    }

    fn size(&self, _blob: &BlobId) -> Result<u64, BackendError> {
        Ok(0)
    }
}

fn absent(request: &Fetch<'_>) -> BackendError {
    BackendError::Short {
        name: format!("blob {}", request.blob),
        offset: request.range.start,
        len: request.range.end.saturating_sub(request.range.start),
        got: 0,
    }
}
