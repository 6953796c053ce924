//! What entries of batch and gzip blobs refer to: units that hold several chunks
//! (`docs/format-blob.md`, "Batches" and "Seek contexts").

use std::ops::Range;

use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::FormatError;
use crate::codec::{self, as_u64};

/// Length of one context of either kind on disk, in bytes.
pub const CONTEXT_SIZE: usize = 40;

/// Most bytes of a gzip file that one context may ask for. Its output is at most
/// 16 MiB, which deflate never needs much more than that for; the rest is room
/// for members without content.
pub const MAX_ZRAN_INPUT: u32 = 32 << 20;

/// Longest dictionary: the window of deflate.
const MAX_DICTIONARY: usize = 32 << 10;

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawBatch {
    compressed_size: U32,
    uncompressed_size: U32,
    reserved: [u8; 32],
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawZran {
    input_offset: U64,
    output_offset: U64,
    dictionary_offset: U64,
    input_size: U32,
    output_size: U32,
    dictionary_size: U32,
    previous_byte: u8,
    bits: u8,
    reserved: [u8; 2],
}

const _: () = assert!(size_of::<RawBatch>() == CONTEXT_SIZE);
const _: () = assert!(size_of::<RawZran>() == CONTEXT_SIZE);

/// Small chunks that are compressed as one unit. Sizes are in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BatchContext {
    /// Stored length; equal to the uncompressed one exactly if stored raw.
    pub compressed_size: u32,
    /// Length of the chunks together, 1 to 16 MiB.
    pub uncompressed_size: u32,
}

impl BatchContext {
    /// The context as it is stored.
    #[must_use]
    pub fn encode(&self) -> [u8; CONTEXT_SIZE] {
        zerocopy::transmute!(RawBatch {
            compressed_size: self.compressed_size.into(),
            uncompressed_size: self.uncompressed_size.into(),
            reserved: [0; 32],
        })
    }

    /// Whether the batch is stored as it is.
    #[must_use]
    pub fn is_raw(&self) -> bool {
        self.compressed_size == self.uncompressed_size
    }

    pub(super) fn decode(bytes: &[u8; CONTEXT_SIZE], index: u32) -> Result<Self, FormatError> {
        const OBJECT: &str = "batch context";
        let raw: &RawBatch = zerocopy::transmute_ref!(bytes);
        let (stored, plain) = (raw.compressed_size.get(), raw.uncompressed_size.get());
        if plain == 0 || codec::as_u64(codec::MAX_UNIT) < u64::from(plain) {
            let problem = "must be 1 byte to 16 MiB";
            return Err(FormatError::corrupt(
                OBJECT,
                index,
                "uncompressed size",
                plain,
                problem,
            ));
        }
        if stored == 0 || stored > plain {
            let problem = "must be 1 byte to the uncompressed size";
            return Err(FormatError::corrupt(
                OBJECT,
                index,
                "compressed size",
                stored,
                problem,
            ));
        }
        Ok(Self {
            compressed_size: stored,
            uncompressed_size: plain,
        })
    }
}

/// A place in a gzip file where decoding can start, and what it yields.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ZranContext<'a> {
    /// Bytes of the gzip file that the output is decoded from.
    pub input: Range<u64>,
    /// Start of the output in the decompressed stream; informative.
    pub output_offset: u64,
    /// Length of the output in bytes, at most 16 MiB.
    pub output_size: u32,
    /// The output before this context, up to 32 KiB.
    pub dictionary: &'a [u8],
    /// The byte before the input, if some of its bits are still unread.
    pub previous_byte: u8,
    /// How many of its high bits are, 0 to 7.
    pub bits: u8,
}

impl<'a> ZranContext<'a> {
    /// The context as it is stored; the dictionary is stored elsewhere.
    ///
    /// * `dictionary_offset`: where, in the area that all dictionaries share.
    ///
    /// # Errors
    /// [`FormatError::Unrepresentable`] for input that is too long for a reader.
    pub fn encode(&self, dictionary_offset: u64) -> Result<[u8; CONTEXT_SIZE], FormatError> {
        let len = self.input.end.saturating_sub(self.input.start);
        let unrepresentable = |field, value, problem| FormatError::Unrepresentable {
            object: "seek context",
            field,
            value,
            problem,
        };
        let input_size = u32::try_from(len)
            .ok()
            .filter(|size| *size <= MAX_ZRAN_INPUT);
        let input_size =
            input_size.ok_or_else(|| unrepresentable("input size", len, "more than 32 MiB"))?;
        let output_size = u64::from(self.output_size);
        if output_size > as_u64(codec::MAX_UNIT) {
            return Err(unrepresentable(
                "output size",
                output_size,
                "more than 16 MiB",
            ));
        }
        let dictionary_size = as_u64(self.dictionary.len());
        let dictionary_size = u32::try_from(dictionary_size).map_err(|_range| {
            unrepresentable("dictionary size", dictionary_size, "more than 32 KiB")
        })?;
        Ok(zerocopy::transmute!(RawZran {
            input_offset: self.input.start.into(),
            output_offset: self.output_offset.into(),
            dictionary_offset: dictionary_offset.into(),
            input_size: input_size.into(),
            output_size: self.output_size.into(),
            dictionary_size: dictionary_size.into(),
            previous_byte: self.previous_byte,
            bits: self.bits,
            reserved: [0; 2],
        }))
    }

    /// * `dictionaries`: the area that dictionary offsets count from.
    /// * `data_size`: length of the gzip file.
    pub(super) fn decode(
        bytes: &[u8; CONTEXT_SIZE],
        index: u32,
        dictionaries: &'a [u8],
        data_size: u64,
    ) -> Result<Self, FormatError> {
        let raw: &RawZran = zerocopy::transmute_ref!(bytes);
        let corrupt = |field, value, problem| {
            Err(FormatError::corrupt(
                "seek context",
                index,
                field,
                value,
                problem,
            ))
        };
        let (start, input_size) = (raw.input_offset.get(), raw.input_size.get());
        let Some(end) = start
            .checked_add(input_size.into())
            .filter(|&end| end <= data_size)
        else {
            return corrupt("input offset", start, "the input ends beyond the data");
        };
        if input_size > MAX_ZRAN_INPUT {
            return corrupt("input size", input_size.into(), "more than 32 MiB");
        }
        let output_size = raw.output_size.get();
        if as_u64(codec::MAX_UNIT) < u64::from(output_size) {
            return corrupt("output size", output_size.into(), "more than 16 MiB");
        }
        if raw.bits > 7 {
            return corrupt("bits", raw.bits.into(), "more than 7");
        }
        let dictionary = slice(
            dictionaries,
            raw.dictionary_offset.get(),
            raw.dictionary_size.get(),
        );
        let Some(dictionary) = dictionary.filter(|bytes| bytes.len() <= MAX_DICTIONARY) else {
            let size = raw.dictionary_size.get();
            return corrupt(
                "dictionary size",
                size.into(),
                "outside the dictionary area or above 32 KiB",
            );
        };
        Ok(Self {
            input: start..end,
            output_offset: raw.output_offset.get(),
            output_size,
            dictionary,
            previous_byte: raw.previous_byte,
            bits: raw.bits,
        })
    }
}

/// `size` bytes of `bytes` from `offset` on, if there are that many.
fn slice(bytes: &[u8], offset: u64, size: u32) -> Option<&[u8]> {
    let start = usize::try_from(offset).ok()?;
    let end = start.checked_add(usize::try_from(size).ok()?)?;
    bytes.get(start..end)
}

#[cfg(test)]
mod tests {
    use super::*;

    const ZRAN: [u8; 40] = [
        0xda, 0x22, 0x41, 0x00, 0x00, 0x00, 0x00, 0x00, 0xa2, 0xf2, 0x4c, 0x00, 0x00, 0x00, 0x00,
        0x00, 0x00, 0x00, 0x02, 0x00, 0x00, 0x00, 0x00, 0x00, 0x5a, 0xea, 0x01, 0x00, 0x5e, 0x13,
        0x18, 0x00, 0x00, 0x80, 0x00, 0x00, 0x8f, 0x03, 0x00, 0x00,
    ];

    #[test]
    fn zran_vector() {
        let dictionaries = vec![7; 131_072 + 32768];
        let context = ZranContext::decode(&ZRAN, 5, &dictionaries, 1 << 30).unwrap();
        assert_eq!(context.input, 4_268_762..4_268_762 + 125_530);
        assert_eq!(
            (context.output_offset, context.output_size),
            (5_042_850, 1_577_822)
        );
        assert_eq!(context.dictionary, &dictionaries[131_072..]);
        assert_eq!((context.previous_byte, context.bits), (0x8f, 3));
        assert_eq!(context.encode(131_072).unwrap(), ZRAN);
    }

    #[test]
    fn a_zran_context_stays_inside_its_areas() {
        let dictionaries = vec![7; 131_072 + 32768];
        let refused = |at: usize, value: u8| {
            let mut bytes = ZRAN;
            bytes[at] = value;
            ZranContext::decode(&bytes, 0, &dictionaries, 1 << 30).is_err()
        };
        for (at, value) in [
            (7, 0xff),
            (23, 0xff),
            (18, 3),
            (27, 3),
            (31, 1),
            (33, 0x81),
            (37, 8),
        ] {
            assert!(refused(at, value), "byte {at} = {value}");
        }
        assert!(ZranContext::decode(&ZRAN, 0, &dictionaries, 4_268_762).is_err());
    }

    #[test]
    fn a_batch_context_has_sane_sizes() {
        for (compressed_size, uncompressed_size, good) in [
            (3, 3, true),
            (1, 16 << 20, true),
            (0, 3, false),
            (4, 3, false),
            (0, 0, false),
            (1, (16 << 20) + 1, false),
        ] {
            let context = BatchContext {
                compressed_size,
                uncompressed_size,
            };
            let back = BatchContext::decode(&context.encode(), 0);
            assert_eq!(back.ok(), good.then_some(context), "{context:?}");
        }
    }
}
