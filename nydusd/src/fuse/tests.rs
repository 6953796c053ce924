//! The file system without a kernel: requests by hand, answers as values.

use std::ffi::CString;

use rafs::tree::{Attr, Content, Inode, InodeId, Tree};
use rafs::writer::{WriteOptions, write};

use super::*;

fn attr(permissions: u16) -> Attr {
    Attr {
        permissions,
        uid: 1000,
        gid: 70_000,
        mtime: -5,
        mtime_nsec: 999_999_999,
    }
}

fn add(tree: &mut Tree, dir: InodeId, name: &str, content: Content) -> InodeId {
    let inode = Inode {
        attr: attr(0o4751),
        xattrs: Default::default(),
        content,
        implied: false,
    };
    tree.insert(dir, name.as_bytes(), inode).unwrap()
}

/// A directory of 300 empty files, and one of everything else.
fn metadata_only() -> RafsFs {
    let mut tree = Tree::new(attr(0o755));
    let root = tree.root();
    let many = add(
        &mut tree,
        root,
        "many",
        Content::Directory(Default::default()),
    );
    for index in 0..300 {
        let name = format!("file-{index:03}");
        add(
            &mut tree,
            many,
            &name,
            Content::File {
                size: 0,
                chunks: Vec::new(),
            },
        );
    }
    add(
        &mut tree,
        root,
        "link",
        Content::Symlink((*b"many/file-007").into()),
    );
    add(&mut tree, root, "dev", Content::BlockDevice(0x1040_1103));
    add(&mut tree, root, "fifo", Content::Fifo);
    let tagged = add(
        &mut tree,
        root,
        "tagged",
        Content::File {
            size: 0,
            chunks: Vec::new(),
        },
    );
    tree.inode_mut(tagged)
        .xattrs
        .insert((*b"user.a").into(), (*b"value").into());
    tree.inode_mut(tagged)
        .xattrs
        .insert((*b"security.capability").into(), (*b"").into());
    let image = Image::from_bytes(write(&tree, &WriteOptions::default()).unwrap()).unwrap();
    RafsFs::new(
        Slot::FIRST,
        Arc::new(image),
        Vec::new(),
        Background::default(),
    )
}

fn lookup(fs: &RafsFs, dir: u64, name: &str) -> Entry {
    fs.lookup(&Context::new(), dir, &CString::new(name).unwrap())
        .unwrap()
}

fn number<T>(result: io::Result<T>) -> Option<i32> {
    result.err().and_then(|err| err.raw_os_error())
}

#[test]
fn attributes_are_those_of_the_image() {
    let fs = metadata_only();
    let entry = lookup(&fs, 1, "dev");
    let stat = entry.attr;
    assert_eq!(stat.st_ino, entry.inode);
    assert_eq!(entry.inode >> 56, 1);
    assert_eq!(stat.st_mode, libc::S_IFBLK | 0o4751);
    assert_eq!((stat.st_uid, stat.st_gid), (1000, 70_000));
    assert_eq!((stat.st_mtime, stat.st_mtime_nsec), (-5, 999_999_999));
    assert_eq!((stat.st_atime, stat.st_ctime), (-5, -5));
    assert_eq!(stat.st_rdev, 0x1040_1103);
    assert!(entry.entry_timeout > Duration::from_secs(1 << 30));
    let (again, _) = fs.getattr(&Context::new(), entry.inode, None).unwrap();
    assert_eq!((again.st_ino, again.st_mode), (stat.st_ino, stat.st_mode));
}

#[test]
fn the_root_is_node_1_with_its_own_number() {
    let fs = metadata_only();
    let (root, _) = fs.getattr(&Context::new(), 1, None).unwrap();
    assert_eq!(root.st_ino, (1 << 56) | fs.image.root().get());
    assert_eq!(root.st_mode, libc::S_IFDIR | 0o755);
    assert_eq!(root.st_nlink, 3);
}

#[test]
fn absent_names_are_remembered_by_the_kernel() {
    let fs = metadata_only();
    let entry = lookup(&fs, 1, "nothing");
    assert_eq!(entry.inode, 0);
    assert_eq!(entry.entry_timeout, FOR_EVER);
}

#[test]
fn numbers_of_no_inode_are_stale() {
    let fs = metadata_only();
    let ctx = Context::new();
    assert_eq!(number(fs.getattr(&ctx, 2, None)), Some(libc::ESTALE));
    assert_eq!(
        number(fs.getattr(&ctx, 2 << 56 | 36, None)),
        Some(libc::ESTALE)
    );
    assert_eq!(
        number(fs.getattr(&ctx, 1 << 56 | 1 << 50, None)),
        Some(libc::EUCLEAN)
    );
}

/// Lists `dir` in replies of at most `room` entries.
fn list(fs: &RafsFs, dir: u64, room: usize) -> Vec<(String, u64, u32)> {
    let mut all = Vec::new();
    let mut cookie = 0;
    loop {
        let mut added = 0;
        fs.readdir(&Context::new(), dir, 0, 4096, cookie, &mut |entry| {
            if added == room {
                return Ok(0);
            }
            added += 1;
            cookie = entry.offset;
            let name = String::from_utf8(entry.name.to_vec()).unwrap();
            all.push((name, entry.ino, entry.type_));
            Ok(1)
        })
        .unwrap();
        if added == 0 {
            return all;
        }
    }
}

#[test]
fn a_listing_resumes_where_the_reply_was_full() {
    let fs = metadata_only();
    let many = lookup(&fs, 1, "many").inode;
    let whole = list(&fs, many, usize::MAX);
    assert_eq!(whole.len(), 302, "with . and ..");
    for room in [1, 7, 100] {
        assert_eq!(list(&fs, many, room), whole);
    }
    let (_, ino, kind) = whole.iter().find(|(name, ..)| name == "file-123").unwrap();
    assert_eq!(*ino, lookup(&fs, many, "file-123").inode);
    assert_eq!(*kind, u32::from(libc::DT_REG));
}

#[test]
fn a_listing_with_attributes_equals_lookups() {
    let fs = metadata_only();
    let mut seen = 0;
    fs.readdirplus(&Context::new(), 1, 0, 4096, 0, &mut |listed, entry| {
        let name = std::str::from_utf8(listed.name).unwrap();
        if name == "." || name == ".." {
            assert_eq!(entry.inode, 0, "the kernel must not count these");
        } else {
            let found = lookup(&fs, 1, name);
            assert_eq!(
                (entry.inode, entry.attr.st_mode),
                (found.inode, found.attr.st_mode)
            );
        }
        seen += 1;
        Ok(1)
    })
    .unwrap();
    assert_eq!(seen, 7);
}

#[test]
fn symbolic_links() {
    let fs = metadata_only();
    let link = lookup(&fs, 1, "link").inode;
    assert_eq!(
        fs.readlink(&Context::new(), link).unwrap(),
        b"many/file-007"
    );
    let many = lookup(&fs, 1, "many").inode;
    assert_eq!(
        number(fs.readlink(&Context::new(), many)),
        Some(libc::EINVAL)
    );
}

#[test]
fn extended_attributes_follow_the_protocol_of_sizes() {
    let fs = metadata_only();
    let ctx = Context::new();
    let node = lookup(&fs, 1, "tagged").inode;
    let get = |name: &CStr, size| fs.getxattr(&ctx, node, name, size);
    assert!(matches!(get(c"user.a", 0), Ok(GetxattrReply::Count(5))));
    assert!(matches!(get(c"user.a", 5), Ok(GetxattrReply::Value(value)) if value == b"value"));
    assert_eq!(number(get(c"user.a", 4)), Some(libc::ERANGE));
    assert_eq!(number(get(c"user.b", 0)), Some(libc::ENODATA));
    assert!(matches!(get(c"security.capability", 10), Ok(GetxattrReply::Value(v)) if v.is_empty()));
    let names = b"security.capability\0user.a\0".len();
    let count = u32::try_from(names).unwrap();
    assert!(matches!(fs.listxattr(&ctx, node, 0), Ok(ListxattrReply::Count(n)) if n == count));
    let Ok(ListxattrReply::Names(list)) = fs.listxattr(&ctx, node, count) else {
        panic!()
    };
    assert_eq!(list.len(), names);
    assert!(list.windows(7).any(|part| part == b"user.a\0"));
    assert_eq!(
        number(fs.listxattr(&ctx, node, count - 1)),
        Some(libc::ERANGE)
    );
    let plain = lookup(&fs, 1, "fifo").inode;
    assert!(matches!(
        fs.listxattr(&ctx, plain, 0),
        Ok(ListxattrReply::Count(0))
    ));
}

#[test]
fn every_change_is_refused() {
    let fs = metadata_only();
    let ctx = Context::new();
    let n = c"x";
    let stat = Entry::default().attr;
    for refused in [
        number(fs.setattr(&ctx, 1, stat, None, SetattrValid::empty())),
        number(fs.symlink(&ctx, n, 1, n)),
        number(fs.mknod(&ctx, 1, n, 0, 0, 0)),
        number(fs.mkdir(&ctx, 1, n, 0, 0)),
        number(fs.unlink(&ctx, 1, n)),
        number(fs.rmdir(&ctx, 1, n)),
        number(fs.rename(&ctx, 1, n, 1, n, 0)),
        number(fs.link(&ctx, 1, 1, n)),
        number(fs.create(&ctx, 1, n, CreateIn::default())),
        number(fs.fallocate(&ctx, 1, 0, 0, 0, 0)),
        number(fs.setxattr(&ctx, 1, n, b"", 0)),
        number(fs.removexattr(&ctx, 1, n)),
    ] {
        assert_eq!(refused, Some(libc::EROFS));
    }
}

#[test]
fn what_the_kernel_need_not_ask() {
    let fs = metadata_only();
    let ctx = Context::new();
    assert_eq!(number(fs.open(&ctx, 1, 0, 0)), Some(libc::ENOSYS));
    assert_eq!(number(fs.opendir(&ctx, 1, 0)), Some(libc::ENOSYS));
    assert_eq!(number(fs.flush(&ctx, 1, 0, 0)), Some(libc::ENOSYS));
    let wanted = fs.init(FsOptions::all()).unwrap();
    assert!(wanted.contains(FsOptions::ZERO_MESSAGE_OPEN | FsOptions::ZERO_MESSAGE_OPENDIR));
    assert!(
        !wanted.contains(FsOptions::AUTO_INVAL_DATA),
        "would drop pages that are right"
    );
}

#[test]
fn usage_is_full() {
    let stat = metadata_only().statfs(&Context::new(), 1).unwrap();
    assert_eq!((stat.f_files, stat.f_ffree, stat.f_bfree), (306, 0, 0));
    assert_eq!((stat.f_bsize, stat.f_namemax), (4096, 255));
}
