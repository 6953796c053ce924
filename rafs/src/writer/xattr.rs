//! Attribute areas: their size and their bytes.

use zerocopy::IntoBytes;

use crate::format::xattr::{XattrEntry, XattrHeader};
use crate::tree::Xattrs;
use crate::units::len64;
use crate::xattr::{MAX_KEY, split_key};

/// Why an attribute cannot be stored.
pub(super) struct Refused<'a> {
    pub(super) key: &'a [u8],
    pub(super) reason: &'static str,
}

/// Length of the attribute area in bytes; 0 without attributes.
pub(super) fn area_size(xattrs: &Xattrs) -> Result<u64, Refused<'_>> {
    if xattrs.is_empty() {
        return Ok(0);
    }
    let mut size = len64(size_of::<XattrHeader>());
    for (key, value) in xattrs {
        let refuse = |reason| Refused { key, reason };
        let Some((_, suffix)) = split_key(key) else {
            return Err(refuse(
                "has no prefix that the format knows (user, trusted, security, POSIX ACL)",
            ));
        };
        if key.len() > MAX_KEY {
            return Err(refuse("has a key above 255 bytes"));
        }
        if value.len() > usize::from(u16::MAX) {
            return Err(refuse("has a value above 65535 bytes"));
        }
        size += entry_size(suffix, value);
        if count_word(size).is_none() {
            return Err(refuse(
                "does not fit: all attributes of an inode share 256 KiB",
            ));
        }
    }
    Ok(size)
}

/// The word in the inode that tells the length of the area; `None` if it is too long.
pub(super) fn count_word(area_size: u64) -> Option<u16> {
    match area_size.checked_sub(len64(size_of::<XattrHeader>())) {
        None => Some(0),
        Some(entries) => u16::try_from(entries / 4 + 1).ok(),
    }
}

fn entry_size(suffix: &[u8], value: &[u8]) -> u64 {
    len64((size_of::<XattrEntry>() + suffix.len() + value.len()).next_multiple_of(4))
}

/// Appends the area of attributes that passed [`area_size`].
pub(super) fn append_area(out: &mut Vec<u8>, xattrs: &Xattrs) {
    if xattrs.is_empty() {
        return;
    }
    out.resize(out.len() + size_of::<XattrHeader>(), 0);
    for (key, value) in xattrs {
        let Some((prefix, suffix)) = split_key(key) else {
            continue;
        };
        let entry = XattrEntry {
            name_len: u8::try_from(suffix.len()).unwrap_or(u8::MAX),
            prefix,
            value_size: u16::try_from(value.len()).unwrap_or(u16::MAX).into(),
        };
        out.extend_from_slice(entry.as_bytes());
        out.extend_from_slice(suffix);
        out.extend_from_slice(value);
        out.resize(out.len().next_multiple_of(4), 0);
    }
}
