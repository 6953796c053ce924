//! What a read-only file system owes its users: every way to read gives the same
//! bytes, every way to write is refused with the right number, and permissions hold.
//! The same for both drivers.

use std::ffi::CString;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::{AsFd as _, AsRawFd as _};
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _, PermissionsExt as _};
use std::path::Path;
use std::process::Command;

use nix::fcntl::{AT_FDCWD, OFlag, openat};
use nix::libc;
use nix::sys::stat::Mode;
use nix::sys::statvfs::statvfs;
use support::command::run;
use support::mount::Nydusd;
use support::tree::nasty::noise;

use crate::scene::{DRIVERS, Scene};

/// Not a multiple of anything.
const SIZE: usize = 1_234_567;

struct Stage {
    scene: Scene,
    daemon: Nydusd,
    bytes: Vec<u8>,
    driver: &'static str,
}

impl Stage {
    fn new(driver: &'static str) -> Self {
        let scene = Scene::new();
        let source = scene.dir("source");
        let bytes = noise(SIZE, 5);
        let write = |name: &str, content: &[u8], mode: u32| {
            fs::write(source.join(name), content).unwrap();
            fs::set_permissions(source.join(name), fs::Permissions::from_mode(mode)).unwrap();
        };
        write("file", &bytes, 0o644);
        write("private", b"secret", 0o600);
        write("shared", b"by list", 0o600);
        write("run", b"#!/bin/sh\necho ran as $(id -u)\n", 0o755);
        write("plain", b"#!/bin/sh\n", 0o644);
        fs::copy("/usr/bin/id", source.join("id")).unwrap();
        fs::set_permissions(source.join("id"), fs::Permissions::from_mode(0o4755)).unwrap();
        for (name, value) in [("user.one", "1"), ("user.two", ""), ("trusted.three", "3")] {
            xattr::set(source.join("file"), name, value.as_bytes()).unwrap();
        }
        xattr::set(source.join("shared"), "system.posix_acl_access", &acl()).unwrap();
        fs::create_dir(source.join("dir")).unwrap();
        std::os::unix::fs::symlink("file", source.join("link")).unwrap();
        let daemon = scene.mount_with(driver, &scene.create("image", &[], &source));
        // The way there is private to root, as temporary directories are.
        fs::set_permissions(scene.path(""), fs::Permissions::from_mode(0o755)).unwrap();
        Self {
            scene,
            daemon,
            bytes,
            driver,
        }
    }

    fn at(&self, name: &str) -> std::path::PathBuf {
        self.daemon.point().join(name)
    }

    fn file(&self) -> File {
        File::open(self.at("file")).unwrap()
    }
}

/// An access list with one more user: user 65534 may read. Version 2, then entries of
/// tag, permissions and id.
fn acl() -> Vec<u8> {
    let none = u32::MAX;
    let entries: [(u16, u16, u32); 5] = [
        (0x01, 6, none),
        (0x02, 4, 65534),
        (0x04, 0, none),
        (0x10, 4, none),
        (0x20, 0, none),
    ];
    let mut list = 2_u32.to_le_bytes().to_vec();
    for (tag, permissions, id) in entries {
        list.extend(tag.to_le_bytes());
        list.extend(permissions.to_le_bytes());
        list.extend(id.to_le_bytes());
    }
    list
}

fn number<T>(result: &io::Result<T>) -> i32 {
    let error = result.as_ref().err();
    error.and_then(io::Error::raw_os_error).unwrap_or(0)
}

fn errno<T>(result: nix::Result<T>) -> i32 {
    number(&result.map_err(io::Error::from))
}

/// Runs a command as a user without rights.
fn as_nobody(arguments: &[&Path]) -> (i32, String) {
    let mut command = Command::new("setpriv");
    command.args(["--reuid=65534", "--regid=65534", "--clear-groups"]);
    let finished = run(command.args(arguments)).unwrap();
    (finished.code(), finished.stdout)
}

#[test]
fn every_way_to_read_gives_the_same_bytes() {
    DRIVERS.into_iter().for_each(reads);
}

fn reads(driver: &'static str) {
    let stage = Stage::new(driver);
    let bytes = &stage.bytes;
    assert!(fs::read(stage.at("file")).unwrap() == *bytes, "read");
    assert!(fs::read(stage.at("link")).unwrap() == *bytes, "by a link");

    for (offset, len) in [(0, 1), (4095, 2), (1_000_000, 4096), (SIZE - 1, 1)] {
        let mut part = vec![0; len];
        let at = u64::try_from(offset).unwrap();
        stage.file().read_exact_at(&mut part, at).unwrap();
        assert!(part == bytes[offset..offset + len], "pread at {offset}");
    }
    let end = u64::try_from(SIZE).unwrap();
    assert_eq!(stage.file().read_at(&mut [0; 8], end).unwrap(), 0);

    direct(&stage);
    mapped(&stage);

    // Through a pipe, by sendfile and by copy_file_range to a real file.
    let (reader, writer) = nix::unistd::pipe().unwrap();
    let mut offset: libc::loff_t = 4096;
    let moved = many(
        // SAFETY: takes descriptors that are open and a place for the offset.
        unsafe {
            let (file, to) = (stage.file(), writer.as_raw_fd());
            libc::splice(
                file.as_raw_fd(),
                &raw mut offset,
                to,
                std::ptr::null_mut(),
                8192,
                0,
            )
        },
    );
    let mut part = vec![0; moved];
    assert_eq!(nix::unistd::read(&reader, &mut part).unwrap(), moved);
    assert!(moved > 0 && part == bytes[4096..4096 + moved], "splice");

    let path = stage.scene.path("copy");
    let target = File::create(&path).unwrap();
    let source = stage.file();
    let (from, to) = (source.as_raw_fd(), target.as_raw_fd());
    let none = std::ptr::null_mut();
    let mut done = 0;
    while done < SIZE {
        // SAFETY: takes descriptors that are open; no offset means the file's own.
        let moved = many(unsafe { libc::sendfile(to, from, none, SIZE) });
        assert!(moved > 0, "sendfile ends at {done}");
        done += moved;
    }
    assert!(fs::read(&path).unwrap() == *bytes, "sendfile");
    // The kernel copies between file systems of one kind only, and programs know that.
    // SAFETY: as above.
    let copied = unsafe { libc::copy_file_range(from, none, to, none, SIZE, 0) };
    let error = io::Error::last_os_error().raw_os_error();
    assert_eq!((copied, error), (-1, Some(libc::EXDEV)), "copy_file_range");
    drop((source, target));
    fs::copy(stage.at("file"), &path).unwrap();
    assert!(fs::read(&path).unwrap() == *bytes, "copy");
    stage.daemon.stop().unwrap();
}

/// What a system call has moved.
#[track_caller]
fn many(result: isize) -> usize {
    usize::try_from(result).unwrap_or_else(|_| panic!("{}", io::Error::last_os_error()))
}

/// `O_DIRECT`, whole blocks and the end of the file.
fn direct(stage: &Stage) {
    let mut options = OpenOptions::new();
    options.read(true).custom_flags(libc::O_DIRECT);
    let file = options.open(stage.at("file"));
    // The kernel's EROFS has no direct reads of an image in a file, and says so.
    if stage.driver == "erofs" && number(&file) == libc::EINVAL {
        return;
    }
    let file = file.unwrap();
    // Aligned by being a whole mapping.
    let mut buffer = Mapping::anonymous(1 << 20);
    let mut done = 0;
    while done < SIZE {
        let read = file
            .read_at(buffer.bytes(), u64::try_from(done).unwrap())
            .unwrap();
        assert!(read > 0, "O_DIRECT ends at {done}");
        let expected = &stage.bytes[done..done + read];
        assert!(buffer.bytes()[..read] == *expected, "O_DIRECT at {done}");
        done += read;
    }
}

/// Private and shared mappings; writing to a private one changes nothing.
fn mapped(stage: &Stage) {
    let file = stage.file();
    let map = |protection, flags| Mapping::of(&file, SIZE, protection, flags);
    let mut shared = map(libc::PROT_READ, libc::MAP_SHARED).unwrap();
    assert!(*shared.bytes() == *stage.bytes, "a shared mapping");
    let both = libc::PROT_READ | libc::PROT_WRITE;
    let mut private = map(both, libc::MAP_PRIVATE).unwrap();
    private.bytes()[5000] ^= 0xff;
    assert!(
        *shared.bytes() == *stage.bytes,
        "changed by a private mapping"
    );
    assert!(fs::read(stage.at("file")).unwrap() == stage.bytes);
    let refused = map(both, libc::MAP_SHARED);
    assert_eq!(number(&refused), libc::EACCES, "a writable shared mapping");
}

/// A mapping that goes away with its owner.
struct Mapping {
    address: *mut libc::c_void,
    len: usize,
}

impl Mapping {
    fn anonymous(len: usize) -> Self {
        let both = libc::PROT_READ | libc::PROT_WRITE;
        Self::raw(-1, len, both, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS).unwrap()
    }

    fn of(file: &File, len: usize, protection: i32, flags: i32) -> io::Result<Self> {
        Self::raw(file.as_raw_fd(), len, protection, flags)
    }

    fn raw(fd: i32, len: usize, protection: i32, flags: i32) -> io::Result<Self> {
        // SAFETY: a new mapping at an address that the kernel chooses touches nothing.
        let address = unsafe { libc::mmap(std::ptr::null_mut(), len, protection, flags, fd, 0) };
        if address == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        Ok(Self { address, len })
    }

    fn bytes(&mut self) -> &mut [u8] {
        // SAFETY: the mapping is `len` bytes long, lives as long as `self`, and nobody
        // else has its address. Read-only ones are not written to by these tests.
        unsafe { std::slice::from_raw_parts_mut(self.address.cast(), self.len) }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: made by `raw`, and no slice of it outlives `self`.
        unsafe { libc::munmap(self.address, self.len) };
    }
}

#[test]
fn every_way_to_write_is_refused() {
    DRIVERS.into_iter().for_each(writes);
}

fn writes(driver: &'static str) {
    let stage = Stage::new(driver);
    let file = stage.at("file");
    let new = stage.at("new");
    for flags in [
        OFlag::O_WRONLY,
        OFlag::O_RDWR,
        OFlag::O_WRONLY | OFlag::O_APPEND,
        OFlag::O_RDONLY | OFlag::O_TRUNC,
        OFlag::O_RDWR | OFlag::O_CREAT,
        OFlag::O_RDWR | OFlag::O_TMPFILE,
    ] {
        let path = if flags.contains(OFlag::O_TMPFILE) {
            stage.at("dir")
        } else {
            file.clone()
        };
        let opened = openat(AT_FDCWD, &path, flags, Mode::S_IRUSR);
        assert_eq!(errno(opened), libc::EROFS, "{flags:?}");
    }
    let created = openat(
        AT_FDCWD,
        &new,
        OFlag::O_WRONLY | OFlag::O_CREAT,
        Mode::S_IRUSR,
    );
    assert_eq!(errno(created), libc::EROFS, "create");
    // What exists may be opened with O_CREAT if it is only read.
    openat(
        AT_FDCWD,
        &file,
        OFlag::O_RDONLY | OFlag::O_CREAT,
        Mode::empty(),
    )
    .unwrap();
    let exclusive = OFlag::O_RDONLY | OFlag::O_CREAT | OFlag::O_EXCL;
    let opened = openat(AT_FDCWD, &file, exclusive, Mode::empty());
    assert_eq!(errno(opened), libc::EEXIST, "O_EXCL");
    let opened = openat(AT_FDCWD, &file, OFlag::O_DIRECTORY, Mode::empty());
    assert_eq!(errno(opened), libc::ENOTDIR, "O_DIRECTORY");
    let opened = openat(
        AT_FDCWD,
        &stage.at("link"),
        OFlag::O_NOFOLLOW,
        Mode::empty(),
    );
    assert_eq!(errno(opened), libc::ELOOP, "O_NOFOLLOW");

    let other = stage.at("private");
    let permissions = fs::Permissions::from_mode(0o777);
    let refused = [
        ("mkdir", number(&fs::create_dir(&new))),
        ("rmdir", number(&fs::remove_dir(stage.at("dir")))),
        ("unlink", number(&fs::remove_file(&file))),
        ("rename", number(&fs::rename(&file, &new))),
        ("link", number(&fs::hard_link(&file, &new))),
        ("symlink", number(&std::os::unix::fs::symlink("x", &new))),
        ("chmod", number(&fs::set_permissions(&file, permissions))),
        (
            "chown",
            number(&std::os::unix::fs::chown(&file, Some(1), None)),
        ),
        ("truncate", errno(nix::unistd::truncate(&file, 0))),
        ("setxattr", number(&xattr::set(&file, "user.new", b"x"))),
        ("removexattr", number(&xattr::remove(&file, "user.one"))),
        ("mkfifo", errno(nix::unistd::mkfifo(&new, Mode::S_IRUSR))),
        ("rename over", number(&fs::rename(&other, &file))),
        ("utimens", number(&touch(&file))),
    ];
    for (way, number) in refused {
        assert_eq!(number, libc::EROFS, "{way}");
    }
    let opened = stage.file();
    let written = nix::unistd::write(opened.as_fd(), b"x");
    assert_eq!(
        errno(written),
        libc::EBADF,
        "write to what is open for reading"
    );
    drop(opened);
    stage.daemon.stop().unwrap();
}

fn touch(path: &Path) -> io::Result<()> {
    let path = CString::new(path.as_os_str().as_bytes()).unwrap();
    // SAFETY: the path ends with a zero byte; no times means "now".
    match unsafe { libc::utimensat(libc::AT_FDCWD, path.as_ptr(), std::ptr::null(), 0) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

#[test]
fn attributes_permissions_and_programs() {
    DRIVERS.into_iter().for_each(attributes);
}

fn attributes(driver: &'static str) {
    let stage = Stage::new(driver);
    let mut names: Vec<_> = xattr::list(stage.at("file"))
        .unwrap()
        .map(|name| name.into_string().unwrap())
        .collect();
    names.sort();
    assert_eq!(names, ["trusted.three", "user.one", "user.two"]);
    let value = |name: &str| xattr::get(stage.at("file"), name).unwrap();
    assert_eq!(value("user.one").unwrap(), b"1");
    assert_eq!(value("user.two").unwrap(), b"");
    assert_eq!(value("user.none"), None);

    let cat = Path::new("cat");
    let (code, _) = as_nobody(&[cat, &stage.at("private")]);
    assert_ne!(code, 0, "mode 0600 of somebody else");
    let (code, text) = as_nobody(&[cat, &stage.at("shared")]);
    assert_eq!((code, text.as_str()), (0, "by list"), "allowed by the list");
    let (code, text) = as_nobody(&[&stage.at("run")]);
    assert_eq!((code, text.as_str()), (0, "ran as 65534\n"));
    let (code, _) = as_nobody(&[&stage.at("plain")]);
    assert_ne!(code, 0, "no permission to run");
    // The mount is nosuid: a program of root's runs as who starts it.
    let (code, text) = as_nobody(&[&stage.at("id"), Path::new("-u")]);
    assert_eq!((code, text.as_str()), (0, "65534\n"));

    let usage = statvfs(stage.daemon.point()).unwrap();
    assert_eq!(usage.block_size(), 4096);
    assert_eq!(usage.blocks_free(), 0);
    if stage.driver == "fuse" {
        // The kernel's EROFS counts those that could still be numbered.
        assert_eq!(usage.files_free(), 0);
    }
    assert_eq!(usage.name_max(), 255);
    assert!(
        usage.blocks() * 4096 >= u64::try_from(SIZE).unwrap() || stage.driver == "erofs",
        "{}",
        usage.blocks()
    );
    assert!(usage.files() >= 9, "{}", usage.files());
    stage.daemon.stop().unwrap();
}
