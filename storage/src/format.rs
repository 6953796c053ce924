//! The container format of a blob file, shared by reader and builder.
