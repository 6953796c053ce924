//! Entries of directory blocks (`docs/format.md`, "Directories").

use zerocopy::little_endian::{U16, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// One entry; the names follow all entries of a block.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
#[allow(missing_docs, reason = "the fields are documented in docs/format.md")]
pub struct Dirent {
    pub nid: U64,
    pub name_offset: U16,
    pub kind: u8,
    pub reserved: u8,
}
const _: () = assert!(size_of::<Dirent>() == 12);
