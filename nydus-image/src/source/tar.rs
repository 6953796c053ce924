//! A layer from a tar stream, in one pass: entries become the tree while their
//! data goes into the pipeline.
//!
//! The archive is untrusted. Names are taken literally below the root: a leading
//! `/` and `.` components are dropped, `..` is refused, and a symbolic link is
//! never followed, neither in names nor in targets of hard links. A later entry
//! replaces an earlier one of the same name; a directory keeps its children.
//! Whiteouts stay what they are in the archive: files with special names.

use std::io::Read;

use rafs::tree::{Attr, Content, Inode, InodeId, Tree};
use rafs::units::MAX_DEPTH;

use self::entries::{Archive, Entry, Kind};
use super::{InPlace, Scanned, SourceError, printable, xattr_problem};
use crate::pipeline::feeder::{FeedError, Feeder};
use crate::pipeline::item;

mod entries;
mod header;
mod pax;
mod sparse;

pub use entries::{Cause, TarError};

/// Longest target of a symbolic link, in bytes.
pub(super) const MAX_TARGET: usize = 4095;

/// What directories get that the archive implies but does not contain.
const IMPLIED_DIRECTORY: Attr = Attr {
    permissions: 0o755,
    uid: 0,
    gid: 0,
    mtime: 0,
    mtime_nsec: 0,
};

/// Reads the archive to its end.
///
/// * `in_place`: what `reader` reads from, if chunks stay there.
pub(super) fn scan(
    name: String,
    reader: impl Read,
    in_place: Option<&InPlace>,
    feeder: &mut Feeder,
) -> Result<Scanned, SourceError> {
    let mut archive = Archive::new(name, reader);
    let mut builder = Builder {
        in_place,
        tree: implied_root(),
        files: Vec::new(),
    };
    while let Some(entry) = archive.next_entry()? {
        builder.add(&mut archive, entry, feeder)?;
    }
    archive.drain()?;
    Ok(Scanned {
        tree: builder.tree,
        files: builder.files,
        original: None,
    })
}

struct Builder<'a> {
    in_place: Option<&'a InPlace>,
    tree: Tree,
    files: Vec<(InodeId, u64)>,
}

impl Builder<'_> {
    fn add<R: Read>(
        &mut self,
        archive: &mut Archive<R>,
        mut entry: Entry,
        feeder: &mut Feeder,
    ) -> Result<(), SourceError> {
        let path = std::mem::take(&mut entry.path);
        let result = self.add_at(&path, archive, &mut entry, feeder);
        entry.path = path;
        result.map_err(|problem| match problem {
            Problem::Refused(what) => archive.refuse(&entry, what).into(),
            Problem::NotInPlace(what) => archive.not_in_place(&entry, what).into(),
            Problem::Source(error) => error,
        })
    }

    fn add_at<R: Read>(
        &mut self,
        path: &[u8],
        archive: &mut Archive<R>,
        entry: &mut Entry,
        feeder: &mut Feeder,
    ) -> Result<(), Problem> {
        for (key, value) in &entry.xattrs {
            if let Some(problem) = xattr_problem(key, value) {
                return Err(Problem::Refused(problem));
            }
        }
        let Some((name, parents)) = split(path)? else {
            return self.set_root(entry);
        };
        let dir = self.parent(&parents)?;
        match entry.kind {
            Kind::Directory => self.directory(dir, name, entry),
            Kind::HardLink => self.hard_link(dir, name, entry),
            Kind::File => self.file(dir, name, entry, archive, feeder),
            Kind::Symlink => {
                let target = &entry.link;
                if target.is_empty() || target.len() > MAX_TARGET || target.contains(&0) {
                    return refused("a symbolic link has a target of 1 to 4095 bytes without NUL");
                }
                self.place(dir, name, entry, Content::Symlink(target.as_slice().into()))
            }
            Kind::CharDevice => self.place(dir, name, entry, Content::CharDevice(entry.device)),
            Kind::BlockDevice => self.place(dir, name, entry, Content::BlockDevice(entry.device)),
            Kind::Fifo => self.place(dir, name, entry, Content::Fifo),
        }
    }

    fn set_root(&mut self, entry: &mut Entry) -> Result<(), Problem> {
        if entry.kind != Kind::Directory {
            return refused("the root can only be a directory");
        }
        let root = self.tree.root();
        self.set_attributes(root, entry);
        Ok(())
    }

    /// The directory that a name belongs to, created if it does not exist.
    fn parent(&mut self, parents: &[&[u8]]) -> Result<InodeId, Problem> {
        let mut dir = self.tree.root();
        for name in parents {
            dir = match self.tree.entry(dir, name) {
                Some(id) if self.tree.inode(id).entries().is_some() => id,
                Some(_) => {
                    return refused(format!(
                        "its parent {} is an earlier entry that is no directory, and links are not followed",
                        printable(name)
                    ));
                }
                None => {
                    let inode = Inode::implied_directory(IMPLIED_DIRECTORY);
                    self.tree
                        .insert(dir, name, inode)
                        .map_err(Problem::refuse)?
                }
            };
        }
        Ok(dir)
    }

    fn directory(&mut self, dir: InodeId, name: &[u8], entry: &mut Entry) -> Result<(), Problem> {
        match self.tree.entry(dir, name) {
            Some(id) if self.tree.inode(id).entries().is_some() => {
                self.set_attributes(id, entry);
                Ok(())
            }
            _ => self.place(dir, name, entry, Content::directory()),
        }
    }

    fn hard_link(&mut self, dir: InodeId, name: &[u8], entry: &Entry) -> Result<(), Problem> {
        let target = split(&entry.link)?.and_then(|(last, parents)| {
            let mut names = parents.iter().chain(std::iter::once(&last));
            names.try_fold(self.tree.root(), |dir, name| self.tree.entry(dir, name))
        });
        let Some(target) = target else {
            let target = printable(&entry.link);
            return refused(format!(
                "a hard link to {target}, which is not in the archive before it"
            ));
        };
        let id = match &self.tree.inode(target).content {
            Content::Directory(_) => return refused("a hard link to a directory"),
            Content::File { .. } => target,
            // The format links regular files only; a copy is the same to every reader.
            _ => {
                let copy = self.tree.inode(target).clone();
                self.tree.add_inode(copy)
            }
        };
        self.tree.link(dir, name, id).map_err(Problem::refuse)?;
        Ok(())
    }

    fn file<R: Read>(
        &mut self,
        dir: InodeId,
        name: &[u8],
        entry: &mut Entry,
        archive: &mut Archive<R>,
        feeder: &mut Feeder,
    ) -> Result<(), Problem> {
        let content = Content::File {
            size: entry.size,
            chunks: Vec::new(),
        };
        let id = self.insert(dir, name, entry, content)?;
        let chunks = match self.in_place {
            None => feeder.file(entry.size, &entry.data, |_, buf| archive.read_data(buf)),
            Some(_)
                if entry
                    .data
                    .iter()
                    .map(|range| range.end - range.start)
                    .sum::<u64>()
                    < entry.size =>
            {
                // The format knows no holes, and what lies between them is not one piece.
                let what = "a file with holes cannot be used in place; convert the layer instead";
                return Err(Problem::NotInPlace(what.to_owned()));
            }
            Some(layer) => feeder.file_in_place(entry.size, |buf| archive.read_chunk(layer, buf)),
        };
        match chunks {
            Ok(0) => Ok(()),
            Ok(chunks) => {
                self.files.push((id, chunks));
                Ok(())
            }
            Err(FeedError::Source(error)) => Err(Problem::Source(error.into())),
            Err(FeedError::Stopped) => Err(Problem::Source(SourceError::Stopped)),
            Err(error @ FeedError::TooLarge { .. }) => refused(error.to_string()),
        }
    }

    fn place(
        &mut self,
        dir: InodeId,
        name: &[u8],
        entry: &mut Entry,
        content: Content,
    ) -> Result<(), Problem> {
        self.insert(dir, name, entry, content).map(|_| ())
    }

    fn insert(
        &mut self,
        dir: InodeId,
        name: &[u8],
        entry: &mut Entry,
        content: Content,
    ) -> Result<InodeId, Problem> {
        let xattrs = std::mem::take(&mut entry.xattrs);
        let inode = Inode {
            attr: entry.attr,
            xattrs,
            content,
            implied: false,
        };
        self.tree.insert(dir, name, inode).map_err(Problem::refuse)
    }

    fn set_attributes(&mut self, id: InodeId, entry: &mut Entry) {
        let inode = self.tree.inode_mut(id);
        inode.attr = entry.attr;
        inode.xattrs = std::mem::take(&mut entry.xattrs);
        inode.implied = false;
    }
}

/// A tree whose root no entry has described yet.
fn implied_root() -> Tree {
    let mut tree = Tree::new(IMPLIED_DIRECTORY);
    tree.inode_mut(tree.root()).implied = true;
    tree
}

/// Why an entry cannot be taken.
enum Problem {
    /// The entry itself is the reason.
    Refused(String),
    /// The entry is fine, but has to be stored anew.
    NotInPlace(String),
    Source(SourceError),
}

impl Problem {
    fn refuse(error: impl std::fmt::Display) -> Self {
        Self::Refused(error.to_string())
    }
}

fn refused<T>(what: impl Into<String>) -> Result<T, Problem> {
    Err(Problem::Refused(what.into()))
}

/// The last name of a path and the names before it.
type Split<'a> = (&'a [u8], Vec<&'a [u8]>);

/// Splits a path into its last name and the names before it; `None` for the root.
fn split(path: &[u8]) -> Result<Option<Split<'_>>, Problem> {
    let mut names: Vec<_> = path
        .split(|byte| *byte == b'/')
        .filter(|name| !name.is_empty() && *name != b".")
        .collect();
    if names.iter().any(|name| *name == b"..") {
        return refused(format!("{} leaves the image by `..`", printable(path)));
    }
    if names.len() > item::len(MAX_DEPTH) {
        return refused("it is too many directories deep");
    }
    Ok(names.pop().map(|last| (last, names)))
}
