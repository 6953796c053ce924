//! One blob of an image: serve from the cache, fill on demand.
