//! A real nginx: TLS, client certificates, signed links that expire.
//!
//! Runs in the foreground, without its system-wide configuration, below a directory
//! of its own.

use std::fmt::Write as _;
use std::fs;
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::Result;
use nix::sys::signal::Signal;
use tempfile::TempDir;

use crate::command::succeed;
use crate::process::Process;

/// A running nginx.
#[derive(Debug)]
pub struct Nginx {
    process: Process,
    // Dropped after the process that uses it.
    scratch: TempDir,
}

impl Nginx {
    /// Starts it with `servers` as the content of its `http` block.
    ///
    /// * `wait_for`: `host:port` of each server, which must answer.
    ///
    /// # Errors
    /// It is not installed, or does not start; the log is in the error.
    pub fn start(servers: &str, wait_for: &[&str]) -> Result<Self> {
        let scratch = tempfile::tempdir()?;
        write_configuration(scratch.path(), servers)?;
        let mut command = Command::new("nginx");
        command.arg("-c").arg(scratch.path().join("nginx.conf"));
        command.arg("-p").arg(scratch.path()).args(["-e", "stderr"]);
        let mut process = Process::start(&mut command, &scratch.path().join("log"))?;
        process.wait_until(|_| wait_for.iter().all(|host| TcpStream::connect(host).is_ok()))?;
        Ok(Self { process, scratch })
    }

    /// Replaces the servers, as an operator does: a new file and SIGHUP. Requests of
    /// the next moments may still meet the old ones.
    ///
    /// # Errors
    /// It is gone.
    pub fn reload(&self, servers: &str) -> Result<()> {
        write_configuration(self.scratch.path(), servers)?;
        self.process.signal(Signal::SIGHUP)
    }

    /// The requests so far, one per line: `port method path status protocol client`,
    /// the last being the subject of the client's certificate.
    #[must_use]
    pub fn requests(&self) -> Vec<String> {
        let log = fs::read_to_string(self.scratch.path().join("access")).unwrap_or_default();
        log.lines().map(str::to_owned).collect()
    }
}

fn write_configuration(scratch: &Path, servers: &str) -> Result<()> {
    let mut text = String::from("daemon off;\nworker_processes 1;\nuser root;\npid pid;\n");
    text.push_str("events { worker_connections 256; }\nhttp {\n");
    text.push_str("log_format short '$server_port $request_method $uri $status ");
    text.push_str("$server_protocol $ssl_client_s_dn auth=$http_authorization';\n");
    text.push_str("access_log access short;\n");
    for kind in ["client_body", "proxy", "fastcgi", "uwsgi", "scgi"] {
        writeln!(text, "{kind}_temp_path temp_{kind};")?;
    }
    text.push_str(servers);
    text.push_str("}\n");
    fs::write(scratch.join("nginx.conf"), text)?;
    Ok(())
}

/// Certificates of a small authority of its own.
#[derive(Debug)]
pub struct Authority {
    scratch: TempDir,
}

impl Authority {
    /// Makes a key and a certificate for it.
    ///
    /// # Errors
    /// `openssl` fails.
    pub fn new() -> Result<Self> {
        let scratch = tempfile::tempdir()?;
        let authority = Self { scratch };
        let mut openssl = Command::new("openssl");
        openssl.args([
            "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2",
        ]);
        openssl.args(["-subj", "/CN=authority of a test", "-keyout"]);
        openssl.arg(authority.path("ca.key")).arg("-out");
        succeed(openssl.arg(authority.path("ca.pem")))?;
        Ok(authority)
    }

    /// The certificate of the authority itself.
    #[must_use]
    pub fn certificate(&self) -> PathBuf {
        self.path("ca.pem")
    }

    /// Makes a certificate and its key; returns both files.
    ///
    /// * `names`: what it is good for, like `IP:127.0.0.1`.
    ///
    /// # Errors
    /// `openssl` fails.
    pub fn issue(&self, subject: &str, names: &str) -> Result<(PathBuf, PathBuf)> {
        let file = |end: &str| self.path(&format!("{subject}.{end}"));
        let (key, request, certificate, extensions) =
            (file("key"), file("csr"), file("pem"), file("ext"));
        let mut openssl = Command::new("openssl");
        openssl.args(["req", "-newkey", "rsa:2048", "-nodes", "-keyout"]);
        openssl.arg(&key).args(["-subj", &format!("/CN={subject}")]);
        succeed(openssl.arg("-out").arg(&request))?;
        let usage = "basicConstraints=CA:FALSE\nextendedKeyUsage=serverAuth,clientAuth";
        fs::write(&extensions, format!("{usage}\nsubjectAltName={names}\n"))?;
        let mut openssl = Command::new("openssl");
        openssl.args(["x509", "-req", "-days", "2", "-CAcreateserial", "-in"]);
        openssl.arg(&request).arg("-CA").arg(self.path("ca.pem"));
        openssl.arg("-CAkey").arg(self.path("ca.key"));
        openssl.arg("-extfile").arg(&extensions);
        succeed(openssl.arg("-out").arg(&certificate))?;
        Ok((certificate, key))
    }

    fn path(&self, name: &str) -> PathBuf {
        self.scratch.path().join(name)
    }
}
