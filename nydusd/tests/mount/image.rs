//! Small images, and what they must read back as.

use std::fs;
use std::path::Path;

use rafs::tree::{Attr, ChunkRecord, Content, Inode, Tree};
use rafs::writer::{WriteOptions, write};
use storage::blob_writer::{BlobOptions, BlobWriter, ChunkData, PreparedChunk};
use storage::{BlobIndex, Compressor, Digest, Digester, codec};

/// A file of an image: its path, and its content.
pub(crate) type File = (String, Vec<u8>);

/// An image in memory.
pub(crate) struct Image {
    pub(crate) bootstrap: Vec<u8>,
    /// The one blob, and the hexadecimal SHA-256 that names it.
    pub(crate) blob: Vec<u8>,
    pub(crate) blob_id: String,
    /// Content of the blob's `.blob.meta` file.
    pub(crate) table: Vec<u8>,
    pub(crate) files: Vec<File>,
}

/// `len` bytes that depend on `seed`; half of them compress well.
pub(crate) fn content(seed: u32, len: usize) -> Vec<u8> {
    let mut state = u64::from(seed) + 1;
    (0..len)
        .map(|at| {
            if (at / 512) % 2 == 0 {
                return seed.to_le_bytes()[at % 4];
            }
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1);
            state.to_le_bytes()[7]
        })
        .collect()
}

/// Files around every boundary that matters, for a chunk size.
pub(crate) fn boundary_files(chunk: usize) -> Vec<File> {
    let sizes = [
        0,
        1,
        511,
        4095,
        4096,
        4097,
        chunk - 1,
        chunk,
        chunk + 1,
        3 * chunk + 5,
    ];
    let mut seed = 0;
    let mut files: Vec<File> = sizes
        .iter()
        .map(|&size| {
            seed += 1;
            (format!("dir/size-{size}"), content(seed, size))
        })
        .collect();
    files.push(("twin".to_owned(), content(4, 4095)));
    files.push(("zeros".to_owned(), vec![0; 2 * chunk]));
    files
}

/// The attributes of everything in an image.
fn attr(permissions: u16) -> Attr {
    Attr {
        permissions,
        uid: 12,
        gid: 34,
        mtime: 1_700_000_000,
        mtime_nsec: 5,
    }
}

/// Builds an image of `files` and a few other things: a symbolic link, a hard
/// link and an extended attribute.
pub(crate) fn build(compressor: Compressor, chunk_size: u32, files: Vec<File>) -> Image {
    build_with(compressor, chunk_size, files, |_| {})
}

/// The same, with something changed before it is written.
pub(crate) fn build_with(
    compressor: Compressor,
    chunk_size: u32,
    files: Vec<File>,
    change: impl FnOnce(&mut Tree),
) -> Image {
    let options = BlobOptions {
        compressor,
        chunk_size,
        ..BlobOptions::default()
    };
    let mut blob = Vec::new();
    let mut writer = BlobWriter::new(&mut blob, options).unwrap();
    let mut tree = Tree::new(attr(0o755));
    for (path, data) in &files {
        let mut chunks = Vec::new();
        for piece in data.chunks(usize::try_from(chunk_size).unwrap()) {
            let record = store(&mut writer, compressor, piece);
            chunks.push(tree.add_chunk(record));
        }
        let size = u64::try_from(data.len()).unwrap();
        let (dir, name) = path.rsplit_once('/').unwrap_or(("", path));
        let dir = tree.mkdir_all(dir.as_bytes(), attr(0o755)).unwrap();
        let inode = Inode {
            attr: attr(0o644),
            xattrs: [((*b"user.k").into(), (*b"v").into())].into(),
            content: Content::File { size, chunks },
            implied: false,
        };
        tree.insert(dir, name.as_bytes(), inode).unwrap();
    }
    let root = tree.root();
    let first = tree.lookup(files[0].0.as_bytes()).unwrap();
    tree.link(root, b"hard", first).unwrap();
    let target = files[0].0.as_bytes().into();
    let link = Inode {
        attr: attr(0o777),
        xattrs: [].into(),
        content: Content::Symlink(target),
        implied: false,
    };
    tree.insert(root, b"soft", link).unwrap();

    change(&mut tree);
    let finished = writer
        .finish(|_| unreachable!("no bootstrap inside"))
        .unwrap();
    let mut info = finished.info.unwrap();
    // Named as a registry names it.
    let blob_id = finished.file_sha256.to_string();
    info.id = storage::BlobId::new(&blob_id).unwrap();
    tree.blobs.push(info);
    let options = WriteOptions {
        chunk_size,
        compressor,
        ..WriteOptions::default()
    };
    let bootstrap = write(&tree, &options).unwrap();
    Image {
        bootstrap,
        blob,
        blob_id,
        table: finished.cct,
        files,
    }
}

fn store(
    writer: &mut BlobWriter<&mut Vec<u8>>,
    compressor: Compressor,
    piece: &[u8],
) -> ChunkRecord {
    let digest = Digest::of(Digester::Blake3, piece);
    let compressed = codec::compress(compressor, piece).unwrap();
    let uncompressed_size = u32::try_from(piece.len()).unwrap();
    let data = compressed
        .as_deref()
        .map_or(ChunkData::Raw(piece), ChunkData::Compressed);
    let prepared = PreparedChunk {
        digest,
        uncompressed_size,
        crc32c: 0,
        data,
    };
    let stored = writer.append(&prepared).unwrap();
    ChunkRecord {
        digest,
        blob: BlobIndex::new(0),
        index: stored.index,
        compressed: stored.compressed,
        compressed_size: stored.compressed_size,
        uncompressed_size,
        compressed_offset: stored.compressed_offset,
        uncompressed_offset: stored.uncompressed_offset,
        file_offset: 0,
        crc32c: None,
    }
}

impl Image {
    /// Writes bootstrap and blob into `dir`: `boot` and `blobs/<id>`.
    pub(crate) fn write_to(&self, dir: &Path) {
        fs::create_dir_all(dir.join("blobs")).unwrap();
        fs::write(dir.join("boot"), &self.bootstrap).unwrap();
        fs::write(dir.join("blobs").join(&self.blob_id), &self.blob).unwrap();
    }

    /// Compares the mounted files with what they must be.
    pub(crate) fn check(&self, mount: &Path) {
        for (path, data) in &self.files {
            let found = fs::read(mount.join(path)).unwrap_or_else(|err| panic!("{path}: {err}"));
            assert!(
                found == *data,
                "{path}: {} bytes read are not those written",
                found.len()
            );
        }
        let target = fs::read_link(mount.join("soft")).unwrap();
        assert_eq!(target.to_str().unwrap(), self.files[0].0);
    }
}
