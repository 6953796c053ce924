use std::fs;
use std::path::Path;
use std::time::SystemTime;

use proptest::prelude::*;

use super::*;
use crate::cache::tests::{image, info};
use crate::cache::{BlobFiles, CacheState, Settings};
use crate::metrics::Metrics;
use crate::ready_map::BootId;
use crate::sync::Arc;
use crate::units::ChunkIndex;

const CHUNK: u64 = 1 << 16;
const CHUNKS: u32 = 8;
const NAMES: [&str; 5] = ["a", "b", "c", "d", "e"];

/// Opens a directory; the thread in the background never has a reason to start.
fn dir(path: &Path, max_bytes: Option<u64>, min_free_percent: u8) -> CacheDir {
    let limits = Limits {
        max_bytes,
        min_free_percent,
    };
    let settings = Settings {
        limits,
        ..Settings::default()
    };
    let dir = CacheDir::open_in_boot(path, settings, BootId::invented(1)).unwrap();
    dir.0.upkeep.running.store(true, Ordering::Relaxed);
    dir
}

fn open(dir: &CacheDir, name: &str) -> BlobFiles {
    let mut info = info(CHUNK * u64::from(CHUNKS));
    info.id = BlobId::new(name).unwrap();
    info.chunk_count = CHUNKS;
    BlobFiles::open(dir, &info, image(1, 0..CHUNKS))
}

fn store(files: &BlobFiles, i: u32) {
    let at = u64::from(i) * CHUNK;
    let bytes = vec![u8::try_from(i).unwrap() + 1; 1 << 16];
    files.store(ChunkIndex::new(i), at, &bytes).unwrap();
}

#[derive(Clone, Copy, Debug)]
enum Op {
    Open(usize),
    Close(usize),
    Store(usize, u32),
    Remove(usize),
    Gc,
    /// All processes end.
    Restart,
}

fn op() -> impl Strategy<Value = Op> {
    let blob = 0..NAMES.len();
    prop_oneof![
        4 => blob.clone().prop_map(Op::Open),
        3 => blob.clone().prop_map(Op::Close),
        8 => (blob.clone(), 0..CHUNKS).prop_map(|(blob, chunk)| Op::Store(blob, chunk)),
        1 => blob.prop_map(Op::Remove),
        3 => Just(Op::Gc),
        1 => Just(Op::Restart),
    ]
}

/// What the model knows about a blob in the directory.
#[derive(Clone, Copy, Debug, Default)]
struct Model {
    ready: [bool; CHUNKS as usize],
    /// When it was opened or closed last.
    used: u64,
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// What is in use stays, the rest goes in the order of its last use, and no
    /// more of it than must.
    #[test]
    fn agrees_with_a_list_of_blobs(
        ops in prop::collection::vec(op(), 0..60),
        max_chunks in 1_u64..20,
    ) {
        let top = tempfile::tempdir().unwrap();
        let max = max_chunks * CHUNK;
        let (mine, other) = (dir(top.path(), Some(max), 0), dir(top.path(), None, 0));
        let mut open_files: Vec<Option<BlobFiles>> = NAMES.iter().map(|_| None).collect();
        let mut model: [Option<Model>; NAMES.len()] = [None; NAMES.len()];
        for (clock, op) in (0..).zip(ops) {
            match op {
                Op::Open(i) => if open_files[i].is_none() {
                    // Some are opened by a process that is not the one that collects.
                    let files = open(if i % 2 == 0 { &mine } else { &other }, NAMES[i]);
                    model[i].get_or_insert_default().used = clock;
                    open_files[i] = Some(files);
                },
                Op::Close(i) => if open_files[i].take().is_some() {
                    model[i].get_or_insert_default().used = clock;
                },
                Op::Store(i, chunk) => if let Some(files) = &open_files[i] {
                    store(files, chunk);
                    model[i].get_or_insert_default().ready[chunk as usize] = true;
                },
                Op::Remove(i) => {
                    let expected = match (&open_files[i], model[i]) {
                        (Some(_), _) => "InUse",
                        (None, Some(_)) => "Removed",
                        (None, None) => "Absent",
                    };
                    let got = mine.remove(&BlobId::new(NAMES[i]).unwrap()).unwrap();
                    prop_assert!(format!("{got:?}").starts_with(expected), "{got:?}");
                    if expected == "Removed" {
                        model[i] = None;
                    }
                }
                Op::Gc => {
                    let sizes = mine.list().unwrap();
                    let size = |name: &str| sizes.iter().find(|blob| blob.name == name).unwrap().bytes;
                    let mut total: u64 = sizes.iter().map(|blob| blob.bytes).sum();
                    let mut idle: Vec<_> = (0..NAMES.len())
                        .filter(|i| model[*i].is_some() && open_files[*i].is_none())
                        .collect();
                    idle.sort_by_key(|i| model[*i].unwrap().used);
                    let mut evicted = 0;
                    for i in idle {
                        if total <= max {
                            break;
                        }
                        total -= size(NAMES[i]);
                        model[i] = None;
                        evicted += 1;
                    }
                    let done = mine.gc().unwrap();
                    prop_assert_eq!(done.blobs, evicted);
                    prop_assert_eq!(done.within_limits, total <= max);
                    prop_assert_eq!(mine.usage().unwrap().bytes, total);
                }
                Op::Restart => for (files, model) in open_files.iter_mut().zip(&mut model) {
                    if files.take().is_some() {
                        model.get_or_insert_default().used = clock;
                    }
                },
            }
            let listed = mine.list().unwrap();
            for (i, name) in NAMES.iter().enumerate() {
                let found = listed.iter().find(|blob| blob.name == *name);
                prop_assert_eq!(found.is_some(), model[i].is_some(), "{}", name);
                let in_use = found.is_some_and(|blob| blob.in_use);
                prop_assert_eq!(in_use, open_files[i].is_some(), "{}", name);
                if let Some(files) = &open_files[i] {
                    let ready = |c| files.is_ready(ChunkIndex::new(c));
                    let all: Vec<_> = (0..CHUNKS).map(ready).collect();
                    prop_assert_eq!(&all[..], &model[i].unwrap().ready[..]);
                }
            }
        }
        // What was evicted and fetched again, or not evicted, holds what the map says.
        for (name, model) in NAMES.iter().zip(model) {
            let files = open(&other, name);
            for chunk in 0..CHUNKS {
                let ready = model.is_some_and(|model| model.ready[chunk as usize]);
                prop_assert_eq!(files.is_ready(ChunkIndex::new(chunk)), ready);
                let mut byte = [0];
                let data = &files.get().unwrap().data;
                let at = u64::from(chunk) * CHUNK + 17;
                std::os::unix::fs::FileExt::read_exact_at(data, &mut byte, at).unwrap();
                prop_assert_eq!(u32::from(byte[0]), if ready { chunk + 1 } else { 0 });
            }
        }
    }
}

#[test]
fn writing_beyond_the_cap_makes_room_by_itself() {
    let top = tempfile::tempdir().unwrap();
    let limits = Limits {
        max_bytes: Some(12 * CHUNK),
        min_free_percent: 0,
    };
    let metrics = Arc::new(Metrics::default());
    let with = |limits| Settings {
        metrics: Arc::clone(&metrics),
        limits,
        ..Settings::default()
    };
    let cache = CacheDir::open_as(top.path(), with(limits)).unwrap();
    for name in NAMES {
        let files = open(&cache, name);
        (0..CHUNKS).for_each(|i| store(&files, i));
    }
    let last = open(&cache, "e");
    let start = Instant::now();
    // What was evicted is counted a moment later.
    let evicted = || metrics.blobs_evicted.load(Ordering::Relaxed);
    while cache.usage().unwrap().bytes > 12 * CHUNK || evicted() < 3 {
        assert!(
            start.elapsed() < Duration::from_secs(20),
            "no room was made"
        );
        store(&last, 0);
        thread::sleep(Duration::from_millis(10));
    }
    assert!(cache.list().unwrap().iter().any(|blob| blob.name == "e"));
    let everything = Limits {
        max_bytes: Some(1),
        min_free_percent: 0,
    };
    let strict = CacheDir::open_as(top.path(), with(everything)).unwrap();
    let start = Instant::now();
    while strict.has_room() {
        assert!(start.elapsed() < Duration::from_secs(20), "not noticed");
        thread::sleep(Duration::from_millis(10));
    }
    assert!(
        !strict.gc().unwrap().within_limits,
        "the last blob is in use"
    );
}

#[test]
fn free_space_is_kept_and_what_others_made_is_left_alone() {
    let top = tempfile::tempdir().unwrap();
    let all_free = dir(top.path(), None, 100);
    let in_use = open(&all_free, "a");
    store(&in_use, 0);
    store(&open(&all_free, "b"), 0);
    for name in [
        "image.boot",
        "c.blob.meta",
        "d.blob.data",
        "d.blob.data.chunk_map",
    ] {
        fs::write(top.path().join(name), b"not ours").unwrap();
    }
    let old = SystemTime::now() - Duration::from_secs(7200);
    for (name, stale) in [
        ("e.blob.data.vouched", true),
        ("f.blob.data.vouched", false),
    ] {
        let file = File::create(top.path().join(name)).unwrap();
        if stale {
            file.set_modified(old).unwrap();
        }
    }
    let tmp = File::create(top.path().join("e.blob.meta.12-0.tmp")).unwrap();
    tmp.set_modified(old).unwrap();
    let done = all_free.gc().unwrap();
    assert_eq!((done.blobs, done.within_limits), (1, false));
    let mut left: Vec<_> = fs::read_dir(top.path())
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    left.sort();
    let expected = [
        "a.blob.data",
        "a.blob.data.chunk_map",
        "a.blob.data.vouched",
        "c.blob.meta",
        "d.blob.data",
        "d.blob.data.chunk_map",
        "f.blob.data.vouched",
        "image.boot",
    ];
    assert_eq!(left, expected);
    assert!(in_use.is_ready(ChunkIndex::new(0)));
    assert!(matches!(in_use.state(), CacheState::Writable));
    let usage = all_free.usage().unwrap();
    assert!(usage.bytes_in_use > CHUNK && usage.disk_free < usage.disk_size);
}
