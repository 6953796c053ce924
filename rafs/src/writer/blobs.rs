//! Which blobs are listed, in which order, and what their rows hold.

use std::collections::HashSet;

use storage::{BlobFeatures, BlobIndex, BlobInfo};

use crate::error::WriteError;
use crate::tree::{Content, Tree};
use crate::units::{BLOCK, MAX_BLOBS, len64};

use super::{BlobOrder, WriteOptions};

/// The blobs of the bootstrap.
#[derive(Debug)]
pub(super) struct Blobs {
    /// In table order.
    pub(super) infos: Vec<BlobInfo>,
    /// Table position by index in the tree; `None` for a blob that is left out.
    renumbered: Vec<Option<BlobIndex>>,
}

impl Blobs {
    /// Position in the table of a blob of the tree.
    pub(super) fn renumber(&self, blob: BlobIndex) -> Option<BlobIndex> {
        self.renumbered.get(blob.as_usize()).copied().flatten()
    }

    pub(super) fn count(&self) -> u64 {
        len64(self.infos.len())
    }
}

pub(super) fn select(tree: &Tree, options: &WriteOptions) -> Result<Blobs, WriteError> {
    let order = match options.blob_order {
        BlobOrder::AsGiven => (0..tree.blobs.len()).collect(),
        BlobOrder::FirstUse => by_first_use(tree)?,
    };
    if order.len() > MAX_BLOBS {
        return Err(WriteError::TooMany {
            what: "blobs",
            limit: len64(MAX_BLOBS),
        });
    }
    let mut renumbered = vec![None; tree.blobs.len()];
    let mut infos = Vec::with_capacity(order.len());
    let mut ids = HashSet::new();
    for (position, from) in (0_u32..).zip(order) {
        let mut info = tree.blobs[from].clone();
        check(&info, options)?;
        if !ids.insert(info.id.clone()) {
            return Err(WriteError::BadBlob {
                id: info.id,
                reason: "is listed twice",
            });
        }
        if options.blob_order == BlobOrder::FirstUse {
            info.features = info.features.without(BlobFeatures::INLINED_FS_META);
        }
        renumbered[from] = Some(BlobIndex::new(position));
        infos.push(info);
    }
    Ok(Blobs { infos, renumbered })
}

/// Indexes of the used blobs, in the order of their first use.
fn by_first_use(tree: &Tree) -> Result<Vec<usize>, WriteError> {
    let mut seen = vec![false; tree.blobs.len()];
    let mut order = Vec::new();
    let mut pending = vec![tree.root()];
    let mut entered = 0_usize;
    while let Some(dir) = pending.pop() {
        entered += 1;
        let mut subdirectories = Vec::new();
        for (name, &id) in tree.inode(dir).entries().into_iter().flatten() {
            match &tree.inode(id).content {
                Content::Directory(_) => subdirectories.push(id),
                Content::File { chunks, .. } => {
                    for &chunk in chunks {
                        let record = tree.chunk(chunk);
                        match seen.get_mut(record.blob.as_usize()) {
                            Some(true) => {}
                            Some(seen) => {
                                *seen = true;
                                order.push(record.blob.as_usize());
                            }
                            None => return Err(super::chunks::unknown_blob(record)),
                        }
                    }
                }
                _ => {}
            }
            // More directories than inodes: one of them contains itself.
            if entered > tree.inodes().len() {
                return Err(WriteError::DirectoryLinkedTwice {
                    name: name.to_vec(),
                });
            }
        }
        pending.extend(subdirectories.into_iter().rev());
    }
    Ok(order)
}

/// The rules of the blob table that a builder could break.
fn check(info: &BlobInfo, options: &WriteOptions) -> Result<(), WriteError> {
    let blocks = info.uncompressed_size / BLOCK;
    let reason = if info.chunk_size != options.chunk_size {
        "has another chunk size than the image"
    } else if !info.features.contains(BlobFeatures::ALIGNED) {
        "is not marked as aligned"
    } else if info.chunk_count > crate::image::MAX_CHUNKS {
        "has more than 2^24 chunks"
    } else if info.compressed_size > crate::image::MAX_COMPRESSED {
        "is larger than 1 TiB"
    } else if !info.uncompressed_size.is_multiple_of(BLOCK)
        || blocks == 0
        || u32::try_from(blocks).is_err()
    {
        "has an uncompressed size that is 0, not a multiple of 4096, or above 16 TiB"
    } else {
        return Ok(());
    };
    Err(WriteError::BadBlob {
        id: info.id.clone(),
        reason,
    })
}
