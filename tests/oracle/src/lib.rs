//! A second opinion on the image format: the published crates `nydus-rafs` and
//! `nydus-builder` read what our builder wrote, and write what our reader reads.
//!
//! - [`read`], [`build`]: their reader and their builder
//! - [`ours`]: our reader, over [`expand`]
//! - [`describe`], [`compare`]: one description of a tree for every reader
//! - [`program`]: our builder, as the program that users run
//! - [`nasty`], [`sources`]: the source tree; [`matrix`]: the option sets
//! - [`stored`]: images kept on disk with the tree they must read as
//!
//! Nothing of the product depends on this crate. See `README.md` for how to run it.

pub mod build;
pub mod compare;
pub mod describe;
#[path = "../../support/expand.rs"]
pub mod expand;
#[path = "../../support/fixtures.rs"]
pub mod fixtures;
#[path = "../../support/matrix.rs"]
pub mod matrix;
pub mod nasty;
pub mod ours;
pub mod program;
pub mod read;
pub mod sources;
pub mod stored;
