//! One row of a chunk table, in its two encodings (`docs/format-blob.md`,
//! "Table entries"). Only bits are moved here; [`chunk_table`](super::chunk_table)
//! decides what they may say.

use zerocopy::little_endian::U64;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::FormatError;
use crate::units::BLOCK_SIZE;

const OBJECT: &str = "chunk entry";

/// First offset beyond the 40-bit compressed address space.
pub const MAX_OFFSET: u64 = 1 << 40;
/// First offset beyond the 44-bit uncompressed address space.
pub const MAX_PLAIN_OFFSET: u64 = 1 << 44;
/// Largest chunk.
const MAX_SIZE: u64 = 1 << 24;

/// Flag bits of v2 entries. A v1 entry has none on disk; for it
/// [`COMPRESSED`](flags::COMPRESSED) is deduced from its sizes.
pub mod flags {
    /// The stored bytes are compressed.
    pub const COMPRESSED: u8 = 0x01;
    /// The chunk is in the output of a gzip seek context.
    pub const ZRAN: u8 = 0x02;
    /// The chunk is part of a batch.
    pub const BATCH: u8 = 0x04;
    /// The stored bytes are encrypted.
    pub const ENCRYPTED: u8 = 0x08;
    /// The data word carries a CRC32C.
    pub const HAS_CRC: u8 = 0x10;
}

/// 16 bytes: position and size in both address spaces.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct EntryV1 {
    plain: U64,
    stored: U64,
}

/// 24 bytes: as [`EntryV1`], with flags and a word whose meaning they choose.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct EntryV2 {
    plain: U64,
    stored: U64,
    data: U64,
}

const _: () = assert!(size_of::<EntryV1>() == 16);
const _: () = assert!(size_of::<EntryV2>() == 24);

/// A row in either encoding, unpacked but unchecked. Sizes are in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Entry {
    /// Start in the uncompressed address space; a multiple of 4096.
    pub plain_offset: u64,
    /// Length of the data, 1 to 2^24.
    pub plain_size: u32,
    /// Start in the compressed address space.
    pub offset: u64,
    /// Stored length.
    pub size: u32,
    /// See [`flags`].
    pub flags: u8,
    /// v2 only: CRC32C, or context index (high half) and offset within (low half).
    pub data: u64,
}

/// `width` bits of `word` from bit `shift` on, in the lowest bits.
const fn bits(word: u64, shift: u32, width: u32) -> u64 {
    word >> shift & ((1 << width) - 1)
}

/// The lower half of a word.
#[allow(
    clippy::cast_possible_truncation,
    reason = "the upper half is what is dropped"
)]
pub(crate) const fn low32(word: u64) -> u32 {
    (word & 0xffff_ffff) as u32
}

/// The upper half of a word.
pub(crate) const fn high32(word: u64) -> u32 {
    low32(word >> 32)
}

/// A v1 size, 1 to 2^24: minus one, its low 20 bits at the top of the word and
/// its high 4 bits at `high_shift`.
const fn unpack_v1_size(word: u64, high_shift: u32) -> u32 {
    low32(bits(word, 44, 20) | bits(word, high_shift, 4) << 20) + 1
}

const fn pack_v1_size(size: u32, high_shift: u32) -> u64 {
    let size = (size - 1) as u64;
    bits(size, 0, 20) << 44 | bits(size, 20, 4) << high_shift
}

impl From<EntryV1> for Entry {
    fn from(raw: EntryV1) -> Self {
        let (plain, stored) = (raw.plain.get(), raw.stored.get());
        let plain_size = unpack_v1_size(plain, 8);
        let size = unpack_v1_size(stored, 40);
        Self {
            plain_offset: bits(plain, 12, 32) << 12,
            plain_size,
            offset: bits(stored, 0, 40),
            size,
            flags: if size == plain_size {
                0
            } else {
                flags::COMPRESSED
            },
            data: 0,
        }
    }
}

impl From<EntryV2> for Entry {
    fn from(raw: EntryV2) -> Self {
        let (plain, stored) = (raw.plain.get(), raw.stored.get());
        Self {
            plain_offset: bits(plain, 0, 32) * BLOCK_SIZE,
            plain_size: low32(bits(plain, 32, 24)) + 1,
            offset: bits(stored, 0, 40),
            size: low32(bits(stored, 40, 24)),
            flags: plain.to_le_bytes()[7],
            data: raw.data.get(),
        }
    }
}

impl Entry {
    /// The row as 16 bytes.
    ///
    /// # Errors
    /// [`FormatError::Unrepresentable`] for a value that has too few bits, and
    /// for a compressed chunk of unchanged size, which v1 could not tell from a raw one.
    pub fn to_v1(&self) -> Result<EntryV1, FormatError> {
        self.check_common()?;
        limit("stored size", self.size.into(), 1, MAX_SIZE)?;
        if (self.flags & flags::COMPRESSED != 0) == (self.size == self.plain_size) {
            return Err(unrepresentable(
                "stored size",
                self.size.into(),
                "differs from the plain size exactly for compressed chunks",
            ));
        }
        Ok(EntryV1 {
            plain: (self.plain_offset | pack_v1_size(self.plain_size, 8)).into(),
            stored: (self.offset | pack_v1_size(self.size, 40)).into(),
        })
    }

    /// The row as 24 bytes.
    ///
    /// # Errors
    /// [`FormatError::Unrepresentable`] for a value that has too few bits. That
    /// includes 16 MiB chunks that do not compress: v2 stores 24 bits of the size.
    pub fn to_v2(&self) -> Result<EntryV2, FormatError> {
        self.check_common()?;
        limit("stored size", self.size.into(), 0, MAX_SIZE - 1)?;
        let plain = (self.plain_offset / BLOCK_SIZE)
            | u64::from(self.plain_size - 1) << 32
            | u64::from(self.flags) << 56;
        Ok(EntryV2 {
            plain: plain.into(),
            stored: (self.offset | u64::from(self.size) << 40).into(),
            data: self.data.into(),
        })
    }

    fn check_common(&self) -> Result<(), FormatError> {
        limit("plain size", self.plain_size.into(), 1, MAX_SIZE)?;
        limit("offset", self.offset, 0, MAX_OFFSET - 1)?;
        limit("plain offset", self.plain_offset, 0, MAX_PLAIN_OFFSET - 1)?;
        if !self.plain_offset.is_multiple_of(BLOCK_SIZE) {
            return Err(unrepresentable(
                "plain offset",
                self.plain_offset,
                "not block aligned",
            ));
        }
        Ok(())
    }
}

fn limit(field: &'static str, value: u64, min: u64, max: u64) -> Result<(), FormatError> {
    if (min..=max).contains(&value) {
        Ok(())
    } else {
        Err(unrepresentable(
            field,
            value,
            "outside the range of its field",
        ))
    }
}

fn unrepresentable(field: &'static str, value: u64, problem: &'static str) -> FormatError {
    FormatError::Unrepresentable {
        object: OBJECT,
        field,
        value,
        problem,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn v1(hex: [u8; 16]) -> Entry {
        EntryV1::read_from_bytes(&hex).unwrap().into()
    }

    #[test]
    fn v1_vectors() {
        let entry = v1([
            0x00, 0x90, 0x3e, 0x00, 0x00, 0xf0, 0xff, 0xff, 0x3c, 0x0f, 0x00, 0x00, 0x00, 0x10,
            0x03, 0x00,
        ]);
        let want = Entry {
            plain_offset: 0x3e_9000,
            plain_size: 1_048_576,
            offset: 3900,
            size: 50,
            flags: flags::COMPRESSED,
            data: 0,
        };
        assert_eq!(entry, want);
        let entry = v1([
            0x00, 0x95, 0x3e, 0x00, 0x00, 0xa0, 0x07, 0x00, 0x3c, 0x0f, 0x00, 0x00, 0x00, 0x60,
            0x0b, 0x00,
        ]);
        assert_eq!(
            entry,
            Entry {
                plain_size: 5_243_003,
                size: 183,
                ..want
            }
        );
    }

    #[test]
    fn v2_vector_of_a_gzip_chunk() {
        let raw = EntryV2::read_from_bytes(&[
            0x62, 0x05, 0x00, 0x00, 0xff, 0xff, 0x0f, 0x03, 0xb0, 0xc7, 0x41, 0x00, 0x00, 0x84,
            0x45, 0x01, 0x5e, 0x13, 0x08, 0x00, 0x05, 0x00, 0x00, 0x00,
        ])
        .unwrap();
        let entry = Entry::from(raw);
        assert_eq!(
            entry,
            Entry {
                plain_offset: 0x562 * 4096,
                plain_size: 1_048_576,
                offset: 4_310_960,
                size: 83332,
                flags: flags::COMPRESSED | flags::ZRAN,
                data: 5 << 32 | 0x8135e,
            }
        );
        assert_eq!((high32(entry.data), low32(entry.data)), (5, 0x8135e));
        assert_eq!(entry.to_v2().unwrap().as_bytes(), raw.as_bytes());
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let good = Entry {
            plain_size: 1 << 24,
            size: 1 << 24,
            ..Entry::default()
        };
        assert!(good.to_v1().is_ok());
        assert!(good.to_v2().is_err(), "v2 has no room for 16 MiB stored");
        for bad in [
            Entry {
                plain_size: 0,
                ..good
            },
            Entry { size: 0, ..good },
            Entry {
                plain_offset: 100,
                ..good
            },
            Entry {
                plain_offset: MAX_PLAIN_OFFSET,
                ..good
            },
            Entry {
                offset: MAX_OFFSET,
                ..good
            },
            Entry { size: 5, ..good },
            Entry {
                flags: flags::COMPRESSED,
                ..good
            },
        ] {
            assert!(bad.to_v1().is_err(), "{bad:?}");
        }
    }

    proptest! {
        #[test]
        fn both_encodings_keep_every_value(
            block in 0_u64..1 << 32, plain_size in 1_u32..=1 << 24, offset in 0..MAX_OFFSET,
            size in 1_u32..1 << 24, data: u64, flags in 0_u8..0x20,
        ) {
            let entry = Entry { plain_offset: block * 4096, plain_size, offset, size, flags, data };
            prop_assert_eq!(Entry::from(entry.to_v2().unwrap()), entry);
            let flags = if size == plain_size { 0 } else { flags::COMPRESSED };
            let entry = Entry { flags, data: 0, ..entry };
            prop_assert_eq!(Entry::from(entry.to_v1().unwrap()), entry);
        }
    }
}
