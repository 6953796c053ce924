//! Pre-access events as the kernel writes them (`linux/fanotify.h`).
//!
//! An event is a fixed head, then records with a type and a length each. Of these
//! only the range of the access matters here. Everything is in the byte order of the
//! machine.

use std::ops::Range;

/// Version of the layout.
const VERSION: u8 = 3;
/// Bytes of the head.
const HEAD: usize = 24;
/// Type of the record that holds the range.
const RECORD_RANGE: u8 = 6;

/// One access that waits for an answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Event {
    /// Number of the descriptor that came with it, in the process that read it: the
    /// name of the event, too. Negative if there is none, and nobody to answer.
    pub fd: i32,
    /// Process that makes the access.
    pub pid: i32,
    /// Bytes of the file; everything if the kernel did not say.
    pub range: Range<u64>,
}

/// What the kernel sent is no event of this version.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("not a fanotify event of version 3")]
pub(crate) struct Malformed;

impl Event {
    /// Reads the event at the start of `bytes`.
    ///
    /// # Errors
    /// [`Malformed`] if the lengths or the version are not what they must be.
    pub(crate) fn parse(bytes: &[u8]) -> Result<Self, Malformed> {
        let len = usize::try_from(u32_at(bytes, 0)?).map_err(|_too_large| Malformed)?;
        let event = bytes.get(..len).ok_or(Malformed)?;
        let head = usize::from(u16_at(event, 6)?);
        if event.get(4) != Some(&VERSION) || head < HEAD {
            return Err(Malformed);
        }
        Ok(Self {
            fd: u32_at(event, 16)?.cast_signed(),
            pid: u32_at(event, 20)?.cast_signed(),
            range: range(event.get(head..).ok_or(Malformed)?)?,
        })
    }
}

fn range(mut records: &[u8]) -> Result<Range<u64>, Malformed> {
    while let Some(kind) = records.first() {
        let len = usize::from(u16_at(records, 2)?);
        let record = records.get(..len).ok_or(Malformed)?;
        if *kind == RECORD_RANGE {
            let start = u64_at(record, 8)?;
            return Ok(start..start.saturating_add(u64_at(record, 16)?));
        }
        if len == 0 {
            return Err(Malformed);
        }
        records = records.get(len..).ok_or(Malformed)?;
    }
    Ok(0..u64::MAX)
}

fn array<const N: usize>(bytes: &[u8], at: usize) -> Result<[u8; N], Malformed> {
    let field = bytes.get(at..).and_then(|rest| rest.first_chunk());
    field.copied().ok_or(Malformed)
}

fn u16_at(bytes: &[u8], at: usize) -> Result<u16, Malformed> {
    array(bytes, at).map(native16)
}

fn u32_at(bytes: &[u8], at: usize) -> Result<u32, Malformed> {
    array(bytes, at).map(native32)
}

fn u64_at(bytes: &[u8], at: usize) -> Result<u64, Malformed> {
    array(bytes, at).map(native64)
}

#[allow(
    clippy::host_endian_bytes,
    reason = "the kernel's structures are native"
)]
fn native16(bytes: [u8; 2]) -> u16 {
    u16::from_ne_bytes(bytes)
}

#[allow(
    clippy::host_endian_bytes,
    reason = "the kernel's structures are native"
)]
fn native32(bytes: [u8; 4]) -> u32 {
    u32::from_ne_bytes(bytes)
}

#[allow(
    clippy::host_endian_bytes,
    reason = "the kernel's structures are native"
)]
fn native64(bytes: [u8; 8]) -> u64 {
    u64::from_ne_bytes(bytes)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// As read from a Linux 6.18 (x86-64): a write of two bytes at 0.
    const REAL: &str = "3000000003001800000010000000000005000000cd2a0000\
                        060018000000000000000000000000000010000000000000";

    fn real() -> Vec<u8> {
        let digit = |c: u8| u8::try_from(char::from(c).to_digit(16).unwrap()).unwrap();
        let pairs = REAL.as_bytes().chunks(2);
        pairs.map(|p| digit(p[0]) << 4 | digit(p[1])).collect()
    }

    #[test]
    #[cfg(target_endian = "little")]
    fn a_real_event() {
        let event = Event {
            fd: 5,
            pid: 0x2acd,
            range: 0..4096,
        };
        assert_eq!(Event::parse(&real()), Ok(event.clone()));
        // What follows an event is not part of it.
        let mut padded = real();
        padded.resize(72, 0xff);
        assert_eq!(Event::parse(&padded), Ok(event));
        // Without a range it could be any part of the file.
        let mut short = real();
        short[0] = 24;
        assert_eq!(Event::parse(&short).unwrap().range, 0..u64::MAX);
        // Records of other kinds are stepped over.
        let mut other = real();
        other.splice(24..24, [9, 0, 4, 0]);
        other[0] += 4;
        assert_eq!(Event::parse(&other).unwrap().range, 0..4096);
    }

    #[test]
    fn what_is_cut_or_of_another_version_is_refused() {
        for len in 0..48 {
            assert_eq!(Event::parse(&real()[..len]), Err(Malformed), "{len}");
        }
        let mut other = real();
        other[4] = 4;
        assert_eq!(Event::parse(&other), Err(Malformed));
        let mut endless = real();
        endless[24..28].copy_from_slice(&[9, 0, 0, 0]);
        assert_eq!(Event::parse(&endless), Err(Malformed));
    }

    proptest! {
        #[test]
        fn no_bytes_cause_a_panic(bytes: Vec<u8>, head in 0_usize..48) {
            let _ = Event::parse(&bytes);
            let mut near = real();
            near.truncate(head);
            near.extend(&bytes);
            let _ = Event::parse(&near);
        }
    }
}
