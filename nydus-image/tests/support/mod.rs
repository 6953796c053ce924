//! Reads images and directories into the same plain form, to be compared.
//!
//! An image is read through the crates that the daemon uses: every file's bytes
//! come from the blob, by the chunk table, and every chunk is verified.

#![allow(
    dead_code,
    unreachable_pub,
    reason = "every test program uses its own part"
)]
#![allow(
    clippy::unwrap_used,
    clippy::panic_in_result_fn,
    reason = "helpers of tests fail like tests"
)]

pub mod arbitrary;

use std::collections::{BTreeMap, HashMap};
use std::ops::ControlFlow;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};
use std::path::Path;
use std::sync::Arc;

use nydus_image::build::{BuildError, BuildOptions, Layer, build_layer};
use nydus_image::pipeline::Engine;
use nydus_image::source::Source;
use rafs::{FileKind, Image, Nid};
use storage::chunk::Encoding;
use storage::codec::decompress_into;
use storage::digest::ChunkDigests as _;
use storage::format::stored_table;
use storage::{BlobIndex, ChunkIndex, Digest};

/// A file system object as tests see it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Node {
    pub kind: char,
    pub permissions: u32,
    pub uid: u32,
    pub gid: u32,
    pub mtime: (i64, u32),
    pub device: u32,
    pub xattrs: BTreeMap<Vec<u8>, Vec<u8>>,
    /// Bytes of a file, target of a link.
    pub content: Vec<u8>,
    /// The first path, in byte order, that leads to the same file.
    pub same_as: Vec<u8>,
}

/// Objects by path; the root is the empty path.
pub type Listing = BTreeMap<Vec<u8>, Node>;

/// A layer with its bytes.
#[derive(Debug)]
pub struct Built {
    pub layer: Layer,
    pub bootstrap: Vec<u8>,
    pub blob: Vec<u8>,
}

/// Builds with `threads` workers.
pub fn build(source: Source, options: &BuildOptions, threads: usize) -> Result<Built, BuildError> {
    build_on(
        &Engine::new(threads, Engine::DEFAULT_MEMORY),
        source,
        options,
    )
}

/// Builds with a given engine.
pub fn build_on(
    engine: &Engine,
    source: Source,
    options: &BuildOptions,
) -> Result<Built, BuildError> {
    let mut blob = Vec::new();
    let layer = build_layer(engine, source, options, &mut blob)?;
    assert_eq!(layer.blob.file_size, blob.len() as u64);
    assert_eq!(
        layer.blob.file_sha256,
        Digest::of(storage::Digester::Sha256, &blob)
    );
    let bootstrap = rafs::writer::write(&layer.tree, &options.write_options(&layer.tree)).unwrap();
    Ok(Built {
        layer,
        bootstrap,
        blob,
    })
}

/// A tar archive in memory as a source.
pub fn tar_source(bytes: Vec<u8>) -> Source {
    Source::Tar {
        name: "test.tar".to_owned(),
        reader: Box::new(std::io::Cursor::new(bytes)),
    }
}

impl Built {
    /// Reads the whole image back.
    pub fn listing(&self) -> Listing {
        let image = Arc::new(Image::from_bytes(self.bootstrap.clone()).unwrap());
        image.verify_tree().unwrap();
        let chunks = decode_blob(&image, &self.blob);
        let mut listing = Listing::new();
        let mut first = HashMap::new();
        let mut pending = vec![(Vec::new(), image.root())];
        while let Some((path, nid)) = pending.pop() {
            listing.insert(path.clone(), node(&image, nid, &chunks));
            if image.inode(nid).unwrap().kind() == FileKind::Directory {
                image
                    .readdir(nid, 0, |entry| {
                        if entry.name != b"." && entry.name != b".." {
                            let path = [path.as_slice(), b"/", entry.name].concat();
                            pending.push((path, entry.nid));
                        }
                        ControlFlow::Continue(())
                    })
                    .unwrap();
            }
            first.entry(nid).or_insert_with(Vec::new).push(path);
        }
        for paths in first.into_values() {
            let same_as = paths.iter().min().unwrap().clone();
            for path in &paths {
                listing.get_mut(path).unwrap().same_as.clone_from(&same_as);
            }
        }
        listing
    }
}

/// All chunks of the only blob, verified, with their place in the uncompressed space.
fn decode_blob(image: &Arc<Image>, blob: &[u8]) -> HashMap<ChunkIndex, (u64, Vec<u8>)> {
    let Some(info) = image.blobs().first() else {
        return HashMap::new();
    };
    assert_eq!(image.blobs().len(), 1);
    let range = stored_table::stored_range(info).unwrap();
    let slice = |start: u64, len: u64| {
        &blob[usize::try_from(start).unwrap()..usize::try_from(start + len).unwrap()]
    };
    let table = stored_table::open(info, slice(range.start, range.end - range.start)).unwrap();
    let digests = image.digests(BlobIndex::new(0));
    let mut chunks = HashMap::new();
    for index in (0..table.len()).map(ChunkIndex::new) {
        let chunk = table.chunk(index).unwrap();
        let mut plain = vec![0; chunk.plain_size as usize];
        match chunk.encoding {
            Encoding::Raw { offset } => {
                plain.copy_from_slice(slice(offset, u64::from(chunk.plain_size)));
            }
            Encoding::Compressed { offset, size } => {
                decompress_into(info.compressor, slice(offset, u64::from(size)), &mut plain)
                    .unwrap();
            }
            Encoding::Batch {
                offset,
                context,
                within,
            } => {
                let batch = table.batch_context(context).unwrap();
                let stored = slice(offset, u64::from(batch.compressed_size));
                let mut whole = vec![0; batch.uncompressed_size as usize];
                if batch.compressed_size == batch.uncompressed_size {
                    whole.copy_from_slice(stored);
                } else {
                    decompress_into(info.compressor, stored, &mut whole).unwrap();
                }
                let within = within as usize;
                plain = whole[within..within + plain.len()].to_vec();
            }
            Encoding::Zran { .. } => panic!("no such blobs are built"),
        }
        let digest = Digest::of(info.digester, &plain);
        if let Some(expected) = digests.chunk_digest(index) {
            assert_eq!(digest, expected, "chunk {index}");
        }
        chunks.insert(index, (chunk.plain_offset, plain));
    }
    chunks
}

fn node(image: &Image, nid: Nid, chunks: &HashMap<ChunkIndex, (u64, Vec<u8>)>) -> Node {
    let inode = image.inode(nid).unwrap();
    let attr = inode.attr();
    let content = match inode.kind() {
        FileKind::File => {
            let mut content = Vec::new();
            for extent in image.extents(nid, 0..inode.size()) {
                let extent = extent.unwrap();
                let (start, plain) = &chunks[&extent.chunk];
                assert_eq!(extent.file_offset, content.len() as u64);
                let range = usize::try_from(extent.plain.start - start).unwrap()
                    ..usize::try_from(extent.plain.end - start).unwrap();
                content.extend_from_slice(&plain[range]);
            }
            assert_eq!(content.len() as u64, inode.size());
            content
        }
        FileKind::Symlink => image.readlink(nid).unwrap(),
        _ => Vec::new(),
    };
    let xattrs = image.xattrs(nid).unwrap();
    Node {
        kind: match inode.kind() {
            FileKind::File => '-',
            FileKind::Directory => 'd',
            FileKind::Symlink => 'l',
            FileKind::CharDevice => 'c',
            FileKind::BlockDevice => 'b',
            FileKind::Fifo => 'p',
            FileKind::Socket => 's',
        },
        permissions: u32::from(attr.permissions),
        uid: attr.uid,
        gid: attr.gid,
        mtime: (attr.mtime, attr.mtime_nsec),
        device: inode.rdev(),
        xattrs: xattrs
            .iter()
            .map(|xattr| (xattr.key(), xattr.value.to_vec()))
            .collect(),
        content,
        same_as: Vec::new(),
    }
}

/// Reads a directory with the standard library only.
pub fn list_directory(root: &Path) -> Listing {
    let mut listing = Listing::new();
    let mut names: HashMap<(u64, u64), Vec<Vec<u8>>> = HashMap::new();
    let mut pending = vec![(Vec::new(), root.to_owned())];
    while let Some((name, path)) = pending.pop() {
        let metadata = path.symlink_metadata().unwrap();
        let mut node = disk_node(&path, &metadata);
        if metadata.is_dir() {
            for entry in path.read_dir().unwrap() {
                let entry = entry.unwrap();
                let child = [name.as_slice(), b"/", entry.file_name().as_bytes()].concat();
                pending.push((child, entry.path()));
            }
        }
        if metadata.is_file() {
            names
                .entry((metadata.dev(), metadata.ino()))
                .or_default()
                .push(name.clone());
        } else {
            node.same_as.clone_from(&name);
        }
        listing.insert(name, node);
    }
    for paths in names.into_values() {
        for path in &paths {
            let first = paths.iter().min().unwrap();
            listing.get_mut(path).unwrap().same_as.clone_from(first);
        }
    }
    listing
}

fn disk_node(path: &Path, metadata: &std::fs::Metadata) -> Node {
    let kind = metadata.file_type();
    let xattrs = xattr::list(path).unwrap();
    let device = kind.is_char_device() || kind.is_block_device();
    Node {
        kind: match metadata.mode() & 0o170_000 {
            0o100_000 => '-',
            0o040_000 => 'd',
            0o120_000 => 'l',
            0o020_000 => 'c',
            0o060_000 => 'b',
            0o010_000 => 'p',
            0o140_000 => 's',
            other => panic!("{}: type {other:o}", path.display()),
        },
        permissions: metadata.mode() & 0o7777,
        uid: metadata.uid(),
        gid: metadata.gid(),
        mtime: (
            metadata.mtime(),
            u32::try_from(metadata.mtime_nsec()).unwrap(),
        ),
        device: if device {
            u32::try_from(metadata.rdev()).unwrap()
        } else {
            0
        },
        xattrs: xattrs
            .map(|key| {
                let value = xattr::get(path, &key).unwrap().unwrap();
                (key.as_bytes().to_vec(), value)
            })
            .collect(),
        content: if kind.is_file() {
            std::fs::read(path).unwrap()
        } else if kind.is_symlink() {
            std::fs::read_link(path)
                .unwrap()
                .as_os_str()
                .as_bytes()
                .to_vec()
        } else {
            Vec::new()
        },
        same_as: Vec::new(),
    }
}

/// The whole chain of an error on one line.
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text.push_str(": ");
        text.push_str(&cause.to_string());
        source = cause.source();
    }
    text
}
