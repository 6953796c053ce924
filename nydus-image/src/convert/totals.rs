//! How much a conversion read, made and sent.

use super::job::Layers;
use super::plan::Plan;

/// Sums for the last line.
pub(super) struct Totals {
    pub(super) layers: usize,
    pub(super) source: u64,
    pub(super) blobs: u64,
    pub(super) sent: u64,
}

impl Totals {
    pub(super) fn of(plan: &Plan, converted: &Layers) -> Self {
        let mut totals = Self {
            layers: converted.len(),
            source: 0,
            blobs: 0,
            sent: 0,
        };
        for layer in plan.layers().unwrap_or_default() {
            totals.source = totals.source.saturating_add(layer.descriptor.size);
        }
        for done in converted.values() {
            totals.blobs += done.layer.size;
            totals.sent += if done.sent { done.layer.size } else { 0 };
        }
        totals
    }
}
