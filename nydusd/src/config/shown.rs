//! A configuration as the control API shows it: version 2, without secrets.

use serde_json::{Value, json};
use storage::backend::http_proxy::Address;
use storage::backend::object::Store;

use super::{Backend, Config};

impl Backend {
    /// The kind, as configurations name it.
    pub(crate) fn kind(&self) -> &'static str {
        match self {
            Self::LocalFs(_) | Self::BlobFile(_) => "localfs",
            Self::LocalDisk { .. } => "localdisk",
            Self::Registry(_) => "registry",
            Self::HttpProxy(_) => "http-proxy",
            Self::Object(bucket) => match bucket.store {
                Store::S3 { .. } => "s3",
                Store::Oss => "oss",
                Store::Azure { .. } => "azure",
                Store::Gcs => "gcs",
            },
        }
    }

    fn shown(&self) -> Value {
        match self {
            Self::LocalFs(dirs) => {
                let mut dirs = dirs.iter().map(|dir| dir.display().to_string());
                json!({ "dir": dirs.next(), "alt_dirs": dirs.collect::<Vec<_>>() })
            }
            Self::BlobFile(file) => json!({ "blob_file": file.display().to_string() }),
            Self::LocalDisk { path, with_table } => json!({
                "device_path": path.display().to_string(),
                "disable_gpt": !with_table,
            }),
            // An address may contain a password; what can be one is not shown.
            Self::HttpProxy(server) => match &server.address {
                Address::Socket(path) => json!({ "addr": path.display().to_string() }),
                Address::Url(_) => json!({ "addr": null }),
            },
            Self::Object(bucket) => json!({
                "bucket_name": bucket.bucket,
                "endpoint": bucket.endpoint,
                "object_prefix": bucket.prefix,
            }),
            Self::Registry(registry) => json!({
                "host": registry.host,
                "repo": registry.repo,
                "scheme": if registry.plain_http { "http" } else { "https" },
                "auth": null,
                "registry_token": null,
                "skip_verify": registry.skip_verify,
            }),
        }
    }
}

impl Config {
    /// The configuration in version 2, without secrets.
    pub(crate) fn shown(&self) -> Value {
        let kind = self.backend.kind();
        json!({
            "version": 2,
            "id": self.id,
            "backend": { "type": kind, kind: self.backend.shown() },
            "cache": {
                "type": "filecache",
                "filecache": { "work_dir": self.cache.dir.display().to_string() },
                "prefetch": self.prefetch.map(|prefetch| json!({
                    "enable": true,
                    "threads": prefetch.threads,
                    "batch_size": prefetch.batch_size,
                    "bandwidth_limit": prefetch.bandwidth,
                    "prefetch_all": prefetch.all,
                })),
            },
            "rafs": { "mode": "direct" },
        })
    }
}
