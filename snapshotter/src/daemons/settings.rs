//! What a daemon is told: command line, configuration file, environment.
//!
//! The configuration is a template, version 1 of nydusd's own format, completed
//! with the place of the image. Credentials go into the environment, which only
//! root can read; a template that contains some is used without them.

use std::collections::BTreeMap;
use std::fs::{self, OpenOptions};
use std::io::Write as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use base64::Engine as _;
use serde_json::{Map, Value, json};
use storage::oci::{Credentials, ImageRef, RegistryRef, credentials};

use super::process::Process;
use crate::config::Config;
use crate::error::Error;
use crate::images::Image;
use crate::keychain::Keychain;
use crate::lifecycle::make_directory;
use crate::mirrors::Mirrors;
use crate::mounts::Layout;

/// Variable from which nydusd takes credentials: base64 of `user:password`.
const AUTH_VARIABLE: &str = "IMAGE_PULL_AUTH";

/// What all daemons have in common.
pub struct Settings {
    /// Changes when all daemons are replaced.
    program: Mutex<PathBuf>,
    root: PathBuf,
    layout: Layout,
    cache: PathBuf,
    log_level: String,
    threads: u32,
    template: Map<String, Value>,
    mirrors: Mirrors,
    keychain: Arc<Keychain>,
    /// What daemons had that were found again, by image.
    found: Mutex<BTreeMap<u64, String>>,
    runtime: tokio::runtime::Handle,
}

impl std::fmt::Debug for Settings {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // Without credentials.
        f.debug_struct("Settings")
            .field("program", &self.program)
            .field("root", &self.root)
            .finish_non_exhaustive()
    }
}

impl Settings {
    /// Takes what concerns daemons from the configuration; `runtime` is where
    /// credentials are looked up, after the `keychain`.
    ///
    /// # Errors
    /// The template cannot be read or is no template.
    pub fn new(
        config: &Config,
        keychain: Arc<Keychain>,
        runtime: tokio::runtime::Handle,
    ) -> Result<Self, Error> {
        Ok(Self {
            program: Mutex::new(config.daemon.nydusd_path.clone()),
            root: config.root.clone(),
            layout: Layout::new(&config.root),
            cache: config.cache_dir(),
            log_level: config.log.level.clone(),
            threads: config.daemon.threads_number,
            template: template(&config.daemon.nydusd_config)?,
            mirrors: Mirrors::open(&config.remote.mirrors_config.dir)?,
            keychain,
            found: Mutex::default(),
            runtime,
        })
    }

    /// Keeps the credentials of a daemon that an earlier life of this program has
    /// started: the next one of this image may find no others.
    pub(crate) fn learn(&self, id: u64, daemon: &Process) {
        if let Some(word) = daemon.variable(AUTH_VARIABLE) {
            self.found().insert(id, word);
        }
    }

    /// Nobody uses this image any more.
    pub(crate) fn forget(&self, id: u64) {
        self.found().remove(&id);
    }

    fn found(&self) -> MutexGuard<'_, BTreeMap<u64, String>> {
        self.found.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What new daemons run.
    pub(crate) fn program(&self) -> PathBuf {
        self.lock_program().clone()
    }

    /// Has new daemons run another program; returns the one before.
    pub(crate) fn set_program(&self, program: &Path) -> PathBuf {
        std::mem::replace(&mut self.lock_program(), program.to_owned())
    }

    fn lock_program(&self) -> MutexGuard<'_, PathBuf> {
        self.program.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn mountpoint(&self, id: u64) -> PathBuf {
        self.layout.mountpoint(id)
    }

    pub(crate) fn config_dir(&self, id: u64) -> PathBuf {
        self.root.join("config").join(id.to_string())
    }

    pub(crate) fn log_file(&self, id: u64) -> PathBuf {
        self.root
            .join("logs")
            .join(id.to_string())
            .join("nydusd.log")
    }

    /// Where the daemon of an image leaves its descriptors.
    pub(crate) fn holder_socket(&self, id: u64) -> PathBuf {
        self.root.join("supervisor").join(format!("{id}.sock"))
    }

    /// The command that serves `image`, whose configuration file is written.
    ///
    /// * `held`: whether its descriptors outlive it;
    /// * `program`: what it is to run.
    pub(crate) fn command(
        &self,
        image: &Image,
        held: bool,
        program: &Path,
    ) -> Result<Command, Error> {
        let place = place_of(image)?;
        let directory = self.config_dir(image.id);
        make_directory(&directory, 0o700)?;
        let file = directory.join("config.json");
        write(&file, &self.config(image, &place, held).to_string())?;
        let mut command = Command::new(program);
        command.arg("--config").arg(&file);
        command.arg("--bootstrap").arg(&image.bootstrap);
        command.arg("--mountpoint").arg(&image.mountpoint);
        command.arg("--log-level").arg(&self.log_level);
        if self.threads > 0 {
            command.arg("--thread-num").arg(self.threads.to_string());
        }
        // Not what this process may have been given for itself.
        command.env_remove(AUTH_VARIABLE);
        if let Some(word) = self.password(image, &place)? {
            command.env(AUTH_VARIABLE, word);
        }
        Ok(command)
    }

    fn config(&self, image: &Image, place: &RegistryRef, held: bool) -> Value {
        let mut config = Value::Object(self.template.clone());
        if held && config["driver"].is_null() {
            // Without a third holder the kernel would make zeros of what is missing when
            // all of a daemon dies; nydusd's own default fails then.
            config["driver"] = json!("auto");
        }
        let device = &mut config["device"];
        device["id"] = json!(format!("/{}", image.id));
        device["cache"]["type"] = json!("blobcache");
        device["cache"]["config"]["work_dir"] = json!(self.cache);
        if device["backend"]["type"] == json!("registry") {
            let backend = &mut device["backend"]["config"];
            // The well-known name of this registry is not the name of its host.
            let hub = place.host == "docker.io";
            backend["host"] = json!(if hub {
                "registry-1.docker.io"
            } else {
                &place.host
            });
            backend["repo"] = json!(place.repository);
            if place.is_loopback() {
                backend["scheme"] = json!("http");
            }
            self.mirrors.add_to(backend, place);
        }
        config
    }

    /// What the environment variable for credentials should hold.
    fn password(&self, image: &Image, place: &RegistryRef) -> Result<Option<String>, Error> {
        let encode = |user: &str, password: &str| {
            base64::engine::general_purpose::STANDARD.encode(format!("{user}:{password}"))
        };
        let account = image.account.clone();
        if let Some(account) = account.or_else(|| self.keychain.account(place)) {
            return Ok(Some(encode(&account.username, &account.password)));
        }
        let failed = |reason: String| Error::Mount {
            image: image.reference.clone(),
            reason,
        };
        match self.runtime.block_on(credentials::lookup(&place.host)) {
            Ok(Credentials::Anonymous) => Ok(self.found().get(&image.id).cloned()),
            Ok(Credentials::Basic { username, password }) => Ok(Some(encode(&username, &password))),
            Ok(_) => Err(failed(format!(
                "the credentials for {} are a token, which is not supported yet; use a user name \
                 and a password",
                place.host
            ))),
            Err(error) => Err(failed(error.to_string())),
        }
    }
}

fn place_of(image: &Image) -> Result<RegistryRef, Error> {
    match image.reference.parse() {
        Ok(ImageRef::Registry(place)) => Ok(place),
        Ok(ImageRef::Layout(_)) => Err(Error::Mount {
            image: image.reference.clone(),
            reason: "it is in no registry".to_owned(),
        }),
        Err(error) => Err(Error::Mount {
            image: image.reference.clone(),
            reason: error.to_string(),
        }),
    }
}

/// The template in `path`; a registry's if there is no such file.
fn template(path: &Path) -> Result<Map<String, Value>, Error> {
    let text = match fs::read_to_string(path) {
        Ok(text) => text,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            tracing::info!("no {}: daemons get default settings", path.display());
            DEFAULT_TEMPLATE.to_owned()
        }
        Err(error) => return Err(Error::io(path, "cannot read")(error)),
    };
    let invalid = |reason: &str| Error::Invalid(format!("{}: {reason}", path.display()));
    // Not the parser's own words: they may quote a secret.
    let Ok(Value::Object(mut template)) = serde_json::from_str(&text) else {
        return Err(invalid("is no JSON object"));
    };
    let backend = template
        .get_mut("device")
        .and_then(|device| device.get_mut("backend"))
        .and_then(Value::as_object_mut)
        .ok_or_else(|| invalid("`device.backend` is missing"))?;
    let kind = backend.get("type").cloned();
    if !matches!(
        kind.as_ref().and_then(Value::as_str),
        Some("registry" | "localfs")
    ) {
        return Err(invalid(
            "`device.backend.type` must be \"registry\" or \"localfs\"",
        ));
    }
    let config = backend
        .entry("config")
        .or_insert_with(|| json!({}))
        .as_object_mut()
        .ok_or_else(|| invalid("`device.backend.config` is no object"))?;
    for secret in ["auth", "registry_token"] {
        if config
            .remove(secret)
            .is_some_and(|value| value.as_str() != Some(""))
        {
            tracing::warn!(
                "{}: `device.backend.config.{secret}` is not used; credentials come from docker's configuration",
                path.display()
            );
        }
    }
    let cache = &mut template["device"]["cache"];
    if !cache.is_object() {
        *cache = json!({});
    }
    if !cache["config"].is_object() {
        cache["config"] = json!({});
    }
    Ok(template)
}

/// Used if there is no template.
const DEFAULT_TEMPLATE: &str = r#"{
    "device": {
        "backend": {"type": "registry", "config": {"timeout": 5, "connect_timeout": 5, "retry_limit": 4}},
        "cache": {"type": "blobcache", "config": {}}
    },
    "mode": "direct",
    "digest_validate": false,
    "enable_xattr": true
}"#;

/// Replaces a file as a whole; only root can read it.
fn write(path: &Path, text: &str) -> Result<(), Error> {
    let partial = path.with_extension("new");
    let mut file = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(&partial)
        .map_err(Error::io(&partial, "cannot create"))?;
    file.write_all(text.as_bytes())
        .map_err(Error::io(&partial, "cannot write"))?;
    fs::rename(&partial, path).map_err(Error::io(path, "cannot replace"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn templates_are_checked_and_lose_their_secrets() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("template.json");
        assert!(template(&path).is_ok());
        let table = [
            ("nonsense", "no JSON"),
            ("{}", "device.backend"),
            (
                r#"{"device":{"backend":{"type":"oss","config":{}}}}"#,
                "type",
            ),
        ];
        for (text, wanted) in table {
            fs::write(&path, text).unwrap();
            let error = template(&path).unwrap_err().to_string();
            assert!(error.contains(wanted), "{text}: {error}");
        }
        fs::write(
            &path,
            r#"{"device":{"backend":{"type":"registry","config":{"auth":"c2VjcmV0"}}}}"#,
        )
        .unwrap();
        let template = template(&path).unwrap();
        assert!(!Value::Object(template).to_string().contains("c2VjcmV0"));
    }
}
