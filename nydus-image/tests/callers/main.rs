//! The command lines that other programs write, each run as they write it: image
//! converters in Go, build tools, and the scripts that test them.
//!
//! - [`place`]: running a call with its FIFOs and its standard input
//! - [`pack`]: `create` by the converter that containerd, nerdctl and BuildKit share
//! - [`join`]: `merge` by the same
//! - [`back`]: `unpack` and `export`, which lead back to plain files
//! - [`tools`]: `nydusify`, the snapshotter's helpers, smoke tests
//! - [`refused`]: what is not supported, and how that is said
//! - [`detect`]: what callers read from help and version
//! - [`interrupted`]: a command that is told to end
//!
//! Everything they rely on is checked and nothing else: streams, exit codes, files, and
//! the fields of reports.

#![allow(
    clippy::unwrap_used,
    reason = "a test that cannot go on fails where it stands"
)]

mod back;
mod detect;
mod interrupted;
mod join;
mod pack;
mod place;
mod refused;
mod tools;
