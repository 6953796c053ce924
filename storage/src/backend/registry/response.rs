//! What answers mean: which failures may pass, and what may be said about them.

use std::ops::Range;
use std::time::Duration;

use reqwest::header::{CONTENT_RANGE, RETRY_AFTER};
use reqwest::{Response, StatusCode};
use url::Url;

use super::BackendError;

/// How much of what a server sent goes into a message, in bytes.
const EXCERPT: usize = 200;

/// A failed attempt, and what it means for the next one.
#[derive(Debug)]
pub(super) struct Failure {
    pub(super) error: BackendError,
    /// Whether another attempt may succeed.
    pub(super) passing: bool,
    /// What the server asked for with `Retry-After`.
    pub(super) pause: Option<Duration>,
}

impl Failure {
    pub(super) fn lasting(error: BackendError) -> Self {
        Self {
            error,
            passing: false,
            pause: None,
        }
    }

    pub(super) fn passing(error: BackendError) -> Self {
        Self {
            error,
            passing: true,
            pause: None,
        }
    }
}

/// The URL without what may be secret: user, password, query and fragment.
pub(super) fn shown(url: &Url) -> String {
    let host = url.host_str().unwrap_or_default();
    let port = url
        .port()
        .map(|port| format!(":{port}"))
        .unwrap_or_default();
    format!("{}://{host}{port}{}", url.scheme(), url.path())
}

pub(super) fn transport(url: &Url, action: &'static str, source: reqwest::Error) -> Failure {
    // The error's own text repeats the URL, with the signature of a signed one.
    let source = source.without_url();
    Failure::passing(BackendError::Transport {
        url: shown(url),
        action,
        source: source.into(),
    })
}

/// What an answer with another status than 200 or 206 means.
pub(super) async fn refusal(mut response: Response) -> Failure {
    let status = response.status();
    let url = shown(response.url());
    // In seconds; the form with a date is rare (RFC 9110, 10.2.3).
    let pause = response
        .headers()
        .get(RETRY_AFTER)
        .and_then(|value| value.to_str().ok());
    let pause = pause
        .and_then(|value| value.trim().parse().ok())
        .map(Duration::from_secs);
    let mut body = Vec::new();
    while body.len() < EXCERPT
        && let Ok(Some(piece)) = response.chunk().await
    {
        body.extend_from_slice(&piece[..piece.len().min(EXCERPT - body.len())]);
    }
    let text: String = String::from_utf8_lossy(&body)
        .chars()
        .filter(|c| !c.is_control())
        .collect();
    let detail = if text.trim().is_empty() {
        text
    } else {
        format!(": {}", text.trim())
    };
    let passing = status.is_server_error()
        || matches!(
            status,
            StatusCode::TOO_MANY_REQUESTS | StatusCode::REQUEST_TIMEOUT
        );
    Failure {
        error: BackendError::Status {
            url,
            status: status.as_u16(),
            detail,
        },
        passing,
        pause,
    }
}

/// Checks that a 206 starts where it was asked to; returns the bytes to skip: none.
pub(super) fn check_content_range(response: &Response, asked: &Range<u64>) -> Result<u64, Failure> {
    let value = content_range(response).unwrap_or("no Content-Range");
    if parse_content_range(value).is_some_and(|(start, _)| start == asked.start) {
        return Ok(0);
    }
    Err(Failure::passing(BackendError::WrongRange {
        url: shown(response.url()),
        asked: asked.clone(),
        sent: value.chars().take(EXCERPT).collect(),
    }))
}

/// Length of the whole blob, from the answer to a ranged GET.
pub(super) fn total_length(response: &Response) -> Result<u64, Failure> {
    let total = match response.status() {
        StatusCode::OK => response.content_length(),
        _ => content_range(response)
            .and_then(parse_content_range)
            .and_then(|(_, total)| total),
    };
    total.ok_or_else(|| {
        Failure::lasting(BackendError::WrongRange {
            url: shown(response.url()),
            asked: 0..1,
            sent: "no total length".to_owned(),
        })
    })
}

fn content_range(response: &Response) -> Option<&str> {
    response.headers().get(CONTENT_RANGE)?.to_str().ok()
}

/// Start, and total length if it tells, of `bytes 0-9/100` (RFC 9110, 14.4).
fn parse_content_range(value: &str) -> Option<(u64, Option<u64>)> {
    let (range, total) = value.trim().strip_prefix("bytes ")?.split_once('/')?;
    let (start, _end) = range.split_once('-')?;
    Some((start.trim().parse().ok()?, total.trim().parse().ok()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn secrets_stay_out_of_messages() {
        let url = Url::parse("https://me:pw@h:1/v2/r/blobs/b?sig=secret#f").unwrap();
        assert_eq!(shown(&url), "https://h:1/v2/r/blobs/b");
    }

    #[test]
    fn content_ranges_are_read() {
        assert_eq!(parse_content_range("bytes 5-9/100"), Some((5, Some(100))));
        assert_eq!(parse_content_range("bytes 5-9/*"), Some((5, None)));
        assert_eq!(parse_content_range("bytes */100"), None);
        assert_eq!(parse_content_range("items 5-9/100"), None);
    }
}
