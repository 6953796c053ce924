//! Images by reference: registries and OCI layouts.
