//! A registry that is well but for one request in so many, which hangs: readers must
//! not notice.

use std::sync::Arc;
use std::time::{Duration, Instant};

use storage::backend::registry::{RegistryBackend, RegistryConfig, Scheme};
use storage::backend::{Fetch, Priority, fetch_to_vec};
use storage::metrics::Metrics;
use support::blob::{Random, SampleBlob};
use support::proxy::{Fault, Proxy};
use support::registry::{Auth, Registry};

use crate::scene::Scene;

/// One request in so many hangs for so long.
const ONE_IN: u32 = 25;
const HANG: Duration = Duration::from_secs(4);
const READS: u64 = 400;

#[test]
fn requests_that_hang_are_made_again() {
    let scene = Scene::new();
    let registry = Registry::start(Auth::Open).unwrap();
    let sample = SampleBlob::new(32, 7).unwrap();
    let file = scene.path("blob");
    std::fs::write(&file, &sample.file).unwrap();
    registry.push_blob("hedge", &file).unwrap();
    let proxy = Proxy::start(registry.host()).unwrap();
    let mut config = RegistryConfig::new(proxy.host(), "hedge");
    config.scheme = Scheme::Http;
    let metrics = Arc::<Metrics>::default();
    let backend = RegistryBackend::with_metrics(config, Arc::clone(&metrics)).unwrap();
    let mut random = Random(1);
    let mut read = || {
        let start = random.below(1 << 20);
        let range = start..start + 1 + random.below(1 << 18);
        let request = Fetch {
            blob: &sample.info.id,
            range: range.clone(),
            priority: Priority::OnDemand,
            served_by: None,
            direct: false,
            blob_len: None,
        };
        let began = Instant::now();
        let got = fetch_to_vec(&backend, &request, 1 << 20).unwrap();
        let part = usize::try_from(range.start).unwrap()..usize::try_from(range.end).unwrap();
        assert!(got == sample.file[part], "wrong bytes in {range:?}");
        began.elapsed()
    };
    // So that it is known how long an answer takes.
    assert!((0..40).map(|_| read()).max() < Some(HANG / 2));
    proxy.fail_one_in(ONE_IN, "/blobs/", Fault::Stall(HANG));
    let before = proxy.requests().len();
    let times: Vec<_> = (0..READS).map(|_| read()).collect();
    let slow = times.iter().filter(|time| **time > HANG / 2).count();
    let made = u64::try_from(proxy.requests().len() - before).unwrap();
    let count = |name| {
        let all = metrics.snapshot();
        all.iter()
            .find(|(metric, _)| metric.name == name)
            .unwrap()
            .1
    };
    let (hedges, won) = (count("backend.hedges"), count("backend.hedges_won"));
    println!("{slow} slow reads, {made} requests for {READS} reads, {hedges} hedges, {won} won");
    // Sixteen requests hang. On a busy machine some hedges are spent on others.
    assert!(slow <= 2, "{slow} reads waited");
    assert!(won >= 12, "{won} of {hedges} hedges won");
    // 5 %, and what was saved up before.
    assert!(made <= READS + READS / 20 + 4, "{made} requests");
}
