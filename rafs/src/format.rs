//! Raw on-disk structures, nothing else.
