//! The hash tree by which the kernel verifies a disk block by block (dm-verity).
//!
//! Every 512 bytes of data have a SHA-256; 128 digests fill a block of 4096 bytes,
//! zero padded at the end, which has a digest on the level above, up to a level of
//! one block, whose digest is the root hash. The levels lie behind the data, the
//! top one first. There is no superblock and no salt: parameters travel with the
//! root hash, which has to be trusted anyway.

use std::fmt;
use std::fs::File;
use std::os::unix::fs::FileExt as _;

use anyhow::Context as _;
use sha2::{Digest as _, Sha256};

use crate::ordered::{self, Closed, Jobs};

/// Bytes of data under one digest.
const DATA_BLOCK: u64 = 512;

/// Bytes of a block of digests.
const HASH_BLOCK: u64 = 4096;

/// Bytes of a digest.
const DIGEST: u64 = 32;

/// Bytes that one job hashes.
const JOB: u64 = 2 << 20;

/// What is needed to use the tree.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Verity {
    /// Number of 512-byte blocks of data.
    pub data_blocks: u64,
    /// Where the tree starts, in bytes.
    pub hash_offset: u64,
    /// SHA-256 of the top block.
    pub root: [u8; 32],
}

/// The options of `veritysetup`, with the root hash at the end.
impl fmt::Display for Verity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "--no-superblock --format=1 -s \"\" --hash=sha256 --data-block-size={DATA_BLOCK} --hash-block-size={HASH_BLOCK} --data-blocks {} --hash-offset {} ",
            self.data_blocks, self.hash_offset
        )?;
        self.root
            .iter()
            .try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

/// One level: blocks that are hashed, and where their digests go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Level {
    from: u64,
    block: u64,
    count: u64,
    to: u64,
}

/// Appends the tree of the first `size` bytes of `disk`.
///
/// * `size`: the length of the file; a multiple of 4096, not 0.
///
/// # Errors
/// The file cannot be read or written.
pub fn append(disk: &File, size: u64, threads: usize) -> anyhow::Result<Verity> {
    let levels = levels(size);
    for level in &levels {
        hash(disk, level, threads)?;
    }
    let mut top = vec![0; usize::try_from(HASH_BLOCK)?];
    disk.read_exact_at(&mut top, size)
        .context("cannot read the top of the tree")?;
    Ok(Verity {
        data_blocks: size / DATA_BLOCK,
        hash_offset: size,
        root: Sha256::digest(&top).into(),
    })
}

/// The levels of a tree behind `size` bytes, the lowest first.
fn levels(size: u64) -> Vec<Level> {
    let (mut block, mut count) = (DATA_BLOCK, size / DATA_BLOCK);
    let mut levels = Vec::new();
    loop {
        levels.push(Level {
            from: 0,
            block,
            count,
            to: 0,
        });
        let blocks = (count * DIGEST).div_ceil(HASH_BLOCK);
        if blocks <= 1 {
            break;
        }
        (block, count) = (HASH_BLOCK, blocks);
    }
    // The top one comes first on the disk.
    let mut at = size;
    for index in (0..levels.len()).rev() {
        levels[index].to = at;
        if let Some(above) = levels.get_mut(index + 1) {
            above.from = at;
        }
        at += (levels[index].count * DIGEST).next_multiple_of(HASH_BLOCK);
    }
    levels
}

/// Writes the digests of one level, zero padded to a whole block.
fn hash(disk: &File, level: &Level, threads: usize) -> anyhow::Result<()> {
    let end = level.to + (level.count * DIGEST).next_multiple_of(HASH_BLOCK);
    let len = disk.metadata()?.len().max(end);
    disk.set_len(len).context("cannot make room for the tree")?;
    let bytes = level.count * level.block;
    ordered::run(
        threads,
        |jobs: &Jobs<u64, anyhow::Result<()>>| {
            let mut at = 0;
            while at < bytes && jobs.send(at) != Err(Closed) {
                at += JOB;
            }
            Ok(())
        },
        Vec::new,
        |buffer: &mut Vec<u8>, at| {
            buffer.resize(usize::try_from(JOB.min(bytes - at))?, 0);
            disk.read_exact_at(buffer, level.from + at)
                .context("cannot read what is to be hashed")?;
            let digests: Vec<u8> = buffer
                .chunks(usize::try_from(level.block)?)
                .flat_map(|block| <[u8; 32]>::from(Sha256::digest(block)))
                .collect();
            disk.write_all_at(&digests, level.to + at / level.block * DIGEST)
                .context("cannot write the tree")
        },
        |result| result,
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The definition, without any thought of speed.
    fn plain_root(data: &[u8]) -> ([u8; 32], Vec<u8>) {
        let (mut level, mut block) = (data.to_vec(), 512);
        let mut tree = Vec::new();
        loop {
            let mut next: Vec<u8> = level
                .chunks(block)
                .flat_map(|block| <[u8; 32]>::from(Sha256::digest(block)))
                .collect();
            next.resize(next.len().next_multiple_of(4096), 0);
            tree.splice(0..0, next.iter().copied());
            if next.len() == 4096 {
                return (Sha256::digest(&next).into(), tree);
            }
            (level, block) = (next, 4096);
        }
    }

    #[test]
    fn trees_of_all_heights_follow_the_definition() {
        // 128 digests fill a block: 64 KiB of data, then 8 MiB.
        for blocks in [1, 16, 17, 100, 2048, 2049, 2300] {
            let size = blocks * 4096;
            let data: Vec<u8> = (0..size)
                .map(|at: u64| (at / 700).to_le_bytes()[0])
                .collect();
            let disk = tempfile::tempfile().unwrap();
            disk.write_all_at(&data, 0).unwrap();
            let verity = append(&disk, size, 3).unwrap();
            let (root, tree) = plain_root(&data);
            assert_eq!(verity.root, root, "{blocks}");
            let mut written = vec![0; tree.len()];
            disk.read_exact_at(&mut written, size).unwrap();
            assert!(written == tree, "{blocks}");
            assert_eq!(disk.metadata().unwrap().len(), size + tree.len() as u64);
        }
    }
}
