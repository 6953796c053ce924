//! Arbitrary trees, and trees as plain lists that can be compared.

use std::collections::{BTreeMap, HashMap};

use proptest::prelude::*;
use rafs::tree::{Attr, ChunkRecord, Content, Inode, InodeId, Tree, Xattrs};
use rafs::writer::WriteOptions;
use storage::blob_info::MetaLocation;
use storage::{
    BlobFeatures, BlobId, BlobIndex, BlobInfo, ChunkIndex, Compressor, Digest, Digester,
};

/// Chunk size of all trees here.
pub(crate) const CHUNK: u32 = 0x1000;

/// Options that fit the trees here.
pub(crate) fn options() -> WriteOptions {
    WriteOptions {
        chunk_size: CHUNK,
        ..WriteOptions::default()
    }
}

/// What to put at a path.
#[derive(Debug, Clone)]
pub(crate) struct Node {
    pub(crate) attr: Attr,
    pub(crate) xattrs: Xattrs,
    pub(crate) kind: Kind,
}

/// A type with the content that a test needs of it.
#[derive(Debug, Clone)]
pub(crate) enum Kind {
    Directory,
    /// A file of this size, whose chunks are stored in this order or apart.
    File {
        size: u64,
        contiguous: bool,
    },
    Symlink(Vec<u8>),
    Char(u32),
    Block(u32),
    Fifo,
    Socket,
    /// One more name for the n-th file so far, if there is one.
    Hardlink(usize),
}

fn attr() -> impl Strategy<Value = Attr> {
    (
        0..=0o7777_u16,
        any::<u32>(),
        any::<u32>(),
        any::<i64>(),
        0..1_000_000_000_u32,
    )
        .prop_map(|(permissions, uid, gid, mtime, mtime_nsec)| Attr {
            permissions,
            uid,
            gid,
            mtime,
            mtime_nsec,
        })
}

fn xattrs() -> impl Strategy<Value = Xattrs> {
    let key = prop_oneof![
        "(user|trusted|security)\\.[a-z]{1,20}".prop_map(String::into_bytes),
        Just(b"system.posix_acl_access".to_vec()),
        Just(b"system.posix_acl_default".to_vec()),
    ];
    let value = prop_oneof![
        8 => prop::collection::vec(any::<u8>(), 0..40),
        1 => prop::collection::vec(any::<u8>(), 3900..4200),
    ];
    let pair = (key, value).prop_map(|(k, v)| (k.into_boxed_slice(), v.into_boxed_slice()));
    prop_oneof![
        3 => Just(Xattrs::new()),
        1 => prop::collection::btree_map(pair.clone().prop_map(|p| p.0), pair.prop_map(|p| p.1), 0..4),
    ]
}

fn kind() -> impl Strategy<Value = Kind> {
    prop_oneof![
        4 => Just(Kind::Directory),
        4 => (prop_oneof![Just(0), 1..20_000_u64], any::<bool>())
            .prop_map(|(size, contiguous)| Kind::File { size, contiguous }),
        2 => prop::collection::vec(1..=255_u8, 1..60).prop_map(Kind::Symlink),
        1 => prop::collection::vec(1..=255_u8, 4000..4096).prop_map(Kind::Symlink),
        1 => any::<u32>().prop_map(Kind::Char),
        1 => any::<u32>().prop_map(Kind::Block),
        1 => Just(Kind::Fifo),
        1 => Just(Kind::Socket),
        2 => any::<usize>().prop_map(Kind::Hardlink),
    ]
}

/// A node of any type.
pub(crate) fn node() -> impl Strategy<Value = Node> {
    (attr(), xattrs(), kind()).prop_map(|(attr, xattrs, kind)| Node { attr, xattrs, kind })
}

/// A name, often one that sorts around the dots.
fn name() -> impl Strategy<Value = Vec<u8>> {
    let byte = any::<u8>().prop_filter("no separator", |b| *b != b'/' && *b != 0);
    prop_oneof![
        4 => "[a-d]".prop_map(String::into_bytes),
        1 => "[-!.a ]{1,4}".prop_map(String::into_bytes),
        1 => prop::collection::vec(byte, 1..=255),
    ]
    .prop_filter("dots are implied", |n| n != b"." && n != b"..")
}

/// Places and what to put there: the place picks one of the directories so far.
pub(crate) fn nodes(max: usize) -> impl Strategy<Value = Vec<(usize, Vec<u8>, Node)>> {
    prop::collection::vec((any::<usize>(), name(), node()), 0..max)
}

/// Builds a tree with one blob of this name.
pub(crate) fn build(blob: &str, root: Attr, nodes: &[(usize, Vec<u8>, Node)]) -> Tree {
    let mut tree = Tree::new(root);
    let (mut dirs, mut files, mut next) = (vec![tree.root()], Vec::new(), 0_u32);
    for (place, name, node) in nodes {
        let dir = dirs[place % dirs.len()];
        if tree.entry(dir, name).is_some() {
            continue;
        }
        if let Kind::Hardlink(n) = &node.kind {
            if !files.is_empty() {
                let id: InodeId = files[n % files.len()];
                tree.link(dir, name, id).unwrap();
            }
            continue;
        }
        let content = content(&mut tree, &node.kind, &mut next);
        let id = tree
            .insert(
                dir,
                name,
                Inode {
                    attr: node.attr,
                    xattrs: node.xattrs.clone(),
                    content,
                    implied: false,
                },
            )
            .unwrap();
        match node.kind {
            Kind::Directory => dirs.push(id),
            Kind::File { .. } => files.push(id),
            _ => {}
        }
    }
    if next > 0 {
        tree.blobs.push(blob_info(blob, next));
    }
    tree
}

fn content(tree: &mut Tree, kind: &Kind, next: &mut u32) -> Content {
    match kind {
        Kind::Directory => Content::directory(),
        Kind::File { size, contiguous } => {
            let mut chunks = Vec::new();
            for position in 0..size.div_ceil(u64::from(CHUNK)) {
                if !contiguous {
                    *next += 1;
                }
                let at = position * u64::from(CHUNK);
                let len = u32::try_from((size - at).min(u64::from(CHUNK))).unwrap();
                chunks.push(tree.add_chunk(chunk(*next, len, at)));
                *next += 1;
            }
            Content::File {
                size: *size,
                chunks,
            }
        }
        Kind::Symlink(target) => Content::Symlink(target.clone().into()),
        Kind::Char(number) => Content::CharDevice(*number),
        Kind::Block(number) => Content::BlockDevice(*number),
        Kind::Fifo => Content::Fifo,
        Kind::Socket | Kind::Hardlink(_) => Content::Socket,
    }
}

pub(crate) fn chunk(index: u32, len: u32, file_offset: u64) -> ChunkRecord {
    ChunkRecord {
        digest: Digest::of(Digester::Blake3, &index.to_le_bytes()),
        blob: BlobIndex::new(0),
        index: ChunkIndex::new(index),
        compressed: index % 2 == 1,
        compressed_size: len / 2 + 1,
        uncompressed_size: len,
        compressed_offset: u64::from(index) * 5000,
        uncompressed_offset: u64::from(index) * u64::from(CHUNK),
        file_offset,
        crc32c: (!index.is_multiple_of(3)).then_some(index),
    }
}

pub(crate) fn blob_info(id: &str, chunks: u32) -> BlobInfo {
    BlobInfo {
        id: BlobId::new(id).unwrap(),
        chunk_size: CHUNK,
        chunk_count: chunks,
        compressor: Compressor::Zstd,
        digester: Digester::Blake3,
        features: BlobFeatures::ALIGNED | BlobFeatures::CAP_TAR_TOC,
        compressed_size: 1 << 30,
        uncompressed_size: u64::from(chunks) * u64::from(CHUNK),
        meta: MetaLocation {
            compressor: Compressor::None,
            offset: 1 << 29,
            compressed_size: u64::from(chunks) * 16,
            uncompressed_size: u64::from(chunks) * 16,
        },
        toc_size: 0,
        toc_digest: Digest::default(),
        meta_blob_digest: Digest::default(),
        meta_blob_size: 0,
    }
}

/// A tree as a list: what is at every path, without ids.
pub(crate) type Flat = BTreeMap<Vec<u8>, Entry>;

/// What is at a path.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Entry {
    pub(crate) attr: Attr,
    pub(crate) xattrs: Xattrs,
    /// Type and everything that a directory's entries do not tell.
    pub(crate) content: FlatContent,
    /// Other paths of the same file, the first in order; itself if there is none.
    pub(crate) first_link: Vec<u8>,
}

/// Content without ids.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum FlatContent {
    Directory,
    /// Size, and for every chunk its blob and record.
    File(u64, Vec<(BlobId, ChunkRecord)>),
    Other(Content),
}

/// Flattens a tree by walking it.
pub(crate) fn flatten(tree: &Tree) -> Flat {
    let mut first: HashMap<InodeId, Vec<u8>> = HashMap::new();
    let mut all: Vec<_> = tree.walk().map(|e| (e.path, e.id)).collect();
    all.sort();
    all.into_iter()
        .map(|(path, id)| {
            let inode = tree.inode(id);
            // Only regular files keep their hard links when they are written.
            let first_link = match inode.content {
                Content::File { .. } => first.entry(id).or_insert(path.clone()).clone(),
                _ => path.clone(),
            };
            let content = match &inode.content {
                Content::Directory(_) => FlatContent::Directory,
                Content::File { size, chunks } => {
                    let chunk = |id| {
                        let record = tree.chunk(id);
                        let blob = tree.blobs[record.blob.as_usize()].id.clone();
                        // Indexes depend on the order of blobs, ids do not.
                        let blob_index = BlobIndex::new(0);
                        (
                            blob,
                            ChunkRecord {
                                blob: blob_index,
                                ..record.clone()
                            },
                        )
                    };
                    FlatContent::File(*size, chunks.iter().copied().map(chunk).collect())
                }
                other => FlatContent::Other(other.clone()),
            };
            let entry = Entry {
                attr: inode.attr,
                xattrs: inode.xattrs.clone(),
                content,
                first_link,
            };
            (path, entry)
        })
        .collect()
}
