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
    let mut check = Check::new(target);
    let mut requests = 0;
    let mut failed = Failed {
        seed: seed.clone(),
        digest: target.digest.clone(),
        range: 0..target.size,
        attempts: 1,
        fault: Fault::Damaged(String::new()),
    };
    let runs = target.ranges.iter().cloned();
    for window in runs.flat_map(|run| windows(run, target.size)) {
        let bytes = client
            .fetch(seed, (&target.digest, target.size), &window)
            .await?;
        requests += 1;
        progress.add(window.end - window.start);
        let start = window.start;
        let taken = tokio::task::spawn_blocking(move || {
            let taken = check.take(start, bytes);
            (check, taken)
        });
        let result = match taken.await {
            Ok((returned, result)) => {
                check = returned;
                result
            }
            Err(_panicked) => {
                failed.fault = Fault::Transport("the check of its bytes crashed".to_owned());
                failed.range = window;
                return Err(failed);
            }
        };
        if let Err(problem) = result {
            failed.fault = Fault::Damaged(problem);
            failed.range = window;
            return Err(failed);
        }
    }
    match check.finish() {
        Ok(chunks) => {
            let warmed = Warmed {
                seed: seed.clone(),
                digest: target.digest.clone(),
                requests,
                bytes: target.bytes(),
                chunks,
                began,
                ended: Instant::now(),
            };
            progress.done(target, seed);
            Ok(warmed)
        }
        Err(problem) => {
            failed.fault = Fault::Damaged(problem);
            Err(failed)
        }
    }
}
