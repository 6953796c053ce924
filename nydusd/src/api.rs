//! The control API: HTTP over a Unix socket, as existing clients speak it.
//!
//! [`socket`] makes the socket, [`server`] speaks HTTP, [`request`] turns method, path
//! and query into a [`request::Call`], and [`Api::answer`] here carries it out.
//! What clients see: `docs/api.md`.
//!
//! Calls block, and run side by side: a mount that takes long keeps no metrics waiting.

pub(crate) mod client;
mod error;
mod reports;
mod request;
mod server;
mod socket;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::Deserialize;
use serde_json::{Value, json};

use crate::config::Config;
use crate::logging::Logs;
use crate::manager::saved::Origin;
use crate::manager::{ManageError, Manager};
use crate::mounts::Source;
use crate::mounts::table::Mounts;
use crate::upgrade::{Exit, Life, Refusal};
use error::ApiError;
use request::Call;
pub(crate) use server::{Control, SILENT, SOCKET, Server};

/// What the calls act on.
#[derive(Debug)]
pub(crate) struct Api {
    /// The images.
    pub manager: Arc<Manager>,
    /// The mounts; none while the daemon waits to take over.
    pub mounts: Option<Arc<Mounts>>,
    /// The log.
    pub logs: Logs,
    /// Name of the daemon, if it was given one.
    pub id: Option<String>,
    /// Socket of its supervisor, if it has one.
    pub supervisor: Option<PathBuf>,
    /// How far it is.
    pub life: Life,
}

/// What a call has to say.
#[derive(Debug, PartialEq)]
enum Answer {
    Nothing,
    Json(Value),
    /// Metrics in Prometheus' text format.
    Text(String),
    /// Nothing, and then the daemon unmounts and ends.
    Exit,
    /// Nothing, and then the daemon ends.
    Leave,
    /// Nothing, and then a fresh worker goes on.
    PassOn,
}

/// Body of a mount.
#[derive(Debug, Deserialize)]
struct MountBody {
    #[serde(default = "rafs")]
    fs_type: String,
    source: PathBuf,
    config: String,
    #[serde(default)]
    prefetch_files: Option<Vec<PathBuf>>,
}

/// Body of a change to the daemon.
#[derive(Debug, Deserialize)]
struct DaemonBody {
    log_level: String,
}

fn rafs() -> String {
    "rafs".to_owned()
}

impl Api {
    fn answer(&self, call: &Call, body: &[u8]) -> Result<Answer, ApiError> {
        let table = self.manager.vfs().table();
        let json = |value| Ok(Answer::Json(value));
        match call {
            Call::Daemon { mounts } => json(reports::daemon(self, &table, *mounts)),
            Call::SetDaemon => {
                let body: DaemonBody = parse(body)?;
                match self.logs.set_level(&body.log_level) {
                    true => Ok(Answer::Nothing),
                    false => Err(ApiError::failed("Configure(ResponsePayloadType)")),
                }
            }
            Call::Events => json(self.logs.events()),
            Call::Superblock { mountpoint } => {
                let image = table.image_at(mountpoint);
                json(reports::superblock(image.ok_or_else(|| {
                    ApiError::not_found("DaemonInfo(NotFound)")
                })?))
            }
            Call::Start => {
                let started = self.life.start();
                started.map_err(|why| refused_step(why, "Configure", "Start"))?;
                Ok(Answer::PassOn)
            }
            Call::Takeover => {
                let taken = self.life.take_over();
                taken.map_err(|why| refused_step(why, "Upgrade", "Takeover"))?;
                Ok(Answer::Nothing)
            }
            Call::SendFd => {
                let sent = self.life.send();
                sent.map_err(|why| refused_step(why, "Upgrade", "Save"))?;
                Ok(Answer::Nothing)
            }
            Call::Exit { unmount: true } => Ok(Answer::Exit),
            Call::Exit { unmount: false } => Ok(match self.life.exit() {
                Exit::Leave => Answer::Leave,
                Exit::Unmount => Answer::Exit,
            }),
            Call::Mount { mountpoint } => self.mount(mountpoint, body, false),
            Call::Remount { mountpoint } => self.mount(mountpoint, body, true),
            Call::Umount { mountpoint } => {
                let done = match (self.life.waits(), self.below()) {
                    (Some(waiting), _) => waiting.unpost(mountpoint),
                    (None, Some(mounts)) => mounts.unmount_below(mountpoint),
                    (None, None) => self.manager.unmount(mountpoint),
                };
                done.map_err(refused)?;
                Ok(Answer::Nothing)
            }
            Call::Metrics { id } => json(reports::files(reports::by_path(&table, id, "Global")?)),
            Call::FileMetrics { id, latest } => {
                reports::by_path(&table, id, "Files")?;
                json(if *latest { json!([]) } else { json!({}) })
            }
            // Access patterns are not recorded.
            Call::Pattern => Err(ApiError::no_counter("Pattern")),
            Call::BackendMetrics { id } => {
                json(reports::backend(reports::by_path(&table, id, "Backend")?)?)
            }
            Call::CacheMetrics { id } => json(reports::cache(reports::by_id(&table, id)?)),
            Call::Inflight => {
                let waiting = reports::inflight(&self.manager.vfs().waits());
                Ok(waiting.map_or(Answer::Nothing, Answer::Json))
            }
            Call::Settings { scope } => json(json!(self.manager.settings(scope.as_deref()))),
            Call::SetSettings { .. } if self.life.waits().is_some() => {
                Err(ApiError::not_ready("Configure", "nothing is served yet"))
            }
            Call::SetSettings { scope } => {
                let settings: BTreeMap<String, String> = parse(body)?;
                self.manager
                    .set(scope, &settings)
                    .map_err(|err| ApiError::failed(format!("Configure({err:#})")))?;
                Ok(Answer::Nothing)
            }
            Call::Blobs => json(reports::blobs(&table)),
            Call::BindBlob => Err(ApiError::unsupported("CreateBlobObject")),
            Call::UnbindBlob => Err(ApiError::unsupported("DeleteBlobObject")),
            Call::Prometheus => Ok(Answer::Text(reports::prometheus(&table))),
            Call::Debug => json(reports::debug(self.manager.vfs(), &table)),
        }
    }

    /// The mounts, if images have one each below the daemon's directory.
    fn below(&self) -> Option<&Mounts> {
        let mounts = self.mounts.as_deref();
        mounts.filter(|mounts| mounts.directory().is_some())
    }

    fn mount(&self, mountpoint: &str, text: &[u8], replace: bool) -> Result<Answer, ApiError> {
        let body: MountBody = parse(text)?;
        let failed = |err: anyhow::Error| {
            ApiError::failed(format!("Mount(MountFilesystem({:?}))", format!("{err:#}")))
        };
        if body.fs_type != "rafs" {
            let known = ["passthrough", "passthroughfs", "passthrough_fs"];
            let text = if known.contains(&body.fs_type.as_str()) {
                "passing a directory through is not supported"
            } else {
                "InvalidFsType"
            };
            return Err(failed(anyhow::anyhow!("`{}`: {text}", body.fs_type)));
        }
        let source = described(body).map_err(failed)?;
        let origin = Origin::Api(text.to_vec());
        let done = if let Some(waiting) = self.life.waits() {
            waiting.post(mountpoint, &source, text, replace)
        } else if let Some(mounts) = self.below() {
            match replace {
                true => mounts.replace_below(mountpoint, &source, text),
                false => mounts.mount_below(mountpoint, &source, text),
            }
        } else if replace {
            self.manager.remount(mountpoint, &source, &origin)
        } else {
            self.manager.mount(mountpoint, &source, &origin)
        };
        done.map(|()| Answer::Nothing).map_err(refused)
    }
}

/// The configuration in the body of a mount, without secrets, as far as it can be read.
fn shown(body: &[u8]) -> Option<Value> {
    let body: MountBody = serde_json::from_slice(body).ok()?;
    Some(Config::parse(&body.config).ok()?.shown())
}

/// The image that the body of a mount describes: one that was mounted before.
///
/// # Errors
/// When it is none, or cannot be used any more.
pub(crate) fn source(body: &[u8]) -> anyhow::Result<Source> {
    described(serde_json::from_slice(body)?)
}

fn described(body: MountBody) -> anyhow::Result<Source> {
    let config = Config::parse(&body.config)?;
    for warning in &config.warnings {
        tracing::warn!("configuration of {}: {warning}", body.source.display());
    }
    for file in body.prefetch_files.iter().flatten() {
        anyhow::ensure!(
            Path::new(file).is_absolute(),
            "prefetch_files: `{}` is no absolute path",
            file.display()
        );
    }
    let mut source = Source::configured(body.source, &config)?;
    source.prefetch.files = body.prefetch_files.or(source.prefetch.files);
    Ok(source)
}

/// Whether a deposit of this name is of the control API.
pub(crate) fn is_control(name: &str) -> bool {
    name == SOCKET || name.starts_with(SILENT)
}

fn parse<T: serde::de::DeserializeOwned>(body: &[u8]) -> Result<T, ApiError> {
    serde_json::from_slice(body)
        .map_err(|err| ApiError::bad(format!("ParseBody(Error({:?}))", err.to_string())))
}

fn refused(err: ManageError) -> ApiError {
    match err {
        // Clients look for these very words.
        ManageError::Exists | ManageError::Absent => {
            ApiError::failed(format!("Mount(MountFilesystem(Other(\"{err}\")))"))
        }
        err => ApiError::failed(format!("Mount(MountFilesystem({:?}))", err.to_string())),
    }
}

fn refused_step(why: Refusal, call: &str, event: &str) -> ApiError {
    match why {
        Refusal::Unexpected => ApiError::bad(format!(
            "{call}(DaemonAbnormal(UnexpectedEvent(\"{event}\")))"
        )),
        Refusal::NotReady(words) => ApiError::not_ready(call, &words),
        Refusal::Failed(error) => {
            tracing::warn!("{event}: {error:#}");
            ApiError::failed(format!("{call}({:?})", format!("{error:#}")))
        }
    }
}

#[cfg(test)]
mod tests;
