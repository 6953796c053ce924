//! Readers of a blob behind a registry that fails by chance, in every way there is.
//!
//! Whatever it does: no wrong byte is ever served, no reader hangs, and once it is
//! well again so is every read. A short run is part of the tests; `make soak` makes
//! the long one, with the number of failures in `NYDUS_SOAK` and, to repeat a run,
//! the seed in `NYDUS_SOAK_SEED`.

use std::os::unix::fs::FileExt as _;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use storage::backend::registry::{RegistryBackend, RegistryConfig, Scheme};
use storage::backend::{Backend, Priority};
use storage::blob::{Blob, Served};
use storage::cache::CacheDir;
use support::blob::{Random, SampleBlob};
use support::proxy::Proxy;
use support::proxy::chaos::Chaos;
use support::registry::{Auth, Registry};

use crate::scene::Scene;

const READERS: usize = 16;
/// 8 MiB, so that a cold cache makes some ten requests.
const CHUNKS: usize = 128;
/// Failures of the short run.
const FAILURES: u64 = 400;
/// Of 100 requests.
const PERCENT: u64 = 60;
/// No read may take longer, whatever the registry does.
const LIMIT: Duration = Duration::from_secs(30);
/// And none may fail this long after it is well again.
const HEALED: Duration = Duration::from_secs(5);

/// The blob behind the proxy, seen through a cache that is thrown away now and then.
struct Soak {
    sample: SampleBlob,
    backend: Arc<dyn Backend>,
    scene: Scene,
    blob: Mutex<Arc<Blob>>,
    caches: AtomicU64,
    reads: AtomicU64,
    errors: AtomicU64,
    done: AtomicBool,
    /// When each reader began what it is doing, in milliseconds since the start.
    began: Vec<AtomicU64>,
    start: Instant,
}

impl Soak {
    /// A new, empty cache for the same blob.
    fn cold(&self) -> Arc<Blob> {
        let number = self.caches.fetch_add(1, Ordering::Relaxed);
        let cache = CacheDir::open(&self.scene.dir(&format!("cache{number}"))).unwrap();
        // Nobody opens this one any more; its files stay open as long as they are used.
        if let Some(old) = number.checked_sub(3) {
            let _ = std::fs::remove_dir_all(self.scene.path(&format!("cache{old}")));
        }
        open(&self.sample, &cache, &self.backend)
    }

    fn elapsed(&self) -> u64 {
        u64::try_from(self.start.elapsed().as_millis()).unwrap()
    }

    /// Reads a range by chance; whether it succeeded. Wrong bytes end the test.
    fn read(&self, random: &mut Random) -> bool {
        let blob = Arc::clone(&self.blob.lock().unwrap());
        let size = u64::try_from(self.sample.plain.len()).unwrap();
        let start = random.below(size);
        let end = size.min(start + 1 + random.below(300_000));
        let from = usize::try_from(start).unwrap();
        let mut got = vec![0x5a; usize::try_from(end - start).unwrap()];
        self.reads.fetch_add(1, Ordering::Relaxed);
        match blob.read(start..end, Priority::OnDemand) {
            Ok(Served::File(file)) => file.read_exact_at(&mut got, start).unwrap(),
            Ok(Served::Memory(bytes)) => got.copy_from_slice(&bytes),
            Err(_) => {
                self.errors.fetch_add(1, Ordering::Relaxed);
                return false;
            }
        }
        assert!(
            got == self.sample.plain[from..from + got.len()],
            "wrong bytes in {start}..{end}"
        );
        if blob.is_complete() {
            let mut current = self.blob.lock().unwrap();
            if Arc::ptr_eq(&current, &blob) {
                *current = self.cold();
            }
        }
        true
    }

    fn reader(&self, number: usize, seed: u64) {
        let mut random = Random(seed + u64::try_from(number).unwrap());
        while !self.done.load(Ordering::Relaxed) {
            self.began[number].store(self.elapsed(), Ordering::Relaxed);
            self.read(&mut random);
        }
        self.began[number].store(u64::MAX, Ordering::Relaxed);
    }

    fn assert_nobody_hangs(&self, seed: u64) {
        for (number, began) in self.began.iter().enumerate() {
            let began = Duration::from_millis(began.load(Ordering::Relaxed));
            let stuck = began.saturating_add(LIMIT) < self.start.elapsed();
            assert!(!stuck, "seed {seed}: reader {number} is stuck");
        }
    }
}

/// Ends the readers, also when the test fails.
struct EndOf<'a>(&'a Soak);

impl Drop for EndOf<'_> {
    fn drop(&mut self) {
        self.0.done.store(true, Ordering::Relaxed);
    }
}

fn open(sample: &SampleBlob, cache: &CacheDir, backend: &Arc<dyn Backend>) -> Arc<Blob> {
    let (backend, digests) = (Arc::clone(backend), sample.digests.clone());
    Blob::open(cache, sample.info.clone(), backend, digests).unwrap()
}

fn number_from(variable: &str, default: u64) -> u64 {
    match std::env::var(variable) {
        Ok(text) => text.parse().unwrap(),
        Err(_) => default,
    }
}

#[test]
fn readers_survive_whatever_a_registry_does() {
    let failures = number_from("NYDUS_SOAK", FAILURES);
    let seed = number_from("NYDUS_SOAK_SEED", 1);
    let scene = Scene::new();
    let registry = Registry::start(Auth::Open).unwrap();
    let sample = SampleBlob::new(CHUNKS, 42).unwrap();
    let file = scene.path("blob");
    std::fs::write(&file, &sample.file).unwrap();
    let digest = registry.push_blob("soak", &file).unwrap();
    assert_eq!(digest, format!("sha256:{}", sample.info.id));
    let proxy = Proxy::start(registry.host()).unwrap();
    let mut config = RegistryConfig::new(proxy.host(), "soak");
    config.scheme = Scheme::Http;
    config.timeouts.connect = Duration::from_secs(1);
    config.timeouts.read = Duration::from_millis(400);
    config.timeouts.total = Duration::from_secs(10);
    config.retry.first_delay = Duration::from_millis(5);
    config.retry.max_delay = Duration::from_millis(200);
    let backend: Arc<dyn Backend> = Arc::new(RegistryBackend::new(config).unwrap());
    let cache = CacheDir::open(&scene.dir("first")).unwrap();
    let soak = Arc::new(Soak {
        blob: Mutex::new(open(&sample, &cache, &backend)),
        sample,
        backend,
        scene,
        caches: AtomicU64::new(0),
        reads: AtomicU64::new(0),
        errors: AtomicU64::new(0),
        done: AtomicBool::new(false),
        began: (0..READERS).map(|_| AtomicU64::new(0)).collect(),
        start: Instant::now(),
    });
    proxy.run(Chaos::new(seed, PERCENT));

    // Not scoped: a test that fails because one of them hangs must not wait for it.
    let readers: Vec<_> = (0..READERS)
        .map(|number| {
            let soak = Arc::clone(&soak);
            thread::spawn(move || soak.reader(number, seed))
        })
        .collect();
    let end = EndOf(&soak);
    let finished = || readers.iter().any(thread::JoinHandle::is_finished);
    while proxy.failed() < failures && !finished() {
        thread::sleep(Duration::from_millis(50));
        soak.assert_nobody_hangs(seed);
    }
    proxy.heal();
    let healed = Instant::now();
    while healed.elapsed() < HEALED && !finished() {
        thread::sleep(Duration::from_millis(50));
        soak.assert_nobody_hangs(seed);
    }
    // Errors count only after the time allowed; what is read then is all cold.
    let before = soak.errors.load(Ordering::Relaxed);
    *soak.blob.lock().unwrap() = soak.cold();
    thread::sleep(Duration::from_secs(1));
    let late = soak.errors.load(Ordering::Relaxed) - before;
    drop(end);
    while !readers.iter().all(thread::JoinHandle::is_finished) {
        thread::sleep(Duration::from_millis(20));
        soak.assert_nobody_hangs(seed);
    }
    for reader in readers {
        // Its panic says which bytes are wrong.
        reader.join().unwrap();
    }
    assert_eq!(late, 0, "seed {seed}: reads fail although all is well");
    let count = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
    let (reads, errors) = (count(&soak.reads), count(&soak.errors));
    println!(
        "soak: seed {seed}, {} requests failed, {reads} reads, {errors} of them failed, \
         {} caches, {:?}",
        proxy.failed(),
        count(&soak.caches),
        soak.start.elapsed(),
    );
    assert!(reads > errors);
}
