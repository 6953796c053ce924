//! Tar archives into images: every format that archives come in, and bad ones.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic_in_result_fn,
    clippy::cast_possible_truncation,
    reason = "helpers of tests fail like tests; generated data may wrap"
)]

mod support;

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Read;
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::process::Command;

use nydus_image::build::BuildOptions;
use nydus_image::source::{Source, compressed};
use proptest::prelude::*;
use storage::Compressor;
use support::{Built, Listing, build, chain, list_directory, tar_source};

const GB: u64 = 1 << 30;

/// Builds an archive in memory, entry by entry.
struct Archive(tar::Builder<Vec<u8>>);

impl Archive {
    fn new() -> Self {
        Self(tar::Builder::new(Vec::new()))
    }

    fn header(kind: tar::EntryType, size: usize) -> tar::Header {
        let mut header = tar::Header::new_gnu();
        header.set_entry_type(kind);
        header.set_mode(0o640);
        header.set_uid(1000);
        header.set_gid(100);
        header.set_mtime(1_700_000_000);
        header.set_size(size as u64);
        header
    }

    /// Writes the name without the checks of the crate, which knows better than to
    /// write `..`.
    fn raw(mut self, name: &str, kind: tar::EntryType, link: &str, data: &[u8]) -> Self {
        let mut header = Self::header(kind, data.len());
        header.as_old_mut().name[..name.len()].copy_from_slice(name.as_bytes());
        header.as_old_mut().linkname[..link.len()].copy_from_slice(link.as_bytes());
        header.set_cksum();
        self.0.append(&header, data).unwrap();
        self
    }

    fn file(self, name: &str, data: &str) -> Self {
        self.raw(name, tar::EntryType::Regular, "", data.as_bytes())
    }

    fn directory(self, name: &str) -> Self {
        self.raw(name, tar::EntryType::Directory, "", b"")
    }

    fn symlink(self, name: &str, target: &str) -> Self {
        self.raw(name, tar::EntryType::Symlink, target, b"")
    }

    fn hard_link(self, name: &str, target: &str) -> Self {
        self.raw(name, tar::EntryType::Link, target, b"")
    }

    fn bytes(self) -> Vec<u8> {
        self.0.into_inner().unwrap()
    }

    fn build(self) -> Result<Built, String> {
        build_tar(self.bytes())
    }

    fn listing(self) -> Listing {
        self.build().unwrap().listing()
    }

    fn error(self) -> String {
        self.build().unwrap_err()
    }
}

fn build_tar(bytes: Vec<u8>) -> Result<Built, String> {
    build(tar_source(bytes), &BuildOptions::default(), 2).map_err(|error| chain(&error))
}

fn names(listing: &Listing) -> Vec<&str> {
    listing
        .keys()
        .map(|name| std::str::from_utf8(name).unwrap())
        .collect()
}

#[test]
fn names_are_taken_below_the_root() {
    let listing = Archive::new()
        .file("/absolute", "a")
        .file("./dotted/./file", "b")
        .file("double//slash", "c")
        .directory("trailing/")
        .listing();
    assert_eq!(
        names(&listing),
        [
            "",
            "/absolute",
            "/dotted",
            "/dotted/file",
            "/double",
            "/double/slash",
            "/trailing"
        ]
    );
    assert_eq!(
        listing[&b"/dotted"[..]].permissions,
        0o755,
        "an implied directory"
    );
    assert_eq!(listing[&b"/absolute"[..]].content, b"a");
    assert_eq!(listing[&b"/absolute"[..]].permissions, 0o640);
}

#[test]
fn nothing_leaves_the_root() {
    for archive in [
        Archive::new().file("../escape", ""),
        Archive::new().file("a/../../escape", ""),
        Archive::new().directory(".."),
        Archive::new().file("a", "").hard_link("b", "../a"),
    ] {
        let error = archive.error();
        assert!(
            error.contains("test.tar: at byte") && error.contains(".."),
            "{error}"
        );
    }
}

#[test]
fn links_are_not_followed() {
    let archive = || Archive::new().symlink("link", "/etc");
    let listing = archive().listing();
    assert_eq!(
        listing[&b"/link"[..]].content,
        b"/etc",
        "an absolute target is only data"
    );
    let error = archive().file("link/passwd", "").error();
    assert!(error.contains("at byte 512: entry link/passwd"), "{error}");
    let error = archive().hard_link("b", "link/passwd").error();
    assert!(
        error.contains("link/passwd, which is not in the archive"),
        "{error}"
    );
    let error = Archive::new().symlink("empty", "").error();
    assert!(error.contains("entry empty"), "{error}");
}

#[test]
fn later_entries_replace_earlier_ones() {
    let listing = Archive::new()
        .file("a", "old")
        .directory("d")
        .file("d/child", "")
        .symlink("l", "x")
        .directory("gone")
        .file("gone/child", "")
        .file("a", "new")
        .directory("d")
        .file("l", "a file now")
        .file("gone", "a file now")
        .listing();
    assert_eq!(names(&listing), ["", "/a", "/d", "/d/child", "/gone", "/l"]);
    assert_eq!(listing[&b"/a"[..]].content, b"new");
    assert_eq!(listing[&b"/l"[..]].content, b"a file now");
}

#[test]
fn hard_links_share_an_inode() {
    let listing = Archive::new()
        .file("d/file", "data")
        .hard_link("z", "./d/file")
        .hard_link("zz", "/z")
        .symlink("s", "t")
        .hard_link("s2", "s")
        .file("d/file", "replaced")
        .listing();
    assert_eq!(listing[&b"/z"[..]].content, b"data");
    assert_eq!(listing[&b"/zz"[..]].same_as, b"/z");
    assert_eq!(listing[&b"/d/file"[..]].same_as, b"/d/file");
    assert_eq!(listing[&b"/s2"[..]].content, b"t");
    assert_eq!(
        listing[&b"/s2"[..]].same_as,
        b"/s2",
        "links of links are copies"
    );
    let error = Archive::new().hard_link("b", "a").file("a", "").error();
    assert!(
        error.contains("at byte 0: entry b: a hard link to a"),
        "{error}"
    );
    let error = Archive::new().directory("d").hard_link("b", "d").error();
    assert!(error.contains("a hard link to a directory"), "{error}");
}

#[test]
fn whiteouts_stay_in_tar_layers() {
    let listing = Archive::new()
        .file(".wh.x", "")
        .file("d/.wh..wh..opq", "")
        .listing();
    assert_eq!(names(&listing), ["", "/.wh.x", "/d", "/d/.wh..wh..opq"]);
}

#[test]
fn the_root_gets_its_own_entry() {
    let listing = Archive::new().directory("./").listing();
    assert_eq!(listing[&b""[..]].uid, 1000);
    assert!(
        Archive::new()
            .file("./", "")
            .listing()
            .contains_key(&b""[..])
    );
    let error = Archive::new().symlink(".", "x").error();
    assert!(
        error.contains("the root can only be a directory"),
        "{error}"
    );
}

#[test]
fn pax_records_override_headers() {
    let mut archive = Archive::new();
    let long = "n".repeat(200);
    archive
        .0
        .append_pax_extensions([
            ("path", format!("d/{long}").as_bytes()),
            ("mtime", b"-1.5"),
            ("uid", b"3000000000"),
            ("SCHILY.xattr.user.k", b"a\n\0\xffb=c"),
            ("SCHILY.xattr.security.capability", b"\x01\x00\x00\x02\n"),
            ("comment", b"ignored"),
        ])
        .unwrap();
    let listing = archive.file("short", "data").file("next", "").listing();
    let node = &listing[format!("/d/{long}").as_bytes()];
    assert_eq!(node.mtime, (-2, 500_000_000));
    assert_eq!(node.uid, 3_000_000_000);
    assert_eq!(node.gid, 100);
    assert_eq!(node.xattrs[&b"user.k"[..]], b"a\n\0\xffb=c");
    assert_eq!(
        node.xattrs[&b"security.capability"[..]],
        b"\x01\x00\x00\x02\n"
    );
    assert!(
        listing[&b"/next"[..]].xattrs.is_empty(),
        "records hold for one entry"
    );
}

#[test]
fn what_an_image_cannot_hold_is_named() {
    let mut archive = Archive::new();
    archive
        .0
        .append_pax_extensions([("SCHILY.xattr.com.example", &b"x"[..])])
        .unwrap();
    let error = archive.file("f", "").error();
    assert!(
        error.contains("entry f") && error.contains("com.example"),
        "{error}"
    );
    let mut archive = Archive::new();
    archive
        .0
        .append_pax_extensions([("path", "x".repeat(256).as_bytes())])
        .unwrap();
    let error = archive.file("f", "").error();
    assert!(error.contains("1 to 255 bytes"), "{error}");
    let error = Archive::new()
        .raw("m", tar::EntryType::new(b'M'), "", b"")
        .error();
    assert!(
        error.contains("entry m: an entry of type 'M' is not supported"),
        "{error}"
    );
}

#[test]
fn an_empty_stream_is_an_empty_layer() {
    for bytes in [Vec::new(), vec![0; 512], vec![0; 1024], vec![0; 10240]] {
        let built = build_tar(bytes).unwrap();
        assert_eq!(names(&built.listing()), [""]);
        assert!(built.blob.is_empty());
    }
}

/// An archive with one of everything.
fn sample() -> Vec<u8> {
    let mut archive = Archive::new();
    archive
        .0
        .append_pax_extensions([("mtime", &b"1.5"[..])])
        .unwrap();
    let long = "l".repeat(150);
    let mut archive = archive
        .file("a", &"data ".repeat(300))
        .directory("d")
        .symlink("s", "a");
    let mut header = Archive::header(tar::EntryType::Regular, 3);
    archive
        .0
        .append_data(&mut header, &long, &b"abc"[..])
        .unwrap();
    archive.hard_link("h", "a").file("z", "end").bytes()
}

#[test]
fn every_truncation_is_noticed() {
    let bytes = sample();
    let whole = build_tar(bytes.clone()).unwrap().listing();
    for len in 0..bytes.len() {
        match build_tar(bytes[..len].to_vec()) {
            // Cut between two entries, or inside the end mark.
            Ok(built) => {
                assert_eq!(len % 512, 0, "{len}");
                assert!(built.listing().keys().all(|name| whole.contains_key(name)));
            }
            Err(error) => {
                assert!(error.contains("test.tar: at byte"), "{error}");
                assert!(error.contains("too early"), "{len}: {error}");
            }
        }
    }
}

#[test]
fn damaged_archives_are_errors_with_a_position() {
    let mut bytes = sample();
    bytes[512 * 2] ^= 0xff;
    let error = build_tar(bytes).unwrap_err();
    assert!(error.contains("test.tar: at byte 1024: "), "{error}");
    assert!(error.contains("checksum"), "{error}");
    let error = build_tar(b"not a tar archive at all".repeat(100)).unwrap_err();
    assert!(
        error.contains("at byte 0") && error.contains("is this a tar archive?"),
        "{error}"
    );
    let lone = [vec![0; 512], sample()].concat();
    let error = build_tar(lone).unwrap_err();
    assert!(error.contains("a lone block of zeros"), "{error}");
}

#[test]
fn huge_numbers_cost_nothing() {
    // A long name, pax records and a sparse file that claim to be enormous.
    for kind in [b'L', b'x', b'g', b'K'] {
        let mut header = Archive::header(tar::EntryType::new(kind), 0);
        header.set_size(GB << 10);
        header.set_cksum();
        let error = build_tar(header.as_bytes().to_vec()).unwrap_err();
        assert!(error.contains("too large"), "{error}");
    }
    let mut archive = Archive::new();
    let size = (1_u64 << 62).to_string();
    archive
        .0
        .append_pax_extensions([
            ("GNU.sparse.size", size.as_bytes()),
            ("GNU.sparse.map", &b"0,4"[..]),
        ])
        .unwrap();
    let error = archive.file("sparse", "data").error();
    assert!(
        error.contains("entry sparse") && error.contains("16777215 chunks"),
        "{error}"
    );
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    /// Whatever is done to an archive, the result is an image or an error.
    #[test]
    fn damage_never_panics(
        edits in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..8),
        fix_checksums in any::<bool>(),
    ) {
        let mut bytes = sample();
        for (at, byte) in edits {
            let at = at.index(bytes.len());
            bytes[at] = byte;
        }
        if fix_checksums {
            for block in bytes.chunks_exact_mut(512) {
                if block[257..262] == *b"ustar" {
                    block[148..156].fill(b' ');
                    let sum: u32 = block.iter().map(|byte| u32::from(*byte)).sum();
                    block[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
                }
            }
        }
        if let Ok(built) = build_tar(bytes) {
            built.listing();
        }
    }

    /// Archives written by another implementation read back as they were written.
    #[test]
    fn archives_survive(
        files in prop::collection::btree_map(
            "[a-z]{1,3}(/[a-zäß ]{1,60}){0,4}",
            prop::collection::vec(any::<u8>(), 0..9000),
            0..20,
        ),
        chunk_size in prop_oneof![Just(0x1000), Just(0x10_0000)],
    ) {
        let mut builder = tar::Builder::new(Vec::new());
        let mut expected = BTreeMap::new();
        for (name, data) in &files {
            // A name that is a directory of another one cannot be a file.
            let prefix = format!("{name}/");
            if files.keys().any(|other| other.starts_with(&prefix)) {
                continue;
            }
            let mut header = Archive::header(tar::EntryType::Regular, data.len());
            builder.append_data(&mut header, name, data.as_slice()).unwrap();
            expected.insert(format!("/{name}").into_bytes(), data.clone());
        }
        let bytes = builder.into_inner().unwrap();
        let options = BuildOptions { chunk_size, ..BuildOptions::default() };
        let built = build(tar_source(bytes), &options, 2).unwrap();
        let found: BTreeMap<_, _> = built
            .listing()
            .into_iter()
            .filter(|(_, node)| node.kind == '-')
            .map(|(name, node)| (name, node.content))
            .collect();
        prop_assert_eq!(found, expected);
    }
}

/// A directory with what GNU tar can store.
fn make_tree(root: &Path) {
    let noise: Vec<u8> = (0..3_000_000_u32)
        .map(|i| (i.wrapping_mul(i) >> 7) as u8)
        .collect();
    std::fs::write(root.join("noise"), &noise).unwrap();
    std::fs::create_dir_all(root.join("d".repeat(90)).join("e".repeat(200))).unwrap();
    std::fs::write(
        root.join("d".repeat(90)).join("e".repeat(200)).join("long"),
        "x",
    )
    .unwrap();
    let sparse = File::create(root.join("sparse")).unwrap();
    sparse.set_len(20 << 20).unwrap();
    for i in 0..30_u64 {
        sparse.write_all_at(&noise[..5000], i * 700_000).unwrap();
    }
    std::fs::hard_link(root.join("sparse"), root.join("sparse2")).unwrap();
    let hole = File::create(root.join("hole")).unwrap();
    hole.set_len(3 << 20).unwrap();
    std::os::unix::fs::symlink("t".repeat(300), root.join("symlink")).unwrap();
    std::fs::write(root.join("xattr"), "").unwrap();
    xattr::set(root.join("xattr"), "user.k", b"value\nwith newline").unwrap();
    xattr::set(root.join("xattr"), "trusted.k", b"\0").expect("run the tests as root");
    nix::unistd::mkfifo(&root.join("fifo"), nix::sys::stat::Mode::S_IRUSR).unwrap();
    std::os::unix::fs::chown(root.join("xattr"), Some(3_000_000), Some(4_000_000)).unwrap();
}

/// Packs `root` with GNU tar, then checks that the image equals the directory.
fn check_gnu_tar(root: &Path, options: &[&str], filter: &str, times_are_whole: bool) {
    let output = Command::new("tar")
        .args(["--xattrs", "--xattrs-include=*", "-C"])
        .arg(root)
        .args(options)
        .args([filter, "-cf", "-", "."])
        .output()
        .expect("running tar");
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    let (_, reader) = compressed::open(std::io::Cursor::new(output.stdout)).unwrap();
    let source = Source::Tar {
        name: "stream".to_owned(),
        reader,
    };
    let build_options = BuildOptions {
        compressor: Compressor::Lz4,
        ..BuildOptions::default()
    };
    let mut found = build(source, &build_options, 2).unwrap().listing();
    let mut expected = list_directory(root);
    for listing in [&mut found, &mut expected] {
        for node in listing.values_mut() {
            if times_are_whole {
                node.mtime.1 = 0;
                node.xattrs.clear();
            }
        }
        listing.get_mut(&b""[..]).unwrap().mtime = (0, 0);
    }
    assert_eq!(names(&found), names(&expected));
    for (path, node) in &expected {
        assert!(found[path] == *node, "{options:?} {}", path.escape_ascii());
    }
}

#[test]
fn all_formats_of_gnu_tar_are_read() {
    let dir = tempfile::tempdir().unwrap();
    make_tree(dir.path());
    let root = dir.path();
    check_gnu_tar(root, &["--format=pax"], "--no-auto-compress", false);
    check_gnu_tar(root, &["--format=pax"], "--gzip", false);
    for version in ["0.0", "0.1", "1.0"] {
        let version = format!("--sparse-version={version}");
        let options = ["--format=pax", "--sparse", &version];
        check_gnu_tar(root, &options, "--no-auto-compress", false);
    }
    // This format has no extended attributes and whole seconds only.
    let gnu = ["--format=gnu", "--no-xattrs"];
    check_gnu_tar(root, &gnu, "--no-auto-compress", true);
    check_gnu_tar(
        root,
        &[&gnu[..], &["--sparse"]].concat(),
        "--no-auto-compress",
        true,
    );
}

#[test]
fn damaged_compression_is_an_error_with_a_position() {
    let mut gzip = Vec::new();
    let mut encoder = flate2::read::GzEncoder::new(
        std::io::Cursor::new(sample()),
        flate2::Compression::default(),
    );
    encoder.read_to_end(&mut gzip).unwrap();
    let zstd = zstd::encode_all(std::io::Cursor::new(sample()), 3).unwrap();
    for whole in [gzip, zstd] {
        for len in 4..whole.len() {
            let cut = std::io::Cursor::new(whole[..len].to_vec());
            let (_, reader) = compressed::open(cut).unwrap();
            let source = Source::Tar {
                name: "layer.tgz".to_owned(),
                reader,
            };
            let error = chain(&build(source, &BuildOptions::default(), 1).unwrap_err());
            assert!(error.contains("layer.tgz: at byte"), "{len}: {error}");
        }
    }
}
