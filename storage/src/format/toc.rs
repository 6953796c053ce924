//! The table of contents at the end of a blob, and how it is found
//! (`docs/format-blob.md`, "Table of contents").
//!
//! There are three ways in: the bootstrap knows size and digest
//! ([`Toc::verified`]); or only the file is at hand, and its last bytes tell
//! whether there is a table or a bare embedded bootstrap ([`locate`]).

use sha2::{Digest as _, Sha256};
use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, FromZeros as _, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::FormatError;
use super::tar_header::{self, names};
use crate::algorithm::{Compressor, Digester};
use crate::codec::{self, CodecError, as_u64};
use crate::digest::Digest;

const OBJECT: &str = "table of contents";
const ENTRY: &str = "section entry";

/// Length of an entry in bytes.
pub const ENTRY_SIZE: usize = 128;

/// Bytes at the end of a file of `file_size` bytes that [`locate`] wants.
#[must_use]
pub fn tail_size(file_size: u64) -> u64 {
    let size = file_size.min(4096);
    size - size % as_u64(ENTRY_SIZE)
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct Raw {
    flags: U32,
    reserved: U32,
    name: [u8; 16],
    digest: [u8; 32],
    offset: U64,
    stored_size: U64,
    plain_size: U64,
    reserved_end: [u8; 48],
}

const _: () = assert!(size_of::<Raw>() == ENTRY_SIZE);

/// One section of a blob. Sizes are in bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TocEntry {
    /// See [`names`]; at most 16 bytes.
    pub name: String,
    /// How the section as a whole is compressed.
    pub compressor: Compressor,
    /// SHA-256 of the uncompressed section; zero if there is nothing to check.
    pub digest: Digest,
    /// Start in the blob file.
    pub offset: u64,
    /// Stored length.
    pub stored_size: u64,
    /// Uncompressed length.
    pub plain_size: u64,
}

/// A table of contents.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Toc {
    /// In the order of the file.
    pub entries: Vec<TocEntry>,
}

/// What the end of a blob file says about it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Tail {
    /// The file ends with a table of contents.
    Toc(Toc),
    /// The file ends with an uncompressed bootstrap of `size` bytes and its tar header.
    Bootstrap {
        /// Length of the bootstrap, which ends 512 bytes before the end of the file.
        size: u64,
    },
}

/// Reads the end of a blob file of which nothing else is known.
///
/// * `tail`: the last [`tail_size`] bytes.
///
/// # Errors
/// [`FormatError::Corrupt`] and [`FormatError::Size`] if the file ends otherwise;
/// a plain blob does, it has neither.
pub fn locate(tail: &[u8]) -> Result<Tail, FormatError> {
    let (rest, header) = split_header(tail)?;
    let (name, size) = tar_header::decode(header)?;
    match name.as_str() {
        names::TOC => {
            let got = as_u64(rest.len());
            let start = usize::try_from(size)
                .ok()
                .and_then(|size| rest.len().checked_sub(size));
            let array = start.and_then(|start| rest.get(start..));
            let array = array.ok_or(FormatError::Size {
                object: OBJECT,
                expected: size,
                got,
            })?;
            Toc::decode(array).map(Tail::Toc)
        }
        names::BOOTSTRAP => Ok(Tail::Bootstrap { size }),
        _ => {
            let problem = "neither a table of contents nor a bootstrap ends the file";
            Err(FormatError::corrupt(
                OBJECT,
                0_u32,
                "tar header size",
                size,
                problem,
            ))
        }
    }
}

fn split_header(bytes: &[u8]) -> Result<(&[u8], &[u8]), FormatError> {
    let at = bytes.len().checked_sub(tar_header::SIZE);
    at.and_then(|at| bytes.split_at_checked(at))
        .ok_or_else(|| FormatError::Size {
            object: OBJECT,
            expected: as_u64(tar_header::SIZE),
            got: as_u64(bytes.len()),
        })
}

impl Toc {
    /// Reads a table whose length and digest the bootstrap tells.
    ///
    /// * `bytes`: the last `toc_size` bytes of the file, tar header included.
    /// * `digest`: SHA-256 of `bytes`; zero if unknown.
    ///
    /// # Errors
    /// [`FormatError::Digest`], [`FormatError::Size`], [`FormatError::Corrupt`].
    pub fn verified(bytes: &[u8], digest: &Digest) -> Result<Self, FormatError> {
        let len = bytes.len();
        if !(tar_header::SIZE..=0x10000).contains(&len) || !len.is_multiple_of(ENTRY_SIZE) {
            let problem = "must be 512 to 65536 and a multiple of 128";
            return Err(FormatError::corrupt(
                OBJECT,
                0_u32,
                "size",
                as_u64(len),
                problem,
            ));
        }
        if *digest != Digest::default() && Digest::of(Digester::Sha256, bytes) != *digest {
            return Err(FormatError::Digest { object: OBJECT });
        }
        let (array, header) = split_header(bytes)?;
        let (name, size) = tar_header::decode(header)?;
        if name != names::TOC {
            let problem = "does not end with a table of contents";
            return Err(FormatError::corrupt(
                OBJECT,
                0_u32,
                "tar header size",
                size,
                problem,
            ));
        }
        super::expect_equal(OBJECT, "tar header size", size, as_u64(array.len()))?;
        Self::decode(array)
    }

    /// Reads the array of entries, without tar header.
    ///
    /// # Errors
    /// [`FormatError::Size`] unless it has whole entries, [`FormatError::Corrupt`]
    /// for an entry with an unknown compressor or a damaged name.
    pub fn decode(array: &[u8]) -> Result<Self, FormatError> {
        let (entries, rest) = array.as_chunks::<ENTRY_SIZE>();
        if !rest.is_empty() {
            let got = as_u64(array.len());
            let expected = got - as_u64(rest.len());
            return Err(FormatError::Size {
                object: OBJECT,
                expected,
                got,
            });
        }
        let entries = (0_u64..)
            .zip(entries)
            .map(|(index, bytes)| TocEntry::decode(bytes, index));
        Ok(Self {
            entries: entries.collect::<Result<_, _>>()?,
        })
    }

    /// The array of entries followed by its tar header: what ends a blob file.
    ///
    /// # Errors
    /// [`FormatError::Unrepresentable`] for a name of more than 16 bytes or a
    /// section compressed with gzip.
    pub fn encode(&self) -> Result<Vec<u8>, FormatError> {
        let mut bytes = Vec::with_capacity(self.entries.len() * ENTRY_SIZE + tar_header::SIZE);
        for entry in &self.entries {
            bytes.extend_from_slice(entry.encode()?.as_bytes());
        }
        let header = tar_header::encode(names::TOC, as_u64(bytes.len()))?;
        bytes.extend_from_slice(&header);
        Ok(bytes)
    }

    /// The first section called `name`.
    #[must_use]
    pub fn entry(&self, name: &str) -> Option<&TocEntry> {
        self.entries.iter().find(|entry| entry.name == name)
    }
}

impl TocEntry {
    fn decode(bytes: &[u8; ENTRY_SIZE], index: u64) -> Result<Self, FormatError> {
        let raw: &Raw = zerocopy::transmute_ref!(bytes);
        let compressor = match raw.flags.get() & 0xf {
            1 => Compressor::None,
            2 => Compressor::Zstd,
            4 => Compressor::Lz4,
            _ => {
                let problem = "no known compressor";
                return Err(FormatError::corrupt(
                    ENTRY,
                    index,
                    "flags",
                    raw.flags.get(),
                    problem,
                ));
            }
        };
        let name = raw.name.split(|&byte| byte == 0).next().unwrap_or_default();
        let Some(name) = std::str::from_utf8(name)
            .ok()
            .filter(|name| !name.is_empty())
        else {
            let len = as_u64(name.len());
            return Err(FormatError::corrupt(
                ENTRY,
                index,
                "name length",
                len,
                "no name in UTF-8",
            ));
        };
        Ok(Self {
            name: name.to_owned(),
            compressor,
            digest: Digest::from_bytes(raw.digest),
            offset: raw.offset.get(),
            stored_size: raw.stored_size.get(),
            plain_size: raw.plain_size.get(),
        })
    }

    fn encode(&self) -> Result<Raw, FormatError> {
        let refuse = |field, value, problem| {
            Err(FormatError::Unrepresentable {
                object: ENTRY,
                field,
                value,
                problem,
            })
        };
        let mut raw = Raw::new_zeroed();
        let Some(name) = raw.name.get_mut(..self.name.len()) else {
            return refuse("name length", as_u64(self.name.len()), "at most 16 bytes");
        };
        name.copy_from_slice(self.name.as_bytes());
        raw.flags = match self.compressor {
            Compressor::None => 1,
            Compressor::Zstd => 2,
            Compressor::Lz4 => 4,
            Compressor::Gzip => return refuse("compressor", 2, "none, zstd or lz4"),
        }
        .into();
        raw.digest = *self.digest.as_bytes();
        raw.offset = self.offset.into();
        raw.stored_size = self.stored_size.into();
        raw.plain_size = self.plain_size.into();
        Ok(raw)
    }

    /// Decodes a section and checks its digest.
    ///
    /// * `stored`: the `stored_size` bytes at `offset` of the file.
    /// * `limit`: most bytes that the caller wants in memory.
    ///
    /// # Errors
    /// [`FormatError::Size`] for the wrong number of bytes or more than `limit`,
    /// [`FormatError::Codec`], [`FormatError::Digest`].
    pub fn extract(&self, stored: &[u8], limit: u64) -> Result<Vec<u8>, FormatError> {
        const OBJECT: &str = "section";
        let got = as_u64(stored.len());
        if got != self.stored_size {
            return Err(FormatError::Size {
                object: OBJECT,
                expected: self.stored_size,
                got,
            });
        }
        let size = usize::try_from(self.plain_size)
            .ok()
            .filter(|_| self.plain_size <= limit);
        let Some(size) = size else {
            return Err(FormatError::Size {
                object: OBJECT,
                expected: limit,
                got: self.plain_size,
            });
        };
        let codec = |source| FormatError::Codec {
            object: OBJECT,
            source,
        };
        if self.compressor == Compressor::None && got != self.plain_size {
            let (compressor, expected) = (self.compressor, self.plain_size);
            return Err(codec(CodecError::Length {
                compressor,
                expected,
                got,
            }));
        }
        let mut plain = vec![0; size];
        codec::decompress_into(self.compressor, stored, &mut plain).map_err(codec)?;
        if self.digest != Digest::default()
            && self.digest != Digest::from_bytes(Sha256::digest(&plain).into())
        {
            return Err(FormatError::Digest { object: OBJECT });
        }
        Ok(plain)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn sample() -> Toc {
        let entry = |name: &str, compressor, offset| TocEntry {
            name: name.to_owned(),
            compressor,
            digest: Digest::from_bytes([7; 32]),
            offset,
            stored_size: 11,
            plain_size: 22,
        };
        Toc {
            entries: vec![
                entry(names::DATA, Compressor::None, 0),
                entry(names::TABLE_HEADER, Compressor::Zstd, 1 << 40),
                entry(names::BOOTSTRAP, Compressor::Lz4, 3),
            ],
        }
    }

    #[test]
    fn a_table_is_found_by_all_routes() {
        let toc = sample();
        let bytes = toc.encode().unwrap();
        let digest = Digest::of(Digester::Sha256, &bytes);
        assert_eq!(Toc::verified(&bytes, &digest).unwrap(), toc);
        assert_eq!(Toc::verified(&bytes, &Digest::default()).unwrap(), toc);
        let file = [vec![1; 5000], bytes].concat();
        let tail = &file[file.len() - usize::try_from(tail_size(as_u64(file.len()))).unwrap()..];
        assert_eq!(locate(tail).unwrap(), Tail::Toc(toc));

        let header = tar_header::encode(names::BOOTSTRAP, 4096).unwrap();
        assert_eq!(locate(&header).unwrap(), Tail::Bootstrap { size: 4096 });
        assert!(locate(&tar_header::encode(names::DATA, 4096).unwrap()).is_err());
    }

    #[test]
    fn damage_is_refused() {
        let bytes = sample().encode().unwrap();
        let digest = Digest::of(Digester::Sha256, &bytes);
        let mut damaged = bytes.clone();
        damaged[30] ^= 1;
        assert!(matches!(
            Toc::verified(&damaged, &digest),
            Err(FormatError::Digest { .. })
        ));
        for len in [0, 128, 511, 512, bytes.len() - 128, bytes.len() - 1] {
            assert!(
                Toc::verified(&bytes[bytes.len() - len..], &Digest::default()).is_err(),
                "{len}"
            );
        }
        let header = tar_header::encode(names::TOC, 1 << 40).unwrap();
        assert!(matches!(locate(&header), Err(FormatError::Size { .. })));
        let long = TocEntry {
            name: "x".repeat(17),
            ..sample().entries.remove(0)
        };
        assert!(
            Toc {
                entries: vec![long]
            }
            .encode()
            .is_err()
        );
    }

    #[test]
    fn a_section_is_extracted_within_limits() {
        let plain = b"section ".repeat(100);
        let stored = codec::compress(Compressor::Zstd, &plain).unwrap().unwrap();
        let entry = TocEntry {
            name: names::BOOTSTRAP.to_owned(),
            compressor: Compressor::Zstd,
            digest: Digest::of(Digester::Sha256, &plain),
            offset: 0,
            stored_size: as_u64(stored.len()),
            plain_size: as_u64(plain.len()),
        };
        assert_eq!(entry.extract(&stored, 800).unwrap(), plain);
        assert!(matches!(
            entry.extract(&stored, 799),
            Err(FormatError::Size { .. })
        ));
        assert!(matches!(
            entry.extract(&stored[1..], 800),
            Err(FormatError::Size { .. })
        ));
        let other = TocEntry {
            digest: Digest::from_bytes([1; 32]),
            ..entry.clone()
        };
        assert!(matches!(
            other.extract(&stored, 800),
            Err(FormatError::Digest { .. })
        ));
        let raw = TocEntry {
            compressor: Compressor::None,
            ..entry
        };
        assert!(matches!(
            raw.extract(&stored, 800),
            Err(FormatError::Codec { .. })
        ));
    }

    proptest! {
        #[test]
        fn hostile_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..3000)) {
            prop_assert!(locate(&bytes).is_err());
            let _ = Toc::decode(&bytes);
        }
    }
}
