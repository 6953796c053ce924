//! Credentials from docker's configuration: `config.json` and its credential helpers.
//!
//! `DOCKER_CONFIG` names the directory of `config.json`; without it, `~/.docker`.
//! A missing file or a registry that it does not mention means anonymous access.
//!
//! Promises: secrets appear in no error, no `Debug` output and no log line.
#![forbid(unsafe_code)]

use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

use docker_credential::{CredentialRetrievalError, DockerCredential};

use super::error::OciError;
use crate::backend::registry::CredentialProvider;

/// Helpers may ask a key ring or a cloud API, but not for ever.
const HELPER_DEADLINE: Duration = Duration::from_secs(30);
/// Under this name docker stores the credentials of Docker Hub.
const DOCKER_HUB_KEY: &str = "https://index.docker.io/v1/";

/// How to log in to a registry.
#[derive(Clone, PartialEq, Eq, Default)]
pub enum Credentials {
    /// Not at all.
    #[default]
    Anonymous,
    /// With a name and a password, directly or to obtain a token.
    Basic {
        /// Name of the account.
        username: String,
        /// Its password or access token.
        password: String,
    },
    /// With a token that the registry itself accepts.
    Bearer(String),
    /// With a token that the registry's token server exchanges for a bearer token.
    Identity(String),
}

/// The name of an account whose password is an identity token, as docker's credential
/// helpers have it.
const IDENTITY: &str = "<token>";

impl Credentials {
    /// What a name and a password mean: a password without a name is a token for the
    /// registry itself, and the name `<token>` goes with an identity token.
    #[must_use]
    pub fn of_pair(username: &str, password: &str) -> Self {
        match (username, password) {
            ("", "") => Self::Anonymous,
            ("", token) => Self::Bearer(token.to_owned()),
            (IDENTITY, token) => Self::Identity(token.to_owned()),
            (username, password) => Self::Basic {
                username: username.to_owned(),
                password: password.to_owned(),
            },
        }
    }

    /// The inverse of [`Credentials::of_pair`]; none for nobody.
    #[must_use]
    pub fn pair(&self) -> Option<(&str, &str)> {
        match self {
            Self::Anonymous => None,
            Self::Basic { username, password } => Some((username, password)),
            Self::Bearer(token) => Some(("", token)),
            Self::Identity(token) => Some((IDENTITY, token)),
        }
    }
}

impl fmt::Debug for Credentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Anonymous => "Anonymous",
            Self::Basic { .. } => "Basic(<redacted>)",
            Self::Bearer(_) => "Bearer(<redacted>)",
            Self::Identity(_) => "Identity(<redacted>)",
        })
    }
}

/// Looks up `host` in docker's configuration.
///
/// May run a credential helper, which is waited for at most 30 seconds.
///
/// # Errors
/// [`OciError::Credentials`] if the configuration is broken or a helper fails; a
/// registry without an entry is no error.
pub async fn lookup(host: &str) -> Result<Credentials, OciError> {
    let failed = |reason: String| OciError::Credentials {
        host: host.to_owned(),
        reason,
    };
    let key = host.to_owned();
    let task = tokio::task::spawn_blocking(move || look_up(&key));
    match tokio::time::timeout(HELPER_DEADLINE, task).await {
        Ok(Ok(result)) => result.map_err(failed),
        Ok(Err(_panicked)) => Err(failed("the look-up crashed".to_owned())),
        Err(_elapsed) => Err(failed("the credential helper does not answer".to_owned())),
    }
}

/// What docker's configuration says at the moment when it is asked. Credentials of
/// cloud registries live for hours; their helpers know the next ones.
#[derive(Clone, Debug)]
pub struct DockerConfig {
    host: String,
}

impl DockerConfig {
    /// * `host`: as in references of images.
    #[must_use]
    pub fn new(host: &str) -> Self {
        let host = host.to_owned();
        Self { host }
    }
}

impl CredentialProvider for DockerConfig {
    fn credentials(&self) -> Result<Credentials, String> {
        look_up(&self.host).map_err(|reason| format!("{}: {reason}", self.host))
    }
}

/// The same as [`lookup`], for threads that may block as long as a helper likes.
fn look_up(host: &str) -> Result<Credentials, String> {
    let Some(path) = config_path().filter(|path| path.exists()) else {
        return Ok(Credentials::Anonymous);
    };
    let key = if host == "docker.io" {
        DOCKER_HUB_KEY
    } else {
        host
    };
    match docker_credential::get_credential(key) {
        Ok(credential) => Ok(from_docker(credential)),
        Err(error) => match reason(&error, &path) {
            None => Ok(Credentials::Anonymous),
            Some(reason) => Err(reason),
        },
    }
}

fn from_docker(credential: DockerCredential) -> Credentials {
    match credential {
        DockerCredential::IdentityToken(token) => Credentials::Identity(token),
        DockerCredential::UsernamePassword(username, password) => {
            Credentials::Basic { username, password }
        }
    }
}

/// What went wrong, without what a helper printed; `None` if there is just no entry.
fn reason(error: &CredentialRetrievalError, path: &std::path::Path) -> Option<String> {
    use CredentialRetrievalError as E;
    match error {
        E::NoCredentialConfigured | E::ConfigNotFound => None,
        // The words of docker's helper protocol for "no such entry".
        E::HelperFailure { stdout, .. } if stdout.contains("credentials not found") => None,
        E::HelperFailure { helper, .. } => {
            Some(format!("{helper} failed; run it by hand to see why"))
        }
        E::ConfigReadError => Some(format!("{} cannot be read as JSON", path.display())),
        E::HelperCommunicationError => Some(format!(
            "the credential helper named in {} cannot be run",
            path.display()
        )),
        E::MalformedHelperResponse => Some("the credential helper's answer is no JSON".to_owned()),
        E::CredentialDecodingError | E::CredentialMismatchError => Some(format!(
            "the entry in {} is damaged; log in again",
            path.display()
        )),
    }
}

fn config_path() -> Option<PathBuf> {
    let dir = match std::env::var_os("DOCKER_CONFIG") {
        Some(dir) => PathBuf::from(dir),
        None => PathBuf::from(std::env::var_os("HOME")?).join(".docker"),
    };
    Some(dir.join("config.json"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn secrets_are_not_shown() {
        let secrets = [
            Credentials::Basic {
                username: "u".into(),
                password: "s3cret".into(),
            },
            Credentials::Bearer("s3cret".into()),
            Credentials::Identity("s3cret".into()),
        ];
        assert!(!format!("{secrets:?}").contains("s3cret"));
        let failure = CredentialRetrievalError::HelperFailure {
            helper: "docker-credential-x".into(),
            stdout: "s3cret".into(),
            stderr: "s3cret".into(),
        };
        let shown = reason(&failure, "/c".as_ref()).unwrap();
        assert!(
            !shown.contains("s3cret") && shown.contains("docker-credential-x"),
            "{shown}"
        );
    }

    #[test]
    fn a_pair_says_what_it_is() {
        let basic = Credentials::Basic {
            username: "u".into(),
            password: "p".into(),
        };
        for credentials in [
            basic,
            Credentials::Bearer("b".into()),
            Credentials::Identity("i".into()),
        ] {
            let (username, password) = credentials.pair().unwrap();
            assert_eq!(Credentials::of_pair(username, password), credentials);
        }
        assert_eq!(Credentials::of_pair("", ""), Credentials::Anonymous);
        assert!(Credentials::Anonymous.pair().is_none());
    }

    #[test]
    fn an_unknown_registry_is_anonymous() {
        let not_found = CredentialRetrievalError::HelperFailure {
            helper: "docker-credential-x".into(),
            stdout: "credentials not found in native keychain\n".into(),
            stderr: String::new(),
        };
        for error in [CredentialRetrievalError::NoCredentialConfigured, not_found] {
            assert_eq!(reason(&error, "/c".as_ref()), None);
        }
    }
}
