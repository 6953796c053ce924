//! `create`: one layer from a directory or a tar archive.
//!
//! Order of work: check the options, read the prefetch patterns, build the layer
//! into its output ([`build_layer`]), write the bootstrap, and only then give both
//! files their names. With `--blob-cache-dir` the output is not a blob but the files
//! that a daemon's cache has once everything was read.

use std::io::Write as _;
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context as _, bail};
use rafs::merge::WhiteoutSpec;
use sha2::{Digest as _, Sha256};
use storage::{BlobFeatures, BlobId, Compressor, Digest};

use crate::build::{BuildOptions, Layer, build_layer};
use crate::cli::UsageError;
use crate::output::{Output, write_file};
use crate::pipeline::Engine;
use crate::prefetch::{Policy, Prefetch};
use crate::report::Report;
use crate::reuse::{Known, Reused};
use crate::source::{InPlace, Source, compressed};

mod args;

pub use args::{Args, Conversion, Whiteouts};

/// Chunk size unless told otherwise, in bytes.
const DEFAULT_CHUNK_SIZE: u32 = 1 << 20;

/// Runs the command.
///
/// # Errors
/// [`UsageError`] for contradicting options; anything else has left no output.
pub fn run(args: Args) -> anyhow::Result<()> {
    let start = Instant::now();
    check_usage(&args)?;
    check_supported(&args)?;
    let mut options = options(&args)?;
    reuse(&args, &mut options)?;
    let source = open_source(&args)?;
    let mut blob = open_blob(&args)?;
    let mut nowhere = std::io::sink();
    let out: &mut (dyn std::io::Write + Send) = match &args.blob_cache_dir {
        Some(_) => {
            options = cached(options, &blob)?;
            &mut nowhere
        }
        None => &mut blob,
    };
    let engine = Engine::for_this_machine();
    let mut layer = build_layer(&engine, source, &options, out).with_context(|| {
        let dir = args.blob_dir.as_ref().or(args.blob_cache_dir.as_ref());
        let target = args.blob.as_ref().or(dir);
        let target = target.map_or_else(String::new, |path| format!(" into {}", path.display()));
        format!(
            "cannot build a layer from {}{target}",
            args.source.display()
        )
    })?;
    if let (Some(id), Some(info)) = (&args.blob_id, layer.own_mut()) {
        info.id = BlobId::new(id)?;
    }
    let bootstrap = write_bootstrap(&args, &options, &layer)?;
    if args.blob_cache_dir.is_some() {
        commit_cache(blob, &layer)?;
    } else {
        commit_blob(blob, &layer)?;
    }
    let path = bootstrap
        .map(|(output, name)| output.commit(&name))
        .transpose()?;
    if let Some(json) = &args.output_json {
        let blobs = &layer.tree.blobs;
        Report::new(
            path.as_deref(),
            blobs,
            options.compressor,
            "total_build",
            start,
        )
        .write_pretty(json)?;
    }
    tracing::info!("built {} in {:.2?}", args.source.display(), start.elapsed());
    // The process ends here: the system takes its memory back faster than destructors do.
    std::mem::forget((engine, layer));
    Ok(())
}

/// Rules between options that are checked in this order, with messages that others
/// look for.
fn check_usage(args: &Args) -> Result<(), UsageError> {
    let usage = |message: String| Err(UsageError(message));
    if args.blob_cache_dir.is_some() {
        let conflicts = [
            (args.blob_dir.is_some(), "--blob-dir <blob-dir>"),
            (args.blob.is_some(), "--blob <blob>"),
            (args.blob_inline_meta, "--blob-inline-meta"),
            (args.compressor.is_some(), "--compressor <compressor>"),
        ];
        if let Some((_, option)) = conflicts.iter().find(|(given, _)| *given) {
            return usage(format!(
                "the argument '{option}' cannot be used with '--blob-cache-dir <blob-cache-dir>'"
            ));
        }
        if matches!(
            args.conversion,
            Conversion::TarTarfs
                | Conversion::EstargztocRef
                | Conversion::EstargzRafs
                | Conversion::EstargzRef
        ) {
            let conversion = args.conversion;
            return usage(format!(
                "conversion type `{conversion}` conflicts with `--blob-cache-dir`"
            ));
        }
    } else if args.blob.is_none() && args.blob_dir.is_none() {
        return usage("one of --blob and --blob-dir is needed for the data blob".to_owned());
    }
    if args.bootstrap.is_none() && args.blob_dir.is_none() && !args.blob_inline_meta {
        return usage(
            "one of --bootstrap, --blob-dir and --blob-inline-meta is needed for the bootstrap"
                .to_owned(),
        );
    }
    if let Some(size) = args.chunk_size.filter(|size| !is_chunk_size(*size)) {
        return usage(format!(
            "--chunk-size {size:#x} is not a power of two from 0x1000 to 0x1000000"
        ));
    }
    if args.batch_size != 0 {
        let limit = args.chunk_size.unwrap_or(DEFAULT_CHUNK_SIZE);
        if !is_chunk_size(args.batch_size) || args.batch_size > limit {
            return usage(format!(
                "--batch-size {:#x} is not 0 or a power of two from 0x1000 to the chunk size {limit:#x}",
                args.batch_size
            ));
        }
    }
    if args.conversion == Conversion::TargzRef {
        let conflicts = [
            (args.blob_id.is_some(), "--blob-id"),
            (args.batch_size != 0, "--batch-size"),
            (args.encrypt, "--encrypt"),
            (
                args.prefetch_policy == Policy::Blob,
                "--prefetch-policy blob",
            ),
        ];
        if let Some((_, option)) = conflicts.iter().find(|(given, _)| *given) {
            return usage(format!(
                "{option} cannot be used with --type targz-ref: the data blob stays what it is"
            ));
        }
    }
    if args.fs_version == "5" && args.features.is_some() {
        return usage("--features blob-toc needs --fs-version 6".to_owned());
    }
    Ok(())
}

/// Whether the format has chunks of `size` bytes.
pub(crate) const fn is_chunk_size(size: u32) -> bool {
    size.is_power_of_two() && size >= 0x1000 && size <= 0x100_0000
}

/// Refuses what is not built yet, by the name of the feature.
fn check_supported(args: &Args) -> anyhow::Result<()> {
    let type_is_supported = matches!(
        args.conversion,
        Conversion::DirRafs | Conversion::TarRafs | Conversion::TargzRafs | Conversion::TargzRef
    );
    let missing = [
        (!type_is_supported, "this --type"),
        (args.fs_version == "5", "RAFS version 5 (--fs-version 5)"),
        (args.encrypt, "encryption (--encrypt)"),
        (args.attributes.is_some(), "external data (--attributes)"),
        (
            args.external_blob.is_some(),
            "external data (--external-blob)",
        ),
        (
            args.blob_offset != 0,
            "data that does not start at 0 (--blob-offset)",
        ),
    ];
    match missing.iter().find(|(asked, _)| *asked) {
        Some((_, feature)) if !type_is_supported => {
            bail!("{feature} is not supported: {}", args.conversion)
        }
        Some((_, feature)) => bail!("{feature} is not supported"),
        None => Ok(()),
    }
}

/// The parent image; an empty path means none.
fn parent(args: &Args) -> Option<&Path> {
    args.parent_bootstrap
        .as_deref()
        .filter(|path| !path.as_os_str().is_empty())
}

fn options(args: &Args) -> anyhow::Result<BuildOptions> {
    if args.config.is_some() {
        tracing::warn!("--config has no effect on create");
    }
    if let Some(id) = &args.blob_id {
        BlobId::new(id).context("--blob-id")?;
    }
    let prefetch = Prefetch::read(args.prefetch_policy, std::io::stdin().lock())
        .context("cannot read prefetch patterns from standard input")?;
    let options = BuildOptions {
        compressor: match &args.blob_cache_dir {
            // The daemon's cache is not compressed.
            Some(_) => Compressor::None,
            None => args.compressor.unwrap_or(Compressor::Zstd),
        },
        level: args.compression_level,
        digester: args.digester,
        chunk_size: args.chunk_size.unwrap_or(DEFAULT_CHUNK_SIZE),
        batch_size: args.batch_size,
        blob_toc: args.features.is_some(),
        inline_bootstrap: args.blob_inline_meta,
        explicit_uid_gid: !args.repeatable,
        whiteouts: match args.whiteout_spec {
            Whiteouts::Oci => WhiteoutSpec::Oci,
            Whiteouts::Overlayfs => WhiteoutSpec::Overlayfs,
            Whiteouts::None => WhiteoutSpec::None,
        },
        prefetch,
        ..BuildOptions::default()
    };
    Ok(if args.conversion == Conversion::TargzRef {
        options.in_place()
    } else {
        options
    })
}

/// Reads the chunk dictionary and the parent image. Chunks of the dictionary come
/// first.
fn reuse(args: &Args, options: &mut BuildOptions) -> anyhow::Result<()> {
    let mut known = Known::default();
    if let Some(value) = &args.chunk_dict {
        let dictionary = Reused::dictionary(value)?;
        dictionary.check(&options.traits())?;
        known.add(&dictionary, options.digester)?;
    }
    if let Some(path) = parent(args) {
        let parent = Reused::open(path).context("cannot use --parent-bootstrap")?;
        parent.check(&options.traits())?;
        known.add(&parent, options.digester)?;
        options.parent = Some(Arc::new(parent.tree()?));
    }
    options.known = Arc::new(known);
    Ok(())
}

fn open_source(args: &Args) -> anyhow::Result<Source> {
    if args.conversion == Conversion::DirRafs {
        return Ok(Source::Directory(args.source.clone()));
    }
    let name = args.source.display().to_string();
    if args.conversion == Conversion::TargzRef {
        let layer = if name == "-" {
            InPlace::open(std::io::stdin())
        } else {
            std::fs::File::open(&args.source).and_then(InPlace::open)
        };
        let layer = layer.with_context(|| format!("cannot read {name}"))?;
        return Ok(Source::InPlace { name, layer });
    }
    let (compression, reader) = if name == "-" {
        compressed::open(std::io::stdin())
    } else {
        std::fs::File::open(&args.source).and_then(compressed::open)
    }
    .with_context(|| format!("cannot read {name}"))?;
    tracing::debug!("{name}: compression {compression:?}");
    Ok(Source::Tar { name, reader })
}

/// The file that gets the blob, or the data of a cache.
fn open_blob(args: &Args) -> anyhow::Result<Output> {
    let dir = args.blob_dir.as_ref().or(args.blob_cache_dir.as_ref());
    match (&args.blob, dir) {
        (Some(path), _) => Output::create(path),
        (None, Some(dir)) => Output::create_in(dir),
        (None, None) => bail!("there is no place for the data blob"),
    }
}

/// Options that fill `data` with what a daemon's cache has once everything was read.
fn cached(options: BuildOptions, data: &Output) -> anyhow::Result<BuildOptions> {
    let data = data.regular().context("a cache is made of regular files")?;
    let data = data
        .try_clone()
        .context("cannot use the file of the cache")?;
    let in_place = options.compressor == Compressor::Gzip;
    let options = options.plain_into(data);
    // The layer stays as it is, and is called gzip whatever it is.
    Ok(if in_place {
        options.in_place()
    } else {
        options
    })
}

/// A bootstrap that is written but has no name yet, and the name it will get in a
/// directory.
type Pending = (Output, String);

/// Writes the bootstrap; `None` if it is in the blob.
fn write_bootstrap(
    args: &Args,
    options: &BuildOptions,
    layer: &Layer,
) -> anyhow::Result<Option<Pending>> {
    let mut output = match (&args.bootstrap, &args.blob_dir) {
        _ if args.blob_inline_meta => return Ok(None),
        (Some(path), _) => Output::create(path)?,
        (None, Some(dir)) => Output::create_in(dir)?,
        (None, None) => bail!("there is no place for the bootstrap"),
    };
    let bytes = rafs::writer::write(&layer.tree, &options.write_options(&layer.tree))
        .context("cannot write the bootstrap")?;
    output
        .write_all(&bytes)
        .context("cannot write the bootstrap")?;
    let name = Digest::from_bytes(Sha256::digest(&bytes).into()).to_string();
    Ok(Some((output, name)))
}

/// Gives the blob its name.
fn commit_blob(blob: Output, layer: &Layer) -> anyhow::Result<()> {
    if layer.blob.file_size == 0 {
        return blob.discard();
    }
    let own = layer.own.and_then(|own| layer.tree.blobs.get(own));
    let id = match own {
        // The file with the tables, not the layer that has the data.
        Some(info) if info.features.contains(BlobFeatures::SEPARATE) => &layer.blob.id,
        // Perhaps --blob-id.
        Some(info) => &info.id,
        None => &layer.blob.id,
    };
    blob.commit(id.as_str()).map(|_| ())
}

/// Completes the files of a cache, under the names by which a daemon finds them.
fn commit_cache(data: Output, layer: &Layer) -> anyhow::Result<()> {
    let own = layer.own.and_then(|own| layer.tree.blobs.get(own));
    let (Some(info), Some(file)) = (own, data.regular()) else {
        return data.discard();
    };
    file.set_len(info.uncompressed_size)
        .context("cannot make the data of the cache as long as the blob")?;
    let data = data.commit(&format!("{}.blob.data", info.id))?;
    write_file(&data.with_extension("meta"), &layer.blob.cct)
}
