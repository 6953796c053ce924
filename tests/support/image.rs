//! OCI images from directory trees.
//!
//! [`layer`] finds what one tree adds to another and writes it as a tar, with
//! whiteouts for what vanished; [`layout`] joins tars to an image in the OCI
//! layout that every tool reads; [`programs`] makes trees that can run. Archives are written by GNU tar: what our own
//! reader has to understand should not come from our own idea of the format.

pub mod layer;
pub mod layout;
pub mod programs;
