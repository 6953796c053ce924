//! An image in a registry, through the crate `oci-client`.
//!
//! Loopback registries are spoken to in plain HTTP, all others in HTTPS unless
//! the caller allows plain HTTP. Manifests are requested here rather than by
//! `oci-client`, because their size must be bounded and their exact bytes kept;
//! log-in, blobs and uploads are `oci-client`'s.
//!
//! Promises: content is checked against its digest and length; every wait has a
//! deadline; a request that failed for a passing reason is repeated a bounded
//! number of times.
//!
//! Downloads: `download`. Uploads: `upload`. Log-in: `auth`. Retries: `retry`.
//! Time-outs and TLS: `clients`.

use std::sync::Arc;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use oci_client::{Reference, RegistryOperation};
use reqwest::{Method, StatusCode, header};

use super::Access;
use super::content::{ContentDigest, verify};
use super::credentials;
use super::error::OciError;
use super::manifest::{ACCEPTED, Descriptor, Document, MAX_MANIFEST, OCI_INDEX, OCI_MANIFEST};
use super::reference::RegistryRef;

mod auth;
mod clients;
pub(super) mod download;
mod retry;
#[cfg(test)]
mod tests;
pub(super) mod upload;

use auth::Login;
use clients::Clients;
pub use clients::builder as client_builder;
use retry::{Attempt, Failure};

/// A connection that cannot be made within this time is a failed attempt.
const CONNECT_DEADLINE: Duration = Duration::from_secs(20);
/// A server that sends nothing for this long is a failed attempt.
const READ_DEADLINE: Duration = Duration::from_secs(60);
/// How much of an error page is quoted.
const MAX_ERROR_TEXT: usize = 300;
/// How much of an error page is read.
const MAX_ERROR_BODY: u64 = 64 << 10;

/// One repository of a registry. Cheap to clone.
#[derive(Clone)]
pub struct Registry {
    inner: Arc<Inner>,
}

struct Inner {
    name: RegistryRef,
    /// The name in `oci-client`'s words.
    reference: Reference,
    /// `http://host:port` or `https://host`, of the host that really serves.
    origin: String,
    login: Login,
    clients: Clients,
}

impl std::fmt::Debug for Registry {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Registry({})", self.inner.name)
    }
}

impl Registry {
    /// Prepares access; nothing is sent yet, but a credential helper may run.
    ///
    /// # Errors
    /// [`OciError::Credentials`]; [`OciError::Setup`] on a system without CA certificates.
    pub async fn open(name: &RegistryRef, access: &Access) -> Result<Self, OciError> {
        let credentials = match &access.credentials {
            Some(credentials) => credentials.clone(),
            None => credentials::lookup(&name.host).await?,
        };
        let plain = access.plain_http || name.is_loopback();
        let reference = to_reference(name);
        let scheme = if plain { "http" } else { "https" };
        let origin = format!("{scheme}://{}", reference.resolve_registry());
        let clients = Clients::new(plain).map_err(|source| OciError::Setup {
            at: origin.clone(),
            source,
        })?;
        let inner = Inner {
            name: name.clone(),
            origin: origin.clone(),
            login: Login::new(credentials),
            clients,
            reference,
        };
        Ok(Self {
            inner: Arc::new(inner),
        })
    }

    /// The image this was opened for.
    #[must_use]
    pub fn name(&self) -> &RegistryRef {
        &self.inner.name
    }

    /// The URL of the host that serves, without a path: `https://host`.
    #[must_use]
    pub fn origin(&self) -> &str {
        &self.inner.origin
    }

    /// What a request for blobs must carry as `Authorization`, for those who reach the
    /// registry by way of another server. Logs in, here, unless that has happened.
    ///
    /// * `renew`: what was returned last was refused.
    ///
    /// # Errors
    /// As [`Registry::resolve`].
    pub async fn authorization(
        &self,
        renew: bool,
    ) -> Result<Option<header::HeaderValue>, OciError> {
        let at = format!("{}/v2/", self.inner.origin);
        retry::run(&at, "logging in", |attempt: Attempt| async move {
            let renew = renew || attempt.renew_login;
            self.login(RegistryOperation::Pull, renew).await
        })
        .await
    }

    /// Fetches the manifest or index that the tag or digest names.
    ///
    /// # Errors
    /// [`OciError::NotFound`], [`OciError::Unauthorized`], [`OciError::Status`],
    /// [`OciError::Request`], [`OciError::TooLarge`], and [`OciError::Digest`] if the
    /// reference has a digest and the content another one.
    pub async fn resolve(&self) -> Result<(Descriptor, Bytes), OciError> {
        let name = &self.inner.name;
        let (bytes, content_type) = match &name.digest {
            Some(digest) => {
                let fetched = self.get_manifest(digest.as_str()).await?;
                let size = super::content::byte_len(&fetched.0);
                verify(
                    &self.manifest_url(digest.as_str()),
                    &fetched.0,
                    digest,
                    size,
                )?;
                fetched
            }
            None => {
                self.get_manifest(name.tag.as_deref().unwrap_or("latest"))
                    .await?
            }
        };
        let media_type = media_type_of(&self.inner.name.to_string(), &bytes, &content_type)?;
        let mut descriptor = Descriptor::of(&media_type, &bytes);
        if let Some(digest) = &name.digest {
            descriptor.digest = digest.clone();
        }
        Ok((descriptor, bytes))
    }

    /// Fetches the manifest or index that `descriptor` points at, and checks it.
    ///
    /// # Errors
    /// As [`Registry::resolve`], and [`OciError::Size`].
    pub async fn manifest(&self, descriptor: &Descriptor) -> Result<Bytes, OciError> {
        let digest = descriptor.digest.as_str();
        let (bytes, _) = self.get_manifest(digest).await?;
        verify(
            &self.manifest_url(digest),
            &bytes,
            &descriptor.digest,
            descriptor.size,
        )?;
        Ok(bytes)
    }

    /// Whether the repository has the blob.
    ///
    /// # Errors
    /// As [`Registry::resolve`], except that a missing blob is no error.
    pub async fn has_blob(&self, digest: &ContentDigest) -> Result<bool, OciError> {
        let at = self.blob_url(digest);
        retry::run(&at, "asking for a blob", |attempt: Attempt| async move {
            self.login(RegistryOperation::Pull, attempt.renew_login)
                .await?;
            match self
                .inner
                .clients
                .pull()?
                .blob_exists(&self.inner.reference, digest.as_str())
                .await
            {
                Ok(exists) => Ok(exists),
                Err(error) => Err(Failure::of_client(error)),
            }
        })
        .await
    }

    /// Stores a manifest or index under `target`, a tag or a digest.
    ///
    /// # Errors
    /// As [`Registry::resolve`].
    pub async fn push_manifest(
        &self,
        bytes: &Bytes,
        media_type: &str,
        target: &str,
    ) -> Result<(), OciError> {
        let at = self.manifest_url(target);
        let at = at.as_str();
        retry::run(at, "sending a manifest", |attempt: Attempt| async move {
            let authorization = self
                .login(RegistryOperation::Push, attempt.renew_login)
                .await?;
            let request = self
                .request(Method::PUT, at, authorization)
                .header(header::CONTENT_TYPE, media_type)
                .body(bytes.clone());
            let response = request.send().await.map_err(Failure::of_request)?;
            match response.status() {
                status if status.is_success() => Ok(()),
                status => Err(refusal(status, response).await),
            }
        })
        .await
    }

    /// Body and content type of a manifest.
    async fn get_manifest(&self, target: &str) -> Result<(Bytes, String), OciError> {
        let at = self.manifest_url(target);
        let at = at.as_str();
        retry::run(at, "fetching the manifest", |attempt: Attempt| async move {
            let send = |authorization| {
                let request = self.request(Method::GET, at, authorization);
                let request = request.header(header::ACCEPT, ACCEPTED.join(", "));
                async { request.send().await.map_err(Failure::of_request) }
            };
            let login = self.login(RegistryOperation::Pull, attempt.renew_login);
            // A round trip less where anybody may pull.
            let (login, early) = if self.inner.login.may_need_nothing().await {
                let (login, early) = tokio::join!(login, send(None));
                (login?, Some(early))
            } else {
                (login.await?, None)
            };
            let response = match early.filter(|_| login.is_none()) {
                Some(early) => early?,
                None => send(login).await?,
            };
            if response.status() != StatusCode::OK {
                return Err(refusal(response.status(), response).await);
            }
            let content_type = response
                .headers()
                .get(header::CONTENT_TYPE)
                .and_then(|value| value.to_str().ok())
                .and_then(|value| value.split(';').next())
                .unwrap_or_default()
                .to_owned();
            match body(response, MAX_MANIFEST).await? {
                Some(bytes) => Ok((bytes, content_type)),
                None => Err(Failure::Final(OciError::TooLarge {
                    at: at.to_owned(),
                    limit: MAX_MANIFEST,
                })),
            }
        })
        .await
    }

    /// Logs in for `op` if that has not happened, and returns what to send along.
    async fn login(
        &self,
        op: RegistryOperation,
        renew: bool,
    ) -> Result<Option<header::HeaderValue>, Failure> {
        self.inner.login.authorize(&self.inner, op, renew).await
    }

    fn request(
        &self,
        method: Method,
        url: &str,
        authorization: Option<header::HeaderValue>,
    ) -> reqwest::RequestBuilder {
        let request = self.inner.clients.http.request(method, url);
        match authorization {
            Some(value) => request.header(header::AUTHORIZATION, value),
            None => request,
        }
    }

    fn manifest_url(&self, target: &str) -> String {
        format!(
            "{}/v2/{}/manifests/{target}",
            self.inner.origin, self.inner.name.repository
        )
    }

    fn blob_url(&self, digest: &ContentDigest) -> String {
        format!(
            "{}/v2/{}/blobs/{digest}",
            self.inner.origin, self.inner.name.repository
        )
    }
}

/// The whole body, or `None` if it is longer than `limit`.
async fn body(mut response: reqwest::Response, limit: u64) -> Result<Option<Bytes>, Failure> {
    let mut bytes = BytesMut::new();
    while let Some(piece) = response.chunk().await.map_err(Failure::of_request)? {
        bytes.extend_from_slice(&piece);
        if super::content::byte_len(&bytes) > limit {
            return Ok(None);
        }
    }
    Ok(Some(bytes.freeze()))
}

/// What an answer other than success means.
async fn refusal(status: StatusCode, response: reqwest::Response) -> Failure {
    let wait = response
        .headers()
        .get(header::RETRY_AFTER)
        .and_then(|value| value.to_str().ok()?.parse().ok())
        .map(Duration::from_secs);
    let text = match body(response, MAX_ERROR_BODY).await {
        Ok(Some(bytes)) => quote(&bytes),
        Ok(None) | Err(_) => String::new(),
    };
    Failure::Status {
        status: status.as_u16(),
        text,
        wait,
    }
}

/// The start of an error page as one line, after a colon.
fn quote(body: &[u8]) -> String {
    let text = String::from_utf8_lossy(body);
    let line = text.split_whitespace().collect::<Vec<_>>().join(" ");
    let line: String = line
        .chars()
        .filter(|char| !char.is_control())
        .take(MAX_ERROR_TEXT)
        .collect();
    if line.is_empty() {
        line
    } else {
        format!(": {line}")
    }
}

/// What kind of document this is: its own word, the header's, or its shape.
fn media_type_of(at: &str, bytes: &[u8], content_type: &str) -> Result<String, OciError> {
    let document = Document::parse(at, bytes)?;
    let (rest, shape) = match &document {
        Document::Manifest(manifest) => (&manifest.rest, OCI_MANIFEST),
        Document::Index(index) => (&index.rest, OCI_INDEX),
    };
    let own = rest.get("mediaType").and_then(serde_json::Value::as_str);
    Ok(own
        .or_else(|| ACCEPTED.into_iter().find(|known| *known == content_type))
        .unwrap_or(shape)
        .to_owned())
}

fn to_reference(name: &RegistryRef) -> Reference {
    let (registry, repository) = (name.host.clone(), name.repository.clone());
    match (&name.tag, &name.digest) {
        (_, Some(digest)) => Reference::with_digest(registry, repository, digest.to_string()),
        (tag, None) => {
            let tag = tag.clone().unwrap_or_else(|| "latest".to_owned());
            Reference::with_tag(registry, repository, tag)
        }
    }
}
