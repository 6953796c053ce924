//! Which files are wanted first when an image starts.
//!
//! A pattern is an absolute path: of a file, or of a directory with everything
//! below it. The `fs` policy lists them in the bootstrap; with any policy a
//! directory build puts their data at the start of the blob.

use std::io::BufRead;

use clap::ValueEnum;
use rafs::tree::{InodeId, Tree};

/// What to do with prefetch patterns.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum Policy {
    /// List the patterns in the bootstrap, for the daemon to read at mount
    Fs,
    /// Only put the data of matching files at the start of the blob
    Blob,
    /// Prefetch nothing; standard input is not read
    #[default]
    None,
}

/// A policy with its patterns.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Prefetch {
    policy: Policy,
    /// Absolute paths without trailing `/`; none is below an earlier one.
    patterns: Vec<Vec<u8>>,
}

impl Prefetch {
    /// Reads patterns, one a line, if the policy needs any. Lines that are no
    /// absolute path are warned about and skipped.
    ///
    /// # Errors
    /// Reading failed.
    pub fn read(policy: Policy, input: impl BufRead) -> std::io::Result<Self> {
        let mut patterns: Vec<Vec<u8>> = Vec::new();
        if policy != Policy::None {
            for line in input.split(b'\n') {
                let line = line?;
                let line = line.trim_ascii();
                if !line.starts_with(b"/") {
                    tracing::warn!(
                        "prefetch pattern \"{}\" is no absolute path; skipped",
                        line.escape_ascii()
                    );
                    continue;
                }
                let end = line
                    .iter()
                    .rposition(|byte| *byte != b'/')
                    .map_or(0, |last| last + 1);
                let pattern = &line[..end];
                if !patterns.iter().any(|earlier| is_below(pattern, earlier)) {
                    patterns.push(pattern.to_vec());
                }
            }
        }
        Ok(Self { policy, patterns })
    }

    /// The inodes to list in the bootstrap: those that a pattern names exactly.
    #[must_use]
    pub fn table(&self, tree: &Tree) -> Vec<InodeId> {
        if self.policy != Policy::Fs {
            return Vec::new();
        }
        self.patterns
            .iter()
            .filter_map(|pattern| tree.lookup(pattern))
            .collect()
    }

    /// Everything that a pattern selects, with its path, in the order of the patterns.
    pub(crate) fn first_in_blob<'a>(
        &'a self,
        tree: &'a Tree,
    ) -> impl Iterator<Item = (Vec<u8>, InodeId)> + 'a {
        self.patterns.iter().flat_map(move |pattern| {
            let selected = tree.walk().filter(|entry| is_below(&entry.path, pattern));
            selected.map(|entry| (entry.path, entry.id))
        })
    }
}

/// Whether `path` is `dir` or below it. The empty path is the root.
fn is_below(path: &[u8], dir: &[u8]) -> bool {
    path.strip_prefix(dir)
        .is_some_and(|rest| rest.is_empty() || rest.starts_with(b"/"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use rafs::tree::{Attr, Content, Inode};

    fn read(text: &str) -> Vec<String> {
        let prefetch = Prefetch::read(Policy::Fs, text.as_bytes()).unwrap();
        prefetch
            .patterns
            .into_iter()
            .map(|p| String::from_utf8(p).unwrap())
            .collect()
    }

    #[test]
    fn lines_that_select_nothing_new_are_dropped() {
        assert_eq!(
            read("/usr\n  /usr/bin \n\nrelative\n/usrlocal\n/a/\n"),
            ["/usr", "/usrlocal", "/a"]
        );
        assert_eq!(read("/\n/x\n"), [""]);
        assert_eq!(read(""), [""; 0]);
    }

    #[test]
    fn nothing_is_read_without_a_policy() {
        let prefetch = Prefetch::read(Policy::None, "/a".as_bytes()).unwrap();
        assert_eq!(prefetch, Prefetch::default());
    }

    #[test]
    fn the_table_has_exact_matches_only() {
        let mut tree = Tree::new(Attr::default());
        let dir = tree.mkdir_all(b"/a", Attr::default()).unwrap();
        let file = tree
            .insert(dir, b"f", Inode::new(Attr::default(), Content::Fifo))
            .unwrap();
        let prefetch = Prefetch::read(Policy::Fs, "/a/f\n/b\n/a".as_bytes()).unwrap();
        assert_eq!(prefetch.table(&tree), [file, dir]);
        let first: Vec<_> = prefetch
            .first_in_blob(&tree)
            .map(|(path, _)| path)
            .collect();
        assert_eq!(first, [b"/a/f".to_vec(), b"/a".to_vec(), b"/a/f".to_vec()]);
    }
}
