//! The cache directory and the files of one blob in it.
