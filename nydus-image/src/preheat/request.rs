//! Ranges of blobs, through the proxy of a seed.
//!
//! The request is what a node's daemon would send: the registry's own path, and the
//! registry in a header. Tokens are fetched from the registry itself.
//!
//! Promises: exactly the bytes asked for, or an error that names seed, blob and range;
//! a bounded number of attempts; nothing is redirected.

use std::ops::Range;
use std::time::Duration;

use anyhow::Context as _;
use reqwest::header::{ACCEPT_ENCODING, AUTHORIZATION, RANGE};
use reqwest::redirect::Policy;
use storage::BlobId;
use storage::backend::registry::Tasks;
use storage::oci::ContentDigest;
use storage::oci::registry::{Registry, client_builder};

use super::answer::{Again, Fault, accept};
use super::plan::Target;
use super::seeds::Seed;

const TASK_ID: &str = "X-Dragonfly-Content-For-Calculating-Task-ID";

/// How often a range is asked for.
const ATTEMPTS: u32 = 4;
/// Pause before the second attempt; doubles from one to the next.
const PAUSE: Duration = Duration::from_millis(500);
/// A seed to which no connection can be made within this time is a failed attempt.
const CONNECT: Duration = Duration::from_secs(10);

/// Asks seeds for blobs of one repository.
#[derive(Debug)]
pub(super) struct Client {
    http: reqwest::Client,
    registry: Registry,
    tasks: Tasks,
}

/// A range that a seed did not deliver.
#[derive(Debug, thiserror::Error)]
#[error(
    "seed {seed}: blob {digest}, bytes {} to {} (attempt {attempts}): {fault}",
    range.start,
    range.end
)]
pub(super) struct Failed {
    pub(super) seed: Seed,
    pub(super) digest: ContentDigest,
    pub(super) range: Range<u64>,
    pub(super) attempts: u32,
    pub(super) fault: Fault,
}

impl Client {
    /// * `timeout`: longest wait for an answer, and between parts of it.
    /// * `tasks`: as the daemons that are to find it have them.
    pub(super) fn new(registry: Registry, timeout: Duration, tasks: Tasks) -> anyhow::Result<Self> {
        let http = client_builder()
            .connect_timeout(CONNECT)
            .read_timeout(timeout)
            // A seed is asked, not a proxy of the environment, and nobody it points at.
            .no_proxy()
            .redirect(Policy::none())
            .build()
            .context("cannot set up the HTTP client for seeds")?;
        Ok(Self {
            http,
            registry,
            tasks,
        })
    }

    /// The part of a blob around `at` that is a task of its own.
    pub(super) fn task(&self, target: &Target, at: u64) -> Option<Range<u64>> {
        self.tasks.window(target.stored, at)
    }

    /// The bytes `range` of a blob, which lie in one task.
    pub(super) async fn fetch(
        &self,
        seed: &Seed,
        target: &Target,
        range: &Range<u64>,
    ) -> Result<Vec<u8>, Failed> {
        let mut renew = false;
        let mut attempts = 1;
        loop {
            let fault = match self.attempt(seed, target, range, renew).await {
                Ok(bytes) => return Ok(bytes),
                Err(fault) => fault,
            };
            let again = fault.again();
            // One new token is worth a try; a second one is like the first.
            let useless = again == Again::WithNewToken && renew;
            if attempts >= ATTEMPTS || again == Again::Never || useless {
                return Err(Failed {
                    seed: seed.clone(),
                    digest: target.digest.clone(),
                    range: range.clone(),
                    attempts,
                    fault,
                });
            }
            let digest = &target.digest;
            tracing::debug!("seed {seed}: blob {digest}, {range:?}: {fault}; trying again");
            renew = again == Again::WithNewToken;
            if let Again::After(seconds) = again {
                let pause = PAUSE * (1 << (attempts - 1));
                tokio::time::sleep(pause.max(Duration::from_secs(seconds))).await;
            }
            attempts += 1;
        }
    }

    async fn attempt(
        &self,
        seed: &Seed,
        target: &Target,
        range: &Range<u64>,
        renew: bool,
    ) -> Result<Vec<u8>, Fault> {
        let digest = &target.digest;
        let login = self.registry.authorization(renew).await;
        let repository = &self.registry.name().repository;
        let mut request = self
            .http
            .get(format!("{seed}/v2/{repository}/blobs/{digest}"))
            .header(RANGE, format!("bytes={}-{}", range.start, range.end - 1))
            .header(ACCEPT_ENCODING, "identity")
            .header("X-Dragonfly-Registry", self.registry.origin())
            // Whatever the rules of the seed say; and even a short range is announced to
            // the scheduler, without which nobody would learn of it.
            .header("X-Dragonfly-Use-P2P", "true")
            .header("X-Dragonfly-Scheduling-Policy", "always")
            // Only what is asked for.
            .header("X-Dragonfly-Prefetch", "false");
        if let Some(window) = self.task(target, range.start) {
            let blob = BlobId::new(digest.hex());
            let blob = blob.map_err(|error| Fault::Damaged(error.to_string()))?;
            request = request.header(TASK_ID, Tasks::content(&blob, &window));
        }
        if let Some(value) = login.map_err(Fault::Login)? {
            request = request.header(AUTHORIZATION, value);
        }
        let answer = request.send().await.map_err(broken)?;
        accept(answer.status(), answer.headers(), range, target.size)?;
        body(answer, range.end - range.start).await
    }
}

/// A body of exactly `len` bytes.
async fn body(mut answer: reqwest::Response, len: u64) -> Result<Vec<u8>, Fault> {
    // A window: see `pieces`.
    let len = usize::try_from(len).unwrap_or(usize::MAX);
    let mut bytes = Vec::with_capacity(len);
    while let Some(piece) = answer.chunk().await.map_err(broken)? {
        if piece.len() > len - bytes.len() {
            let text = format!("the answer has more than its {len} bytes");
            return Err(Fault::Transport(text));
        }
        bytes.extend_from_slice(&piece);
    }
    match bytes.len() == len {
        true => Ok(bytes),
        false => Err(Fault::Transport(format!(
            "the answer ended after {} of {len} bytes",
            bytes.len()
        ))),
    }
}

/// The whole chain, because the first link only says that something failed.
fn broken(error: reqwest::Error) -> Fault {
    Fault::Transport(format!("{:#}", anyhow::Error::new(error.without_url())))
}
