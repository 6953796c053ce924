use std::os::unix::fs::PermissionsExt as _;

use super::files::*;
use super::*;
use crate::blob_info::{BlobFeatures, BlobInfo, MetaLocation};
use crate::digest::ChunkDigests;
use crate::units::ChunkIndex;
use crate::{Compressor, Digest, Digester};
use std::fs::File;

pub(super) fn info(size: u64) -> BlobInfo {
    BlobInfo {
        id: BlobId::new("blob").unwrap(),
        chunk_size: 4096,
        chunk_count: 3,
        compressor: Compressor::None,
        digester: Digester::Blake3,
        features: BlobFeatures::ALIGNED,
        compressed_size: size,
        uncompressed_size: size,
        meta: MetaLocation::default(),
        toc_size: 0,
        toc_digest: Digest::default(),
        meta_blob_digest: Digest::default(),
        meta_blob_size: 0,
    }
}

/// An image that says `seed` about every chunk it knows.
pub(super) struct Says {
    seed: u8,
    knows: std::ops::Range<u32>,
    shift: u64,
}

impl ChunkDigests for Says {
    fn chunk_digest(&self, index: ChunkIndex) -> Option<Digest> {
        self.knows
            .contains(&index.get())
            .then_some(Digest::from_bytes([self.seed; 32]))
    }

    fn chunk_plain_offset(&self, index: ChunkIndex) -> Option<u64> {
        self.chunk_digest(index)?;
        Some(u64::from(index.get()) * 4096 + self.shift)
    }
}

pub(super) fn image(seed: u8, knows: std::ops::Range<u32>) -> Arc<Says> {
    let shift = 0;
    Arc::new(Says { seed, knows, shift })
}

fn open(dir: &CacheDir, size: u64) -> BlobFiles {
    BlobFiles::open(dir, &info(size), image(1, 0..3))
}

fn c(i: u32) -> ChunkIndex {
    ChunkIndex::new(i)
}

#[test]
fn the_directory_is_private_and_may_be_missing() {
    let top = tempfile::tempdir().unwrap();
    let path = top.path().join("a/b");
    let dir = CacheDir::open(&path).unwrap();
    let mode = fs::metadata(dir.path()).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o700);
    let file = top.path().join("file");
    fs::write(&file, b"").unwrap();
    let error = CacheDir::open(&file).unwrap_err();
    assert_eq!(error.path, file);
}

#[test]
fn a_deleted_or_short_data_file_voids_its_map() {
    let top = tempfile::tempdir().unwrap();
    let dir = CacheDir::open(top.path()).unwrap();
    let data = dir.data_path(&info(0).id);
    let damage: [fn(&Path); 3] = [
        |data| fs::remove_file(data).unwrap(),
        |data| {
            File::options()
                .write(true)
                .open(data)
                .unwrap()
                .set_len(4096)
                .unwrap()
        },
        |data| {
            File::options()
                .write(true)
                .open(data)
                .unwrap()
                .set_len(99999)
                .unwrap()
        },
    ];
    for damage in damage {
        let files = open(&dir, 3 * 4096);
        files.store(c(1), 4096, &[7; 4096]).unwrap();
        assert!(open(&dir, 3 * 4096).is_ready(c(1)));
        damage(&data);
        let again = open(&dir, 3 * 4096);
        assert!(again.get().is_some() && !again.is_ready(c(1)));
        assert_eq!(fs::metadata(&data).unwrap().len(), 3 * 4096);
        assert!(files.is_ready(c(1)), "open files are not touched");
    }
}

#[test]
fn what_cannot_be_opened_is_reported_and_opened_later() {
    let top = tempfile::tempdir().unwrap();
    let dir = CacheDir::open(top.path()).unwrap();
    let data = dir.data_path(&info(0).id);
    fs::create_dir(&data).unwrap();
    let files = open(&dir, 4096);
    assert!(files.store(c(0), 0, &[1; 4096]).is_err());
    let CacheState::Unwritable(error) = files.state() else {
        panic!("not noticed")
    };
    assert_eq!(error.path, data);
    assert_eq!(dir.metrics().unwritable.load(Ordering::Relaxed), 1);
    fs::remove_dir(&data).unwrap();
    files.retry_now();
    files.store(c(0), 0, &[1; 4096]).unwrap();
    assert!(files.is_ready(c(0)) && matches!(files.state(), CacheState::Writable));
    assert_eq!(dir.metrics().unwritable.load(Ordering::Relaxed), 0);
}

const SIZE: u64 = 3 * 4096;

/// A copy of the data file's descriptor keeps the blob in use, and nothing else: who has
/// it does not fetch.
#[test]
fn chunks_of_a_dead_process_are_free_whoever_has_its_data_file() {
    let top = tempfile::tempdir().unwrap();
    let dir = CacheDir::open(top.path()).unwrap();
    let files = open(&dir, SIZE);
    let handed_over = files.get().unwrap().data.try_clone().unwrap();
    // It dies before it comes to give the lock back.
    std::mem::forget(files.lock_chunk(c(1)).unwrap().unwrap());
    let other = open(&dir, SIZE);
    assert!(other.lock_chunk(c(1)).unwrap().is_none());
    drop(files);
    assert!(other.lock_chunk(c(1)).unwrap().is_some());
    drop(handed_over);
}

#[test]
fn images_that_agree_share_what_is_ready() {
    let top = tempfile::tempdir().unwrap();
    let dir = CacheDir::open(top.path()).unwrap();
    let whole = open(&dir, SIZE);
    whole.store(c(1), 4096, &[7; 4096]).unwrap();
    // A merged image knows only some of the chunks; yet another one all of them.
    let part = BlobFiles::open(&dir, &info(SIZE), image(1, 1..2));
    assert!(part.is_ready(c(1)));
    drop((whole, part));
    assert!(open(&dir, SIZE).is_ready(c(1)));
}

#[test]
fn an_image_believes_nothing_that_another_one_vouched_for_differently() {
    let top = tempfile::tempdir().unwrap();
    let dir = CacheDir::open(top.path()).unwrap();
    let moved = Arc::new(Says {
        seed: 1,
        knows: 0..3,
        shift: 4096,
    });
    // Also the other way round: what came first keeps the usual name.
    let first = BlobFiles::open(&dir, &info(SIZE), image(2, 1..2));
    first.store(c(1), 4096, &[7; 4096]).unwrap();
    for (number, other) in [image(1, 0..3), moved].into_iter().enumerate() {
        let files = BlobFiles::open(&dir, &info(SIZE), Arc::clone(&other) as Arc<_>);
        assert!(files.get().is_some() && !files.is_ready(c(1)));
        assert_ne!(files.data_path(), first.data_path());
        files.store(c(1), 4096, &[8; 4096]).unwrap();
        // Found again by the same image.
        let again = BlobFiles::open(&dir, &info(SIZE), other);
        assert!(again.is_ready(c(1)), "{number}");
    }
    let mut shorter = info(SIZE - 4096);
    shorter.chunk_count = 2;
    let files = BlobFiles::open(&dir, &shorter, image(2, 0..2));
    assert!(files.get().is_some() && !files.is_ready(c(1)));
    assert!(first.is_ready(c(1)));
    let mut bytes = [0; 4096];
    std::os::unix::fs::FileExt::read_exact_at(&first.get().unwrap().data, &mut bytes, 4096)
        .unwrap();
    assert_eq!(bytes, [7; 4096], "nobody else wrote here");
}

#[test]
fn a_record_of_digests_that_is_gone_makes_a_fresh_start() {
    let top = tempfile::tempdir().unwrap();
    let dir = CacheDir::open(top.path()).unwrap();
    let vouched = dir.path().join(format!("blob{VOUCHED}"));
    let damage: [fn(&Path); 3] = [
        |path| fs::remove_file(path).unwrap(),
        |path| fs::write(path, b"short").unwrap(),
        |path| {
            let mut bytes = fs::read(path).unwrap();
            bytes[0] ^= 1;
            fs::write(path, bytes).unwrap();
        },
    ];
    for damage in damage {
        let old = open(&dir, SIZE);
        old.store(c(1), 4096, &[7; 4096]).unwrap();
        damage(&vouched);
        let new = open(&dir, SIZE);
        assert!(new.get().is_some() && !new.is_ready(c(1)));
        // Other files altogether: the old ones are still believed by their user.
        new.store(c(1), 4096, &[9; 4096]).unwrap();
        let mut bytes = [0; 4096];
        let data = &old.get().unwrap().data;
        std::os::unix::fs::FileExt::read_exact_at(data, &mut bytes, 4096).unwrap();
        assert_eq!(bytes, [7; 4096]);
    }
}

#[test]
fn a_data_file_that_was_replaced_is_doubted() {
    let top = tempfile::tempdir().unwrap();
    let dir = CacheDir::open(top.path()).unwrap();
    let data = dir.data_path(&info(0).id);
    let files = open(&dir, SIZE);
    files.store(c(1), 4096, &[7; 4096]).unwrap();
    let copy = top.path().join("copy");
    fs::copy(&data, &copy).unwrap();
    fs::rename(&copy, &data).unwrap();
    let again = open(&dir, SIZE);
    let map = &again.get().unwrap().map;
    assert!(!map.is_ready(c(1)) && map.is_suspect(c(1)) && !map.is_suspect(c(0)));
    // The old user and the new one no longer share bits: their files differ.
    again.store(c(2), 8192, &[7; 4096]).unwrap();
    assert!(files.is_ready(c(1)) && !files.is_ready(c(2)));
}

#[test]
fn a_data_file_that_is_shortened_under_us_is_replaced() {
    let top = tempfile::tempdir().unwrap();
    let dir = CacheDir::open(top.path()).unwrap();
    let files = open(&dir, SIZE);
    files.store(c(0), 0, &[7; 4096]).unwrap();
    files.store(c(1), 4096, &[7; 4096]).unwrap();
    let data = File::options().write(true).open(files.data_path()).unwrap();
    data.set_len(100).unwrap();
    assert!(files.store(c(2), 8192, &[7; 4096]).is_err());
    assert_eq!(data.metadata().unwrap().len(), 100, "no hole was made");
    assert!(matches!(files.state(), CacheState::Unwritable(_)));
    assert!(!files.is_ready(c(0)) && !files.is_ready(c(1)));
    files.retry_now();
    files.store(c(2), 8192, &[7; 4096]).unwrap();
    assert!(files.is_ready(c(2)) && !files.is_ready(c(1)));
    assert!(matches!(files.state(), CacheState::Writable));
    assert_eq!(fs::metadata(files.data_path()).unwrap().len(), SIZE);
}

#[test]
fn after_a_clean_end_another_boot_believes_what_was_stored() {
    let top = tempfile::tempdir().unwrap();
    let boot = |run| {
        CacheDir::open_in_boot(top.path(), Settings::default(), BootId::invented(run)).unwrap()
    };
    let files = open(&boot(1), SIZE);
    files.store(c(1), 4096, &[7; 4096]).unwrap();
    assert!(!open(&boot(2), SIZE).is_ready(c(1)), "not on the disk yet");
    drop(files);
    let files = open(&boot(3), SIZE);
    assert!(files.get().unwrap().map.is_suspect(c(1)));
    files.get().unwrap().believe(c(1), 4096);
    drop(files);
    let files = open(&boot(4), SIZE);
    assert!(files.is_ready(c(1)));
    // One more bit, and nothing was recorded for that.
    files.store(c(0), 0, &[7; 4096]).unwrap();
    let files = open(&boot(5), SIZE);
    assert!(!files.is_ready(c(1)) && !files.is_ready(c(0)));
}
