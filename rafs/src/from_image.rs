//! A bootstrap back into a tree, to merge or rebuild it.
