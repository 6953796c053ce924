//! Opens images and lays blobs out in their uncompressed address space, with the
//! libraries alone: no cache, no daemon, every chunk verified.
//!
//! [`open`] takes a bootstrap or a blob with an inlined one. [`Blob::expand`]
//! writes what the kernel wants as a `device=` of that blob: each chunk at its
//! 4 KiB-aligned offset, zeros between (`docs/format.md`, "Mounting with the
//! kernel"). For test images that fit in memory.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, Result, bail, ensure};
use rafs::Image;
use rafs::image::BlobDigests;
use storage::chunk::Encoding;
use storage::codec::{decompress_into, zran};
use storage::digest::ChunkDigests;
use storage::format::chunk_table::ChunkTable;
use storage::format::toc::{self, Tail};
use storage::format::{stored_table, tar_header};
use storage::{BlobFeatures, BlobId, BlobIndex, BlobInfo, ChunkIndex, Digest};

/// Opens the bootstrap at `path`, or the one inlined in the blob at `path`; in
/// that case the blob's real name takes the place of the placeholder.
///
/// # Errors
/// It is neither, or damaged.
pub fn open(path: &Path) -> Result<Arc<Image>> {
    if let Ok(image) = Image::open(path) {
        return Ok(Arc::new(image));
    }
    let bytes = std::fs::read(path).with_context(|| path.display().to_string())?;
    let mut image = Image::from_bytes(inlined(&bytes)?)?;
    let name = path
        .file_name()
        .and_then(|n| n.to_str())
        .unwrap_or_default();
    let id = BlobId::new(name)?;
    for (index, info) in (0..).map(BlobIndex::new).zip(image.blobs().to_vec()) {
        if info.id.is_placeholder() {
            image.set_blob_id(index, id.clone());
        } else if info.features.contains(BlobFeatures::SEPARATE) {
            image.set_meta_blob_digest(index, parse_digest(name)?);
        }
    }
    Ok(Arc::new(image))
}

/// The bootstrap inside a blob file.
fn inlined(file: &[u8]) -> Result<Vec<u8>> {
    let len = u64::try_from(file.len())?;
    let tail = file.len() - usize::try_from(toc::tail_size(len))?;
    match toc::locate(&file[tail..])? {
        Tail::Bootstrap { size } => {
            let end = file.len() - tar_header::SIZE;
            let start = end
                .checked_sub(usize::try_from(size)?)
                .context("short file")?;
            Ok(file[start..end].to_vec())
        }
        Tail::Toc(toc) => {
            let entry = toc
                .entry("image.boot")
                .context("no bootstrap in the blob")?;
            let start = usize::try_from(entry.offset)?;
            let end = start + usize::try_from(entry.stored_size)?;
            let stored = file.get(start..end).context("short file")?;
            Ok(entry.extract(stored, 1 << 30)?)
        }
    }
}

fn parse_digest(hex: &str) -> Result<Digest> {
    ensure!(hex.len() == 64, "{hex} is no SHA-256");
    let mut bytes = [0; 32];
    for (at, byte) in bytes.iter_mut().enumerate() {
        *byte = u8::from_str_radix(&hex[2 * at..2 * at + 2], 16)?;
    }
    Ok(Digest::from_bytes(bytes))
}

/// One blob of an image, in a directory of blobs.
#[derive(Debug)]
pub struct Blob {
    info: BlobInfo,
    table: ChunkTable,
    data: File,
    digests: BlobDigests,
}

impl Blob {
    /// Opens blob `index` of `image`: its data, and its chunk table wherever it is.
    ///
    /// # Errors
    /// A file is missing, or the chunk table is not valid.
    pub fn open(image: &Arc<Image>, index: BlobIndex, dir: &Path) -> Result<Self> {
        let info = image
            .blobs()
            .get(index.as_usize())
            .context("no such blob")?
            .clone();
        let open = |name: &str| File::open(dir.join(name)).with_context(|| format!("blob {name}"));
        let data = open(info.id.as_str())?;
        let meta = if info.features.contains(BlobFeatures::SEPARATE) {
            open(&info.meta_blob_digest.to_string())?
        } else {
            data.try_clone()?
        };
        let range = stored_table::stored_range(&info)?;
        let stored = read(
            &meta,
            range.start,
            usize::try_from(range.end - range.start)?,
        )?;
        let table = stored_table::open(&info, &stored).context("chunk table")?;
        let digests = image.digests(index);
        Ok(Self {
            info,
            table,
            data,
            digests,
        })
    }

    /// The row of the blob table.
    #[must_use]
    pub fn info(&self) -> &BlobInfo {
        &self.info
    }

    /// Where chunk `index` starts in the uncompressed address space.
    ///
    /// # Errors
    /// There is no such chunk, or its entry is not valid.
    pub fn plain_offset(&self, index: ChunkIndex) -> Result<u64> {
        Ok(self.table.chunk(index)?.plain_offset)
    }

    /// The whole uncompressed address space, every chunk checked against its
    /// digest (where the image has one for it) and its CRC.
    ///
    /// # Errors
    /// The first chunk that cannot be read or is not what the image says.
    pub fn plain(&self) -> Result<Vec<u8>> {
        let mut space = vec![0; usize::try_from(self.info.uncompressed_size)?];
        for index in 0..self.table.len() {
            let bytes = self
                .chunk(ChunkIndex::new(index))
                .with_context(|| format!("chunk {index}"))?;
            let at = usize::try_from(self.table.chunk(ChunkIndex::new(index))?.plain_offset)?;
            space[at..at + bytes.len()].copy_from_slice(&bytes);
        }
        Ok(space)
    }

    /// Writes [`Blob::plain`] to a new file at `to`.
    ///
    /// # Errors
    /// As for [`Blob::plain`]; or the file cannot be written.
    pub fn expand(&self, to: &Path) -> Result<()> {
        std::fs::write(to, self.plain()?).with_context(|| to.display().to_string())
    }

    fn chunk(&self, index: ChunkIndex) -> Result<Vec<u8>> {
        let chunk = self.table.chunk(index)?;
        let size = usize::try_from(chunk.plain_size)?;
        let bytes = match chunk.encoding {
            Encoding::Raw { offset } => read(&self.data, offset, size)?,
            Encoding::Compressed {
                offset,
                size: stored,
            } => {
                let mut plain = vec![0; size];
                let stored = read(&self.data, offset, usize::try_from(stored)?)?;
                decompress_into(self.info.compressor, &stored, &mut plain)?;
                plain
            }
            Encoding::Batch {
                offset,
                context,
                within,
            } => cut(&self.batch(offset, context)?, within, size)?,
            Encoding::Zran { context, within } => {
                let context = self.table.zran_context(context)?;
                let range = context.input.clone();
                let input = read(
                    &self.data,
                    range.start,
                    usize::try_from(range.end - range.start)?,
                )?;
                let mut output = vec![0; usize::try_from(within)? + size];
                zran::decode(&context, &input, &mut output)?;
                cut(&output, within, size)?
            }
        };
        if let Some(digest) = self.digests.chunk_digest(index) {
            ensure!(
                Digest::of(self.info.digester, &bytes) == digest,
                "wrong digest"
            );
        }
        if let Some(crc) = chunk.crc32c {
            ensure!(crc32c::crc32c(&bytes) == crc, "wrong CRC");
        }
        Ok(bytes)
    }

    fn batch(&self, offset: u64, context: u32) -> Result<Vec<u8>> {
        let batch = self.table.batch_context(context)?;
        let stored = read(&self.data, offset, usize::try_from(batch.compressed_size)?)?;
        if batch.is_raw() {
            return Ok(stored);
        }
        let mut plain = vec![0; usize::try_from(batch.uncompressed_size)?];
        decompress_into(self.info.compressor, &stored, &mut plain)?;
        Ok(plain)
    }
}

fn cut(unit: &[u8], within: u32, size: usize) -> Result<Vec<u8>> {
    let start = usize::try_from(within)?;
    match unit.get(start..start + size) {
        Some(bytes) => Ok(bytes.to_vec()),
        None => bail!("a chunk leaves its unit of {} bytes", unit.len()),
    }
}

fn read(file: &File, offset: u64, len: usize) -> Result<Vec<u8>> {
    let mut bytes = vec![0; len];
    file.read_exact_at(&mut bytes, offset)
        .with_context(|| format!("read {len} bytes at {offset}"))?;
    Ok(bytes)
}
