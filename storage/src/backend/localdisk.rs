//! Blobs in the partitions of a disk, or of an image of one.
//!
//! Each blob is a partition of a GUID partition table (UEFI specification, "GUID
//! Partition Table Disk Layout"), in sectors of 512 bytes. Names there are too short
//! for a blob id: the first 32 digits of it are the name and the others the partition's
//! own GUID, or the first 32 digits are all there is, in partitions of the type "basic
//! data". Without a table, the whole disk is the one blob.
//!
//! Promises: the table is read once, when the backend is opened; nothing in it is
//! believed that lies outside the disk. A partition is longer than its blob, up to a
//! sector: whoever reads knows where the blob ends.
#![forbid(unsafe_code)]

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, Seek as _, SeekFrom};
use std::ops::Range;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};

use super::local::{file_error, read_range};
use super::{Backend, BackendError, Fetch, Sink};
use crate::blob_id::BlobId;

const SECTOR: u64 = 512;

/// Largest table that is read, in bytes; the usual one has 128 entries of 128 bytes.
const MAX_TABLE: u64 = 1 << 20;

/// Least length of an entry, in bytes.
const ENTRY: usize = 128;

/// Digits of a blob id that fit a name.
const NAME: usize = 32;

/// The type "basic data", as it is stored.
const BASIC: [u8; 16] = [
    0xa2, 0xa0, 0xd0, 0xeb, 0xe5, 0xb9, 0x33, 0x44, 0x87, 0xc0, 0x68, 0xb6, 0xb7, 0x26, 0x99, 0xc7,
];

/// A disk with blobs.
#[derive(Debug)]
pub struct LocalDiskBackend {
    path: PathBuf,
    disk: File,
    place: Places,
}

#[derive(Debug)]
enum Places {
    /// The whole disk, which is so long.
    Whole(u64),
    /// By blob id, or by the first [`NAME`] digits of it.
    Partitions(HashMap<String, Range<u64>>),
}

impl LocalDiskBackend {
    /// Opens a disk and reads its table.
    ///
    /// * `with_table`: whether there is one.
    ///
    /// # Errors
    /// [`BackendError::File`] if it cannot be read, or has no valid table.
    pub fn open(path: &Path, with_table: bool) -> Result<Self, BackendError> {
        let failed = |source| file_error(path.to_owned(), 0, 0, source);
        let mut disk = File::open(path).map_err(failed)?;
        // The only way to learn the length of a block device.
        let len = disk.seek(SeekFrom::End(0)).map_err(failed)?;
        let place = if with_table {
            Places::Partitions(partitions(&disk, len).map_err(failed)?)
        } else {
            Places::Whole(len)
        };
        Ok(Self {
            path: path.to_owned(),
            disk,
            place,
        })
    }

    /// Where a blob is on the disk.
    fn place(&self, blob: &BlobId) -> Result<Range<u64>, BackendError> {
        let found = match &self.place {
            Places::Whole(len) => return Ok(0..*len),
            Places::Partitions(places) => {
                let short = blob.as_str().get(..NAME).and_then(|name| places.get(name));
                places.get(blob.as_str()).or(short)
            }
        };
        let missing = || io::Error::new(io::ErrorKind::NotFound, format!("no blob {blob}"));
        found
            .cloned()
            .ok_or_else(|| file_error(self.path.clone(), 0, 0, missing()))
    }
}

impl Backend for LocalDiskBackend {
    fn fetch(&self, request: &Fetch<'_>, sink: &mut Sink<'_>) -> Result<(), BackendError> {
        let place = self.place(request.blob)?;
        let end = place.start.checked_add(request.range.end);
        let Some(end) = end.filter(|end| *end <= place.end) else {
            return Err(BackendError::Short {
                name: self.path.display().to_string(),
                offset: request.range.start,
                len: request.range.end.saturating_sub(request.range.start),
                got: 0,
            });
        };
        // No overflow: it is before the end.
        let range = place.start.saturating_add(request.range.start)..end;
        read_range(&self.path, &self.disk, &range, sink)
    }

    fn size(&self, blob: &BlobId) -> Result<u64, BackendError> {
        self.place(blob).map(|place| place.end - place.start)
    }
}

fn bad(what: &str) -> io::Error {
    io::Error::new(
        io::ErrorKind::InvalidData,
        format!("partition table: {what}"),
    )
}

/// The partitions of a disk by name.
fn partitions(disk: &File, len: u64) -> io::Result<HashMap<String, Range<u64>>> {
    let mut header = [0; 92];
    disk.read_exact_at(&mut header, SECTOR)?;
    if header.get(..8) != Some(b"EFI PART") {
        return Err(bad("there is none"));
    }
    let start = u64_at(&header, 72)?.checked_mul(SECTOR);
    let (count, size) = (u32_at(&header, 80)?, u32_at(&header, 84)?);
    let entry = usize::try_from(size).ok().filter(|size| *size >= ENTRY);
    let entry = entry.ok_or_else(|| bad("its entries are too short"))?;
    let total = u64::from(count) * u64::from(size);
    let table = start.zip(usize::try_from(total).ok());
    let (start, total) = table
        .filter(|_| total <= MAX_TABLE.min(len))
        .ok_or_else(|| bad("it is too large"))?;
    let mut table = vec![0; total];
    disk.read_exact_at(&mut table, start)?;
    let mut found = HashMap::new();
    for entry in table.chunks_exact(entry) {
        let kind = entry.get(..16).unwrap_or_default();
        if kind.iter().all(|byte| *byte == 0) {
            continue;
        }
        let name = name(entry, kind == BASIC)?;
        let place = place(entry)?;
        if place.end > len {
            return Err(bad(&format!(
                "partition {name:?} is beyond the end of the disk"
            )));
        }
        if found.insert(name.clone(), place).is_some() {
            return Err(bad(&format!("two partitions are named {name:?}")));
        }
    }
    Ok(found)
}

/// The bytes of a partition; its last sector belongs to it.
fn place(entry: &[u8]) -> io::Result<Range<u64>> {
    let start = u64_at(entry, 32)?.checked_mul(SECTOR);
    let end = u64_at(entry, 40)?
        .checked_add(1)
        .and_then(|end| end.checked_mul(SECTOR));
    let range = start.zip(end).filter(|(start, end)| start < end);
    let (start, end) = range.ok_or_else(|| bad("a partition ends before it begins"))?;
    Ok(start..end)
}

/// What a partition is called: its name, and its GUID unless it is of an old kind.
fn name(entry: &[u8], alone: bool) -> io::Result<String> {
    let units: Vec<u16> = entry
        .get(56..ENTRY)
        .unwrap_or_default()
        .chunks_exact(2)
        .filter_map(|pair| Some(u16::from_le_bytes(pair.try_into().ok()?)))
        .take_while(|unit| *unit != 0)
        .collect();
    let mut name = String::from_utf16(&units).map_err(|_invalid| bad("a name is no text"))?;
    if alone {
        return Ok(name);
    }
    let guid = entry.get(16..32).unwrap_or_default();
    // The first three fields of a GUID are numbers, in little-endian order.
    for index in [3, 2, 1, 0, 5, 4, 7, 6, 8, 9, 10, 11, 12, 13, 14, 15] {
        let byte = guid.get(index).copied().unwrap_or_default();
        name.push_str(&format!("{byte:02x}"));
    }
    Ok(name)
}

fn u32_at(bytes: &[u8], at: usize) -> io::Result<u32> {
    let field = bytes.get(at..).and_then(|rest| rest.first_chunk());
    field
        .map(|field| u32::from_le_bytes(*field))
        .ok_or_else(|| bad("it is too short"))
}

fn u64_at(bytes: &[u8], at: usize) -> io::Result<u64> {
    let field = bytes.get(at..).and_then(|rest| rest.first_chunk());
    field
        .map(|field| u64::from_le_bytes(*field))
        .ok_or_else(|| bad("it is too short"))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::backend::{Priority, fetch_to_vec};

    const LINUX: [u8; 16] = [0xaf; 16];

    /// A disk with the table in sectors 2 and 3, eight entries.
    fn disk(partitions: &[([u8; 16], &str, Range<u64>)]) -> Vec<u8> {
        let mut disk: Vec<u8> = (0..20 * SECTOR)
            .map(|i| u8::try_from(i / 64 % 251).unwrap())
            .collect();
        disk[512..1024].fill(0);
        disk[512..520].copy_from_slice(b"EFI PART");
        disk[584..592].copy_from_slice(&2_u64.to_le_bytes());
        disk[592..596].copy_from_slice(&8_u32.to_le_bytes());
        disk[596..600].copy_from_slice(&128_u32.to_le_bytes());
        disk[1024..2048].fill(0);
        for (entry, (kind, id, sectors)) in disk[1024..2048].chunks_mut(128).zip(partitions) {
            entry[..16].copy_from_slice(kind);
            if let Some(rest) = id.get(NAME..).filter(|rest| !rest.is_empty()) {
                // 00112233-4455-6677-8899-aabbccddeeff has its first half turned around.
                let byte = |i: usize| u8::from_str_radix(&rest[2 * i..2 * i + 2], 16).unwrap();
                for (at, from) in [3, 2, 1, 0, 5, 4, 7, 6]
                    .into_iter()
                    .chain(8..16)
                    .enumerate()
                {
                    entry[16 + at] = byte(from);
                }
            }
            entry[32..40].copy_from_slice(&sectors.start.to_le_bytes());
            entry[40..48].copy_from_slice(&(sectors.end - 1).to_le_bytes());
            for (unit, pair) in id
                .get(..NAME)
                .unwrap_or_default()
                .bytes()
                .zip(entry[56..].chunks_mut(2))
            {
                pair[0] = unit;
            }
        }
        disk
    }

    fn open(bytes: &[u8], with_table: bool) -> Result<LocalDiskBackend, BackendError> {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), bytes).unwrap();
        LocalDiskBackend::open(file.path(), with_table)
    }

    fn fetch(
        backend: &LocalDiskBackend,
        blob: &str,
        range: Range<u64>,
    ) -> Result<Vec<u8>, BackendError> {
        let request = Fetch {
            blob: &BlobId::new(blob).unwrap(),
            range,
            priority: Priority::OnDemand,
            served_by: None,
            direct: false,
            blob_len: None,
        };
        fetch_to_vec(backend, &request, 1 << 20)
    }

    #[test]
    fn blobs_are_found_by_both_kinds_of_names() {
        let new = "00112233445566778899aabbccddeeff0123456789abcdeffedcba9876543210";
        let old = "f".repeat(64);
        let bytes = disk(&[(LINUX, new, 5..7), (BASIC, &old[..NAME], 8..20)]);
        let backend = open(&bytes, true).unwrap();
        assert!(fetch(&backend, new, 3..1024).unwrap() == bytes[2563..3584]);
        assert!(fetch(&backend, &old, 0..100).unwrap() == bytes[4096..4196]);
        assert_eq!(backend.size(&BlobId::new(new).unwrap()).unwrap(), 1024);
        fetch(&backend, new, 1000..1025).unwrap_err();
        fetch(&backend, new, 0..u64::MAX).unwrap_err();
        fetch(&backend, &"e".repeat(64), 0..1).unwrap_err();
        let whole = open(&bytes, false).unwrap();
        assert!(fetch(&whole, &old, 0..600).unwrap() == bytes[..600]);
    }

    #[test]
    fn a_table_that_cannot_be_right_is_refused() {
        let id = "a".repeat(64);
        for (sectors, word) in [
            (5..21, "beyond"),
            (7..7, "ends before"),
            (0..u64::MAX, "ends before"),
        ] {
            let error = open(&disk(&[(LINUX, &id, sectors)]), true).unwrap_err();
            let text = format!("{:?}", error);
            assert!(text.contains(word), "{text}");
        }
        let twice = disk(&[(LINUX, &id, 5..6), (LINUX, &id, 6..7)]);
        open(&twice, true).unwrap_err();
        open(&[0; 4096], true).unwrap_err();
        open(b"short", true).unwrap_err();
    }

    proptest! {
        #[test]
        fn no_disk_breaks_it(at in 512_usize..2048, with in any::<[u8; 8]>()) {
            let id = "ab".repeat(32);
            let mut bytes = disk(&[(LINUX, &id, 5..7)]);
            let end = (at + 8).min(bytes.len());
            bytes[at..end].copy_from_slice(&with[..end - at]);
            if let Ok(backend) = open(&bytes, true) {
                let _ = fetch(&backend, &id, 0..1024);
            }
        }
    }
}
