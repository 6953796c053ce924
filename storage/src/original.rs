//! Reads an OCI layer that stays what it is: a tar, or a tar.gz of any number of
//! members, whose chunks are described by where they are instead of being stored.
//!
//! A [`LayerReader`] yields the tar. The tar parser's owner announces every chunk
//! ([`LayerReader::begin_chunk`]) before it reads the chunk's bytes, and asks where
//! it is afterwards ([`LayerReader::end_chunk`]). In a gzip stream the answer is a
//! seek context: a deflate block boundary with the 32 KiB of output before it (see
//! `gzip`).
//!
//! Promises: the stream is read once, front to back, so it may be a pipe; memory
//! does not grow with the stream, except for the contexts that the caller keeps;
//! everything is hashed on the way. Format: `docs/format-blob.md`, "Seek contexts".
#![forbid(unsafe_code)]

mod gzip;
#[cfg(test)]
mod tests;

use std::io::{self, ErrorKind, Read};
use std::sync::Arc;

use sha2::{Digest as _, Sha256};

use crate::digest::Digest;
use gzip::Gzip;

/// Why a layer, which may be perfectly fine, cannot stay what it is.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct NotInPlace(String);

impl NotInPlace {
    /// Whether `error` carries one.
    #[must_use]
    pub fn is_in(error: &io::Error) -> bool {
        error.get_ref().is_some_and(|inner| inner.is::<Self>())
    }
}

impl From<NotInPlace> for io::Error {
    fn from(reason: NotInPlace) -> Self {
        Self::new(ErrorKind::Unsupported, reason)
    }
}

/// How the layer is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A plain tar.
    Tar,
    /// A tar in one or more gzip members.
    Gzip,
}

/// Where a chunk is in its layer. Cheap to clone.
#[derive(Clone, Debug)]
pub enum Place {
    /// At this byte of a plain tar.
    Tar {
        /// Its first byte.
        offset: u64,
    },
    /// In the output of a seek context.
    Gzip {
        /// Where decoding starts; chunks of one context share one allocation.
        context: Arc<ContextStart>,
        /// Start of the chunk in the context's output.
        within: u32,
        /// A position of the gzip stream before which decoding cannot have reached
        /// the chunk.
        start: u64,
        /// End of the gzip bytes that are needed to decode all of the chunk.
        end: u64,
    },
}

/// A place in a gzip stream where decoding can start.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct ContextStart {
    /// The first byte that decoding needs.
    pub input_offset: u64,
    /// What has been decoded before it, in bytes.
    pub output_offset: u64,
    /// The end of that, up to 32 KiB, as far as the gzip member goes back.
    pub dictionary: Vec<u8>,
    /// The byte before the input, if some of its bits are still unread.
    pub previous_byte: u8,
    /// How many of its high bits are, 0 to 7.
    pub bits: u8,
}

/// What is known of a layer when it was read to its end.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Summary {
    /// SHA-256 of the layer as stored.
    pub digest: Digest,
    /// Its length in bytes.
    pub size: u64,
}

/// Reads one layer; see the module. As a reader it yields the tar.
#[derive(Debug)]
pub struct LayerReader<R> {
    stored: Stored<R>,
    /// `None` for a plain tar.
    gzip: Option<Gzip>,
    /// Where the current chunk of a plain tar starts.
    chunk_start: u64,
}

impl<R: Read> LayerReader<R> {
    /// Looks at the first bytes of `reader` to find out how the layer is stored.
    ///
    /// # Errors
    /// Reading failed; [`NotInPlace`] if the bytes are those of another compression than
    /// gzip.
    pub fn open(reader: R) -> io::Result<Self> {
        const ZSTD: [u8; 4] = [0x28, 0xb5, 0x2f, 0xfd];
        let mut stored = Stored::new(reader);
        let start = stored.peek(4)?;
        let gzip = match start {
            [0x1f, 0x8b, ..] => Some(Gzip::new()?),
            _ if start == ZSTD => {
                let problem = "it is compressed with zstd; only gzip and plain tar archives can be used in place";
                return Err(NotInPlace(problem.to_owned()).into());
            }
            _ => None,
        };
        Ok(Self {
            stored,
            gzip,
            chunk_start: 0,
        })
    }

    /// How the layer is stored.
    #[must_use]
    pub fn kind(&self) -> Kind {
        match self.gzip {
            Some(_) => Kind::Gzip,
            None => Kind::Tar,
        }
    }

    /// Announces that the next `len` bytes to be read are one chunk.
    ///
    /// # Errors
    /// [`NotInPlace`] if no seek context can hold the chunk, because it is too far behind
    /// the last block boundary; decoding may fail.
    pub fn begin_chunk(&mut self, len: u32) -> io::Result<()> {
        self.chunk_start = self.stored.offset;
        match &mut self.gzip {
            Some(gzip) => gzip.begin_chunk(&mut self.stored, len),
            None => Ok(()),
        }
    }

    /// Where the chunk is whose bytes were just read.
    ///
    /// # Errors
    /// Reading on, to see whether more than the chunk follows, failed; [`NotInPlace`] if
    /// decoding the chunk would take too much input.
    pub fn end_chunk(&mut self) -> io::Result<Place> {
        match &mut self.gzip {
            Some(gzip) => gzip.end_chunk(&mut self.stored),
            None => Ok(Place::Tar {
                offset: self.chunk_start,
            }),
        }
    }

    /// What was read so far; of the whole layer only once reading has returned 0.
    #[must_use]
    pub fn summary(&self) -> Summary {
        Summary {
            digest: Digest::from_bytes(self.stored.hasher.clone().finalize().into()),
            size: self.stored.read,
        }
    }
}

impl<R: Read> Read for LayerReader<R> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        match &mut self.gzip {
            Some(gzip) => gzip.read(&mut self.stored, buf),
            None => self.stored.read(buf),
        }
    }
}

/// Bytes read from the source at a time.
const BUFFER: usize = 64 << 10;

/// The stored bytes, hashed and counted as they come.
#[derive(Debug)]
struct Stored<R> {
    reader: R,
    hasher: Sha256,
    /// Bytes taken from `reader`.
    read: u64,
    buffer: Box<[u8]>,
    /// The part of the buffer that was not consumed yet.
    start: usize,
    end: usize,
    /// Bytes consumed.
    offset: u64,
}

impl<R: Read> Stored<R> {
    fn new(reader: R) -> Self {
        Self {
            reader,
            hasher: Sha256::new(),
            read: 0,
            buffer: vec![0; BUFFER].into_boxed_slice(),
            start: 0,
            end: 0,
            offset: 0,
        }
    }

    /// Bytes that follow: at least one unless the source has ended.
    fn available(&mut self) -> io::Result<&[u8]> {
        if self.start == self.end {
            (self.start, self.end) = (0, 0);
            self.fill()?;
        }
        Ok(&self.buffer[self.start..self.end])
    }

    /// The first `len` bytes, fewer only if the source is shorter; before any others
    /// are consumed.
    fn peek(&mut self, len: usize) -> io::Result<&[u8]> {
        self.fill()?;
        Ok(&self.buffer[..self.end.min(len)])
    }

    /// Fills the buffer. Always all of it: how the decoder proceeds, and with it the
    /// index, must not depend on how a pipe delivers.
    fn fill(&mut self) -> io::Result<()> {
        while self.end < self.buffer.len() && self.refill()? {}
        Ok(())
    }

    /// Adds to the buffer; returns whether the source had more.
    fn refill(&mut self) -> io::Result<bool> {
        loop {
            match self.reader.read(&mut self.buffer[self.end..]) {
                Ok(count) => {
                    let new = &self.buffer[self.end..self.end + count];
                    self.hasher.update(new);
                    self.read += count as u64;
                    self.end += count;
                    return Ok(count > 0);
                }
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
    }

    fn consume(&mut self, count: usize) {
        self.start += count;
        self.offset += count as u64;
    }
}

impl<R: Read> Read for Stored<R> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let available = self.available()?;
        let count = available.len().min(buf.len());
        buf[..count].copy_from_slice(&available[..count]);
        self.consume(count);
        Ok(count)
    }
}
