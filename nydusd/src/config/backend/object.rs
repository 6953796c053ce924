//! Settings of object stores: `oss`, `s3`, `azure` and `gcs`.

use storage::backend::object::{Keys, Login, ObjectConfig, Store};
use storage::backend::registry::Scheme;

use super::{Network, filled, scheme};
use crate::config::ConfigError;
use crate::config::section::Section;

/// Reads the settings of the store `kind`.
pub(super) fn read(kind: &str, section: &mut Section<'_>) -> Result<ObjectConfig, ConfigError> {
    let scheme = scheme(section, "scheme")?.unwrap_or(Scheme::Https);
    let (store, bucket) = match kind {
        "s3" => {
            let region = section.required_text("region")?.to_owned();
            (Store::S3 { region }, "bucket_name")
        }
        "oss" => (Store::Oss, "bucket_name"),
        "azure" => {
            let account = section.required_text("account_name")?.to_owned();
            (Store::Azure { account }, "container_name")
        }
        _ => (Store::Gcs, "bucket_name"),
    };
    let endpoint = match store {
        // They have one that everybody uses.
        Store::Azure { .. } | Store::Gcs => filled(section, "endpoint")?.unwrap_or_default(),
        _ => section.required_text("endpoint")?,
    };
    if endpoint.contains('/') {
        return Err(section.wrong("endpoint", "a host name with an optional port"));
    }
    let mut config = ObjectConfig::new(store, endpoint, section.required_text(bucket)?);
    config.scheme = scheme;
    config.login = login(&config.store, section)?;
    config.prefix = section
        .text("object_prefix")?
        .unwrap_or_default()
        .to_owned();
    let network = Network::read(section)?;
    (config.timeouts, config.retry) = (network.timeouts, network.retry);
    (config.ca_files, config.skip_verify) = (network.ca_files, network.skip_verify);
    Ok(config)
}

fn login(store: &Store, section: &mut Section<'_>) -> Result<Login, ConfigError> {
    match filled(section, "credentials")? {
        Some("environment") => return Ok(Login::Environment),
        Some(_) => return Err(section.wrong("credentials", "\"environment\" or nothing")),
        None => {}
    }
    let keys = |id: &str, secret: &str| {
        Login::Keys(Keys {
            id: id.to_owned(),
            secret: secret.to_owned(),
        })
    };
    match store {
        Store::S3 { .. } | Store::Oss => {
            let id = filled(section, "access_key_id")?;
            match (id, filled(section, "access_key_secret")?) {
                (Some(id), Some(secret)) => Ok(keys(id, secret)),
                (None, None) => Ok(Login::Anonymous),
                (Some(_), None) => Err(missing(section, "access_key_secret")),
                (None, Some(_)) => Err(missing(section, "access_key_id")),
            }
        }
        Store::Azure { account } => {
            let key = filled(section, "account_key")?;
            match (key, filled(section, "sas_token")?) {
                (Some(key), _) => Ok(keys(account, key)),
                (None, Some(token)) => Ok(Login::SharedAccess(token.to_owned())),
                (None, None) => Ok(Login::Anonymous),
            }
        }
        Store::Gcs => {
            let file = filled(section, "credentials_file")?;
            Ok(file.map_or(Login::Anonymous, |file| Login::KeyFile(file.into())))
        }
    }
}

fn missing(section: &Section<'_>, key: &str) -> ConfigError {
    ConfigError::Missing {
        key: section.path_of(key),
    }
}
