//! Files with holes in a tar archive: which ranges of the file the archive holds.
//!
//! Four encodings exist: GNU headers of type `S`, and three versions of pax
//! records (0.0 one pair of records per range, 0.1 one list, 1.0 a text block in
//! front of the data). All become one list of ranges, checked: in order, without
//! overlap, inside the file.

use std::ops::Range;

use super::header::{BLOCK, number};
use super::pax::{Records, decimal};

/// More ranges than any sane file has; a bound for memory.
const MAX_RANGES: usize = 1 << 20;

/// Ranges of the file for which the archive has data; the rest reads as zeros.
pub(super) type Map = Vec<Range<u64>>;

/// Adds the entries of one GNU table (24 bytes each, two numbers of 12) to `map`.
/// An empty entry ends the table.
pub(super) fn add_gnu_entries(table: &[u8], map: &mut Map) -> Option<()> {
    for entry in table.chunks_exact(24) {
        if entry[0] == 0 {
            break;
        }
        let offset = u64::try_from(number(&entry[..12])?).ok()?;
        let len = u64::try_from(number(&entry[12..])?).ok()?;
        push(map, offset, len)?;
    }
    Some(())
}

/// The table inside a GNU sparse header, whether extension blocks follow, and the
/// real size of the file.
pub(super) fn gnu_header(block: &[u8; BLOCK], map: &mut Map) -> Option<(bool, u64)> {
    add_gnu_entries(&block[386..482], map)?;
    let size = u64::try_from(number(&block[483..495])?).ok()?;
    Some((block[482] != 0, size))
}

/// The table of a GNU extension block, and whether another one follows.
pub(super) fn gnu_extension(block: &[u8; BLOCK], map: &mut Map) -> Option<bool> {
    add_gnu_entries(&block[..504], map)?;
    Some(block[504] != 0)
}

/// The ranges that the pax versions 0.0 and 0.1 put into records.
pub(super) fn from_records(records: &Records) -> Option<Map> {
    let mut map = Map::new();
    if let Some(list) = records.get("GNU.sparse.map") {
        let mut numbers = list.split(|byte| *byte == b',').map(decimal);
        while let Some(offset) = numbers.next() {
            push(&mut map, offset?, numbers.next()??)?;
        }
        return Some(map);
    }
    let mut offset = None;
    for (key, value) in records.iter() {
        match key {
            b"GNU.sparse.offset" => offset = Some(decimal(value)?),
            b"GNU.sparse.numbytes" => push(&mut map, offset.take()?, decimal(value)?)?,
            _ => {}
        }
    }
    Some(map)
}

/// Reads the list of numbers that pax version 1.0 puts in front of the data, one
/// a line, padded to whole blocks.
#[derive(Debug, Default)]
pub(super) struct TextMap {
    digits: Vec<u8>,
    /// Numbers still to come; `None` until the count was read.
    left: Option<u64>,
    offset: Option<u64>,
    map: Map,
}

impl TextMap {
    /// Takes one block; returns the map when it is complete. `None` if it is damaged.
    pub(super) fn add(&mut self, block: &[u8; BLOCK]) -> Option<Option<Map>> {
        for byte in block {
            if *byte != b'\n' {
                self.digits.push(*byte);
                if self.digits.len() > 20 {
                    return None;
                }
                continue;
            }
            let value = decimal(&self.digits)?;
            self.digits.clear();
            self.number(value)?;
            if self.left == Some(0) {
                return Some(Some(std::mem::take(&mut self.map)));
            }
        }
        Some(None)
    }

    fn number(&mut self, value: u64) -> Option<()> {
        match (self.left, self.offset.take()) {
            (None, _) => self.left = Some(value.checked_mul(2)?),
            (Some(left), None) => {
                self.left = Some(left.checked_sub(1)?);
                self.offset = Some(value);
            }
            (Some(left), Some(offset)) => {
                self.left = Some(left.checked_sub(1)?);
                push(&mut self.map, offset, value)?;
            }
        }
        Some(())
    }
}

/// Checks that `map` lies inside a file of `size` bytes and holds `stored` bytes.
pub(super) fn fits(map: &Map, size: u64, stored: u64) -> bool {
    let inside = map.last().is_none_or(|range| range.end <= size);
    // No overflow: ranges are disjoint parts of a u64.
    let sum: u64 = map.iter().map(|range| range.end - range.start).sum();
    inside && sum == stored
}

/// Adds a range behind the others. Empty ranges only mark the end of the file.
fn push(map: &mut Map, offset: u64, len: u64) -> Option<()> {
    let end = offset.checked_add(len)?;
    let in_order = map.last().is_none_or(|last| last.end <= offset);
    if !in_order || map.len() >= MAX_RANGES {
        return None;
    }
    if len > 0 {
        map.push(offset..end);
    }
    Some(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_map_across_blocks() {
        let mut text = b"200\n".to_vec();
        for i in 0..200_u64 {
            text.extend(format!("{}\n{}\n", i * 8192, 4096).into_bytes());
        }
        text.resize(text.len().next_multiple_of(BLOCK), 0);
        let mut parser = TextMap::default();
        let mut found = None;
        for block in text.chunks_exact(BLOCK) {
            assert!(found.is_none());
            found = parser.add(block.try_into().unwrap()).unwrap();
        }
        let map = found.unwrap();
        assert_eq!(map.len(), 200);
        assert_eq!(map[199], 199 * 8192..199 * 8192 + 4096);
        assert!(fits(&map, 200 * 8192, 200 * 4096));
        assert!(!fits(&map, 100, 200 * 4096));
    }

    #[test]
    fn overlaps_and_overflows_are_refused() {
        let mut map = Map::new();
        assert_eq!(push(&mut map, 10, 5), Some(()));
        assert_eq!(push(&mut map, 14, 5), None);
        assert_eq!(push(&mut map, u64::MAX, 1), None);
        let records = Records::parse(b"28 GNU.sparse.map=0,10,5,10\n").unwrap();
        assert_eq!(from_records(&records), None);
        let records = Records::parse(b"24 GNU.sparse.map=0,10,\n").unwrap();
        assert_eq!(from_records(&records), None);
    }
}
