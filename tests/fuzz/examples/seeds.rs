//! `seeds CORPUS [STORED]`: writes the first inputs of every fuzz target below
//! CORPUS: from the golden image, from small layers built here with every kind of
//! blob, and from the stored images below STORED, if given.
//!
//! Inputs are named by what they are, so that a second run changes nothing.

use std::fs;
use std::io::{Cursor, Write as _};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use flate2::Compression;
use flate2::write::GzEncoder;
use libfuzzer_sys as _;
use nydus_image::build::{BuildOptions, build_layer};
use nydus_image::pipeline::Engine;
use nydus_image::source::Source;
use rafs::{Image, writer};
use storage::format::toc::{self, Tail};
use storage::format::{stored_table, tar_header};
use storage::{BlobFeatures, BlobInfo, Compressor};
use tar::{Builder, EntryType, Header};

/// Larger inputs slow a fuzzer down more than they teach it.
const LARGEST: usize = 256 << 10;

/// What clients of the control socket send: method, path and query.
const REQUESTS: [(&str, &str); 8] = [
    ("daemon", "GET\n/api/v1/daemon"),
    ("mount", "POST\n/api/v1/mount?mountpoint=%2F12"),
    ("remount", "PUT\n/api/v1/mount?mountpoint=/a/b"),
    ("umount", "DELETE\n/api/v1/mount?mountpoint=/a%2Fb&x=y"),
    ("config", "PUT\n/api/v1/config?id=/"),
    ("files", "GET\n/api/v1/metrics/files?id=/1&latest=true"),
    ("exit", "PUT\n/api/v1/daemon/exit?unmount=true"),
    ("nowhere", "PATCH\n/api/v3/%zz?%=&&=%2"),
];

/// An event of the kernel, with records of these types and lengths of their content.
fn event(records: &[(u8, u16)]) -> Vec<u8> {
    let mut bytes = vec![0, 0, 0, 0, 3, 0, 24, 0];
    bytes.extend(0x0010_0000_u64.to_ne_bytes());
    bytes.extend(5_u32.to_ne_bytes());
    bytes.extend(1000_u32.to_ne_bytes());
    for (kind, content) in records {
        // Type, padding, length, and padding up to the content.
        let head = if *kind == 6 { 8 } else { 4 };
        bytes.extend([*kind, 0]);
        bytes.extend((head + content).to_ne_bytes());
        bytes.resize(bytes.len() + usize::from(head + content) - 4, 1);
    }
    let len = u32::try_from(bytes.len()).unwrap_or(u32::MAX);
    bytes[..4].copy_from_slice(&len.to_ne_bytes());
    bytes
}

/// Instrumented crates call libFuzzer's runtime, which wants a target to exist.
#[unsafe(no_mangle)]
extern "C" fn rust_fuzzer_test_input(_: *const u8, _: usize) -> i32 {
    0
}

fn main() -> Result<()> {
    let mut args = std::env::args_os().skip(1).map(PathBuf::from);
    let corpus = Corpus(args.next().context("usage: seeds CORPUS [STORED]")?);
    let golden = include_bytes!("../../../rafs/tests/data/tiny.boot");
    corpus.put("bootstrap", "golden", golden)?;
    let layer = layer()?;
    for (name, options) in variants() {
        corpus.layer(name, &layer, &options)?;
    }
    for selector in [0, 1, 4, 8, 0x15] {
        let input = [&[selector], layer.as_slice()].concat();
        corpus.put("tar_source", &format!("layer-{selector}"), &input)?;
    }
    for level in [0, 1, 9] {
        let mut gzip = GzEncoder::new(vec![32 | 8 | 16], Compression::new(level));
        gzip.write_all(&layer)?;
        corpus.put("tar_source", &format!("gzip-{level}"), &gzip.finish()?)?;
    }
    for (name, request) in REQUESTS {
        corpus.put("api_request", name, request.as_bytes())?;
    }
    corpus.put("event", "real", &event(&[(6, 16)]))?;
    corpus.put("event", "two-records", &event(&[(9, 4), (6, 16)]))?;
    corpus.put("event", "no-range", &event(&[]))?;
    match args.next() {
        Some(stored) => corpus.stored(&stored),
        None => Ok(()),
    }
}

struct Corpus(PathBuf);

impl Corpus {
    fn put(&self, target: &str, name: &str, bytes: &[u8]) -> Result<()> {
        if bytes.len() > LARGEST {
            return Ok(());
        }
        let dir = self.0.join(target);
        fs::create_dir_all(&dir)?;
        fs::write(dir.join(name), bytes).with_context(|| format!("{target}/{name}"))
    }

    /// Bootstrap, chunk table and end of a layer built with `options`.
    fn layer(&self, name: &str, tar: &[u8], options: &BuildOptions) -> Result<()> {
        let reader = Box::new(Cursor::new(tar.to_vec()));
        let source = Source::Tar {
            name: name.into(),
            reader,
        };
        let mut blob = Vec::new();
        let layer = build_layer(&Engine::new(1, 64 << 20), source, options, &mut blob)?;
        let bootstrap = writer::write(&layer.tree, &options.write_options(&layer.tree))?;
        Image::from_bytes(bootstrap.clone())?.verify_tree()?;
        self.put("bootstrap", name, &bootstrap)?;
        self.blob(name, &blob)?;
        let info = layer.blob.info.context("the layer has data")?;
        self.table(name, &info, &blob)
    }

    fn table(&self, name: &str, info: &BlobInfo, file: &[u8]) -> Result<()> {
        let range = stored_table::stored_range(info)?;
        let range = usize::try_from(range.start)?..usize::try_from(range.end)?;
        let stored = file.get(range).context("no table in the file")?;
        let input = fuzz::encode_table_input(info, stored);
        // A seed that the target gives up on at once would teach it nothing.
        let (info, stored) = fuzz::decode_table_input(&input).context("an input too short")?;
        stored_table::open(&info, stored).with_context(|| format!("table of {name}"))?;
        self.put("blob_meta", name, &input)
    }

    /// The end of a blob file, and its last tar header alone.
    fn blob(&self, name: &str, file: &[u8]) -> Result<()> {
        let start = file.len() - file.len().min(8192);
        self.put("toc", name, &file[start..])?;
        let header = file.len() - file.len().min(tar_header::SIZE);
        self.put("toc", &format!("{name}-header"), &file[header..])
    }

    /// Every file of every folder below `root`, as what it is.
    fn stored(&self, root: &Path) -> Result<()> {
        for folder in files(root)?.into_iter().filter(|p| p.is_dir()) {
            let folder_name = name_of(&folder);
            for path in files(&folder)? {
                let name = format!(
                    "{folder_name}-{}",
                    &name_of(&path)[..name_of(&path).len().min(8)]
                );
                let bytes = fs::read(&path)?;
                if path.extension().is_some_and(|e| e == "tar") {
                    self.put("tar_source", &name, &[&[0], bytes.as_slice()].concat())?;
                } else if bytes.starts_with(&[0x1f, 0x8b]) {
                    self.put("tar_source", &name, &[&[32], bytes.as_slice()].concat())?;
                } else if let Ok(image) = Image::from_bytes(bytes.clone()) {
                    self.put("bootstrap", &name, &bytes)?;
                    self.tables(&name, &image, &folder)?;
                } else {
                    self.blob(&name, &bytes)?;
                    self.inlined(&name, &bytes)?;
                }
            }
        }
        Ok(())
    }

    fn tables(&self, name: &str, image: &Image, folder: &Path) -> Result<()> {
        for (index, info) in image.blobs().iter().enumerate() {
            let separate = info.features.contains(BlobFeatures::SEPARATE);
            let id = info.id.to_string();
            let file = if separate {
                info.meta_blob_digest.to_string()
            } else {
                id
            };
            let file = fs::read(folder.join(file)).context("blob of a stored image")?;
            self.table(&format!("{name}-{index}"), info, &file)?;
        }
        Ok(())
    }

    /// The bootstrap of a blob that ends with one, and the table it describes.
    fn inlined(&self, name: &str, file: &[u8]) -> Result<()> {
        let start = file.len() - usize::try_from(toc::tail_size(u64::try_from(file.len())?))?;
        if let Ok(Tail::Bootstrap { size }) = toc::locate(&file[start..]) {
            let end = file.len() - tar_header::SIZE;
            let bootstrap = &file[end - usize::try_from(size)?..end];
            self.put("bootstrap", name, bootstrap)?;
            let image = Image::from_bytes(bootstrap.to_vec())?;
            self.table(name, &image.blobs()[0], file)?;
        }
        Ok(())
    }
}

fn files(dir: &Path) -> Result<Vec<PathBuf>> {
    let entries = fs::read_dir(dir).with_context(|| dir.display().to_string())?;
    entries.map(|e| Ok(e?.path())).collect()
}

fn name_of(path: &Path) -> String {
    path.file_name()
        .unwrap_or_default()
        .to_string_lossy()
        .into_owned()
}

/// One of each kind of blob that our builder writes.
fn variants() -> [(&'static str, BuildOptions); 6] {
    let base = BuildOptions {
        chunk_size: 0x1000,
        ..BuildOptions::default()
    };
    [
        ("plain", base.clone()),
        (
            "lz4",
            BuildOptions {
                compressor: Compressor::Lz4,
                ..base.clone()
            },
        ),
        (
            "raw",
            BuildOptions {
                compressor: Compressor::None,
                ..base.clone()
            },
        ),
        (
            "batch",
            BuildOptions {
                batch_size: 0x1000,
                ..base.clone()
            },
        ),
        (
            "toc",
            BuildOptions {
                blob_toc: true,
                ..base.clone()
            },
        ),
        (
            "inline",
            BuildOptions {
                inline_bootstrap: true,
                blob_toc: true,
                ..base
            },
        ),
    ]
}

/// A layer with an entry of every type.
fn layer() -> Result<Vec<u8>> {
    let mut tar = Builder::new(Vec::new());
    entry(&mut tar, "dir/", EntryType::Directory, None, b"")?;
    entry(&mut tar, "dir/small", EntryType::Regular, None, b"small")?;
    entry(&mut tar, "dir/again", EntryType::Regular, None, b"small")?;
    let large: Vec<u8> = (0..9000_u32)
        .flat_map(|n| n.to_le_bytes())
        .take(10_000)
        .collect();
    entry(&mut tar, "large", EntryType::Regular, None, &large)?;
    entry(&mut tar, "hard", EntryType::Link, Some("large"), b"")?;
    entry(&mut tar, "sym", EntryType::Symlink, Some("dir/small"), b"")?;
    entry(&mut tar, "char", EntryType::Char, None, b"")?;
    entry(&mut tar, "block", EntryType::Block, None, b"")?;
    entry(&mut tar, "fifo", EntryType::Fifo, None, b"")?;
    entry(&mut tar, "dir/.wh.gone", EntryType::Regular, None, b"")?;
    // Over 100 bytes: a GNU long name.
    let long = format!("{}/file", "long".repeat(40));
    entry(&mut tar, &long, EntryType::Regular, None, b"long")?;
    let records: [(&str, &[u8]); 3] = [
        ("SCHILY.xattr.user.a", b"\0value"),
        ("mtime", b"1700000000.5"),
        ("uid", b"100000"),
    ];
    tar.append_pax_extensions(records)?;
    entry(&mut tar, "pax", EntryType::Regular, None, b"pax")?;
    Ok(tar.into_inner()?)
}

fn entry(
    tar: &mut Builder<Vec<u8>>,
    path: &str,
    kind: EntryType,
    link: Option<&str>,
    data: &[u8],
) -> Result<()> {
    let mut header = Header::new_gnu();
    header.set_entry_type(kind);
    header.set_mode(0o644);
    header.set_uid(1000);
    header.set_gid(1000);
    header.set_mtime(1_700_000_000);
    header.set_size(u64::try_from(data.len())?);
    if matches!(kind, EntryType::Char | EntryType::Block) {
        header.set_device_major(1)?;
        header.set_device_minor(3)?;
    }
    match link {
        Some(link) => tar.append_link(&mut header, path, link)?,
        None => tar.append_data(&mut header, path, data)?,
    }
    Ok(())
}
