//! What an answer says: which bytes its body holds, or what went wrong.
//!
//! Everything here comes from a server that may be broken or hostile. Texts are cut,
//! stripped of anything that is no plain character, and name URLs without query
//! and user, where signatures and passwords are.

use std::ops::Range;
use std::time::Duration;

use reqwest::header::{CONTENT_LENGTH, CONTENT_RANGE, DATE, HeaderName, RETRY_AFTER};
use reqwest::{Response, StatusCode};
use url::Url;

use super::retry::{Again, Failure};
use crate::backend::BackendError;

/// Longest part of an error body that is read, and longest excerpt shown, in bytes.
const MAX_ERROR_BODY: usize = 4096;
const MAX_EXCERPT: usize = 160;

/// Which part of a body is wanted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::backend) struct Body {
    /// Bytes before it.
    pub(in crate::backend) skip: u64,
    /// Its length; what follows is not read.
    pub(in crate::backend) len: u64,
}

/// The URL as it may be shown.
pub(in crate::backend) fn public_name(url: &Url) -> String {
    let mut url = url.clone();
    url.set_query(None);
    url.set_fragment(None);
    // Fails only for URLs that cannot have a user.
    let _ = url.set_username("");
    let _ = url.set_password(None);
    url.to_string()
}

/// A cause with all its own causes, in one line.
pub(in crate::backend) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        text.push_str(": ");
        text.push_str(&error.to_string());
        source = error.source();
    }
    text
}

pub(in crate::backend) fn transport(
    url: &Url,
    action: &'static str,
    error: reqwest::Error,
) -> Failure {
    Failure::later(BackendError::Transport {
        url: public_name(url),
        action,
        // The text of the library includes the whole URL otherwise.
        source: Box::new(error.without_url()),
    })
}

pub(in crate::backend) fn timed_out(url: &Url, action: &'static str, limit: Duration) -> Failure {
    Failure::later(BackendError::Transport {
        url: public_name(url),
        action,
        source: format!("nothing came for {limit:?}").into(),
    })
}

/// Checks the headers of a successful answer against what was asked for.
///
/// * `max_skip`: most bytes that may be read and thrown away from a server that
///   ignores ranges.
pub(in crate::backend) fn body(
    url: &Url,
    answer: &Response,
    asked: &Range<u64>,
    max_skip: u64,
) -> Result<Body, Failure> {
    // Older agents of Dragonfly send parts with 200.
    if answer.status() == StatusCode::PARTIAL_CONTENT
        || answer.headers().contains_key(CONTENT_RANGE)
    {
        return partial(url, answer, asked);
    }
    // The whole blob: the server ignores ranges.
    let short = |len: u64| {
        Failure::never(BackendError::Short {
            name: public_name(url),
            offset: asked.start,
            len: asked.end - asked.start,
            got: len.saturating_sub(asked.start),
        })
    };
    match header_number(answer, CONTENT_LENGTH.as_str()) {
        Some(len) if len < asked.end => return Err(short(len)),
        _ => {}
    }
    if asked.start > max_skip {
        return Err(Failure::never(BackendError::WrongRange {
            url: public_name(url),
            asked: asked.clone(),
            sent: "the whole blob, which is too long to skip to the range".to_owned(),
        }));
    }
    Ok(Body {
        skip: asked.start,
        len: asked.end - asked.start,
    })
}

fn partial(url: &Url, answer: &Response, asked: &Range<u64>) -> Result<Body, Failure> {
    let text = answer
        .headers()
        .get(CONTENT_RANGE)
        .and_then(|value| value.to_str().ok());
    let sent = text.and_then(parse_content_range);
    match sent {
        Some((range, total)) if range.start == asked.start && range.end <= asked.end => {
            if total.is_some_and(|total| total < asked.end) {
                return Err(Failure::never(BackendError::Short {
                    name: public_name(url),
                    offset: asked.start,
                    len: asked.end - asked.start,
                    got: range.end - range.start,
                }));
            }
            Ok(Body {
                skip: 0,
                len: range.end - range.start,
            })
        }
        // Broken caches do this now and then: worth another attempt.
        _ => Err(Failure::later(BackendError::WrongRange {
            url: public_name(url),
            asked: asked.clone(),
            sent: text.map_or_else(|| "no Content-Range".to_owned(), sanitise),
        })),
    }
}

/// Length of the whole blob, from the answer to a HEAD or to a ranged GET.
pub(in crate::backend) fn total_size(answer: &Response) -> Option<u64> {
    if let Some(text) = answer.headers().get(CONTENT_RANGE) {
        return parse_content_range(text.to_str().ok()?)?.1;
    }
    if answer.status() == StatusCode::PARTIAL_CONTENT {
        return None;
    }
    header_number(answer, CONTENT_LENGTH.as_str())
}

fn header_number(answer: &Response, name: &str) -> Option<u64> {
    answer
        .headers()
        .get(name)?
        .to_str()
        .ok()?
        .trim()
        .parse()
        .ok()
}

/// `bytes 0-99/1000` is `(0..100, Some(1000))`.
fn parse_content_range(text: &str) -> Option<(Range<u64>, Option<u64>)> {
    let (range, total) = text.trim().strip_prefix("bytes ")?.split_once('/')?;
    let (first, last) = range.split_once('-')?;
    let (first, last): (u64, u64) = (first.trim().parse().ok()?, last.trim().parse().ok()?);
    let end = last.checked_add(1).filter(|end| *end > first)?;
    let total = match total.trim() {
        "*" => None,
        total => Some(total.parse().ok().filter(|total| *total >= end)?),
    };
    Some((first..end, total))
}

/// Turns an answer that is no success into an error.
///
/// * `ours`: whether the registry answered, and not the host of a redirect, whose
///   answers quote signed URLs.
pub(in crate::backend) async fn status_error(url: &Url, answer: Response, ours: bool) -> Failure {
    let status = answer.status();
    let again = match status.as_u16() {
        408 | 425 | 429 | 500 | 502 | 503 | 504 => retry_after(&answer),
        _ => Again::Never,
    };
    let detail = excerpt(answer, ours).await.map(|text| format!(": {text}"));
    let error = BackendError::Status {
        url: public_name(url),
        status: status.as_u16(),
        detail: detail.unwrap_or_default(),
    };
    Failure { error, again }
}

fn retry_after(answer: &Response) -> Again {
    if let Some(seconds) = header_number(answer, RETRY_AFTER.as_str()) {
        return Again::After(Duration::from_secs(seconds));
    }
    // A date counts from the server's own, as our clock may be wrong.
    let date = |name: HeaderName| {
        let value = answer.headers().get(name)?.to_str().ok()?;
        httpdate::parse_http_date(value.trim()).ok()
    };
    match (date(RETRY_AFTER), date(DATE)) {
        (Some(then), Some(now)) => Again::After(then.duration_since(now).unwrap_or_default()),
        _ => Again::Later,
    }
}

async fn excerpt(mut answer: Response, ours: bool) -> Option<String> {
    let mut bytes = Vec::new();
    let read = async {
        while let Ok(Some(piece)) = answer.chunk().await {
            bytes.extend_from_slice(&piece);
            if bytes.len() >= MAX_ERROR_BODY {
                break;
            }
        }
    };
    // It only makes the message nicer.
    let _ = tokio::time::timeout(Duration::from_secs(1), read).await;
    bytes.truncate(MAX_ERROR_BODY);
    let text = String::from_utf8_lossy(&bytes);
    let text = registry_error(&bytes)
        .or_else(|| element(&text, "Code").map(str::to_owned))
        .or_else(|| (ours && !text.trim_start().starts_with('<')).then(|| text.to_string()))?;
    let text = sanitise(&text);
    (!text.is_empty()).then_some(text)
}

/// The first error of the list that registries answer with.
fn registry_error(body: &[u8]) -> Option<String> {
    let json: serde_json::Value = serde_json::from_slice(body).ok()?;
    let error = json.get("errors")?.get(0)?;
    let field = |name: &str| {
        error
            .get(name)
            .and_then(|value| value.as_str())
            .unwrap_or_default()
    };
    Some(format!("{} {}", field("code"), field("message")))
}

/// Content of the first `<name>` of an object store's error.
fn element<'a>(text: &'a str, name: &str) -> Option<&'a str> {
    let (_, rest) = text.split_once(&format!("<{name}>"))?;
    Some(rest.split_once("</")?.0)
}

/// One short line of plain characters.
pub(in crate::backend) fn sanitise(text: &str) -> String {
    let plain: String = text
        .chars()
        .map(|c| if c.is_ascii_graphic() { c } else { ' ' })
        .take(MAX_ERROR_BODY)
        .collect();
    let mut line = plain.split_whitespace().collect::<Vec<_>>().join(" ");
    if line.len() > MAX_EXCERPT {
        line.truncate(MAX_EXCERPT);
        line.push_str("...");
    }
    line
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn content_ranges() {
        assert_eq!(
            parse_content_range("bytes 0-99/1000"),
            Some((0..100, Some(1000)))
        );
        assert_eq!(parse_content_range("bytes 5-5/*"), Some((5..6, None)));
        for bad in [
            "",
            "bytes */10",
            "bytes 5-4/10",
            "bytes 0-10/10",
            "items 0-1/2",
            "bytes 0-18446744073709551615/*",
        ] {
            assert_eq!(parse_content_range(bad), None, "{bad}");
        }
    }

    #[test]
    fn names_and_excerpts_hold_no_secrets_and_no_control_characters() {
        let url = Url::parse("https://user:pw@host:1/path?X-Sig=abc#f").unwrap();
        assert_eq!(public_name(&url), "https://host:1/path");
        assert_eq!(sanitise("a\x1b[31m\r\n b\u{fffd}"), "a [31m b");
        assert!(sanitise(&"x".repeat(1000)).len() < 200);
        let body = br#"{"errors":[{"code":"BLOB_UNKNOWN","message":"blob unknown to registry"}]}"#;
        assert_eq!(
            registry_error(body).unwrap(),
            "BLOB_UNKNOWN blob unknown to registry"
        );
        let body = "<Error><Code>AccessDenied</Code><StringToSign>secret</StringToSign></Error>";
        assert_eq!(element(body, "Code"), Some("AccessDenied"));
    }
}
