//! Why bytes of a blob could not be served.
