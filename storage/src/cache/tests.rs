use std::os::unix::fs::PermissionsExt as _;

use super::*;
use crate::blob_info::{BlobFeatures, MetaLocation};
use crate::{Compressor, Digest, Digester};

fn info(size: u64) -> BlobInfo {
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
        let files = BlobFiles::open(&dir, &info(3 * 4096));
        files.store(c(1), 4096, &[7; 4096]).unwrap();
        assert!(BlobFiles::open(&dir, &info(3 * 4096)).is_ready(c(1)));
        damage(&data);
        let again = BlobFiles::open(&dir, &info(3 * 4096));
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
    let files = BlobFiles::open(&dir, &info(4096));
    assert!(files.store(c(0), 0, &[1; 4096]).is_err());
    let CacheState::Unwritable(error) = files.state() else {
        panic!("not noticed")
    };
    assert_eq!(error.path, data);
    assert_eq!(dir.metrics().unwritable.load(Ordering::Relaxed), 1);
    fs::remove_dir(&data).unwrap();
    lock(&files.trouble).tried = None;
    files.store(c(0), 0, &[1; 4096]).unwrap();
    assert!(files.is_ready(c(0)) && matches!(files.state(), CacheState::Writable));
    assert_eq!(dir.metrics().unwritable.load(Ordering::Relaxed), 0);
}
