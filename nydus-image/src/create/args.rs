//! Options of `create`. Names, defaults and conflicts are an interface: other
//! programs write these command lines, and read `create -h` to find out what the
//! builder can do.

use std::path::PathBuf;

use clap::ValueEnum;
use storage::codec::DEFAULT_ZSTD_LEVEL;
use storage::{Compressor, Digester};

use crate::cli::{parse_size, path_or_empty};
use crate::prefetch::Policy;

/// Build a bootstrap and a data blob from a directory or a tar archive
///
/// The bootstrap holds the names and attributes of all files; the blob holds
/// their data, cut into chunks that can be fetched one by one. Where the bootstrap
/// goes is told by --bootstrap (a file), --blob-inline-meta (into the blob) or
/// --blob-dir; where the blob goes by --blob or --blob-dir. Both are written
/// completely or not at all, except into FIFOs.
///
/// Examples:
///
///   nydus-image create --bootstrap app.boot --blob-dir blobs rootfs/
///
///   tar -C rootfs -c . | nydus-image create -t tar-rafs -B app.boot -D blobs /dev/stdin
///
/// With --type targz-ref the archive itself stays the data blob, as an OCI layer in a
/// registry does, and what is written is a small index of it. Put both into the blob
/// directory of a mount, the archive under its SHA-256:
///
///   nydus-image create -t targz-ref -B app.boot -D blobs layer.tar.gz
#[derive(Debug, clap::Args)]
#[command(verbatim_doc_comment)]
pub struct Args {
    /// Directory, archive, FIFO or character device to read; `-` is standard input
    #[arg(value_name = "SOURCE")]
    pub source: PathBuf,

    /// What SOURCE is and what is made of it
    #[arg(
        short = 't',
        long = "type",
        alias = "source-type",
        value_name = "type",
        default_value = "dir-rafs",
        help_heading = "Input"
    )]
    pub conversion: Conversion,

    /// Which entries mean that a file of a lower layer is gone
    ///
    /// Directory builds leave such entries out, because one layer alone has nothing
    /// to remove; `none` keeps them for a later merge. Tar builds always keep them.
    #[arg(
        long,
        value_name = "whiteout-spec",
        default_value = "oci",
        help_heading = "Input"
    )]
    pub whiteout_spec: Whiteouts,

    /// What to do with the prefetch patterns on standard input
    ///
    /// With `fs` and `blob`, absolute paths are read from standard input, one a
    /// line, until its end.
    #[arg(
        long,
        value_name = "prefetch-policy",
        default_value = "none",
        help_heading = "Input"
    )]
    pub prefetch_policy: Policy,

    /// File with attributes of single files (external data); not supported
    #[arg(long, value_name = "attributes", help_heading = "Input")]
    pub attributes: Option<PathBuf>,

    /// Configuration file; accepted, without effect on this command
    #[arg(short = 'C', long, value_name = "config", help_heading = "Input")]
    pub config: Option<PathBuf>,

    /// File to write the bootstrap to
    #[arg(
        short = 'B',
        long,
        value_name = "bootstrap",
        conflicts_with = "blob_inline_meta",
        help_heading = "Output"
    )]
    pub bootstrap: Option<PathBuf>,

    /// File or FIFO to write the data blob to; comes before --blob-dir
    #[arg(short = 'b', long, value_name = "blob", help_heading = "Output")]
    pub blob: Option<PathBuf>,

    /// Existing directory for the blob, named by its id, and for the bootstrap if
    /// --bootstrap is not given
    #[arg(short = 'D', long, value_name = "blob-dir", help_heading = "Output")]
    pub blob_dir: Option<PathBuf>,

    /// Existing directory for cache files instead of a blob: ID.blob.data and ID.blob.meta,
    /// as a daemon has them once everything was read
    #[arg(long, value_name = "blob-cache-dir", help_heading = "Output")]
    pub blob_cache_dir: Option<PathBuf>,

    /// Embed the bootstrap in the blob
    #[arg(long, alias = "inline-bootstrap", help_heading = "Output")]
    pub blob_inline_meta: bool,

    /// Id of the blob instead of its SHA-256
    #[arg(
        long,
        value_name = "blob-id",
        conflicts_with = "blob_inline_meta",
        help_heading = "Output"
    )]
    pub blob_id: Option<String>,

    /// Size of the data blob, for estargztoc-ref; not supported
    #[arg(long, value_name = "blob-data-size", help_heading = "Output")]
    pub blob_data_size: Option<String>,

    /// Start of the data in the blob
    #[arg(long, value_name = "blob-offset", default_value = "0", hide = true)]
    pub blob_offset: u64,

    /// Blob for files marked as external; not supported
    #[arg(long, value_name = "external-blob", help_heading = "Output")]
    pub external_blob: Option<PathBuf>,

    /// File to write a JSON report to
    #[arg(short = 'J', long, value_name = "output-json", help_heading = "Output")]
    pub output_json: Option<PathBuf>,

    /// Largest chunk in bytes: a power of two from 0x1000 to 0x1000000 [default: 0x100000]
    ///
    /// Smaller chunks fetch less for a small read and find more duplicates; larger
    /// ones compress better and make smaller bootstraps.
    #[arg(long, value_name = "chunk-size", value_parser = parse_size, help_heading = "Format")]
    pub chunk_size: Option<u32>,

    /// Compress small files together in batches of this many bytes; 0 is off
    ///
    /// A power of two from 0x1000 to the chunk size. Batches make images of many small
    /// files smaller; reading one small file then fetches its neighbours as well.
    #[arg(
        long,
        value_name = "batch-size",
        default_value = "0",
        value_parser = parse_size,
        help_heading = "Format"
    )]
    pub batch_size: u32,

    /// How chunks are compressed: none, lz4_block or zstd [default: zstd]
    #[arg(long, value_name = "compressor", help_heading = "Format")]
    pub compressor: Option<Compressor>,

    /// How hard zstd tries: 1 is fastest, 19 smallest
    #[arg(
        long,
        value_name = "level",
        default_value_t = DEFAULT_ZSTD_LEVEL,
        value_parser = clap::value_parser!(i32).range(1..=19),
        help_heading = "Format"
    )]
    pub compression_level: i32,

    /// How chunks are identified and verified: blake3 or sha256
    #[arg(
        long,
        value_name = "digester",
        default_value = "blake3",
        help_heading = "Format"
    )]
    pub digester: Digester,

    /// Version of the metadata format; 5 is not supported
    #[arg(
        short = 'v',
        long,
        value_name = "fs-version",
        default_value = "6",
        value_parser = ["5", "6"],
        help_heading = "Format"
    )]
    pub fs_version: String,

    /// Extra features of the blob: a table of contents and inlined chunk digests
    #[arg(long, value_name = "features", value_parser = ["blob-toc"], help_heading = "Format")]
    pub features: Option<String>,

    /// Align chunks in the uncompressed blob; always so in version 6
    #[arg(long, help_heading = "Format")]
    pub aligned_chunk: bool,

    /// Store neither owners nor the time of the root, so that builds elsewhere are equal
    #[arg(long, help_heading = "Format")]
    pub repeatable: bool,

    /// Encrypt the blob; not supported
    #[arg(short = 'E', long, help_heading = "Format")]
    pub encrypt: bool,

    /// Accepted without effect
    #[arg(long, hide = true)]
    pub disable_check: bool,

    /// Do not store chunks that this image has: bootstrap=PATH or PATH
    #[arg(long, value_name = "chunk-dict", help_heading = "Reuse")]
    pub chunk_dict: Option<String>,

    /// Build on top of this image: the output describes both
    #[arg(
        long,
        value_name = "parent-bootstrap",
        value_parser = path_or_empty(),
        help_heading = "Reuse"
    )]
    pub parent_bootstrap: Option<PathBuf>,
}

/// What is read and what is made of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Conversion {
    /// A directory, into chunks
    #[value(name = "dir-rafs", alias = "directory")]
    DirRafs,
    /// An eStargz layer, into chunks; not supported
    #[value(name = "estargz-rafs")]
    EstargzRafs,
    /// An eStargz layer, used in place; not supported
    #[value(name = "estargz-ref")]
    EstargzRef,
    /// The table of contents of an eStargz layer; not supported
    #[value(name = "estargztoc-ref", alias = "stargz_index")]
    EstargztocRef,
    /// A tar archive, into chunks
    #[value(name = "tar-rafs")]
    TarRafs,
    /// A tar archive, used in place; not supported
    #[value(name = "tar-tarfs")]
    TarTarfs,
    /// A gzip-compressed tar archive, into chunks
    #[value(name = "targz-rafs")]
    TargzRafs,
    /// A tar archive, gzip-compressed or not, used in place: the output is its index
    #[value(name = "targz-ref")]
    TargzRef,
}

impl std::fmt::Display for Conversion {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let value = self.to_possible_value();
        f.write_str(
            value
                .as_ref()
                .map_or("", clap::builder::PossibleValue::get_name),
        )
    }
}

/// Names of [`rafs::merge::WhiteoutSpec`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Whiteouts {
    /// Names that start with `.wh.`
    Oci,
    /// Character devices 0:0 and opaque directories
    Overlayfs,
    /// No entries
    None,
}
