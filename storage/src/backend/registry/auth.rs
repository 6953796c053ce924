//! Answers the registry's challenges and keeps what came of it.
//!
//! A registry says in a 401 answer how it wants to be spoken to: with a password
//! (`Basic`), or with a token from a token service that it names (`Bearer`; `token`
//! asks for one). The result is used for all requests until it expires or is
//! refused. A token in use is renewed in the background before its end, so that no
//! reader waits for it; one that nobody used since the last renewal is left to end.
//!
//! Credentials can be replaced at any time by [`Authenticator::replace`], and are by
//! what a [`CredentialProvider`] says once those in use are refused.
//!
//! Promises: one request for a token at a time, whose result all waiters share; a
//! password goes to a token service without TLS only if the registry itself is
//! without TLS.

use std::fmt;
use std::time::{Duration, Instant};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use http_auth::parser::ChallengeParser;
use reqwest::Response;
use reqwest::header::HeaderValue;
use url::Url;

use super::answer::public_name;
use super::config::Timeouts;
use super::retry::Failure;
use super::token::{self, TokenSource};
use crate::backend::BackendError;
pub use crate::oci::Credentials;
use crate::sync::{Arc, Mutex, MutexGuard, Weak, lock};

/// Longest wait for a [`CredentialProvider`], which may run a program.
const PROVIDER_LIMIT: Duration = Duration::from_secs(30);

/// A provider whose credentials did not help is not asked again for so long.
const PROVIDER_PAUSE: Duration = Duration::from_secs(10);

/// Knows credentials that may change, like a credential helper.
pub trait CredentialProvider: Send + Sync {
    /// The credentials of this moment. Called when those in use were refused; may
    /// block for some seconds.
    ///
    /// # Errors
    /// Why there are none, without any secret.
    fn credentials(&self) -> Result<Credentials, String>;
}

/// What goes into the `Authorization` header now.
#[derive(Clone)]
pub(super) struct Grant {
    pub(super) header: HeaderValue,
    /// When to stop using it; `None` for never.
    pub(super) renew: Option<Instant>,
}

/// What changes as a whole when credentials are replaced.
struct State {
    credentials: Credentials,
    /// Counts replacements, so that a token of older credentials is not kept.
    generation: u64,
    grant: Option<Grant>,
    /// Whether the grant was used since it was made.
    used: bool,
}

enum Challenge {
    Basic,
    Bearer(TokenSource),
}

pub(super) struct Authenticator {
    http: reqwest::Client,
    timeouts: Timeouts,
    scope: String,
    state: Mutex<State>,
    /// Held while a token is fetched: an async lock, whose waiters use no thread.
    source: tokio::sync::Mutex<Option<TokenSource>>,
    provider: Option<Arc<dyn CredentialProvider>>,
    asked_provider: Mutex<Option<Instant>>,
    /// For tasks that must not keep the backend alive.
    me: Weak<Self>,
}

impl Authenticator {
    pub(super) fn new(
        http: reqwest::Client,
        timeouts: Timeouts,
        repo: &str,
        credentials: Credentials,
        provider: Option<Arc<dyn CredentialProvider>>,
    ) -> Result<Arc<Self>, BackendError> {
        let grant = first_grant(&credentials)?;
        Ok(Arc::new_cyclic(|me| Self {
            http,
            timeouts,
            scope: format!("repository:{repo}:pull"),
            state: Mutex::new(State {
                credentials,
                generation: 0,
                grant,
                used: false,
            }),
            source: tokio::sync::Mutex::new(None),
            provider,
            asked_provider: Mutex::new(None),
            me: Weak::clone(me),
        }))
    }

    /// Uses other credentials from the next request on.
    ///
    /// # Errors
    /// [`BackendError::Config`] for a token that cannot be sent; nothing changes then.
    pub(super) fn replace(&self, credentials: Credentials) -> Result<(), BackendError> {
        let grant = first_grant(&credentials)?;
        let mut state = self.state();
        state.credentials = credentials;
        state.generation += 1;
        state.grant = grant;
        *lock(&self.asked_provider) = None;
        Ok(())
    }

    /// The header for the next request. Renews a token that is about to expire.
    pub(super) async fn header(&self) -> Result<Option<HeaderValue>, Failure> {
        let (header, expired) = {
            let mut state = self.state();
            let Some(grant) = &state.grant else {
                return Ok(None);
            };
            let expired = grant.renew.is_some_and(|renew| renew <= Instant::now());
            let header = grant.header.clone();
            state.used = true;
            (header, expired)
        };
        if !expired {
            return Ok(Some(header));
        }
        self.renew(&header).await?;
        Ok(self.current())
    }

    /// Fetches a token in place of `header`, unless that has happened.
    async fn renew(&self, header: &HeaderValue) -> Result<(), Failure> {
        let source = self.source.lock().await;
        match &*source {
            Some(source) if self.current().as_ref() == Some(header) => {
                self.fetch_token(source).await
            }
            _ => Ok(()),
        }
    }

    /// Reacts to a 401 answer to a request that was sent with `used`.
    pub(super) async fn answer(
        &self,
        url: &Url,
        answer: &Response,
        used: Option<&HeaderValue>,
    ) -> Result<(), Failure> {
        let mut source = self.source.lock().await;
        let current = self.current();
        if current.as_ref() != used {
            return Ok(()); // Another request has been here, or the credentials are new.
        }
        let result = match self.challenge(url, answer)? {
            Challenge::Basic => self.use_password(url, used),
            Challenge::Bearer(_) if matches!(self.state().credentials, Credentials::Bearer(_)) => {
                Err(denied(
                    url,
                    "the given token was refused; it may have expired",
                ))
            }
            Challenge::Bearer(wanted) => {
                let result = self.fetch_token(&wanted).await;
                *source = Some(wanted);
                result
            }
        };
        match result {
            Err(failure) if matches!(failure.error, BackendError::Auth { .. }) => {
                if self.ask_provider().await {
                    Ok(())
                } else {
                    Err(failure)
                }
            }
            result => result,
        }
    }

    fn use_password(&self, url: &Url, used: Option<&HeaderValue>) -> Result<(), Failure> {
        let mut state = self.state();
        let header = basic(&state.credentials).filter(|header| used != Some(header));
        let header = header.ok_or_else(|| match state.credentials {
            Credentials::Basic { .. } => denied(url, "user or password is wrong"),
            _ => denied(url, "the registry wants a user and a password"),
        })?;
        let renew = None;
        state.grant = Some(Grant { header, renew });
        Ok(())
    }

    /// Whether the provider had other credentials than those that were refused.
    async fn ask_provider(&self) -> bool {
        let Some(provider) = self.provider.clone() else {
            return false;
        };
        {
            let mut asked = lock(&self.asked_provider);
            if asked.is_some_and(|asked| asked.elapsed() < PROVIDER_PAUSE) {
                return false;
            }
            *asked = Some(Instant::now());
        }
        let task = tokio::task::spawn_blocking(move || provider.credentials());
        let found = match tokio::time::timeout(PROVIDER_LIMIT, task).await {
            Ok(Ok(Ok(found))) => found,
            Ok(Ok(Err(reason))) => {
                tracing::warn!("asking for new credentials: {reason}");
                return false;
            }
            Ok(Err(_)) | Err(_) => {
                tracing::warn!("asking for new credentials brought no answer");
                return false;
            }
        };
        let Ok(grant) = first_grant(&found) else {
            return false;
        };
        let mut state = self.state();
        if state.credentials == found {
            return false;
        }
        state.credentials = found;
        state.generation += 1;
        state.grant = grant;
        true
    }

    fn state(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }

    fn current(&self) -> Option<HeaderValue> {
        self.state()
            .grant
            .as_ref()
            .map(|grant| grant.header.clone())
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
                let nobody = matches!(self.state().credentials, Credentials::Anonymous);
                registry.scheme() == "http" || nobody
            }
            _ => false,
        }
    }

    async fn fetch_token(&self, source: &TokenSource) -> Result<(), Failure> {
        let (credentials, generation) = {
            let state = self.state();
            (state.credentials.clone(), state.generation)
        };
        let limit = self.timeouts.connect + self.timeouts.read;
        let (grant, identity) = token::fetch(&self.http, limit, source, &credentials).await?;
        self.refresh_later(&grant);
        let mut state = self.state();
        if state.generation != generation {
            return Ok(()); // The credentials were replaced meanwhile: the next request sees.
        }
        if let Some(identity) = identity {
            state.credentials = Credentials::Identity(identity);
        }
        state.grant = Some(grant);
        state.used = false;
        Ok(())
    }

    /// Has the token replaced at three quarters of its life, if it is used until then.
    fn refresh_later(&self, grant: &Grant) {
        let Some(renew) = grant.renew else {
            return;
        };
        let (me, header) = (Weak::clone(&self.me), grant.header.clone());
        let wait = renew.saturating_duration_since(Instant::now()) * 3 / 4;
        tokio::spawn(async move {
            tokio::time::sleep(wait).await;
            let Some(me) = me.upgrade() else {
                return;
            };
            if !me.state().used {
                return;
            }
            if let Err(failure) = me.renew(&header).await {
                // The next request tries again, and says so if it fails.
                tracing::debug!(error = %failure.error, "renewing a token early failed");
            }
        });
    }
}

/// What can be sent without any challenge.
fn first_grant(credentials: &Credentials) -> Result<Option<Grant>, BackendError> {
    let Credentials::Bearer(token) = credentials else {
        return Ok(None);
    };
    let strange = || BackendError::Config("the token has characters that no token has".to_owned());
    token::bearer(token, None).map(Some).ok_or_else(strange)
}

pub(super) fn basic(credentials: &Credentials) -> Option<HeaderValue> {
    let Credentials::Basic { username, password } = credentials else {
        return None;
    };
    let pair = STANDARD.encode(format!("{username}:{password}"));
    let mut header = HeaderValue::from_str(&format!("Basic {pair}")).ok()?;
    header.set_sensitive(true);
    Some(header)
}

impl fmt::Debug for Authenticator {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.state().credentials.fmt(f)
    }
}

pub(super) fn auth_error(url: &Url, reason: String) -> BackendError {
    BackendError::Auth {
        url: public_name(url),
        reason,
    }
}

pub(super) fn denied(url: &Url, reason: &str) -> Failure {
    Failure::never(auth_error(url, reason.to_owned()))
}
