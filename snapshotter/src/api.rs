//! Messages and service of a snapshotter, as on the wire.
//!
//! Made from `proto/*.proto` by `proto/generate`; change those, then run it.

#![allow(
    missing_docs,
    unreachable_pub,
    missing_debug_implementations,
    clippy::allow_attributes_without_reason,
    reason = "generated code"
)]

/// `containerd.types`.
pub mod types {
    include!("api/containerd.types.rs");
}

/// `containerd.services.snapshots.v1`, under its full path because generated code
/// refers to other packages relative to it.
pub mod services {
    /// See above.
    pub mod snapshots {
        /// See above.
        pub mod v1 {
            include!("api/containerd.services.snapshots.v1.rs");
        }
    }
}

pub use services::snapshots::v1 as snapshots;
