//! Blobs in local directories.
