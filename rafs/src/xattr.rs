//! Extended attributes of an inode, and the prefixes that shorten their keys.
//!
//! Layout: `docs/format.md`, "Extended attributes".

use zerocopy::FromBytes;

use crate::error::{Error, corrupt};
use crate::format::xattr::{XattrEntry, XattrHeader};
use crate::fs::Inode;
use crate::image::Image;
use crate::units::{Nid, len64};

/// Number on disk and the part of the key that it stands for. The numbers of
/// the ACLs stand for the whole key.
const PREFIXES: [(u8, &str); 5] = [
    (1, "user."),
    (2, "system.posix_acl_access"),
    (3, "system.posix_acl_default"),
    (4, "trusted."),
    (6, "security."),
];

/// Longest full key, in bytes.
pub const MAX_KEY: usize = 255;

/// An attribute of an inode, borrowed from the image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Xattr<'a> {
    prefix: &'static str,
    suffix: &'a [u8],
    /// Its value; may be empty.
    pub value: &'a [u8],
}

impl Xattr<'_> {
    /// The full key, like `user.name`.
    #[must_use]
    pub fn key(&self) -> Vec<u8> {
        [self.prefix.as_bytes(), self.suffix].concat()
    }

    /// Whether `key` is the full key.
    #[must_use]
    pub fn has_key(&self, key: &[u8]) -> bool {
        key.strip_prefix(self.prefix.as_bytes()) == Some(self.suffix)
    }
}

/// The number of a key's prefix and the rest of the key; `None` if the format
/// cannot hold such a key.
#[must_use]
pub fn split_key(key: &[u8]) -> Option<(u8, &[u8])> {
    PREFIXES.iter().find_map(|(number, prefix)| {
        let suffix = key.strip_prefix(prefix.as_bytes())?;
        // The name of an attribute is never empty, and an ACL has no name.
        (prefix.ends_with('.') != suffix.is_empty()).then_some((*number, suffix))
    })
}

impl Image {
    /// The attributes of an inode, in stored order. At most 256 KiB of image are read.
    ///
    /// # Errors
    /// [`Error::Corrupt`] for a damaged inode or attribute area.
    pub fn xattrs(&self, nid: Nid) -> Result<Vec<Xattr<'_>>, Error> {
        let inode = self.inode(nid)?;
        let mut all = Vec::new();
        let mut area = self.xattr_area(&inode)?;
        while let Some(xattr) = area.next()? {
            all.push(xattr);
        }
        Ok(all)
    }

    /// The value of the attribute with this full key, if the inode has it.
    ///
    /// # Errors
    /// [`Error::Corrupt`] for a damaged inode or attribute area.
    pub fn xattr(&self, nid: Nid, key: &[u8]) -> Result<Option<&[u8]>, Error> {
        let inode = self.inode(nid)?;
        let mut area = self.xattr_area(&inode)?;
        while let Some(xattr) = area.next()? {
            if xattr.has_key(key) {
                return Ok(Some(xattr.value));
            }
        }
        Ok(None)
    }

    fn xattr_area(&self, inode: &Inode) -> Result<Area<'_>, Error> {
        let start = inode.xattr_offset();
        if inode.xattr_size == 0 {
            return Ok(Area {
                rest: &[],
                at: start,
            });
        }
        let bytes = self.slice(start, inode.xattr_size, "xattr area")?;
        let (header, rest) = XattrHeader::ref_from_prefix(bytes).map_err(|_short| {
            corrupt("xattr area", start, inode.xattr_size, "at least 12 bytes")
        })?;
        if header.shared_count != 0 {
            return Err(corrupt(
                "shared xattr count",
                start + 4,
                header.shared_count,
                "0",
            ));
        }
        Ok(Area {
            rest,
            at: start.saturating_add(len64(size_of::<XattrHeader>())),
        })
    }
}

/// What is left of an attribute area.
struct Area<'a> {
    rest: &'a [u8],
    /// Byte offset of `rest` in the bootstrap.
    at: u64,
}

impl<'a> Area<'a> {
    fn next(&mut self) -> Result<Option<Xattr<'a>>, Error> {
        // The area has whole words, so what is left is nothing or an entry.
        let Ok((entry, body)) = XattrEntry::ref_from_prefix(self.rest) else {
            return Ok(None);
        };
        let (name_len, value_len) = (
            usize::from(entry.name_len),
            usize::from(entry.value_size.get()),
        );
        let name = body.get(..name_len);
        let value = body.get(name_len..).and_then(|rest| rest.get(..value_len));
        let (Some(suffix), Some(value)) = (name, value) else {
            return Err(corrupt(
                "xattr lengths",
                self.at,
                len64(name_len.saturating_add(value_len)),
                "a name and value inside the area",
            ));
        };
        let prefix = PREFIXES.iter().find(|(number, prefix)| {
            *number == entry.prefix && (prefix.ends_with('.') || suffix.is_empty())
        });
        let Some((_, prefix)) = prefix else {
            return Err(corrupt(
                "xattr prefix",
                self.at + 1,
                entry.prefix,
                "1, 2, 3, 4 or 6",
            ));
        };
        let len = (size_of::<XattrEntry>() + name_len + value_len).next_multiple_of(4);
        self.rest = self.rest.get(len..).unwrap_or(&[]);
        self.at = self.at.saturating_add(len64(len));
        Ok(Some(Xattr {
            prefix,
            suffix,
            value,
        }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_split_at_their_prefix() {
        assert_eq!(split_key(b"user.k"), Some((1, &b"k"[..])));
        assert_eq!(split_key(b"system.posix_acl_access"), Some((2, &b""[..])));
        assert_eq!(
            split_key(b"security.capability"),
            Some((6, &b"capability"[..]))
        );
        assert_eq!(split_key(b"system.posix_acl_accessx"), None);
        assert_eq!(split_key(b"user."), None);
        assert_eq!(split_key(b"btrfs.compression"), None);
    }
}
