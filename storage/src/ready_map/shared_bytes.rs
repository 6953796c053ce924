//! A file as shared atomic bytes: the only writable map of the crate.
//!
//! Bytes are changed by atomic operations only, in this process and in every
//! other one that uses the file, so the map can be used from any thread without
//! a lock. The file must have its final length and its blocks before it is
//! mapped: a page without a block on a full disk, or behind the end of a
//! shortened file, raises SIGBUS. [`ReadyMap`](super::ReadyMap) sees to that.

use std::fs::File;
use std::io;

use memmap2::{MmapOptions, MmapRaw};

use crate::sync::{AtomicU8, Ordering};

/// The bytes of a mapped file.
#[derive(Debug)]
pub(super) struct SharedBytes(MmapRaw);

impl SharedBytes {
    /// Maps the whole of `file`, which must be open for reading and writing.
    pub(super) fn map(file: &File) -> io::Result<Self> {
        MmapOptions::new().map_raw(file).map(Self)
    }

    /// The byte at `at`; `None` beyond the end.
    pub(super) fn get(&self, at: usize) -> Option<&AtomicU8> {
        if at >= self.0.len() {
            return None;
        }
        // SAFETY: `at` is inside the map, which is one allocation of `len` bytes.
        let byte = unsafe { self.0.as_mut_ptr().add(at) };
        // SAFETY: the byte is valid for reads and writes for as long as the map,
        // which the returned reference borrows; an atomic byte has no alignment
        // needs, and nobody accesses the map in any other way than atomically.
        Some(unsafe { AtomicU8::from_ptr(byte) })
    }

    /// Copies `bytes` to `at`; what does not fit is left out.
    #[cfg(test)]
    pub(super) fn store(&self, at: usize, bytes: &[u8]) {
        for (i, value) in bytes.iter().enumerate() {
            if let Some(byte) = self.get(at.saturating_add(i)) {
                byte.store(*value, Ordering::Release);
            }
        }
    }

    /// `N` bytes from `at` on; zeros beyond the end.
    pub(super) fn load<const N: usize>(&self, at: usize) -> [u8; N] {
        std::array::from_fn(|i| {
            self.get(at.saturating_add(i))
                .map_or(0, |byte| byte.load(Ordering::Acquire))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_maps_of_a_file_see_each_other_and_nothing_beyond_the_end() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(10).unwrap();
        let (a, b) = (
            SharedBytes::map(&file).unwrap(),
            SharedBytes::map(&file).unwrap(),
        );
        a.store(7, &[1, 2, 3, 4, 5]);
        assert_eq!(b.load(6), [0, 1, 2, 3, 0, 0]);
        assert!(b.get(10).is_none() && b.get(usize::MAX).is_none());
    }
}
