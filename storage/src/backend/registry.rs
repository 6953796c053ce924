//! Blobs in an OCI registry: ranged GETs, authentication, retries.
