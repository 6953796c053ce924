//! A real S3-compatible server: `s3s-fs`, which keeps buckets in a directory and
//! verifies signatures.

use std::fs;
use std::net::TcpStream;
use std::path::PathBuf;
use std::process::Command;

use anyhow::Result;
use tempfile::TempDir;

use crate::process::Process;
use crate::registry::free_port;

/// Who may use it.
pub const ACCESS_KEY: &str = "AKTEST";
/// And with what word.
pub const SECRET_KEY: &str = "t0p/secret+key";
/// The one bucket.
pub const BUCKET: &str = "blobs-of-a-test";

/// A running server.
#[derive(Debug)]
pub struct ObjectStore {
    process: Process,
    host: String,
    // Dropped after the process that serves it.
    scratch: TempDir,
}

impl ObjectStore {
    /// Starts it on a free loopback port with an empty bucket.
    ///
    /// # Errors
    /// It is not installed, or does not start.
    pub fn start() -> Result<Self> {
        let scratch = tempfile::tempdir()?;
        let root = scratch.path().join("root");
        fs::create_dir_all(root.join(BUCKET))?;
        let mut attempts = 0;
        loop {
            let port = free_port()?;
            let host = format!("127.0.0.1:{port}");
            let mut command = Command::new(program());
            command.args(["--host", "127.0.0.1", "--port", &port.to_string()]);
            command.args(["--access-key", ACCESS_KEY, "--secret-key", SECRET_KEY]);
            let log = scratch.path().join("log");
            let mut process = Process::start(command.arg(&root), &log)?;
            match process.wait_until(|_| TcpStream::connect(&host).is_ok()) {
                Ok(()) => {
                    return Ok(Self {
                        process,
                        host,
                        scratch,
                    });
                }
                Err(error) if attempts == 3 => return Err(error),
                Err(_) => attempts += 1,
            }
        }
    }

    /// `127.0.0.1:port`.
    #[must_use]
    pub fn host(&self) -> &str {
        &self.host
    }

    /// Everything that the server logged.
    #[must_use]
    pub fn log(&self) -> String {
        self.process.log()
    }

    /// Puts an object into the bucket.
    ///
    /// # Errors
    /// The disk is full.
    pub fn put(&self, key: &str, bytes: &[u8]) -> Result<()> {
        let file = self.scratch.path().join("root").join(BUCKET).join(key);
        if let Some(directory) = file.parent() {
            fs::create_dir_all(directory)?;
        }
        Ok(fs::write(file, bytes)?)
    }
}

/// Where `misc/install.sh` puts it, unless it is in the path.
fn program() -> PathBuf {
    let home = std::env::var_os("HOME").unwrap_or_default();
    let installed = PathBuf::from(home).join(".cargo/bin/s3s-fs");
    if installed.exists() {
        installed
    } else {
        "s3s-fs".into()
    }
}
