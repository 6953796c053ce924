//! What a container reads when it starts: the files that the image, or a list, names,
//! what the C library reads for every program, and the program itself.

use std::collections::BTreeSet;
use std::ops::Range;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, ensure};
use rafs::paths::{USUAL, find};
use rafs::{FileKind, Image, Nid};
use serde::Deserialize;
use storage::{BlobIndex, ChunkIndex};

use crate::listing::entries;

/// Bytes of a file that nobody has named.
const MAX_GUESS: u64 = 16 << 20;
/// Bytes of a list of files.
const MAX_LIST: u64 = 64 << 20;
/// Where programs are looked for if the configuration does not say.
const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// Chunks that are wanted.
pub(super) type Chunks = BTreeSet<(BlobIndex, ChunkIndex)>;

/// Reads a list of absolute paths, one a line, as `nydusd mount --record-files` writes it.
pub(super) fn read_list(path: &Path) -> anyhow::Result<Vec<PathBuf>> {
    let read = || -> anyhow::Result<String> {
        let size = std::fs::metadata(path)?.len();
        ensure!(size <= MAX_LIST, "it has more than {MAX_LIST} bytes");
        Ok(std::fs::read_to_string(path)?)
    };
    let text = read().with_context(|| format!("cannot read the list {}", path.display()))?;
    let mut files = Vec::new();
    for (number, line) in (1..).zip(text.lines().map(str::trim)) {
        if line.is_empty() {
            continue;
        }
        ensure!(
            line.starts_with('/'),
            "{}, line {number}: `{line}` is no absolute path",
            path.display()
        );
        files.push(PathBuf::from(line));
    }
    Ok(files)
}

/// The hot chunks of an image.
///
/// * `config`: the configuration of the image, for the program that it starts.
/// * `list`: files and directories that somebody named.
pub(super) fn chunks(
    image: &Image,
    config: &[u8],
    list: &[PathBuf],
) -> Result<Chunks, rafs::Error> {
    let mut hot = Hot {
        image,
        chunks: Chunks::new(),
        seen: BTreeSet::new(),
    };
    for nid in image.prefetch() {
        hot.add_tree(nid)?;
    }
    let mut unknown = 0;
    for path in list {
        match find(image, path) {
            Some(nid) => hot.add_tree(nid)?,
            None => unknown += 1,
        }
    }
    if unknown > 0 {
        let count = list.len();
        tracing::warn!("{unknown} of the {count} files of the list are not in the image");
    }
    let program = program(image, config);
    let guesses = USUAL.iter().filter_map(|path| find(image, Path::new(path)));
    for nid in guesses.chain(program) {
        if image.inode(nid)?.kind() == FileKind::File {
            hot.add(nid, 0..MAX_GUESS)?;
        }
    }
    Ok(hot.chunks)
}

struct Hot<'a> {
    image: &'a Image,
    chunks: Chunks,
    /// Files and directories that were added whole: lists repeat themselves.
    seen: BTreeSet<Nid>,
}

impl Hot<'_> {
    /// Adds a file, or everything below a directory.
    fn add_tree(&mut self, nid: Nid) -> Result<(), rafs::Error> {
        let mut pending = vec![nid];
        while let Some(nid) = pending.pop() {
            if !self.seen.insert(nid) {
                continue;
            }
            match self.image.inode(nid)?.kind() {
                FileKind::File => self.add(nid, 0..u64::MAX)?,
                FileKind::Directory => {
                    let below = entries(self.image, nid)?;
                    pending.extend(below.into_iter().map(|(_, nid)| nid));
                }
                _ => {}
            }
        }
        Ok(())
    }

    fn add(&mut self, nid: Nid, range: Range<u64>) -> Result<(), rafs::Error> {
        for extent in self.image.extents(nid, range) {
            let extent = extent?;
            self.chunks.insert((extent.blob, extent.chunk));
        }
        Ok(())
    }
}

/// What of an image's configuration says which program starts.
#[derive(Debug, Default, Deserialize)]
#[serde(default, rename_all = "PascalCase")]
struct Start {
    entrypoint: Option<Vec<String>>,
    cmd: Option<Vec<String>>,
    env: Option<Vec<String>>,
    working_dir: Option<String>,
}

/// The file of the program that a container starts, if the image has it.
fn program(image: &Image, config: &[u8]) -> Option<Nid> {
    #[derive(Deserialize)]
    struct Config {
        config: Option<Start>,
    }
    // Not what a Nydus image is made of: one without a program is fine.
    let config: Config = serde_json::from_slice(config).ok()?;
    let start = config.config?;
    let words = [start.entrypoint, start.cmd];
    let word = words.into_iter().flatten().flatten().next()?;
    let root = Path::new("/");
    if word.contains('/') {
        let directory = root.join(start.working_dir.unwrap_or_default());
        return find(image, &directory.join(word));
    }
    let env = start.env.unwrap_or_default();
    let path = env.iter().find_map(|entry| entry.strip_prefix("PATH="));
    let mut places = path.unwrap_or(PATH).split(':');
    places.find_map(|place| find(image, &root.join(place).join(&word)))
}
