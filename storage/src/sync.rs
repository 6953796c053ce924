//! Locks and atomics, from std or from loom.
