//! `oracle read BOOT BLOB_DIR` prints one JSON line per entry of an image, as the
//! published crates read it; `oracle dir DIR` prints the same for a directory;
//! `oracle build SOURCE OUT [key=value...]` builds an image with their builder.

use std::path::Path;

use anyhow::{Context, Result, bail};
use oracle::describe::Entry;
use oracle::matrix::{Compressor, Digester, Options, Source};
use oracle::{build, describe, read};

fn main() -> Result<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    match args.as_slice() {
        ["read", boot, blobs] => print(&read::image(Path::new(boot), Path::new(blobs))?),
        ["dir", dir] => print(&describe::directory(Path::new(dir))?),
        ["build", source, out, options @ ..] => {
            let built = build::image(Path::new(source), &parse(options)?, Path::new(out))?;
            println!("{} {}", built.boot.display(), built.blob_dir.display());
        }
        _ => bail!(
            "usage: oracle read BOOT BLOB_DIR | dir DIR | build SOURCE OUT \
             [type= compressor= digester= chunk-size= batch-size= toc inline]"
        ),
    }
    Ok(())
}

fn print(tree: &[Entry]) {
    for entry in tree {
        println!("{}", entry.to_json());
    }
}

fn parse(words: &[&str]) -> Result<Options> {
    let mut options = Options {
        compressor: Compressor::Zstd,
        digester: Digester::Blake3,
        chunk_size: 0x10_0000,
        batch_size: 0,
        blob_toc: false,
        inline_meta: false,
        source: Source::Dir,
    };
    for word in words {
        let (key, value) = word.split_once('=').unwrap_or((word, ""));
        match (key, value) {
            ("type", "dir-rafs") => options.source = Source::Dir,
            ("type", "tar-rafs") => options.source = Source::Tar,
            ("type", "targz-rafs") => options.source = Source::Targz,
            ("type", "targz-ref") => {
                options.source = Source::TargzRef;
                options.compressor = Compressor::Gzip;
                options.digester = Digester::Sha256;
            }
            ("compressor", "none") => options.compressor = Compressor::None,
            ("compressor", "lz4_block") => options.compressor = Compressor::Lz4,
            ("compressor", "zstd") => options.compressor = Compressor::Zstd,
            ("digester", "blake3") => options.digester = Digester::Blake3,
            ("digester", "sha256") => options.digester = Digester::Sha256,
            ("chunk-size", n) => options.chunk_size = number(n)?,
            ("batch-size", n) => options.batch_size = number(n)?,
            ("toc", "") => options.blob_toc = true,
            ("inline", "") => options.inline_meta = true,
            _ => bail!("unknown option {word}"),
        }
    }
    if !options.is_legal() {
        bail!("these options do not go together: {options}");
    }
    Ok(options)
}

fn number(text: &str) -> Result<u32> {
    let parsed = match text.strip_prefix("0x") {
        Some(hex) => u32::from_str_radix(hex, 16),
        None => text.parse(),
    };
    parsed.with_context(|| format!("number {text}"))
}
