//! Blobs that another builder wrote: every chunk must decode to its digest.
//!
//! `NYDUS_FIXTURES` names a folder with one image per sub-folder: a bootstrap
//! called `boot`, and its blobs under their ids. A missing image is a failure, and so is
//! a missing variable: only `NYDUS_FIXTURES=none` says that going without is meant.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use super::chunk_table::ChunkTable;
use super::context::ZranContext;
use super::stored_table;
use super::tar_header::names;
use super::toc::{self, Tail, Toc, TocEntry};
use crate::algorithm::{Compressor, Digester};
use crate::blob_id::BlobId;
use crate::blob_info::{BlobFeatures, BlobInfo, MetaLocation};
use crate::chunk::{Chunk, Encoding};
use crate::codec;
use crate::digest::Digest;
use crate::mapped::Mapped;
use crate::units::ChunkIndex;

fn number(bytes: &[u8], at: usize, len: usize) -> u64 {
    (0..len)
        .rev()
        .fold(0, |value, i| value << 8 | u64::from(bytes[at + i]))
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::try_from(number(bytes, at, 4)).unwrap()
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    number(bytes, at, 8)
}

fn digest_at(bytes: &[u8], at: usize) -> Digest {
    Digest::from_bytes(bytes[at..at + 32].try_into().unwrap())
}

fn slice(bytes: &[u8], offset: u64, len: u64) -> &[u8] {
    &bytes[usize::try_from(offset).unwrap()..][..usize::try_from(len).unwrap()]
}

/// The rows of the blob table, which `docs/format.md` describes. Only the test
/// reads them here, without checks.
fn blob_table(boot: &[u8]) -> Vec<BlobInfo> {
    let rows = slice(boot, u64_at(boot, 1160), u32_at(boot, 1168).into());
    rows.chunks(256).map(blob_row).collect()
}

fn blob_row(row: &[u8]) -> BlobInfo {
    let id = row[..64].split(|&b| b == 0).next().unwrap();
    BlobInfo {
        id: BlobId::new(std::str::from_utf8(id).unwrap()).unwrap(),
        chunk_size: u32_at(row, 68),
        chunk_count: u32_at(row, 72),
        compressor: Compressor::from_disk(u32_at(row, 76)).unwrap(),
        digester: Digester::from_disk(u32_at(row, 80)).unwrap(),
        features: BlobFeatures::from_bits(u32_at(row, 84)),
        compressed_size: u64_at(row, 88),
        uncompressed_size: u64_at(row, 96),
        meta: MetaLocation {
            compressor: Compressor::from_disk(u32_at(row, 108)).unwrap(),
            offset: u64_at(row, 112),
            compressed_size: u64_at(row, 120),
            uncompressed_size: u64_at(row, 128),
        },
        toc_size: u32_at(row, 104),
        toc_digest: digest_at(row, 136),
        meta_blob_digest: digest_at(row, 168),
        meta_blob_size: u64_at(row, 200),
    }
}

/// Digests by blob and chunk index.
fn chunk_digests(boot: &[u8]) -> HashMap<(u32, u32), Digest> {
    let records = slice(boot, u64_at(boot, 1176), u64_at(boot, 1184));
    let one = |r: &[u8]| ((u32_at(r, 32), u32_at(r, 72)), digest_at(r, 0));
    records.chunks(80).map(one).collect()
}

fn decode(
    table: &ChunkTable,
    chunk: &Chunk,
    data: &[u8],
    compressor: Compressor,
) -> Result<Vec<u8>, codec::CodecError> {
    let mut plain = vec![0; chunk.plain_size as usize];
    let cut =
        |unit: &[u8], within: u32| unit[within as usize..][..chunk.plain_size as usize].to_vec();
    match chunk.encoding {
        Encoding::Raw { offset } => {
            plain.copy_from_slice(slice(data, offset, chunk.plain_size.into()));
        }
        Encoding::Compressed { offset, size } => {
            codec::decompress_into(compressor, slice(data, offset, size.into()), &mut plain)?;
        }
        Encoding::Batch {
            offset,
            context,
            within,
        } => {
            let batch = table.batch_context(context).unwrap();
            let stored = slice(data, offset, batch.compressed_size.into());
            let mut unit = vec![0; batch.uncompressed_size as usize];
            let how = if batch.is_raw() {
                Compressor::None
            } else {
                compressor
            };
            codec::decompress_into(how, stored, &mut unit)?;
            plain = cut(&unit, within);
        }
        Encoding::Zran { context, within } => {
            let context: ZranContext<'_> = table.zran_context(context).unwrap();
            let input = slice(
                data,
                context.input.start,
                context.input.end - context.input.start,
            );
            let mut unit = vec![0; context.output_size as usize];
            codec::zran::decode(&context, input, &mut unit)?;
            plain = cut(&unit, within);
        }
    }
    Ok(plain)
}

/// Decodes every chunk of one blob; returns how many were compared with a digest.
///
/// A merged image has no digests for chunks whose files an upper layer removed.
fn check_blob(
    info: &BlobInfo,
    tables: &[u8],
    data: &[u8],
    digests: impl Fn(u32) -> Option<Digest>,
) -> u32 {
    let range = stored_table::stored_range(info).unwrap();
    let mut cache_form = Vec::new();
    let stored = slice(tables, range.start, range.end - range.start);
    stored_table::write_cache_form(info, stored, &mut cache_form).unwrap();
    let table = ChunkTable::open(Mapped::from_vec(cache_form), info).unwrap();
    let mut verified = 0;
    for index in 0..table.len() {
        let chunk = table.chunk(ChunkIndex::new(index)).unwrap();
        let plain = decode(&table, &chunk, data, info.compressor).unwrap();
        if let Some(crc) = chunk.crc32c {
            assert_eq!(
                crc,
                crc32c::crc32c(&plain),
                "CRC of chunk {index} of {}",
                info.id
            );
        }
        if let Some(want) = digests(index) {
            assert_eq!(
                Digest::of(info.digester, &plain),
                want,
                "chunk {index} of {}",
                info.id
            );
            verified += 1;
        }
    }
    if info.toc_size != 0 {
        let toc = &tables[tables.len() - info.toc_size as usize..];
        check_sections(&Toc::verified(toc, &info.toc_digest).unwrap(), tables);
    }
    verified
}

fn check_sections(toc: &Toc, file: &[u8]) {
    for entry in toc.entries.iter().filter(|entry| entry.name != names::DATA) {
        section(entry, file);
    }
}

fn section(entry: &TocEntry, file: &[u8]) -> Vec<u8> {
    entry
        .extract(slice(file, entry.offset, entry.stored_size), 1 << 30)
        .unwrap()
}

fn read(path: &Path) -> Vec<u8> {
    std::fs::read(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// The one file in `folder` that has a hexadecimal id for a name.
fn only_blob(folder: &Path) -> PathBuf {
    let entries =
        std::fs::read_dir(folder).unwrap_or_else(|error| panic!("{}: {error}", folder.display()));
    let mut blobs = entries
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.file_name().is_some_and(|name| name.len() == 64));
    let blob = blobs
        .next()
        .unwrap_or_else(|| panic!("{}: no blob", folder.display()));
    assert!(
        blobs.next().is_none(),
        "{}: more than one blob",
        folder.display()
    );
    blob
}

/// The bootstrap inside a blob, found from the end of the file.
fn embedded_bootstrap(file: &[u8]) -> Vec<u8> {
    let tail = toc::tail_size(file.len() as u64);
    match toc::locate(&file[file.len() - usize::try_from(tail).unwrap()..]).unwrap() {
        Tail::Toc(toc) => {
            check_sections(&toc, file);
            section(toc.entry(names::BOOTSTRAP).unwrap(), file)
        }
        Tail::Bootstrap { size } => slice(file, file.len() as u64 - 512 - size, size).to_vec(),
    }
}

/// Checks all blobs of an image; returns how many chunks were verified.
fn check_image(folder: &Path) -> u32 {
    let boot = folder.join("boot");
    let embedded = !boot.exists();
    let boot = if embedded {
        embedded_bootstrap(&read(&only_blob(folder)))
    } else {
        read(&boot)
    };
    let digests = chunk_digests(&boot);
    let blobs = blob_table(&boot);
    let check = |(blob, info): (u32, &BlobInfo)| {
        let digest = |index| digests.get(&(blob, index)).copied();
        let separate = info.features.contains(BlobFeatures::SEPARATE);
        let (tables, data) = match (separate, embedded) {
            (true, _) => {
                let layer = folder.join(format!("{}.layer.tar.gz", info.id));
                (read(&only_blob(folder)), Some(read(&layer)))
            }
            (false, true) => (read(&only_blob(folder)), None),
            (false, false) => (read(&folder.join(info.id.as_str())), None),
        };
        check_blob(info, &tables, data.as_ref().unwrap_or(&tables), digest)
    };
    println!("{}", folder.display());
    let verified = (0..).zip(&blobs).map(check).sum();
    assert_eq!(
        verified as usize,
        digests.len(),
        "chunks verified in {}",
        folder.display()
    );
    verified
}

#[test]
fn every_chunk_of_foreign_images_decodes() {
    let root = std::env::var_os("NYDUS_FIXTURES").expect(
        "NYDUS_FIXTURES is not set: name the directory of the images that Nydus v2.4 wrote, \
         or `none` to go without them",
    );
    if root == "none" {
        return;
    }
    let root = PathBuf::from(root);
    for name in [
        "zstd",
        "lz4",
        "none",
        "sha256",
        "chunk-4k",
        "chunk-64k",
        "batch",
        "batch-lz4",
        "toc",
        "inline",
        "inline-toc",
        "inline-toc-batch",
        "prefetch-blob",
        "prefetch-fs",
        "tar",
        "merged",
        "targz-ref",
    ] {
        let chunks = check_image(&root.join(name));
        assert!(chunks > 0, "{name}: no chunks");
    }
}
