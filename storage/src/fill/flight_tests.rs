//! Single flight with real threads; not part of `flight`, which `model` compiles too.

use std::thread;
use std::time::{Duration, Instant};

use super::flight::*;
use crate::backend::Priority;
use crate::sync::AtomicBool;
use crate::units::ChunkIndex;

fn claim(flights: &Flights, i: u32) -> Option<Claim<'_>> {
    flights
        .claim([ChunkIndex::new(i)], Priority::OnDemand, |_| false)
        .pop()
}

#[test]
fn there_is_one_leader_and_it_may_vanish() {
    let flights = Flights::default();
    let leader = claim(&flights, 1).unwrap();
    assert!(claim(&flights, 1).is_none());
    assert!(claim(&flights, 2).is_some());
    let flight = flights.get(leader.index()).unwrap();
    let stop = AtomicBool::new(false);
    let soon = Instant::now() + Duration::from_millis(20);
    assert!(flight.wait(soon, &stop).is_none(), "the deadline holds");
    let late = Instant::now() + Duration::from_secs(60);
    thread::scope(|scope| {
        let follower = scope.spawn(|| flight.wait(late, &stop));
        let panicking = scope.spawn(move || {
            let _leader = leader;
            panic!("a bug in the leader");
        });
        assert!(panicking.join().is_err());
        assert!(matches!(follower.join().unwrap(), Some(Outcome::Abandoned)));
    });
    assert!(claim(&flights, 1).is_some(), "nothing is left behind");
}

#[test]
fn a_closing_blob_releases_its_waiters() {
    let flights = Flights::default();
    let _leader = claim(&flights, 1).unwrap();
    let flight = flights.get(ChunkIndex::new(1)).unwrap();
    let stop = AtomicBool::new(true);
    let late = Instant::now() + Duration::from_secs(60);
    assert!(flight.wait(late, &stop).is_none());
}
