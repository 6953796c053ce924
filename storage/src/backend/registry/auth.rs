//! Answers the registry's challenges and keeps what came of it.
//!
//! A registry says in a 401 answer how it wants to be spoken to: with a password
//! (`Basic`), or with a token from a token service that it names (`Bearer`). The
//! result is used for all requests until it expires or is refused.
//!
//! Promises: one request for a token at a time, whose result all waiters share; a
//! password goes to a token service without TLS only if the registry itself is
//! without TLS.

use std::fmt;
use std::time::{Duration, Instant};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use http_auth::parser::ChallengeParser;
use reqwest::header::{AUTHORIZATION, HeaderValue};
use reqwest::{Response, StatusCode};
use serde::Deserialize;
use url::Url;

use super::answer::{public_name, status_error, timed_out, transport};
use super::retry::{Again, Failure};
use crate::backend::BackendError;
use crate::sync::{Mutex, lock};

/// Longest answer of a token service that is read, in bytes.
const MAX_TOKEN_ANSWER: usize = 1 << 20;

/// Life of a token that does not say (the distribution specification's default),
/// and how long before its end it is renewed.
const DEFAULT_LIFE: u64 = 60;
const MARGIN: Duration = Duration::from_secs(5);

/// Who we are to a registry.
#[derive(Clone, Default)]
pub enum Credentials {
    /// Nobody in particular.
    #[default]
    Anonymous,
    /// User and password.
    Basic {
        /// The user.
        username: String,
        /// The password.
        password: String,
    },
    /// A token that the registry accepts as it is.
    Bearer(String),
}

impl fmt::Debug for Credentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Anonymous => "Anonymous",
            Self::Basic { .. } => "Basic(..)",
            Self::Bearer(_) => "Bearer(..)",
        })
    }
}

/// What goes into the `Authorization` header now.
#[derive(Clone)]
struct Grant {
    header: HeaderValue,
    /// When to stop using it; `None` for never.
    renew: Option<Instant>,
}

/// How to get a token.
#[derive(Clone)]
struct TokenSource {
    realm: Url,
    service: Option<String>,
    scope: String,
}

enum Challenge {
    Basic,
    Bearer(TokenSource),
}

pub(super) struct Authenticator {
    credentials: Credentials,
    scope: String,
    grant: Mutex<Option<Grant>>,
    /// Held while a token is fetched: an async lock, whose waiters use no thread.
    source: tokio::sync::Mutex<Option<TokenSource>>,
}

impl Authenticator {
    pub(super) fn new(credentials: Credentials, repo: &str) -> Result<Self, BackendError> {
        let grant = match &credentials {
            Credentials::Bearer(token) => Some(bearer(token, None).ok_or_else(|| {
                BackendError::Config("the token has characters that no token has".to_owned())
            })?),
            _ => None,
        };
        Ok(Self {
            credentials,
            scope: format!("repository:{repo}:pull"),
            grant: Mutex::new(grant),
            source: tokio::sync::Mutex::new(None),
        })
    }

    /// The header for the next request. Renews a token that is about to expire.
    pub(super) async fn header(
        &self,
        client: &super::Client,
    ) -> Result<Option<HeaderValue>, Failure> {
        let (header, expired) = match &*lock(&self.grant) {
            None => return Ok(None),
            Some(grant) => {
                let expired = grant.renew.is_some_and(|renew| renew <= Instant::now());
                (grant.header.clone(), expired)
            }
        };
        if !expired {
            return Ok(Some(header));
        }
        let source = self.source.lock().await;
        if let Some(source) = &*source
            && self.is_current(&header)
        {
            self.renew(client, source).await?;
        }
        Ok(self.current())
    }

    /// Reacts to a 401 answer to a request that was sent with `used`.
    pub(super) async fn answer(
        &self,
        client: &super::Client,
        url: &Url,
        answer: &Response,
        used: Option<&HeaderValue>,
    ) -> Result<(), Failure> {
        let mut source = self.source.lock().await;
        let current = self.current();
        if current.is_some() && current.as_ref() != used {
            return Ok(()); // Another request has been here meanwhile.
        }
        match self.challenge(url, answer)? {
            Challenge::Basic => {
                let header = self.basic().filter(|header| used != Some(header));
                let refused = || match self.credentials {
                    Credentials::Basic { .. } => denied(url, "user or password is wrong"),
                    _ => denied(url, "the registry wants a user and a password"),
                };
                let header = header.ok_or_else(refused)?;
                *lock(&self.grant) = Some(Grant {
                    header,
                    renew: None,
                });
                Ok(())
            }
            Challenge::Bearer(_) if matches!(self.credentials, Credentials::Bearer(_)) => Err(
                denied(url, "the given token was refused; it may have expired"),
            ),
            Challenge::Bearer(wanted) => {
                self.renew(client, &wanted).await?;
                *source = Some(wanted);
                Ok(())
            }
        }
    }

    fn current(&self) -> Option<HeaderValue> {
        lock(&self.grant).as_ref().map(|grant| grant.header.clone())
    }

    fn is_current(&self, header: &HeaderValue) -> bool {
        self.current().as_ref() == Some(header)
    }

    fn basic(&self) -> Option<HeaderValue> {
        let Credentials::Basic { username, password } = &self.credentials else {
            return None;
        };
        let pair = STANDARD.encode(format!("{username}:{password}"));
        let mut header = HeaderValue::from_str(&format!("Basic {pair}")).ok()?;
        header.set_sensitive(true);
        Some(header)
    }

    /// The first challenge that we can answer.
    fn challenge(&self, url: &Url, answer: &Response) -> Result<Challenge, Failure> {
        let values = answer.headers().get_all(reqwest::header::WWW_AUTHENTICATE);
        let mut basic = false;
        for value in values.iter().filter_map(|value| value.to_str().ok()) {
            for challenge in ChallengeParser::new(value).map_while(Result::ok) {
                let param = |name: &str| {
                    let found = challenge
                        .params
                        .iter()
                        .find(|(key, _)| key.eq_ignore_ascii_case(name));
                    found.map(|(_, value)| value.to_unescaped())
                };
                if challenge.scheme.eq_ignore_ascii_case("bearer") {
                    let realm = param("realm").and_then(|realm| Url::parse(&realm).ok());
                    let Some(realm) = realm.filter(|realm| self.may_ask(url, realm)) else {
                        return Err(denied(url, "it names no token service that may be used"));
                    };
                    return Ok(Challenge::Bearer(TokenSource {
                        realm,
                        service: param("service"),
                        scope: param("scope").unwrap_or_else(|| self.scope.clone()),
                    }));
                }
                basic |= challenge.scheme.eq_ignore_ascii_case("basic");
            }
        }
        if basic {
            Ok(Challenge::Basic)
        } else {
            Err(denied(url, "it does not say how to log in"))
        }
    }

    fn may_ask(&self, registry: &Url, realm: &Url) -> bool {
        match realm.scheme() {
            "https" => true,
            "http" => {
                registry.scheme() == "http" || matches!(self.credentials, Credentials::Anonymous)
            }
            _ => false,
        }
    }

    async fn renew(&self, client: &super::Client, source: &TokenSource) -> Result<(), Failure> {
        let grant = self.fetch_token(client, source).await?;
        *lock(&self.grant) = Some(grant);
        Ok(())
    }

    async fn fetch_token(
        &self,
        client: &super::Client,
        source: &TokenSource,
    ) -> Result<Grant, Failure> {
        const ACTION: &str = "asking for a token";
        let mut url = source.realm.clone();
        url.query_pairs_mut().append_pair("scope", &source.scope);
        if let Some(service) = &source.service {
            url.query_pairs_mut().append_pair("service", service);
        }
        let mut request = client.http.get(url.clone());
        if let Some(basic) = self.basic() {
            request = request.header(AUTHORIZATION, basic);
        }
        let limit = client.timeouts.connect + client.timeouts.read;
        let exchange = async {
            let answer = request
                .send()
                .await
                .map_err(|error| transport(&url, ACTION, error))?;
            self.read_token(&url, answer).await
        };
        match tokio::time::timeout(limit, exchange).await {
            Ok(result) => result,
            Err(_elapsed) => Err(timed_out(&url, ACTION, limit)),
        }
    }

    async fn read_token(&self, url: &Url, mut answer: Response) -> Result<Grant, Failure> {
        let requested = Instant::now();
        let status = answer.status();
        if status == StatusCode::UNAUTHORIZED || status == StatusCode::FORBIDDEN {
            return Err(denied(
                url,
                match self.credentials {
                    Credentials::Anonymous => "the token service wants a user and a password",
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
        token_grant(&body, requested).ok_or_else(|| denied(url, "the token service sent no token"))
    }
}

#[derive(Deserialize)]
struct TokenAnswer {
    token: Option<String>,
    access_token: Option<String>,
    expires_in: Option<u64>,
}

fn token_grant(body: &[u8], requested: Instant) -> Option<Grant> {
    let answer: TokenAnswer = serde_json::from_slice(body).ok()?;
    let token = answer
        .token
        .or(answer.access_token)
        .filter(|token| !token.is_empty())?;
    // A day is long enough, and keeps the sum in range.
    let life = Duration::from_secs(answer.expires_in.unwrap_or(DEFAULT_LIFE).min(86_400));
    let renew = requested + life.saturating_sub(MARGIN.min(life / 2));
    bearer(&token, Some(renew))
}

fn bearer(token: &str, renew: Option<Instant>) -> Option<Grant> {
    let mut header = HeaderValue::from_str(&format!("Bearer {token}")).ok()?;
    header.set_sensitive(true);
    Some(Grant { header, renew })
}

fn auth_error(url: &Url, reason: String) -> BackendError {
    BackendError::Auth {
        url: public_name(url),
        reason,
    }
}

pub(super) fn denied(url: &Url, reason: &str) -> Failure {
    Failure::never(auth_error(url, reason.to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_are_read_leniently_and_end_early() {
        let now = Instant::now();
        let grant = token_grant(br#"{"token":"a","expires_in":300}"#, now).unwrap();
        assert_eq!(grant.renew.unwrap() - now, Duration::from_secs(295));
        assert!(grant.header.is_sensitive());
        let grant = token_grant(br#"{"access_token":"b","expires_in":2}"#, now).unwrap();
        assert_eq!(grant.renew.unwrap() - now, Duration::from_secs(1));
        assert!(token_grant(br#"{"access_token":"b"}"#, now).is_some());
        for bad in [
            &br"{}"[..],
            b"",
            b"{\"token\":\"\"}",
            b"{\"token\":\"a\\nb\"}",
            b"<html>",
        ] {
            assert!(token_grant(bad, now).is_none());
        }
    }

    #[test]
    fn credentials_are_not_printed() {
        let basic = Credentials::Basic {
            username: "u".into(),
            password: "hunter2".into(),
        };
        let text = format!("{basic:?} {:?}", Credentials::Bearer("hunter2".into()));
        assert!(!text.contains("hunter2"), "{text}");
    }
}
