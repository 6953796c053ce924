//! Which parts of blobs a mirror served wrongly: it is not asked for those again, until
//! it may have mended them.

use std::collections::HashMap;
use std::ops::Range;
use std::time::{Duration, Instant};

use super::dragonfly::PIECE;
use crate::blob_id::BlobId;
use crate::sync::{Mutex, lock};

/// How long that is.
const MEMORY: Duration = Duration::from_secs(600);

/// Most parts that are remembered; with more, the mirror as a whole is to blame.
const MOST: usize = 1024;

/// The parts, each [`PIECE`] bytes: what a mirror keeps and passes on as one.
#[derive(Debug, Default)]
pub(super) struct Distrust(Mutex<HashMap<(BlobId, u64), Instant>>);

impl Distrust {
    pub(super) fn add(&self, blob: &BlobId, range: &Range<u64>) {
        let mut parts = lock(&self.0);
        let now = Instant::now();
        parts.retain(|_, since| now.saturating_duration_since(*since) < MEMORY);
        for part in parts_of(range) {
            if parts.len() < MOST {
                parts.insert((blob.clone(), part), now);
            }
        }
    }

    pub(super) fn covers(&self, blob: &BlobId, range: &Range<u64>) -> bool {
        let parts = lock(&self.0);
        if parts.is_empty() {
            return false;
        }
        let is_bad = |part: u64| {
            let since = parts.get(&(blob.clone(), part));
            since.is_some_and(|since| since.elapsed() < MEMORY)
        };
        parts.len() >= MOST || parts_of(range).any(is_bad)
    }
}

fn parts_of(range: &Range<u64>) -> impl Iterator<Item = u64> {
    range.start / PIECE..range.end.div_ceil(PIECE)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_that_were_wrong_are_known() {
        let (blob, other) = (
            BlobId::new(&"ab".repeat(32)).unwrap(),
            BlobId::new(&"cd".repeat(32)).unwrap(),
        );
        let distrust = Distrust::default();
        assert!(!distrust.covers(&blob, &(0..PIECE)));
        distrust.add(&blob, &(PIECE + 5..PIECE + 6));
        assert!(distrust.covers(&blob, &(PIECE - 1..PIECE + 1)));
        assert!(!distrust.covers(&blob, &(0..PIECE)));
        assert!(!distrust.covers(&blob, &(2 * PIECE..3 * PIECE)));
        assert!(!distrust.covers(&other, &(PIECE..2 * PIECE)));
    }
}
