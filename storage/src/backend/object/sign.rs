//! URLs of objects, signed the way each store wants it.
//!
//! S3 and Azure are signed by the `object_store` crate, which also finds the
//! credentials of machines and workloads. Google's store takes a token in a header.
//! OSS has an older kind of signature (version 1, HMAC-SHA1 in the query), which all
//! its regions and all clients of it know.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use object_store::aws::{AmazonS3, AmazonS3Builder};
use object_store::azure::{AzureCredential, MicrosoftAzure, MicrosoftAzureBuilder};
use object_store::gcp::{GoogleCloudStorage, GoogleCloudStorageBuilder};
use object_store::path::Path;
use object_store::signer::{Method, Signer as _};
use reqwest::header::HeaderValue;
use ring::hmac;
use url::Url;

use super::{Keys, Login, ObjectConfig, Store};
use crate::backend::BackendError;
use crate::backend::registry::Scheme;
use crate::backend::registry::tls::is_loopback;
use crate::blob_id::BlobId;

/// How long a signed URL is good. Short enough to be worth little to a thief.
const LIFE: Duration = Duration::from_secs(900);

/// A URL to use, and what goes into the `Authorization` header beside it.
pub(super) type Signed = (Url, Option<HeaderValue>);

/// Knows where objects are and how to ask for them.
#[derive(Debug)]
pub(super) enum Signer {
    Public(Place),
    S3 {
        place: Place,
        store: AmazonS3,
    },
    Oss {
        place: Place,
        bucket: String,
        keys: Keys,
    },
    Azure {
        place: Place,
        store: Option<MicrosoftAzure>,
    },
    Gcs {
        place: Place,
        store: GoogleCloudStorage,
    },
}

/// Where objects are.
#[derive(Clone, Debug)]
pub(super) struct Place {
    /// Ends with a slash.
    base: Url,
    prefix: String,
}

impl Place {
    fn key(&self, blob: &BlobId) -> String {
        format!("{}{blob}", self.prefix)
    }

    fn url(&self, blob: &BlobId) -> Url {
        let mut url = self.base.clone();
        let path = format!("{}{}", url.path(), self.key(blob));
        url.set_path(&path);
        url
    }
}

impl Signer {
    pub(super) fn new(config: &ObjectConfig) -> Result<Self, BackendError> {
        let place = place(config)?;
        let failed = |error: object_store::Error| BackendError::Config(error.to_string());
        let no = |what: &str| BackendError::Config(format!("{what} is of no use for this store"));
        // They must exist before `object_store` builds its own client.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let plain = config.scheme == Scheme::Http;
        match (&config.store, &config.login) {
            (Store::Azure { .. }, Login::Anonymous) => Ok(Self::Azure { place, store: None }),
            (_, Login::Anonymous) => Ok(Self::Public(place)),
            (Store::S3 { region }, login) => {
                let builder = match login {
                    Login::Keys(keys) => AmazonS3Builder::new()
                        .with_access_key_id(&keys.id)
                        .with_secret_access_key(&keys.secret),
                    Login::Environment => AmazonS3Builder::from_env(),
                    _ => return Err(no("this kind of credentials")),
                };
                let store = builder
                    .with_region(region)
                    .with_bucket_name(&config.bucket)
                    .with_endpoint(format!("{}://{}", config.scheme, config.endpoint))
                    .with_virtual_hosted_style_request(false)
                    .with_allow_http(plain)
                    .build()
                    .map_err(failed)?;
                Ok(Self::S3 { place, store })
            }
            (Store::Oss, Login::Keys(keys)) => Ok(Self::Oss {
                place,
                bucket: config.bucket.clone(),
                keys: keys.clone(),
            }),
            (Store::Azure { account }, login) => {
                let builder = match login {
                    Login::Keys(keys) => MicrosoftAzureBuilder::new().with_access_key(&keys.secret),
                    Login::SharedAccess(query) => {
                        let query = query.trim_start_matches('?').as_bytes();
                        let pairs: Vec<(String, String)> =
                            url::form_urlencoded::parse(query).into_owned().collect();
                        MicrosoftAzureBuilder::new().with_sas_authorization(pairs)
                    }
                    Login::Environment => MicrosoftAzureBuilder::from_env(),
                    _ => return Err(no("this kind of credentials")),
                };
                let mut builder = builder
                    .with_account(account)
                    .with_container_name(&config.bucket)
                    .with_allow_http(plain);
                if !config.endpoint.is_empty() {
                    let endpoint = format!("{}://{}", config.scheme, config.endpoint);
                    builder = builder.with_endpoint(endpoint);
                }
                let store = Some(builder.build().map_err(failed)?);
                Ok(Self::Azure { place, store })
            }
            (Store::Gcs, login) => {
                let builder = match login {
                    Login::KeyFile(path) => GoogleCloudStorageBuilder::new()
                        .with_service_account_path(path.display().to_string()),
                    Login::Environment => GoogleCloudStorageBuilder::from_env(),
                    _ => return Err(no("this kind of credentials")),
                };
                if plain && !is_loopback(&config.endpoint) {
                    return Err(BackendError::Config(
                        "tokens are not sent without TLS; use https".to_owned(),
                    ));
                }
                let builder = builder.with_bucket_name(&config.bucket);
                let store = builder.build().map_err(failed)?;
                Ok(Self::Gcs { place, store })
            }
            (Store::Oss, _) => Err(no("this kind of credentials")),
        }
    }

    fn place(&self) -> &Place {
        match self {
            Self::Public(place)
            | Self::S3 { place, .. }
            | Self::Oss { place, .. }
            | Self::Azure { place, .. }
            | Self::Gcs { place, .. } => place,
        }
    }

    pub(super) fn base(&self) -> &Url {
        &self.place().base
    }

    /// The URL without any signature.
    pub(super) fn url(&self, blob: &BlobId) -> Url {
        self.place().url(blob)
    }

    /// Signs a GET request. May ask the cloud for credentials.
    ///
    /// # Errors
    /// Why there are none.
    pub(super) async fn sign(&self, blob: &BlobId) -> Result<Signed, String> {
        let failed = |error: object_store::Error| error.to_string();
        match self {
            Self::Public(place) | Self::Azure { place, store: None } => Ok((place.url(blob), None)),
            Self::S3 { place, store } => {
                let path = Path::parse(place.key(blob)).map_err(|error| error.to_string())?;
                let url = store.signed_url(Method::GET, &path, LIFE).await;
                Ok((url.map_err(failed)?, None))
            }
            Self::Oss {
                place,
                bucket,
                keys,
            } => {
                let now = SystemTime::now().duration_since(UNIX_EPOCH);
                let end = now.unwrap_or_default().saturating_add(LIFE).as_secs();
                Ok((
                    sign_oss(place.url(blob), bucket, &place.key(blob), keys, end),
                    None,
                ))
            }
            Self::Azure {
                place,
                store: Some(store),
            } => {
                let credential = store.credentials().get_credential().await.map_err(failed)?;
                let mut url = place.url(blob);
                match &*credential {
                    AzureCredential::BearerToken(token) => Ok((url, Some(bearer(token)?))),
                    AzureCredential::SASToken(pairs) => {
                        url.query_pairs_mut().extend_pairs(pairs);
                        Ok((url, None))
                    }
                    AzureCredential::AccessKey(_) => {
                        let path =
                            Path::parse(place.key(blob)).map_err(|error| error.to_string())?;
                        let url = store.signed_url(Method::GET, &path, LIFE).await;
                        Ok((url.map_err(failed)?, None))
                    }
                }
            }
            Self::Gcs { place, store } => {
                let credential = store.credentials().get_credential().await.map_err(failed)?;
                Ok((place.url(blob), Some(bearer(&credential.bearer)?)))
            }
        }
    }
}

fn bearer(token: &str) -> Result<HeaderValue, String> {
    let mut header = HeaderValue::from_str(&format!("Bearer {token}"))
        .map_err(|_error| "the token has characters that no token has".to_owned())?;
    header.set_sensitive(true);
    Ok(header)
}

/// OSS's signature version 1 in the query of a URL.
///
/// * `end`: when it ends, in seconds since 1970.
fn sign_oss(mut url: Url, bucket: &str, key: &str, keys: &Keys, end: u64) -> Url {
    // Method, digest of the body, its type, the end, and which object it is.
    let text = format!("GET\n\n\n{end}\n/{bucket}/{key}");
    let secret = hmac::Key::new(hmac::HMAC_SHA1_FOR_LEGACY_USE_ONLY, keys.secret.as_bytes());
    let signature = STANDARD.encode(hmac::sign(&secret, text.as_bytes()));
    url.query_pairs_mut()
        .append_pair("OSSAccessKeyId", &keys.id)
        .append_pair("Expires", &end.to_string())
        .append_pair("Signature", &signature);
    url
}

fn place(config: &ObjectConfig) -> Result<Place, BackendError> {
    let bad = |what: &str, value: &str| {
        BackendError::Config(format!("{value:?} is no {what} of an object store"))
    };
    let name_ok = |c: char| c.is_ascii_alphanumeric() || "-._".contains(c);
    let bucket = &config.bucket;
    if bucket.is_empty() || !bucket.chars().all(name_ok) || bucket.chars().all(|c| c == '.') {
        return Err(bad("bucket", bucket));
    }
    let endpoint = &config.endpoint;
    let endpoint_ok = |c: char| c.is_ascii_alphanumeric() || "-._:[]".contains(c);
    let has_default = matches!(config.store, Store::Azure { .. } | Store::Gcs);
    if !endpoint.chars().all(endpoint_ok) || endpoint.is_empty() && !has_default {
        return Err(bad("endpoint", endpoint));
    }
    let segment_ok = |segment: &str| !matches!(segment, "." | "..");
    let prefix_ok = |c: char| c.is_ascii_alphanumeric() || "-._/".contains(c);
    let prefix = config.prefix.trim_start_matches('/');
    if !prefix.chars().all(prefix_ok) || prefix.contains("//") || !prefix.split('/').all(segment_ok)
    {
        return Err(bad("prefix", prefix));
    }
    let scheme = config.scheme;
    let base = match &config.store {
        Store::S3 { .. } => format!("{scheme}://{endpoint}/{bucket}/"),
        Store::Oss => format!("{scheme}://{bucket}.{endpoint}/"),
        Store::Azure { account } if !account.chars().all(name_ok) || account.is_empty() => {
            return Err(bad("account", account));
        }
        Store::Azure { account } if endpoint.is_empty() => {
            format!("{scheme}://{account}.blob.core.windows.net/{bucket}/")
        }
        Store::Azure { .. } => format!("{scheme}://{endpoint}/{bucket}/"),
        Store::Gcs if endpoint.is_empty() => {
            format!("{scheme}://storage.googleapis.com/{bucket}/")
        }
        Store::Gcs => format!("{scheme}://{endpoint}/{bucket}/"),
    };
    let base = Url::parse(&base).ok().filter(|base| base.has_host());
    Ok(Place {
        base: base.ok_or_else(|| bad("endpoint", endpoint))?,
        prefix: prefix.to_owned(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn keys() -> Login {
        Login::Keys(Keys {
            id: "user".into(),
            secret: "c2VjcmV0".into(),
        })
    }

    fn signed(config: &ObjectConfig) -> Signed {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        let signer = Signer::new(config).unwrap();
        assert!(!format!("{signer:?}").contains("c2VjcmV0"), "{signer:?}");
        let blob = BlobId::new("abc").unwrap();
        runtime.block_on(signer.sign(&blob)).unwrap()
    }

    #[test]
    fn each_store_has_its_own_addresses() {
        let s3 = Store::S3 {
            region: "eu-west-1".into(),
        };
        let azure = Store::Azure {
            account: "acc".into(),
        };
        let rows = [
            (
                s3,
                "s3.example:9000",
                "https://s3.example:9000/bucket/p/abc",
            ),
            (
                Store::Oss,
                "oss.example",
                "https://bucket.oss.example/p/abc",
            ),
            (azure, "", "https://acc.blob.core.windows.net/bucket/p/abc"),
            (
                Store::Gcs,
                "",
                "https://storage.googleapis.com/bucket/p/abc",
            ),
        ];
        for (store, endpoint, wanted) in rows {
            let mut config = ObjectConfig::new(store, endpoint, "bucket");
            config.prefix = "p/".into();
            assert_eq!(signed(&config).0.as_str(), wanted);
            if config.store == Store::Gcs {
                continue;
            }
            // The signed URL is the same place, and tells its end.
            config.login = keys();
            let (url, header) = signed(&config);
            let (place, query) = url.as_str().split_once('?').unwrap();
            assert_eq!((place, header), (wanted, None));
            assert!(!query.contains("c2VjcmV0"));
        }
    }

    #[test]
    fn oss_signatures() {
        // The signature was made with `openssl dgst -sha1 -hmac`.
        let keys = Keys {
            id: "id".into(),
            secret: "secret".into(),
        };
        let url = Url::parse("https://b.oss.example/p/abc").unwrap();
        let url = sign_oss(url, "b", "p/abc", &keys, 1_141_889_120);
        assert_eq!(
            url.query().unwrap(),
            "OSSAccessKeyId=id&Expires=1141889120&Signature=nCWqNGv3wkz3nNqqJYGL2Rb%2FJ8M%3D"
        );
    }

    #[test]
    fn shared_access_signatures_are_passed_on() {
        let azure = Store::Azure {
            account: "acc".into(),
        };
        let mut config = ObjectConfig::new(azure, "", "bucket");
        config.login = Login::SharedAccess("?sv=2021&sig=a%2Bb".into());
        let (url, _) = signed(&config);
        assert_eq!(url.query(), Some("sv=2021&sig=a%2Bb"));
    }

    #[test]
    fn settings_that_cannot_work_are_refused() {
        let good = ObjectConfig::new(Store::Oss, "oss.example", "bucket");
        let cases: [fn(&mut ObjectConfig); 7] = [
            |config| config.bucket.clear(),
            |config| config.bucket = "a/b".into(),
            |config| config.endpoint = "http://host".into(),
            |config| config.endpoint.clear(),
            |config| config.prefix = "a/../b".into(),
            |config| config.prefix = "a?b".into(),
            |config| config.login = Login::Environment,
        ];
        for (number, spoil) in cases.into_iter().enumerate() {
            let mut config = good.clone();
            spoil(&mut config);
            let error = Signer::new(&config).unwrap_err();
            assert!(
                matches!(error, BackendError::Config(_)),
                "{number}: {error}"
            );
        }
    }
}
