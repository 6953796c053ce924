//! What the answer of a seed means: a status does not say enough.
//!
//! A daemon that fails says where in `X-Dragonfly-Error-Type`; that counts before the
//! status, because a piece that could not be fetched comes as a `200` without a body.
//! An answer that Dragonfly had no part in would warm nothing, however good it looks.

use std::fmt;
use std::ops::Range;

use reqwest::StatusCode;
use reqwest::header::{CONTENT_LENGTH, CONTENT_RANGE, HeaderMap, RETRY_AFTER};
use storage::oci::OciError;

/// The header of errors that a daemon makes, or passes on.
const ERROR_TYPE: &str = "x-dragonfly-error-type";
/// Headers of answers that went through Dragonfly; the second is that of old daemons.
const PARTICIPATED: [&str; 2] = ["x-dragonfly-task-id", "x-dragonfly-task-download-finished"];
/// Longest pause that a seed may ask for, in seconds.
const LONGEST_PAUSE: u64 = 30;

/// Why a range did not come.
#[derive(Debug)]
pub(super) enum Fault {
    /// The seed limits requests; seconds that it asks to wait.
    Throttled(u64),
    /// The operator of the seed does not want this.
    Blocked,
    /// The seed itself wants a password.
    SeedLogin,
    /// The seed did not understand the request.
    Refused(u16),
    /// The seed failed by itself.
    Seed(u16),
    /// The seed has no room.
    Full,
    /// The seed got this status from the registry.
    Registry(u16),
    /// The seed knows the blob, and could not reach the registry for a piece of it.
    Unreachable,
    /// The answer is not from Dragonfly.
    PassedThrough,
    /// An answer without meaning: the status.
    Status(u16),
    /// Other bytes than those that were asked for: what the answer says.
    WrongRange(String),
    /// More or fewer bytes than announced, or the connection failed.
    Transport(String),
    /// The bytes are not those of the image.
    Damaged(String),
    /// The registry gave no token.
    Login(OciError),
}

/// What may be done about it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Again {
    /// Nothing.
    Never,
    /// Ask once more after a pause of at least so many seconds.
    After(u64),
    /// Ask once more with a new token.
    WithNewToken,
}

impl Fault {
    pub(super) fn again(&self) -> Again {
        match self {
            Self::Throttled(seconds) => Again::After(*seconds),
            Self::Registry(401) => Again::WithNewToken,
            Self::Registry(429 | 500..=599) | Self::Seed(_) => Again::After(0),
            Self::Unreachable | Self::Transport(_) => Again::After(0),
            Self::Status(429 | 500..=599) => Again::After(0),
            Self::Blocked | Self::SeedLogin | Self::Refused(_) | Self::Full => Again::Never,
            Self::Registry(_) | Self::PassedThrough | Self::Status(_) => Again::Never,
            Self::WrongRange(_) | Self::Damaged(_) | Self::Login(_) => Again::Never,
        }
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Throttled(_) => f.write_str(
                "the seed limits requests (`proxy.server.requestRateLimit`) and would not take this one",
            ),
            Self::Blocked => f.write_str("the seed's block list forbids it"),
            Self::SeedLogin => f.write_str(
                "the seed wants a password of its own (`proxy.server.basicAuth`), which cannot be used with a registry",
            ),
            Self::Refused(status) => write!(f, "the seed refuses the request (HTTP {status})"),
            Self::Seed(status) => write!(f, "the seed failed (HTTP {status}); its log says why"),
            Self::Full => f.write_str("the disk of the seed is full"),
            Self::Registry(401) => f.write_str(
                "the registry wants other credentials (HTTP 401); log in with `docker login`, or set DOCKER_CONFIG",
            ),
            Self::Registry(404) => f.write_str("the registry has no such blob (HTTP 404)"),
            Self::Registry(status) => write!(f, "the registry answered the seed with HTTP {status}"),
            Self::Unreachable => f.write_str("the seed could not reach the registry"),
            Self::PassedThrough => f.write_str(
                "the answer has no X-Dragonfly-Task-ID: this is no Dragonfly proxy, or it passed the request on and keeps nothing",
            ),
            Self::Status(status) => write!(f, "HTTP {status}, and not from Dragonfly"),
            Self::WrongRange(sent) => write!(f, "other bytes than asked for: {sent}"),
            Self::Transport(what) => f.write_str(what),
            Self::Damaged(what) => write!(
                f,
                "the seed holds wrong bytes: {what}; remove the blob there (dfctl task rm) and preheat again"
            ),
            Self::Login(error) => write!(f, "no token for the registry: {error}"),
        }
    }
}

/// Accepts an answer whose body must be the bytes `asked` of a blob of `size` bytes.
pub(super) fn accept(
    status: StatusCode,
    headers: &HeaderMap,
    asked: &Range<u64>,
    size: u64,
) -> Result<(), Fault> {
    let text = |name: &str| headers.get(name).and_then(|value| value.to_str().ok());
    if let Some(kind) = text(ERROR_TYPE) {
        return Err(typed(kind, status.as_u16(), headers));
    }
    if !matches!(status, StatusCode::OK | StatusCode::PARTIAL_CONTENT) {
        return Err(Fault::Status(status.as_u16()));
    }
    if PARTICIPATED.iter().all(|name| !headers.contains_key(*name)) {
        return Err(Fault::PassedThrough);
    }
    let range = text(CONTENT_RANGE.as_str());
    let expected = format!("bytes {}-{}/{size}", asked.start, asked.end - 1);
    match range {
        Some(range) if range == expected => {}
        None if status == StatusCode::OK && *asked == (0..size) => {}
        other => {
            let sent = other.unwrap_or("no Content-Range");
            return Err(Fault::WrongRange(format!(
                "HTTP {}, {}, where {expected} is right",
                status.as_u16(),
                shown(sent)
            )));
        }
    }
    let len = asked.end - asked.start;
    match text(CONTENT_LENGTH.as_str()) {
        Some(sent) if sent.parse() != Ok(len) => Err(Fault::WrongRange(format!(
            "{} bytes announced, where {len} are right",
            shown(sent)
        ))),
        _ => Ok(()),
    }
}

/// An error that a daemon reports.
fn typed(kind: &str, status: u16, headers: &HeaderMap) -> Fault {
    let wait = headers
        .get(RETRY_AFTER)
        .and_then(|value| value.to_str().ok()?.parse().ok())
        .unwrap_or(0_u64)
        .min(LONGEST_PAUSE);
    match (kind, status) {
        ("proxy", 429) => Fault::Throttled(wait),
        ("proxy", 403) => Fault::Blocked,
        ("proxy", 401) => Fault::SeedLogin,
        ("proxy", 500..=599) => Fault::Seed(status),
        ("proxy", _) | ("dfdaemon", 400..=499) => Fault::Refused(status),
        ("dfdaemon", 507) => Fault::Full,
        ("backend", 200..=299) => Fault::Unreachable,
        ("backend", _) => Fault::Registry(status),
        _ => Fault::Seed(status),
    }
}

/// A header of a stranger, cut and without control characters.
fn shown(text: &str) -> String {
    let plain = text.chars().filter(|char| !char.is_control());
    plain.take(80).collect()
}

#[cfg(test)]
mod tests {
    use reqwest::header::{HeaderName, HeaderValue};

    use super::*;

    fn answer(status: u16, headers: &[(&str, &str)]) -> Result<(), Fault> {
        let mut map = HeaderMap::new();
        for (name, value) in headers {
            let name: HeaderName = name.parse().unwrap();
            map.insert(name, HeaderValue::from_str(value).unwrap());
        }
        let status = StatusCode::from_u16(status).unwrap();
        accept(status, &map, &(4..8), 10)
    }

    const TASK: (&str, &str) = ("X-Dragonfly-Task-ID", "00");

    #[test]
    fn the_type_of_an_error_counts_before_its_status() {
        use Again::{After, Never, WithNewToken};
        for (kind, status, words, again) in [
            ("proxy", 429, "limits requests", After(7)),
            ("proxy", 403, "block list", Never),
            ("proxy", 401, "basicAuth", Never),
            ("proxy", 400, "refuses", Never),
            ("dfdaemon", 400, "refuses", Never),
            ("dfdaemon", 422, "refuses", Never),
            ("dfdaemon", 500, "seed failed", After(0)),
            ("dfdaemon", 507, "full", Never),
            ("backend", 401, "docker login", WithNewToken),
            ("backend", 403, "HTTP 403", Never),
            ("backend", 404, "no such blob", Never),
            ("backend", 429, "HTTP 429", After(0)),
            ("backend", 500, "HTTP 500", After(0)),
            // A success by its status, and by its headers.
            ("backend", 200, "could not reach", After(0)),
            ("something new", 200, "seed failed", After(0)),
        ] {
            let headers = [
                ("X-Dragonfly-Error-Type", kind),
                ("Retry-After", "7"),
                ("Content-Range", "bytes 4-7/10"),
                TASK,
            ];
            let fault = answer(status, &headers).unwrap_err();
            assert!(
                fault.to_string().contains(words),
                "{kind} {status}: {fault}"
            );
            assert_eq!(fault.again(), again, "{kind} {status}");
        }
    }

    #[test]
    fn only_the_bytes_asked_for_are_accepted() {
        let right = ("Content-Range", "bytes 4-7/10");
        assert!(answer(206, &[TASK, right, ("Content-Length", "4")]).is_ok());
        // Daemons before the middle of 2026.
        assert!(answer(200, &[TASK, right]).is_ok());
        for headers in [
            &[TASK][..],
            &[TASK, ("Content-Range", "bytes 4-7/11")],
            &[TASK, ("Content-Range", "bytes 0-3/10")],
            &[TASK, ("Content-Range", "bytes */10")],
            &[TASK, right, ("Content-Length", "5")],
            &[TASK, right, ("Content-Length", "x")],
        ] {
            for status in [200, 206] {
                let fault = answer(status, headers).unwrap_err();
                assert!(matches!(fault, Fault::WrongRange(_)), "{headers:?}");
                assert_eq!(fault.again(), Again::Never);
            }
        }
        let status = StatusCode::OK;
        let mut map = HeaderMap::new();
        map.insert("x-dragonfly-task-id", HeaderValue::from_static("00"));
        assert!(accept(status, &map, &(0..10), 10).is_ok());
        assert!(accept(status, &map, &(0..9), 10).is_err());
    }

    #[test]
    fn what_dragonfly_had_no_part_in_is_no_success() {
        let fault = answer(206, &[("Content-Range", "bytes 4-7/10")]).unwrap_err();
        assert!(matches!(fault, Fault::PassedThrough));
        assert!(matches!(answer(404, &[]), Err(Fault::Status(404))));
        assert!(matches!(answer(302, &[TASK]), Err(Fault::Status(302))));
    }
}
