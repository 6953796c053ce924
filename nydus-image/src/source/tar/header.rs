//! The 512-byte block that precedes every member of a tar archive: the formats
//! V7, POSIX ustar and GNU.
//!
//! Only fields that become part of an image are decoded. Every number is checked;
//! nothing here trusts the archive.

use std::ops::Range;

/// Length of a header, and what member data is padded to.
pub(super) const BLOCK: usize = 512;

const NAME: Range<usize> = 0..100;
const MODE: Range<usize> = 100..108;
const UID: Range<usize> = 108..116;
const GID: Range<usize> = 116..124;
const SIZE: Range<usize> = 124..136;
const MTIME: Range<usize> = 136..148;
const CHECKSUM: Range<usize> = 148..156;
const TYPE: usize = 156;
const LINK: Range<usize> = 157..257;
const MAGIC: Range<usize> = 257..265;
const MAJOR: Range<usize> = 329..337;
const MINOR: Range<usize> = 337..345;
const PREFIX: Range<usize> = 345..500;

/// One header block whose checksum is right.
#[derive(Debug, Clone)]
pub(super) struct Header {
    block: [u8; BLOCK],
}

/// A header that cannot be understood: which field is wrong.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("the {field} field of the header is damaged")]
pub(super) struct BadField {
    pub(super) field: &'static str,
}

impl Header {
    /// Checks the checksum, which is what tells a header from data.
    pub(super) fn new(block: [u8; BLOCK]) -> Result<Self, BadField> {
        let bad = BadField { field: "checksum" };
        let Some(stored) = number(&block[CHECKSUM]) else {
            return Err(bad);
        };
        let outside = || {
            block
                .iter()
                .enumerate()
                .filter(|(i, _)| !CHECKSUM.contains(i))
        };
        let unsigned: i64 = outside().map(|(_, byte)| i64::from(*byte)).sum();
        // Some old writers summed signed bytes.
        let signed: i64 = outside()
            .map(|(_, byte)| i64::from(byte.cast_signed()))
            .sum();
        let blanks = i64::try_from(CHECKSUM.len()).unwrap_or(0) * i64::from(b' ');
        if stored == unsigned + blanks || stored == signed + blanks {
            Ok(Self { block })
        } else {
            Err(bad)
        }
    }

    /// Type of the member.
    pub(super) fn kind(&self) -> u8 {
        self.block[TYPE]
    }

    /// Name, with the ustar prefix.
    pub(super) fn path(&self) -> Vec<u8> {
        let name = until_nul(&self.block[NAME]);
        let prefix = if self.block[MAGIC].starts_with(b"ustar\0") {
            until_nul(&self.block[PREFIX])
        } else {
            &[]
        };
        if prefix.is_empty() {
            name.to_vec()
        } else {
            [prefix, b"/", name].concat()
        }
    }

    /// Target of a link.
    pub(super) fn link(&self) -> Vec<u8> {
        until_nul(&self.block[LINK]).to_vec()
    }

    pub(super) fn mode(&self) -> Result<u16, BadField> {
        let mode = self.number(MODE, "mode")?;
        // Writers put the file type above the low 12 bits; the type field has it.
        u16::try_from(mode & 0o7777).map_err(|_range| BadField { field: "mode" })
    }

    pub(super) fn uid(&self) -> Result<u32, BadField> {
        self.unsigned(UID, "owner")
    }

    pub(super) fn gid(&self) -> Result<u32, BadField> {
        self.unsigned(GID, "group")
    }

    pub(super) fn size(&self) -> Result<u64, BadField> {
        let size = self.number(SIZE, "size")?;
        u64::try_from(size).map_err(|_negative| BadField { field: "size" })
    }

    pub(super) fn mtime(&self) -> Result<i64, BadField> {
        self.number(MTIME, "time")
    }

    /// Major and minor number of a device.
    pub(super) fn device(&self) -> Result<(u32, u32), BadField> {
        Ok((
            self.unsigned(MAJOR, "device number")?,
            self.unsigned(MINOR, "device number")?,
        ))
    }

    /// The raw block, for the fields that only GNU sparse members have.
    pub(super) fn block(&self) -> &[u8; BLOCK] {
        &self.block
    }

    fn unsigned(&self, range: Range<usize>, field: &'static str) -> Result<u32, BadField> {
        u32::try_from(self.number(range, field)?).map_err(|_range| BadField { field })
    }

    fn number(&self, range: Range<usize>, field: &'static str) -> Result<i64, BadField> {
        number(&self.block[range]).ok_or(BadField { field })
    }
}

/// The bytes before the first NUL.
pub(super) fn until_nul(bytes: &[u8]) -> &[u8] {
    let end = bytes
        .iter()
        .position(|byte| *byte == 0)
        .unwrap_or(bytes.len());
    &bytes[..end]
}

/// A number field of at most 12 bytes: octal text, or two's complement in base 256
/// if the top bit of the first byte is set. An empty field is 0.
pub(super) fn number(field: &[u8]) -> Option<i64> {
    match field {
        [first, rest @ ..] if first & 0x80 != 0 => {
            // Bit 6 is the sign; bit 7 only marks the encoding.
            let top = i128::from((first << 1).cast_signed() >> 1);
            let value = rest
                .iter()
                .fold(top, |value, byte| (value << 8) | i128::from(*byte));
            i64::try_from(value).ok()
        }
        _ => {
            let blank = |byte: &u8| matches!(byte, b' ' | 0);
            let start = field
                .iter()
                .position(|byte| !blank(byte))
                .unwrap_or(field.len());
            let digits = &field[start..];
            let end = digits.iter().position(blank).unwrap_or(digits.len());
            digits[..end]
                .iter()
                .try_fold(0_i64, |value, digit| match digit {
                    b'0'..=b'7' => Some((value << 3) | i64::from(digit - b'0')),
                    _ => None,
                })
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_in_both_encodings() {
        assert_eq!(number(b"0000644\0"), Some(0o644));
        assert_eq!(number(b"   644 \0"), Some(0o644));
        assert_eq!(number(b"\0\0\0\0"), Some(0));
        assert_eq!(number(b"77777777777\0"), Some(0o77_777_777_777));
        assert_eq!(number(b"12x\0"), None);
        assert_eq!(number(&[0x80, 0, 0, 0, 0, 1, 0, 0]), Some(0x1_0000));
        assert_eq!(number(&[0xff; 12]), Some(-1));
        assert_eq!(
            number(&[0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xfe]),
            Some(-2)
        );
        // More than 63 bits.
        assert_eq!(number(&[0x80, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]), None);
    }

    #[test]
    fn a_flipped_bit_is_noticed() {
        let mut header = tar::Header::new_gnu();
        header.set_path("a/b").unwrap();
        header.set_size(7);
        header.set_mode(0o100_644);
        header.set_cksum();
        let mut block = *header.as_bytes();
        let good = Header::new(block).unwrap();
        assert_eq!(good.path(), b"a/b");
        assert_eq!(good.size(), Ok(7));
        assert_eq!(good.mode(), Ok(0o644));
        block[3] ^= 1;
        assert_eq!(
            Header::new(block).unwrap_err(),
            BadField { field: "checksum" }
        );
    }
}
