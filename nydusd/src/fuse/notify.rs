//! Telling the kernel to forget: messages that are no answers.
//!
//! Call these while no lock is held that a request needs: the kernel waits for
//! requests under way on the same directory.

use std::fs::File;
use std::io::{self, Write as _};

use zerocopy::{Immutable, IntoBytes};

/// `FUSE_NOTIFY_INVAL_INODE` of `linux/fuse.h`.
const INVALID_INODE: i32 = 2;
/// `FUSE_NOTIFY_INVAL_ENTRY`.
const INVALID_ENTRY: i32 = 3;

/// `struct fuse_out_header`, then `struct fuse_notify_inval_inode_out`.
#[derive(IntoBytes, Immutable)]
#[repr(C)]
struct InodeMessage {
    len: u32,
    code: i32,
    unique: u64,
    node: u64,
    offset: i64,
    length: i64,
}

/// `struct fuse_out_header`, then `struct fuse_notify_inval_entry_out`; the name
/// and a zero byte follow.
#[derive(IntoBytes, Immutable)]
#[repr(C)]
struct EntryMessage {
    len: u32,
    code: i32,
    unique: u64,
    parent: u64,
    name_len: u32,
    flags: u32,
}

/// Makes the kernel forget attributes and content of a node, a directory's listing too.
pub(crate) fn forget_content(device: &File, node: u64) {
    let message = InodeMessage {
        len: length(size_of::<InodeMessage>()),
        code: INVALID_INODE,
        unique: 0,
        node,
        offset: 0,
        // 0 is "to the end".
        length: 0,
    };
    send(device, message.as_bytes());
}

/// Makes the kernel forget what a name leads to, with everything below it.
pub(crate) fn forget_name(device: &File, parent: u64, name: &[u8]) {
    let header = EntryMessage {
        len: length(size_of::<EntryMessage>() + name.len() + 1),
        code: INVALID_ENTRY,
        unique: 0,
        parent,
        name_len: length(name.len()),
        flags: 0,
    };
    let mut message = header.as_bytes().to_vec();
    message.extend_from_slice(name);
    message.push(0);
    send(device, &message);
}

/// Names are at most 255 bytes; the kernel refuses what is longer.
fn length(bytes: usize) -> u32 {
    u32::try_from(bytes).unwrap_or(u32::MAX)
}

fn send(mut device: &File, message: &[u8]) {
    match device.write(message) {
        // ENOENT: it did not know the thing. ENODEV: it is unmounted.
        Ok(_) => {}
        Err(err) if is_nothing_to_forget(&err) => {}
        Err(err) => tracing::warn!("the kernel may show old content for a while: {err}"),
    }
}

fn is_nothing_to_forget(err: &io::Error) -> bool {
    matches!(
        err.raw_os_error(),
        Some(libc::ENOENT | libc::ENODEV | libc::ENOTDIR)
    )
}
