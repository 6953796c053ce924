//! What the end-to-end tests and the demo are made of: real parts, started and
//! stopped without leftovers.
//!
//! - [`binaries`]: the programs under test, built when they are stale
//! - [`command`], [`process`]: run a program to its end, or keep one running
//! - [`mount`]: `nydusd` serving a mount point, and the kernel's own EROFS
//! - [`api`]: a client of the control socket
//! - [`notify`]: a stand-in for the service manager
//! - [`supervisor`]: a stand-in for the supervisor of a daemon
//! - [`registry`], [`tokens`]: Debian's `docker-registry`, open or with credentials
//! - [`nginx`], [`object_store`]: a real web server, and a real S3-compatible one
//! - [`proxy`], [`proxy::chaos`]: an HTTP proxy that misbehaves as told, or by chance
//! - [`manager`]: a stand-in for Dragonfly's manager
//! - [`blob`]: one blob, and what it must read as
//! - [`netns`], [`dragonfly`]: machines on a network of their own, and a real Dragonfly there
//! - [`relay`]: a slower, longer link in front of a server
//! - [`tree`]: describe a directory tree, and make a nasty one
//! - [`image`]: layers and OCI layouts from trees
//! - [`fixtures`]: images that Nydus v2.4 wrote
//! - [`plugin`]: `nydus-snapshotter`, asked as containerd asks it
//! - [`containerd`], [`cri`]: Debian's containerd with it, asked as kubelet asks it
//! - [`matrix`], [`expand`]: option sets to build with, and blobs laid out for the kernel
//!
//! Promises: everything that is started is owned by a value that stops it when
//! dropped, by process id; every wait has a deadline; a missing tool is an error
//! that says what to install.

pub mod api;
pub mod binaries;
pub mod blob;
pub mod command;
pub mod containerd;
pub mod cri;
pub mod dragonfly;
pub mod expand;
pub mod fixtures;
pub mod image;
pub mod manager;
pub mod matrix;
pub mod mount;
pub mod netns;
pub mod nginx;
pub mod notify;
pub mod object_store;
pub mod plugin;
pub mod process;
pub mod proxy;
pub mod registry;
pub mod relay;
pub mod supervisor;
pub mod tokens;
pub mod tree;
