//! Logging in: finding out what the registry wants, and keeping what it gave.
//!
//! `GET /v2/` tells how. Without a challenge nothing is ever sent along. The token
//! dance with a name and password (or without) is `oci-client`'s; identity tokens,
//! which it does not know, are exchanged here.
//!
//! Promises: one log-in at a time per repository; credentials go to the registry and
//! the token server that it names, nowhere else.

use std::fmt;

use base64::Engine as _;
use oci_client::RegistryOperation;
use oci_client::secrets::RegistryAuth;
use oci_client::token_cache::{RegistryToken, RegistryTokenType};
use reqwest::header::{AUTHORIZATION, HeaderValue, WWW_AUTHENTICATE};
use reqwest::{Method, StatusCode};
use serde::Deserialize;

use super::retry::Failure;
use super::{Inner, MAX_ERROR_BODY, body, refusal};
use crate::oci::credentials::Credentials;
use crate::oci::error::OciError;

/// What is known about logging in to one repository.
pub(super) struct Login {
    credentials: Credentials,
    state: tokio::sync::Mutex<State>,
}

/// The `Authorization` values obtained so far; the inner `None` stands for "none needed".
#[derive(Default)]
struct State {
    pull: Option<Option<HeaderValue>>,
    push: Option<Option<HeaderValue>>,
}

impl fmt::Debug for Login {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.credentials.fmt(f)
    }
}

impl Login {
    pub(super) fn new(credentials: Credentials) -> Self {
        Self {
            credentials,
            state: tokio::sync::Mutex::default(),
        }
    }

    /// Whether it is worth a try to send nothing along, while the registry is asked what
    /// it wants: so far nobody knows, and there is nothing to send without asking.
    pub(super) async fn may_need_nothing(&self) -> bool {
        matches!(self.credentials, Credentials::Anonymous) && self.state.lock().await.pull.is_none()
    }

    /// Logs in for `op`, unless that has happened and `renew` is not set.
    pub(super) async fn authorize(
        &self,
        inner: &Inner,
        op: RegistryOperation,
        renew: bool,
    ) -> Result<Option<HeaderValue>, Failure> {
        // Held during the log-in, so that parallel transfers wait for one.
        let mut state = self.state.lock().await;
        let slot = match op {
            RegistryOperation::Pull => &mut state.pull,
            RegistryOperation::Push => &mut state.push,
        };
        match slot {
            Some(known) if !renew => Ok(known.clone()),
            _ => {
                let value = self.log_in(inner, op).await?;
                *slot = Some(value.clone());
                Ok(value)
            }
        }
    }

    async fn log_in(
        &self,
        inner: &Inner,
        op: RegistryOperation,
    ) -> Result<Option<HeaderValue>, Failure> {
        let Some(challenge) = probe(inner).await? else {
            return Ok(None);
        };
        let client = match op {
            RegistryOperation::Pull => inner.clients.pull()?,
            RegistryOperation::Push => inner.clients.push()?,
        };
        let auth = match &self.credentials {
            Credentials::Anonymous => RegistryAuth::Anonymous,
            Credentials::Basic { username, password } => {
                RegistryAuth::Basic(username.clone(), password.clone())
            }
            Credentials::Bearer(token) => RegistryAuth::Bearer(token.clone()),
            Credentials::Identity(token) => {
                let token = exchange(inner, &challenge, token, op).await?;
                let kept = RegistryTokenType::Bearer(RegistryToken::Token {
                    token: token.clone(),
                });
                client.tokens.insert(&inner.reference, op, kept).await;
                RegistryAuth::Bearer(token)
            }
        };
        let token = client
            .auth(&inner.reference, &auth, op)
            .await
            .map_err(Failure::of_client)?;
        let value = match (token, &self.credentials) {
            (Some(token), _) => format!("Bearer {token}"),
            (None, Credentials::Basic { username, password }) => {
                let pair = format!("{username}:{password}");
                format!(
                    "Basic {}",
                    base64::engine::general_purpose::STANDARD.encode(pair)
                )
            }
            (None, _) => return Ok(None),
        };
        secret_header(inner, &value).map(Some)
    }
}

/// What the registry wants: the challenge of its base URL, `None` if it is open.
async fn probe(inner: &Inner) -> Result<Option<String>, Failure> {
    let url = format!("{}/v2/", inner.origin);
    let response = inner
        .clients
        .http
        .request(Method::GET, url)
        .send()
        .await
        .map_err(Failure::of_request)?;
    if response.status().is_server_error() || response.status() == StatusCode::TOO_MANY_REQUESTS {
        return Err(refusal(response.status(), response).await);
    }
    let challenge = response.headers().get(WWW_AUTHENTICATE);
    Ok(challenge
        .and_then(|value| value.to_str().ok())
        .map(str::to_owned))
}

/// Trades an identity (refresh) token for a bearer token at the registry's token server.
async fn exchange(
    inner: &Inner,
    challenge: &str,
    token: &str,
    op: RegistryOperation,
) -> Result<String, Failure> {
    #[derive(Deserialize)]
    struct Answer {
        access_token: String,
    }
    let unusable = || {
        let reason = "the registry wants no bearer token, so an identity token is of no use";
        Failure::Final(credentials_error(inner, reason))
    };
    let challenges = http_auth::parse_challenges(challenge).map_err(|_err| unusable())?;
    let bearer = challenges
        .iter()
        .find(|challenge| challenge.scheme.eq_ignore_ascii_case("bearer"))
        .ok_or_else(unusable)?;
    let parameter = |name: &str| {
        let found = bearer
            .params
            .iter()
            .find(|(key, _)| key.eq_ignore_ascii_case(name));
        found.map(|(_, value)| value.to_unescaped())
    };
    let realm = parameter("realm").ok_or_else(unusable)?;
    let actions = match op {
        RegistryOperation::Pull => "pull",
        RegistryOperation::Push => "pull,push",
    };
    let scope = format!("repository:{}:{actions}", inner.name.repository);
    let form = [
        ("grant_type", "refresh_token"),
        ("client_id", "nydus"),
        ("service", &parameter("service").unwrap_or_default()),
        ("scope", &scope),
        ("refresh_token", token),
    ];
    let response = inner
        .clients
        .http
        .post(realm)
        .form(&form)
        .send()
        .await
        .map_err(Failure::of_request)?;
    if response.status() != StatusCode::OK {
        return Err(refusal(response.status(), response).await);
    }
    let answer = body(response, MAX_ERROR_BODY).await?.unwrap_or_default();
    let answer: Answer = serde_json::from_slice(&answer).map_err(|_err| {
        Failure::Final(credentials_error(
            inner,
            "the token server's answer has no access token",
        ))
    })?;
    Ok(answer.access_token)
}

/// A header that HTTP libraries keep out of their logs.
fn secret_header(inner: &Inner, value: &str) -> Result<HeaderValue, Failure> {
    let mut value = HeaderValue::from_str(value).map_err(|_err| {
        let reason =
            format!("the value for {AUTHORIZATION} has characters that HTTP does not allow");
        Failure::Final(credentials_error(inner, &reason))
    })?;
    value.set_sensitive(true);
    Ok(value)
}

fn credentials_error(inner: &Inner, reason: &str) -> OciError {
    OciError::Credentials {
        host: inner.name.host.clone(),
        reason: reason.to_owned(),
    }
}
