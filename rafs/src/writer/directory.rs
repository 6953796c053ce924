//! Contents of directories: the order of entries and how they fill blocks.

use std::collections::BTreeMap;

use crate::format::dirent::Dirent;
use crate::tree::{InodeId, Name};
use crate::units::{BLOCK, FileKind, len64};
use zerocopy::IntoBytes;

/// A name of a directory on disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Listed<'a> {
    /// `.`
    Dot,
    /// `..`
    DotDot,
    /// An entry of the tree.
    Entry(&'a Name, InodeId),
}

impl<'a> Listed<'a> {
    pub(super) fn name(self) -> &'a [u8] {
        match self {
            Self::Dot => b".",
            Self::DotDot => b"..",
            Self::Entry(name, _) => name,
        }
    }
}

/// All names of a directory in byte order, `.` and `..` among them.
pub(super) fn listing(entries: &BTreeMap<Name, InodeId>) -> impl Iterator<Item = Listed<'_>> {
    let mut entries = entries.iter().peekable();
    let mut dots = [Listed::Dot, Listed::DotDot].into_iter().peekable();
    std::iter::from_fn(move || {
        let dot_first = match (dots.peek(), entries.peek()) {
            (Some(dot), Some((name, _))) => dot.name() < &name[..],
            (dot, _) => dot.is_some(),
        };
        if dot_first {
            dots.next()
        } else {
            entries.next().map(|(name, id)| Listed::Entry(name, *id))
        }
    })
}

/// Length of the data of a directory, in bytes.
pub(super) fn size(entries: &BTreeMap<Name, InodeId>) -> u64 {
    listing(entries).fold(0, |size, listed| {
        let len = entry_len(listed.name());
        let left = size.next_multiple_of(BLOCK) - size;
        // A full block has nothing left, and an empty directory no block yet.
        if len > left {
            size.next_multiple_of(BLOCK) + len
        } else {
            size + len
        }
    })
}

fn entry_len(name: &[u8]) -> u64 {
    len64(size_of::<Dirent>() + name.len())
}

/// Builds the data of directories; reused from one to the next.
#[derive(Debug, Default)]
pub(super) struct Builder {
    data: Vec<u8>,
    /// Entries and names of the block being filled.
    heads: Vec<Dirent>,
    names: Vec<u8>,
}

impl Builder {
    /// Starts an empty directory.
    pub(super) fn clear(&mut self) {
        self.data.clear();
        self.heads.clear();
        self.names.clear();
    }

    /// Appends an entry; call in the order of [`listing`].
    pub(super) fn push(&mut self, name: &[u8], nid: u64, kind: FileKind) {
        let used = len64(self.heads.len() * size_of::<Dirent>() + self.names.len());
        if used + entry_len(name) > BLOCK {
            self.flush();
            let full = len64(self.data.len()).next_multiple_of(BLOCK);
            self.data
                .resize(usize::try_from(full).unwrap_or(usize::MAX), 0);
        }
        self.heads.push(Dirent {
            nid: nid.into(),
            // Where the name starts among the names; `flush` adds the entries.
            name_offset: u16::try_from(self.names.len()).unwrap_or(u16::MAX).into(),
            kind: kind.dirent_number(),
            reserved: 0,
        });
        self.names.extend_from_slice(name);
    }

    /// The finished data.
    pub(super) fn finish(&mut self) -> &[u8] {
        self.flush();
        &self.data
    }

    /// Moves the current block to the data. It is at most [`BLOCK`] long, so
    /// every offset in it fits 16 bits.
    fn flush(&mut self) {
        let head = u16::try_from(self.heads.len() * size_of::<Dirent>()).unwrap_or(u16::MAX);
        for entry in &mut self.heads {
            entry.name_offset = entry.name_offset.get().saturating_add(head).into();
        }
        self.data.extend_from_slice(self.heads.as_bytes());
        self.data.extend_from_slice(&self.names);
        self.heads.clear();
        self.names.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tree::{Attr, Content, Inode, Tree};

    fn entries(names: &[Vec<u8>]) -> BTreeMap<Name, InodeId> {
        let mut tree = Tree::new(Attr::default());
        let root = tree.root();
        for name in names {
            let inode = Inode::new(Attr::default(), Content::Fifo);
            tree.insert(root, name, inode).unwrap();
        }
        tree.inode(root).entries().unwrap().clone()
    }

    #[test]
    fn dots_are_sorted_in() {
        let names = [&b" sp"[..], b"!", b"-", b"...", b"..a", b"A"].map(<[u8]>::to_vec);
        let entries = entries(&names);
        let all: Vec<_> = listing(&entries).map(Listed::name).collect();
        assert_eq!(
            all,
            [&b" sp"[..], b"!", b"-", b".", b"..", b"...", b"..a", b"A"]
        );
    }

    #[test]
    fn size_is_the_length_of_the_data() {
        for count in [0, 1, 150, 151, 152, 1000] {
            let names: Vec<_> = (0..count)
                .map(|i| format!("a name {i:08}").into_bytes())
                .collect();
            let entries = entries(&names);
            let mut builder = Builder::default();
            for listed in listing(&entries) {
                builder.push(listed.name(), 1, FileKind::Fifo);
            }
            assert_eq!(len64(builder.finish().len()), size(&entries), "{count}");
        }
        assert_eq!(size(&entries(&[])), 27);
    }
}
