//! Layers into one tree, with whiteouts.
