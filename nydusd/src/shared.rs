//! What all images of the daemon share: memory for fetches, turns at the processor, and
//! the limits of servers.
//!
//! One [`Shared`] is made per process and handed to whoever opens images, so that two
//! mounts together take no more than one.

use std::sync::{Arc, OnceLock};
use std::time::Duration;

use storage::backend::Backend;
use storage::budget::Budget;
use storage::cores::Cores;
use storage::gate::{Gate, Gates, Limits};

/// Limits of the process. Cheap to clone; clones are the same limits.
#[derive(Clone, Debug, Default)]
pub(crate) struct Shared {
    slow_read: Option<Duration>,
    memory: Arc<OnceLock<Budget>>,
    cores: Cores,
    gates: Gates,
}

impl Shared {
    /// * `slow_read`: a read that waits longer is logged; `None` for none is.
    pub(crate) fn new(slow_read: Option<Duration>) -> Self {
        Self {
            slow_read,
            ..Self::default()
        }
    }

    /// Waits of readers that are logged.
    pub(crate) fn slow_read(&self) -> Duration {
        self.slow_read.unwrap_or(Duration::MAX)
    }

    /// Memory for fetches of all images: the most that any of them asked for.
    ///
    /// * `bytes`: what this one asks for.
    pub(crate) fn memory(&self, bytes: u64) -> Budget {
        let memory = self.memory.get_or_init(|| Budget::new(bytes));
        memory.raise(bytes);
        memory.clone()
    }

    /// Turns at the processor for all images.
    pub(crate) fn cores(&self) -> Cores {
        self.cores.clone()
    }

    /// The gate of the server that `backend` asks; `None` for one without a server.
    ///
    /// * `limits`: replace those that other images chose for the same server.
    pub(crate) fn gate(&self, backend: &dyn Backend, limits: Option<Limits>) -> Option<Gate> {
        Some(self.gates.of(&backend.place()?, limits))
    }
}

#[cfg(test)]
mod tests {
    use storage::backend::local::LocalBackend;
    use storage::backend::registry::{RegistryBackend, RegistryConfig};

    use super::*;

    #[test]
    fn images_share_memory_and_the_gate_of_their_server() {
        let shared = Shared::default();
        let (small, large) = (shared.memory(100), shared.clone().memory(200));
        assert_eq!((small.limit(), large.limit()), (200, 200));
        assert_eq!(shared.memory(50).limit(), 200);

        let registry = |host, repo| RegistryBackend::new(RegistryConfig::new(host, repo)).unwrap();
        let limits = Limits {
            requests: 5,
            ..Limits::default()
        };
        let one = shared
            .gate(&registry("a.example", "x"), Some(limits))
            .unwrap();
        let two = shared.gate(&registry("a.example", "y"), None).unwrap();
        let other = shared.gate(&registry("b.example", "x"), None).unwrap();
        assert_eq!((one.limits().requests, two.limits().requests), (5, 5));
        assert_eq!(other.limits(), Limits::default());
        assert!(shared.gate(&LocalBackend::new(Vec::new()), None).is_none());
    }
}
