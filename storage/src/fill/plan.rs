//! What to fetch for a set of chunks: pure functions of the chunk table.
//!
//! A [`Piece`] is the smallest thing that can be decoded: one chunk, or a batch or
//! seek context with all the chunks it holds. Pieces that lie close together in
//! the stored blob are fetched by one request; [`joins`] decides.

use std::ops::Range;

use crate::backend::{Backend, Priority};
use crate::chunk::{Chunk, Encoding};
use crate::format::FormatError;
use crate::format::chunk_table::ChunkTable;
use crate::format::context::BatchContext;
use crate::units::ChunkIndex;

/// Largest gap between two pieces that is fetched along rather than paid for with
/// another request, in bytes: about what a slow link carries in one round trip.
const MAX_GAP: u64 = 64 << 10;

/// Longest joined request in bytes. A longer one would hold up other readers of
/// its chunks without saving anything.
pub(crate) const MAX_UNIT: u64 = 4 << 20;

/// Most chunks of one piece that are taken along. Bounds the memory that a table
/// with absurdly small chunks in a batch can demand.
const MAX_MEMBERS: u32 = 1 << 14;

/// The smallest part of a blob that can be decoded.
#[derive(Debug)]
pub(crate) struct Piece {
    /// Bytes of the stored blob.
    pub(crate) stored: Range<u64>,
    pub(crate) decode: Decode,
    /// Its chunks in order, without a gap in the numbering.
    pub(crate) members: Vec<Member>,
}

/// How to get from stored bytes to the bytes of the members.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Decode {
    /// They are stored as they are.
    Raw,
    /// The only member is one compressed unit.
    Single,
    /// The members are parts of one unit.
    Batch(BatchContext),
    /// The members are parts of the output of the seek context with this number.
    Zran(u32),
}

/// One chunk of a piece.
#[derive(Clone, Debug)]
pub(crate) struct Member {
    pub(crate) index: ChunkIndex,
    /// Where it belongs in the uncompressed address space.
    pub(crate) plain: Range<u64>,
    /// Start in the decoded piece.
    pub(crate) within: u32,
    pub(crate) size: u32,
}

/// The piece that holds chunk `index`, with its other chunks.
///
/// # Errors
/// If the table's entry is corrupt.
pub(crate) fn piece_of(table: &ChunkTable, index: ChunkIndex) -> Result<Piece, FormatError> {
    let chunk = table.chunk(index)?;
    let end = |offset: u64, len: u32| offset.saturating_add(len.into());
    let (stored, decode) = match chunk.encoding {
        Encoding::Raw { offset } => (offset..end(offset, chunk.plain_size), Decode::Raw),
        Encoding::Compressed { offset, size } => (offset..end(offset, size), Decode::Single),
        Encoding::Batch {
            offset, context, ..
        } => {
            let batch = table.batch_context(context)?;
            let stored = offset..end(offset, batch.compressed_size);
            (
                stored,
                if batch.is_raw() {
                    Decode::Raw
                } else {
                    Decode::Batch(batch)
                },
            )
        }
        Encoding::Zran { context, .. } => {
            (table.zran_context(context)?.input, Decode::Zran(context))
        }
    };
    let members = match group(&chunk.encoding) {
        None => vec![Member::new(index, &chunk)],
        Some(group) => siblings(table, index, &chunk, group),
    };
    Ok(Piece {
        stored,
        decode,
        members,
    })
}

impl Member {
    fn new(index: ChunkIndex, chunk: &Chunk) -> Self {
        let within = match chunk.encoding {
            Encoding::Raw { .. } | Encoding::Compressed { .. } => 0,
            Encoding::Batch { within, .. } | Encoding::Zran { within, .. } => within,
        };
        Self {
            index,
            plain: chunk.plain_range(),
            within,
            size: chunk.plain_size,
        }
    }
}

/// What chunks of the same piece have in common; `None` for a piece of its own.
/// The stored offset is part of it: it could differ between corrupt entries.
fn group(encoding: &Encoding) -> Option<(u32, u64)> {
    match *encoding {
        Encoding::Raw { .. } | Encoding::Compressed { .. } => None,
        Encoding::Batch {
            context, offset, ..
        } => Some((context, offset)),
        Encoding::Zran { context, .. } => Some((context, 0)),
    }
}

/// The chunks around `index` that belong to the same piece. Writers put them next
/// to each other; any that are elsewhere are fetched when they are asked for.
fn siblings(
    table: &ChunkTable,
    index: ChunkIndex,
    chunk: &Chunk,
    group: (u32, u64),
) -> Vec<Member> {
    let member = |i: u32| {
        let index = ChunkIndex::new(i);
        let chunk = table.chunk(index).ok()?;
        (self::group(&chunk.encoding) == Some(group)).then(|| Member::new(index, &chunk))
    };
    let half = MAX_MEMBERS / 2;
    let index_number = index.get();
    let before = (index_number.saturating_sub(half)..index_number)
        .rev()
        .map_while(member);
    let mut members: Vec<_> = before.collect();
    members.reverse();
    members.push(Member::new(index, chunk));
    let after = index_number.saturating_add(1)..index_number.saturating_add(half).min(table.len());
    members.extend(after.map_while(member));
    members
}

/// Memory that it takes to fetch and decode these pieces by one request, in bytes.
pub(crate) fn memory(pieces: &[Piece]) -> u64 {
    let start = pieces.iter().map(|piece| piece.stored.start).min();
    let end = pieces.iter().map(|piece| piece.stored.end).max();
    let decoded = |piece: &Piece| match piece.decode {
        Decode::Raw => 0,
        Decode::Batch(batch) => u64::from(batch.uncompressed_size),
        Decode::Single | Decode::Zran(_) => {
            let end = |member: &Member| u64::from(member.within) + u64::from(member.size);
            piece.members.iter().map(end).max().unwrap_or(0)
        }
    };
    let request = end.unwrap_or(0).saturating_sub(start.unwrap_or(0));
    request.saturating_add(pieces.iter().map(decoded).max().unwrap_or(0))
}

/// What decides which pieces are fetched by one request.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Joining {
    /// Largest gap between two pieces, in bytes.
    pub(crate) gap: u64,
    /// No two pieces are joined across a multiple of this many bytes: whoever delivers
    /// moves so many at a time.
    pub(crate) grain: Option<u64>,
}

impl Joining {
    /// How requests for this reason are joined.
    pub(crate) fn of(priority: Priority, backend: &dyn Backend) -> Self {
        let grain = || backend.grain().filter(|grain| *grain > 0);
        match priority {
            Priority::OnDemand => Self {
                gap: MAX_GAP,
                grain: None,
            },
            // Nobody saves time by prefetching what lies in a gap, which may be on its
            // way to somebody else.
            Priority::Speculation | Priority::Prefetch => Self {
                gap: 0,
                grain: grain(),
            },
        }
    }

    /// Whether a piece at `next` is fetched by the same request as what is in `unit`.
    pub(crate) fn joins(self, unit: &Range<u64>, next: &Range<u64>) -> bool {
        let end = unit.end.max(next.end);
        let same = |grain: u64| unit.start / grain == end.saturating_sub(1) / grain;
        next.start >= unit.start
            && next.start <= unit.end.saturating_add(self.gap)
            && end.saturating_sub(unit.start) <= MAX_UNIT
            && self.grain.is_none_or(same)
    }
}

/// Splits pieces, in the order of their chunks, into requests.
pub(crate) fn units<T>(
    pieces: Vec<T>,
    joining: Joining,
    stored: impl Fn(&T) -> &Range<u64>,
) -> Vec<(Range<u64>, Vec<T>)> {
    let mut units: Vec<(Range<u64>, Vec<T>)> = Vec::new();
    for piece in pieces {
        let range = stored(&piece).clone();
        match units.last_mut() {
            // Bytes are dropped once used, so starts must not go back.
            Some((unit, members))
                if joining.joins(unit, &range)
                    && members
                        .last()
                        .is_some_and(|last| stored(last).start <= range.start) =>
            {
                unit.end = unit.end.max(range.end);
                members.push(piece);
            }
            _ => units.push((range, vec![piece])),
        }
    }
    units
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn units_keep_order_and_limits(
            gaps in prop::collection::vec((0..200_000_u64, 1..3_000_000_u64), 1..40),
            grain in prop::option::of(1 << 20..5_u64 << 20),
        ) {
            let joining = Joining { gap: MAX_GAP, grain };
            let mut at = 0;
            let pieces: Vec<_> = gaps.iter().map(|(gap, len)| {
                let start = at + gap;
                at = start + len;
                start..at
            }).collect();
            let units = units(pieces.clone(), joining, |range| range);
            let flat: Vec<_> = units.iter().flat_map(|(_, members)| members.clone()).collect();
            prop_assert_eq!(&flat, &pieces);
            for (range, members) in &units {
                prop_assert!(members.len() == 1 || range.end - range.start <= MAX_UNIT);
                prop_assert_eq!(range.start, members[0].start);
                prop_assert_eq!(range.end, members[members.len() - 1].end);
                prop_assert!(members.windows(2).all(|two| two[1].start - two[0].end <= MAX_GAP));
                let whole = |grain: u64| range.start / grain == (range.end - 1) / grain;
                prop_assert!(members.len() == 1 || grain.is_none_or(whole));
            }
            // Greedy: two neighbours that could be one unit are one.
            for two in units.windows(2) {
                prop_assert!(!joining.joins(&two[0].0, &two[1].1[0]));
            }
        }
    }

    #[test]
    fn pieces_out_of_order_are_not_joined() {
        let joining = Joining {
            gap: MAX_GAP,
            grain: None,
        };
        assert!(!joining.joins(&(100..200), &(50..60)));
        assert!(joining.joins(&(100..200), &(150..180)));
        assert!(!joining.joins(&(0..10), &(u64::MAX - 1..u64::MAX)));
    }
}
