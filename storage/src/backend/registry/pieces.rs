//! Which pieces of blobs an agent of Dragonfly is fetching for us, and which it has.
//!
//! A piece is far larger than what a reader wants, so several readers often want parts of
//! one piece at the same time. To the agent each of these requests is another search for
//! other nodes, and searches of one node delay each other. So the first one goes alone;
//! the others wait, and are then answered from the agent's disk.

use std::collections::HashMap;
use std::ops::Range;

use tokio::sync::watch;

use super::dragonfly::PIECE;
use crate::blob_id::BlobId;
use crate::sync::{Mutex, lock};

/// Most pieces that are remembered; then everything is forgotten, which costs a request
/// or two.
const MOST: usize = 1 << 16;

type Place = (BlobId, u64);

#[derive(Debug)]
enum State {
    /// Closed when the request for it has ended.
    Coming(watch::Receiver<()>),
    Here,
}

/// The pieces of one agent.
#[derive(Debug, Default)]
pub(super) struct Pieces(Mutex<HashMap<Place, State>>);

impl Pieces {
    /// Waits until nobody else fetches a piece of this range. The request that follows
    /// has to end before the guard is dropped.
    pub(super) async fn enter(&self, blob: &BlobId, range: Range<u64>) -> Fetching<'_> {
        let mut guard = Fetching {
            pieces: self,
            ours: Vec::new(),
        };
        // Upwards: nobody waits for somebody who waits for him.
        for number in range.start / PIECE..range.end.div_ceil(PIECE) {
            let place = (blob.clone(), number);
            while let Some(mut other) = self.claim(&place, &mut guard) {
                // It never says anything, it ends.
                let _ = other.changed().await;
            }
        }
        guard
    }

    /// Whoever is fetching this piece; `None` if it is here, or now ours to fetch.
    fn claim(&self, place: &Place, guard: &mut Fetching<'_>) -> Option<watch::Receiver<()>> {
        let mut pieces = lock(&self.0);
        if pieces.len() >= MOST {
            pieces.retain(|_, state| matches!(state, State::Coming(_)));
        }
        match pieces.get(place) {
            Some(State::Here) => None,
            Some(State::Coming(ended)) => Some(ended.clone()),
            None => {
                let (sender, receiver) = watch::channel(());
                pieces.insert(place.clone(), State::Coming(receiver));
                guard.ours.push((place.clone(), sender));
                None
            }
        }
    }
}

/// The pieces that a request is the only one for. Dropped without
/// [`Fetching::arrived`], they are for the next one to fetch.
#[derive(Debug)]
pub(super) struct Fetching<'a> {
    pieces: &'a Pieces,
    ours: Vec<(Place, watch::Sender<()>)>,
}

impl Fetching<'_> {
    /// The agent has them.
    pub(super) fn arrived(mut self) {
        let mut pieces = lock(&self.pieces.0);
        for (place, _sender) in self.ours.drain(..) {
            pieces.insert(place, State::Here);
        }
    }
}

impl Drop for Fetching<'_> {
    fn drop(&mut self) {
        let mut pieces = lock(&self.pieces.0);
        for (place, _sender) in self.ours.drain(..) {
            pieces.remove(&place);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::sync::{Arc, AtomicUsize, Ordering};

    fn blob() -> BlobId {
        BlobId::new(&"ab".repeat(32)).unwrap()
    }

    #[tokio::test]
    async fn one_goes_first_and_the_others_follow_together() {
        let blob = blob();
        let pieces = Pieces::default();
        let first = pieces.enter(&blob, 10..20).await;
        // Another piece is nobody's business.
        drop(pieces.enter(&blob, PIECE..PIECE + 1).await);
        let soon = Duration::from_millis(30);
        let wait = tokio::time::timeout(soon, pieces.enter(&blob, PIECE - 1..PIECE + 1));
        assert!(wait.await.is_err());
        first.arrived();
        let (one, two) = (pieces.enter(&blob, 0..9), pieces.enter(&blob, 5..6));
        let both = tokio::time::timeout(Duration::from_secs(5), async { (one.await, two.await) });
        let (one, two) = both.await.unwrap();
        assert!(one.ours.is_empty() && two.ours.is_empty());
    }

    #[tokio::test]
    async fn who_fails_leaves_it_to_the_next() {
        let pieces = Arc::new(Pieces::default());
        let (running, done) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
        let tasks = (0..8_u64).map(|number| {
            let (pieces, running, done) =
                (Arc::clone(&pieces), Arc::clone(&running), Arc::clone(&done));
            tokio::spawn(async move {
                // Some span two pieces, which wait for both.
                let range = number * PIECE / 4..(number + 1) * PIECE / 4 + 1;
                let guard = pieces.enter(&blob(), range).await;
                assert!(running.fetch_add(1, Ordering::SeqCst) < 3);
                tokio::time::sleep(Duration::from_millis(5)).await;
                running.fetch_sub(1, Ordering::SeqCst);
                drop(guard);
                done.fetch_add(1, Ordering::SeqCst);
            })
        });
        let tasks: Vec<_> = tasks.collect();
        for task in tasks {
            tokio::time::timeout(Duration::from_secs(10), task)
                .await
                .unwrap()
                .unwrap();
        }
        assert_eq!(done.load(Ordering::SeqCst), 8);
        assert!(lock(&pieces.0).is_empty());
    }
}
