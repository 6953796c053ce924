//! Failures by chance: everything that registries and networks do to readers, drawn
//! from a seed, so that a run can be repeated.

use std::time::Duration;

use super::Fault;
use crate::blob::Random;

/// A source of failures.
#[derive(Clone, Debug)]
pub struct Chaos {
    random: Random,
    /// How many of 100 requests fail.
    percent: u64,
    failed: u64,
    /// What was drawn how often, in the order of [`Chaos::fault`].
    counts: [u64; KINDS],
}

/// How many different failures there are.
const KINDS: usize = 22;

impl Chaos {
    /// * `percent`: how many of 100 requests fail.
    #[must_use]
    pub fn new(seed: u64, percent: u64) -> Self {
        Self {
            random: Random(seed),
            percent,
            failed: 0,
            counts: [0; KINDS],
        }
    }

    /// How many requests failed so far.
    #[must_use]
    pub fn failed(&self) -> u64 {
        self.failed
    }

    /// From now on no request fails.
    pub fn stop(&mut self) {
        self.percent = 0;
    }

    pub(super) fn draw(&mut self) -> Option<Fault> {
        if self.random.below(100) >= self.percent {
            return None;
        }
        self.failed += 1;
        let kind = usize::try_from(self.random.below(22)).unwrap_or_default();
        if let Some(count) = self.counts.get_mut(kind) {
            *count += 1;
        }
        Some(self.fault(kind))
    }

    fn fault(&mut self, kind: usize) -> Fault {
        let status = |code| Fault::Status(code, Vec::new());
        let some = |random: &mut Random| usize::try_from(random.below(100_000)).unwrap_or(0);
        match kind {
            0 => Fault::Stall(Duration::from_millis(self.random.below(100))),
            1 => Fault::Stall(Duration::from_millis(700)),
            2 => Fault::StallAfter(some(&mut self.random), Duration::from_millis(700)),
            3 => Fault::ResetAfter(some(&mut self.random)),
            4 => Fault::Hangup,
            5 => Fault::CloseAfter(some(&mut self.random)),
            6 => Fault::Shorten(some(&mut self.random)),
            7 => Fault::Garble,
            8 => Fault::LengthenHead(self.random.below(5000) + 1),
            9 => Fault::ShiftRange(self.random.below(100_000) + 1),
            10 => Fault::OtherRange(self.random.below(100) + 1),
            11 => Fault::IgnoreRange,
            12 => Fault::SignedRedirect(self.random.below(50)),
            13 => Fault::SignedRedirect(self.random.below(2000)),
            14 => Fault::Status(429, vec![("Retry-After", "0".to_owned())]),
            15 => status(401),
            16 => status(403),
            17 => status(404),
            18 => status(416),
            19 => status(500),
            20 => status(502),
            _ => status(503),
        }
    }

    /// How often each kind of failure was drawn.
    #[must_use]
    pub fn counts(&self) -> &[u64] {
        &self.counts
    }
}
