//! Blobs against known bytes, and against what readers make of them.

use proptest::prelude::*;

use super::*;
use crate::blob_info::MetaLocation;
use crate::chunk::Encoding;
use crate::codec;
use crate::format::chunk_table::ChunkTable;
use crate::format::stored_table;
use crate::format::tar_header::{self, names};
use crate::format::toc::{self, Tail};
use crate::mapped::Mapped;

fn no_bootstrap(_: Option<&BlobInfo>) -> Result<Vec<u8>, Box<dyn StdError + Send + Sync>> {
    Err("no bootstrap was asked for".into())
}

fn options() -> BlobOptions {
    BlobOptions {
        compressor: Compressor::None,
        chunk_size: 0x1000,
        ..BlobOptions::default()
    }
}

fn raw(digester: Digester, bytes: &[u8]) -> PreparedChunk<'_> {
    PreparedChunk {
        digest: Digest::of(digester, bytes),
        uncompressed_size: u32::try_from(bytes.len()).unwrap(),
        crc32c: crc32c::crc32c(bytes),
        data: ChunkData::Raw(bytes),
    }
}

/// The three chunks of `docs/format-blob.md`, "Golden blob".
fn golden(options: BlobOptions) -> (FinishedBlob, Vec<u8>, Vec<StoredChunk>) {
    let mut file = Vec::new();
    let mut writer = BlobWriter::new(&mut file, options).unwrap();
    let mut stored = Vec::new();
    for (bytes, whole_file) in [
        (&[b'A'; 4096][..], false),
        (&[b'B'; 904], false),
        (b"hi\n", true),
    ] {
        let mut chunk = raw(options.digester, bytes);
        if options.batches(chunk.uncompressed_size, whole_file) {
            chunk.data = ChunkData::Batched(bytes);
        }
        stored.push(writer.append(&chunk).unwrap());
    }
    let finished = writer.finish(no_bootstrap).unwrap();
    (finished, file, stored)
}

#[test]
fn golden_blob() {
    let (blob, file, stored) = golden(BlobOptions {
        blob_toc: true,
        ..options()
    });
    assert_eq!(
        blob.id.as_str(),
        "44d6bea12e95e178233b95b8c249d0e49274a65e4c5316ac7b385eb7b7f91846"
    );
    assert_eq!(
        blob.file_sha256.to_string(),
        "da0cdc52133dbe196caa944b910596f959facfed240cfcc167004cfffe19d994"
    );
    assert_eq!(Digest::of(Digester::Sha256, &file), blob.file_sha256);
    assert_eq!((blob.file_size, file.len()), (11803, 11803));
    let info = blob.info.unwrap();
    assert_eq!(
        info.toc_digest.to_string(),
        "45dd9c851acdf62e89fb0fbefe81c25d6b3339b1183fdceef72c650fbc1a2646"
    );
    let expected = BlobInfo {
        id: blob.id,
        chunk_size: 0x1000,
        chunk_count: 3,
        compressor: Compressor::None,
        digester: Digester::Blake3,
        features: BlobFeatures::from_bits(0x7000_0021),
        compressed_size: 11803,
        uncompressed_size: 12288,
        meta: MetaLocation {
            compressor: Compressor::None,
            offset: 5515,
            compressed_size: 48,
            uncompressed_size: 48,
        },
        toc_size: 1024,
        toc_digest: info.toc_digest,
        meta_blob_digest: Digest::default(),
        meta_blob_size: 0,
    };
    assert_eq!(info, expected);
    assert_eq!(
        stored.last(),
        Some(&StoredChunk {
            index: ChunkIndex::new(2),
            compressed: false,
            compressed_size: 3,
            compressed_offset: 5000,
            uncompressed_offset: 0x2000,
        })
    );
}

#[test]
fn golden_batch_table() {
    let (blob, file, stored) = golden(BlobOptions {
        batch_size: 0x1000,
        ..options()
    });
    let mut expected = vec![
        0x00, 0x00, 0x00, 0x00, 0xff, 0x0f, 0x00, 0x10, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x10,
        0x00, 0xe9, 0x51, 0x72, 0x05, 0x00, 0x00, 0x00, 0x00, // chunk 0
        0x01, 0x00, 0x00, 0x00, 0x87, 0x03, 0x00, 0x10, 0x00, 0x10, 0x00, 0x00, 0x00, 0x88, 0x03,
        0x00, 0x05, 0x9a, 0xaa, 0x8b, 0x00, 0x00, 0x00, 0x00, // chunk 1
        0x02, 0x00, 0x00, 0x00, 0x02, 0x00, 0x00, 0x05, 0x88, 0x13, 0x00, 0x00, 0x00, 0x00, 0x00,
        0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, // chunk 2, in batch 0
        0x03, 0x00, 0x00, 0x00, 0x03, 0x00, 0x00, 0x00, // batch 0: 3 bytes, raw
    ];
    expected.resize(112, 0);
    assert_eq!(file[5003..5115], expected);
    // Contexts in the header: offset, size, count.
    assert_eq!(
        file[5115 + 40..5115 + 60],
        [72_u32, 0, 40, 0, 1].map(u32::to_le_bytes).concat()
    );
    let info = blob.info.unwrap();
    assert_eq!(info.features.bits(), 0x4000_0085);
    let last = stored.last().unwrap();
    assert_eq!((last.compressed_size, last.compressed_offset), (0, 0));
    check_chunks(
        &info,
        &blob.cct,
        &file,
        &[vec![b'A'; 4096], vec![b'B'; 904], b"hi\n".to_vec()],
    );
}

/// Decodes one chunk as a reader would.
fn decode(table: &ChunkTable, info: &BlobInfo, file: &[u8], index: u32) -> Vec<u8> {
    let chunk = table.chunk(ChunkIndex::new(index)).unwrap();
    let at = |offset: u64, size: u32| {
        let start = usize::try_from(offset).unwrap();
        &file[start..start + size as usize]
    };
    let mut plain = vec![0; chunk.plain_size as usize];
    match chunk.encoding {
        Encoding::Raw { offset } => plain.copy_from_slice(at(offset, chunk.plain_size)),
        Encoding::Compressed { offset, size } => {
            codec::decompress_into(info.compressor, at(offset, size), &mut plain).unwrap();
        }
        Encoding::Batch {
            offset,
            context,
            within,
        } => {
            let batch = table.batch_context(context).unwrap();
            let mut all = vec![0; batch.uncompressed_size as usize];
            let how = if batch.is_raw() {
                Compressor::None
            } else {
                info.compressor
            };
            codec::decompress_into(how, at(offset, batch.compressed_size), &mut all).unwrap();
            plain.copy_from_slice(&all[within as usize..][..chunk.plain_size as usize]);
        }
        Encoding::Zran { .. } => panic!("native blobs have no gzip chunks"),
    }
    if let Some(crc) = chunk.crc32c {
        assert_eq!(crc, crc32c::crc32c(&plain));
    }
    plain
}

/// Opens the table from the cache form and from the blob, and decodes every chunk.
fn check_chunks(info: &BlobInfo, cct: &[u8], file: &[u8], chunks: &[Vec<u8>]) -> ChunkTable {
    let range = stored_table::stored_range(info).unwrap();
    let range = usize::try_from(range.start).unwrap()..usize::try_from(range.end).unwrap();
    let mut cache_form = Vec::new();
    stored_table::write_cache_form(info, &file[range], &mut cache_form).unwrap();
    assert_eq!(cache_form, cct);
    let table = ChunkTable::open(Mapped::from_vec(cache_form), info).unwrap();
    assert_eq!(table.len() as usize, chunks.len());
    for (index, chunk) in (0..).zip(chunks) {
        assert_eq!(&decode(&table, info, file, index), chunk, "chunk {index}");
    }
    table
}

fn write(
    options: BlobOptions,
    chunks: &[Vec<u8>],
    bootstrap: &[u8],
) -> (FinishedBlob, Vec<u8>, Option<BlobInfo>) {
    let mut file = Vec::new();
    let mut writer = BlobWriter::new(&mut file, options).unwrap();
    for bytes in chunks {
        let mut chunk = raw(options.digester, bytes);
        let packed = codec::compress(options.compressor, bytes).unwrap();
        if options.batches(chunk.uncompressed_size, true) {
            chunk.data = ChunkData::Batched(bytes);
        } else if let Some(packed) = &packed {
            chunk.data = ChunkData::Compressed(packed);
        }
        writer.append(&chunk).unwrap();
    }
    let mut seen = None;
    let finished = writer
        .finish(|info| {
            seen = info.cloned();
            Ok(bootstrap.to_vec())
        })
        .unwrap();
    (finished, file, seen)
}

fn any_options() -> impl Strategy<Value = BlobOptions> {
    let compressor =
        prop::sample::select(vec![Compressor::None, Compressor::Lz4, Compressor::Zstd]);
    let batch_size = prop::sample::select(vec![0, 0x1000, 0x4000]);
    (compressor, any::<[bool; 4]>(), batch_size).prop_map(|(compressor, flags, batch_size)| {
        let [sha256, blob_toc, inline_bootstrap, chunk_info_v2] = flags;
        BlobOptions {
            compressor,
            level: codec::DEFAULT_ZSTD_LEVEL,
            digester: if sha256 {
                Digester::Sha256
            } else {
                Digester::Blake3
            },
            chunk_size: 0x4000,
            blob_toc,
            inline_bootstrap,
            chunk_info_v2,
            batch_size,
            original: None,
        }
    })
}

/// Chunks of all sizes; some compress, some do not.
fn any_chunks() -> impl Strategy<Value = Vec<Vec<u8>>> {
    let chunk = (prop::collection::vec(any::<u8>(), 1..500), 1_usize..32).prop_map(|(piece, n)| {
        let mut chunk = piece.repeat(n);
        chunk.truncate(0x4000);
        chunk
    });
    prop::collection::vec(chunk, 0..40)
}

fn sha256(bytes: &[u8]) -> Digest {
    Digest::of(Digester::Sha256, bytes)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// What was written reads back, in every variant, and the blob describes itself.
    #[test]
    fn every_chunk_comes_back(options in any_options(), chunks in any_chunks()) {
        let bootstrap = b"bootstrap ".repeat(500);
        let (blob, file, seen) = write(options, &chunks, &bootstrap);
        prop_assert_eq!(blob.file_size, as_u64(file.len()));
        prop_assert_eq!(blob.file_sha256, sha256(&file));
        prop_assert_eq!(blob.info.is_some(), !chunks.is_empty());

        let mut id = file.clone();
        if options.blob_toc && (!chunks.is_empty() || options.inline_bootstrap) {
            let toc = toc::Toc::verified(&file[file.len() - blob.toc_size as usize..], &blob.toc_digest).unwrap();
            let tail = toc::tail_size(as_u64(file.len()));
            let located = toc::locate(&file[file.len() - usize::try_from(tail).unwrap()..]).unwrap();
            prop_assert_eq!(located, Tail::Toc(toc.clone()));
            for entry in &toc.entries {
                let start = usize::try_from(entry.offset).unwrap();
                let stored = &file[start..start + usize::try_from(entry.stored_size).unwrap()];
                if entry.name == names::DATA {
                    prop_assert_eq!(entry.digest, sha256(&file[..stored.len() + tar_header::SIZE]));
                    continue;
                }
                let plain = entry.extract(stored, 1 << 20).unwrap();
                if entry.name == names::BOOTSTRAP {
                    prop_assert_eq!(&plain, &bootstrap);
                }
                if entry.name == names::DIGESTS {
                    let digests: Vec<u8> = chunks.iter().flat_map(|chunk| *Digest::of(options.digester, chunk).as_bytes()).collect();
                    prop_assert_eq!(plain, digests);
                    id.drain(start..start + stored.len());
                }
            }
        } else if options.inline_bootstrap {
            let end = file.len() - tar_header::SIZE;
            let tail = toc::locate(&file[end..]).unwrap();
            prop_assert_eq!(tail, Tail::Bootstrap { size: as_u64(bootstrap.len()) });
            prop_assert_eq!(&file[end - bootstrap.len()..end], &bootstrap[..]);
        }
        prop_assert_eq!(&blob.id, &BlobId::from_digest(&sha256(&id)));

        let Some(info) = blob.info else { return Ok(()) };
        let table = check_chunks(&info, &blob.cct, &file, &chunks);
        prop_assert_eq!(&info.id, &blob.id);
        if options.inline_bootstrap {
            let seen = seen.unwrap();
            prop_assert!(seen.id.is_placeholder());
            prop_assert_eq!(seen.compressed_size, info.compressed_size);
            prop_assert_eq!((seen.toc_size, info.toc_size), (0, 0));
        } else {
            prop_assert_eq!(info.compressed_size, blob.file_size);
        }
        // Searching agrees with looking at every chunk.
        for range in [0..1, 0..info.uncompressed_size, 4096..4096, 5000..12000, 0x3fff..0x4001] {
            let touching: Vec<u32> = (0..table.len()).filter(|&i| {
                let plain = table.chunk(ChunkIndex::new(i)).unwrap().plain_range();
                plain.start < range.end && range.start < plain.end
            }).collect();
            let found: Vec<u32> = table.covering(range.clone()).unwrap().collect();
            prop_assert_eq!(found, touching, "{:?}", range);
        }
    }

    /// Damage is an error or another valid table, never a panic and never a chunk
    /// outside its areas.
    #[test]
    fn damaged_tables_are_harmless(
        options in any_options(), chunks in any_chunks(),
        damage in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6),
    ) {
        let (blob, file, _) = write(options, &chunks, b"bootstrap");
        let Some(info) = blob.info else { return Ok(()) };
        let mut cct = blob.cct;
        // Entries, contexts and the used part of the header, not the padding.
        let table = usize::try_from(info.meta.uncompressed_size).unwrap();
        let header = cct.len() - 4096;
        for (at, value) in &damage {
            let at = at.index(table + 60);
            cct[if at < table { at } else { header + at - table }] = *value;
        }
        if let Ok(table) = ChunkTable::open(Mapped::from_vec(cct), &info) {
            for index in 0..table.len() + 1 {
                let Ok(chunk) = table.chunk(ChunkIndex::new(index)) else { continue };
                prop_assert!(chunk.plain_range().end <= info.uncompressed_size);
                prop_assert!(chunk.plain_size <= info.chunk_size);
                let end = match chunk.encoding {
                    Encoding::Raw { offset } => offset + u64::from(chunk.plain_size),
                    Encoding::Compressed { offset, size } => offset + u64::from(size),
                    Encoding::Batch { offset, context, .. } => offset + u64::from(table.batch_context(context).unwrap().compressed_size),
                    Encoding::Zran { .. } => 0,
                };
                prop_assert!(end <= info.data_size());
            }
            let _ = table.covering(0..u64::MAX);
        }
        let range = stored_table::stored_range(&info).unwrap();
        let mut stored = file[usize::try_from(range.start).unwrap()..usize::try_from(range.end).unwrap()].to_vec();
        for (at, value) in damage {
            let at = at.index(stored.len());
            stored[at] = value;
        }
        let _ = stored_table::open(&info, &stored);
    }
}

#[test]
fn without_chunks_there_is_no_blob_unless_something_is_embedded() {
    for blob_toc in [false, true] {
        let plain = BlobOptions {
            blob_toc,
            ..options()
        };
        let (blob, file, _) = write(plain, &[], b"unused");
        assert!(blob.info.is_none() && file.is_empty() && blob.file_size == 0);

        let inline = BlobOptions {
            inline_bootstrap: true,
            ..plain
        };
        let (blob, file, seen) = write(inline, &[], b"bootstrap");
        assert!(blob.info.is_none() && seen.is_none());
        let toc = if blob_toc { 128 + 512 } else { 0 };
        assert_eq!(file.len(), 9 + 512 + toc);
        assert_eq!(blob.toc_size as usize, toc);
    }
}

#[test]
fn feature_words_of_all_variants() {
    for (blob_toc, inline_bootstrap, bits) in [
        (false, false, 0x4000_0001_u32),
        (true, false, 0x7000_0021),
        (false, true, 0x5000_0003),
        (true, true, 0x7000_0023),
    ] {
        for (chunk_info_v2, batch_size, more) in
            [(false, 0, 0), (true, 0, 0x4), (false, 4096, 0x84)]
        {
            let options = BlobOptions {
                blob_toc,
                inline_bootstrap,
                chunk_info_v2,
                batch_size,
                ..options()
            };
            assert_eq!(options.features().bits(), bits | more);
        }
    }
}

proptest! {
    /// Batches that were sealed elsewhere give the same file as chunks one by one.
    #[test]
    fn sealed_batches_make_the_same_blob(chunks in any_chunks(), toc in any::<bool>()) {
        let options = BlobOptions {
            chunk_size: 0x4000,
            batch_size: 0x1000,
            blob_toc: toc,
            ..options()
        };
        let (one_by_one, expected, _) = write(options, &chunks, b"");
        let mut file = Vec::new();
        let mut writer = BlobWriter::new(&mut file, options).unwrap();
        let mut encoder = Encoder::new(options.compressor).unwrap();
        let mut batch = Batch::default();
        let mut flush = |batch: &mut Batch, writer: &mut BlobWriter<_>| {
            if !batch.is_empty() {
                let sealed = std::mem::take(batch).seal(&mut encoder).unwrap();
                writer.append_batch(&sealed).unwrap();
            }
        };
        for bytes in &chunks {
            let chunk = raw(options.digester, bytes);
            if options.batches(chunk.uncompressed_size, true) {
                if !batch.has_room(bytes.len(), &options) {
                    flush(&mut batch, &mut writer);
                }
                batch.push(chunk.digest, bytes);
            } else {
                flush(&mut batch, &mut writer);
                writer.append(&chunk).unwrap();
            }
        }
        flush(&mut batch, &mut writer);
        let finished = writer.finish(|_| Ok(Vec::new())).unwrap();
        prop_assert_eq!(finished.id, one_by_one.id);
        prop_assert_eq!(finished.cct, one_by_one.cct);
        prop_assert!(file == expected);
    }
}

#[test]
fn contradictions_and_limits_are_errors() {
    let mut writer = BlobWriter::new(std::io::sink(), options()).unwrap();
    let good = raw(Digester::Blake3, b"0123456789");
    for (uncompressed_size, data) in [
        (9, ChunkData::Raw(b"0123456789")),
        (10, ChunkData::Compressed(b"0123456789")),
        (10, ChunkData::Compressed(b"")),
        (0, ChunkData::Raw(b"")),
        (4097, ChunkData::Compressed(b"x")),
        (10, ChunkData::Batched(b"0123456789")),
    ] {
        let bad = PreparedChunk {
            uncompressed_size,
            data,
            ..good
        };
        assert!(
            matches!(writer.append(&bad), Err(WriteError::Chunk { index: 0, .. })),
            "{bad:?}"
        );
    }
    assert!(writer.append(&good).is_ok());
    for bad in [
        BlobOptions {
            chunk_size: 0x1800,
            ..options()
        },
        BlobOptions {
            chunk_size: 0x200_0000,
            ..options()
        },
        BlobOptions {
            batch_size: 0x2000,
            ..options()
        },
    ] {
        assert!(BlobWriter::new(std::io::sink(), bad).is_err(), "{bad:?}");
    }
}

#[test]
fn a_failing_output_is_reported_with_its_position() {
    struct Full;
    impl Write for Full {
        fn write(&mut self, _: &[u8]) -> std::io::Result<usize> {
            Err(std::io::ErrorKind::StorageFull.into())
        }
        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }
    let mut writer = BlobWriter::new(Full, options()).unwrap();
    writer.append(&raw(Digester::Blake3, b"buffered")).unwrap();
    let error = writer.finish(no_bootstrap).unwrap_err();
    assert!(
        matches!(error, WriteError::Io { at: 4120, .. }),
        "{error:?}"
    );
}
