//! The list of files that a workload reads, in the order of their first reads: what
//! `--prefetch-files` and `nydus-image convert --prefetch-patterns` take.
//!
//! Every path is written when its file is first read, so the list is complete whenever
//! somebody looks. Costs memory for the names of all files of the image: meant for a
//! run that is made in order to have the list.

use std::collections::{HashMap, HashSet};
use std::fs::File;
use std::io::Write as _;
use std::ops::ControlFlow;
use std::path::Path;
use std::sync::{Mutex, PoisonError};

use anyhow::Context as _;
use rafs::image::Image;
use rafs::units::{FileKind, Nid};

/// Writes the list.
#[derive(Debug)]
pub(crate) struct Recorder {
    /// Parent and name of every inode but the root.
    names: HashMap<Nid, (Nid, Vec<u8>)>,
    list: Mutex<List>,
}

#[derive(Debug)]
struct List {
    seen: HashSet<Nid>,
    file: File,
}

impl Recorder {
    /// Learns the names of `image`; the list goes to the new file `path`.
    ///
    /// # Errors
    /// The image is damaged, or the file cannot be created.
    pub(crate) fn new(image: &Image, path: &Path) -> anyhow::Result<Self> {
        let mut names = HashMap::new();
        let mut pending = vec![image.root()];
        while let Some(dir) = pending.pop() {
            image.readdir(dir, 0, |entry| {
                let is_new = entry.name != b"." && entry.name != b".." && {
                    let name = (dir, entry.name.to_vec());
                    names.insert(entry.nid, name).is_none()
                };
                if is_new && entry.kind == FileKind::Directory {
                    pending.push(entry.nid);
                }
                ControlFlow::Continue(())
            })?;
        }
        let file = File::create(path)
            .with_context(|| format!("cannot create --record-files {}", path.display()))?;
        Ok(Self {
            names,
            list: Mutex::new(List {
                seen: HashSet::new(),
                file,
            }),
        })
    }

    /// Takes note that a file was read.
    pub(crate) fn note(&self, nid: Nid) {
        let mut list = self.list.lock().unwrap_or_else(PoisonError::into_inner);
        if !list.seen.insert(nid) {
            return;
        }
        let mut line = self.path(nid);
        line.push(b'\n');
        if let Err(error) = list.file.write_all(&line) {
            tracing::warn!("--record-files: {error}");
        }
    }

    /// The absolute path of a file; one of them if it has several.
    fn path(&self, nid: Nid) -> Vec<u8> {
        let mut names = Vec::new();
        let mut at = nid;
        // A directory has one parent, so this ends; the limit is for damaged images.
        while let Some((parent, name)) = self.names.get(&at)
            && names.len() < 4096
        {
            names.push(name.as_slice());
            at = *parent;
        }
        let mut path = Vec::new();
        for name in names.iter().rev() {
            path.push(b'/');
            path.extend_from_slice(name);
        }
        path
    }
}
