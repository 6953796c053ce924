//! Logging in to a registry: basic credentials, or a bearer token from the
//! token server that the registry names.
//!
//! The first request goes out without credentials. A 401 says what the registry
//! wants (`WWW-Authenticate`); what satisfied it is used for later requests, a
//! token until shortly before it expires.
//!
//! Promises: secrets appear in no message and no `Debug` output; they are sent
//! to the registry and to the token server it names, and over plain HTTP only
//! if the registry itself is spoken to over plain HTTP.

use std::fmt;
use std::sync::RwLock;
use std::time::{Duration, Instant};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use reqwest::header::HeaderValue;
use serde::Deserialize;
use url::Url;

use super::BackendError;
use super::response::{Failure, shown, transport};
use crate::oci::credentials::Credentials;

/// What token servers mean when they do not say (distribution token specification).
const DEFAULT_LIFETIME: Duration = Duration::from_secs(60);
/// A token is renewed when it has only this share of its life left: a tenth.
const RENEWAL_SHARE: u32 = 10;
/// Longest answer of a token server.
const MAX_TOKEN_ANSWER: usize = 1 << 20;

/// Keeps what the registry accepts.
pub(super) struct Authorizer {
    plain_http: bool,
    /// `repository:<repo>:pull`, for challenges that name no scope.
    scope: String,
    state: RwLock<State>,
}

struct State {
    credentials: Credentials,
    accepted: Option<Accepted>,
}

struct Accepted {
    header: HeaderValue,
    until: Option<Instant>,
}

#[derive(Deserialize)]
struct TokenAnswer {
    token: Option<String>,
    access_token: Option<String>,
    expires_in: Option<u64>,
}

impl Authorizer {
    pub(super) fn new(credentials: Credentials, registry: &Url, repo: &str) -> Self {
        let authorizer = Self {
            plain_http: registry.scheme() == "http",
            scope: format!("repository:{repo}:pull"),
            state: RwLock::new(State {
                credentials: Credentials::Anonymous,
                accepted: None,
            }),
        };
        authorizer.set_credentials(credentials);
        authorizer
    }

    /// Replaces the credentials and forgets what the old ones obtained.
    pub(super) fn set_credentials(&self, credentials: Credentials) {
        let accepted = match &credentials {
            Credentials::Bearer(token) => {
                secret(&format!("Bearer {token}")).map(|header| Accepted {
                    header,
                    until: None,
                })
            }
            _ => None,
        };
        *self.write() = State {
            credentials,
            accepted,
        };
    }

    /// The `Authorization` of the next request, if one is known and valid.
    pub(super) fn header(&self) -> Option<HeaderValue> {
        let state = self
            .state
            .read()
            .unwrap_or_else(|poisoned| poisoned.into_inner());
        let accepted = state.accepted.as_ref()?;
        let valid = accepted.until.is_none_or(|until| Instant::now() < until);
        valid.then(|| accepted.header.clone())
    }

    /// Forgets what was accepted before.
    pub(super) fn forget(&self) {
        self.write().accepted = None;
    }

    /// Obtains a new `Authorization` after a 401.
    ///
    /// * `refused`: the header that the 401 answered.
    pub(super) async fn log_in(
        &self,
        client: &reqwest::Client,
        url: &Url,
        challenges: &[&str],
        refused: Option<HeaderValue>,
    ) -> Result<HeaderValue, Failure> {
        // Another thread may have renewed the token meanwhile.
        if let Some(header) = self
            .header()
            .filter(|header| Some(header) != refused.as_ref())
        {
            return Ok(header);
        }
        let parsed = challenges
            .iter()
            .filter_map(|c| http_auth::parse_challenges(c).ok())
            .flatten();
        for challenge in parsed {
            let parameter = |name: &str| {
                let found = challenge
                    .params
                    .iter()
                    .find(|(key, _)| key.eq_ignore_ascii_case(name));
                found.map(|(_, value)| value.to_unescaped())
            };
            let accepted = if challenge.scheme.eq_ignore_ascii_case("basic") {
                self.basic()
            } else if challenge.scheme.eq_ignore_ascii_case("bearer") {
                let realm = parameter("realm").unwrap_or_default();
                let scope = parameter("scope").unwrap_or_else(|| self.scope.clone());
                Some(
                    self.token(client, &realm, parameter("service"), &scope)
                        .await?,
                )
            } else {
                None
            };
            if let Some(accepted) = accepted {
                let header = accepted.header.clone();
                self.write().accepted = Some(accepted);
                return Ok(header);
            }
        }
        Err(refusal(
            url,
            "the registry wants credentials and there are none: log in with docker login",
        ))
    }

    fn basic(&self) -> Option<Accepted> {
        let header = basic_header(&self.credentials())?;
        Some(Accepted {
            header,
            until: None,
        })
    }

    async fn token(
        &self,
        client: &reqwest::Client,
        realm: &str,
        service: Option<String>,
        scope: &str,
    ) -> Result<Accepted, Failure> {
        let realm = Url::parse(realm)
            .ok()
            .filter(|url| url.scheme() == "https" || (self.plain_http && url.scheme() == "http"))
            .ok_or_else(|| {
                Failure::lasting(BackendError::Auth {
                    url: realm.chars().take(200).collect(),
                    reason: "the registry names no usable token server".to_owned(),
                })
            })?;
        let credentials = self.credentials();
        let service = service.unwrap_or_default();
        let request = if let Credentials::Identity(token) = &credentials {
            client.post(realm.clone()).form(&[
                ("grant_type", "refresh_token"),
                ("refresh_token", token),
                ("service", &service),
                ("scope", scope),
                ("client_id", "nydusd"),
            ])
        } else {
            let query = [("service", service.as_str()), ("scope", scope)];
            let request = client.get(realm.clone()).query(&query);
            match basic_header(&credentials) {
                Some(header) => request.header(reqwest::header::AUTHORIZATION, header),
                None => request,
            }
        };
        let mut response = request
            .send()
            .await
            .map_err(|source| transport(&realm, "asking for a token", source))?;
        if !response.status().is_success() {
            let status = response.status();
            let failure = refusal(&realm, &format!("the token server answered {status}"));
            return Err(Failure {
                passing: status.is_server_error(),
                ..failure
            });
        }
        let mut body = Vec::new();
        while let Some(piece) = response
            .chunk()
            .await
            .map_err(|source| transport(&realm, "receiving a token", source))?
        {
            if body.len() + piece.len() > MAX_TOKEN_ANSWER {
                return Err(refusal(&realm, "the token server's answer is too long"));
            }
            body.extend_from_slice(&piece);
        }
        let answer: TokenAnswer = serde_json::from_slice(&body).map_err(|_quotes_the_token| {
            refusal(&realm, "the token server's answer is no token")
        })?;
        let lifetime = answer
            .expires_in
            .map_or(DEFAULT_LIFETIME, Duration::from_secs);
        let header = answer
            .token
            .or(answer.access_token)
            .and_then(|t| secret(&format!("Bearer {t}")));
        let header = header.ok_or_else(|| refusal(&realm, "the token server sent no token"))?;
        Ok(Accepted {
            header,
            until: Some(Instant::now() + lifetime - lifetime / RENEWAL_SHARE),
        })
    }

    fn credentials(&self) -> Credentials {
        let state = self
            .state
            .read()
            .unwrap_or_else(|poisoned| poisoned.into_inner());
        state.credentials.clone()
    }

    fn write(&self) -> std::sync::RwLockWriteGuard<'_, State> {
        self.state
            .write()
            .unwrap_or_else(|poisoned| poisoned.into_inner())
    }
}

impl fmt::Debug for Authorizer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Authorizer")
            .field("scope", &self.scope)
            .finish_non_exhaustive()
    }
}

fn basic_header(credentials: &Credentials) -> Option<HeaderValue> {
    let Credentials::Basic { username, password } = credentials else {
        return None;
    };
    secret(&format!(
        "Basic {}",
        STANDARD.encode(format!("{username}:{password}"))
    ))
}

/// A header value that no `Debug` output shows.
fn secret(value: &str) -> Option<HeaderValue> {
    let mut header = HeaderValue::from_str(value).ok()?;
    header.set_sensitive(true);
    Some(header)
}

fn refusal(url: &Url, reason: &str) -> Failure {
    Failure::lasting(BackendError::Auth {
        url: shown(url),
        reason: reason.to_owned(),
    })
}
