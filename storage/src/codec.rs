//! Compression and decompression of chunks and tables.
#![forbid(unsafe_code)]
