//! Sending one blob, from a file or memory, in a single PUT.
//!
//! The source can be read again from its start, so a failed upload is repeated. The
//! HTTP client has no deadline for a request as a whole, since blobs may be huge;
//! instead [`watch`] gives up when no byte has left for a while.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use bytes::Bytes;
use futures_util::stream;
use oci_client::RegistryOperation;
use oci_client::errors::OciDistributionError;

use super::Registry;
use super::retry::{self, Attempt, Failure};
use crate::oci::blob_source::BlobSource;
use crate::oci::content::ContentDigest;
use crate::oci::error::OciError;

/// Largest piece handed to the HTTP client at once.
const PIECE: usize = 256 << 10;
/// An upload of which no byte leaves for this long has stalled.
const STALL: Duration = Duration::from_secs(60);
/// After the last byte, registries copy or hash the blob before they answer.
const COMMIT: Duration = Duration::from_secs(300);

/// Told how many bytes of a transfer are done, from zero again after a failure.
pub type Progress = Arc<dyn Fn(u64) + Send + Sync>;

impl Registry {
    /// Stores `source`, whose content has `digest` and `size`, in the repository.
    ///
    /// # Errors
    /// [`OciError::Unauthorized`], [`OciError::Status`] (with 400 if the registry
    /// computes another digest), or [`OciError::Request`].
    pub async fn push_blob(
        &self,
        source: &BlobSource,
        digest: &ContentDigest,
        size: u64,
        progress: Progress,
    ) -> Result<(), OciError> {
        let at = self.blob_url(digest);
        let progress = &progress;
        retry::run(&at, "the upload", |attempt: Attempt| async move {
            self.login(RegistryOperation::Push, attempt.renew_login)
                .await?;
            let sent = Arc::new(AtomicU64::new(0));
            let body = pieces(
                source.clone(),
                size,
                Arc::clone(&sent),
                Arc::clone(progress),
            );
            let inner = &self.inner;
            let upload = inner.clients.push()?.push_blob_stream(
                &inner.reference,
                body,
                digest.as_str(),
                Some(size),
            );
            match watch(upload, &sent, size).await? {
                Ok(_location) => Ok(()),
                // Some registries accept the blob but leave out where it is.
                Err(OciDistributionError::RegistryNoLocationError) => {
                    match self.has_blob(digest).await {
                        Ok(true) => Ok(()),
                        Ok(false) => Err(Failure::of_client(
                            OciDistributionError::RegistryNoLocationError,
                        )),
                        Err(error) => Err(Failure::Final(error)),
                    }
                }
                Err(error) => Err(Failure::of_client(error)),
            }
        })
        .await
    }
}

/// The content as a stream that counts what was taken from it.
fn pieces(
    source: BlobSource,
    size: u64,
    sent: Arc<AtomicU64>,
    progress: Progress,
) -> impl stream::Stream<Item = Result<Bytes, OciDistributionError>> + Send + 'static {
    stream::try_unfold((source, 0_u64), move |(source, offset)| {
        let (sent, progress) = (Arc::clone(&sent), Arc::clone(&progress));
        async move {
            if offset >= size {
                return Ok(None);
            }
            let piece = source.read_at(offset, PIECE).await?;
            let next = offset + crate::oci::content::byte_len(&piece);
            // Nobody asks for a piece after the last one, so count what is handed out.
            sent.store(next, Ordering::Relaxed);
            progress(next);
            Ok(Some((piece, (source, next))))
        }
    })
}

/// Waits for `upload` as long as it moves.
async fn watch<T>(
    upload: impl Future<Output = T>,
    sent: &AtomicU64,
    size: u64,
) -> Result<T, Failure> {
    let mut upload = std::pin::pin!(upload);
    let mut before = sent.load(Ordering::Relaxed);
    loop {
        let deadline = if before >= size { COMMIT } else { STALL };
        match tokio::time::timeout(deadline, &mut upload).await {
            Ok(outcome) => return Ok(outcome),
            Err(_elapsed) => {
                let now = sent.load(Ordering::Relaxed);
                if now == before {
                    let reason =
                        format!("no progress for {} s after {now} bytes", deadline.as_secs());
                    return Err(Failure::Broken(reason.into()));
                }
                before = now;
            }
        }
    }
}
