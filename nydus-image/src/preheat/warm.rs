//! Warming through seeds: every target through each of its seeds.

use std::time::Instant;

use futures_util::{StreamExt as _, stream};
use storage::oci::ContentDigest;

use super::answer::Fault;
use super::check::Check;
use super::pieces::windows;
use super::plan::Target;
use super::progress::Progress;
use super::request::{Client, Failed};
use super::seeds::{Seed, for_blob};

/// A target that a seed holds now.
#[derive(Debug)]
pub(super) struct Warmed {
    pub(super) seed: Seed,
    pub(super) digest: ContentDigest,
    /// Requests that were made for it.
    pub(super) requests: u64,
    pub(super) bytes: u64,
    /// Chunks that were compared with their digests.
    pub(super) chunks: usize,
    pub(super) began: Instant,
    pub(super) ended: Instant,
}

/// Warms all `targets`, `jobs` at a time. What fails does not stop the others.
pub(super) async fn all(
    client: &Client,
    targets: &[Target],
    (seeds, replicas): (&[Seed], usize),
    (jobs, progress): (usize, &Progress),
) -> Vec<Result<Warmed, Failed>> {
    let work = targets.iter().flat_map(|target| {
        let chosen = for_blob(seeds, &target.digest, replicas);
        chosen
            .into_iter()
            .map(move |seed| one(client, target, seed, progress))
    });
    stream::iter(work.collect::<Vec<_>>())
        .buffer_unordered(jobs)
        .collect()
        .await
}

async fn one(
    client: &Client,
    target: &Target,
    seed: &Seed,
    progress: &Progress,
) -> Result<Warmed, Failed> {
    let began = Instant::now();
    let failed = |range, fault| Failed {
        seed: seed.clone(),
        digest: target.digest.clone(),
        range,
        attempts: 1,
        fault,
    };
    let mut check = Check::new(target);
    let mut requests = 0;
    let runs = target.ranges.iter().cloned();
    let task = |at| client.task(target, at);
    for window in runs.flat_map(|run| windows(run, target.size, task)) {
        let bytes = client.fetch(seed, target, &window).await?;
        requests += 1;
        progress.add(window.end - window.start);
        check = take(check, window.start, bytes)
            .await
            .map_err(|fault| failed(window, fault))?;
    }
    let chunks = check
        .finish()
        .map_err(|problem| failed(0..target.size, Fault::Damaged(problem)))?;
    progress.done(target, seed);
    Ok(Warmed {
        seed: seed.clone(),
        digest: target.digest.clone(),
        requests,
        bytes: target.bytes(),
        chunks,
        began,
        ended: Instant::now(),
    })
}

/// Decoding and hashing take time, so they get a thread.
async fn take(mut check: Check, start: u64, bytes: Vec<u8>) -> Result<Check, Fault> {
    let work = tokio::task::spawn_blocking(move || check.take(start, bytes).map(|()| check));
    match work.await {
        Ok(result) => result.map_err(Fault::Damaged),
        Err(_panicked) => Err(Fault::Transport("checking it crashed".to_owned())),
    }
}
