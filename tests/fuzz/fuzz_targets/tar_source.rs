//! A hostile layer: build it, write the bootstrap, and read that back.
//!
//! Beyond "no panic": a layer that was built gives a bootstrap that our own
//! reader verifies, and the same layer builds to the same bytes again. A layer that
//! is used in place goes through the reader of gzip blocks as well.
#![no_main]

use std::io::{self, Cursor};
use std::sync::OnceLock;

use libfuzzer_sys::fuzz_target;
use nydus_image::build::{BuildOptions, build_layer};
use nydus_image::pipeline::Engine;
use nydus_image::source::{InPlace, Source};
use rafs::{Image, writer};

fuzz_target!(|data: &[u8]| {
    let in_place = data
        .first()
        .is_some_and(|selector| selector & IN_PLACE != 0);
    let factor = if in_place { FACTOR * INFLATE } else { FACTOR };
    fuzz::memory::bounded(data.len(), BASE, factor, || check(data));
});

/// Bit of the first byte: the rest is a tar or tar.gz that stays the blob.
const IN_PLACE: u8 = 32;

/// Deflate makes so much of a byte, at most.
const INFLATE: usize = 1032;

/// Memory that an input may take: the engine's buffers, and so many times its
/// length. A tar header of 512 bytes becomes an inode of the tree.
const BASE: usize = 80 << 20;
const FACTOR: usize = 64;

fn check(data: &[u8]) {
    let Some((&selector, tar)) = data.split_first() else {
        return;
    };
    let options = BuildOptions {
        chunk_size: 0x1000 << (selector & 3),
        batch_size: if selector & 4 == 0 { 0 } else { 0x1000 },
        blob_toc: selector & 8 != 0,
        ..BuildOptions::default()
    };
    let in_place = selector & IN_PLACE != 0;
    let options = if in_place {
        options.in_place()
    } else {
        options
    };
    let Some(first) = build(tar, &options, in_place) else {
        return;
    };
    let image = Image::from_bytes(first.clone()).expect("own bootstrap");
    image.verify_tree().expect("own bootstrap");
    if selector & 16 != 0 {
        assert!(
            Some(first) == build(tar, &options, in_place),
            "a second build differs"
        );
    }
}

fn build(tar: &[u8], options: &BuildOptions, in_place: bool) -> Option<Vec<u8>> {
    static ENGINE: OnceLock<Engine> = OnceLock::new();
    let engine = ENGINE.get_or_init(|| Engine::new(1, 64 << 20));
    let reader = Box::new(Cursor::new(tar.to_vec()));
    let name = "input".into();
    let source = match in_place {
        true => Source::InPlace {
            name,
            layer: InPlace::open(reader).ok()?,
        },
        false => Source::Tar { name, reader },
    };
    let layer = build_layer(engine, source, options, io::sink()).ok()?;
    // Limits of the format (names, sizes) may refuse the tree; that is no finding.
    writer::write(&layer.tree, &options.write_options(&layer.tree)).ok()
}
