//! Which chunks of a blob are in its cache file: a persistent bitmap.
