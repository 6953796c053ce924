//! Blobs as they arrive: as asynchronous pieces, or as a blocking reader.
//!
//! Both end cleanly only after the length and the digest were right.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use bytes::{Buf as _, Bytes};
use tokio::sync::mpsc;

use super::content::byte_len;
use super::error::OciError;
use super::layout::LayoutBlob;
use super::registry::download::Download;

/// Pieces between the network and a blocking reader: at most a few MiB.
const QUEUE: usize = 16;

/// A blob being read.
#[derive(Debug)]
pub enum BlobStream {
    /// From a registry.
    Registry(Box<Download>),
    /// From a layout.
    Layout(Box<LayoutBlob>),
}

impl BlobStream {
    /// The next bytes; `None` once everything has arrived and is what was asked for.
    ///
    /// # Errors
    /// [`OciError::Size`], [`OciError::Digest`], and what fetching or reading said. After
    /// an error the stream is of no further use.
    pub async fn next(&mut self) -> Result<Option<Bytes>, OciError> {
        match self {
            Self::Registry(download) => download.next().await,
            Self::Layout(blob) => blob.next().await,
        }
    }

    /// Turns the stream into a reader for threads that block.
    ///
    /// Must be called inside a tokio runtime, which does the fetching; dropping the
    /// reader ends it. An [`OciError`] arrives as the inner error of an [`io::Error`].
    #[must_use]
    pub fn into_reader(mut self) -> BlobReader {
        let (sender, receiver) = mpsc::channel(QUEUE);
        tokio::spawn(async move {
            loop {
                let item = tokio::select! {
                    // The reader is gone: do not wait for the network any longer.
                    () = sender.closed() => return,
                    item = self.next() => item,
                };
                let last = !matches!(item, Ok(Some(_)));
                if sender.send(item).await.is_err() || last {
                    return;
                }
            }
        });
        BlobReader {
            receiver,
            piece: Bytes::new(),
            ended: false,
            received: Arc::default(),
        }
    }
}

/// A blob as [`io::Read`], for threads outside the runtime.
#[derive(Debug)]
pub struct BlobReader {
    receiver: mpsc::Receiver<Result<Option<Bytes>, OciError>>,
    piece: Bytes,
    ended: bool,
    received: Arc<AtomicU64>,
}

impl BlobReader {
    /// A counter of the bytes read so far, for whoever shows progress.
    #[must_use]
    pub fn received(&self) -> Arc<AtomicU64> {
        Arc::clone(&self.received)
    }
}

impl io::Read for BlobReader {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        while self.piece.is_empty() && !self.ended {
            match self.receiver.blocking_recv() {
                Some(Ok(Some(piece))) => {
                    self.received.fetch_add(byte_len(&piece), Ordering::Relaxed);
                    self.piece = piece;
                }
                Some(Ok(None)) => self.ended = true,
                Some(Err(error)) => return Err(io::Error::other(error)),
                // The runtime was shut down; without this the blob would seem to end here.
                None => return Err(io::Error::other("the transfer was cancelled")),
            }
        }
        let count = self.piece.len().min(buffer.len());
        buffer[..count].copy_from_slice(&self.piece[..count]);
        self.piece.advance(count);
        Ok(count)
    }
}
