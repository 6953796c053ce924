//! A few verified chunks in memory, for when the cache cannot be written.
//!
//! Without it, every small read of a large chunk would fetch the chunk again.

use std::collections::VecDeque;

use bytes::Bytes;

use crate::sync::{Mutex, lock};
use crate::units::ChunkIndex;

/// Most bytes kept per blob: two chunks of the largest size.
const MAX_BYTES: usize = 32 << 20;

/// The chunks that were used last.
#[derive(Debug, Default)]
pub(crate) struct Recent(Mutex<VecDeque<(ChunkIndex, Bytes)>>);

impl Recent {
    pub(crate) fn get(&self, index: ChunkIndex) -> Option<Bytes> {
        let mut chunks = lock(&self.0);
        let at = chunks.iter().position(|(i, _)| *i == index)?;
        let found = chunks.remove(at)?;
        let bytes = found.1.clone();
        chunks.push_back(found);
        Some(bytes)
    }

    pub(crate) fn put(&self, index: ChunkIndex, bytes: Bytes) {
        let mut chunks = lock(&self.0);
        chunks.retain(|(i, _)| *i != index);
        chunks.push_back((index, bytes));
        let mut sum: usize = chunks.iter().map(|(_, bytes)| bytes.len()).sum();
        while sum > MAX_BYTES && chunks.len() > 1 {
            sum -= chunks.pop_front().map_or(0, |(_, bytes)| bytes.len());
        }
    }

    /// The chunk has reached the cache file.
    pub(crate) fn forget(&self, index: ChunkIndex) {
        lock(&self.0).retain(|(i, _)| *i != index);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_least_recently_used_go_first() {
        let recent = Recent::default();
        let (a, b, c) = (ChunkIndex::new(1), ChunkIndex::new(2), ChunkIndex::new(3));
        recent.put(a, vec![1; 12 << 20].into());
        recent.put(b, vec![2; 12 << 20].into());
        assert!(recent.get(a).is_some());
        recent.put(c, vec![3; 12 << 20].into());
        assert!(recent.get(b).is_none());
        assert!(recent.get(a).is_some() && recent.get(c).is_some());
        recent.forget(a);
        assert!(recent.get(a).is_none());
    }
}
