//! Compression and decompression of chunks, batches and chunk tables.
//!
//! Two directions, two shapes: builders own one [`Encoder`] per worker thread
//! and reuse its context and buffers; readers call [`decompress_into`], which
//! keeps one zstd context per thread by itself. Output that has no seekable
//! form of its own (a gzip layer) is decoded by [`zran`].
//!
//! Promises: decoding fills the given buffer exactly or fails, never panics on
//! hostile input, and allocates nothing whose size comes from the input. A
//! compressed form that is not strictly smaller than its input is never used
//! (`docs/format-blob.md`, "Compression rule").
#![forbid(unsafe_code)]

pub mod zran;

use std::cell::RefCell;
use std::error::Error as StdError;
use std::io::{self, Cursor};

use lz4_flex::block::{self as lz4, CompressTable};
use zstd::bulk::{Compressor as ZstdEncoder, Decompressor as ZstdDecoder};
use zstd::zstd_safe::CParameter;

use crate::algorithm::Compressor;

/// Largest unit that is encoded or decoded at once, in bytes: the largest
/// chunk, batch or gzip context output of the format.
pub const MAX_UNIT: usize = 16 << 20;

/// zstd level of builders.
///
/// On chunks of 1 MiB of programs and libraries, one core encodes 390 MB/s at
/// level 1, 310 at level 2, 250 at level 3 and 200 at level 4, to 41.3, 39.0,
/// 37.2 and 36.9 % of the input. Who can afford more names a level.
pub const DEFAULT_ZSTD_LEVEL: i32 = 1;

/// What level 1 looks for, instead of what zstd takes by itself: matches of 7 bytes
/// and more (zstd: 6 for inputs up to 256 KiB), at most 256 KiB back (512 KiB), found
/// through a table of 2^13 positions (2^14), which leaves room in the first-level
/// cache. On the files of a system image that is 10 % faster and gives 4 % more bytes.
const LEVEL_1: [CParameter; 3] = [
    CParameter::MinMatch(7),
    CParameter::WindowLog(18),
    CParameter::HashLog(13),
];

/// Why bytes could not be encoded or decoded.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CodecError {
    /// The input is no valid compressed data.
    #[error("{compressor}: invalid compressed data")]
    Invalid {
        /// The algorithm in use.
        compressor: Compressor,
        /// What the decoder said.
        source: Box<dyn StdError + Send + Sync>,
    },
    /// The input decodes to another number of bytes than expected.
    #[error("{compressor}: decoded to {got} bytes, expected {expected}")]
    Length {
        /// The algorithm in use.
        compressor: Compressor,
        /// Bytes wanted.
        expected: u64,
        /// Bytes obtained.
        got: u64,
    },
    /// The encoder failed, for instance for lack of memory.
    #[error("{compressor}: compressing {len} bytes failed")]
    Encode {
        /// The algorithm in use.
        compressor: Compressor,
        /// Length of the input in bytes.
        len: usize,
        /// What the encoder said.
        source: Box<dyn StdError + Send + Sync>,
    },
    /// The algorithm cannot be used in this place.
    #[error("{compressor} cannot be used for {purpose}")]
    Unsupported {
        /// The algorithm.
        compressor: Compressor,
        /// What it was wanted for.
        purpose: &'static str,
    },
}

impl CodecError {
    fn invalid(compressor: Compressor, source: impl Into<Box<dyn StdError + Send + Sync>>) -> Self {
        Self::Invalid {
            compressor,
            source: source.into(),
        }
    }
}

/// How new data is compressed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Encoding {
    /// The algorithm.
    pub compressor: Compressor,
    /// zstd level, from -7 (fastest) to 19 (smallest); other algorithms have none.
    pub level: i32,
}

impl From<Compressor> for Encoding {
    /// With the default level.
    fn from(compressor: Compressor) -> Self {
        Self {
            compressor,
            level: DEFAULT_ZSTD_LEVEL,
        }
    }
}

/// A compressor with its reusable state; one per worker thread.
pub struct Encoder {
    encoding: Encoding,
    state: State,
}

enum State {
    Store,
    Lz4(CompressTable),
    Zstd(ZstdEncoder<'static>),
}

impl std::fmt::Debug for Encoder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Encoder({:?})", self.encoding)
    }
}

impl Encoder {
    /// An encoder, with the default level for a mere [`Compressor`].
    ///
    /// # Errors
    /// [`CodecError::Unsupported`] for gzip, which only occurs in layers that
    /// exist already; [`CodecError::Encode`] if memory is short.
    pub fn new(encoding: impl Into<Encoding>) -> Result<Self, CodecError> {
        let encoding = encoding.into();
        let Encoding { compressor, level } = encoding;
        let state = match compressor {
            Compressor::None => State::Store,
            // Always the large table: the other kind upgrades itself at the first
            // large input, and from then on small inputs would compress differently.
            Compressor::Lz4 => State::Lz4(CompressTable::large()),
            Compressor::Zstd => match zstd_encoder(level) {
                Ok(encoder) => State::Zstd(encoder),
                Err(error) => {
                    return Err(CodecError::Encode {
                        compressor,
                        len: 0,
                        source: Box::new(error),
                    });
                }
            },
            Compressor::Gzip => {
                return Err(CodecError::Unsupported {
                    compressor,
                    purpose: "new data",
                });
            }
        };
        Ok(Self { encoding, state })
    }

    /// What this encoder does.
    #[must_use]
    pub const fn encoding(&self) -> Encoding {
        self.encoding
    }

    /// Appends the compressed form of `data` to `out`, if it is strictly smaller.
    ///
    /// Returns whether it is. If not, `out` is unchanged and `data` is to be
    /// stored as it is. The output depends on nothing but algorithm, level and data.
    ///
    /// # Errors
    /// [`CodecError::Encode`], practically only if memory is short; `out` is
    /// unspecified then.
    pub fn compress(&mut self, data: &[u8], out: &mut Vec<u8>) -> Result<bool, CodecError> {
        let start = out.len();
        let compressor = self.encoding.compressor;
        let failed = |source| CodecError::Encode {
            compressor,
            len: data.len(),
            source,
        };
        match &mut self.state {
            State::Store => {}
            State::Lz4(table) => {
                out.resize(start + lz4::get_maximum_output_size(data.len()), 0);
                let space = out.get_mut(start..).unwrap_or_default();
                let len = lz4::compress_into_with_table(data, space, table)
                    .map_err(|error| failed(Box::new(error)))?;
                out.truncate(start + len);
            }
            State::Zstd(encoder) => {
                out.reserve(zstd::zstd_safe::compress_bound(data.len()));
                // A cursor behind what is there already: written to without being zeroed first.
                let mut space = Cursor::new(std::mem::take(out));
                space.set_position(as_u64(start));
                let result = encoder.compress_to_buffer(data, &mut space);
                *out = space.into_inner();
                result.map_err(|error| failed(Box::new(error)))?;
            }
        }
        let shrunk = out.len() > start && out.len() - start < data.len();
        if !shrunk {
            out.truncate(start);
        }
        Ok(shrunk)
    }
}

fn zstd_encoder(level: i32) -> io::Result<ZstdEncoder<'static>> {
    let mut encoder = ZstdEncoder::new(level)?;
    if level == 1 {
        for parameter in LEVEL_1 {
            encoder.set_parameter(parameter)?;
        }
    }
    Ok(encoder)
}

/// Compresses `data` once; `None` if the result would not be strictly smaller,
/// so that `data` is to be stored as it is.
///
/// For many inputs keep an [`Encoder`].
///
/// # Errors
/// As for [`Encoder::new`] and [`Encoder::compress`].
pub fn compress(compressor: Compressor, data: &[u8]) -> Result<Option<Vec<u8>>, CodecError> {
    let mut out = Vec::new();
    let shrunk = Encoder::new(compressor)?.compress(data, &mut out)?;
    Ok(shrunk.then_some(out))
}

thread_local! {
    /// A zstd context is 160 KiB that the allocator would map and unmap for
    /// every chunk; small chunks decode several times faster with a kept one.
    static ZSTD_DECODER: RefCell<Option<ZstdDecoder<'static>>> = const { RefCell::new(None) };
}

/// Decodes `src` into `dst`, which must have exactly the length of the output.
///
/// * `src`: one raw LZ4 block, one zstd frame, or with `None` the bytes themselves.
/// * `dst`: filled on success, unspecified on error.
///
/// # Errors
/// * [`CodecError::Invalid`], [`CodecError::Length`]: the input is corrupt.
/// * [`CodecError::Unsupported`]: gzip, whose data is decoded by [`zran`].
pub fn decompress_into(
    compressor: Compressor,
    src: &[u8],
    dst: &mut [u8],
) -> Result<(), CodecError> {
    let got = match compressor {
        Compressor::None => {
            if src.len() == dst.len() {
                dst.copy_from_slice(src);
            }
            src.len()
        }
        Compressor::Lz4 => lz4::decompress_into(src, dst)
            .map_err(|error| CodecError::invalid(compressor, error))?,
        Compressor::Zstd => {
            unzstd(src, dst).map_err(|error| CodecError::invalid(compressor, error))?
        }
        Compressor::Gzip => {
            return Err(CodecError::Unsupported {
                compressor,
                purpose: "a single chunk",
            });
        }
    };
    if got == dst.len() {
        Ok(())
    } else {
        Err(CodecError::Length {
            compressor,
            expected: as_u64(dst.len()),
            got: as_u64(got),
        })
    }
}

fn unzstd(src: &[u8], dst: &mut [u8]) -> io::Result<usize> {
    ZSTD_DECODER.with_borrow_mut(|slot| {
        let decoder = match slot {
            Some(decoder) => decoder,
            None => slot.insert(ZstdDecoder::new()?),
        };
        decoder.decompress_to_buffer(src, dst)
    })
}

/// A length as a number for messages; `usize` has at most 64 bits.
pub(crate) fn as_u64(len: usize) -> u64 {
    u64::try_from(len).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const ALL: [Compressor; 3] = [Compressor::None, Compressor::Lz4, Compressor::Zstd];

    /// Data with repetitions, so that it compresses sometimes.
    fn data() -> impl Strategy<Value = Vec<u8>> {
        (prop::collection::vec(any::<u8>(), 0..300), 1_usize..40)
            .prop_map(|(piece, times)| piece.repeat(times))
    }

    proptest! {
        #[test]
        fn what_was_compressed_comes_back(data in data()) {
            for compressor in ALL {
                if let Some(packed) = compress(compressor, &data).unwrap() {
                    prop_assert!(packed.len() < data.len());
                    let mut back = vec![0; data.len()];
                    decompress_into(compressor, &packed, &mut back).unwrap();
                    prop_assert_eq!(&back, &data);
                }
            }
        }

        #[test]
        fn hostile_input_is_an_error_or_exact(src in prop::collection::vec(any::<u8>(), 0..200), len in 0_usize..5000) {
            for compressor in ALL {
                let mut dst = vec![0; len];
                let _ = decompress_into(compressor, &src, &mut dst);
            }
        }
    }

    #[test]
    fn one_byte_too_few_or_too_many_is_an_error() {
        let data = b"repeat ".repeat(1000);
        for compressor in [Compressor::Lz4, Compressor::Zstd] {
            let packed = compress(compressor, &data).unwrap().unwrap();
            for len in [0, data.len() - 1, data.len() + 1] {
                let result = decompress_into(compressor, &packed, &mut vec![0; len]);
                assert!(result.is_err(), "{compressor} {len}");
            }
        }
        assert!(matches!(
            decompress_into(Compressor::None, b"abc", &mut [0; 2]),
            Err(CodecError::Length {
                expected: 2,
                got: 3,
                ..
            })
        ));
    }

    #[test]
    fn an_encoder_is_reusable_and_reports_what_does_not_shrink() {
        let noise: Vec<u8> = (0..100_u8)
            .map(|i| i.wrapping_mul(157) ^ (i >> 3))
            .collect();
        for compressor in ALL {
            let mut encoder = Encoder::new(compressor).unwrap();
            let mut out = b"kept".to_vec();
            assert!(!encoder.compress(&noise, &mut out).unwrap(), "{compressor}");
            assert!(!encoder.compress(b"", &mut out).unwrap());
            assert_eq!(out, b"kept");
            // The same input gives the same bytes, whatever went before.
            let small = b"some text, some text, some other text, and some more ".repeat(9);
            for data in [&small, &vec![0; 100_000], &noise, &small] {
                out.truncate(4);
                let shrunk = encoder.compress(data, &mut out).unwrap();
                let alone = compress(compressor, data).unwrap();
                assert_eq!(shrunk, alone.is_some());
                assert_eq!(out, [b"kept".to_vec(), alone.unwrap_or_default()].concat());
            }
        }
    }

    #[test]
    fn gzip_is_only_for_existing_layers() {
        assert!(matches!(
            Encoder::new(Compressor::Gzip),
            Err(CodecError::Unsupported { .. })
        ));
        assert!(matches!(
            decompress_into(Compressor::Gzip, b"", &mut []),
            Err(CodecError::Unsupported { .. })
        ));
    }
}
