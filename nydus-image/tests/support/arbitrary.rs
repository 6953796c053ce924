//! Arbitrary trees and build options, for properties that must hold for all of them.

use std::ffi::OsStr;
use std::fs::File;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::{FileExt as _, PermissionsExt as _, symlink};
use std::path::{Path, PathBuf};

use nix::sys::stat::{Mode, UtimensatFlags, utimensat};
use nix::sys::time::TimeSpec;
use nydus_image::build::BuildOptions;
use proptest::prelude::*;
use rafs::merge::WhiteoutSpec;
use storage::{Compressor, Digester};

pub fn set_time(path: &Path, seconds: i64, nanos: i64) {
    let time = TimeSpec::new(seconds, nanos);
    utimensat(
        nix::fcntl::AT_FDCWD,
        path,
        &time,
        &time,
        UtimensatFlags::NoFollowSymlink,
    )
    .unwrap();
}

pub fn set_mode(path: &Path, mode: u32) {
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).unwrap();
}

/// What a file of a generated tree holds.
#[derive(Debug, Clone)]
pub enum Bytes {
    Same(u8, usize),
    /// Different for every seed, and hard to compress.
    Noise(u64, usize),
    /// A hole of this length, with some data at the end or not.
    Sparse(u64, bool),
}

#[derive(Debug, Clone)]
pub enum Object {
    Directory,
    File(Bytes),
    Symlink(Vec<u8>),
    Fifo,
    HardLink(prop::sample::Index),
}

#[derive(Debug, Clone)]
pub struct Made {
    parent: prop::sample::Index,
    name: Vec<u8>,
    object: Object,
    mode: u32,
    time: (i64, i64),
    xattr: Option<(String, Vec<u8>)>,
}

pub fn bytes() -> impl Strategy<Value = Bytes> {
    prop_oneof![
        (any::<u8>(), 0..20_000_usize).prop_map(|(byte, len)| Bytes::Same(byte, len)),
        (0..4_u64, 0..20_000_usize).prop_map(|(seed, len)| Bytes::Noise(seed, len)),
        (0..4_u64, Just(4096_usize)).prop_map(|(seed, len)| Bytes::Noise(seed, len)),
        (0..3_000_000_u64, any::<bool>()).prop_map(|(len, data)| Bytes::Sparse(len, data)),
    ]
}

pub fn made() -> impl Strategy<Value = Made> {
    let name = prop::collection::vec(any::<u8>(), 1..=255).prop_filter_map("no name", |name| {
        let name: Vec<u8> = name.into_iter().filter(|b| *b != b'/' && *b != 0).collect();
        rafs::units::is_valid_name(&name).then_some(name)
    });
    let target = prop::collection::vec(1..=255_u8, 1..300);
    let object = prop_oneof![
        3 => Just(Object::Directory),
        6 => bytes().prop_map(Object::File),
        1 => target.prop_map(Object::Symlink),
        1 => Just(Object::Fifo),
        2 => any::<prop::sample::Index>().prop_map(Object::HardLink),
    ];
    let xattr = prop::option::of((
        "user\\.[a-z]{1,20}",
        prop::collection::vec(any::<u8>(), 0..100),
    ));
    (
        any::<prop::sample::Index>(),
        name,
        object,
        0..0o10000_u32,
        (-10_000_000_000..10_000_000_000_i64, 0..1_000_000_000_i64),
        xattr,
    )
        .prop_map(|(parent, name, object, mode, time, xattr)| Made {
            parent,
            name,
            object,
            mode,
            time,
            xattr,
        })
}

pub fn noise(seed: u64, len: usize) -> Vec<u8> {
    let mut state = seed.wrapping_add(0x9e37_79b9_7f4a_7c15);
    (0..len)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state.to_le_bytes()[3]
        })
        .collect()
}

pub fn make(root: &Path, tree: &[Made]) {
    let mut dirs: Vec<PathBuf> = vec![root.to_owned()];
    let mut files: Vec<PathBuf> = Vec::new();
    let mut finish: Vec<(PathBuf, &Made)> = Vec::new();
    for made in tree {
        let path = made.parent.get(&dirs).join(OsStr::from_bytes(&made.name));
        if path.symlink_metadata().is_ok() {
            continue;
        }
        match &made.object {
            Object::Directory => {
                std::fs::create_dir(&path).unwrap();
                dirs.push(path.clone());
            }
            Object::File(bytes) => {
                match bytes {
                    Bytes::Same(byte, len) => std::fs::write(&path, vec![*byte; *len]).unwrap(),
                    Bytes::Noise(seed, len) => std::fs::write(&path, noise(*seed, *len)).unwrap(),
                    Bytes::Sparse(len, data) => {
                        let file = File::create(&path).unwrap();
                        file.set_len(*len).unwrap();
                        if *data {
                            file.write_all_at(b"data behind a hole", *len).unwrap();
                        }
                    }
                }
                files.push(path.clone());
            }
            Object::Symlink(target) => symlink(OsStr::from_bytes(target), &path).unwrap(),
            Object::Fifo => nix::unistd::mkfifo(&path, Mode::S_IRUSR).unwrap(),
            Object::HardLink(_) if files.is_empty() => continue,
            Object::HardLink(of) => {
                std::fs::hard_link(of.get(&files), &path).unwrap();
                continue;
            }
        }
        finish.push((path, made));
    }
    // Backwards: directories get their times after their entries.
    for (path, made) in finish.iter().rev() {
        let symlink = matches!(made.object, Object::Symlink(_));
        if !symlink {
            let needed = if path.is_dir() { 0o700 } else { 0o400 };
            // The kernel keeps `user.` attributes off FIFOs.
            let carrier = !matches!(made.object, Object::Fifo);
            if let Some((key, value)) = made.xattr.as_ref().filter(|_| carrier) {
                xattr::set(path, key, value).unwrap();
            }
            set_mode(path, made.mode | needed);
        }
        set_time(path, made.time.0, made.time.1);
    }
}

pub fn options() -> impl Strategy<Value = BuildOptions> {
    (
        prop_oneof![
            Just(Compressor::None),
            Just(Compressor::Lz4),
            Just(Compressor::Zstd)
        ],
        prop_oneof![Just(Digester::Blake3), Just(Digester::Sha256)],
        prop_oneof![Just(0x1000), Just(0x1_0000), Just(0x10_0000)],
        any::<bool>(),
        any::<bool>(),
        any::<bool>(),
    )
        .prop_map(
            |(compressor, digester, chunk_size, blob_toc, inline_bootstrap, batch)| BuildOptions {
                compressor,
                digester,
                chunk_size,
                batch_size: if batch { chunk_size } else { 0 },
                blob_toc,
                inline_bootstrap,
                whiteouts: WhiteoutSpec::None,
                ..BuildOptions::default()
            },
        )
}
