//! Single-flight filling of missing chunks.
