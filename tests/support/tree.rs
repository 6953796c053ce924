//! Directory trees: one text that tells two of them apart, and a tree that has
//! one of everything.

pub mod describe;
pub mod nasty;

pub use describe::{Detail, describe, difference};
