//! A hostile layer: build it, write the bootstrap, and read that back.
//!
//! Beyond "no panic": a layer that was built gives a bootstrap that our own
//! reader verifies, and the same layer builds to the same bytes again.
#![no_main]

use std::io::{self, Cursor};
use std::sync::OnceLock;

use libfuzzer_sys::fuzz_target;
use nydus_image::build::{BuildOptions, build_layer};
use nydus_image::pipeline::Engine;
use nydus_image::source::Source;
use rafs::{Image, writer};

fuzz_target!(|data: &[u8]| fuzz::memory::bounded(data.len(), BASE, FACTOR, || check(data)));

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
    let Some(first) = build(tar, &options) else {
        return;
    };
    let image = Image::from_bytes(first.clone()).expect("own bootstrap");
    image.verify_tree().expect("own bootstrap");
    if selector & 16 != 0 {
        assert!(
            Some(first) == build(tar, &options),
            "a second build differs"
        );
    }
}

fn build(tar: &[u8], options: &BuildOptions) -> Option<Vec<u8>> {
    static ENGINE: OnceLock<Engine> = OnceLock::new();
    let engine = ENGINE.get_or_init(|| Engine::new(1, 64 << 20));
    let reader = Box::new(Cursor::new(tar.to_vec()));
    let source = Source::Tar {
        name: "input".into(),
        reader,
    };
    let layer = build_layer(engine, source, options, io::sink()).ok()?;
    // Limits of the format (names, sizes) may refuse the tree; that is no finding.
    writer::write(&layer.tree, &options.write_options(&layer.tree)).ok()
}
