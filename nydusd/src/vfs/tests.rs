//! Many images without a kernel: requests by hand.

use std::ffi::CString;

use rafs::image::Image;
use rafs::tree::{Attr, Content, Inode, Tree};
use rafs::writer::{WriteOptions, write};

use super::*;
use crate::fuse::Background;

fn image_with(name: &str) -> Arc<Image> {
    let attr = Attr {
        permissions: 0o755,
        uid: 0,
        gid: 0,
        mtime: 1,
        mtime_nsec: 0,
    };
    let mut tree = Tree::new(attr);
    let inode = Inode {
        attr,
        xattrs: Default::default(),
        content: Content::Fifo,
        implied: false,
    };
    tree.insert(tree.root(), name.as_bytes(), inode).unwrap();
    Arc::new(Image::from_bytes(write(&tree, &WriteOptions::default()).unwrap()).unwrap())
}

fn mount(vfs: &Vfs, path: &str, file: &str) -> u8 {
    let mut table = vfs.table().as_ref().clone();
    let (slot, generation) = table.free_slot().unwrap();
    let files = RafsFs::new(slot, image_with(file), Vec::new(), Background::default());
    let image = Mounted {
        path: path.to_owned(),
        files,
        generation,
        stamp: generation,
        stats: Stats::default(),
        about: Default::default(),
    };
    table.put(slot, image).unwrap();
    vfs.set_table(table);
    slot.get()
}

fn lookup(vfs: &Vfs, parent: u64, name: &str) -> Entry {
    let name = CString::new(name).unwrap();
    vfs.lookup(&Context::default(), parent, &name).unwrap()
}

#[test]
fn images_below_own_directories_come_and_go() {
    let vfs = Vfs::default();
    assert_eq!(lookup(&vfs, 1, "a").inode, 0);
    let slot = mount(&vfs, "/a/b", "one");
    let a = lookup(&vfs, 1, "a");
    assert!(a.entry_timeout.is_zero() && a.attr_timeout.is_zero());
    let b = lookup(&vfs, a.inode, "b");
    assert_eq!(b.inode >> 56, u64::from(slot));
    assert!(b.entry_timeout.is_zero(), "another image may come");
    let one = lookup(&vfs, b.inode, "one");
    assert!(one.inode != 0 && one.generation == b.generation);

    // Replaced: another slot or generation, so that the kernel sees other files.
    mount(&vfs, "/a/b", "two");
    let new = lookup(&vfs, a.inode, "b");
    assert_ne!((new.inode, new.generation), (b.inode, b.generation));
    assert_eq!(lookup(&vfs, new.inode, "one").inode, 0);
    assert!(lookup(&vfs, new.inode, "two").inode != 0);
    // Nothing leads to the old one any more.
    let gone = vfs.getattr(&Context::default(), one.inode, None);
    assert_eq!(gone.unwrap_err().raw_os_error(), Some(libc::ESTALE));

    let mut table = vfs.table().as_ref().clone();
    table.remove("/a/b").unwrap();
    vfs.set_table(table);
    let left = lookup(&vfs, a.inode, "b");
    assert_eq!(left.inode >> 56, 0, "an own directory stays");
}

#[test]
fn slots_are_used_again_with_new_generations() {
    let vfs = Vfs::default();
    let mut seen = std::collections::HashSet::new();
    for round in 0..600_u32 {
        let slot = mount(&vfs, "/x", "file");
        let generation = vfs.table().image_at("/x").unwrap().generation;
        assert!(seen.insert((slot, generation)), "round {round}");
    }
    let vfs = Vfs::default();
    for index in 0..255 {
        mount(&vfs, &format!("/{index}"), "file");
    }
    assert!(vfs.table().free_slot().is_none(), "255 images are the most");
}

#[test]
fn an_image_on_the_root_has_node_one() {
    let vfs = Vfs::default();
    mount(&vfs, "/", "one");
    assert!(lookup(&vfs, 1, "one").inode != 0);
    let stats = vfs.table().image_at("/").unwrap().stats.snapshot();
    assert_eq!(stats.fop_hits[9], 1);
}
