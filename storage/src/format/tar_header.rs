//! The 512-byte tar headers that follow the sections of a blob
//! (`docs/format-blob.md`, "Tar headers").
//!
//! They name a section and its length, so that sections are found from the end of
//! the file backwards. Sections are not padded and the header comes after its
//! data: the file is no readable tar.

use super::FormatError;
use crate::codec::as_u64;

/// Length of a tar header in bytes.
pub const SIZE: usize = 512;

/// Section names, as in tar headers and in the table of contents.
pub mod names {
    /// Chunk data.
    pub const DATA: &str = "image.blob";
    /// Chunk table; its tar header covers the table's own header too.
    pub const TABLE: &str = "blob.meta";
    /// Header of the chunk table; only in the table of contents.
    pub const TABLE_HEADER: &str = "blob.meta.header";
    /// Chunk digests.
    pub const DIGESTS: &str = "blob.digest";
    /// Embedded bootstrap.
    pub const BOOTSTRAP: &str = "image.boot";
    /// Table of contents.
    pub const TOC: &str = "rafs.blob.toc";
}

const OBJECT: &str = "tar header";
const NAME: std::ops::Range<usize> = 0..100;
const SIZE_FIELD: std::ops::Range<usize> = 124..136;
const MTIME: std::ops::Range<usize> = 136..148;
const CHECKSUM: std::ops::Range<usize> = 148..156;
const KIND: usize = 156;
const MAGIC: std::ops::Range<usize> = 257..265;
const GNU_MAGIC: &[u8; 8] = b"ustar  \0";
/// Largest size that 11 octal digits can say; GNU tar writes larger ones in binary.
const MAX_OCTAL: u64 = (1 << 33) - 1;
/// First byte of a size in binary; 7 zero bytes or part of the number follow.
const BINARY: u8 = 0x80;

/// A header for the `size` bytes before it.
///
/// # Errors
/// [`FormatError::Unrepresentable`] for a name of more than 99 bytes.
pub fn encode(name: &str, size: u64) -> Result<[u8; SIZE], FormatError> {
    if name.len() >= NAME.len() {
        return Err(FormatError::Unrepresentable {
            object: OBJECT,
            field: "name length",
            value: as_u64(name.len()),
            problem: "at most 99 bytes",
        });
    }
    let mut header = [0; SIZE];
    header[..name.len()].copy_from_slice(name.as_bytes());
    if size <= MAX_OCTAL {
        header[SIZE_FIELD].copy_from_slice(format!("{size:011o}\0").as_bytes());
    } else {
        header[SIZE_FIELD.start] = BINARY;
        header[SIZE_FIELD.end - 8..SIZE_FIELD.end]
            .copy_from_slice(&size.swap_bytes().to_le_bytes());
    }
    header[MTIME].copy_from_slice(b"00000000000\0");
    header[KIND] = b'0';
    header[MAGIC].copy_from_slice(GNU_MAGIC);
    let sum = checksum(&header);
    header[CHECKSUM].copy_from_slice(format!("{sum:07o}\0").as_bytes());
    Ok(header)
}

/// Name and size of the section that ends where this header begins.
///
/// # Errors
/// [`FormatError::Size`] unless there are exactly 512 bytes, and
/// [`FormatError::Corrupt`] for anything but a GNU header of a regular file.
pub fn decode(bytes: &[u8]) -> Result<(String, u64), FormatError> {
    let corrupt = |field, problem| Err(FormatError::corrupt(OBJECT, 0_u32, field, 0_u32, problem));
    let Ok(header) = <&[u8; SIZE]>::try_from(bytes) else {
        let (expected, got) = (as_u64(SIZE), as_u64(bytes.len()));
        return Err(FormatError::Size {
            object: OBJECT,
            expected,
            got,
        });
    };
    if &header[MAGIC] != GNU_MAGIC {
        return corrupt("magic", "not a GNU tar header");
    }
    if octal(&header[CHECKSUM]) != Some(checksum(header)) {
        return corrupt("checksum", "does not match the header");
    }
    if header[KIND] != b'0' {
        return corrupt("type", "not a regular file");
    }
    let Some(size) = number(&header[SIZE_FIELD]) else {
        return corrupt("size", "neither octal nor a binary number of 64 bits");
    };
    let name = header[NAME]
        .split(|&byte| byte == 0)
        .next()
        .unwrap_or_default();
    match std::str::from_utf8(name) {
        Ok(name) if !name.is_empty() => Ok((name.to_owned(), size)),
        _ => corrupt("name", "empty or not UTF-8"),
    }
}

/// Sum of all bytes with the checksum field read as blanks.
fn checksum(header: &[u8; SIZE]) -> u64 {
    let blank = u64::from(b' ');
    header
        .iter()
        .enumerate()
        .map(|(at, &byte)| {
            if CHECKSUM.contains(&at) {
                blank
            } else {
                u64::from(byte)
            }
        })
        .sum()
}

/// A size field: octal, or binary with the highest byte first.
fn number(field: &[u8]) -> Option<u64> {
    match field.split_last_chunk::<8>() {
        Some(([BINARY, 0, 0, 0], low)) => Some(u64::from_le_bytes(*low).swap_bytes()),
        _ => octal(field),
    }
}

/// Octal digits up to a NUL or blank; `None` for none or other characters.
fn octal(field: &[u8]) -> Option<u64> {
    let digits = field.split(|byte| matches!(byte, 0 | b' ')).next()?;
    if digits.is_empty() || !digits.iter().all(|byte| matches!(byte, b'0'..=b'7')) {
        return None;
    }
    // At most 12 digits of 3 bits, which cannot overflow.
    Some(
        digits
            .iter()
            .fold(0, |value, digit| value << 3 | u64::from(digit - b'0')),
    )
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn layout_of_a_header() {
        let header = encode(names::TOC, 512).unwrap();
        assert_eq!(&header[..14], b"rafs.blob.toc\0");
        assert_eq!(&header[123..136], b"\x0000000001000\0");
        assert_eq!(&header[136..157], b"00000000000\x000006255\x000");
        assert_eq!(&header[257..265], b"ustar  \0");
        assert_eq!(decode(&header).unwrap(), ("rafs.blob.toc".to_owned(), 512));
    }

    #[test]
    fn every_size_comes_back() {
        for size in [0, 1, MAX_OCTAL, MAX_OCTAL + 1, 1 << 40, u64::MAX] {
            let header = encode("x", size).unwrap();
            assert_eq!(decode(&header).unwrap().1, size);
        }
        assert!(encode(&"x".repeat(100), 1).is_err());
    }

    proptest! {
        #[test]
        fn any_damaged_byte_is_noticed(at in 0..SIZE, value: u8) {
            let mut header = encode(names::DATA, 12345).unwrap();
            prop_assume!(header[at] != value);
            header[at] = value;
            // The terminator of the checksum may be a blank in other writers.
            let harmless = at == CHECKSUM.end - 1 && value == b' ';
            prop_assert_eq!(decode(&header).is_ok(), harmless);
        }

        #[test]
        fn hostile_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..600)) {
            prop_assert!(decode(&bytes).is_err());
        }
    }
}
