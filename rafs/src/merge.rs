//! Layers into one tree, with whiteouts.
//!
//! [`apply`] puts an upper layer on a lower tree, directory by directory and
//! without recursion: whiteouts of the upper directory remove lower entries,
//! the other upper entries replace or join them. Inodes and chunks of the upper
//! tree are appended to the arenas of the lower one; what no name leads to any
//! more stays in the arena and is left out when the tree is written.
//!
//! Rules: `docs/format.md`, "Layers and whiteouts".

use std::collections::{BTreeMap, HashMap};
use std::mem::take;

use storage::{BlobId, BlobIndex, BlobInfo};

use crate::error::WriteError;
use crate::tree::{ChunkId, Content, Inode, InodeId, Name, Tree};

/// Name prefix of OCI whiteouts.
const OCI_PREFIX: &[u8] = b".wh.";
/// Name of the OCI entry that hides everything below it in its directory.
const OCI_OPAQUE: &[u8] = b".wh..wh..opq";
/// Attribute that makes a directory opaque for overlayfs.
const OVERLAY_OPAQUE: &[u8] = b"trusted.overlay.opaque";

/// How an upper layer says that something of the lower layers is gone.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum WhiteoutSpec {
    /// Entries named `.wh.NAME`, and `.wh..wh..opq` for opaque directories.
    #[default]
    Oci,
    /// Character devices 0:0, and `trusted.overlay.opaque` = `y` on directories.
    Overlayfs,
    /// Not at all: such entries are ordinary.
    None,
}

/// Puts the layer `upper` on `lower`.
///
/// The upper root replaces the attributes of the lower root, and an upper
/// directory those of a lower one, unless it is [implied](Inode::implied). Names are hard
/// links of each other only if they come from the same layer. Blobs of equal
/// id become one. Takes time in proportion to the upper layer.
///
/// # Errors
/// [`WriteError::BadBlob`] if both layers describe a blob of the same id
/// differently, [`WriteError::BadChunk`] for a chunk of a blob that its tree
/// does not have, [`WriteError::DirectoryLinkedTwice`] for an upper directory
/// that has several names. `lower` is unchanged by the first two.
pub fn apply(lower: &mut Tree, upper: Tree, spec: WhiteoutSpec) -> Result<(), WriteError> {
    let blobs = unify_blobs(lower, &upper)?;
    let (inodes, chunks, infos) = upper.into_parts();
    for (info, index) in infos.into_iter().zip(&blobs) {
        if index.as_usize() == lower.blobs.len() {
            lower.blobs.push(info);
        }
    }
    let chunk_ids: Vec<ChunkId> = chunks
        .into_iter()
        .map(|mut chunk| {
            // `unify_blobs` checked the index of every chunk.
            chunk.blob = blobs
                .get(chunk.blob.as_usize())
                .copied()
                .unwrap_or_default();
            lower.add_chunk(chunk)
        })
        .collect();
    let merged = append_inodes(lower, inodes, &chunk_ids);
    let Some(&upper_root) = merged.ids.first() else {
        return Ok(());
    };
    let mut merge = Merge {
        tree: lower,
        spec,
        entries: merged.entries,
    };
    merge.run(upper_root)
}

/// Index in the lower tree of every blob of the upper one; new ones follow the lower blobs.
fn unify_blobs(lower: &Tree, upper: &Tree) -> Result<Vec<BlobIndex>, WriteError> {
    let mut known: HashMap<&BlobId, (u32, &BlobInfo)> = HashMap::new();
    for (index, info) in (0_u32..).zip(&lower.blobs) {
        known.insert(&info.id, (index, info));
    }
    let mut next = u32::try_from(lower.blobs.len()).unwrap_or(u32::MAX);
    let mut indexes = Vec::with_capacity(upper.blobs.len());
    for info in &upper.blobs {
        let (index, same) = *known.entry(&info.id).or_insert((next, info));
        if index == next {
            next = next.saturating_add(1);
        }
        // Chunk numbers only mean the same if the chunk tables are the same.
        if (
            same.chunk_count,
            same.uncompressed_size,
            same.digester,
            same.chunk_size,
        ) != (
            info.chunk_count,
            info.uncompressed_size,
            info.digester,
            info.chunk_size,
        ) {
            return Err(WriteError::BadBlob {
                id: info.id.clone(),
                reason: "is described differently by two layers",
            });
        }
        indexes.push(BlobIndex::new(index));
    }
    match upper
        .chunks()
        .iter()
        .find(|chunk| chunk.blob.as_usize() >= indexes.len())
    {
        Some(chunk) => Err(WriteError::BadChunk {
            blob: chunk.blob.get(),
            index: chunk.index.get(),
            reason: "the tree has no such blob",
        }),
        None => Ok(indexes),
    }
}

/// The upper inodes, appended to the lower arena.
struct Appended {
    /// Id by position in the upper arena.
    ids: Vec<InodeId>,
    /// Entries of upper directories, taken out of them, with new ids.
    entries: HashMap<InodeId, BTreeMap<Name, InodeId>>,
}

fn append_inodes(tree: &mut Tree, inodes: Vec<Inode>, chunks: &[ChunkId]) -> Appended {
    let mut ids = Vec::with_capacity(inodes.len());
    let mut entries = HashMap::new();
    for mut inode in inodes {
        let mut taken = None;
        match &mut inode.content {
            Content::Directory(children) => taken = Some(take(children)),
            Content::File { chunks: used, .. } => {
                for chunk in used {
                    *chunk = chunks[chunk.as_usize()];
                }
            }
            _ => {}
        }
        let id = tree.add_inode(inode);
        if let Some(taken) = taken {
            entries.insert(id, taken);
        }
        ids.push(id);
    }
    for children in entries.values_mut() {
        for child in children.values_mut() {
            *child = ids[child.as_usize()];
        }
    }
    Appended { ids, entries }
}

struct Merge<'a> {
    tree: &'a mut Tree,
    spec: WhiteoutSpec,
    /// Entries of upper directories that were not merged yet.
    entries: HashMap<InodeId, BTreeMap<Name, InodeId>>,
}

impl Merge<'_> {
    fn run(&mut self, upper_root: InodeId) -> Result<(), WriteError> {
        let root = self.tree.root();
        self.replace_attributes(root, upper_root);
        let mut pending = vec![(root, upper_root)];
        while let Some((target, upper)) = pending.pop() {
            let Some(entries) = self.entries.remove(&upper) else {
                continue;
            };
            self.whiteouts(target, &entries);
            for (name, id) in entries {
                if !self.is_whiteout(&name, id) {
                    pending.extend(self.entry(target, name, id)?);
                }
            }
        }
        Ok(())
    }

    /// Applies the whiteouts of an upper directory to the lower entries of `target`.
    fn whiteouts(&mut self, target: InodeId, upper: &BTreeMap<Name, InodeId>) {
        match self.spec {
            WhiteoutSpec::None => {}
            WhiteoutSpec::Oci => {
                if upper.contains_key(OCI_OPAQUE) {
                    self.clear(target);
                }
                let from: Name = OCI_PREFIX.into();
                for name in upper.range(from..).map(|(name, _)| name) {
                    match name.strip_prefix(OCI_PREFIX) {
                        Some(hidden) => self.tree.unlink(target, hidden),
                        None => break,
                    };
                }
            }
            WhiteoutSpec::Overlayfs => {
                for (name, &id) in upper {
                    if self.is_whiteout(name, id) {
                        self.tree.unlink(target, name);
                    }
                }
            }
        }
    }

    /// Puts an upper entry into `target`; returns directories to merge next.
    fn entry(
        &mut self,
        target: InodeId,
        name: Name,
        id: InodeId,
    ) -> Result<Option<(InodeId, InodeId)>, WriteError> {
        let is_directory = self.tree.inode(id).entries().is_some();
        if !is_directory {
            self.tree.link(target, &name, id)?;
            return Ok(None);
        }
        if !self.entries.contains_key(&id) {
            return Err(WriteError::DirectoryLinkedTwice {
                name: name.into_vec(),
            });
        }
        let lower = self
            .tree
            .entry(target, &name)
            .filter(|lower| self.tree.inode(*lower).entries().is_some());
        match lower {
            Some(lower) if lower != id => {
                self.replace_attributes(lower, id);
                Ok(Some((lower, id)))
            }
            // Its entries were taken out, so it starts empty.
            _ => {
                self.take_opaque(id);
                self.tree.link(target, &name, id)?;
                Ok(Some((id, id)))
            }
        }
    }

    /// Gives a lower directory all attributes of the upper one that covers it.
    fn replace_attributes(&mut self, lower: InodeId, upper: InodeId) {
        if self.take_opaque(upper) {
            self.clear(lower);
        }
        if self.tree.inode(upper).implied {
            return;
        }
        let (attr, xattrs) = {
            let upper = self.tree.inode_mut(upper);
            (upper.attr, take(&mut upper.xattrs))
        };
        let lower = self.tree.inode_mut(lower);
        lower.attr = attr;
        lower.xattrs = xattrs;
        lower.implied = false;
    }

    /// Removes the overlayfs mark of an opaque directory; tells whether it was there.
    fn take_opaque(&mut self, dir: InodeId) -> bool {
        if self.spec != WhiteoutSpec::Overlayfs {
            return false;
        }
        let xattrs = &mut self.tree.inode_mut(dir).xattrs;
        let is_opaque = xattrs
            .get(OVERLAY_OPAQUE)
            .is_some_and(|value| **value == *b"y");
        is_opaque && xattrs.remove(OVERLAY_OPAQUE).is_some()
    }

    fn clear(&mut self, dir: InodeId) {
        if let Some(entries) = self.tree.inode_mut(dir).entries_mut() {
            entries.clear();
        }
    }

    fn is_whiteout(&self, name: &[u8], id: InodeId) -> bool {
        match self.spec {
            WhiteoutSpec::Oci => name.starts_with(OCI_PREFIX),
            WhiteoutSpec::Overlayfs => {
                matches!(self.tree.inode(id).content, Content::CharDevice(0))
            }
            WhiteoutSpec::None => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tree::Attr;

    fn tree(paths: &[&str]) -> Tree {
        let mut tree = Tree::new(Attr::default());
        for path in paths {
            let (dir, name) = path.rsplit_once('/').unwrap_or(("", path));
            let dir = tree.mkdir_all(dir.as_bytes(), Attr::default()).unwrap();
            if !name.is_empty() {
                let fifo = Inode::new(Attr::default(), Content::Fifo);
                tree.insert(dir, name.as_bytes(), fifo).unwrap();
            }
        }
        tree
    }

    fn paths(tree: &Tree) -> Vec<String> {
        let mut all: Vec<_> = tree
            .walk()
            .skip(1)
            .map(|e| String::from_utf8(e.path).unwrap())
            .collect();
        all.sort();
        all
    }

    /// Lower paths, upper paths, merged paths; a path that ends with `/` is a directory.
    #[test]
    fn oci_rules() {
        for (lower, upper, merged) in [
            (&["a", "b"][..], &["c"][..], &["/a", "/b", "/c"][..]),
            (&["a", "b"], &[".wh.a"], &["/b"]),
            (&["a"], &[".wh.a", "a"], &["/a"]),
            (&["d/x", "d/y"], &["d/.wh.x"], &["/d", "/d/y"]),
            (&["d/x", "d/y"], &["d/.wh..wh..opq", "d/z"], &["/d", "/d/z"]),
            (&["d/x"], &["d"], &["/d"]),
            (&["d"], &["d/x"], &["/d", "/d/x"]),
            (&["d/e/f"], &[".wh.d", "d/g"], &["/d", "/d/g"]),
            (&["a"], &["new/.wh.a", "new/b"], &["/a", "/new", "/new/b"]),
            (&["a"], &[".wh."], &["/a"]),
            (&["a"], &[".wh..wh.plnk"], &["/a"]),
            (&["d/x"], &["d/"], &["/d", "/d/x"]),
        ] {
            let mut result = tree(lower);
            apply(&mut result, tree(upper), WhiteoutSpec::Oci).unwrap();
            assert_eq!(paths(&result), merged, "{lower:?} + {upper:?}");
        }
    }

    #[test]
    fn without_a_spec_whiteouts_are_files() {
        let mut result = tree(&["a"]);
        apply(&mut result, tree(&[".wh.a"]), WhiteoutSpec::None).unwrap();
        assert_eq!(paths(&result), ["/.wh.a", "/a"]);
    }

    #[test]
    fn overlayfs_rules() {
        let mut lower = tree(&["a", "b", "d/x", "e/x"]);
        let mut upper = tree(&["d/y", "e/y"]);
        let whiteout = Inode::new(Attr::default(), Content::CharDevice(0));
        upper.insert(upper.root(), b"a", whiteout).unwrap();
        for (dir, value) in [(&b"d"[..], &b"y"[..]), (b"e", b"n")] {
            let id = upper.lookup(dir).unwrap();
            let xattrs = &mut upper.inode_mut(id).xattrs;
            xattrs.insert(OVERLAY_OPAQUE.into(), value.into());
        }
        apply(&mut lower, upper, WhiteoutSpec::Overlayfs).unwrap();
        assert_eq!(paths(&lower), ["/b", "/d", "/d/y", "/e", "/e/x", "/e/y"]);
        let xattrs = |path| &lower.inode(lower.lookup(path).unwrap()).xattrs;
        assert!(xattrs(b"d").is_empty());
        assert_eq!(xattrs(b"e").len(), 1);
    }

    #[test]
    fn an_upper_name_leaves_other_links_alone() {
        let mut lower = tree(&["a"]);
        let a = lower.lookup(b"a").unwrap();
        lower.link(lower.root(), b"b", a).unwrap();
        let mut upper = tree(&["a"]);
        let id = upper.lookup(b"a").unwrap();
        upper.inode_mut(id).attr.uid = 7;
        apply(&mut lower, upper, WhiteoutSpec::Oci).unwrap();
        let uid = |path| lower.inode(lower.lookup(path).unwrap()).attr.uid;
        assert_eq!((uid(b"a"), uid(b"b")), (7, 0));
    }

    #[test]
    fn the_upper_root_gives_its_attributes() {
        let mut lower = tree(&["a"]);
        let upper = Tree::new(Attr {
            permissions: 0o700,
            mtime: 5,
            ..Attr::default()
        });
        apply(&mut lower, upper, WhiteoutSpec::Oci).unwrap();
        assert_eq!(lower.inode(lower.root()).attr.permissions, 0o700);
    }
}
