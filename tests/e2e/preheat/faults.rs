//! Seeds that fail, for a moment or for good.

use support::command::succeed;
use support::proxy::{Fault, Proxy};
use support::registry::Auth;
use support::tokens::TokenServer;

use super::{Stage, ranges, with_seeds};
use crate::scene::assert_fails;

/// An error that a seed reports.
pub(super) fn typed(status: u16, kind: &str) -> Fault {
    Fault::Status(status, vec![("X-Dragonfly-Error-Type", kind.to_owned())])
}

#[test]
fn what_passes_is_tried_again() {
    let stage = Stage::pushed(Auth::Bearer(TokenServer::start().unwrap()));
    for fault in [
        typed(429, "proxy"),
        typed(500, "dfdaemon"),
        typed(503, "backend"),
        typed(401, "backend"),
        typed(200, "backend"),
        Fault::Hangup,
        Fault::CloseAfter(1000),
    ] {
        let seed = stage.seed();
        seed.fail_times(1, "/blobs/", fault.clone());
        let result = succeed(&mut stage.preheat(&[&seed]));
        assert!(result.is_ok(), "{fault:?}: {result:?}");
    }
}

#[test]
fn failures_name_seed_blob_range_and_cause() {
    let stage = Stage::pushed(Auth::Open);
    let [(data, _), _] = stage.layers();
    for (fault, words) in [
        (typed(403, "proxy"), "block list"),
        (typed(507, "dfdaemon"), "disk of the seed is full"),
        (typed(404, "backend"), "no such blob"),
        (typed(200, "backend"), "could not reach the registry"),
        (Fault::Status(200, vec![]), "X-Dragonfly-Task-ID"),
        (Fault::Garble, "wrong bytes"),
        (Fault::Shorten(1000), "1000 bytes announced"),
        (Fault::ResetAfter(1000), "(attempt 4)"),
        (Fault::OtherRange(1), "other bytes than asked for"),
        (Fault::IgnoreRange, "no Content-Range"),
        (Fault::ShiftRange(1), "other bytes than asked for"),
    ] {
        let seed = stage.seed();
        seed.fail(&data, fault.clone());
        let place = format!("seed http://{}: blob {data}, bytes ", seed.host());
        let failed = [
            "cannot preheat",
            "1 of 2 blobs are not there",
            words,
            &place,
        ];
        let case = format!("{fault:?}");
        assert_fails(&case, &mut stage.preheat(&[&seed]), &failed);
        // The rest was not given up.
        let [_, (bootstrap, _)] = stage.layers();
        assert!(!ranges(&seed.requests(), &bootstrap).is_empty());
    }
}

#[test]
fn what_keeps_nothing_is_no_seed() {
    let stage = Stage::pushed(Auth::Open);
    let plain = Proxy::start(stage.registry.host()).unwrap();
    let words = ["no Dragonfly proxy"];
    assert_fails("a plain proxy", &mut stage.preheat(&[&plain]), &words);
    let mut command = stage.command("preheat");
    command.arg(stage.registry.reference("app:1"));
    command.args(["--seed", "http://127.0.0.1:1"]);
    assert_fails("nobody", &mut command, &["127.0.0.1:1", "2 of 2 blobs"]);
    let mut command = stage.command("preheat");
    command.arg(stage.registry.reference("other:1"));
    assert_fails(
        "no image",
        &mut with_seeds(command, &[&plain]),
        &["other", "not found"],
    );
}
