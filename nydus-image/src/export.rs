//! `export`: an image as one disk image that the kernel mounts by itself.
//!
//! EROFS finds the data of device `i` at a block address of the same file if it is
//! mounted without other devices. So the disk is the bootstrap, and behind it the
//! uncompressed address space of every blob, each on a boundary of 512 KiB
//! (`docs/format.md`, "Device table"). Chunks of zeros, and what no file uses, stay
//! holes. With `--verity` a dm-verity hash tree follows.

use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context as _, bail};
use rafs::Image;
use rafs::format::blob::{DEVICE_TABLE_OFFSET, DeviceSlot};
use storage::backend::local::LocalBackend;
use storage::{BlobIndex, ChunkIndex};

use crate::access;
use crate::cli::UsageError;
use crate::data::{ImageData, Reader, Span};
use crate::ordered::{self, Closed, Jobs};
use crate::output::Output;

pub mod verity;

/// Where devices may start.
const DEVICE_ALIGNMENT: u64 = 512 << 10;

/// Bytes of a block of the file system.
const BLOCK: u64 = 4096;

/// Bytes of data that one job writes, about.
const JOB: u64 = 4 << 20;

/// Write an image as a disk that the kernel mounts
///
/// The disk holds the whole image, uncompressed. Mount it without any daemon:
///
///   nydus-image export --block --bootstrap image.boot --localfs-dir blobs --output image.disk
///   mount -t erofs -o loop,ro image.disk /mnt
///
/// With --verity, the options for veritysetup are printed:
///
///   veritysetup open image.disk NAME image.disk OPTIONS...
#[derive(Debug, clap::Args)]
#[command(verbatim_doc_comment)]
pub struct Args {
    /// Write a disk image; the only kind of export there is
    #[arg(long, required = true)]
    block: bool,

    /// Bootstrap of the image
    #[arg(
        short = 'B',
        long,
        value_name = "bootstrap",
        requires = "localfs_dir",
        required_unless_present = "config"
    )]
    bootstrap: Option<PathBuf>,

    /// Directory with the blobs, each in a file named by its id
    #[arg(
        short = 'D',
        long,
        value_name = "localfs-dir",
        requires = "bootstrap",
        conflicts_with = "config"
    )]
    localfs_dir: Option<PathBuf>,

    /// Description of a cached image; not supported, give --bootstrap and --localfs-dir
    #[arg(
        short = 'C',
        long,
        value_name = "config",
        conflicts_with = "bootstrap",
        hide = true
    )]
    config: Option<PathBuf>,

    /// Number of threads that decode and hash
    #[arg(long, value_name = "threads", default_value_t = 4, value_parser = clap::value_parser!(u16).range(1..=1024))]
    threads: u16,

    /// The disk to write [default: named by the last blob, in the directory of the blobs]
    #[arg(short = 'O', long, value_name = "output")]
    output: Option<PathBuf>,

    /// Append a dm-verity hash tree, and print what is needed to use it
    #[arg(long)]
    verity: bool,
}

/// Runs the command.
///
/// # Errors
/// The image is not valid, its data does not match, or the disk cannot be written.
pub fn run(args: &Args) -> anyhow::Result<()> {
    debug_assert!(args.block, "clap requires it");
    let (Some(path), Some(dir)) = (&args.bootstrap, &args.localfs_dir) else {
        bail!("--config is not supported; give --bootstrap and --localfs-dir");
    };
    let image = access::open_verified(path)?;
    let target = match &args.output {
        Some(target) => target.clone(),
        None => default_output(&image, dir)?,
    };
    let output = Output::create(&target)?;
    let Some(disk) = output.regular() else {
        let text = format!(
            "{} is no regular file, but the disk must be",
            target.display()
        );
        return Err(UsageError(text).into());
    };
    let threads = usize::from(args.threads);
    let size = write(&image, dir, threads, disk)
        .with_context(|| format!("cannot export {}", path.display()))?;
    let mut line = String::new();
    if args.verity {
        let tree = verity::append(disk, size, threads)
            .with_context(|| format!("cannot write the hash tree of {}", target.display()))?;
        line = format!("dm-verity options: {tree}\n");
    }
    output.commit("")?;
    // Only when the disk is in place: whoever reads the line opens it.
    crate::output::print(&line)
}

/// The names that image managers know: one for a layer, one for a whole image.
fn default_output(image: &Image, dir: &Path) -> anyhow::Result<PathBuf> {
    let Some(last) = image.blobs().last() else {
        bail!("the image has no blobs to name the disk by; give --output");
    };
    let kind = if image.blobs().len() == 1 {
        "layer"
    } else {
        "image"
    };
    Ok(dir.join(format!("{}.{kind}.disk", last.id)))
}

/// Writes the disk of `image`, whose blobs are in `dir`, to the empty file `disk`.
/// Returns its length in bytes, a multiple of 4096.
///
/// # Errors
/// As for [`run`].
pub fn write(image: &Arc<Image>, dir: &Path, threads: usize, disk: &File) -> anyhow::Result<u64> {
    let starts = device_starts(image);
    let end = match (starts.last(), image.blobs().last()) {
        (Some(start), Some(blob)) => start.saturating_add(blob.uncompressed_size),
        _ => len64(image.bytes().len()),
    };
    let size = end.next_multiple_of(BLOCK);
    disk.set_len(size)
        .context("cannot make the file as long as the disk")?;
    disk.write_all_at(&bootstrap(image, &starts)?, 0)
        .context("cannot write the bootstrap")?;
    let backend = LocalBackend::new(vec![dir.to_owned()]);
    let data = ImageData::new(Arc::clone(image), Arc::new(backend));
    ordered::run(
        threads,
        |jobs| {
            plan(image, &starts, jobs);
            Ok(())
        },
        || data.reader(),
        |reader, job: Job| job.run(reader, disk),
        |result: anyhow::Result<()>| result,
    )?;
    Ok(size)
}

fn len64(len: usize) -> u64 {
    u64::try_from(len).unwrap_or(u64::MAX)
}

/// Where every blob starts on the disk.
fn device_starts(image: &Image) -> Vec<u64> {
    let mut end = len64(image.bytes().len());
    let start = |blob: &storage::BlobInfo| {
        let start = end.next_multiple_of(DEVICE_ALIGNMENT);
        end = start.saturating_add(blob.uncompressed_size);
        start
    };
    image.blobs().iter().map(start).collect()
}

/// The bootstrap with these starts in its device table. Our own builder writes
/// them; others may have put the devices elsewhere.
fn bootstrap(image: &Image, starts: &[u64]) -> anyhow::Result<Vec<u8>> {
    let mut bytes = image.bytes().to_vec();
    let field = std::mem::offset_of!(DeviceSlot, mapped_block);
    let first = usize::try_from(DEVICE_TABLE_OFFSET)? + field;
    for (slot, start) in starts.iter().enumerate() {
        let block = u32::try_from(start / BLOCK)
            .context("a disk has at most 16 TiB, and this one would be larger")?;
        let at = first + slot * size_of::<DeviceSlot>();
        // The table was checked when the image was opened.
        if let Some(field) = bytes.get_mut(at..at + 4) {
            field.copy_from_slice(&block.to_le_bytes());
        }
    }
    Ok(bytes)
}

/// Chunks that are close together in their blob.
#[derive(Debug, Default)]
struct Job {
    spans: Vec<Span>,
    /// Where each goes on the disk.
    places: Vec<u64>,
    len: u64,
}

impl Job {
    fn run(self, reader: &mut Reader<'_>, disk: &File) -> anyhow::Result<()> {
        let mut result = Ok(());
        reader.read(&self.spans, |index, bytes| {
            // The file is made of holes already.
            if result.is_ok() && bytes.iter().any(|byte| *byte != 0) {
                result = disk.write_all_at(bytes, self.places[index]);
            }
        })?;
        result.context("cannot write the disk")
    }
}

/// Every chunk that a file uses, in the order of the blobs.
fn plan(image: &Image, starts: &[u64], jobs: &Jobs<Job, anyhow::Result<()>>) {
    let mut job = Job::default();
    for ((blob, info), start) in (0..).map(BlobIndex::new).zip(image.blobs()).zip(starts) {
        for chunk in (0..info.chunk_count).map(ChunkIndex::new) {
            let position = image.chunk_position(blob, chunk);
            let Some(Ok(record)) = position.map(|at| image.chunk_record(at)) else {
                continue;
            };
            let size = u64::from(record.uncompressed_size);
            job.spans.push(Span {
                blob,
                chunk,
                within: 0..size,
            });
            job.places.push(start + record.uncompressed_offset);
            job.len += size;
            if job.len >= JOB && jobs.send(std::mem::take(&mut job)) == Err(Closed) {
                return;
            }
        }
    }
    // Whoever closed the queue knows why.
    let _ = jobs.send(job);
}
