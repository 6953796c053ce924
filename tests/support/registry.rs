//! A real registry: Debian's `docker-registry`, on loopback or on a machine of a test's
//! network, with its storage in a temporary directory, open to all, asking for
//! credentials, or fetching from another registry what it does not have.

use std::fs;
use std::net::{Ipv4Addr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use anyhow::{Context as _, Result, bail};
use base64::Engine as _;
use nix::sys::signal::Signal;
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::command::succeed;
use crate::netns::Machine;
use crate::process::Process;
use crate::tokens::TokenServer;

/// Who may use a registry that asks.
pub const USER: &str = "someone";
/// And with what word.
pub const PASSWORD: &str = "p4ss:w0rd";
/// Where it listens on a machine of its own.
const PORT: u16 = 5000;

/// How a registry checks who is there.
#[derive(Debug)]
pub enum Auth {
    /// Not at all.
    Open,
    /// User name and password with every request.
    Basic,
    /// A token from a token server, which wants user name and password.
    Bearer(TokenServer),
}

/// A running registry.
#[derive(Debug)]
pub struct Registry {
    /// None while it is away.
    process: Option<Process>,
    starts: u32,
    host: String,
    auth: Auth,
    /// Where it runs, unless that is this machine.
    machine: Option<Arc<Machine>>,
    // Dropped after the process that writes into it.
    scratch: TempDir,
}

/// What a registry was asked since a certain moment.
#[derive(Clone, Copy, Debug, Default)]
pub struct Traffic {
    /// Requests that were answered with success or a redirect.
    pub requests: u64,
    /// Bytes of the bodies of successful answers.
    pub bytes: u64,
    /// Blobs that were written.
    pub blobs_written: u64,
    /// Manifests and indexes that were written.
    pub manifests_written: u64,
}

impl Registry {
    /// Starts a registry on a free loopback port.
    ///
    /// # Errors
    /// It does not start, or a tool is missing.
    pub fn start(auth: Auth) -> Result<Self> {
        Self::launch(auth, None)
    }

    /// Starts one, open to all, that takes no pushes and fetches from `remote`
    /// (`http://…`) what it does not have.
    ///
    /// # Errors
    /// As [`Registry::start`].
    pub fn pulling_through(remote: &str) -> Result<Self> {
        Self::launch(Auth::Open, Some(remote))
    }

    fn launch(auth: Auth, remote: Option<&str>) -> Result<Self> {
        let scratch = tempfile::tempdir()?;
        // The port may be taken between looking and listening: look again then.
        let mut attempts = 0;
        loop {
            let host = format!("127.0.0.1:{}", free_port()?);
            let config = configuration(scratch.path(), &host, &auth, remote)?;
            match serve(&config, None, &scratch.path().join("log")) {
                Ok(process) => {
                    return Ok(Self {
                        process: Some(process),
                        starts: 1,
                        host,
                        auth,
                        machine: None,
                        scratch,
                    });
                }
                Err(error) if attempts == 3 => return Err(error),
                Err(_) => attempts += 1,
            }
        }
    }

    /// Starts a registry on `machine`, open to all; with `remote` (`http://…`) one that
    /// takes no pushes and fetches from there what it does not have.
    ///
    /// # Errors
    /// As [`Registry::start`].
    pub fn start_on(machine: &Arc<Machine>, remote: Option<&str>) -> Result<Self> {
        let scratch = tempfile::tempdir()?;
        let host = format!("{}:{PORT}", machine.address());
        let config = configuration(scratch.path(), &host, &Auth::Open, remote)?;
        let process = serve(&config, Some(machine), &scratch.path().join("log"))?;
        Ok(Self {
            process: Some(process),
            starts: 1,
            host,
            auth: Auth::Open,
            machine: Some(Arc::clone(machine)),
            scratch,
        })
    }

    /// Ends it at once. What was pushed stays.
    ///
    /// # Errors
    /// It is gone already.
    pub fn kill(&mut self) -> Result<()> {
        let mut process = self.process.take().context("the registry does not run")?;
        process.signal(Signal::SIGKILL)?;
        process.wait()?;
        Ok(())
    }

    /// Starts it after it was killed, at the same place, with a new log.
    ///
    /// # Errors
    /// As [`Registry::start`]; or somebody has taken the port.
    pub fn start_again(&mut self) -> Result<()> {
        self.starts += 1;
        let log = self.scratch.path().join(format!("log-{}", self.starts));
        let config = self.scratch.path().join("config.yml");
        self.process = Some(serve(&config, self.machine.as_deref(), &log)?);
        Ok(())
    }

    /// `127.0.0.1:port`.
    #[must_use]
    pub fn host(&self) -> &str {
        &self.host
    }

    /// `127.0.0.1:port/name`.
    #[must_use]
    pub fn reference(&self, name: &str) -> String {
        format!("{}/{name}", self.host)
    }

    /// Everything that the registry logged since its last start, requests included.
    #[must_use]
    pub fn log(&self) -> String {
        self.process.as_ref().map(Process::log).unwrap_or_default()
    }

    /// What was asked since the log was `mark` bytes long.
    #[must_use]
    pub fn traffic_since(&self, mark: usize) -> Traffic {
        let log = self.log();
        let mut traffic = Traffic::default();
        for request in log
            .get(mark..)
            .unwrap_or_default()
            .lines()
            .filter_map(Request::parse)
        {
            if !(200..400).contains(&request.status) {
                continue;
            }
            traffic.requests += 1;
            traffic.bytes += request.bytes;
            let is = |part| request.method == "PUT" && request.path.contains(part);
            traffic.blobs_written += u64::from(is("/blobs/"));
            traffic.manifests_written += u64::from(is("/manifests/"));
        }
        traffic
    }

    /// A docker configuration directory (`DOCKER_CONFIG`) with the credentials for
    /// `host`, which is this registry or a proxy in front of it.
    ///
    /// # Errors
    /// The disk is full.
    pub fn docker_config(&self, host: &str) -> Result<PathBuf> {
        let directory = self
            .scratch
            .path()
            .join(format!("docker-{}", host.replace(':', "-")));
        fs::create_dir_all(&directory)?;
        let auths = match self.auth {
            Auth::Open => json!({}),
            Auth::Basic | Auth::Bearer(_) => {
                let word =
                    base64::engine::general_purpose::STANDARD.encode(format!("{USER}:{PASSWORD}"));
                json!({host: {"auth": word}})
            }
        };
        fs::write(
            directory.join("config.json"),
            json!({"auths": auths}).to_string(),
        )?;
        Ok(directory)
    }

    /// Pushes what `tag` names in the OCI layout `layout` as `name`, indexes whole.
    ///
    /// # Errors
    /// The registry refuses.
    pub fn push(&self, layout: &Path, tag: &str, name: &str) -> Result<()> {
        let mut skopeo = self.skopeo("copy");
        skopeo.args(["--all", "--dest-tls-verify=false"]);
        skopeo.arg(format!("oci:{}:{tag}", layout.display()));
        skopeo.arg(format!("docker://{}", self.reference(name)));
        succeed(self.authorise(&mut skopeo)?)?;
        Ok(())
    }

    /// Pulls `name` into a new OCI layout with the tag `pulled`, indexes whole.
    ///
    /// # Errors
    /// The registry refuses, or a digest does not match.
    pub fn pull(&self, name: &str, layout: &Path) -> Result<()> {
        let mut skopeo = self.skopeo("copy");
        skopeo.args(["--all", "--src-tls-verify=false"]);
        skopeo.arg(format!("docker://{}", self.reference(name)));
        skopeo.arg(format!("oci:{}:pulled", layout.display()));
        succeed(self.authorise(&mut skopeo)?)?;
        Ok(())
    }

    /// The manifest or index of `name`, exactly as stored.
    ///
    /// # Errors
    /// It is not there.
    pub fn manifest(&self, name: &str) -> Result<String> {
        let mut skopeo = self.skopeo("inspect");
        skopeo.args(["--raw", "--tls-verify=false"]);
        skopeo.arg(format!("docker://{}", self.reference(name)));
        Ok(succeed(self.authorise(&mut skopeo)?)?.stdout)
    }

    /// The manifest or index of `name`, parsed.
    ///
    /// # Errors
    /// It is not there, or is not JSON.
    pub fn manifest_json(&self, name: &str) -> Result<Value> {
        serde_json::from_str(&self.manifest(name)?).context("manifest is not JSON")
    }

    /// Stores a blob that no manifest names; returns its digest (`sha256:…`).
    ///
    /// # Errors
    /// The registry refuses.
    pub fn push_blob(&self, name: &str, file: &Path) -> Result<String> {
        let digest = succeed(Command::new("sha256sum").arg(file))?.stdout;
        let hex = digest.split_whitespace().next().unwrap_or_default();
        let digest = format!("sha256:{hex}");
        let curl = || {
            let mut curl = self.command("curl");
            curl.args([
                "-sS",
                "--fail-with-body",
                "-u",
                &format!("{USER}:{PASSWORD}"),
            ]);
            curl
        };
        let url = format!("http://{}/v2/{name}/blobs/uploads/", self.host);
        let mut start = curl();
        start.args(["-X", "POST", "-o", "/dev/null", "-w", "%header{location}"]);
        let place = succeed(start.arg(url))?.stdout;
        let mut upload = curl();
        upload.args(["-X", "PUT", "-H", "Content-Type: application/octet-stream"]);
        upload
            .arg("--data-binary")
            .arg(format!("@{}", file.display()));
        succeed(upload.arg(format!("{}&digest={digest}", place.trim())))?;
        Ok(digest)
    }

    /// Stores a manifest under the name and tag `name`.
    ///
    /// # Errors
    /// The registry refuses.
    pub fn push_manifest(&self, name: &str, manifest: &Value) -> Result<()> {
        let (repository, tag) = name.split_once(':').context("no tag")?;
        let kind = manifest["mediaType"].as_str();
        let kind = kind.unwrap_or("application/vnd.oci.image.manifest.v1+json");
        let mut put = self.command("curl");
        put.args(["-sS", "--fail-with-body", "-X", "PUT"]);
        put.args(["-u", &format!("{USER}:{PASSWORD}")]);
        put.args(["-H", &format!("Content-Type: {kind}")]);
        put.args(["--data-binary", &manifest.to_string()]);
        succeed(put.arg(format!(
            "http://{}/v2/{repository}/manifests/{tag}",
            self.host
        )))?;
        Ok(())
    }

    /// The file in which the registry keeps the blob `digest` (`sha256:…`).
    ///
    /// # Errors
    /// The digest is not one, or nobody has pushed such a blob.
    pub fn blob_file(&self, digest: &str) -> Result<PathBuf> {
        let hex = digest
            .strip_prefix("sha256:")
            .context("not a SHA-256 digest")?;
        let file = self
            .scratch
            .path()
            .join("storage/docker/registry/v2/blobs/sha256")
            .join(hex.get(..2).context("digest too short")?)
            .join(hex)
            .join("data");
        if !file.is_file() {
            bail!("the registry has no blob {digest}");
        }
        Ok(file)
    }

    /// A command that runs where the registry does.
    #[must_use]
    pub fn command(&self, program: &str) -> Command {
        match &self.machine {
            Some(machine) => machine.command(program),
            None => Command::new(program),
        }
    }

    fn skopeo(&self, verb: &str) -> Command {
        let mut command = self.command("skopeo");
        command.args(["--insecure-policy", verb]);
        command
    }

    fn authorise<'c>(&self, skopeo: &'c mut Command) -> Result<&'c mut Command> {
        let directory = self.docker_config(&self.host)?;
        Ok(skopeo.arg("--authfile").arg(directory.join("config.json")))
    }
}

/// Starts the program.
fn serve(config: &Path, machine: Option<&Machine>, log: &Path) -> Result<Process> {
    let mut command = Command::new("docker-registry");
    if let Some(machine) = machine {
        machine.enter(&mut command);
    }
    let mut process = Process::start(command.arg("serve").arg(config), log)?;
    process.wait_until(|process| process.log().contains("listening on "))?;
    Ok(process)
}

/// A loopback port that nobody listens on at this moment.
///
/// # Errors
/// There is none.
pub fn free_port() -> Result<u16> {
    Ok(TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?
        .local_addr()?
        .port())
}

/// Writes the configuration file; returns its path.
fn configuration(scratch: &Path, host: &str, auth: &Auth, remote: Option<&str>) -> Result<PathBuf> {
    let mut config = json!({
        "version": "0.1",
        "log": {"level": "info"},
        "storage": {
            "filesystem": {"rootdirectory": scratch.join("storage")},
            "delete": {"enabled": true},
        },
        "http": {"addr": host, "secret": "of a test"},
    });
    if let Some(remote) = remote {
        config["proxy"] = json!({"remoteurl": remote});
    }
    match auth {
        Auth::Open => {}
        Auth::Basic => {
            let file = scratch.join("htpasswd");
            let mut htpasswd = Command::new("htpasswd");
            // The cheapest cost: the hash is computed anew for every request.
            htpasswd
                .args(["-b", "-B", "-C", "4", "-c"])
                .arg(&file)
                .args([USER, PASSWORD]);
            succeed(&mut htpasswd)?;
            config["auth"] = json!({"htpasswd": {"realm": "test", "path": file}});
        }
        Auth::Bearer(tokens) => config["auth"] = tokens.registry_configuration(),
    }
    let file = scratch.join("config.yml");
    // JSON is YAML.
    fs::write(&file, config.to_string())?;
    Ok(file)
}

/// One line of the access log, in Apache's combined format.
struct Request<'l> {
    method: &'l str,
    path: &'l str,
    status: u16,
    bytes: u64,
}

impl<'l> Request<'l> {
    fn parse(line: &'l str) -> Option<Self> {
        // host - - [time] "GET /v2/… HTTP/1.1" 200 123 "" "agent"
        let mut parts = line.split('"');
        let head = parts.next()?;
        if !head.contains(" - - [") {
            return None;
        }
        let (method, target) = parts.next()?.split_once(' ')?;
        let path = target.split([' ', '?']).next()?;
        let mut numbers = parts.next()?.split_whitespace();
        let status = numbers.next()?.parse().ok()?;
        let bytes = numbers.next()?.parse().ok()?;
        Some(Self {
            method,
            path,
            status,
            bytes,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn access_log_lines_are_understood() {
        let line = r#"127.0.0.1 - - [21/Nov/2026:02:00:00 +0000] "GET /v2/a/blobs/sha256:1 HTTP/1.1" 206 4096 "" "x""#;
        let request = Request::parse(line).unwrap();
        assert_eq!(
            (request.method, request.status, request.bytes),
            ("GET", 206, 4096)
        );
        assert_eq!(request.path, "/v2/a/blobs/sha256:1");
        assert!(Request::parse(r#"time="now" level=info msg="listening""#).is_none());
    }

    #[test]
    fn the_registry_counts_what_it_serves() {
        let registry = Registry::start(Auth::Open).unwrap();
        let mark = registry.log().len();
        let mut curl = Command::new("curl");
        succeed(curl.args(["-sf", &format!("http://{}/v2/", registry.host())])).unwrap();
        let traffic = registry.traffic_since(mark);
        assert_eq!((traffic.requests, traffic.bytes), (1, 2));
    }
}
