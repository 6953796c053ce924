//! A tree into the bytes of a bootstrap.
