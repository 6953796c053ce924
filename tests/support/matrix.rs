//! The option sets that are tried: every pair of option values occurs in at
//! least one of them.
//!
//! All combinations would be several hundred builds; faults in formats come from
//! two options meeting, so the matrix covers pairs ([`pairwise`]) and a caller
//! with more time asks for [`all`]. Values that do not go together (a batch
//! larger than a chunk, a compressor for a layer that stays gzip) are left out
//! by [`Options::is_legal`]. The order never changes from run to run.
//!
//! This file depends on nothing, so that test crates of other workspaces include it.

use std::collections::BTreeSet;
use std::fmt;

/// What compresses chunks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Compressor {
    /// Stored as they are.
    None,
    /// LZ4 blocks.
    Lz4,
    /// Zstandard frames.
    Zstd,
    /// The layer's own gzip stream, for reference images only.
    Gzip,
}

impl Compressor {
    /// As command lines spell it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Lz4 => "lz4_block",
            Self::Zstd => "zstd",
            Self::Gzip => "gzip",
        }
    }
}

/// What identifies chunks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Digester {
    /// BLAKE3.
    Blake3,
    /// SHA-256.
    Sha256,
}

impl Digester {
    /// As command lines spell it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Blake3 => "blake3",
            Self::Sha256 => "sha256",
        }
    }
}

/// What the image is made from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Source {
    /// A directory.
    Dir,
    /// An uncompressed tar.
    Tar,
    /// A gzip-compressed tar that is converted.
    Targz,
    /// A gzip-compressed tar that stays the data blob.
    TargzRef,
}

impl Source {
    /// As command lines spell it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Dir => "dir-rafs",
            Self::Tar => "tar-rafs",
            Self::Targz => "targz-rafs",
            Self::TargzRef => "targz-ref",
        }
    }
}

/// One option set.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Options {
    /// Chunk compressor.
    pub compressor: Compressor,
    /// Chunk digest.
    pub digester: Digester,
    /// Chunk size in bytes.
    pub chunk_size: u32,
    /// Batch size in bytes; 0 is off.
    pub batch_size: u32,
    /// The blob ends in a table of contents.
    pub blob_toc: bool,
    /// The bootstrap is inside the blob.
    pub inline_meta: bool,
    /// Source type.
    pub source: Source,
}

impl fmt::Display for Options {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            compressor,
            digester,
            chunk_size,
            batch_size,
            blob_toc,
            inline_meta,
            source,
        } = self;
        write!(
            f,
            "{}/{}/{}/chunk {chunk_size:#x}/batch {batch_size:#x}",
            source.name(),
            compressor.name(),
            digester.name(),
        )?;
        f.write_str(if *blob_toc { "/toc" } else { "" })?;
        f.write_str(if *inline_meta { "/inline" } else { "" })
    }
}

impl Options {
    /// Do these values go together?
    #[must_use]
    pub fn is_legal(&self) -> bool {
        let is_ref = self.source == Source::TargzRef;
        let forced = self.compressor == Compressor::Gzip
            && self.digester == Digester::Sha256
            && self.batch_size == 0;
        self.batch_size <= self.chunk_size
            && is_ref == (self.compressor == Compressor::Gzip)
            && (!is_ref || forced)
    }

    /// The words of a `nydus-image create` command line, without source and output.
    /// Whiteouts are kept: they are names like any other here.
    #[must_use]
    pub fn arguments(&self) -> Vec<String> {
        let mut words = vec!["--type".into(), self.source.name().into()];
        words.extend(["--whiteout-spec".into(), "none".into()]);
        words.extend(["--chunk-size".into(), format!("{:#x}", self.chunk_size)]);
        if self.source != Source::TargzRef {
            words.extend(["--compressor".into(), self.compressor.name().into()]);
            words.extend(["--digester".into(), self.digester.name().into()]);
            words.extend(["--batch-size".into(), format!("{:#x}", self.batch_size)]);
        }
        if self.blob_toc {
            words.extend(["--features".into(), "blob-toc".into()]);
        }
        if self.inline_meta {
            words.push("--blob-inline-meta".into());
        }
        words
    }

    /// The values as small numbers, one per option, for counting pairs.
    fn coordinates(&self) -> [u32; 7] {
        [
            self.compressor as u32,
            self.digester as u32,
            self.chunk_size,
            self.batch_size,
            self.blob_toc.into(),
            self.inline_meta.into(),
            self.source as u32,
        ]
    }

    fn pairs(&self) -> impl Iterator<Item = (usize, u32, usize, u32)> {
        let values = self.coordinates();
        (0..7).flat_map(move |a| (a + 1..7).map(move |b| (a, values[a], b, values[b])))
    }
}

/// Every legal combination.
#[must_use]
pub fn all() -> Vec<Options> {
    let mut out = Vec::new();
    for source in [Source::Dir, Source::Tar, Source::Targz, Source::TargzRef] {
        for compressor in [
            Compressor::None,
            Compressor::Lz4,
            Compressor::Zstd,
            Compressor::Gzip,
        ] {
            for digester in [Digester::Blake3, Digester::Sha256] {
                for chunk_size in [0x1000, 0x1_0000, 0x10_0000] {
                    for batch_size in [0, 0x1000, 0x8000, 0x10_0000] {
                        for (blob_toc, inline_meta) in
                            [(false, false), (true, false), (false, true), (true, true)]
                        {
                            out.push(Options {
                                compressor,
                                digester,
                                chunk_size,
                                batch_size,
                                blob_toc,
                                inline_meta,
                                source,
                            });
                        }
                    }
                }
            }
        }
    }
    out.retain(Options::is_legal);
    out
}

/// A small list in which every pair of values that is legal at all occurs:
/// greedily the combination that adds most new pairs, the earliest on a tie.
#[must_use]
pub fn pairwise() -> Vec<Options> {
    let all = all();
    let mut missing: BTreeSet<_> = all.iter().flat_map(Options::pairs).collect();
    let mut out = Vec::new();
    while !missing.is_empty() {
        let gain = |o: &Options| o.pairs().filter(|p| missing.contains(p)).count();
        // `max_by_key` keeps the last maximum: reversed, that is the earliest.
        let Some(best) = all.iter().rev().max_by_key(|o| gain(o)) else {
            break;
        };
        best.pairs().for_each(|p| {
            missing.remove(&p);
        });
        out.push(*best);
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pairwise_is_small_and_covers_every_pair() {
        let chosen = pairwise();
        let covered: BTreeSet<_> = chosen.iter().flat_map(Options::pairs).collect();
        let wanted: BTreeSet<_> = all().iter().flat_map(Options::pairs).collect();
        assert_eq!(covered, wanted);
        assert!(chosen.len() < 40, "{} combinations", chosen.len());
        assert!(chosen.iter().all(Options::is_legal));
    }
}
