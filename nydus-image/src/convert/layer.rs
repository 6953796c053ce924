//! One layer: from the stored tar to a blob in a temporary file.
//!
//! ```text
//! network task ──▶ decoder thread: inflate, diff_id ──▶ this thread: tar ──▶ pipeline ──▶ file
//! ```
//!
//! Promises: all queues are bounded; the result exists only if the digest of the
//! stored layer and that of the uncompressed tar were right; the temporary file has
//! no name, so nothing is left behind however the process ends.

use std::fs::File;
use std::io::{self, BufWriter, Read, Write as _};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::{Context as _, ensure};
use crossbeam_channel::{Receiver, Sender, bounded};
use rafs::tree::Tree;
use storage::BlobId;
use storage::oci::content::Verifier;
use storage::oci::{ContentDigest, OciError, layer as stored};
use storage::original::NotInPlace;

use crate::build::{BuildError, BuildOptions, Layer, build_layer};
use crate::pipeline::Engine;
use crate::source::{InPlace, Source, SourceError};

/// Size of the pieces of tar between the decoder and the tar parser.
const PIECE: usize = 256 << 10;
/// Their number: 2 MiB a layer.
const PIECES: usize = 8;

/// A layer that was converted.
#[derive(Debug)]
pub(super) struct Converted {
    /// Digest of the source layer.
    pub(super) source: ContentDigest,
    /// Its files, with the blob under its real digest.
    pub(super) tree: Tree,
    /// Whether the source layer stays the data blob, and the blob is its index.
    pub(super) in_place: bool,
    /// Digest of the blob.
    pub(super) digest: ContentDigest,
    /// Length of the blob.
    pub(super) size: u64,
    /// Content of the blob's `.blob.meta` file; empty if the layer has no data.
    pub(super) chunk_table: Vec<u8>,
    /// The blob, without a name, until it is sent.
    pub(super) file: Option<Arc<File>>,
}

impl Converted {
    /// Digest of what holds the data of the files: the name of its cache files.
    pub(super) fn data(&self) -> &ContentDigest {
        if self.in_place {
            &self.source
        } else {
            &self.digest
        }
    }
}

/// Converts the layer that `reader` delivers. Blocks; for a thread of its own.
///
/// * `source`, `diff_id`: digests of the layer as stored, and of the tar in it.
pub(super) fn convert(
    engine: &Engine,
    reader: impl Read + Send + 'static,
    (source, diff_id): (&ContentDigest, &ContentDigest),
    options: &BuildOptions,
    work_dir: &Path,
) -> anyhow::Result<Converted> {
    let in_dir = || format!("cannot write a temporary file in {}", work_dir.display());
    let file = tempfile::tempfile_in(work_dir).with_context(in_dir)?;
    let (tar, decoder) = Decoder::start(reader, diff_id)?;
    let archive = Source::Tar {
        name: format!("layer {source}"),
        reader: Box::new(tar),
    };
    let mut out = BufWriter::with_capacity(PIECE, &file);
    let built = build_layer(engine, archive, options, &mut out);
    if matches!(built, Err(BuildError::Store(_))) {
        // The disk, say, is full: the rest of the layer changes nothing about that.
        decoder.stop();
    }
    // First the decoder: if the stored bytes are wrong, that is why the tar looks broken.
    decoder.finish()?;
    let built = built?;
    out.flush().with_context(in_dir)?;
    drop(out);
    converted(source, built, false, file)
}

/// Makes an index of the layer that `reader` delivers, which stays the data blob.
/// Blocks; for a thread of its own.
///
/// * `source`, `diff_id`: as for [`convert`].
/// * `copy`: gets the layer as stored.
///
/// # Errors
/// See [`cannot_stay`].
pub(super) fn index(
    engine: &Engine,
    reader: impl Read + Send + 'static,
    (source, diff_id): (&ContentDigest, &ContentDigest),
    options: &BuildOptions,
    (work_dir, copy): (&Path, Option<&Arc<File>>),
) -> anyhow::Result<Converted> {
    let in_dir = || format!("cannot write a temporary file in {}", work_dir.display());
    let file = tempfile::tempfile_in(work_dir).with_context(in_dir)?;
    let reader = Shared(Arc::new(Mutex::new(reader)));
    let copied = Copied {
        reader: reader.clone(),
        copy: copy.cloned(),
    };
    let mut out = BufWriter::with_capacity(PIECE, &file);
    let name = format!("layer {source}");
    let built = InPlace::open(copied).map_err(plain).and_then(|layer| {
        let layer = layer.hashing_tar();
        let archive = Source::InPlace {
            name,
            layer: layer.clone(),
        };
        let built = build_layer(engine, archive, options, &mut out)?;
        let found = layer.tar_digest().as_ref().map(ContentDigest::from_sha256);
        ensure!(
            found.as_ref() == Some(diff_id),
            "the uncompressed tar has the digest {}, but {diff_id} by the configuration (rootfs.diff_ids)",
            found.map_or_else(String::new, |digest| digest.to_string()),
        );
        Ok(built)
    });
    if let Err(error) = built {
        if cannot_stay(&error) {
            // The layer will be read once more, and its digest be checked then.
            return Err(error);
        }
        // If the stored bytes are wrong, that is the cause.
        io::copy(&mut reader.clone(), &mut io::sink()).map_err(plain)?;
        return Err(error);
    }
    let built = built?;
    out.flush().with_context(in_dir)?;
    drop(out);
    converted(source, built, true, file)
}

/// Whether [`index`] failed only because the layer cannot be used in place; [`convert`]
/// may take it.
pub(super) fn cannot_stay(error: &anyhow::Error) -> bool {
    error.chain().any(|cause| {
        let read = cause.downcast_ref::<io::Error>();
        let tar = match cause.downcast_ref::<SourceError>() {
            Some(SourceError::Tar(error)) => error.is_not_in_place(),
            _ => false,
        };
        tar || read.is_some_and(NotInPlace::is_in)
    })
}

/// What is known of a layer that was built into `file`.
fn converted(
    source: &ContentDigest,
    mut built: Layer,
    in_place: bool,
    file: File,
) -> anyhow::Result<Converted> {
    let blob = built.blob.clone();
    let digest = ContentDigest::from_sha256(&blob.file_sha256);
    if let Some(info) = built.own_mut() {
        // Registries name the blob by its real digest; the embedded bootstrap could not know it.
        if in_place {
            info.meta_blob_digest = blob.file_sha256;
            info.meta_blob_size = blob.file_size;
        } else {
            info.id = BlobId::new(digest.hex())?;
            info.compressed_size = blob.file_size;
        }
        info.toc_size = blob.toc_size;
        info.toc_digest = blob.toc_digest;
    }
    Ok(Converted {
        source: source.clone(),
        tree: built.tree,
        in_place,
        digest,
        size: blob.file_size,
        chunk_table: blob.cct,
        file: Some(Arc::new(file)),
    })
}

/// A reader whose bytes are also written to a file.
struct Copied<R> {
    reader: R,
    copy: Option<Arc<File>>,
}

impl<R: Read> Read for Copied<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.reader.read(buffer)?;
        if let Some(copy) = &self.copy {
            copy.as_ref().write_all(&buffer[..count])?;
        }
        Ok(count)
    }
}

/// The thread that undoes the layer's compression.
struct Decoder {
    thread: std::thread::JoinHandle<anyhow::Result<()>>,
    stopped: Arc<AtomicBool>,
}

impl Decoder {
    fn start(
        reader: impl Read + Send + 'static,
        diff_id: &ContentDigest,
    ) -> anyhow::Result<(TarReader, Self)> {
        let (sender, receiver) = bounded(PIECES);
        let diff_id = diff_id.clone();
        let stopped = Arc::new(AtomicBool::new(false));
        let reader = Stoppable {
            reader,
            stopped: Arc::clone(&stopped),
        };
        let thread = std::thread::Builder::new()
            .name("decode".to_owned())
            .spawn(move || decode(reader, &diff_id, &sender))
            .context("cannot start a thread")?;
        let tar = TarReader {
            receiver,
            piece: Vec::new(),
            position: 0,
            ended: false,
        };
        Ok((tar, Self { thread, stopped }))
    }

    /// Makes the thread end soon, as if the layer ended here.
    fn stop(&self) {
        self.stopped.store(true, Ordering::Relaxed);
    }

    /// Waits until the whole layer was read, and says whether it was the right one.
    fn finish(self) -> anyhow::Result<()> {
        let result = self.thread.join();
        if self.stopped.load(Ordering::Relaxed) {
            return Ok(());
        }
        result.unwrap_or_else(|_panic| Err(anyhow::anyhow!("the decoder crashed")))
    }
}

/// A reader that can be told to end.
struct Stoppable<R> {
    reader: R,
    stopped: Arc<AtomicBool>,
}

impl<R: Read> Read for Stoppable<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.stopped.load(Ordering::Relaxed) {
            Ok(0)
        } else {
            self.reader.read(buffer)
        }
    }
}

/// What goes to the tar parser: bytes, or `None` after the last ones. A channel that
/// closes without `None` means that decoding failed.
type Piece = Option<Vec<u8>>;

/// Decodes everything, whether or not anyone still listens, because the digests are
/// those of everything.
fn decode(
    reader: impl Read + Send,
    diff_id: &ContentDigest,
    sender: &Sender<Piece>,
) -> anyhow::Result<()> {
    let reader = Shared(Arc::new(Mutex::new(reader)));
    let mut decoded = 0_u64;
    let result = decode_all(reader.clone(), diff_id, sender, &mut decoded);
    if result.as_ref().is_err_and(anyhow::Error::is::<OciError>) {
        return result;
    }
    // Wrong bytes break the decompression first and the digest of the layer last; the
    // latter is the cause.
    io::copy(&mut reader.clone(), &mut io::sink()).map_err(plain)?;
    result.with_context(|| format!("cannot decompress it after {decoded} bytes of tar"))
}

fn decode_all(
    reader: impl Read + Send,
    diff_id: &ContentDigest,
    sender: &Sender<Piece>,
    decoded: &mut u64,
) -> anyhow::Result<()> {
    let mut tar = stored::decode(reader).map_err(plain)?;
    let mut verifier = Verifier::of_any_size("the uncompressed tar (rootfs.diff_ids)", diff_id);
    loop {
        let mut piece = Vec::with_capacity(PIECE);
        let count = tar
            .by_ref()
            .take(PIECE as u64)
            .read_to_end(&mut piece)
            .map_err(plain)?;
        *decoded += count as u64;
        if count == 0 {
            break;
        }
        verifier.update(&piece)?;
        // The parser may have stopped at the end of the archive or at an error.
        let _ = sender.send(Some(piece));
    }
    verifier.finish()?;
    let _ = sender.send(None);
    Ok(())
}

/// An error of ours that travelled through an [`io::Error`], as itself.
fn plain(error: io::Error) -> anyhow::Error {
    match error.downcast::<OciError>() {
        Ok(error) => error.into(),
        Err(error) => error.into(),
    }
}

/// The stored layer; shared, so that it can be read on after the decompressor failed.
struct Shared<R>(Arc<Mutex<R>>);

impl<R> Clone for Shared<R> {
    fn clone(&self) -> Self {
        Self(Arc::clone(&self.0))
    }
}

impl<R: Read> Read for Shared<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.0
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .read(buffer)
    }
}

/// The uncompressed tar as it comes from the decoder.
struct TarReader {
    receiver: Receiver<Piece>,
    piece: Vec<u8>,
    position: usize,
    ended: bool,
}

impl Read for TarReader {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.position == self.piece.len() && !self.ended {
            match self.receiver.recv() {
                Ok(Some(piece)) => (self.piece, self.position) = (piece, 0),
                Ok(None) => self.ended = true,
                // The decoder's own error says more; it is reported instead of this one.
                Err(_closed) => return Err(io::Error::other("the layer cannot be decompressed")),
            }
        }
        let rest = &self.piece[self.position..];
        let count = rest.len().min(buffer.len());
        buffer[..count].copy_from_slice(&rest[..count]);
        self.position += count;
        Ok(count)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn collect(receiver: &Receiver<Piece>) -> Vec<u8> {
        receiver.iter().flatten().flatten().collect()
    }

    #[test]
    fn all_bytes_arrive_and_are_checked() {
        let tar = b"no tar, but bytes ".repeat(100_000);
        let stored = zstd::encode_all(tar.as_slice(), 1).unwrap();
        for (diff_id, right) in [
            (ContentDigest::of(&tar), true),
            (ContentDigest::of(b""), false),
        ] {
            let (mut reader, decoder) =
                Decoder::start(io::Cursor::new(stored.clone()), &diff_id).unwrap();
            let mut bytes = Vec::new();
            assert_eq!(reader.read_to_end(&mut bytes).is_ok(), right);
            assert!(bytes == tar);
            assert_eq!(decoder.finish().is_ok(), right);
        }
    }

    /// Delivers bytes, and at their end the verdict that they are wrong.
    struct Wrong(io::Cursor<Vec<u8>>);

    impl Read for Wrong {
        fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
            match self.0.read(buffer)? {
                0 => Err(io::Error::other(OciError::NotFound {
                    at: "the digest".to_owned(),
                })),
                count => Ok(count),
            }
        }
    }

    #[test]
    fn a_wrong_digest_is_the_cause_of_broken_compression() {
        let good = zstd::encode_all(&[7_u8; 100_000][..], 1).unwrap();
        let mut broken = good.clone();
        broken[10..14].fill(0xff);
        broken.extend_from_slice(&[0; 1000]);
        for stored in [good, broken] {
            let (sender, receiver) = bounded(1000);
            let reader = Wrong(io::Cursor::new(stored));
            let error = decode(reader, &ContentDigest::of(b"x"), &sender).unwrap_err();
            assert!(error.to_string().contains("the digest"), "{error:#}");
            drop(sender);
            collect(&receiver);
        }
    }

    #[test]
    fn only_what_another_conversion_can_take_is_tried_again() {
        let zstd = zstd::encode_all(&b"x"[..], 1).unwrap();
        let error = InPlace::open(io::Cursor::new(zstd)).map_err(plain);
        assert!(cannot_stay(&error.unwrap_err().context("more words")));
        let error = io::Error::new(io::ErrorKind::Unsupported, "something else");
        assert!(!cannot_stay(&plain(error)));
    }

    #[test]
    fn a_parser_that_stops_early_does_not_block_the_decoder() {
        let tar = vec![1_u8; PIECE * (PIECES + 5)];
        let (reader, decoder) =
            Decoder::start(io::Cursor::new(tar.clone()), &ContentDigest::of(&tar)).unwrap();
        drop(reader);
        decoder.finish().unwrap();
    }
}
