//! Builds one layer: a source becomes a tree and a blob.
//!
//! The calling thread reads the source; a second one stores chunks; the workers
//! of the [`Engine`] do the rest. Several layers may be built at a time from
//! several threads over one engine.
//!
//! Promises: equal source and options give equal bytes, whatever the number of
//! threads; memory for file data stays within the engine's budget; `out` is
//! written front to back and never read.

use std::fs::File;
use std::io::Write;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use rafs::merge::{WhiteoutSpec, apply};
use rafs::tree::{Content, Tree};
use rafs::writer::{self, WriteOptions};
use storage::blob_writer::{BlobOptions, BlobWriter, FinishedBlob};
use storage::codec::DEFAULT_ZSTD_LEVEL;
use storage::{BlobInfo, Compressor, Digester, original};

use crate::pipeline::Engine;
use crate::pipeline::feeder::Feeder;
use crate::pipeline::item;
use crate::pipeline::sequencer::{self, Owner, StoreError, Stored};
use crate::pipeline::workers::LayerContext;
use crate::prefetch::Prefetch;
use crate::reuse::{Known, Traits};
use crate::source::{Progress, Scanned, Source, SourceError};

/// How a layer is built.
#[derive(Clone, Debug)]
pub struct BuildOptions {
    /// How chunks are compressed.
    pub compressor: Compressor,
    /// zstd level, as in [`storage::codec::Encoding`].
    pub level: i32,
    /// How chunks are identified.
    pub digester: Digester,
    /// Largest chunk in bytes: a power of two from 4 KiB to 16 MiB.
    pub chunk_size: u32,
    /// Whether the blob ends with a table of contents and carries its chunk digests.
    pub blob_toc: bool,
    /// Small chunks are compressed together in batches of this many bytes: 0 for
    /// never, or a power of two from 4 KiB to the chunk size.
    pub batch_size: u32,
    /// Whether the bootstrap is embedded in the blob.
    pub inline_bootstrap: bool,
    /// Whether owners are stored; otherwise all files belong to the reader.
    pub explicit_uid_gid: bool,
    /// Entries of a directory source that are left out, because they only mean
    /// something to lower layers. Tar sources keep all entries.
    pub whiteouts: WhiteoutSpec,
    /// Which files are wanted first.
    pub prefetch: Prefetch,
    /// Told about bytes that were read from the source.
    pub progress: Option<Progress>,
    /// Chunks that other images have, which are referred to and not stored again.
    pub known: Arc<Known>,
    /// The image that the layer is put on. The result then describes both.
    pub parent: Option<Arc<Tree>>,
    /// An empty file that gets the uncompressed address space of the blob: the chunks as
    /// a cache has them. Needs a layer that is not compressed by the build, without
    /// batches: [`BuildOptions::plain_into`].
    pub plain: Option<Arc<File>>,
}

impl Default for BuildOptions {
    fn default() -> Self {
        Self {
            compressor: Compressor::Zstd,
            level: DEFAULT_ZSTD_LEVEL,
            digester: Digester::Blake3,
            chunk_size: 1 << 20,
            batch_size: 0,
            blob_toc: false,
            inline_bootstrap: false,
            explicit_uid_gid: true,
            whiteouts: WhiteoutSpec::Oci,
            prefetch: Prefetch::default(),
            progress: None,
            known: Arc::default(),
            parent: None,
            plain: None,
        }
    }
}

impl BuildOptions {
    /// Also writes the uncompressed address space, to the empty file `plain`. The blob is
    /// then stored without compression and batches.
    #[must_use]
    pub fn plain_into(self, plain: File) -> Self {
        Self {
            compressor: Compressor::None,
            batch_size: 0,
            plain: Some(Arc::new(plain)),
            ..self
        }
    }

    /// What the format prescribes for layers that are used in place
    /// ([`Source::InPlace`]).
    #[must_use]
    pub fn in_place(self) -> Self {
        Self {
            compressor: Compressor::Gzip,
            digester: Digester::Sha256,
            batch_size: 0,
            ..self
        }
    }

    fn blob(&self, original: Option<original::Kind>) -> BlobOptions {
        BlobOptions {
            compressor: self.compressor,
            level: self.level,
            digester: self.digester,
            chunk_size: self.chunk_size,
            blob_toc: self.blob_toc,
            inline_bootstrap: self.inline_bootstrap,
            chunk_info_v2: false,
            batch_size: self.batch_size,
            original,
        }
    }

    /// What the images must have in common that this build refers to.
    #[must_use]
    pub fn traits(&self) -> Traits {
        Traits {
            compressor: self.compressor,
            digester: self.digester,
            chunk_size: self.chunk_size,
            owners: self.explicit_uid_gid,
        }
    }

    /// How the bootstrap of a tree with these options is written.
    #[must_use]
    pub fn write_options(&self, tree: &Tree) -> WriteOptions {
        WriteOptions {
            chunk_size: self.chunk_size,
            compressor: self.compressor,
            digester: self.digester,
            explicit_uid_gid: self.explicit_uid_gid,
            prefetch: self.prefetch.table(tree),
            ..WriteOptions::default()
        }
    }
}

/// A layer that was built.
#[derive(Debug)]
pub struct Layer {
    /// Its files, or those of the parent and of the layer. [`Tree::blobs`] has the
    /// layer's own blob if a chunk was stored, and the blobs of other images that
    /// it refers to.
    pub tree: Tree,
    /// The position of its own blob in [`Tree::blobs`].
    pub own: Option<usize>,
    /// Its own blob.
    pub blob: FinishedBlob,
}

impl Layer {
    /// The row of its own blob.
    pub fn own_mut(&mut self) -> Option<&mut BlobInfo> {
        self.tree.blobs.get_mut(self.own?)
    }
}

/// Why a layer could not be built.
#[derive(Debug, thiserror::Error)]
pub enum BuildError {
    /// The source could not be read.
    #[error("cannot read the source")]
    Source(#[source] SourceError),
    /// The blob could not be stored.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The files cannot be described by a bootstrap.
    #[error("cannot write the bootstrap")]
    Bootstrap(#[source] rafs::WriteError),
}

/// Builds one layer and writes its blob to `out`. If no file has data and no
/// bootstrap is embedded, nothing is written.
///
/// Blocks until `source` is read to its end and `out` has taken everything. When it
/// fails, what `out` got so far is useless.
///
/// # Errors
/// [`BuildError`]; the first failure stops everything else.
pub fn build_layer(
    engine: &Engine,
    source: Source,
    options: &BuildOptions,
    out: impl Write + Send,
) -> Result<Layer, BuildError> {
    let blob = options.blob(source.original());
    let mut writer = BlobWriter::new(out, blob).map_err(StoreError::Write)?;
    let layer = Arc::new(LayerContext::new(
        blob.encoding(),
        options.digester,
        item::len(options.chunk_size),
        Arc::clone(&options.known),
        options.plain.clone(),
    ));
    let (scanned, stored) = run(engine, source, options, &layer, &mut writer)?;
    drop(layer);
    finish(scanned, stored, options, writer)
}

/// Runs source and sequencer side by side.
fn run<W: Write + Send>(
    engine: &Engine,
    source: Source,
    options: &BuildOptions,
    layer: &Arc<LayerContext>,
    writer: &mut BlobWriter<W>,
) -> Result<(Scanned, Stored), BuildError> {
    // Bounded by the budget: every item in it holds a buffer.
    let (sender, done) = crossbeam_channel::unbounded();
    let stopped = Arc::new(AtomicBool::new(false));
    let blob = options.blob(source.original());
    let mut feeder = Feeder::new(
        engine.clone(),
        Arc::clone(layer),
        blob,
        sender,
        Arc::clone(&stopped),
    );
    let (scanned, stored) = std::thread::scope(|scope| {
        let sequencer = scope.spawn(|| {
            // Dropped at the end: that frees the buffers of items still coming.
            let done = done;
            let result = sequencer::run(&done, layer, &engine.workers, blob, writer);
            stopped.store(true, Ordering::Relaxed);
            result
        });
        let scanned = match options.parent {
            None => source.scan(&mut feeder, options),
            // Whiteouts have something to remove: the merge needs to see them.
            Some(_) => {
                let whiteouts = WhiteoutSpec::None;
                let options = options.clone();
                source.scan(
                    &mut feeder,
                    &BuildOptions {
                        whiteouts,
                        ..options
                    },
                )
            }
        };
        // Closes the channel, also after a failure, so that the sequencer ends.
        let items = feeder.finish();
        let stored = sequencer.join().unwrap_or(Err(StoreError::WorkerLost));
        let stored = stored.and_then(|stored| match stored.items == items {
            true => Ok(stored),
            false => Err(StoreError::WorkerLost),
        });
        (scanned, stored)
    });
    match (scanned, stored) {
        (Ok(scanned), Ok(stored)) => Ok((scanned, stored)),
        // The source stopped because the sequencer failed first.
        (Err(SourceError::Stopped), Err(error)) | (Ok(_), Err(error)) => Err(error.into()),
        (Err(error), _) => Err(BuildError::Source(error)),
    }
}

/// Joins files and chunks, and completes the blob.
fn finish<W: Write>(
    scanned: Scanned,
    stored: Stored,
    options: &BuildOptions,
    writer: BlobWriter<W>,
) -> Result<Layer, BuildError> {
    let Scanned {
        mut tree,
        files,
        original,
    } = scanned;
    let mut add = |chunks: Vec<_>| -> Vec<_> {
        let chunks = chunks.into_iter();
        chunks.map(|chunk| tree.add_chunk(chunk)).collect()
    };
    let (own, known) = (add(stored.chunks), add(stored.known));
    let id = |reference| match Stored::resolve(reference) {
        (false, position) => own[position],
        (true, position) => known[position],
    };
    let mut references = stored.references.into_iter();
    for (file, count) in files {
        if let Content::File { chunks, .. } = &mut tree.inode_mut(file).content {
            let count = usize::try_from(count).unwrap_or(usize::MAX);
            chunks.extend(references.by_ref().take(count).map(id));
        }
    }
    let mut writer = writer;
    if let Some(original) = original {
        writer.set_original(original);
    }
    // The layer's own blob is among them exactly if the writer has a row for it.
    let blobs = |own: Option<&BlobInfo>| -> Vec<BlobInfo> {
        let info = |owner: &Owner| match owner {
            Owner::Layer => own.cloned(),
            Owner::Known(id) => options.known.blob_with_id(id).cloned(),
        };
        stored.blobs.iter().filter_map(info).collect()
    };
    let embed = |info: Option<&BlobInfo>| {
        tree.blobs = blobs(info);
        let bytes = match &options.parent {
            None => writer::write(&tree, &options.write_options(&tree))?,
            Some(parent) => {
                let tree = on_parent(parent, tree.clone(), options)?;
                writer::write(&tree, &options.write_options(&tree))?
            }
        };
        Ok(bytes)
    };
    let blob = writer.finish(embed);
    let blob = blob.map_err(|error| BuildError::Store(StoreError::Write(error)))?;
    tree.blobs = blobs(blob.info.as_ref());
    if let Some(parent) = &options.parent {
        tree = on_parent(parent, tree, options).map_err(BuildError::Bootstrap)?;
    }
    let own = blob.info.as_ref().map(|info| &info.id);
    let own = own.and_then(|id| tree.blobs.iter().position(|blob| blob.id == *id));
    Ok(Layer { tree, own, blob })
}

/// The parent with the layer on it.
fn on_parent(parent: &Tree, layer: Tree, options: &BuildOptions) -> Result<Tree, rafs::WriteError> {
    let mut tree = parent.clone();
    apply(&mut tree, layer, options.whiteouts)?;
    Ok(tree)
}
