//! A source tree that contains what image builders get wrong.
//!
//! [`tree`] makes the same tree every time: sizes on both sides of every block,
//! chunk and batch boundary, names that sort before `.`, names that are not
//! UTF-8, directories of many blocks, links of all kinds, devices, sparse files,
//! repeated content and every class of extended attribute. [`tar`] and [`gzip`]
//! pack it as a layer.
//!
//! Needs root (device nodes, owners, `trusted.` attributes) and says so.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};
use nix::fcntl::AT_FDCWD;
use nix::sys::stat::{Mode, SFlag, UtimensatFlags, makedev, mknod, utimensat};
use nix::sys::time::TimeSpec;

/// Seconds of the first time stamp; each entry adds its position.
const EPOCH: i64 = 1_700_000_000;

/// Makes the tree in `root`, which must not exist.
pub fn tree(root: &Path) -> Result<()> {
    ensure!(
        nix::unistd::geteuid().is_root(),
        "making device nodes and owners needs root"
    );
    fs::create_dir(root)?;
    let mut maker = Maker {
        root: root.to_path_buf(),
        seed: 0x9e37_79b9_7f4a_7c15,
    };
    maker.sizes()?;
    maker.repeats()?;
    maker.names()?;
    maker.links()?;
    maker.specials()?;
    maker.attributes()?;
    times(root, &mut 0)?;
    Ok(())
}

/// Packs `root` as an uncompressed PAX tar in name order.
pub fn tar(root: &Path, to: &Path) -> Result<()> {
    let status = Command::new("tar")
        .args(["--format=pax", "--sort=name", "--numeric-owner", "--xattrs"])
        .args(["--xattrs-include=*", "--warning=no-file-ignored", "-C"])
        .arg(root)
        .arg("-cf")
        .arg(to)
        .arg(".")
        .status()
        .context("run tar")?;
    ensure!(status.success(), "tar failed");
    Ok(())
}

/// Compresses `from` as one gzip member.
pub fn gzip(from: &Path, to: &Path) -> Result<()> {
    let mut child = Command::new("gzip")
        .args(["-6", "-n", "-c"])
        .stdin(Stdio::from(File::open(from)?))
        .stdout(Stdio::from(File::create(to)?))
        .spawn()
        .context("run gzip")?;
    ensure!(child.wait()?.success(), "gzip failed");
    Ok(())
}

struct Maker {
    root: PathBuf,
    seed: u64,
}

impl Maker {
    fn sizes(&mut self) -> Result<()> {
        let edges = [0x1000, 0x2000, 0x4000, 0x8000, 0x1_0000, 0x10_0000];
        let near = |edge: usize| [edge - 1, edge, edge + 1];
        let sizes = [0, 1, 2, 511, 5000]
            .into_iter()
            .chain(edges.into_iter().flat_map(near));
        for size in sizes {
            let data = self.text(size);
            self.put(&format!("sizes/text-{size}"), &data)?;
        }
        for size in [1, 100, 4096, 5000, 70_000, 0x10_0000 + 5] {
            let data = self.noise(size);
            self.put(&format!("sizes/noise-{size}"), &data)?;
        }
        // Compressible and not, chunk by chunk, in one file.
        let mut mixed = self.text(300_000);
        mixed.extend(self.noise(300_000));
        mixed.extend(vec![0; 600_000]);
        mixed.extend(self.text(1_000_000));
        self.put("sizes/mixed", &mixed)
    }

    fn repeats(&mut self) -> Result<()> {
        let data = self.noise(150_000);
        for copy in 0..3 {
            self.put(&format!("repeats/copy-{copy}"), &data)?;
        }
        self.put("repeats/prefix", &data[..0x1_0000])?;
        let twice = [&data[..0x2_0000], &data[..0x2_0000]].concat();
        self.put("repeats/twice", &twice)?;
        let hole = self.path("repeats/hole")?;
        File::create(hole)?.set_len(2_500_001)?;
        self.put("repeats/sparse", b"head")?;
        let sparse = File::options()
            .write(true)
            .open(self.root.join("repeats/sparse"))?;
        sparse.set_len(1_200_000)?;
        std::os::unix::fs::FileExt::write_all_at(&sparse, b"tail", 1_199_990)?;
        Ok(())
    }

    fn names(&mut self) -> Result<()> {
        for name in [
            "!",
            "#x",
            "+",
            "-dash",
            "...",
            "..a",
            ".hidden",
            "A",
            "a",
            "~",
            " sp",
            "\u{e9}",
            "\u{4e2d}\u{6587}",
            "new\nline",
            "back\\slash",
        ] {
            self.put(&format!("names/{name}"), name.as_bytes())?;
        }
        for bytes in [&b"\xff"[..], b"\x80\x81", b"a\xc3", b"\x01control"] {
            let path = self.root.join("names").join(OsStr::from_bytes(bytes));
            fs::write(path, bytes)?;
        }
        self.put(&format!("names/{}", "n".repeat(255)), b"long")?;
        // 1000 names: a directory of several blocks; 250-byte names: many of them.
        for i in 0..1000 {
            self.put(
                &format!("many/entry-with-a-longish-name-{i:04}"),
                format!("{i}\n").as_bytes(),
            )?;
        }
        for i in 0..60 {
            self.put(&format!("wide/{i:02}{}", "w".repeat(248)), b"")?;
        }
        // Directory data that just fits, or just misses, the space behind its inode.
        for len in 240..=255 {
            for i in 0..15 {
                self.put(&format!("edge-{len}/{i:02}{}", "e".repeat(len - 2)), b"")?;
            }
        }
        let deep = (0..60)
            .map(|i| format!("d{i}"))
            .collect::<Vec<_>>()
            .join("/");
        self.put(&format!("deep/{deep}/leaf"), b"leaf")?;
        fs::create_dir(self.root.join("empty"))?;
        Ok(())
    }

    fn links(&mut self) -> Result<()> {
        for len in [1, 59, 60, 61, 511, 512, 3000, 4031, 4032, 4033, 4095] {
            symlink("t".repeat(len), self.path(&format!("links/sym-{len}"))?)?;
        }
        symlink("/abs/../path", self.root.join("links/absolute"))?;
        symlink(
            OsStr::from_bytes(b"bad\xffutf"),
            self.root.join("links/bytes"),
        )?;
        let data = self.text(9000);
        self.put("links/h1", &data)?;
        for name in ["links/h2", "links/sub/h3", "a-first"] {
            fs::hard_link(self.root.join("links/h1"), self.path(name)?)?;
        }
        self.put("links/e1", b"")?;
        fs::hard_link(self.root.join("links/e1"), self.root.join("links/e2"))?;
        Ok(())
    }

    fn specials(&mut self) -> Result<()> {
        let nodes = [
            ("dev/char", SFlag::S_IFCHR, makedev(1, 3)),
            ("dev/block", SFlag::S_IFBLK, makedev(259, 70_000)),
            ("dev/big", SFlag::S_IFCHR, makedev(4095, 1_048_575)),
            ("dev/fifo", SFlag::S_IFIFO, 0),
        ];
        for (name, kind, dev) in nodes {
            mknod(
                &self.path(name)?,
                kind,
                Mode::from_bits_truncate(0o640),
                dev,
            )?;
        }
        drop(UnixListener::bind(self.root.join("dev/socket"))?);
        Ok(())
    }

    fn attributes(&mut self) -> Result<()> {
        for mode in [0o000, 0o4755, 0o2755, 0o1777, 0o6711] {
            let name = format!("modes/{mode:o}");
            self.put(&name, b"mode")?;
            fs::set_permissions(self.root.join(&name), fs::Permissions::from_mode(mode))?;
        }
        self.put("modes/owner", b"owner")?;
        let owners = (Some(100_000), Some(u32::MAX - 2));
        std::os::unix::fs::chown(self.root.join("modes/owner"), owners.0, owners.1)?;
        fs::create_dir(self.root.join("modes/sticky"))?;
        fs::set_permissions(
            self.root.join("modes/sticky"),
            fs::Permissions::from_mode(0o1777),
        )?;
        self.xattrs()
    }

    fn xattrs(&mut self) -> Result<()> {
        let capability = b"\x01\0\0\x02\0\x20\0\0\0\0\0\0\0\0\0\0\0\0\0\0";
        let access = b"\x02\0\0\0\x01\0\x06\0\xff\xff\xff\xff\x02\0\x04\0\x01\0\0\0\x04\0\x04\0\xff\xff\xff\xff\x10\0\x04\0\xff\xff\xff\xff\x20\0\x04\0\xff\xff\xff\xff";
        self.put("xattr/file", b"x")?;
        let file = self.root.join("xattr/file");
        fs::set_permissions(&file, fs::Permissions::from_mode(0o644))?;
        let values: [(&str, &[u8]); 5] = [
            ("user.empty", b""),
            ("user.long", &[0xab; 1000]),
            ("trusted.t", b"tv\0binary"),
            ("security.capability", capability),
            ("system.posix_acl_access", access),
        ];
        for (key, value) in values {
            xattr::set(&file, key, value).with_context(|| format!("set {key}"))?;
        }
        fs::create_dir(self.root.join("xattr/dir"))?;
        xattr::set(self.root.join("xattr/dir"), "user.dir", &[b'v'; 40])?;
        symlink("target", self.root.join("xattr/link"))?;
        xattr::set(self.root.join("xattr/link"), "trusted.link", b"on a link")?;
        // Pushes a symlink's target out of the block of its inode.
        symlink("t".repeat(3900), self.root.join("xattr/far"))?;
        xattr::set(self.root.join("xattr/far"), "trusted.pad", &[b'p'; 200])?;
        self.put("xattr/data", &vec![b'd'; 20_000])?;
        xattr::set(self.root.join("xattr/data"), "user.odd", b"abc")?;
        Ok(())
    }

    /// The host path of `name`, its parents made.
    fn path(&self, name: &str) -> Result<PathBuf> {
        let path = self.root.join(name);
        if let Some(parent) = path.parent() {
            fs::create_dir_all(parent)?;
        }
        Ok(path)
    }

    fn put(&self, name: &str, data: &[u8]) -> Result<()> {
        fs::write(self.path(name)?, data).with_context(|| format!("write {name}"))
    }

    /// xorshift64: the same bytes on every machine.
    fn next(&mut self) -> u64 {
        self.seed ^= self.seed << 13;
        self.seed ^= self.seed >> 7;
        self.seed ^= self.seed << 17;
        self.seed
    }

    fn noise(&mut self, len: usize) -> Vec<u8> {
        let words = (0..len.div_ceil(8)).flat_map(|_| self.next().to_le_bytes());
        words.take(len).collect()
    }

    fn text(&mut self, len: usize) -> Vec<u8> {
        const WORDS: [&[u8]; 6] = [
            b"lazy ", b"chunk ", b"blob ", b"layer ", b"digest ", b"0123 ",
        ];
        let mut out = Vec::with_capacity(len + 8);
        while out.len() < len {
            let word = usize::try_from(self.next() % 6).unwrap_or(0);
            out.extend_from_slice(WORDS[word]);
        }
        out.truncate(len);
        out
    }
}

/// Stamps everything below and including `path`, children first.
fn times(path: &Path, count: &mut i64) -> Result<()> {
    if fs::symlink_metadata(path)?.is_dir() {
        let mut names: Vec<_> = fs::read_dir(path)?.collect::<Result<_, _>>()?;
        names.sort_by_key(fs::DirEntry::file_name);
        for name in names {
            times(&name.path(), count)?;
        }
    }
    *count += 1;
    let stamp = TimeSpec::new(EPOCH + *count, *count * 1_001);
    let flags = UtimensatFlags::NoFollowSymlink;
    utimensat(AT_FDCWD, path, &stamp, &stamp, flags)?;
    Ok(())
}
