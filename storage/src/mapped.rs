//! Read-only memory maps, the only place that creates them.
