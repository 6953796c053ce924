//! `config.toml`: the keys that deployments of nydus-snapshotter use, checked at
//! the start.
//!
//! Unknown keys are reported and ignored. A key whose feature does not exist here
//! is an error if it asks for the feature, so that nobody believes in something
//! that does not happen.

use std::fs;
use std::io::Read as _;
use std::path::{Path, PathBuf};

use serde::Deserialize;

use crate::error::Error;

/// Where deployments keep it.
pub const DEFAULT_PATH: &str = "/etc/nydus/config.toml";
/// Bytes of the longest file; real ones have a few thousand.
const MAX_SIZE: u64 = 1 << 20;
/// Longest root: the kernel limits paths of sockets to 108 bytes.
const MAX_ROOT: usize = 70;

/// The whole configuration.
#[derive(Clone, Debug, Deserialize)]
#[serde(default)]
pub struct Config {
    /// Version of this file, 1.
    pub version: u32,
    /// Directory for everything that is kept.
    pub root: PathBuf,
    /// Socket for containerd.
    pub address: PathBuf,
    /// Daemons: `shared`, one for all images; `multiple` or `dedicated`, one per image.
    pub daemon_mode: String,
    /// Section `daemon`.
    pub daemon: Daemon,
    /// Section `log`.
    pub log: Log,
    /// Section `metrics`.
    pub metrics: Metrics,
    /// Section `system`.
    pub system: System,
    /// Section `snapshot`.
    pub snapshot: Snapshot,
    /// Section `cache_manager`.
    pub cache_manager: CacheManager,
    /// Section `remote`.
    pub remote: Remote,
}

/// How images are mounted.
#[derive(Clone, Debug, Deserialize)]
#[serde(default)]
pub struct Daemon {
    /// The program.
    pub nydusd_path: PathBuf,
    /// Template of its configuration; default settings if there is no such file.
    pub nydusd_config: PathBuf,
    /// Only `fusedev`.
    pub fs_driver: String,
    /// Only `restart`.
    pub recover_policy: String,
    /// Threads that answer requests; 0 for nydusd's own choice.
    pub threads_number: u32,
}

/// What is logged.
#[derive(Clone, Debug, Deserialize)]
#[serde(default)]
pub struct Log {
    /// Least severe messages: `trace`, `debug`, `info`, `warn` or `error`.
    pub level: String,
}

/// Prometheus.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct Metrics {
    /// TCP address to serve `/v1/metrics` at; empty for none.
    pub address: String,
}

/// The API for people and their tools.
#[derive(Clone, Debug, Deserialize)]
#[serde(default)]
pub struct System {
    /// Whether there is one.
    pub enable: bool,
    /// Its socket.
    pub address: PathBuf,
}

/// Snapshots.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct Snapshot {
    /// Remove directories at once rather than when containerd cleans up.
    pub sync_remove: bool,
    /// Give containers upper directories that need not survive a crash.
    pub enable_overlayfs_volatile: bool,
}

/// Registries.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct Remote {
    /// Section `remote.auth`.
    pub auth: Auth,
    /// Section `remote.mirrors_config`.
    pub mirrors_config: MirrorsConfig,
}

/// Mirrors of registries.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct MirrorsConfig {
    /// Directory with a `hosts.toml` for each registry; empty for no mirrors.
    pub dir: PathBuf,
}

/// Where accounts come from, beside labels and docker's configuration.
#[derive(Clone, Debug, Deserialize)]
#[serde(default)]
pub struct Auth {
    /// Whether this is kubelet's image service, and remembers what it pulls with.
    pub enable_cri_keychain: bool,
    /// The socket of the real one, containerd's.
    pub image_service_address: PathBuf,
}

/// The cache of fetched data.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct CacheManager {
    /// Never remove anything from it.
    pub disable: bool,
    /// Its directory; `cache` below the root if empty.
    pub cache_dir: PathBuf,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            version: 1,
            root: "/var/lib/containerd/io.containerd.snapshotter.v1.nydus".into(),
            address: "/run/containerd-nydus/containerd-nydus-grpc.sock".into(),
            daemon_mode: "shared".to_owned(),
            daemon: Daemon::default(),
            log: Log::default(),
            metrics: Metrics::default(),
            system: System::default(),
            snapshot: Snapshot::default(),
            cache_manager: CacheManager::default(),
            remote: Remote::default(),
        }
    }
}

impl Default for Daemon {
    fn default() -> Self {
        Self {
            nydusd_path: "nydusd".into(),
            nydusd_config: "/etc/nydus/nydusd-config.json".into(),
            fs_driver: "fusedev".to_owned(),
            recover_policy: "restart".to_owned(),
            threads_number: 0,
        }
    }
}

impl Default for Auth {
    fn default() -> Self {
        Self {
            enable_cri_keychain: false,
            image_service_address: "/run/containerd/containerd.sock".into(),
        }
    }
}

impl Default for Log {
    fn default() -> Self {
        Self {
            level: "info".to_owned(),
        }
    }
}

impl Default for System {
    fn default() -> Self {
        Self {
            enable: false,
            address: "/run/containerd-nydus/system.sock".into(),
        }
    }
}

impl Config {
    /// Reads and checks a file; returns also what is odd about it.
    ///
    /// # Errors
    /// [`Error::Invalid`] that names the key, or the file cannot be read.
    pub fn load(path: &Path) -> Result<(Self, Vec<String>), Error> {
        let mut text = String::new();
        fs::File::open(path)
            .and_then(|file| file.take(MAX_SIZE).read_to_string(&mut text))
            .map_err(Error::io(path, "cannot read"))?;
        Self::parse(&text).map_err(|error| Error::Invalid(format!("{}: {error}", path.display())))
    }

    /// Checks the text of a file; returns also what is odd about it.
    ///
    /// # Errors
    /// [`Error::Invalid`] that names the key.
    pub fn parse(text: &str) -> Result<(Self, Vec<String>), Error> {
        let invalid = |error: toml::de::Error| Error::Invalid(error.to_string());
        let table: toml::Table = toml::from_str(text).map_err(invalid)?;
        let config: Self = toml::from_str(text).map_err(invalid)?;
        let mut warnings = Vec::new();
        walk(&table, &mut String::new(), &mut |key, value| {
            check_key(key, value, &mut warnings)
        })?;
        config.check()?;
        Ok((config, warnings))
    }

    /// Checks values that belong together; also after options have changed some.
    ///
    /// # Errors
    /// [`Error::Invalid`] that names the key.
    pub fn check(&self) -> Result<(), Error> {
        let wrong = |key: &str, allowed: &str| {
            Err(Error::Invalid(format!("`{key}`: allowed is {allowed}")))
        };
        if self.version != 1 {
            return wrong("version", "1");
        }
        if !self.root.is_absolute() || self.root.as_os_str().len() > MAX_ROOT {
            return wrong("root", "an absolute path of at most 70 bytes");
        }
        if self.root.to_string_lossy().contains([':', ',', ' ', '\\']) {
            return wrong(
                "root",
                "a path without `:`, `,`, `\\` and spaces, which mount options cannot hold",
            );
        }
        if !self.address.is_absolute() {
            return wrong("address", "an absolute path");
        }
        if !self.remote.auth.image_service_address.is_absolute() {
            return wrong("remote.auth.image_service_address", "an absolute path");
        }
        let mirrors = &self.remote.mirrors_config.dir;
        if !mirrors.as_os_str().is_empty() && !mirrors.is_absolute() {
            return wrong("remote.mirrors_config.dir", "an absolute path");
        }
        match self.daemon_mode.as_str() {
            "shared" | "multiple" | "dedicated" | "" => {}
            "none" => return Err(missing("daemon_mode", "mounting without a daemon")),
            _ => return wrong("daemon_mode", "\"shared\", \"multiple\" or \"dedicated\""),
        }
        match self.daemon.fs_driver.as_str() {
            "fusedev" | "" => {}
            "fscache" | "blockdev" | "nodev" | "proxy" => {
                return Err(missing("daemon.fs_driver", "any driver but \"fusedev\""));
            }
            _ => return wrong("daemon.fs_driver", "\"fusedev\""),
        }
        match self.daemon.recover_policy.as_str() {
            "restart" | "failover" | "" => {}
            "none" => {
                return Err(missing(
                    "daemon.recover_policy",
                    "leaving dead daemons dead",
                ));
            }
            _ => return wrong("daemon.recover_policy", "\"restart\" or \"failover\""),
        }
        if self.daemon.threads_number > 1024 {
            return wrong("daemon.threads_number", "0 to 1024");
        }
        match self.log.level.as_str() {
            "trace" | "debug" | "info" | "warn" | "error" => Ok(()),
            _ => wrong("log.level", "trace, debug, info, warn or error"),
        }
    }

    /// Whether one daemon serves all images.
    #[must_use]
    pub fn is_shared(&self) -> bool {
        matches!(self.daemon_mode.as_str(), "shared" | "")
    }

    /// Directory of fetched data.
    #[must_use]
    pub fn cache_dir(&self) -> PathBuf {
        if self.cache_manager.cache_dir.as_os_str().is_empty() {
            return self.root.join("cache");
        }
        self.cache_manager.cache_dir.clone()
    }
}

fn missing(key: &str, feature: &str) -> Error {
    Error::Invalid(format!("`{key}`: {feature} is not supported yet"))
}

/// Keys that mean something.
const KNOWN: [&str; 20] = [
    "version",
    "root",
    "address",
    "daemon_mode",
    "daemon.nydusd_path",
    "daemon.nydusd_config",
    "daemon.fs_driver",
    "daemon.recover_policy",
    "daemon.threads_number",
    "log.level",
    "metrics.address",
    "system.enable",
    "system.address",
    "snapshot.sync_remove",
    "snapshot.enable_overlayfs_volatile",
    "cache_manager.disable",
    "cache_manager.cache_dir",
    "remote.mirrors_config.dir",
    "remote.auth.enable_cri_keychain",
    "remote.auth.image_service_address",
];

/// Keys that deployments set and that change nothing here: what they control does
/// not exist, or happens anyway.
const WITHOUT_EFFECT: [&str; 21] = [
    "uid",
    "gid",
    "cleanup_on_close",
    "system.uid",
    "system.gid",
    "system.debug.daemon_cpu_profile_duration_secs",
    "system.debug.pprof_address",
    "daemon.nydusimage_path",
    "daemon.log_rotation_size",
    "daemon.failover_policy",
    "cgroup.memory_limit",
    "log.log_to_stdout",
    "log.dir",
    "log.log_rotation_max_size",
    "log.log_rotation_max_backups",
    "log.log_rotation_max_age",
    "log.log_rotation_local_time",
    "log.log_rotation_compress",
    "metrics.hung_io_interval",
    "metrics.collect_interval",
    "cache_manager.gc_period",
];

/// Keys whose features do not exist: an error if they ask for them.
const MISSING: [&str; 20] = [
    "cgroup.enable",
    "remote.convert_vpc_registry",
    "remote.skip_ssl_verify",
    "remote.auth.enable_kubeconfig_keychain",
    "remote.auth.kubeconfig_path",
    "remote.auth.enable_kubelet_credential_providers",
    "remote.auth.credential_provider_config",
    "remote.auth.credential_provider_bin_dir",
    "snapshot.enable_nydus_overlayfs",
    "snapshot.nydus_overlayfs_path",
    "snapshot.enable_kata_volume",
    "image.public_key_file",
    "image.validate_signature",
    "experimental.enable_stargz",
    "experimental.enable_referrer_detect",
    "experimental.enable_index_detect",
    "experimental.enable_backend_source",
    "experimental.tarfs.enable_tarfs",
    "experimental.tarfs.mount_tarfs_on_host",
    "experimental.tarfs.tarfs_hint",
];

fn check_key(key: &str, value: &toml::Value, warnings: &mut Vec<String>) -> Result<(), Error> {
    let asks = match value {
        toml::Value::Boolean(value) => *value,
        toml::Value::String(text) => !text.is_empty(),
        toml::Value::Integer(number) => *number != 0,
        _ => true,
    };
    if KNOWN.contains(&key) {
    } else if MISSING.contains(&key) {
        if asks {
            return Err(missing(key, "what it asks for"));
        }
    } else if WITHOUT_EFFECT.contains(&key) {
        if asks {
            warnings.push(format!("`{key}` has no effect"));
        }
    } else {
        warnings.push(format!("`{key}` is unknown and ignored"));
    }
    Ok(())
}

/// Calls `visit` with every key that is no table, sections before a dot.
fn walk(
    table: &toml::Table,
    prefix: &mut String,
    visit: &mut impl FnMut(&str, &toml::Value) -> Result<(), Error>,
) -> Result<(), Error> {
    for (key, value) in table {
        let length = prefix.len();
        prefix.push_str(key);
        match value {
            toml::Value::Table(table) => {
                prefix.push('.');
                walk(table, prefix, visit)?;
            }
            value => visit(prefix, value)?,
        }
        prefix.truncate(length);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_is_needed() {
        let (config, warnings) = Config::parse("").unwrap();
        assert!(warnings.is_empty());
        assert!(config.is_shared());
        assert_eq!(config.cache_dir(), config.root.join("cache"));
    }

    #[test]
    fn what_deployments_write() {
        let text = r#"
            version = 1
            root = "/var/lib/nydus"
            daemon_mode = "dedicated"
            [daemon]
            fs_driver = "fusedev"
            recover_policy = "failover"
            threads_number = 4
            log_rotation_size = 100
            [remote.auth]
            enable_cri_keychain = true
            [cache_manager]
            gc_period = "24h"
            [future]
            key = 1
        "#;
        let (config, warnings) = Config::parse(text).unwrap();
        assert_eq!(config.daemon.threads_number, 4);
        assert!(!config.is_shared());
        let warnings = warnings.join("; ");
        assert!(warnings.contains("future.key"), "{warnings}");
        assert!(warnings.contains("cache_manager.gc_period"), "{warnings}");
        assert!(!warnings.contains("threads_number"), "{warnings}");
    }

    #[test]
    fn errors_name_the_key() {
        for (text, key) in [
            ("version = 2", "version"),
            ("root = 'relative'", "root"),
            ("root = '/with:colon'", "root"),
            ("daemon_mode = 'none'", "daemon_mode"),
            ("daemon_mode = 'many'", "daemon_mode"),
            ("[daemon]\nfs_driver = 'fscache'", "daemon.fs_driver"),
            ("[daemon]\nthreads_number = 2000", "threads_number"),
            ("[daemon]\nthreads_number = 'x'", "threads_number"),
            ("[log]\nlevel = 'loud'", "log.level"),
            (
                "[experimental]\nenable_stargz = true",
                "experimental.enable_stargz",
            ),
            ("[image]\npublic_key_file = '/k'", "image.public_key_file"),
            (
                "[remote.mirrors_config]\ndir = 'certs.d'",
                "remote.mirrors_config.dir",
            ),
            ("not toml", "toml"),
        ] {
            let error = Config::parse(text).unwrap_err().to_string();
            assert!(
                error.to_lowercase().contains(key) || text == "not toml",
                "{text}: {error}"
            );
        }
    }
}
