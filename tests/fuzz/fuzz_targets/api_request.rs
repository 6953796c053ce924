//! A hostile request on the control socket: its method, a line end, path and query.
#![no_main]

use libfuzzer_sys::fuzz_target;

#[path = "../../../nydusd/src/api/error.rs"]
#[allow(
    dead_code,
    reason = "a program's own module: not everything is for the parser"
)]
mod error;
#[path = "../../../nydusd/src/api/request.rs"]
mod request;

use request::{Call, parse};

/// Memory that an input may take: an answer, and so many times its length.
const BASE: usize = 64 << 10;
const FACTOR: usize = 16;

fuzz_target!(|data: &[u8]| fuzz::memory::bounded(data.len(), BASE, FACTOR, || check(data)));

fn check(data: &[u8]) {
    // What comes from the HTTP library is text.
    let text = String::from_utf8_lossy(data);
    let (method, target) = text.split_once('\n').unwrap_or(("GET", &text));
    match parse(method, target) {
        Ok(call) => understood(&call),
        Err(refusal) => {
            assert!(matches!(refusal.status, 400 | 404), "{}", refusal.status);
            let body: serde_json::Value =
                serde_json::from_str(&refusal.body()).expect("JSON of our own");
            assert_eq!(body["message"], refusal.message);
        }
    }
}

/// A value reads the same however it is written.
fn understood(call: &Call) {
    let (method, target, value) = match call {
        Call::Mount { mountpoint } => ("POST", "/api/v1/mount?mountpoint=", mountpoint),
        Call::Remount { mountpoint } => ("PUT", "/api/v1/mount?mountpoint=", mountpoint),
        Call::Umount { mountpoint } => ("DELETE", "/api/v1/mount?mountpoint=", mountpoint),
        Call::Superblock { mountpoint } => {
            ("GET", "/api/v1/daemon/backend?mountpoint=", mountpoint)
        }
        Call::SetSettings { scope } => ("PUT", "/api/v1/config?id=", scope),
        _ => return,
    };
    assert!(!value.is_empty(), "an empty value counts as missing");
    let codes = value.bytes().map(|byte| format!("%{byte:02X}"));
    let encoded = format!("{target}{}", codes.collect::<String>());
    let again = parse(method, &encoded).expect("the same value, encoded");
    assert_eq!(&again, call);
}
