//! nydusd
fn main() {}
