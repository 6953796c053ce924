//! Images whose chunks a build refers to instead of storing them again: a chunk
//! dictionary, and the parent that a layer is built on.
//!
//! Only bootstraps are read, never blobs. Rules: `docs/format.md`, "Chunk dictionaries".

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, bail};
use rafs::tree::ChunkRecord;
use rafs::{Image, Tree};
use storage::{BlobId, BlobIndex, BlobInfo, Digest, Digester};

/// A bootstrap with known chunks.
#[derive(Debug)]
pub struct Reused {
    /// Where it was read from.
    pub path: PathBuf,
    /// The image.
    pub image: Image,
}

/// What two bootstraps, or a bootstrap and a build, must have in common to be used
/// together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Traits {
    /// How chunks are compressed.
    pub compressor: storage::Compressor,
    /// How chunks are identified.
    pub digester: Digester,
    /// Largest chunk in bytes.
    pub chunk_size: u32,
    /// Whether owners are stored.
    pub owners: bool,
}

impl Traits {
    /// Those of a bootstrap.
    #[must_use]
    pub fn of(image: &Image) -> Self {
        Self {
            compressor: image.compressor(),
            digester: image.digester(),
            chunk_size: image.chunk_size(),
            owners: image.has_explicit_owners(),
        }
    }

    /// The first difference: what it is about, then the values of both.
    #[must_use]
    pub fn difference(&self, other: &Self) -> Option<(&'static str, String, String)> {
        let owners = |stored: bool| if stored { "stored" } else { "not stored" }.to_owned();
        let pairs = [
            (
                "compressor",
                self.compressor.to_string(),
                other.compressor.to_string(),
            ),
            (
                "digester",
                self.digester.to_string(),
                other.digester.to_string(),
            ),
            ("owners", owners(self.owners), owners(other.owners)),
            (
                "chunk size",
                self.chunk_size.to_string(),
                other.chunk_size.to_string(),
            ),
        ];
        pairs.into_iter().find(|(_, one, two)| one != two)
    }
}

impl Reused {
    /// Reads the bootstrap that the value of `--chunk-dict` names.
    ///
    /// # Errors
    /// The value or the bootstrap is not valid.
    pub fn dictionary(value: &str) -> anyhow::Result<Self> {
        let path = match value.split_once('=') {
            Some(("bootstrap", path)) => path,
            Some((kind, _)) => {
                bail!("--chunk-dict: `{kind}` is not a known kind; use bootstrap=<path>")
            }
            None => value,
        };
        Self::open(Path::new(path)).context("cannot use --chunk-dict")
    }

    /// Reads a bootstrap. A blob whose id the bootstrap could not know is named as
    /// the file is, up to its first dot.
    ///
    /// # Errors
    /// It is not valid.
    pub fn open(path: &Path) -> anyhow::Result<Self> {
        let mut image = Image::open(path)
            .with_context(|| format!("cannot load the bootstrap {}", path.display()))?;
        let placeholder = BlobId::placeholder();
        if let Some(at) = image.blobs().iter().position(|blob| blob.id == placeholder) {
            let id = id_from_name(path)?;
            image.set_blob_id(BlobIndex::new(u32::try_from(at)?), id);
        }
        Ok(Self {
            path: path.to_owned(),
            image,
        })
    }

    /// Refuses an image that was built otherwise than the layer at hand is.
    ///
    /// # Errors
    /// Names the first difference.
    pub fn check(&self, build: &Traits) -> anyhow::Result<()> {
        match Traits::of(&self.image).difference(build) {
            Some((what, theirs, ours)) => bail!(
                "{} cannot be used for this build: its {what} is {theirs}, but {ours} here",
                self.path.display()
            ),
            None => Ok(()),
        }
    }

    /// All of its files.
    ///
    /// # Errors
    /// The bootstrap is damaged.
    pub fn tree(&self) -> anyhow::Result<Tree> {
        Tree::from_image(&self.image)
            .with_context(|| format!("cannot load the bootstrap {}", self.path.display()))
    }
}

/// The name of a file up to its first dot, as the id of a blob.
///
/// # Errors
/// That is no id.
pub fn id_from_name(path: &Path) -> anyhow::Result<BlobId> {
    let name = path
        .file_name()
        .map(|name| name.to_string_lossy())
        .unwrap_or_default();
    let stem = name.split('.').next().unwrap_or_default();
    BlobId::new(stem).with_context(|| {
        format!(
            "{} gives no blob id; name the file by its blob or use --original-blob-ids",
            path.display()
        )
    })
}

/// Chunks by content. Takes about 150 bytes a chunk.
#[derive(Clone, Debug, Default)]
pub struct Known {
    chunks: HashMap<Digest, KnownChunk>,
    blobs: Vec<BlobInfo>,
}

/// A chunk of another image.
#[derive(Clone, Debug)]
pub struct KnownChunk {
    /// Its record, as that image has it.
    pub(crate) record: ChunkRecord,
    /// Position of its blob in [`Known`].
    blob: usize,
}

impl Known {
    /// Adds the chunks of an image. Of equal chunks, the one that came first counts.
    ///
    /// * `digester`: of the build. Blobs with other digests are left out.
    ///
    /// # Errors
    /// The chunk table is damaged.
    pub fn add(&mut self, reused: &Reused, digester: Digester) -> anyhow::Result<()> {
        let image = &reused.image;
        let first = self.blobs.len();
        self.blobs.extend_from_slice(image.blobs());
        for position in 0..image.chunk_record_count() {
            let record = image
                .chunk_record(position)
                .with_context(|| format!("cannot load the bootstrap {}", reused.path.display()))?;
            let blob = first + record.blob.as_usize();
            if self.blobs[blob].digester == digester {
                self.chunks
                    .entry(record.digest)
                    .or_insert(KnownChunk { record, blob });
            }
        }
        Ok(())
    }

    /// The chunk with this content.
    pub(crate) fn find(&self, digest: &Digest, len: u32) -> Option<&KnownChunk> {
        let known = self.chunks.get(digest)?;
        (known.record.uncompressed_size == len).then_some(known)
    }

    /// The blob of a chunk.
    pub(crate) fn blob(&self, chunk: &KnownChunk) -> &BlobInfo {
        &self.blobs[chunk.blob]
    }

    /// The blob with this id.
    pub(crate) fn blob_with_id(&self, id: &BlobId) -> Option<&BlobInfo> {
        self.blobs.iter().find(|blob| blob.id == *id)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_come_from_file_names() {
        let id = |path: &str| id_from_name(Path::new(path)).map(|id| id.to_string());
        assert_eq!(id("dir.d/abc.x.y").unwrap(), "abc");
        assert_eq!(id("boot1").unwrap(), "boot1");
        assert!(id("dir/.hidden").is_err());
        assert!(id("a b").is_err());
    }

    #[test]
    fn differences_are_named() {
        let one = Traits {
            compressor: storage::Compressor::Zstd,
            digester: Digester::Blake3,
            chunk_size: 0x10_0000,
            owners: true,
        };
        assert_eq!(one.difference(&one), None);
        let other = Traits {
            owners: false,
            ..one
        };
        let (what, ..) = one.difference(&other).unwrap();
        assert_eq!(what, "owners");
    }

    #[test]
    fn other_kinds_of_dictionaries_are_refused() {
        let error = Reused::dictionary("database=x").unwrap_err().to_string();
        assert!(error.contains("`database` is not a known kind"), "{error}");
    }
}
