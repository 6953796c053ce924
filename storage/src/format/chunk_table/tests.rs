//! Tables that no writer of ours makes: damaged, foreign, and with gzip contexts.

use proptest::prelude::*;
use zerocopy::IntoBytes as _;

use super::*;
use crate::algorithm::{Compressor, Digester};
use crate::blob_id::BlobId;
use crate::blob_info::MetaLocation;
use crate::chunk::Encoding;
use crate::codec::{self, CodecError};
use crate::digest::Digest;
use crate::format::entry::flags;
use crate::format::header::ContextArea;
use crate::format::stored_table;

fn info(features: u32, chunk_count: u32, table_len: usize) -> BlobInfo {
    BlobInfo {
        id: BlobId::placeholder(),
        chunk_size: 0x10000,
        chunk_count,
        compressor: Compressor::Zstd,
        digester: Digester::Blake3,
        features: BlobFeatures::from_bits(features),
        compressed_size: 1_000_000,
        uncompressed_size: 0x10_0000,
        meta: MetaLocation {
            compressor: Compressor::None,
            offset: 900_000,
            compressed_size: table_len as u64,
            uncompressed_size: table_len as u64,
        },
        toc_size: 0,
        toc_digest: Digest::default(),
        meta_blob_digest: Digest::default(),
        meta_blob_size: 0,
    }
}

/// The cache file form of `table`.
fn cache_form(table: &[u8], info: &BlobInfo, contexts: ContextArea) -> Vec<u8> {
    let header = Header {
        features: info.features,
        chunk_count: info.chunk_count,
        table: info.meta,
        contexts,
    };
    let mut bytes = table.to_vec();
    bytes.resize(table.len().next_multiple_of(4096), 0);
    bytes.extend_from_slice(&*header.encode());
    bytes
}

fn v2_table(entries: &[Entry]) -> Vec<u8> {
    entries
        .iter()
        .flat_map(|entry| entry.to_v2().unwrap().as_bytes().to_vec())
        .collect()
}

fn entry(block: u64, flags: u8) -> Entry {
    Entry {
        plain_offset: block * 4096,
        plain_size: 5000,
        offset: 10,
        size: 100,
        flags,
        data: 0,
    }
}

/// Opens a v2 table without contexts.
fn open_v2(entries: &[Entry]) -> Result<ChunkTable, FormatError> {
    let bytes = v2_table(entries);
    let info = info(
        0x4000_0005,
        u32::try_from(entries.len()).unwrap(),
        bytes.len(),
    );
    ChunkTable::open(
        Mapped::from_vec(cache_form(&bytes, &info, ContextArea::default())),
        &info,
    )
}

fn field_of<T: std::fmt::Debug>(result: Result<T, FormatError>) -> &'static str {
    match result {
        Err(
            FormatError::Corrupt { field, .. }
            | FormatError::Mismatch { field, .. }
            | FormatError::Unsupported { feature: field, .. },
        ) => field,
        other => panic!("{other:?}"),
    }
}

#[test]
fn chunks_that_overlap_anywhere_are_refused() {
    let good = flags::COMPRESSED;
    assert!(open_v2(&[entry(0, good), entry(2, good), entry(9, good)]).is_ok());
    for blocks in [[0, 1, 5], [0, 5, 2], [3, 1, 0]] {
        let entries = blocks.map(|block| entry(block, good));
        assert_eq!(field_of(open_v2(&entries)), "plain offset", "{blocks:?}");
    }
}

#[test]
fn every_rule_of_an_entry_is_checked() {
    let good = entry(0, flags::COMPRESSED);
    let chunk = |entry| open_v2(&[entry]).unwrap().chunk(ChunkIndex::new(0));
    assert_eq!(
        chunk(Entry {
            flags: flags::COMPRESSED | flags::HAS_CRC,
            data: 7,
            ..good
        })
        .unwrap(),
        Chunk {
            plain_offset: 0,
            plain_size: 5000,
            encoding: Encoding::Compressed {
                offset: 10,
                size: 100
            },
            crc32c: Some(7),
        }
    );
    for (bad, field) in [
        (
            Entry {
                plain_size: 0x10001,
                ..good
            },
            "plain size",
        ),
        (
            Entry {
                plain_offset: 0xf_f000,
                ..good
            },
            "plain offset",
        ),
        (
            Entry {
                offset: 899_901,
                ..good
            },
            "stored offset",
        ),
        (
            Entry {
                offset: (1 << 40) - 1,
                ..good
            },
            "stored offset",
        ),
        (Entry { size: 0, ..good }, "stored size"),
        (Entry { flags: 0, ..good }, "stored size"),
        (
            Entry {
                flags: flags::COMPRESSED | flags::HAS_CRC,
                ..good
            },
            "CRC32C",
        ),
        (
            Entry {
                flags: flags::COMPRESSED | flags::ENCRYPTED,
                ..good
            },
            "encryption",
        ),
        (
            Entry {
                flags: flags::COMPRESSED | flags::ZRAN,
                ..good
            },
            "flags",
        ),
        (
            Entry {
                flags: flags::COMPRESSED | flags::BATCH,
                ..good
            },
            "flags",
        ),
    ] {
        assert_eq!(field_of(chunk(bad)), field, "{bad:?}");
    }
    let table = open_v2(&[good]).unwrap();
    assert!(matches!(
        table.chunk(ChunkIndex::new(1)),
        Err(FormatError::NoSuch { .. })
    ));
    assert!(matches!(
        table.batch_context(0),
        Err(FormatError::NoSuch { .. })
    ));
}

#[test]
fn a_table_of_another_blob_is_noticed() {
    let bytes = v2_table(&[entry(0, flags::COMPRESSED)]);
    let right = info(0x4000_0005, 1, bytes.len());
    let file = cache_form(&bytes, &right, ContextArea::default());
    let open =
        |info: &BlobInfo, file: &[u8]| ChunkTable::open(Mapped::from_vec(file.to_vec()), info);
    assert!(open(&right, &file).is_ok());

    let mut other = right.clone();
    other.meta.offset += 1;
    assert_eq!(field_of(open(&other, &file)), "table offset");
    let mut other = right.clone();
    other.meta.compressor = Compressor::Zstd;
    assert_eq!(field_of(open(&other, &file)), "table compressor");
    for (count, size) in [(2, 48), (2, 24), (1, 48), (1, 0), (1, u64::MAX)] {
        let mut other = right.clone();
        other.chunk_count = count;
        other.meta.uncompressed_size = size;
        assert!(
            open(&other, &file).is_err(),
            "{count} chunks in {size} bytes"
        );
    }
    for len in [0, 1, 4096, file.len() - 1] {
        assert!(open(&right, &file[..len]).is_err(), "{len}");
    }
    for (features, feature) in [
        (0x4000_0105, "encryption"),
        (0x4000_0805, "an external data store"),
        (0x4000_0045, "a raw tar used in place"),
        (0x4000_0081, "features"),
        (0x4000_008d, "features"),
    ] {
        assert_eq!(field_of(open(&info(features, 1, 24), &file)), feature);
    }
}

/// Two gzip chunks in one context with a dictionary of 5 bytes.
fn zran_table() -> (Vec<u8>, BlobInfo, ContextArea) {
    let chunk = |block, within| Entry {
        size: 0,
        data: within,
        ..entry(block, flags::COMPRESSED | flags::ZRAN)
    };
    let mut bytes = v2_table(&[chunk(0, 512), chunk(2, 6144)]);
    let mut context = [0; CONTEXT_SIZE];
    context[0] = 10; // input offset
    context[24] = 200; // input size
    context[28..30].copy_from_slice(&11_144_u16.to_le_bytes()); // output size
    context[32] = 5; // dictionary size
    bytes.extend_from_slice(&context);
    bytes.extend_from_slice(b"abcde");
    let info = info(0x5d, 2, bytes.len());
    let features = info.features.without(BlobFeatures::TARFS);
    let area = ContextArea {
        offset: 48,
        size: 45,
        count: 1,
    };
    (bytes, BlobInfo { features, ..info }, area)
}

#[test]
fn gzip_chunks_refer_to_their_context() {
    let (bytes, info, area) = zran_table();
    let open = |area| ChunkTable::open(Mapped::from_vec(cache_form(&bytes, &info, area)), &info);
    let table = open(area).unwrap();
    let chunk = table.chunk(ChunkIndex::new(1)).unwrap();
    assert_eq!(
        chunk.encoding,
        Encoding::Zran {
            context: 0,
            within: 6144
        }
    );
    let context = table.zran_context(0).unwrap();
    assert_eq!(
        (context.input, context.dictionary),
        (10..210, &b"abcde"[..])
    );

    for bad in [
        ContextArea { offset: 47, ..area },
        ContextArea { size: 46, ..area },
        ContextArea { size: 39, ..area },
        ContextArea { count: 3, ..area },
        ContextArea {
            size: u64::MAX,
            ..area
        },
    ] {
        assert!(open(bad).is_err(), "{bad:?}");
    }
    // The dictionary no longer fits: chunks of that context are unreadable.
    let shorter = open(ContextArea { size: 44, ..area }).unwrap();
    assert_eq!(
        field_of(shorter.chunk(ChunkIndex::new(0))),
        "dictionary size"
    );
}

proptest! {
    #[test]
    fn damaged_gzip_tables_never_panic(damage in prop::collection::vec((0_usize..93, any::<u8>()), 1..8), area in any::<[u64; 2]>(), count in 0_u32..4) {
        let (mut bytes, info, mut contexts) = zran_table();
        for (at, value) in damage {
            bytes[at] = value;
        }
        contexts.count = count;
        for contexts in [contexts, ContextArea { offset: area[0], size: area[1], count }] {
            let file = cache_form(&bytes, &info, contexts);
            if let Ok(table) = ChunkTable::open(Mapped::from_vec(file), &info) {
                for index in 0..3 {
                    let _ = table.chunk(ChunkIndex::new(index));
                    if let Ok(context) = table.zran_context(index) {
                        prop_assert!(context.input.end <= info.data_size());
                    }
                }
            }
        }
    }
}

/// The stored form of `table`, and the info that goes with it.
fn stored(table: &[u8], count: u32, compressor: Compressor, packed: &[u8]) -> (BlobInfo, Vec<u8>) {
    let mut info = info(0x4000_0005, count, table.len());
    info.meta.compressor = compressor;
    info.meta.compressed_size = packed.len() as u64;
    let form = cache_form(table, &info, ContextArea::default());
    (info, [packed, &form[form.len() - HEADER_SIZE..]].concat())
}

#[test]
fn stored_tables_are_decoded_with_every_compressor() {
    let entries: Vec<Entry> = (0..100).map(|i| entry(i * 2, flags::COMPRESSED)).collect();
    let table = v2_table(&entries);
    for compressor in [Compressor::None, Compressor::Lz4, Compressor::Zstd] {
        let packed = codec::compress(compressor, &table)
            .unwrap()
            .unwrap_or(table.clone());
        let (info, bytes) = stored(&table, 100, compressor, &packed);
        assert_eq!(
            stored_table::stored_range(&info).unwrap(),
            900_000..900_000 + bytes.len() as u64
        );
        assert_eq!(stored_table::open(&info, &bytes).unwrap().len(), 100);
        assert!(stored_table::open(&info, &bytes[1..]).is_err());

        // More or less content than announced.
        for len in [table.len() - 24, table.len() + 24] {
            let mut other = table.clone();
            other.resize(len, 0);
            let packed = codec::compress(compressor, &other)
                .unwrap()
                .unwrap_or(other);
            let (info, bytes) = stored(&table, 100, compressor, &packed);
            assert!(
                stored_table::open(&info, &bytes).is_err(),
                "{compressor} {len}"
            );
        }
    }
}

#[test]
fn announced_sizes_do_not_make_a_reader_allocate() {
    // 100 bytes cannot expand to 256 MiB with lz4, and zstd says how much it has.
    let claimed = 256 << 20;
    for compressor in [Compressor::Lz4, Compressor::Zstd] {
        let packed = codec::compress(compressor, &[0; 5000]).unwrap().unwrap();
        let mut info = info(0x4000_0085, 1, claimed);
        info.meta.compressor = compressor;
        info.meta.compressed_size = packed.len() as u64;
        let form = cache_form(&[], &info, ContextArea::default());
        let bytes = [&packed, &form[form.len() - HEADER_SIZE..]].concat();
        let error = stored_table::open(&info, &bytes).unwrap_err();
        match compressor {
            Compressor::Lz4 => assert_eq!(field_of::<()>(Err(error)), "uncompressed size"),
            _ => assert!(matches!(
                error,
                FormatError::Codec {
                    source: CodecError::Length { got: 5000, .. },
                    ..
                }
            )),
        }
    }
    let mut huge = info(0x4000_0005, 1, 24);
    huge.meta.uncompressed_size = stored_table::MAX_TABLE + 1;
    assert_eq!(
        field_of(stored_table::stored_range(&huge)),
        "uncompressed size"
    );
    let mut far = info(0x4000_0005, 1, 24);
    far.meta.offset = u64::MAX - 100;
    assert_eq!(field_of(stored_table::stored_range(&far)), "offset");
}
