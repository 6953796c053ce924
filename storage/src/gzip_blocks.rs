//! Inflates gzip and stops at every deflate block boundary.
//!
//! The safe interfaces of inflate libraries do not tell where blocks start, nor
//! at which bit; zlib's C interface does (`Z_BLOCK`). This is the only place that
//! uses it. What to do with the boundaries: [`original`](crate::original).
//!
//! Promises: never reads or writes outside the given slices; checksum and length
//! of every gzip member are verified by the library.

use std::ffi::{CStr, c_int};

use libz_rs_sys as z;

/// Window bits that make zlib expect gzip, with a window of 32 KiB.
const GZIP_WINDOW_BITS: c_int = 16 + 15;

/// Bits of `data_type` after a call with `Z_BLOCK`, as zlib documents them.
const UNUSED_BITS: c_int = 7;
const LAST_BLOCK: c_int = 64;
const BOUNDARY: c_int = 128;

/// An inflate decoder for one gzip member after the other.
pub(crate) struct GzipBlocks {
    /// Boxed: the library keeps a pointer from its state to the stream.
    stream: Box<z::z_stream>,
}

// SAFETY: the state behind the pointers was allocated for this stream, belongs to
// nobody else, and the library uses no thread-local data; `next_in` and `next_out`
// are set anew by every call.
unsafe impl Send for GzipBlocks {}

/// What one call did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Step {
    /// Bytes taken from the input.
    pub(crate) consumed: usize,
    /// Bytes put into the output.
    pub(crate) produced: usize,
    /// Where the decoder stands now.
    pub(crate) at: Place,
}

/// A place in a gzip member.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Place {
    /// Somewhere in a header, block or trailer.
    Inside,
    /// Before the first bit of a block; that many high bits of the last byte
    /// consumed belong to it.
    BlockStart { unused_bits: u8 },
    /// Behind the trailer.
    MemberEnd,
}

/// The library refuses the data, or has no memory.
#[derive(Debug, thiserror::Error)]
#[error("{message}")]
pub(crate) struct InflateError {
    message: String,
}

impl GzipBlocks {
    /// A decoder before the first byte of a gzip member.
    pub(crate) fn new() -> Result<Self, InflateError> {
        let mut stream = Box::<z::z_stream>::default();
        let size = c_int::try_from(size_of::<z::z_stream>()).unwrap_or(c_int::MAX);
        // SAFETY: the default stream names a complete allocator, and the version is
        // the library's own static string.
        let code =
            unsafe { z::inflateInit2_(&raw mut *stream, GZIP_WINDOW_BITS, z::zlibVersion(), size) };
        let decoder = Self { stream };
        decoder.check(code).map(|()| decoder)
    }

    /// Decodes until the input is used up, the output is full, or a block or the
    /// member ends.
    pub(crate) fn step(&mut self, input: &[u8], output: &mut [u8]) -> Result<Step, InflateError> {
        let available = |len: usize| z::uInt::try_from(len).unwrap_or(z::uInt::MAX);
        let stream = &mut *self.stream;
        stream.next_in = input.as_ptr();
        stream.avail_in = available(input.len());
        stream.next_out = output.as_mut_ptr();
        stream.avail_out = available(output.len());
        let (had_in, had_out) = (stream.avail_in, stream.avail_out);
        // SAFETY: the stream was initialised by `new`; both buffers are as long as
        // the stream says and live until the call returns. It keeps no pointer to
        // them that a later call would use: that sets its own.
        let code = unsafe { z::inflate(&raw mut *self.stream, z::Z_BLOCK) };
        let stream = &*self.stream;
        let moved = |had: z::uInt, left: z::uInt| usize::try_from(had - left).unwrap_or(usize::MAX);
        let consumed = moved(had_in, stream.avail_in);
        let produced = moved(had_out, stream.avail_out);
        let at = match code {
            z::Z_STREAM_END => Place::MemberEnd,
            // No progress without more input; not an error of the data.
            z::Z_BUF_ERROR => Place::Inside,
            _ => {
                self.check(code)?;
                place(stream.data_type)
            }
        };
        Ok(Step {
            consumed,
            produced,
            at,
        })
    }

    /// Expects another member.
    pub(crate) fn next_member(&mut self) -> Result<(), InflateError> {
        // SAFETY: the stream was initialised by `new`.
        let code = unsafe { z::inflateReset(&raw mut *self.stream) };
        self.check(code)
    }

    fn check(&self, code: c_int) -> Result<(), InflateError> {
        if code == z::Z_OK {
            return Ok(());
        }
        let message = if self.stream.msg.is_null() {
            format!("the decoder failed with code {code}")
        } else {
            // SAFETY: the library only ever stores pointers to static strings here.
            let text = unsafe { CStr::from_ptr(self.stream.msg) };
            text.to_string_lossy().into_owned()
        };
        Err(InflateError { message })
    }
}

fn place(data_type: c_int) -> Place {
    if data_type & BOUNDARY == 0 || data_type & LAST_BLOCK != 0 {
        return Place::Inside;
    }
    Place::BlockStart {
        unused_bits: u8::try_from(data_type & UNUSED_BITS).unwrap_or_default(),
    }
}

impl Drop for GzipBlocks {
    fn drop(&mut self) {
        // SAFETY: called once. A stream whose initialisation failed has no state,
        // which the library notices.
        unsafe { z::inflateEnd(&raw mut *self.stream) };
    }
}

impl std::fmt::Debug for GzipBlocks {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("GzipBlocks")
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use super::*;

    fn gzip(data: &[u8]) -> Vec<u8> {
        let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::new(9));
        encoder.write_all(data).unwrap();
        encoder.finish().unwrap()
    }

    /// Decodes everything; returns the output and the number of block starts.
    fn decode(stored: &[u8], piece: usize) -> Result<(Vec<u8>, usize), InflateError> {
        let mut decoder = GzipBlocks::new()?;
        let (mut at, mut plain, mut starts) = (0, Vec::new(), 0);
        let mut out = vec![0; piece];
        loop {
            let end = stored.len().min(at + piece);
            let step = decoder.step(&stored[at..end], &mut out)?;
            plain.extend_from_slice(&out[..step.produced]);
            at += step.consumed;
            match step.at {
                Place::BlockStart { .. } => starts += 1,
                Place::MemberEnd if at == stored.len() => return Ok((plain, starts)),
                Place::MemberEnd => decoder.next_member()?,
                Place::Inside if at == stored.len() && step.produced == 0 => {
                    return Ok((plain, starts));
                }
                Place::Inside => {}
            }
        }
    }

    #[test]
    fn members_blocks_and_bytes() {
        let text: Vec<u8> = (0..300_000_u32)
            .flat_map(|i| i.wrapping_mul(i).to_le_bytes())
            .collect();
        let stored = [gzip(&text), gzip(b"second")].concat();
        for piece in [1000, 1 << 16] {
            let (plain, starts) = decode(&stored, piece).unwrap();
            assert_eq!(plain, [&text[..], b"second"].concat());
            assert!(starts > 4, "{starts} block starts");
        }
    }

    #[test]
    fn damage_is_named() {
        let mut stored = gzip(&[7; 1000]);
        assert!(decode(b"no gzip at all", 100).is_err());
        let checksum = stored.len() - 8;
        stored[checksum] ^= 1;
        let error = decode(&stored, 100).unwrap_err();
        assert_eq!(error.to_string(), "incorrect data check");
    }
}
