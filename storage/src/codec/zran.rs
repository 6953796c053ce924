//! Decodes from the middle of a gzip stream, given a seek context.
//!
//! A context names a deflate block boundary, which need not be a byte boundary,
//! and carries the 32 KiB of output before it as a dictionary. Inflate libraries
//! offer "priming" for the odd bits; the safe interface used here does not, so
//! the decoder is fed a few empty deflate blocks first that end exactly at the
//! wanted bit of the previous byte (see `alignment`).
//!
//! A layer may be a chain of gzip members; decoding continues into the next one
//! and stops as soon as the output is complete (`docs/format-blob.md`, "Seek contexts").
#![forbid(unsafe_code)]

use flate2::{Decompress, FlushDecompress, Status};

use super::{CodecError, as_u64};
use crate::algorithm::Compressor;
use crate::format::context::ZranContext;

const COMPRESSOR: Compressor = Compressor::Gzip;

/// Bytes after the deflate data of a gzip member: CRC32 and length.
const MEMBER_TRAILER: usize = 8;

/// Fills `dst` with the output of a seek context.
///
/// * `input`: the bytes of `context.input` of the gzip file; more are ignored.
/// * `dst`: as long as the needed part of the output, counted from its start; at
///   most `context.output_size` bytes. Decoding stops when it is full.
///
/// # Errors
/// [`CodecError::Invalid`] and [`CodecError::Length`] for a stream that is
/// corrupt or ends too early.
pub fn decode(context: &ZranContext<'_>, input: &[u8], dst: &mut [u8]) -> Result<(), CodecError> {
    let mut inflate = Decompress::new(false);
    if !context.dictionary.is_empty() {
        inflate
            .set_dictionary(context.dictionary)
            .map_err(invalid)?;
    }
    let prefix = alignment(context.previous_byte, context.bits);
    feed(&mut inflate, &prefix, &mut [])?;

    let mut input = input;
    let mut filled = 0;
    while filled < dst.len() {
        let rest = dst.get_mut(filled..).unwrap_or_default();
        let step = feed(&mut inflate, input, rest)?;
        input = input.get(step.consumed..).unwrap_or_default();
        filled += step.produced;
        if step.ended && filled < dst.len() {
            input = next_member(input)?;
            inflate.reset(false);
        } else if step.consumed == 0 && step.produced == 0 {
            return Err(CodecError::Length {
                compressor: COMPRESSOR,
                expected: as_u64(dst.len()),
                got: as_u64(filled),
            });
        }
    }
    Ok(())
}

struct Step {
    consumed: usize,
    produced: usize,
    ended: bool,
}

fn feed(inflate: &mut Decompress, input: &[u8], output: &mut [u8]) -> Result<Step, CodecError> {
    let (consumed, produced) = (inflate.total_in(), inflate.total_out());
    let status = inflate
        .decompress(input, output, FlushDecompress::None)
        .map_err(invalid)?;
    // Both are at most the lengths of the slices, so they fit `usize`.
    let delta = |now: u64, before: u64| usize::try_from(now - before).unwrap_or(usize::MAX);
    Ok(Step {
        consumed: delta(inflate.total_in(), consumed),
        produced: delta(inflate.total_out(), produced),
        ended: status == Status::StreamEnd,
    })
}

fn invalid(error: flate2::DecompressError) -> CodecError {
    CodecError::invalid(COMPRESSOR, error)
}

/// Skips the trailer of a gzip member and the header of the next one (RFC 1952).
fn next_member(input: &[u8]) -> Result<&[u8], CodecError> {
    member_body(input).ok_or_else(|| {
        CodecError::invalid(
            COMPRESSOR,
            "the stream ends where another gzip member should follow",
        )
    })
}

fn member_body(input: &[u8]) -> Option<&[u8]> {
    const FHCRC: u8 = 1 << 1;
    const FEXTRA: u8 = 1 << 2;
    const FNAME: u8 = 1 << 3;
    const FCOMMENT: u8 = 1 << 4;

    let input = input.get(MEMBER_TRAILER..)?;
    let (&[magic0, magic1, method, flags, ..], mut rest) = input.split_first_chunk::<10>()?;
    if (magic0, magic1, method) != (0x1f, 0x8b, 8) {
        return None;
    }
    if flags & FEXTRA != 0 {
        let (len, after) = rest.split_first_chunk::<2>()?;
        rest = after.get(usize::from(u16::from_le_bytes(*len))..)?;
    }
    for text in [FNAME, FCOMMENT] {
        if flags & text != 0 {
            let nul = rest.iter().position(|&byte| byte == 0)?;
            rest = rest.get(nul + 1..)?;
        }
    }
    if flags & FHCRC != 0 {
        rest = rest.get(2..)?;
    }
    Some(rest)
}

/// Deflate data that decodes to nothing and ends with the upper `bits` bits of
/// `previous_byte`, so that the next byte fed continues a stream in which those
/// bits were still unread. Empty if `bits` is 0.
fn alignment(previous_byte: u8, bits: u8) -> Vec<u8> {
    let bits = u32::from(bits.min(7));
    if bits == 0 {
        return Vec::new();
    }
    let mut out = BitWriter::default();
    // Blocks of 10 bits reach every even position within a byte; one of 95 bits
    // (95 % 8 == 7) before them reaches the odd ones.
    if bits % 2 == 1 {
        empty_dynamic_block(&mut out);
    }
    while out.len % 8 != 8 - bits {
        out.push(0b010, 3); // not final, fixed codes
        out.push(0, 7); // end of block
    }
    out.push(u32::from(previous_byte) >> (8 - bits), bits);
    out.bytes
}

/// 95 bits: a block with its own codes, of which only "end of block" exists.
fn empty_dynamic_block(out: &mut BitWriter) {
    out.push(0b100, 3); // not final, dynamic codes
    out.push(0, 5); // 257 literal and length codes
    out.push(0, 5); // 1 distance code
    out.push(15, 4); // 19 lengths of code length codes, in the order of RFC 1951:
    for (symbol, length) in [
        16, 17, 18, 0, 8, 7, 9, 6, 10, 5, 11, 4, 12, 3, 13, 2, 14, 1, 15,
    ]
    .map(|symbol| {
        (
            symbol,
            match symbol {
                18 => 1_u32,
                0 | 1 => 2,
                _ => 0,
            },
        )
    }) {
        debug_assert!(symbol <= 18);
        out.push(length, 3);
    }
    // The codes are 18 -> `0`, 0 -> `10`, 1 -> `11`; Huffman codes go in with
    // their first bit lowest.
    for zeros in [138_u32, 118] {
        out.push(0, 1); // 18: repeat a zero length ...
        out.push(zeros - 11, 7); // ... that many times: 256 literals without a code
    }
    out.push(0b11, 2); // "end of block" has a code of length 1
    out.push(0b01, 2); // the distance code has none
    out.push(0, 1); // end of block
}

/// Packs bits as deflate does: lowest bit of a byte first.
#[derive(Default)]
struct BitWriter {
    bytes: Vec<u8>,
    /// Bits written.
    len: u32,
}

impl BitWriter {
    fn push(&mut self, value: u32, bits: u32) {
        for i in 0..bits {
            if self.len.is_multiple_of(8) {
                self.bytes.push(0);
            }
            if let (Some(last), true) = (self.bytes.last_mut(), value >> i & 1 == 1) {
                *last |= 1 << (self.len % 8);
            }
            self.len += 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use flate2::Compression;
    use flate2::write::{DeflateEncoder, GzEncoder};
    use proptest::prelude::*;

    use super::*;

    fn context(dictionary: &[u8], previous_byte: u8, bits: u8) -> ZranContext<'_> {
        ZranContext {
            input: 0..0,
            output_offset: 0,
            output_size: 0,
            dictionary,
            previous_byte,
            bits,
        }
    }

    fn deflate(data: &[u8]) -> Vec<u8> {
        let mut encoder = DeflateEncoder::new(Vec::new(), Compression::default());
        encoder.write_all(data).unwrap();
        encoder.finish().unwrap()
    }

    fn gzip(data: &[u8]) -> Vec<u8> {
        let mut encoder = GzEncoder::new(Vec::new(), Compression::default());
        encoder.write_all(data).unwrap();
        encoder.finish().unwrap()
    }

    proptest! {
        /// Shifting a stream by some bits and priming the decoder with them
        /// decodes to the same bytes. Stored blocks depend on byte boundaries,
        /// hence the compressible data.
        #[test]
        fn a_stream_may_start_at_any_bit(piece in prop::collection::vec(0_u8..4, 1..50), times in 8_usize..200, bits in 0_u8..8) {
            let data = piece.repeat(times);
            let packed = deflate(&data);
            let mut shifted = BitWriter::default();
            // The unused low bits of the first byte belong to what came before.
            shifted.push(0xff, u32::from(8 - bits) % 8);
            for byte in &packed {
                shifted.push(u32::from(*byte), 8);
            }
            let bytes = shifted.bytes;
            let (previous, input) = if bits == 0 { (0, &bytes[..]) } else { (bytes[0], &bytes[1..]) };
            let mut dst = vec![0; data.len()];
            decode(&context(&[], previous, bits), input, &mut dst).unwrap();
            prop_assert_eq!(dst, data);
        }

        #[test]
        fn hostile_input_never_panics(input in prop::collection::vec(any::<u8>(), 0..300), bits in 0_u8..8, previous in any::<u8>()) {
            let _ = decode(&context(b"dictionary", previous, bits), &input, &mut [0; 500]);
        }
    }

    #[test]
    fn members_are_chained_and_decoding_stops_when_complete() {
        let (one, two) = (b"first member ".repeat(50), b"second ".repeat(70));
        let mut stream = gzip(&one);
        // A second member with every optional field.
        let mut second = gzip(&two);
        second[3] = 0b1_1110;
        second.splice(
            10..10,
            b"\x03\x00abcname\0comment\0\xaa\xbb".iter().copied(),
        );
        stream.extend_from_slice(&second);

        let body = &stream[10..];
        let all = [&one[..], &two[..]].concat();
        let mut dst = vec![0; all.len()];
        decode(&context(&[], 0, 0), body, &mut dst).unwrap();
        assert_eq!(dst, all);

        // Complete output needs no trailer; one byte more is too much.
        let mut exact = vec![0; one.len()];
        let end_of_deflate = gzip(&one).len() - 8;
        decode(&context(&[], 0, 0), &stream[10..end_of_deflate], &mut exact).unwrap();
        assert_eq!(exact, one);
        assert!(decode(&context(&[], 0, 0), body, &mut vec![0; all.len() + 1]).is_err());
        assert!(decode(&context(&[], 0, 0), &body[..20], &mut exact).is_err());
    }
}
