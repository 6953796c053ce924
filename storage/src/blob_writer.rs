//! Writes one blob file front to back: chunk data, tables, tar headers.
