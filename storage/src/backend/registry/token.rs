//! Tokens from a registry's token service.
//!
//! With a password, or nobody in particular: GET as the distribution specification
//! says. With an identity token, which stands for a log-in made earlier: POST as
//! OAuth 2 says for refresh tokens.

use std::time::{Duration, Instant};

use reqwest::header::{AUTHORIZATION, HeaderValue};
use reqwest::{Client, RequestBuilder, Response, StatusCode};
use serde::Deserialize;
use url::Url;

use super::answer::{status_error, timed_out, transport};
use super::auth::{Credentials, Grant, auth_error, basic, denied};
use super::retry::{Again, Failure};
use crate::backend::BackendError;

/// Longest answer of a token service that is read, in bytes.
const MAX_TOKEN_ANSWER: usize = 1 << 20;

/// Life of a token that does not say (the distribution specification's default),
/// and how long before its end it is not used any more.
const DEFAULT_LIFE: u64 = 60;
const MARGIN: Duration = Duration::from_secs(5);

/// How to get a token.
#[derive(Clone)]
pub(super) struct TokenSource {
    pub(super) realm: Url,
    pub(super) service: Option<String>,
    pub(super) scope: String,
}

/// Asks for a token; also returns the identity token that replaces the one used, if
/// the service sent one.
///
/// * `limit`: for the whole exchange.
pub(super) async fn fetch(
    http: &Client,
    limit: Duration,
    source: &TokenSource,
    credentials: &Credentials,
) -> Result<(Grant, Option<String>), Failure> {
    const ACTION: &str = "asking for a token";
    let (url, request) = request(http, source, credentials);
    let exchange = async {
        let answer = request
            .send()
            .await
            .map_err(|error| transport(&url, ACTION, error))?;
        read(&url, answer, credentials).await
    };
    match tokio::time::timeout(limit, exchange).await {
        Ok(result) => result,
        Err(_elapsed) => Err(timed_out(&url, ACTION, limit)),
    }
}

fn request(
    http: &Client,
    source: &TokenSource,
    credentials: &Credentials,
) -> (Url, RequestBuilder) {
    let mut url = source.realm.clone();
    if let Credentials::Identity(token) = credentials {
        let form = [
            ("grant_type", "refresh_token"),
            ("client_id", "nydus"),
            ("service", source.service.as_deref().unwrap_or_default()),
            ("scope", &source.scope),
            ("refresh_token", token),
        ];
        let request = http.post(url.clone()).form(&form);
        return (url, request);
    }
    url.query_pairs_mut().append_pair("scope", &source.scope);
    if let Some(service) = &source.service {
        url.query_pairs_mut().append_pair("service", service);
    }
    let request = http.get(url.clone());
    match basic(credentials) {
        Some(basic) => (url, request.header(AUTHORIZATION, basic)),
        None => (url, request),
    }
}

async fn read(
    url: &Url,
    mut answer: Response,
    credentials: &Credentials,
) -> Result<(Grant, Option<String>), Failure> {
    let requested = Instant::now();
    let status = answer.status();
    let refused = status == StatusCode::UNAUTHORIZED
        || status == StatusCode::FORBIDDEN
        // What OAuth 2 says of a refresh token that is good no more.
        || (status == StatusCode::BAD_REQUEST && matches!(credentials, Credentials::Identity(_)));
    if refused {
        return Err(denied(
            url,
            match credentials {
                Credentials::Anonymous => "the token service wants a user and a password",
                Credentials::Identity(_) => "the token service refused the identity token",
                _ => "the token service refused the user or password",
            },
        ));
    }
    if !status.is_success() {
        let mut failure = status_error(url, answer, true).await;
        if let (Again::Never, BackendError::Status { status, detail, .. }) =
            (failure.again, &failure.error)
        {
            let reason = format!("the token service answered {status}{detail}");
            failure = Failure::never(auth_error(url, reason));
        }
        return Err(failure);
    }
    let mut body = Vec::new();
    while let Some(piece) = answer
        .chunk()
        .await
        .map_err(|error| transport(url, "reading a token", error))?
    {
        body.extend_from_slice(&piece);
        if body.len() > MAX_TOKEN_ANSWER {
            return Err(denied(url, "the token service's answer is too long"));
        }
    }
    grant(&body, requested).ok_or_else(|| denied(url, "the token service sent no token"))
}

#[derive(Deserialize)]
struct Answer {
    token: Option<String>,
    access_token: Option<String>,
    expires_in: Option<u64>,
    refresh_token: Option<String>,
}

fn grant(body: &[u8], requested: Instant) -> Option<(Grant, Option<String>)> {
    let answer: Answer = serde_json::from_slice(body).ok()?;
    let full = |token: &String| !token.is_empty();
    let token = answer.token.filter(full).or(answer.access_token)?;
    if token.is_empty() {
        return None;
    }
    // A day is long enough, and keeps the sum in range.
    let life = Duration::from_secs(answer.expires_in.unwrap_or(DEFAULT_LIFE).min(86_400));
    let renew = requested + life.saturating_sub(MARGIN.min(life / 2));
    Some((
        bearer(&token, Some(renew))?,
        answer.refresh_token.filter(full),
    ))
}

pub(super) fn bearer(token: &str, renew: Option<Instant>) -> Option<Grant> {
    let mut header = HeaderValue::from_str(&format!("Bearer {token}")).ok()?;
    header.set_sensitive(true);
    Some(Grant { header, renew })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_are_read_leniently_and_end_early() {
        let now = Instant::now();
        let (made, _) = grant(br#"{"token":"a","expires_in":300}"#, now).unwrap();
        assert_eq!(made.renew.unwrap() - now, Duration::from_secs(295));
        assert!(made.header.is_sensitive());
        let (made, _) = grant(br#"{"access_token":"b","expires_in":2}"#, now).unwrap();
        assert_eq!(made.renew.unwrap() - now, Duration::from_secs(1));
        assert!(grant(br#"{"access_token":"b"}"#, now).is_some());
        for bad in [
            &br"{}"[..],
            b"",
            b"{\"token\":\"\"}",
            b"{\"token\":\"a\\nb\"}",
            b"<html>",
        ] {
            assert!(grant(bad, now).is_none());
        }
    }
}
