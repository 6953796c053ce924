//! `unpack`: an image, or a layer of one, back into a tar.
//!
//! One thread walks the names and writes headers, all processors read, decode and
//! verify the data, and the caller writes everything in order. Memory is bounded by
//! the number of processors, not by the size of files.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::Arc;

use anyhow::Context as _;
use rafs::{FileKind, Image, Nid};

use crate::access::{self, BlobArgs};
use crate::data::{ImageData, Span};
use crate::listing::{self, Name};
use crate::ordered::{self, Closed, Jobs};
use crate::output::Output;

pub mod tar;

/// Bytes of the archive that one job makes, about: enough to fetch many small
/// chunks with one request.
const JOB: u64 = 2 << 20;

/// Name of the entry that hides what a directory has in lower layers.
const OPAQUE: &[u8] = b".wh..wh..opq";

/// Turn an image back into a tar
///
/// The tar is uncompressed and unpacks to the same tree: hard links, extended
/// attributes, owners and times to the nanosecond. Whiteouts of a layer become
/// `.wh.` files. Every chunk is compared with its digest before it is written.
///
/// Examples:
///
///   nydus-image unpack --blob-dir blobs --output image.tar image.boot
///   nydus-image unpack --bootstrap image.boot --blob image.blob --output layer.tar
///   nydus-image unpack image.boot --output image.tar --backend-type registry \
///       --backend-config '{"host": "registry.example.com", "repo": "demo"}'
#[derive(Debug, clap::Args)]
#[command(verbatim_doc_comment)]
pub struct Args {
    /// Bootstrap of the image
    #[arg(value_name = "BOOTSTRAP", required_unless_present = "bootstrap")]
    positional: Option<PathBuf>,

    /// Bootstrap of the image (older form)
    #[arg(
        short = 'B',
        long,
        value_name = "bootstrap",
        conflicts_with = "positional"
    )]
    bootstrap: Option<PathBuf>,

    #[command(flatten)]
    blobs: BlobArgs,

    /// The tar to write: a file or a FIFO
    #[arg(long, value_name = "output", value_parser = clap::builder::NonEmptyStringValueParser::new())]
    output: String,
}

/// Runs the command.
///
/// # Errors
/// The image is not valid, its data cannot be had or does not match, or the output
/// cannot be written.
pub fn run(args: &Args) -> anyhow::Result<()> {
    let path = access::either(args.positional.as_ref(), args.bootstrap.as_ref())?;
    let image = access::open_verified(path)?;
    let data = ImageData::new(Arc::clone(&image), args.blobs.open(&image)?);
    let target = std::path::Path::new(&args.output);
    let mut output = Output::create(target)?;
    write(&image, &data, ordered::processors(), &mut output)
        .with_context(|| format!("cannot unpack {}", path.display()))?;
    output.commit("").map(|_| ())
}

/// Writes the tar of `image` to `out`, front to back.
///
/// * `image`: has passed [`Image::verify_tree`].
/// * `threads`: how many decode.
///
/// # Errors
/// What `out` got is useless then.
pub fn write(
    image: &Image,
    data: &ImageData,
    threads: usize,
    out: &mut (impl std::io::Write + Send),
) -> anyhow::Result<()> {
    ordered::run(
        threads,
        |jobs| plan(image, jobs),
        || data.reader(),
        |reader, job: Job| job.run(reader),
        |bytes: anyhow::Result<Vec<u8>>| out.write_all(&bytes?).context("cannot write the tar"),
    )?;
    out.flush().context("cannot write the tar")
}

/// A stretch of the archive.
#[derive(Debug, Default)]
struct Job {
    parts: Vec<Part>,
    /// Bytes that it makes.
    len: u64,
}

#[derive(Debug)]
enum Part {
    Bytes(Vec<u8>),
    Data(Span),
}

impl Job {
    fn run(self, reader: &mut crate::data::Reader<'_>) -> anyhow::Result<Vec<u8>> {
        let mut out = Vec::with_capacity(usize::try_from(self.len).unwrap_or_default());
        let mut spans = Vec::new();
        // For every span, the bytes that come before it; and those at the end.
        let mut before = vec![Vec::new()];
        for part in self.parts {
            match part {
                Part::Bytes(bytes) => before.last_mut().unwrap_or(&mut Vec::new()).extend(bytes),
                Part::Data(span) => {
                    spans.push(span);
                    before.push(Vec::new());
                }
            }
        }
        reader.read(&spans, |index, bytes| {
            out.extend_from_slice(&before[index]);
            out.extend_from_slice(bytes);
        })?;
        out.extend_from_slice(before.last().map_or(&[], Vec::as_slice));
        Ok(out)
    }
}

/// Makes the jobs of a whole archive.
fn plan(image: &Image, jobs: &Jobs<Job, anyhow::Result<Vec<u8>>>) -> anyhow::Result<()> {
    let mut planner = Planner {
        image,
        jobs,
        job: Job::default(),
        first_names: HashMap::new(),
    };
    match listing::walk(image, |name| planner.name(&name)) {
        Ok(()) => {}
        // The writer knows why.
        Err(Stop::Closed) => return Ok(()),
        Err(Stop::Failed(error)) => return Err(error),
    }
    planner.bytes(vec![0; tar::END]);
    planner.send().map_or_else(|Closed| Ok(()), Ok)
}

/// Why planning ended early.
enum Stop {
    Closed,
    Failed(anyhow::Error),
}

impl From<rafs::Error> for Stop {
    fn from(error: rafs::Error) -> Self {
        Self::Failed(error.into())
    }
}

impl From<anyhow::Error> for Stop {
    fn from(error: anyhow::Error) -> Self {
        Self::Failed(error)
    }
}

struct Planner<'a> {
    image: &'a Image,
    jobs: &'a Jobs<Job, anyhow::Result<Vec<u8>>>,
    job: Job,
    /// Where files with several names were met first.
    first_names: HashMap<Nid, Vec<u8>>,
}

impl Planner<'_> {
    fn name(&mut self, name: &Name) -> Result<(), Stop> {
        let inode = &name.inode;
        if inode.kind() == FileKind::Socket {
            tracing::warn!(
                "{} is a socket, which a tar cannot hold; skipped",
                name.path.escape_ascii()
            );
            return Ok(());
        }
        if inode.kind() == FileKind::CharDevice && inode.rdev() == 0 {
            return self.whiteout(name);
        }
        let mut entry = self.entry(name)?;
        if inode.kind() == FileKind::File {
            return self.file(name, entry);
        }
        let opaque = take_opaque(&mut entry);
        self.header(name, &entry)?;
        if opaque {
            let marker = [&entry.path[..], OPAQUE].concat();
            self.header(name, &tar::Entry::empty_file(marker))?;
        }
        Ok(())
    }

    /// The mark by which overlayfs hides a name of lower layers.
    fn whiteout(&mut self, name: &Name) -> Result<(), Stop> {
        let dir = &name.path[1..name.path.len() - name.name().len()];
        let path = [dir, b".wh.", name.name()].concat();
        self.header(name, &tar::Entry::empty_file(path))
    }

    fn entry(&self, name: &Name) -> Result<tar::Entry, Stop> {
        let inode = &name.inode;
        let mut path = name.path[1..].to_vec();
        let (kind, link) = match inode.kind() {
            FileKind::File | FileKind::Socket => (tar::Kind::File, Vec::new()),
            FileKind::Directory => {
                path.extend_from_slice(if path.is_empty() { b"./" } else { b"/" });
                (tar::Kind::Directory, Vec::new())
            }
            FileKind::CharDevice => (tar::Kind::CharDevice, Vec::new()),
            FileKind::BlockDevice => (tar::Kind::BlockDevice, Vec::new()),
            FileKind::Fifo => (tar::Kind::Fifo, Vec::new()),
            FileKind::Symlink => (tar::Kind::Symlink, self.image.readlink(inode.nid())?),
        };
        let xattrs = self.image.xattrs(inode.nid())?;
        let xattrs = xattrs.iter().map(|x| (x.key(), x.value.to_vec()));
        Ok(tar::Entry {
            path,
            kind,
            link,
            size: 0,
            attr: inode.attr(),
            device: inode.rdev(),
            xattrs: xattrs.collect(),
        })
    }

    fn file(&mut self, name: &Name, mut entry: tar::Entry) -> Result<(), Stop> {
        let inode = &name.inode;
        if inode.nlink() > 1 {
            if let Some(first) = self.first_names.get(&inode.nid()) {
                entry.kind = tar::Kind::HardLink;
                entry.link.clone_from(first);
                // They belong to the file, not to the name.
                entry.xattrs.clear();
                return self.header(name, &entry);
            }
            self.first_names.insert(inode.nid(), entry.path.clone());
        }
        entry.size = inode.size();
        self.header(name, &entry)?;
        for extent in self.image.extents(inode.nid(), 0..inode.size()) {
            let extent = extent?;
            let len = extent.plain.end - extent.plain.start;
            self.job.parts.push(Part::Data(Span {
                blob: extent.blob,
                chunk: extent.chunk,
                within: extent.chunk_offset..extent.chunk_offset + len,
            }));
            self.grow(len)?;
        }
        self.bytes(vec![0; tar::padding(inode.size())]);
        Ok(())
    }

    fn header(&mut self, name: &Name, entry: &tar::Entry) -> Result<(), Stop> {
        let header = entry
            .header()
            .with_context(|| format!("{} does not fit a tar", name.path.escape_ascii()))?;
        let len = u64::try_from(header.len()).unwrap_or(u64::MAX);
        self.bytes(header);
        self.grow(len)
    }

    fn bytes(&mut self, bytes: Vec<u8>) {
        match self.job.parts.last_mut() {
            Some(Part::Bytes(last)) => last.extend_from_slice(&bytes),
            _ => self.job.parts.push(Part::Bytes(bytes)),
        }
    }

    fn grow(&mut self, len: u64) -> Result<(), Stop> {
        self.job.len += len;
        if self.job.len < JOB {
            return Ok(());
        }
        self.send().map_err(|Closed| Stop::Closed)
    }

    fn send(&mut self) -> Result<(), Closed> {
        self.jobs.send(std::mem::take(&mut self.job))
    }
}

/// Removes the mark by which overlayfs hides what a directory has in lower layers.
fn take_opaque(entry: &mut tar::Entry) -> bool {
    let count = entry.xattrs.len();
    entry.xattrs.retain(|(key, value)| {
        let mark = key == b"trusted.overlay.opaque" || key == b"user.overlay.opaque";
        !(mark && value == b"y")
    });
    entry.xattrs.len() < count
}
