//! The file-system view: lookup, readdir, attributes, extents.
