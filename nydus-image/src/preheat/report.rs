//! What was warmed where: lines for people, JSON for programs.

use std::fmt;
use std::ops::Range;
use std::time::Duration;

use indicatif::HumanBytes;
use serde::Serialize;

use super::manager;
use super::plan::Target;
use super::seeds::Seed;
use super::warm::Warmed;

/// The report of a preheat. A stable form: keys are only ever added.
#[derive(Debug, Serialize)]
pub(super) struct Report {
    version: u32,
    image: String,
    /// Nydus images behind the reference.
    images: usize,
    /// Bytes of all blobs of which anything is wanted.
    size: u64,
    seconds: f64,
    blobs: Vec<Blob>,
    /// Without a manager.
    seeds: Vec<SeedReport>,
    /// With one.
    manager: Option<manager::Done>,
}

#[derive(Debug, Serialize)]
struct Blob {
    digest: String,
    size: u64,
    /// First byte and the one after the last, of runs that were fetched.
    ranges: Vec<Range<u64>>,
    bytes: u64,
    whole: bool,
    seeds: Vec<String>,
    /// Chunks that were compared with their digests; 0 for whole blobs, which were
    /// compared with theirs.
    chunks_verified: usize,
}

#[derive(Debug, Serialize)]
struct SeedReport {
    url: String,
    blobs: usize,
    requests: u64,
    bytes: u64,
    seconds: f64,
}

impl Report {
    pub(super) fn of_seeds(
        (image, images): (&str, usize),
        targets: &[Target],
        warmed: &[Warmed],
        elapsed: Duration,
    ) -> Self {
        let mut urls: Vec<&Seed> = warmed.iter().map(|one| &one.seed).collect();
        urls.sort_by_key(|seed| seed.to_string());
        urls.dedup();
        Self {
            seeds: urls.into_iter().map(|seed| of_seed(seed, warmed)).collect(),
            ..Self::new((image, images), targets, warmed, elapsed)
        }
    }

    pub(super) fn of_manager(
        image: (&str, usize),
        targets: &[Target],
        done: manager::Done,
        elapsed: Duration,
    ) -> Self {
        Self {
            manager: Some(done),
            ..Self::new(image, targets, &[], elapsed)
        }
    }

    fn new(
        (image, images): (&str, usize),
        targets: &[Target],
        warmed: &[Warmed],
        elapsed: Duration,
    ) -> Self {
        let blob = |target: &Target| {
            let with = || warmed.iter().filter(|one| one.digest == target.digest);
            Blob {
                digest: target.digest.to_string(),
                size: target.size,
                ranges: target.ranges.clone(),
                bytes: target.bytes(),
                whole: target.is_whole(),
                seeds: with().map(|one| one.seed.to_string()).collect(),
                chunks_verified: with().map(|one| one.chunks).max().unwrap_or(0),
            }
        };
        Self {
            version: 1,
            image: image.to_owned(),
            images,
            size: targets.iter().map(|target| target.size).sum(),
            seconds: elapsed.as_secs_f64(),
            blobs: targets.iter().map(blob).collect(),
            seeds: Vec::new(),
            manager: None,
        }
    }
}

fn of_seed(seed: &Seed, warmed: &[Warmed]) -> SeedReport {
    let of = || warmed.iter().filter(|one| one.seed == *seed);
    let began = of().map(|one| one.began).min();
    let ended = of().map(|one| one.ended).max();
    let elapsed = began.zip(ended).map(|(began, ended)| ended - began);
    SeedReport {
        url: seed.to_string(),
        blobs: of().count(),
        requests: of().map(|one| one.requests).sum(),
        bytes: of().map(|one| one.bytes).sum(),
        seconds: elapsed.unwrap_or_default().as_secs_f64(),
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for seed in &self.seeds {
            writeln!(
                f,
                "{}: {} blobs, {} requests, {}, {:.1} s",
                seed.url,
                seed.blobs,
                seed.requests,
                HumanBytes(seed.bytes),
                seed.seconds
            )?;
        }
        if let Some(done) = &self.manager {
            writeln!(
                f,
                "job {}: {} blobs, {} copies reported, {:.1} s",
                done.job, done.blobs, done.reported, done.seconds
            )?;
        }
        let bytes: u64 = self.blobs.iter().map(|blob| blob.bytes).sum();
        let whole = self.blobs.iter().filter(|blob| blob.whole).count();
        write!(
            f,
            "{}: {} blobs preheated, {whole} of them whole, {} of {}, {:.1} s",
            self.image,
            self.blobs.len(),
            HumanBytes(bytes),
            HumanBytes(self.size),
            self.seconds
        )
    }
}
