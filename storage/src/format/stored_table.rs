//! From the chunk table as a blob stores it to the form that readers map.
//!
//! A blob stores the table compressed, followed by its header. The cache
//! directory holds it uncompressed, zero padded to whole blocks, followed by the
//! same header (`docs/format-blob.md`, "Cache directory").
//!
//! Promises: no more output than the bootstrap announces; memory for a zstd table
//! is bounded by its window, for an lz4 table by what the stored bytes can expand to.

use std::io::{Read as _, Write};
use std::ops::Range;

use super::chunk_table::{ChunkTable, cache_form_size};
use super::header::{HEADER_SIZE, Header};
use super::{FormatError, expect_equal};
use crate::algorithm::Compressor;
use crate::blob_info::BlobInfo;
use crate::codec::{self, CodecError, as_u64};
use crate::mapped::Mapped;

const OBJECT: &str = "stored chunk table";

/// Largest uncompressed table accepted, in bytes. A table of 2^24 v2 entries has
/// 384 MiB; the rest is room for gzip dictionaries, 16 KiB per MiB of layer.
pub const MAX_TABLE: u64 = 1 << 30;

/// Largest zstd window of a table, as a power of two: 16 MiB.
const MAX_WINDOW_LOG: u32 = 24;

/// lz4 spends at least a byte of input per 255 bytes of output.
const LZ4_EXPANSION: u64 = 255;

/// Bytes of the file that holds the table which [`write_cache_form`] needs: the
/// table and the header directly after it. The file is the blob itself, or for
/// `SEPARATE` blobs the one that the meta digest names.
///
/// # Errors
/// [`FormatError::Corrupt`] for a table of more than [`MAX_TABLE`] bytes, stored
/// or uncompressed, or an offset that overflows.
pub fn stored_range(info: &BlobInfo) -> Result<Range<u64>, FormatError> {
    let meta = &info.meta;
    let corrupt =
        |field, value, problem| Err(FormatError::corrupt(OBJECT, 0_u32, field, value, problem));
    if meta.uncompressed_size > MAX_TABLE {
        return corrupt(
            "uncompressed size",
            meta.uncompressed_size,
            "more than 1 GiB",
        );
    }
    if meta.compressed_size > meta.uncompressed_size {
        return corrupt(
            "compressed size",
            meta.compressed_size,
            "more than uncompressed",
        );
    }
    let len = meta.compressed_size + as_u64(HEADER_SIZE);
    match meta.offset.checked_add(len) {
        Some(end) => Ok(meta.offset..end),
        None => corrupt("offset", meta.offset, "too large"),
    }
}

/// Decodes a stored table and writes its cache file form to `out`.
///
/// * `stored`: exactly the bytes of [`stored_range`].
///
/// The header is checked first, and nothing is written if it is wrong. `out` is to
/// be discarded on error.
///
/// # Errors
/// [`FormatError::Size`], [`FormatError::Mismatch`], [`FormatError::Corrupt`] and
/// [`FormatError::Codec`] for bytes that are not this blob's table,
/// [`FormatError::Write`] if `out` fails.
pub fn write_cache_form(
    info: &BlobInfo,
    stored: &[u8],
    out: &mut impl Write,
) -> Result<(), FormatError> {
    let range = stored_range(info)?;
    let (expected, got) = (range.end - range.start, as_u64(stored.len()));
    let Some((table, header)) = stored
        .split_last_chunk::<HEADER_SIZE>()
        .filter(|_| got == expected)
    else {
        return Err(FormatError::Size {
            object: OBJECT,
            expected,
            got,
        });
    };
    Header::decode(header, info)?;
    write_table(info, table, out)?;
    let padding = info
        .meta
        .uncompressed_size
        .next_multiple_of(crate::units::BLOCK_SIZE)
        - info.meta.uncompressed_size;
    std::io::copy(&mut std::io::repeat(0).take(padding), out).map_err(write_error)?;
    out.write_all(header).map_err(write_error)
}

/// Decodes a stored table in memory and opens it; for tools that keep no cache
/// directory. See [`write_cache_form`] and [`ChunkTable::open`].
///
/// # Errors
/// As for these two.
pub fn open(info: &BlobInfo, stored: &[u8]) -> Result<ChunkTable, FormatError> {
    let mut bytes = Vec::new();
    write_cache_form(info, stored, &mut bytes)?;
    debug_assert_eq!(cache_form_size(info), Some(as_u64(bytes.len())));
    ChunkTable::open(Mapped::from_vec(bytes), info)
}

fn write_table(info: &BlobInfo, table: &[u8], out: &mut impl Write) -> Result<(), FormatError> {
    let size = info.meta.uncompressed_size;
    match info.meta.compressor {
        Compressor::None => {
            expect_equal(OBJECT, "uncompressed size", size, as_u64(table.len()))?;
            out.write_all(table).map_err(write_error)
        }
        Compressor::Lz4 => {
            let possible = as_u64(table.len()).saturating_mul(LZ4_EXPANSION);
            if size > possible {
                let problem = "more than the stored bytes can expand to";
                return Err(FormatError::corrupt(
                    OBJECT,
                    0_u32,
                    "uncompressed size",
                    size,
                    problem,
                ));
            }
            // Bounded by `MAX_TABLE`, so it fits.
            let mut bytes = vec![0; usize::try_from(size).unwrap_or(0)];
            codec::decompress_into(Compressor::Lz4, table, &mut bytes).map_err(codec_error)?;
            out.write_all(&bytes).map_err(write_error)
        }
        Compressor::Zstd => unzstd(table, size, out),
        Compressor::Gzip => Err(FormatError::Unsupported {
            object: OBJECT,
            feature: "gzip",
        }),
    }
}

fn unzstd(table: &[u8], size: u64, out: &mut impl Write) -> Result<(), FormatError> {
    let compressor = Compressor::Zstd;
    let invalid = |source: std::io::Error| {
        codec_error(CodecError::Invalid {
            compressor,
            source: Box::new(source),
        })
    };
    let mut decoder = zstd::Decoder::with_buffer(table).map_err(invalid)?;
    decoder.window_log_max(MAX_WINDOW_LOG).map_err(invalid)?;
    // One byte more than announced is enough to know that it is too long.
    let mut decoder = decoder.take(size + 1);
    let mut buffer = vec![0; 64 << 10];
    let mut got = 0;
    loop {
        let len = decoder.read(&mut buffer).map_err(invalid)?;
        got += as_u64(len);
        if len == 0 || got > size {
            break;
        }
        out.write_all(buffer.get(..len).unwrap_or_default())
            .map_err(write_error)?;
    }
    if got == size {
        Ok(())
    } else {
        Err(codec_error(CodecError::Length {
            compressor,
            expected: size,
            got,
        }))
    }
}

fn codec_error(source: CodecError) -> FormatError {
    FormatError::Codec {
        object: OBJECT,
        source,
    }
}

fn write_error(source: std::io::Error) -> FormatError {
    FormatError::Write {
        object: "chunk table",
        source,
    }
}
