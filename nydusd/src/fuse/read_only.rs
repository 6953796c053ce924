//! Requests that change something, and the one answer to all of them.
//!
//! The mount is read-only, so the kernel refuses changes before it asks. These
//! answers are for whoever finds a way around that.

use std::io;

use crate::errno::{FsError, errno};

// For the macro, which is used where these names are not known.
pub(crate) use fuse_backend_rs::abi::fuse_abi::{CreateIn, stat64};
pub(crate) use fuse_backend_rs::api::filesystem::{
    Context, Entry, OpenOptions, SetattrValid, ZeroCopyReader,
};

/// The answer.
pub(crate) fn refusal() -> io::Error {
    io::Error::from_raw_os_error(errno(&FsError::ReadOnly))
}

/// The methods of a [`FileSystem`](fuse_backend_rs::api::filesystem::FileSystem)
/// that change something.
macro_rules! changes_are_refused {
    () => {
        fn setattr(
            &self,
            _ctx: &$crate::fuse::read_only::Context,
            _node: u64,
            _attr: $crate::fuse::read_only::stat64,
            _handle: Option<u64>,
            _valid: $crate::fuse::read_only::SetattrValid,
        ) -> ::std::io::Result<($crate::fuse::read_only::stat64, ::std::time::Duration)> {
            Err($crate::fuse::read_only::refusal())
        }

        fn symlink(
            &self,
            _ctx: &$crate::fuse::read_only::Context,
            _to: &::std::ffi::CStr,
            _dir: u64,
            _name: &::std::ffi::CStr,
        ) -> ::std::io::Result<$crate::fuse::read_only::Entry> {
            Err($crate::fuse::read_only::refusal())
        }

        fn mknod(
            &self,
            _ctx: &$crate::fuse::read_only::Context,
            _dir: u64,
            _name: &::std::ffi::CStr,
            _mode: u32,
            _rdev: u32,
            _umask: u32,
        ) -> ::std::io::Result<$crate::fuse::read_only::Entry> {
            Err($crate::fuse::read_only::refusal())
        }

        fn mkdir(
            &self,
            _ctx: &$crate::fuse::read_only::Context,
            _dir: u64,
            _name: &::std::ffi::CStr,
            _mode: u32,
            _umask: u32,
        ) -> ::std::io::Result<$crate::fuse::read_only::Entry> {
            Err($crate::fuse::read_only::refusal())
        }

        fn unlink(
            &self,
            _ctx: &$crate::fuse::read_only::Context,
            _dir: u64,
            _name: &::std::ffi::CStr,
        ) -> ::std::io::Result<()> {
            Err($crate::fuse::read_only::refusal())
        }

        fn rmdir(
            &self,
            _ctx: &$crate::fuse::read_only::Context,
            _dir: u64,
            _name: &::std::ffi::CStr,
        ) -> ::std::io::Result<()> {
            Err($crate::fuse::read_only::refusal())
        }

        fn rename(
            &self,
            _ctx: &$crate::fuse::read_only::Context,
            _dir: u64,
            _name: &::std::ffi::CStr,
            _new_dir: u64,
            _new_name: &::std::ffi::CStr,
            _flags: u32,
        ) -> ::std::io::Result<()> {
            Err($crate::fuse::read_only::refusal())
        }

        fn link(
            &self,
            _ctx: &$crate::fuse::read_only::Context,
            _node: u64,
            _dir: u64,
            _name: &::std::ffi::CStr,
        ) -> ::std::io::Result<$crate::fuse::read_only::Entry> {
            Err($crate::fuse::read_only::refusal())
        }

        fn create(
            &self,
            _ctx: &$crate::fuse::read_only::Context,
            _dir: u64,
            _name: &::std::ffi::CStr,
            _args: $crate::fuse::read_only::CreateIn,
        ) -> ::std::io::Result<(
            $crate::fuse::read_only::Entry,
            Option<u64>,
            $crate::fuse::read_only::OpenOptions,
            Option<u32>,
        )> {
            Err($crate::fuse::read_only::refusal())
        }

        fn write(
            &self,
            _ctx: &$crate::fuse::read_only::Context,
            _node: u64,
            _handle: u64,
            _data: &mut dyn $crate::fuse::read_only::ZeroCopyReader,
            _size: u32,
            _offset: u64,
            _owner: Option<u64>,
            _delayed: bool,
            _flags: u32,
            _fuse_flags: u32,
        ) -> ::std::io::Result<usize> {
            Err($crate::fuse::read_only::refusal())
        }

        fn fallocate(
            &self,
            _ctx: &$crate::fuse::read_only::Context,
            _node: u64,
            _handle: u64,
            _mode: u32,
            _offset: u64,
            _length: u64,
        ) -> ::std::io::Result<()> {
            Err($crate::fuse::read_only::refusal())
        }

        fn setxattr(
            &self,
            _ctx: &$crate::fuse::read_only::Context,
            _node: u64,
            _name: &::std::ffi::CStr,
            _value: &[u8],
            _flags: u32,
        ) -> ::std::io::Result<()> {
            Err($crate::fuse::read_only::refusal())
        }

        fn removexattr(
            &self,
            _ctx: &$crate::fuse::read_only::Context,
            _node: u64,
            _name: &::std::ffi::CStr,
        ) -> ::std::io::Result<()> {
            Err($crate::fuse::read_only::refusal())
        }
    };
}

pub(crate) use changes_are_refused;
