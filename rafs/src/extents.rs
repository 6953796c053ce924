//! File ranges to chunks: pure arithmetic over chunk indexes.
