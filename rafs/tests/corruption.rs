//! Damaged images give errors, never a panic, an endless walk or a huge allocation.
#![allow(clippy::unwrap_used, reason = "a failed unwrap fails the test")]

#[allow(dead_code, reason = "every test uses its part")]
mod common;

use std::ops::ControlFlow;

use common::{build, nodes, options};
use proptest::prelude::*;
use rafs::error::Error;
use rafs::tree::Attr;
use rafs::writer::write;
use rafs::{Image, Nid, Tree};

const GOLDEN: &[u8] = include_bytes!("data/tiny.boot");

/// Everything that can be asked of an image. Tells whether it was refused.
fn use_up(bytes: Vec<u8>) -> bool {
    let Ok(image) = Image::from_bytes(bytes) else {
        return true;
    };
    let refused = image.verify_tree().is_err();
    let loaded = Tree::from_image(&image);
    let dumped = rafs::dump::dump(&image);
    if !refused {
        // What is verified can be used without an error.
        dumped.unwrap();
        drop(loaded.unwrap());
    }
    let _ = image.prefetch().count();
    // Every possible inode number, whether a directory names it or not.
    let slots = image.bytes().len() / 32;
    for nid in (0..slots).map(|n| Nid::new(u64::try_from(n).unwrap())) {
        let Ok(inode) = image.inode(nid) else {
            continue;
        };
        let _ = image.xattrs(nid);
        let _ = image.readlink(nid);
        let _ = image.lookup(nid, b"f");
        let _ = image.parent(nid);
        let mut left = 1000;
        let _ = image.readdir(nid, 0, |_| {
            left -= 1;
            if left == 0 {
                ControlFlow::Break(())
            } else {
                ControlFlow::Continue(())
            }
        });
        let end = inode.size();
        let _ = image
            .extents(nid, end.saturating_sub(5000)..end)
            .take(1000)
            .count();
    }
    refused
}

#[test]
fn the_intact_image_is_accepted() {
    assert!(!use_up(GOLDEN.to_vec()));
}

#[test]
fn any_byte_may_have_any_single_bit_flipped() {
    // The rest is zero, and repeats what is tested here.
    let interesting = (1024..1600)
        .chain(0x1000..0x1110)
        .chain(0x3000..0x3400)
        .chain(0x4000..0x40f0);
    for at in interesting {
        for bit in 0..8 {
            let mut bytes = GOLDEN.to_vec();
            bytes[at] ^= 1 << bit;
            use_up(bytes);
        }
        let mut bytes = GOLDEN.to_vec();
        bytes[at] = 0xff;
        use_up(bytes);
    }
}

#[test]
fn any_length_may_be_cut_off() {
    for len in (0..GOLDEN.len())
        .step_by(64)
        .chain([1, 1023, 1025, 4095, 4097])
    {
        assert!(use_up(GOLDEN[..len].to_vec()), "{len}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(100))]

    #[test]
    fn several_bytes_may_change(
        nodes in nodes(30),
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..8),
    ) {
        let tree = build("blob", Attr::default(), &nodes);
        let mut bytes = write(&tree, &options()).unwrap();
        for (at, value) in changes {
            let at = at.index(bytes.len());
            bytes[at] = value;
        }
        use_up(bytes);
    }

    #[test]
    fn bytes_may_be_random_behind_the_magic(noise in prop::collection::vec(any::<u8>(), 3072)) {
        let mut bytes = GOLDEN.to_vec();
        bytes[1408..4096].copy_from_slice(&noise[..2688]);
        bytes[0x3000..0x3180].copy_from_slice(&noise[2688..]);
        use_up(bytes);
    }
}

/// Offset, bytes put there, field that the error names.
#[test]
fn every_rule_names_its_field() {
    let cases: &[(usize, &[u8], &str)] = &[
        (0x400, &[0], "magic"),
        (0x404, &[1], "superblock checksum"),
        (0x40b, &[0], "compatible features"),
        (0x40c, &[11], "block size bits"),
        (0x40d, &[1], "superblock extension slots"),
        (0x40e, &[0xff, 0xff], "inode number"),
        (0x410, &[0], "inode count"),
        (0x428, &[0xff], "metadata block"),
        (0x42c, &[1], "shared xattr block"),
        (0x450, &[0xd], "incompatible features"),
        (0x450, &[4], "incompatible features"),
        (0x454, &[1], "compression information"),
        (0x456, &[0], "number of blocks"),
        (0x456, &[2], "blob table size"),
        (0x456, &[255], "number of devices"),
        (0x458, &[12], "device table slot"),
        (0x480, &[0x37], "flags"),
        (0x480, &[0x3d], "flags"),
        (0x485, &[1], "flags"),
        (0x488, &[0, 8], "blob table"),
        (0x490, &[0x80, 0], "blob table"),
        (0x495, &[8], "chunk size"),
        (0x498, &[0, 0x10], "tables"),
        (0x499, &[0x50], "chunk table"),
        (0x4a0, &[0xf1], "chunk table"),
        (0x580, b"x", "device id"),
        (0x5c0, &[0], "device blocks"),
        (0x5c0, &[4], "device blocks"),
        (0x1000, b"/", "blob id"),
        (0x1040, &[1], "blob index"),
        (0x1045, &[0x20], "blob chunk size"),
        (0x1048, &[4], "chunk table uncompressed size"),
        (0x104b, &[2], "chunk count"),
        (0x104c, &[4], "chunk compressor"),
        (0x1050, &[2], "digester"),
        (0x1054, &[0x20], "blob features"),
        (0x1054, &[0xa1], "blob features"),
        (0x1055, &[0x10], "blob features"),
        (0x105d, &[1], "compressed size"),
        (0x1060, &[1], "uncompressed size"),
        (0x1068, &[1], "TOC size"),
        (0x106c, &[9], "chunk table compressor"),
        (0x1070, &[0xff; 8], "chunk table offset"),
        (0x1078, &[0x31], "chunk table compressed size"),
        (0x1078, &[0x2f], "chunk table compressed size"),
        (0x3004, &[0, 0], "file mode"),
        (0x3000, &[7], "inode format"),
        (0x3001, &[1], "inode format"),
        (0x3048, &[0], "first name offset"),
        (0x3048, &[13], "first name offset"),
        (0x3054, &[0x60], "directory entry name"),
        (0x30af, b"/", "directory entry name"),
        (0x304a, &[1], "directory entry"),
        (0x3056, &[9], "directory entry type"),
        (0x304c, &[0x86], "directory entry"),
        (0x3058, &[0xff; 7], "inode number"),
        (0x3100, &[5], "inode format"),
        (0x3110, &[1], "chunk format"),
        (0x3110, &[0x61], "chunk format"),
        (0x3109, &[0xff; 7], "inode"),
        (0x310a, &[0x40], "chunk index array"),
        (0x3142, &[0], "blob of a chunk index"),
        (0x3142, &[2], "blob of a chunk index"),
        (0x3140, &[3], "chunk of a chunk index"),
        (0x3144, &[3], "block of a chunk index"),
        (0x3144, &[1], "chunk of a file"),
        (0x3168, &[0], "symlink length"),
        (0x3169, &[0x20], "symlink length"),
        (0x31a0, &[0], "symlink target"),
        (0x31ec, &[0], "link count"),
        (
            0x31e8,
            &[0, 0xca, 0x9a, 0x3b],
            "nanoseconds of the modification time",
        ),
        (0x3244, &[1], "shared xattr count"),
        (0x324c, &[9], "xattr lengths"),
        (0x324d, &[5], "xattr prefix"),
        (0x32ac, &[0x93], "directory entry"),
        (0x4020, &[1], "blob of a chunk record"),
        (0x402c, &[0], "uncompressed size of a chunk record"),
        (0x4038, &[1], "uncompressed offset of a chunk record"),
        (0x4048, &[3], "index of a chunk record"),
    ];
    for (at, value, field) in cases {
        let mut bytes = GOLDEN.to_vec();
        bytes[*at..at + value.len()].copy_from_slice(value);
        let error = Image::from_bytes(bytes)
            .and_then(|image| image.verify_tree())
            .expect_err(field);
        match error {
            Error::Corrupt(corrupt) => assert_eq!(corrupt.field, *field, "{at:#x}: {corrupt}"),
            other => panic!("{at:#x} {field}: {other}"),
        }
    }
}

/// Offset, bytes put there, feature that the error names.
#[test]
fn unsupported_features_are_named() {
    let cases: &[(usize, &[u8], &str)] = &[
        (0, &[0x53, 0x46, 0x41, 0x52], "RAFS version 5"),
        (0x40c, &[9], "tarfs"),
        (0x481, &[3], "tarfs"),
        (0x483, &[2], "encryption"),
        (0x1054, &[0x61], "tarfs"),
        (0x1055, &[1], "encryption"),
        (0x1055, &[8], "external blobs"),
        (0x10d8, &[1], "encryption"),
    ];
    for (at, value, wanted) in cases {
        let mut bytes = GOLDEN.to_vec();
        bytes[*at..at + value.len()].copy_from_slice(value);
        match Image::from_bytes(bytes) {
            Err(Error::Unsupported { feature }) => assert_eq!(feature, *wanted),
            other => panic!("{at:#x} {wanted}: {other:?}"),
        }
    }
}

/// A directory that contains itself under another name is refused by every walk.
#[test]
fn a_directory_with_two_names_is_refused() {
    let mut bytes = GOLDEN.to_vec();
    // The entry `d` of the root leads to the root.
    bytes[0x3064] = 0x80;
    let image = Image::from_bytes(bytes).unwrap();
    assert!(matches!(image.verify_tree(), Err(Error::Corrupt(_))));
    assert!(matches!(Tree::from_image(&image), Err(Error::Corrupt(_))));
    assert!(matches!(rafs::dump::dump(&image), Err(Error::Corrupt(_))));
}
