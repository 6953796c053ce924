//! Long notes: text in shared memory, to go with a deposit as a descriptor.
//!
//! A message between keeper and worker is short; what is mounted through the control
//! API comes with whole configurations, secrets included. Memory without a name is read
//! by nobody but those who were given it.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt as _;

use anyhow::{Context as _, ensure};
use nix::sys::memfd::{MFdFlags, memfd_create};

/// Longest text, in bytes: 255 configurations of the greatest length and then some.
const MAX_LEN: u64 = 1 << 30;

/// Memory that holds `text`.
///
/// # Errors
/// When the system has none.
pub(crate) fn store(text: &[u8]) -> anyhow::Result<OwnedFd> {
    let memory =
        memfd_create("nydus-note", MFdFlags::MFD_CLOEXEC).context("cannot make shared memory")?;
    let file = File::from(memory);
    file.write_all_at(text, 0)
        .context("cannot fill shared memory")?;
    Ok(file.into())
}

/// The text in `memory`.
///
/// # Errors
/// When it cannot be read, or is longer than any that [`store`] is used for.
pub(crate) fn load(memory: &OwnedFd) -> anyhow::Result<Vec<u8>> {
    let file = File::from(memory.try_clone().context("cannot copy a descriptor")?);
    let len = file.metadata().context("cannot inspect a note")?.len();
    ensure!(len <= MAX_LEN, "a note of {len} bytes");
    let mut text = vec![0; usize::try_from(len)?];
    file.read_exact_at(&mut text, 0)
        .context("cannot read a note")?;
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_can_be_read_more_than_once() {
        let memory = store(b"a long story").unwrap();
        let copy = memory.try_clone().unwrap();
        for memory in [&memory, &copy, &memory] {
            assert_eq!(load(memory).unwrap(), b"a long story");
        }
        assert_eq!(load(&store(b"").unwrap()).unwrap(), b"");
    }
}
