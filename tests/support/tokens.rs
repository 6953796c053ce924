//! A token server: hands out the bearer tokens that a registry wants, to whoever
//! knows the user name and password.
//!
//! A token is a JSON Web Token (RFC 7519) signed with an RSA key (RS256) whose
//! certificate travels in its `x5c` field; the registry trusts that certificate.
//! `openssl` makes key, certificate and signatures.

use std::fs;
use std::io::{Read as _, Write as _};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Context as _, Result};
use base64::Engine as _;
use base64::engine::general_purpose::{STANDARD, URL_SAFE_NO_PAD};
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::command::succeed;
use crate::proxy::Head;
use crate::registry::{PASSWORD, USER};

const ISSUER: &str = "token server of a test";
/// What stands for a log-in that was made earlier: good for tokens, too.
pub const IDENTITY: &str = "1dent1ty-t0ken";
/// Longest form that is read.
const MAX_FORM: usize = 1 << 16;
const SERVICE: &str = "registry of a test";

/// A running token server; it ends with the test program.
#[derive(Debug)]
pub struct TokenServer {
    signer: Arc<Signer>,
    port: u16,
    issued: Arc<AtomicU64>,
}

impl TokenServer {
    /// Makes a key and starts to serve.
    ///
    /// # Errors
    /// `openssl` fails, or there is no free port.
    pub fn start() -> Result<Self> {
        let signer = Arc::new(Signer::new()?);
        let issued = Arc::new(AtomicU64::new(0));
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
        let port = listener.local_addr()?.port();
        let (key, count) = (Arc::clone(&signer), Arc::clone(&issued));
        thread::spawn(move || {
            for stream in listener.incoming().map_while(Result::ok) {
                // One bad client is no reason to stop serving the others.
                if answer(stream, &key).is_ok_and(|issued| issued) {
                    count.fetch_add(1, Ordering::Relaxed);
                }
            }
        });
        Ok(Self {
            signer,
            port,
            issued,
        })
    }

    /// How many tokens were handed out.
    #[must_use]
    pub fn issued(&self) -> u64 {
        self.issued.load(Ordering::Relaxed)
    }

    /// The `auth` section that makes a registry trust this server.
    pub(crate) fn registry_configuration(&self) -> Value {
        json!({"token": {
            "realm": format!("http://127.0.0.1:{}/token", self.port),
            "service": SERVICE,
            "issuer": ISSUER,
            "rootcertbundle": self.signer.certificate_file(),
        }})
    }
}

/// Serves one request; whether a token was handed out.
fn answer(mut stream: TcpStream, signer: &Signer) -> Result<bool> {
    let head = Head::read(&mut stream)?;
    let expected = format!("Basic {}", STANDARD.encode(format!("{USER}:{PASSWORD}")));
    let form = form(&head, &mut stream)?;
    let identity = form
        .split('&')
        .any(|pair| pair == format!("refresh_token={IDENTITY}"));
    let known = identity
        || head
            .header("authorization")
            .is_some_and(|value| value == expected);
    let (status, body) = if known {
        let asked = if identity {
            format!("?{form}")
        } else {
            head.target
        };
        let token = signer.token(&access(&asked))?;
        let both = json!({"token": token, "access_token": token, "expires_in": 300});
        ("200 OK", both)
    } else {
        (
            "401 Unauthorized",
            json!({"errors": [{"code": "UNAUTHORIZED"}]}),
        )
    };
    let body = body.to_string();
    write!(
        stream,
        "HTTP/1.1 {status}\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\
         Connection: close\r\n\r\n{body}",
        body.len()
    )?;
    Ok(known)
}

/// The form that comes with a request: OAuth 2 has one for refresh tokens.
fn form(head: &Head, stream: &mut TcpStream) -> Result<String> {
    let length = head.header("content-length").map_or(Ok(0), str::parse)?;
    anyhow::ensure!(length <= MAX_FORM, "a form of {length} bytes");
    let mut form = vec![0; length];
    stream.read_exact(&mut form)?;
    Ok(String::from_utf8(form)?)
}

/// What the `scope` parameters of a request ask for: `repository:name:pull,push`.
fn access(target: &str) -> Value {
    let query = target.split_once('?').map_or("", |(_, query)| query);
    let scopes = query
        .split('&')
        .filter_map(|pair| pair.strip_prefix("scope="));
    let mut granted = Vec::new();
    for scope in scopes.map(unescape) {
        // Several scopes may stand in one parameter, separated by spaces.
        for one in scope.split(' ') {
            let Some((kind, rest)) = one.split_once(':') else {
                continue;
            };
            let Some((name, actions)) = rest.rsplit_once(':') else {
                continue;
            };
            let actions: Vec<&str> = actions.split(',').collect();
            granted.push(json!({"type": kind, "name": name, "actions": actions}));
        }
    }
    Value::Array(granted)
}

/// Undoes percent encoding as far as scopes need it.
fn unescape(text: &str) -> String {
    let mut plain = text.replace('+', " ");
    for (code, character) in [
        ("%3A", ":"),
        ("%3a", ":"),
        ("%2F", "/"),
        ("%2f", "/"),
        ("%2C", ","),
        ("%2c", ","),
        ("%20", " "),
    ] {
        plain = plain.replace(code, character);
    }
    plain
}

/// An RSA key and its own certificate.
#[derive(Debug)]
struct Signer {
    scratch: TempDir,
    /// The certificate in base64 without its frame.
    certificate: String,
}

impl Signer {
    fn new() -> Result<Self> {
        let scratch = tempfile::tempdir()?;
        let (key, file) = (
            scratch.path().join("key.pem"),
            scratch.path().join("cert.pem"),
        );
        let mut openssl = Command::new("openssl");
        openssl.args([
            "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2",
        ]);
        openssl.args(["-subj", "/CN=token server of a test", "-keyout"]);
        succeed(openssl.arg(key).arg("-out").arg(&file))?;
        let framed = fs::read_to_string(file)?;
        let certificate = framed
            .lines()
            .filter(|line| !line.starts_with('-'))
            .collect();
        Ok(Self {
            scratch,
            certificate,
        })
    }

    fn certificate_file(&self) -> PathBuf {
        self.scratch.path().join("cert.pem")
    }

    fn token(&self, access: &Value) -> Result<String> {
        let now = SystemTime::now().duration_since(UNIX_EPOCH)?.as_secs();
        let header = json!({"typ": "JWT", "alg": "RS256", "x5c": [self.certificate]});
        let claims = json!({
            "iss": ISSUER, "sub": USER, "aud": SERVICE, "jti": "1",
            "nbf": now.saturating_sub(60), "iat": now, "exp": now + 300,
            "access": access,
        });
        let encode = |value: &Value| URL_SAFE_NO_PAD.encode(value.to_string());
        let signed = format!("{}.{}", encode(&header), encode(&claims));
        let signature = self.sign(signed.as_bytes())?;
        Ok(format!("{signed}.{}", URL_SAFE_NO_PAD.encode(signature)))
    }

    fn sign(&self, message: &[u8]) -> Result<Vec<u8>> {
        let input = tempfile::NamedTempFile::new_in(self.scratch.path())?;
        fs::write(&input, message)?;
        let output = tempfile::NamedTempFile::new_in(self.scratch.path())?;
        let mut openssl = Command::new("openssl");
        openssl
            .args(["dgst", "-sha256", "-sign"])
            .arg(self.path("key.pem"));
        succeed(openssl.arg("-out").arg(output.path()).arg(input.path()))?;
        fs::read(output.path()).context("openssl wrote no signature")
    }

    fn path(&self, name: &str) -> PathBuf {
        Path::new(self.scratch.path()).join(name)
    }
}
