//! Method, path and query of a request as a call.
//!
//! Values in the query may be percent-encoded or not: clients do both.

use super::error::ApiError;

/// What a client wants.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Call {
    Daemon { mounts: bool },
    SetDaemon,
    Events,
    Superblock { mountpoint: String },
    Start,
    Exit { unmount: bool },
    SendFd,
    Takeover,
    Mount { mountpoint: String },
    Remount { mountpoint: String },
    Umount { mountpoint: String },
    Metrics { id: Option<String> },
    FileMetrics { id: Option<String>, latest: bool },
    Pattern,
    BackendMetrics { id: Option<String> },
    CacheMetrics { id: Option<String> },
    Inflight,
    Settings { scope: Option<String> },
    SetSettings { scope: String },
    Blobs,
    BindBlob,
    UnbindBlob,
    Prometheus,
    Debug,
}

/// Understands a request.
///
/// # Errors
/// No such path (404), or not with this method or without a query value (400).
pub(super) fn parse(method: &str, target: &str) -> Result<Call, ApiError> {
    let (path, query) = target.split_once('?').unwrap_or((target, ""));
    if let Some(call) = route(method, path, query) {
        return call;
    }
    let methods = ["GET", "PUT", "POST", "DELETE"];
    let is_known = methods
        .iter()
        .any(|method| route(method, path, "").is_some());
    Err(if is_known {
        ApiError::bad("BadRequest")
    } else {
        ApiError::not_found("NoRoute")
    })
}

/// The call of a path, if it takes this method.
fn route(method: &str, path: &str, query: &str) -> Option<Result<Call, ApiError>> {
    let id = || value(query, "id");
    let at = |call: fn(String) -> Call| required(query, "mountpoint").map(call);
    Some(Ok(match (path, method) {
        ("/api/v1/daemon", "GET") => Call::Daemon { mounts: true },
        ("/api/v2/daemon", "GET") => Call::Daemon { mounts: false },
        ("/api/v1/daemon" | "/api/v2/daemon", "PUT") => Call::SetDaemon,
        ("/api/v1/daemon/events", "GET") => Call::Events,
        ("/api/v1/daemon/backend", "GET") => {
            return Some(at(|mountpoint| Call::Superblock { mountpoint }));
        }
        ("/api/v1/daemon/start", "PUT") => Call::Start,
        ("/api/v1/daemon/exit", "PUT") => Call::Exit {
            unmount: value(query, "unmount").is_some_and(|text| text == "true"),
        },
        ("/api/v1/daemon/fuse/sendfd", "PUT") => Call::SendFd,
        ("/api/v1/daemon/fuse/takeover", "PUT") => Call::Takeover,
        ("/api/v1/mount", "POST") => return Some(at(|mountpoint| Call::Mount { mountpoint })),
        ("/api/v1/mount", "PUT") => return Some(at(|mountpoint| Call::Remount { mountpoint })),
        ("/api/v1/mount", "DELETE") => return Some(at(|mountpoint| Call::Umount { mountpoint })),
        ("/api/v1/metrics", "GET") => Call::Metrics { id: id() },
        ("/api/v1/metrics/files", "GET") => Call::FileMetrics {
            id: id(),
            latest: value(query, "latest").is_some_and(|text| text == "true"),
        },
        ("/api/v1/metrics/pattern", "GET") => Call::Pattern,
        ("/api/v1/metrics/backend", "GET") => Call::BackendMetrics { id: id() },
        ("/api/v1/metrics/blobcache", "GET") => Call::CacheMetrics { id: id() },
        ("/api/v1/metrics/inflight", "GET") => Call::Inflight,
        ("/api/v1/config", "GET") => Call::Settings { scope: id() },
        ("/api/v1/config", "PUT") => {
            return Some(required(query, "id").map(|scope| Call::SetSettings { scope }));
        }
        ("/api/v2/blobs", "GET") => Call::Blobs,
        ("/api/v2/blobs", "PUT") => Call::BindBlob,
        ("/api/v2/blobs", "DELETE") => Call::UnbindBlob,
        ("/metrics", "GET") => Call::Prometheus,
        ("/debug", "GET") => Call::Debug,
        _ => return None,
    }))
}

fn required(query: &str, key: &str) -> Result<String, ApiError> {
    value(query, key).ok_or_else(|| {
        ApiError::bad(format!(
            "QueryString(\"'{key}' should be specified in query string\")"
        ))
    })
}

/// The value of a key; empty counts as missing.
fn value(query: &str, key: &str) -> Option<String> {
    let mut pairs = query.split('&').filter_map(|pair| pair.split_once('='));
    let (_, text) = pairs.find(|(name, _)| *name == key)?;
    decoded(text).filter(|text| !text.is_empty())
}

/// Resolves `%2F` and the like. What only looks like that stays as it is.
fn decoded(text: &str) -> Option<String> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((first, tail)) = rest.split_first() {
        let code = tail.get(..2).filter(|_| *first == b'%').and_then(|hex| {
            let hex = std::str::from_utf8(hex).ok()?;
            // Rust would take a sign in front of a digit.
            let is_hex = hex.bytes().all(|byte| byte.is_ascii_hexdigit());
            u8::from_str_radix(hex, 16).ok().filter(|_| is_hex)
        });
        rest = match code {
            Some(byte) => {
                bytes.push(byte);
                tail.get(2..).unwrap_or_default()
            }
            None => {
                bytes.push(*first);
                tail
            }
        };
    }
    String::from_utf8(bytes).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_may_be_encoded_or_not() {
        for target in [
            "/api/v1/mount?mountpoint=%2Fa%2fb",
            "/api/v1/mount?x=1&mountpoint=/a/b",
        ] {
            let mountpoint = "/a/b".to_owned();
            assert_eq!(parse("DELETE", target), Ok(Call::Umount { mountpoint }));
        }
        assert_eq!(decoded("100%").as_deref(), Some("100%"));
        assert_eq!(decoded("%+1%").as_deref(), Some("%+1%"));
        assert_eq!(decoded("%ff"), None);
    }

    #[test]
    fn refusals_say_what_clients_know() {
        let status = |method, target| {
            let err = parse(method, target).unwrap_err();
            (err.status, err.message)
        };
        assert_eq!(status("GET", "/nowhere"), (404, "NoRoute".to_owned()));
        assert_eq!(
            status("DELETE", "/api/v1/daemon"),
            (400, "BadRequest".to_owned())
        );
        assert_eq!(
            status("GET", "/api/v1/mount"),
            (400, "BadRequest".to_owned())
        );
        assert_eq!(
            status("POST", "/api/v1/mount?mountpoint="),
            (
                400,
                "QueryString(\"'mountpoint' should be specified in query string\")".to_owned()
            )
        );
    }

    proptest::proptest! {
        #[test]
        fn nothing_panics(method in "[A-Z]{0,7}", target in "\\PC{0,80}") {
            let _ = parse(&method, &target);
        }

        #[test]
        fn encoding_is_undone(bytes in "\\PC{1,40}") {
            let encoded: String = bytes.bytes().map(|byte| format!("%{byte:02x}")).collect();
            proptest::prop_assert_eq!(decoded(&encoded), Some(bytes));
        }
    }
}
