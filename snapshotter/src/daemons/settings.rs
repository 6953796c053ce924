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
use storage::oci::{ImageRef, RegistryRef, credentials};

use super::process::Process;
use super::service::{SHARED, Service, label};
use super::template;
use crate::config::Config;
use crate::error::Error;
use crate::images::Image;
use crate::keychain::Keychain;
use crate::lifecycle::make_directory;
use crate::mirrors::Mirrors;
use crate::mounts::Layout;
use crate::prefetch::Lists;

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
    shared: bool,
    template: Map<String, Value>,
    mirrors: Mirrors,
    keychain: Arc<Keychain>,
    prefetch: Lists,
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
            shared: config.is_shared(),
            template: template::read(&config.daemon.nydusd_config)?,
            mirrors: Mirrors::open(&config.remote.mirrors_config.dir)?,
            keychain,
            prefetch: Lists::default(),
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

    pub(crate) fn layout(&self) -> &Layout {
        &self.layout
    }

    /// Whether one daemon serves all images.
    pub(crate) fn is_shared(&self) -> bool {
        self.shared
    }

    /// The control socket of the daemon of all images.
    pub(crate) fn control_socket(&self) -> PathBuf {
        self.root
            .join("socket")
            .join(label(SHARED))
            .join("api.sock")
    }

    pub(crate) fn config_dir(&self, id: u64) -> PathBuf {
        self.root.join("config").join(label(id))
    }

    pub(crate) fn log_file(&self, id: u64) -> PathBuf {
        self.root.join("logs").join(label(id)).join("nydusd.log")
    }

    /// Where the daemon of an image leaves its descriptors.
    pub(crate) fn holder_socket(&self, id: u64) -> PathBuf {
        self.root
            .join("supervisor")
            .join(format!("{}.sock", label(id)))
    }

    /// The command of a daemon, whose configuration file is written.
    ///
    /// * `held`: whether its descriptors outlive it;
    /// * `program`: what it is to run.
    pub(crate) fn command(
        &self,
        service: &Service,
        held: bool,
        program: &Path,
    ) -> Result<Command, Error> {
        let mut command = Command::new(program);
        // Not what this process may have been given for itself.
        command.env_remove(AUTH_VARIABLE);
        let directory = self.config_dir(service.id);
        make_directory(&directory, 0o700)?;
        let config = match &service.image {
            Some(image) => {
                let place = place_of(image)?;
                command.arg("--bootstrap").arg(&image.bootstrap);
                if let Some(word) = self.password(image, &place)? {
                    command.env(AUTH_VARIABLE, word);
                }
                if let Some(list) = self.prefetch.take(&image.reference) {
                    let file = directory.join("prefetch");
                    write(&file, &list.join("\n"))?;
                    command.arg("--prefetch-files").arg(file);
                }
                self.config(image.id, &place, held)
            }
            None => {
                let socket = self.control_socket();
                make_directory(socket.parent().unwrap_or(&self.root), 0o700)?;
                command.arg("--apisock").arg(socket);
                self.shared_config(held)
            }
        };
        let file = directory.join("config.json");
        write(&file, &config.to_string())?;
        command.arg("--config").arg(&file);
        command.arg("--mountpoint").arg(&service.mountpoint);
        command.arg("--log-level").arg(&self.log_level);
        if self.threads > 0 {
            command.arg("--thread-num").arg(self.threads.to_string());
        }
        Ok(command)
    }

    /// What the daemon of all images is asked to serve one with, and the credentials in it.
    pub(crate) fn request(&self, image: &Image) -> Result<(Value, Option<String>), Error> {
        let (config, auth) = self.whole_config(image)?;
        let request = json!({
            "fs_type": "rafs",
            "source": image.bootstrap,
            "config": config.to_string(),
            "prefetch_files": self.prefetch.take(&image.reference),
        });
        Ok((request, auth))
    }

    /// Where the data of an image come from, with credentials.
    pub(crate) fn backend(&self, image: &Image) -> Result<Value, Error> {
        let (mut config, _) = self.whole_config(image)?;
        Ok(config["device"]["backend"].take())
    }

    /// What is to be fetched first of images that are mounted next.
    pub(crate) fn prefetch(&self) -> &Lists {
        &self.prefetch
    }

    /// The configuration for one image, with the credentials that were found, if any.
    fn whole_config(&self, image: &Image) -> Result<(Value, Option<String>), Error> {
        let place = place_of(image)?;
        let auth = self.password(image, &place)?;
        let mut config = self.config(image.id, &place, true);
        let backend = &mut config["device"]["backend"];
        if let (Some(auth), true) = (&auth, backend["type"] == json!("registry")) {
            backend["config"]["auth"] = json!(auth);
        }
        Ok((config, auth))
    }

    /// The credentials that somebody has given for this image, if any: not those that are
    /// the same for everybody.
    pub(crate) fn given(&self, image: &Image) -> Option<String> {
        let place = place_of(image).ok()?;
        let account = image.account.clone();
        let account = account.or_else(|| self.keychain.account(&place))?;
        Some(encode(&account.username, &account.password))
    }

    /// Without a third holder the kernel would make zeros of what is missing when all of a
    /// daemon dies; nydusd's own default fails then.
    fn driver(&self, held: bool) -> Value {
        match self.template.get("driver") {
            Some(driver) if !driver.is_null() => driver.clone(),
            _ if held => json!("auto"),
            _ => json!("fuse"),
        }
    }

    /// Of the daemon of all images: each comes with a configuration of its own.
    fn shared_config(&self, held: bool) -> Value {
        json!({
            "device": {
                "id": label(SHARED),
                "backend": {"type": "localfs", "config": {"dir": self.cache}},
                "cache": {"type": "blobcache", "config": {"work_dir": self.cache}},
            },
            "mode": "direct",
            "driver": self.driver(held),
        })
    }

    fn config(&self, id: u64, place: &RegistryRef, held: bool) -> Value {
        let mut config = Value::Object(self.template.clone());
        config["driver"] = self.driver(held);
        let device = &mut config["device"];
        device["id"] = json!(format!("/{id}"));
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

    /// Base64 of the name and the password, or token, to fetch an image with.
    fn password(&self, image: &Image, place: &RegistryRef) -> Result<Option<String>, Error> {
        if let Some(given) = self.given(image) {
            return Ok(Some(given));
        }
        let found = self.runtime.block_on(credentials::lookup(&place.host));
        let found = found.map_err(|error| Error::Mount {
            image: image.reference.clone(),
            reason: error.to_string(),
        })?;
        Ok(match found.pair() {
            Some((username, password)) => Some(encode(username, password)),
            None => self.found().get(&image.id).cloned(),
        })
    }
}

fn encode(username: &str, password: &str) -> String {
    base64::engine::general_purpose::STANDARD.encode(format!("{username}:{password}"))
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
