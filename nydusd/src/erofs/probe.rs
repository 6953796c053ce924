//! Whether the kernel can serve images from a cache directory, found out by doing.
//!
//! A scratch image with one file of one block is mounted where nobody sees it, from
//! files in that very directory, and the file is read: the block is not there, so an
//! event must come, and what is written before the answer must be what is read.
//! Version numbers would not say half of it: whether the file system of the directory
//! has such events, whether EROFS takes its files, whether we may.

use std::fs::File;
use std::io::{Read as _, Write as _};
use std::os::fd::{AsFd as _, FromRawFd as _, OwnedFd};
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::sync::mpsc::{TryRecvError, channel};
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail, ensure};
use nix::poll::{PollFd, PollFlags, poll};
use rafs::tree::{Attr, ChunkRecord, Content, Inode, Tree};
use rafs::writer::{WriteOptions, write};
use storage::blob_info::MetaLocation;
use storage::{BlobFeatures, BlobId, BlobIndex, BlobInfo, ChunkIndex, Digest};
use storage::{Compressor, Digester};

use super::event::Event;
use super::journal::EVENT_ROOM;
use super::sys::{self, Detached, FsContext, Mark};

/// The one block, and what it must hold when it is read.
const BLOCK: usize = 4096;
const CONTENT: u8 = 0x5a;
const NAME: &str = "block";
/// Bytes of the only entry of its chunk table.
const CHUNK_ENTRY: u64 = 16;
/// How long an event may take.
const PATIENCE: Duration = Duration::from_secs(2);

/// Tries it with files in `cache`.
///
/// # Errors
/// What does not work, in the words of the step that failed.
pub(crate) fn probe(cache: &Path) -> anyhow::Result<()> {
    let dir = tempfile::Builder::new()
        .prefix(".probe-")
        .tempdir_in(cache)
        .context("cannot write to the cache directory")?;
    let meta = dir.path().join("meta");
    File::create(&meta)?.write_all(&image()?)?;
    let device = dir.path().join("device");
    let data = File::create_new(&device)?;
    data.set_len(u64::try_from(BLOCK)?)?;

    let group = sys::event_group().context("no fanotify pre-access events")?;
    sys::mark(&group, Mark::Add, &data)
        .context("no pre-access events on the file system of the cache directory")?;
    let files = FsContext::open(c"erofs").context("no EROFS")?;
    let words = |path: &Path| path.to_str().map(str::to_owned).context("odd path");
    files.set(c"source", &words(&meta)?)?;
    files.set(c"device", &words(&device)?)?;
    let mount = files.mount().with_context(|| {
        format!(
            "EROFS refuses files of this file system ({})",
            files.explain()
        )
    })?;
    let read = ask(&group, &data, mount)?;
    ensure!(
        read == [CONTENT; BLOCK],
        "the kernel did not wait for the data of a read"
    );
    Ok(())
}

/// Reads the file of the mount while answering for it.
fn ask(group: &OwnedFd, data: &File, mount: Detached) -> anyhow::Result<Vec<u8>> {
    let (sender, receiver) = channel();
    let path = mount.path().join(NAME);
    let reader = std::thread::Builder::new().spawn(move || {
        let mut bytes = Vec::new();
        let done = File::open(path).and_then(|mut file| file.read_to_end(&mut bytes));
        drop(mount);
        // Nobody listens after a failure of the other side.
        let _ = sender.send(done.map(|_| bytes));
    })?;
    let began = Instant::now();
    while began.elapsed() < PATIENCE {
        let mut fds = [PollFd::new(group.as_fd(), PollFlags::POLLIN)];
        if poll(&mut fds, 1_u16)? > 0 {
            answer(group, data)?;
        }
        match receiver.try_recv() {
            Ok(read) => {
                let _ = reader.join();
                return read.context("cannot read through EROFS");
            }
            Err(TryRecvError::Empty) => {}
            Err(TryRecvError::Disconnected) => break,
        }
    }
    // The reader is free as soon as the group is closed.
    bail!("a read through EROFS does not end")
}

/// Fills the block, and lets one access pass.
fn answer(group: &OwnedFd, data: &File) -> anyhow::Result<()> {
    let mut bytes = [0; EVENT_ROOM];
    let len = nix::unistd::read(group, &mut bytes)?;
    let event = Event::parse(bytes.get(..len).unwrap_or_default())?;
    ensure!(event.fd >= 0, "an event came without a descriptor");
    // SAFETY: the kernel has just opened this descriptor for us, with the event.
    let name = unsafe { OwnedFd::from_raw_fd(event.fd) };
    data.write_all_at(&[CONTENT; BLOCK], 0)?;
    sys::respond(group, &name, libc::FAN_ALLOW)?;
    Ok(())
}

/// An image with one file, whose only block is the first of its only blob.
fn image() -> anyhow::Result<Vec<u8>> {
    let size = u32::try_from(BLOCK)?;
    let attr = Attr {
        permissions: 0o555,
        ..Attr::default()
    };
    let mut tree = Tree::new(attr);
    let chunk = tree.add_chunk(ChunkRecord {
        digest: Digest::of(Digester::Blake3, &[CONTENT; BLOCK]),
        blob: BlobIndex::new(0),
        index: ChunkIndex::new(0),
        compressed: false,
        compressed_size: size,
        uncompressed_size: size,
        compressed_offset: 0,
        uncompressed_offset: 0,
        file_offset: 0,
        crc32c: None,
    });
    let content = Content::File {
        size: size.into(),
        chunks: vec![chunk],
    };
    tree.insert(tree.root(), NAME.as_bytes(), Inode::new(attr, content))?;
    tree.blobs.push(BlobInfo {
        id: BlobId::from_digest(&Digest::of(Digester::Sha256, NAME.as_bytes())),
        chunk_size: size,
        chunk_count: 1,
        compressor: Compressor::None,
        digester: Digester::Blake3,
        features: BlobFeatures::ALIGNED,
        compressed_size: size.into(),
        uncompressed_size: size.into(),
        // The kernel does not look for the table that this describes.
        meta: MetaLocation {
            compressed_size: CHUNK_ENTRY,
            uncompressed_size: CHUNK_ENTRY,
            ..MetaLocation::default()
        },
        toc_size: 0,
        toc_digest: Digest::default(),
        meta_blob_digest: Digest::default(),
        meta_blob_size: 0,
    });
    let options = WriteOptions {
        chunk_size: size,
        compressor: Compressor::None,
        ..WriteOptions::default()
    };
    Ok(write(&tree, &options)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_scratch_image_is_a_good_one() {
        let image = rafs::image::Image::from_bytes(image().unwrap()).unwrap();
        assert_eq!((image.inode_count(), image.blobs().len()), (2, 1));
        image.verify_tree().unwrap();
    }

    /// Needs what the tests of this project need anyway: root, and Linux 6.15.
    #[test]
    fn this_machine_can_and_a_memory_file_system_cannot() {
        let dir = tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR")).unwrap();
        probe(dir.path()).unwrap();
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
        let error = probe(Path::new("/dev/shm")).unwrap_err();
        assert!(
            format!("{error:#}").contains("cache directory"),
            "{error:#}"
        );
    }
}
