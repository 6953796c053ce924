//! Which failures pass, and how long to wait for that.
//!
//! Overload (429, 5xx) and broken connections are tried again with a growing,
//! jittered pause; `Retry-After` is honoured up to a bound. A 401 renews the log-in
//! once: tokens expire during long conversions. Everything else is final.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use oci_client::errors::{OciDistributionError, OciErrorCode};

use crate::oci::error::{Cause, OciError};

/// How often a request is made before its failure is reported.
pub(super) const ATTEMPTS: u32 = 5;
/// Pause before the second attempt; doubles from one to the next.
const FIRST_PAUSE: Duration = Duration::from_millis(if cfg!(test) { 1 } else { 300 });
/// A server's wish for a longer pause is not followed.
const LONGEST_PAUSE: Duration = Duration::from_secs(30);

/// One attempt of a request.
#[derive(Clone, Copy, Debug)]
pub(super) struct Attempt {
    /// The last attempt was answered with 401.
    pub(super) renew_login: bool,
}

/// How one attempt failed.
#[derive(Debug)]
pub(super) enum Failure {
    /// The server answered `status`.
    Status {
        status: u16,
        text: String,
        wait: Option<Duration>,
    },
    /// No usable answer.
    Broken(Cause),
    /// Trying again is pointless.
    Final(OciError),
}

impl Failure {
    pub(super) fn of_request(error: reqwest::Error) -> Self {
        // The URL is part of our own error; a redirected one may carry a signature.
        Self::Broken(error.without_url().into())
    }

    pub(super) fn of_client(error: OciDistributionError) -> Self {
        use OciDistributionError as E;
        match error {
            E::ServerError { code, message, .. } => Self::Status {
                status: code,
                text: super::quote(message.as_bytes()),
                wait: None,
            },
            E::UnauthorizedError { .. } => Self::Status {
                status: 401,
                text: String::new(),
                wait: None,
            },
            E::AuthenticationFailure(message) => Self::Status {
                status: 401,
                text: super::quote(message.as_bytes()),
                wait: None,
            },
            E::RegistryError { envelope, .. } => {
                let code = envelope.errors.first().map(|error| &error.code);
                let status = match code {
                    Some(OciErrorCode::Toomanyrequests) => 429,
                    Some(OciErrorCode::Unauthorized) => 401,
                    Some(OciErrorCode::Denied) => 403,
                    Some(
                        OciErrorCode::BlobUnknown
                        | OciErrorCode::ManifestUnknown
                        | OciErrorCode::NameUnknown
                        | OciErrorCode::NotFound,
                    ) => 404,
                    _ => 400,
                };
                let text = super::quote(envelope.to_string().as_bytes());
                Self::Status {
                    status,
                    text,
                    wait: None,
                }
            }
            E::RequestError(error) => match error.status() {
                Some(status) => Self::Status {
                    status: status.as_u16(),
                    text: String::new(),
                    wait: None,
                },
                None => Self::of_request(error),
            },
            other => Self::Broken(other.into()),
        }
    }

    /// Whether the same request may succeed later.
    pub(super) fn passes(&self) -> bool {
        match self {
            Self::Status { status, .. } => matches!(status, 408 | 425 | 429 | 500..=599),
            Self::Broken(_) => true,
            Self::Final(_) => false,
        }
    }

    /// How long the server asked to wait.
    fn wait(&self) -> Option<Duration> {
        match self {
            Self::Status { wait, .. } => *wait,
            Self::Broken(_) | Self::Final(_) => None,
        }
    }

    /// The failure as the caller sees it, after `attempts` attempts.
    pub(super) fn into_error(
        self,
        at: &str,
        op: &'static str,
        offset: u64,
        attempts: u32,
    ) -> OciError {
        let at = at.to_owned();
        match self {
            Self::Status { status: 404, .. } => OciError::NotFound { at },
            Self::Status {
                status: status @ (401 | 403),
                text,
                ..
            } => OciError::Unauthorized {
                at,
                status,
                detail: text,
            },
            Self::Status { status, text, .. } => OciError::Status {
                at,
                status,
                detail: text,
            },
            Self::Broken(source) => OciError::Request {
                at,
                op,
                offset,
                attempts,
                source,
            },
            Self::Final(error) => error,
        }
    }
}

/// Runs `request` until it succeeds, fails for good, or has failed [`ATTEMPTS`] times.
pub(super) async fn run<T, F>(
    at: &str,
    op: &'static str,
    mut request: impl FnMut(Attempt) -> F,
) -> Result<T, OciError>
where
    F: Future<Output = Result<T, Failure>>,
{
    let mut attempt = Attempt { renew_login: false };
    let mut number = 1;
    loop {
        let failure = match request(attempt).await {
            Ok(value) => return Ok(value),
            Err(failure) => failure,
        };
        let unauthorized = matches!(failure, Failure::Status { status: 401, .. });
        if unauthorized && !attempt.renew_login {
            attempt.renew_login = true;
        } else if number >= ATTEMPTS || !failure.passes() {
            return Err(failure.into_error(at, op, 0, number));
        } else {
            tracing::debug!(at, op, number, ?failure, "trying again");
            pause(number, &failure).await;
        }
        number += 1;
    }
}

/// Waits before attempt `number` + 1.
pub(super) async fn pause(number: u32, failure: &Failure) {
    let doubled = FIRST_PAUSE.saturating_mul(1 << number.saturating_sub(1).min(10));
    let jittered = doubled.mul_f64(0.5 + jitter());
    tokio::time::sleep(
        jittered
            .max(failure.wait().unwrap_or_default())
            .min(LONGEST_PAUSE),
    )
    .await;
}

/// 0 to 1; the clock is random enough to keep clients from marching in step.
fn jitter() -> f64 {
    let nanos = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |now| now.subsec_nanos());
    f64::from(nanos % 1000) / 1000.0
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use super::*;

    fn status(status: u16) -> Failure {
        Failure::Status {
            status,
            text: String::new(),
            wait: None,
        }
    }

    #[tokio::test]
    async fn passing_failures_are_tried_again_but_not_for_ever() {
        let calls = Cell::new(0);
        let result: Result<(), _> = run("u", "op", |_| {
            calls.set(calls.get() + 1);
            async { Err(status(503)) }
        })
        .await;
        assert!(matches!(result, Err(OciError::Status { status: 503, .. })));
        assert_eq!(calls.get(), ATTEMPTS);
    }

    #[tokio::test]
    async fn a_401_renews_the_login_once() {
        let calls = Cell::new(0);
        let result: Result<(), _> = run("u", "op", |attempt| {
            calls.set(calls.get() + 1);
            assert_eq!(attempt.renew_login, calls.get() > 1);
            async { Err(status(401)) }
        })
        .await;
        assert!(matches!(result, Err(OciError::Unauthorized { .. })));
        assert_eq!(calls.get(), 2);
    }

    #[tokio::test]
    async fn what_is_missing_stays_missing() {
        let result: Result<(), _> = run("u", "op", |_| async { Err(status(404)) }).await;
        assert!(matches!(result, Err(OciError::NotFound { .. })));
    }
}
