//! A bootstrap's bytes, checked.
