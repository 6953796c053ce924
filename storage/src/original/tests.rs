//! Every chunk of a layer can be decoded from where its reader says it is.

use std::io::{Cursor, Read as _, Write as _};

use proptest::prelude::*;

use super::*;
use crate::codec::zran;
use crate::format::context::ZranContext;

fn gzip(data: &[u8], level: u32) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::new(level));
    encoder.write_all(data).unwrap();
    encoder.finish().unwrap()
}

/// Text-like data: compresses, but not to nothing.
fn words(len: usize, mut seed: u32) -> Vec<u8> {
    let mut out = Vec::with_capacity(len + 8);
    while out.len() < len {
        seed = seed.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        out.extend_from_slice(format!("{:x} ", seed >> 20).as_bytes());
    }
    out.truncate(len);
    out
}

/// Reads `stored` in chunks, and the bytes of every chunk from its place again.
/// Returns the number of contexts.
fn round_trip(stored: &[u8], plain: &[u8], sizes: impl IntoIterator<Item = usize>) -> usize {
    let mut reader = LayerReader::open(Cursor::new(stored)).unwrap();
    let mut places = Vec::new();
    let mut at = 0;
    for size in sizes {
        let size = size.min(plain.len() - at);
        if size == 0 {
            break;
        }
        reader.begin_chunk(u32::try_from(size).unwrap()).unwrap();
        let mut chunk = vec![0; size];
        reader.read_exact(&mut chunk).unwrap();
        assert!(chunk == plain[at..at + size]);
        places.push((reader.end_chunk().unwrap(), at..at + size));
        at += size;
    }
    let mut rest = Vec::new();
    reader.read_to_end(&mut rest).unwrap();
    assert!(rest == plain[at..]);
    let digest = Digest::from_bytes(Sha256::digest(stored).into());
    let size = stored.len() as u64;
    assert_eq!(reader.summary(), Summary { digest, size });
    let mut contexts: Vec<*const ContextStart> = Vec::new();
    for (place, range) in places {
        let bytes = match place {
            Place::Tar { offset } => {
                let start = usize::try_from(offset).unwrap();
                stored[start..start + range.len()].to_vec()
            }
            Place::Gzip {
                context,
                within,
                start,
                end,
            } => {
                assert!(start <= end && context.input_offset <= start);
                if contexts.last() != Some(&Arc::as_ptr(&context)) {
                    contexts.push(Arc::as_ptr(&context));
                }
                let within = usize::try_from(within).unwrap();
                let mut output = vec![0; within + range.len()];
                let input = context.input_offset..end;
                let input = &stored
                    [usize::try_from(input.start).unwrap()..usize::try_from(input.end).unwrap()];
                let context = ZranContext {
                    input: context.input_offset..end,
                    output_offset: context.output_offset,
                    output_size: u32::try_from(output.len()).unwrap(),
                    dictionary: &context.dictionary,
                    previous_byte: context.previous_byte,
                    bits: context.bits,
                };
                zran::decode(&context, input, &mut output).unwrap();
                output.split_off(within)
            }
        };
        assert!(bytes == plain[range.clone()], "chunk at {range:?}");
    }
    contexts.len()
}

#[test]
fn a_large_layer_has_several_contexts() {
    let plain = words(6 << 20, 1);
    // Level 1 of this encoder makes one block of all.
    for level in [3, 6, 9] {
        let contexts = round_trip(&gzip(&plain, level), &plain, std::iter::repeat(70_000));
        assert!((3..20).contains(&contexts), "{contexts} at level {level}");
    }
    assert_eq!(round_trip(&plain, &plain, std::iter::repeat(70_000)), 0);
}

#[test]
fn a_layer_without_block_boundaries_is_refused() {
    let stored = gzip(&words(40 << 20, 1), 1);
    let mut reader = LayerReader::open(Cursor::new(stored)).unwrap();
    let error = loop {
        match reader.begin_chunk(1 << 20) {
            Ok(()) => reader.read_exact(&mut vec![0; 1 << 20]).unwrap(),
            Err(error) => break error,
        }
    };
    assert_eq!(error.kind(), ErrorKind::Unsupported);
    assert!(error.to_string().contains("block boundary"), "{error}");
}

#[test]
fn zeros_and_noise() {
    let zeros = vec![0; 20 << 20];
    round_trip(&gzip(&zeros, 9), &zeros, std::iter::repeat(1 << 20));
    let noise: Vec<u8> = (0..1_000_000_u64)
        .map(|i| (i.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 56).to_le_bytes()[0])
        .collect();
    round_trip(&gzip(&noise, 6), &noise, std::iter::repeat(4096));
    // Stored blocks only.
    round_trip(&gzip(&noise, 0), &noise, std::iter::repeat(4096));
}

#[test]
fn a_chunk_may_end_with_its_member() {
    let parts: Vec<_> = (0..50).map(|i| words(5000, i)).collect();
    let stored: Vec<u8> = parts.iter().flat_map(|part| gzip(part, 6)).collect();
    let plain = parts.concat();
    let contexts = round_trip(&stored, &plain, std::iter::repeat(5000));
    assert!(contexts < 5, "{contexts}");
}

#[test]
fn zeros_may_follow_the_last_member_and_nothing_else() {
    let plain = words(100_000, 3);
    let mut stored = gzip(&plain, 6);
    stored.extend_from_slice(&[0; 100_000]);
    round_trip(&stored, &plain, [1000]);
    stored.push(1);
    let error = read(&stored).unwrap_err();
    assert!(error.to_string().contains("other data follows"), "{error}");
}

fn read(stored: &[u8]) -> io::Result<Vec<u8>> {
    let mut plain = Vec::new();
    LayerReader::open(stored)?.read_to_end(&mut plain)?;
    Ok(plain)
}

#[test]
fn damage_says_where_and_what() {
    let stored = gzip(&words(500_000, 4), 6);
    let cut = read(&stored[..100_000]).unwrap_err().to_string();
    assert_eq!(
        cut,
        "gzip member 1, at compressed byte 100000: the data ends inside a gzip member"
    );
    let mut changed = stored.clone();
    let checksum = changed.len() - 8;
    changed[checksum] ^= 1;
    let error = read(&changed).unwrap_err().to_string();
    assert!(error.contains("incorrect data check"), "{error}");
    let zstd = zstd::encode_all(&b"x"[..], 1).unwrap();
    assert!(read(&zstd).unwrap_err().to_string().contains("zstd"));
}

#[test]
fn tiny_blocks_do_not_cost_a_dictionary_each() {
    let plain = words(200_000, 5);
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::new(6));
    for piece in plain.chunks(10) {
        encoder.write_all(piece).unwrap();
        encoder.flush().unwrap();
    }
    let stored = encoder.finish().unwrap();
    round_trip(&stored, &plain, std::iter::repeat(333));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]

    #[test]
    fn any_chunks_of_any_members(
        members in prop::collection::vec((0_usize..300_000, 0_u32..10), 1..5),
        sizes in prop::collection::vec(1_usize..100_000, 1..20),
    ) {
        let parts: Vec<_> = (0..).zip(&members).map(|(i, (len, _))| words(*len, i)).collect();
        let stored: Vec<u8> = parts
            .iter()
            .zip(&members)
            .flat_map(|(part, (_, level))| gzip(part, *level))
            .collect();
        round_trip(&stored, &parts.concat(), sizes);
    }

    #[test]
    fn hostile_streams_never_panic(mut bytes in prop::collection::vec(any::<u8>(), 0..2000), cut: bool) {
        let mut stored = gzip(&words(3000, 9), 6);
        if cut {
            stored.truncate(stored.len() / 2);
        }
        stored.append(&mut bytes);
        let _ = read(&stored);
        stored.splice(20..20, [1, 2, 3]);
        let _ = read(&stored);
    }
}
