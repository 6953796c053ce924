//! Names, units and meaning of every counter of the data path.
