//! Hostile bytes in the place of a pre-access event of the kernel.
#![no_main]

use libfuzzer_sys::fuzz_target;

#[path = "../../../nydusd/src/erofs/event.rs"]
#[allow(clippy::module_inception, reason = "the name of the parser's file")]
mod event;

use event::Event;

/// Memory that an input may take: nothing is copied.
const BASE: usize = 4 << 10;
const FACTOR: usize = 1;

fuzz_target!(|data: &[u8]| fuzz::memory::bounded(data.len(), BASE, FACTOR, || check(data)));

fn check(data: &[u8]) {
    let Ok(event) = Event::parse(data) else {
        return;
    };
    assert!(event.range.start <= event.range.end);
    let len = data.first_chunk().map(|len| u32::from_ne_bytes(*len));
    let len = usize::try_from(len.expect("an event says its length")).expect("64 bits");
    assert!(len <= data.len(), "an event ends where its bytes end");
    // What follows an event is not part of it.
    assert_eq!(Event::parse(&data[..len]), Ok(event));
    for cut in 0..len.min(256) {
        assert!(Event::parse(&data[..cut]).is_err(), "{cut} bytes of {len}");
    }
}
