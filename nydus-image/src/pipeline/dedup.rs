//! Which chunk contents a layer has met already.
//!
//! Workers ask it to decide who compresses a chunk; the sequencer records where
//! the chunk was stored. Sharded, because every chunk of every worker passes here.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::sync::{Mutex, MutexGuard, PoisonError};

use storage::Digest;

const SHARDS: usize = 16;

/// The known contents of one layer.
#[derive(Debug, Default)]
pub(crate) struct Dedup {
    /// Digest to position in the sequencer's list of chunks, once it is stored.
    shards: [Mutex<HashMap<Digest, Option<u32>>>; SHARDS],
}

impl Dedup {
    /// Whether the caller is the first to ask for `digest`, and so has to compress it.
    pub(crate) fn claim(&self, digest: &Digest) -> bool {
        match self.shard(digest).entry(*digest) {
            Entry::Occupied(_) => false,
            Entry::Vacant(vacant) => {
                vacant.insert(None);
                true
            }
        }
    }

    /// Where a chunk with this content was stored.
    pub(crate) fn stored(&self, digest: &Digest) -> Option<u32> {
        self.shard(digest).get(digest).copied().flatten()
    }

    /// Records where the chunk is.
    pub(crate) fn store(&self, digest: Digest, chunk: u32) {
        self.shard(&digest).insert(digest, Some(chunk));
    }

    fn shard(&self, digest: &Digest) -> MutexGuard<'_, HashMap<Digest, Option<u32>>> {
        let shard = usize::from(digest.as_bytes()[0]) % SHARDS;
        self.shards[shard]
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}
