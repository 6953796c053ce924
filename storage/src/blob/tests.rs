#![allow(
    clippy::panic_in_result_fn,
    reason = "helpers of tests both assert and return what is tested"
)]

mod background;

use std::collections::HashSet;
use std::path::Path;
use std::thread;

use super::*;
use crate::backend::{BackendError, Fetch, ServedBy, Sink, Stop};
use crate::blob_writer::{BlobOptions, BlobWriter, ChunkData, PreparedChunk};
use crate::cache::{CacheDir, Settings};
use crate::metrics::Metrics;
use crate::ready_map::BootId;
use crate::sync::{AtomicU64, Mutex, lock};
use crate::{Compressor, Digest, Digester};

/// Digests as a bootstrap would have them.
#[derive(Debug, Default)]
struct Digests {
    digests: Vec<Digest>,
    offsets: Option<Vec<u64>>,
}

impl ChunkDigests for Digests {
    fn chunk_digest(&self, index: ChunkIndex) -> Option<Digest> {
        self.digests.get(index.as_usize()).copied()
    }

    fn chunk_plain_offset(&self, index: ChunkIndex) -> Option<u64> {
        self.offsets.as_ref()?.get(index.as_usize()).copied()
    }
}

/// What a backend does wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fault {
    Fail,
    WrongBytes,
    /// Delivers half and claims success.
    Short,
    /// Delivers half, then fails.
    Break,
    Panic,
    /// A mirror in front of it delivers wrong bytes.
    LyingMirror,
}

/// A blob in memory that fails on demand.
#[derive(Debug, Default)]
struct Faulty {
    data: Vec<u8>,
    requests: AtomicU64,
    /// Every n-th request fails in this way.
    fault: Mutex<Option<(u64, Fault)>>,
    /// Every byte range that was delivered whole.
    log: Mutex<Vec<Range<u64>>>,
    slow: bool,
    distrusted: AtomicU64,
}

impl Backend for Faulty {
    fn fetch(&self, request: &Fetch<'_>, sink: &mut Sink<'_>) -> Result<(), BackendError> {
        let number = self.requests.fetch_add(1, Ordering::Relaxed) + 1;
        let fault = *lock(&self.fault);
        let fault = fault
            .filter(|(every, _)| number.is_multiple_of(*every))
            .map(|(_, fault)| fault);
        let failed = || BackendError::Transport {
            url: "test".into(),
            action: "failing",
            source: "on purpose".into(),
        };
        let short = || BackendError::Short {
            name: "test".into(),
            offset: request.range.start,
            len: request.range.end - request.range.start,
            got: 0,
        };
        let bytes = slice(&self.data, 0, &request.range).ok_or_else(short)?;
        if self.slow {
            thread::sleep(Duration::from_millis(20));
        }
        let mut bytes = bytes.to_vec();
        match fault {
            Some(Fault::Fail) => return Err(failed()),
            Some(Fault::Panic) => panic!("a bug in the backend"),
            Some(Fault::WrongBytes) => bytes.iter_mut().step_by(1000).for_each(|b| *b ^= 1),
            Some(Fault::Short | Fault::Break) => bytes.truncate(bytes.len() / 2),
            Some(Fault::LyingMirror) if !request.direct => {
                bytes.iter_mut().step_by(1000).for_each(|b| *b ^= 1);
                let served_by = request.served_by.unwrap();
                served_by.set_mirror(0);
            }
            None | Some(Fault::LyingMirror) => lock(&self.log).push(request.range.clone()),
        }
        for piece in bytes.chunks(10_007) {
            sink(piece).map_err(|Stop| BackendError::Stopped)?;
        }
        if fault == Some(Fault::Break) {
            return Err(failed());
        }
        Ok(())
    }

    fn size(&self, _: &BlobId) -> Result<u64, BackendError> {
        Ok(crate::codec::as_u64(self.data.len()))
    }

    fn distrust(&self, _: &BlobId, _: &Range<u64>, served_by: &ServedBy) {
        assert!(served_by.has_mirror(0));
        self.distrusted.fetch_add(1, Ordering::Relaxed);
    }
}

/// A built blob and what it must read as.
struct Sample {
    info: BlobInfo,
    file: Vec<u8>,
    plain: Vec<u8>,
    digests: Arc<Digests>,
    spans: Vec<ChunkSpan>,
}

fn sample(options: BlobOptions, sizes: &[usize]) -> Sample {
    seeded(options, sizes, 1)
}

/// The same with other content.
fn seeded(options: BlobOptions, sizes: &[usize], seed: u64) -> Sample {
    let mut file = Vec::new();
    let mut writer = BlobWriter::new(&mut file, options).unwrap();
    let (mut plain, mut digests, mut spans, mut offsets) =
        (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    for (number, size) in sizes.iter().enumerate() {
        // Half noise, so that it shrinks but stays large.
        let mut state = u64::try_from(number).unwrap() + seed;
        let data: Vec<u8> = (0..*size)
            .map(|i| {
                state = state
                    .wrapping_mul(6_364_136_223_846_793_005)
                    .wrapping_add(1_442_695);
                if i % 2 == 0 {
                    0
                } else {
                    state.to_le_bytes()[6]
                }
            })
            .collect();
        let digest = Digest::of(options.digester, &data);
        let packed = crate::codec::compress(options.compressor, &data).unwrap();
        let size32 = u32::try_from(*size).unwrap();
        let chunk = PreparedChunk {
            digest,
            uncompressed_size: size32,
            crc32c: crc32c::crc32c(&data),
            data: match &packed {
                _ if options.batches(size32, true) => ChunkData::Batched(&data),
                Some(packed) => ChunkData::Compressed(packed),
                None => ChunkData::Raw(&data),
            },
        };
        let stored = writer.append(&chunk).unwrap();
        let start = stored.uncompressed_offset;
        spans.push(ChunkSpan {
            chunk: stored.index,
            plain: start..start + u64::from(size32),
        });
        offsets.push(start);
        digests.push(digest);
        plain.extend_from_slice(&data);
        plain.resize(plain.len().next_multiple_of(4096), 0);
    }
    let finished = writer.finish(|_| Ok(Vec::new())).unwrap();
    Sample {
        info: finished.info.unwrap(),
        file,
        plain,
        digests: Arc::new(Digests {
            digests,
            offsets: Some(offsets),
        }),
        spans,
    }
}

fn zstd() -> BlobOptions {
    BlobOptions {
        chunk_size: 1 << 16,
        ..BlobOptions::default()
    }
}

struct Bench {
    sample: Sample,
    backend: Arc<Faulty>,
    _dir: Option<tempfile::TempDir>,
    cache: CacheDir,
    blob: Arc<Blob>,
}

impl Bench {
    fn new(sample: Sample) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let cache = CacheDir::open(dir.path()).unwrap();
        Self::with(sample, cache, Some(dir))
    }

    fn with(sample: Sample, cache: CacheDir, dir: Option<tempfile::TempDir>) -> Self {
        let backend = Arc::new(Faulty {
            data: sample.file.clone(),
            ..Faulty::default()
        });
        let blob = open(&sample, &cache, &backend);
        Self {
            sample,
            backend,
            _dir: dir,
            cache,
            blob,
        }
    }

    fn set_fault(&self, every: u64, fault: Fault) {
        *lock(&self.backend.fault) = Some((every, fault));
    }

    fn heal(&self) {
        *lock(&self.backend.fault) = None;
    }

    fn requests(&self) -> u64 {
        self.backend.requests.load(Ordering::Relaxed)
    }

    fn size(&self) -> u64 {
        self.sample.info.uncompressed_size
    }

    /// Reads a range and compares it.
    fn check(&self, range: Range<u64>) -> Result<(), ReadError> {
        check(&self.blob, &self.sample, range)
    }
}

fn open(sample: &Sample, cache: &CacheDir, backend: &Arc<Faulty>) -> Arc<Blob> {
    let (backend, digests) = (Arc::clone(backend), Arc::clone(&sample.digests));
    Blob::open(cache, sample.info.clone(), backend, digests).unwrap()
}

fn check(blob: &Blob, sample: &Sample, range: Range<u64>) -> Result<(), ReadError> {
    let expected = slice(&sample.plain, 0, &range).unwrap();
    let mut got = vec![0xaa; expected.len()];
    match blob.read(range.clone(), Priority::OnDemand)? {
        Served::File(file) => file.read_exact_at(&mut got, range.start).unwrap(),
        Served::Memory(bytes) => got.copy_from_slice(&bytes),
    }
    assert!(got == expected, "wrong bytes in {range:?}");
    Ok(())
}

#[test]
fn every_layout_reads_back_exactly() {
    let sizes: Vec<usize> = (0..60)
        .map(|i| [65_536, 1, 4096, 700, 5000, 60_000][i % 6])
        .collect();
    for compressor in [Compressor::Zstd, Compressor::Lz4, Compressor::None] {
        for (batch_size, blob_toc, chunk_info_v2) in [
            (0, false, false),
            (0, true, true),
            (1 << 14, false, true),
            (1 << 16, true, true),
        ] {
            let options = BlobOptions {
                compressor,
                batch_size,
                blob_toc,
                chunk_info_v2,
                ..zstd()
            };
            let bench = Bench::new(sample(options, &sizes));
            // Small reads first, then everything.
            for span in bench.sample.spans.iter().step_by(7) {
                let mut dst = vec![0; usize::try_from(span.plain.end - span.plain.start).unwrap()];
                bench
                    .blob
                    .read_span(span, &mut dst, Priority::OnDemand)
                    .unwrap();
                assert_eq!(dst, slice(&bench.sample.plain, 0, &span.plain).unwrap());
                assert!(bench.blob.is_span_resident(span));
            }
            bench.check(0..bench.size()).unwrap();
            assert!(bench.blob.is_complete());
            let done = bench.requests();
            bench.check(1..bench.size() - 1).unwrap();
            assert_eq!(bench.requests(), done, "resident data needs no request");
            // After a restart nothing is fetched either: not even the table.
            let again = open(&bench.sample, &bench.cache, &bench.backend);
            check(&again, &bench.sample, 0..bench.size()).unwrap();
            assert_eq!(bench.requests(), done);
        }
    }
}

#[test]
fn neighbours_are_fetched_by_one_request_and_a_batch_at_once() {
    let bench = Bench::new(sample(zstd(), &[60_000; 20]));
    bench.check(0..bench.size()).unwrap();
    assert_eq!(bench.requests(), 2, "table, then everything");
    let options = BlobOptions {
        batch_size: 1 << 16,
        chunk_info_v2: true,
        ..zstd()
    };
    let bench = Bench::new(sample(options, &[1000; 60]));
    bench.check(4096..4097).unwrap();
    assert!(bench.blob.resident_chunks() == 60);
    assert_eq!(bench.requests(), 2);
}

#[test]
fn a_table_of_contents_is_checked_and_costs_no_request() {
    let options = BlobOptions {
        blob_toc: true,
        ..zstd()
    };
    let bench = Bench::new(sample(options, &[60_000; 3]));
    bench.check(0..4096).unwrap();
    assert_eq!(bench.requests(), 2);
    // A wrong recorded length is survived, a wrong table is not.
    let mut wrong = sample(options, &[60_000; 3]);
    wrong.info.compressed_size -= 100;
    Bench::new(wrong).check(0..4096).unwrap();
    let mut wrong = sample(options, &[60_000; 3]);
    wrong.info.toc_digest = Digest::of(Digester::Sha256, b"another");
    let bench = Bench::new(wrong);
    assert!(matches!(bench.check(0..4096), Err(ReadError::Table { .. })));
    assert!(!bench.cache.table_path(&bench.sample.info.id).exists());
}

#[test]
fn a_damaged_cached_table_is_fetched_again() {
    let bench = Bench::new(sample(zstd(), &[60_000; 3]));
    bench.check(0..1).unwrap();
    let path = bench.cache.table_path(&bench.sample.info.id);
    let good = std::fs::read(&path).unwrap();
    for bad in [b"short".to_vec(), vec![0; good.len()]] {
        std::fs::write(&path, bad).unwrap();
        let before = bench.requests();
        let again = open(&bench.sample, &bench.cache, &bench.backend);
        assert_eq!(bench.requests(), before, "opening makes no request");
        check(&again, &bench.sample, 0..1).unwrap_or_else(|e| panic!("{e}"));
        assert!(again.ensure(0..bench.size(), Priority::OnDemand).is_ok());
        assert_eq!(std::fs::read(&path).unwrap(), good);
    }
    // One put there by another program is used as it is.
    let other = Bench::new(sample(zstd(), &[60_000; 3]));
    std::fs::write(other.cache.table_path(&other.sample.info.id), good).unwrap();
    let blob = open(&other.sample, &other.cache, &other.backend);
    check(&blob, &other.sample, 0..1).unwrap();
    assert_eq!(other.requests(), 1);
}

#[test]
fn one_fetch_per_chunk_however_many_readers() {
    let sample = sample(zstd(), &[50_000; 40]);
    let dir = tempfile::tempdir().unwrap();
    let cache = CacheDir::open(dir.path()).unwrap();
    let backend = Arc::new(Faulty {
        data: sample.file.clone(),
        slow: true,
        ..Faulty::default()
    });
    let blob = open(&sample, &cache, &backend);
    thread::scope(|scope| {
        for reader in 0..16_u64 {
            let (blob, sample) = (&blob, &sample);
            scope.spawn(move || {
                for step in 0..40_u64 {
                    let start = (step * 7 + reader * 3) % 40 * 53_248;
                    check(blob, sample, start..start + 50_000).unwrap();
                }
            });
        }
    });
    // Not the bytes: a gap that is fetched along may be a chunk of another request.
    let filled = cache.metrics().chunks_filled.load(Ordering::Relaxed);
    assert_eq!(filled, 40, "{:?}", lock(&backend.log));
}

#[test]
fn one_fetch_per_chunk_of_several_processes() {
    let sample = sample(zstd(), &[50_000; 40]);
    let dir = tempfile::tempdir().unwrap();
    let backend = Arc::new(Faulty {
        data: sample.file.clone(),
        slow: true,
        ..Faulty::default()
    });
    // Locks belong to open files: two opens in one process are like two processes.
    let caches = [(); 3].map(|()| CacheDir::open(dir.path()).unwrap());
    let blobs = caches
        .each_ref()
        .map(|cache| open(&sample, cache, &backend));
    thread::scope(|scope| {
        for (reader, blob) in (0_u64..).zip(&blobs) {
            let sample = &sample;
            scope.spawn(move || {
                for step in 0..40_u64 {
                    let start = (step * 7 + reader * 3) % 40 * 53_248;
                    check(blob, sample, start..start + 50_000).unwrap();
                }
            });
        }
    });
    let count = |cache: &CacheDir| cache.metrics().chunks_filled.load(Ordering::Relaxed);
    assert_eq!(caches.iter().map(count).sum::<u64>(), 40);
    // Nothing is fetched twice by the next mount either, and that is counted.
    let cache = CacheDir::open(dir.path()).unwrap();
    let again = open(&sample, &cache, &backend);
    check(&again, &sample, 0..50_000).unwrap();
    assert_eq!(cache.metrics().dedup_hits.load(Ordering::Relaxed), 40);
    assert_eq!(count(&cache), 0);
}

#[test]
fn memory_of_all_readers_together_is_bounded() {
    let sample = sample(zstd(), &[60_000; 40]);
    let dir = tempfile::tempdir().unwrap();
    let settings = Settings {
        // One chunk at a time, at most.
        memory: crate::budget::Budget::new(100_000),
        ..Settings::default()
    };
    let cache = CacheDir::open_as(dir.path(), settings).unwrap();
    let backend = Arc::new(Faulty {
        data: sample.file.clone(),
        ..Faulty::default()
    });
    let blob = open(&sample, &cache, &backend);
    thread::scope(|scope| {
        for reader in 0..8_u64 {
            let (blob, sample) = (&blob, &sample);
            scope.spawn(move || {
                for step in 0..40_u64 {
                    let start = (step * 7 + reader * 5) % 40 * 61_440;
                    check(blob, sample, start..start + 60_000).unwrap();
                }
            });
        }
        while !blob.is_complete() {
            assert!(cache.memory().used() <= 100_000);
            thread::yield_now();
        }
    });
}

#[test]
fn a_process_that_stops_in_the_middle_of_a_fetch_holds_nobody_up_for_long() {
    let bench = Bench::new(sample(zstd(), &[60_000; 3]));
    bench.check(0..1).unwrap();
    let file = File::options()
        .read(true)
        .write(true)
        .open(bench.blob.data_path())
        .unwrap();
    // The lock of chunk 1, as another process would hold it.
    let stopped = libc::flock {
        l_type: i16::try_from(libc::F_WRLCK).unwrap(),
        l_whence: 0,
        l_start: 1,
        l_len: 1,
        l_pid: 0,
    };
    nix::fcntl::fcntl(&file, nix::fcntl::FcntlArg::F_OFD_SETLK(&stopped)).unwrap();
    let start = Instant::now();
    bench.check(0..bench.size()).unwrap();
    let waited = start.elapsed();
    assert!(waited > Duration::from_secs(1), "{waited:?}");
    assert!(waited < Duration::from_secs(9), "{waited:?}");
    assert!(bench.blob.is_complete());
}

#[test]
fn faults_give_errors_or_right_bytes_and_leave_nothing_behind() {
    let sizes: Vec<usize> = (0..60).map(|i| 1000 + i * 1000).collect();
    for fault in [
        Fault::Fail,
        Fault::WrongBytes,
        Fault::Short,
        Fault::Break,
        Fault::Panic,
    ] {
        let bench = Bench::new(sample(zstd(), &sizes));
        bench.check(0..1).unwrap();
        bench.set_fault(2, fault);
        let hook = std::panic::take_hook();
        std::panic::set_hook(Box::new(|_| ()));
        let failures: usize = thread::scope(|scope| {
            let readers: Vec<_> = (0..8_u64)
                .map(|reader| {
                    let bench = &bench;
                    scope.spawn(move || {
                        (0..60_u64)
                            .filter(|step| {
                                let start = (step * 13 + reader * 5) % 60 * 4096 * 8;
                                let end = (start + 40_000).min(bench.size());
                                let read = || bench.check(start..end);
                                let read = std::panic::AssertUnwindSafe(read);
                                !matches!(std::panic::catch_unwind(read), Ok(Ok(())))
                            })
                            .count()
                    })
                })
                .collect();
            readers
                .into_iter()
                .map(|reader| reader.join().unwrap())
                .sum()
        });
        std::panic::set_hook(hook);
        assert!(failures > 0, "{fault:?} was not met");
        bench.heal();
        bench.check(0..bench.size()).unwrap();
        assert!(bench.blob.is_complete());
    }
}

#[test]
fn wrong_bytes_of_a_mirror_cost_a_second_request_and_nothing_else() {
    let sizes: Vec<usize> = (0..60).map(|i| 1000 + i * 1000).collect();
    let bench = Bench::new(sample(zstd(), &sizes));
    // All of them, the chunk table's included.
    bench.set_fault(1, Fault::LyingMirror);
    bench.check(0..bench.size()).unwrap();
    assert!(bench.blob.is_complete());
    let distrusted = bench.backend.distrusted.load(Ordering::Relaxed);
    assert!(distrusted > 1, "{distrusted}");
    let failures = bench
        .cache
        .metrics()
        .verify_failures
        .load(Ordering::Relaxed);
    assert!(failures > 0);
}

#[test]
fn a_failure_stays_with_the_chunk_it_concerns() {
    // One chunk in the middle is damaged in the blob itself.
    let mut damaged = sample(zstd(), &[60_000; 9]);
    let at = damaged.file.len() / 2;
    let meta_start = usize::try_from(damaged.info.meta.offset).unwrap();
    assert!(at < meta_start);
    damaged.file[meta_start * 4 / 9 + 500] ^= 0xff;
    let bench = Bench::new(damaged);
    let error = bench.check(0..bench.size()).unwrap_err();
    assert!(
        matches!(error, ReadError::Decode { .. } | ReadError::Digest { .. }),
        "{error}"
    );
    assert_eq!(bench.blob.resident_chunks(), 8);
    // The end of the blob is missing: what is before it can be read.
    let mut truncated = sample(zstd(), &[60_000; 9]);
    let table = truncated.file.split_off(meta_start);
    truncated.file.truncate(meta_start - 1);
    let bench = Bench::new(truncated);
    std::fs::write(bench.cache.table_path(&bench.sample.info.id), {
        let mut cct = Vec::new();
        crate::format::stored_table::write_cache_form(&bench.sample.info, &table, &mut cct)
            .unwrap();
        cct
    })
    .unwrap();
    let blob = open(&bench.sample, &bench.cache, &bench.backend);
    assert!(matches!(
        check(&blob, &bench.sample, 0..bench.size()),
        Err(ReadError::Fetch { .. })
    ));
    assert_eq!(blob.resident_chunks(), 8);
}

#[test]
fn what_the_image_does_not_vouch_for_is_not_served() {
    let mut bench = Bench::new(sample(zstd(), &[60_000; 3]));
    bench.check(0..1).unwrap();
    let span = ChunkSpan {
        chunk: ChunkIndex::new(0),
        plain: 61_440..61_441,
    };
    assert!(!bench.blob.is_span_resident(&span));
    let error = bench
        .blob
        .read_span(&span, &mut [0], Priority::OnDemand)
        .unwrap_err();
    assert!(matches!(error, ReadError::Mismatch { .. }), "{error}");
    let span = ChunkSpan {
        chunk: ChunkIndex::new(3),
        plain: 0..1,
    };
    assert!(matches!(
        bench.blob.ensure_spans(&[span], Priority::OnDemand),
        Err(ReadError::Table { .. })
    ));
    let beyond = bench.size()..bench.size() + 1;
    assert!(matches!(
        bench.blob.read(beyond, Priority::OnDemand),
        Err(ReadError::OutOfRange { .. })
    ));

    let digests = bench.sample.digests.digests.clone();
    let offsets = Some(vec![0, 0, 0]);
    bench.sample.digests = Arc::new(Digests {
        digests: digests.clone(),
        offsets,
    });
    let blob = open(&bench.sample, &bench.cache, &bench.backend);
    let error = check(&blob, &bench.sample, 61_440..61_441).unwrap_err();
    assert!(matches!(error, ReadError::Mismatch { .. }), "{error}");
    bench.sample.digests = Arc::new(Digests {
        digests: digests[..1].to_vec(),
        offsets: None,
    });
    let blob = open(&bench.sample, &bench.cache, &bench.backend);
    let error = check(&blob, &bench.sample, 61_440..61_441).unwrap_err();
    assert!(matches!(error, ReadError::NoDigest { .. }), "{error}");
}

#[test]
fn chunks_that_no_file_refers_to_are_left_out() {
    let options = BlobOptions {
        batch_size: 1 << 16,
        chunk_info_v2: true,
        ..zstd()
    };
    let mut merged = sample(options, &[1000, 60_000, 2000, 3000, 60_000, 60_000]);
    let first_four = &merged.digests.digests[..4];
    merged.digests = Arc::new(Digests {
        digests: first_four.to_vec(),
        offsets: None,
    });
    let bench = Bench::new(merged);
    bench
        .blob
        .ensure(0..bench.size(), Priority::Prefetch)
        .unwrap();
    assert_eq!(bench.blob.resident_chunks(), 4);
    let requests = bench.requests();
    bench
        .blob
        .ensure(0..bench.size(), Priority::OnDemand)
        .unwrap();
    let last = bench.sample.spans[5].plain.clone();
    let error = bench.check(last).unwrap_err();
    assert!(matches!(error, ReadError::NoDigest { .. }), "{error}");
    assert_eq!(
        bench.requests(),
        requests,
        "what cannot be verified is not fetched"
    );
    let failures = bench
        .cache
        .metrics()
        .verify_failures
        .load(Ordering::Relaxed);
    assert_eq!(failures, 0);
}

#[test]
fn after_a_reboot_good_chunks_are_believed_and_lost_ones_fetched() {
    let sample = sample(zstd(), &[60_000; 8]);
    let dir = tempfile::tempdir().unwrap();
    let in_boot = |boot| {
        CacheDir::open_in_boot(dir.path(), Settings::default(), BootId::invented(boot)).unwrap()
    };
    let backend = Arc::new(Faulty {
        data: sample.file.clone(),
        ..Faulty::default()
    });
    let size = sample.info.uncompressed_size;
    // Still open when the machine stops: nobody says that it is all on the disk.
    let open_at_the_end = open(&sample, &in_boot(1), &backend);
    check(&open_at_the_end, &sample, 0..size).unwrap();
    let lost = &sample.spans[5].plain;
    let path = in_boot(1).data_path(&sample.info.id);
    let file = File::options().write(true).open(path).unwrap();
    file.write_all_at(&[0; 4096], lost.start).unwrap();
    let before = backend.requests.load(Ordering::Relaxed);
    let cache = in_boot(2);
    let blob = open(&sample, &cache, &backend);
    assert!(!blob.is_resident(0..1), "nothing is believed unchecked");
    check(&blob, &sample, 0..size).unwrap();
    assert_eq!(
        backend.requests.load(Ordering::Relaxed),
        before + 1,
        "only the lost chunk"
    );
    let count = |name| {
        let all = cache.metrics().snapshot();
        all.into_iter()
            .find(|(metric, _)| metric.name == name)
            .unwrap()
            .1
    };
    assert_eq!(count("cache.chunks_rechecked"), 7);
    assert_eq!(count("cache.recheck_failures"), 1);
}

/// A small file system of its own, unmounted when dropped.
struct Tmpfs(tempfile::TempDir);

impl Tmpfs {
    fn new(size: &str) -> Self {
        use nix::mount::{MsFlags, mount};
        let dir = tempfile::tempdir().unwrap();
        let options = format!("size={size}");
        mount(
            Some("tmpfs"),
            dir.path(),
            Some("tmpfs"),
            MsFlags::empty(),
            Some(options.as_str()),
        )
        .expect("these tests mount a tmpfs: run them as root");
        Self(dir)
    }

    fn remount(&self, flags: nix::mount::MsFlags, options: &str) {
        use nix::mount::{MsFlags, mount};
        let flags = flags | MsFlags::MS_REMOUNT;
        mount(
            None::<&Path>,
            self.0.path(),
            None::<&Path>,
            flags,
            Some(options),
        )
        .unwrap();
    }
}

impl Drop for Tmpfs {
    fn drop(&mut self) {
        let _ = nix::mount::umount2(self.0.path(), nix::mount::MntFlags::MNT_DETACH);
    }
}

#[test]
fn a_full_disk_is_survived_and_used_again_when_it_has_room() {
    let disk = Tmpfs::new("256k");
    let metrics = Arc::new(Metrics::default());
    let cache = CacheDir::open_with(disk.0.path(), Arc::clone(&metrics)).unwrap();
    let bench = Bench::with(sample(zstd(), &[60_000; 20]), cache, None);
    bench.check(0..bench.size()).unwrap();
    assert!(matches!(
        bench.blob.cache_state(),
        CacheState::Unwritable(_)
    ));
    let error = bench
        .blob
        .ensure(0..bench.size(), Priority::OnDemand)
        .unwrap_err();
    assert!(matches!(error, ReadError::Cache { .. }), "{error}");
    assert!((1..20).contains(&bench.blob.resident_chunks()));
    // A small read of a large chunk does not fetch it every time.
    let last = bench.size() - 4096;
    bench.check(last..last + 1).unwrap();
    let before = bench.requests();
    bench.check(last + 5..last + 9).unwrap();
    assert_eq!(bench.requests(), before);
    disk.remount(nix::mount::MsFlags::empty(), "size=4m");
    bench.check(0..bench.size()).unwrap();
    assert!(bench.blob.is_complete());
    assert!(matches!(bench.blob.cache_state(), CacheState::Writable));
}

#[test]
fn a_read_only_directory_is_survived_and_used_again_when_it_can_be() {
    let disk = Tmpfs::new("4m");
    disk.remount(nix::mount::MsFlags::MS_RDONLY, "size=4m");
    let cache = CacheDir::open(disk.0.path()).unwrap();
    let bench = Bench::with(sample(zstd(), &[60_000; 5]), cache, None);
    let spans: HashSet<usize> = [0, 3].into();
    for span in spans.iter().map(|i| &bench.sample.spans[*i]) {
        let mut dst = vec![0; 60_000];
        bench
            .blob
            .read_span(span, &mut dst, Priority::OnDemand)
            .unwrap();
        assert_eq!(dst, slice(&bench.sample.plain, 0, &span.plain).unwrap());
    }
    bench.check(0..bench.size()).unwrap();
    let CacheState::Unwritable(error) = bench.blob.cache_state() else {
        panic!("not noticed")
    };
    assert_eq!(error.source.raw_os_error(), Some(libc::EROFS));
    disk.remount(nix::mount::MsFlags::empty(), "size=4m");
    let start = Instant::now();
    while bench
        .blob
        .ensure(0..bench.size(), Priority::OnDemand)
        .is_err()
    {
        assert!(
            start.elapsed() < Duration::from_secs(10),
            "does not recover"
        );
        thread::sleep(Duration::from_millis(100));
    }
    bench.check(0..bench.size()).unwrap();
    assert!(bench.blob.is_complete());
}

#[test]
fn a_closed_blob_serves_what_it_has() {
    let bench = Bench::new(sample(zstd(), &[60_000; 3]));
    bench.check(0..1).unwrap();
    bench.blob.close();
    bench.check(0..1).unwrap();
    assert!(matches!(
        bench.check(0..bench.size()),
        Err(ReadError::Stopped { .. })
    ));
}

#[test]
fn a_shortened_data_file_is_noticed_and_replaced() {
    let bench = Bench::new(sample(zstd(), &[60_000; 3]));
    bench.check(0..bench.size()).unwrap();
    bench.blob.cache_file().unwrap().set_len(4096).unwrap();
    let mut bytes = vec![0; 60_000];
    let span = &bench.sample.spans[2];
    bench
        .blob
        .read_span(span, &mut bytes, Priority::OnDemand)
        .unwrap();
    assert_eq!(bytes, slice(&bench.sample.plain, 0, &span.plain).unwrap());
    assert!(!bench.blob.is_complete());
    let start = Instant::now();
    while !bench.blob.is_complete() {
        bench.check(0..bench.size()).unwrap();
        assert!(start.elapsed() < Duration::from_secs(10), "does not heal");
        thread::sleep(Duration::from_millis(50));
    }
    let length = std::fs::metadata(bench.blob.data_path()).unwrap().len();
    assert_eq!(length, bench.size());
}

#[test]
fn an_image_with_another_digest_gets_bytes_of_its_own() {
    let good = sample(zstd(), &[60_000; 3]);
    let dir = tempfile::tempdir().unwrap();
    let cache = CacheDir::open(dir.path()).unwrap();
    // The same name, other bytes, and digests that fit those.
    let mut other = seeded(zstd(), &[60_000; 3], 77);
    other.info.id = good.info.id.clone();
    let backend = |sample: &Sample| {
        Arc::new(Faulty {
            data: sample.file.clone(),
            ..Faulty::default()
        })
    };
    let size = good.info.uncompressed_size;
    let first = open(&other, &cache, &backend(&other));
    check(&first, &other, 0..size).unwrap();
    let second = open(&good, &cache, &backend(&good));
    check(&second, &good, 0..size).unwrap();
    check(&first, &other, 0..size).unwrap();
    assert!(first.is_complete() && second.is_complete());
    assert_ne!(first.data_path(), second.data_path());
}
