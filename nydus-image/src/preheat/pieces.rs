//! Ranges as Dragonfly stores them: whole pieces of a blob.
//!
//! A piece is the smallest thing that a daemon fetches and keeps; its length follows
//! from the length of the blob. Asking for part of one costs all of it.

use std::ops::Range;

/// Shortest piece, and the one of all blobs below 2 GB.
const SHORTEST: u64 = 4 << 20;

/// Longest piece.
const LONGEST: u64 = 64 << 20;

/// Pieces that a blob is cut into, about.
const PIECES: u64 = 500;

/// What is asked for at once, in bytes, but at least a piece: so little that a failure
/// costs little, so much that a round trip does not matter. More than a piece, because
/// old daemons keep ranges of one piece to themselves.
const WINDOW: u64 = 16 << 20;

/// Length of the pieces of a blob of `size` bytes.
pub(super) fn piece_length(size: u64) -> u64 {
    (size / PIECES)
        .checked_next_power_of_two()
        .unwrap_or(LONGEST)
        .clamp(SHORTEST, LONGEST)
}

/// `ranges` of a blob of `size` bytes, in any order, as runs of whole pieces in order.
pub(super) fn rounded(ranges: &[Range<u64>], size: u64) -> Vec<Range<u64>> {
    let piece = piece_length(size);
    let mut sorted: Vec<_> = ranges.iter().filter(|range| !range.is_empty()).collect();
    sorted.sort_by_key(|range| range.start);
    let mut runs: Vec<Range<u64>> = Vec::new();
    for range in sorted {
        let start = range.start / piece * piece;
        let end = range
            .end
            .checked_next_multiple_of(piece)
            .unwrap_or(size)
            .min(size);
        match runs.last_mut() {
            Some(last) if start <= last.end => last.end = last.end.max(end),
            _ if start < end => runs.push(start..end),
            _ => {}
        }
    }
    runs
}

/// Bytes in `ranges`.
pub(super) fn total(ranges: &[Range<u64>]) -> u64 {
    ranges.iter().map(|range| range.end - range.start).sum()
}

/// A run of whole pieces as the requests that are made for it.
///
/// * `task`: the part of the blob around a position that is a task of its own, if it is
///   not all of it; no request goes beyond it.
pub(super) fn windows(
    run: Range<u64>,
    size: u64,
    task: impl Fn(u64) -> Option<Range<u64>>,
) -> impl Iterator<Item = Range<u64>> {
    let window = WINDOW.max(piece_length(size));
    let mut at = run.start;
    std::iter::from_fn(move || {
        let start = at;
        let end = task(start).map_or(u64::MAX, |task| task.end);
        at = run.end.min(start.saturating_add(window)).min(end);
        (start < run.end).then_some(start..at)
    })
}

#[cfg(test)]
#[allow(
    clippy::single_range_in_vec_init,
    reason = "lists of ranges are what this is about"
)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    #[test]
    fn pieces_grow_with_the_blob() {
        for (size, piece) in [
            (0, 4),
            (100 * MIB, 4),
            (1 << 30, 4),
            (2_097_152_000, 4),
            (2_097_152_500, 8),
            (40 << 30, 64),
            (u64::MAX, 64),
        ] {
            assert_eq!(piece_length(size), piece * MIB, "{size}");
        }
    }

    #[test]
    fn ranges_become_runs_of_pieces() {
        let size = 21 * MIB;
        let of = |ranges: &[Range<u64>]| rounded(ranges, size);
        assert_eq!(of(&[]), []);
        assert_eq!(of(&[5..5]), []);
        assert_eq!(of(&[0..1]), [0..4 * MIB]);
        // Neighbours are joined, in any order; the last piece is a short one.
        assert_eq!(
            of(&[20 * MIB..size, 0..1, 4 * MIB..4 * MIB + 1]),
            [0..8 * MIB, 20 * MIB..size]
        );
        assert_eq!(of(&[4 * MIB - 1..4 * MIB + 1]), [0..8 * MIB]);
        assert_eq!(of(&[0..u64::MAX]), [0..size]);
        assert_eq!(total(&of(&[0..1, size - 1..size])), 5 * MIB);
    }

    #[test]
    fn windows_cover_a_run_once() {
        let windows = |run, size| windows(run, size, |_| None).collect::<Vec<_>>();
        assert_eq!(windows(0..3, 3), [0..3]);
        assert_eq!(windows(5..5, 100), []);
        let cut = windows(4 * MIB..40 * MIB, 40 * MIB);
        assert_eq!(
            cut,
            [4 * MIB..20 * MIB, 20 * MIB..36 * MIB, 36 * MIB..40 * MIB]
        );
        assert_eq!(windows(0..128 * MIB, 40 << 30).len(), 2);
        let task = |at| Some(at / (6 * MIB) * (6 * MIB)..at / (6 * MIB) * (6 * MIB) + 6 * MIB);
        let cut: Vec<_> = super::windows(4 * MIB..13 * MIB, 13 * MIB, task).collect();
        assert_eq!(
            cut,
            [4 * MIB..6 * MIB, 6 * MIB..12 * MIB, 12 * MIB..13 * MIB]
        );
    }
}
