//! The control API of the daemon that serves all images: which it has, one more, one less.
//!
//! One short request per connection. A connection that breaks says nothing about the
//! request: whoever asked has to look what became of it.

use std::collections::BTreeSet;
use std::io::{self, Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::{Value, json};

/// How long an answer may take: nydusd opens an image meanwhile, and may be replaced.
const PATIENCE: Duration = Duration::from_secs(60);
/// The same where there may be nobody to answer.
const IMPATIENCE: Duration = Duration::from_millis(500);
/// Longest answer that is read: some kilobytes for each of its images.
const MAX_ANSWER: u64 = 16 << 20;

/// Why a request was not carried out.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Failure {
    /// The daemon has refused it.
    #[error("{0}")]
    Refused(String),
    /// Nobody knows whether it was.
    #[error("its control socket")]
    Unreachable(#[source] io::Error),
}

/// The way to one daemon.
#[derive(Debug)]
pub(crate) struct Client {
    socket: PathBuf,
    patience: Duration,
}

impl Client {
    pub(crate) fn new(socket: &Path) -> Self {
        Self {
            socket: socket.to_owned(),
            patience: PATIENCE,
        }
    }

    /// One that does not wait: the socket outlives a daemon, because it is held like a
    /// mount, and whoever connects waits for the next one.
    pub(crate) fn impatient(self) -> Self {
        Self {
            patience: IMPATIENCE,
            ..self
        }
    }

    /// The images that it serves.
    pub(crate) fn images(&self) -> Result<BTreeSet<u64>, Failure> {
        let answer = self.ask("GET", "/api/v1/daemon", "")?;
        let answer: Value = serde_json::from_slice(&answer).unwrap_or_default();
        let images = answer["backend_collection"].as_object();
        let images = images.ok_or_else(|| broken("an answer without images"))?;
        let ids = images.keys().filter_map(|path| path.strip_prefix('/'));
        Ok(ids.filter_map(|id| id.parse().ok()).collect())
    }

    /// Whether it serves this image.
    pub(crate) fn has(&self, id: u64) -> Result<bool, Failure> {
        let target = format!("/api/v1/daemon/backend?mountpoint=/{id}");
        let (status, answer) = self.exchange("GET", &target, "")?;
        match status {
            200 => Ok(true),
            404 => Ok(false),
            _ => Err(refusal(status, &answer)),
        }
    }

    /// Has it serve one more.
    ///
    /// * `request`: the body, as `docs/api.md` describes it.
    pub(crate) fn mount(&self, id: u64, request: &Value) -> Result<(), Failure> {
        let target = format!("/api/v1/mount?mountpoint=/{id}");
        self.ask("POST", &target, &request.to_string()).map(drop)
    }

    /// Has it serve one less.
    pub(crate) fn unmount(&self, id: u64) -> Result<(), Failure> {
        let target = format!("/api/v1/mount?mountpoint=/{id}");
        self.ask("DELETE", &target, "").map(drop)
    }

    /// Gives it other credentials for an image: base64 of `user:password`.
    pub(crate) fn renew(&self, id: u64, auth: &str) -> Result<(), Failure> {
        let target = format!("/api/v1/config?id=/{id}");
        let settings = json!({"registry_auth": auth});
        self.ask("PUT", &target, &settings.to_string()).map(drop)
    }

    fn ask(&self, method: &str, target: &str, body: &str) -> Result<Vec<u8>, Failure> {
        match self.exchange(method, target, body)? {
            (200 | 204, answer) => Ok(answer),
            (status, answer) => Err(refusal(status, &answer)),
        }
    }

    fn exchange(&self, method: &str, target: &str, body: &str) -> Result<(u16, Vec<u8>), Failure> {
        self.talk(method, target, body)
            .map_err(Failure::Unreachable)
    }

    fn talk(&self, method: &str, target: &str, body: &str) -> io::Result<(u16, Vec<u8>)> {
        let mut stream = UnixStream::connect(&self.socket)?;
        stream.set_read_timeout(Some(self.patience))?;
        stream.set_write_timeout(Some(self.patience))?;
        let head = format!(
            "{method} {target} HTTP/1.1\r\nHost: unix\r\nConnection: close\r\n\
             Content-Type: application/json\r\nContent-Length: {}\r\n\r\n",
            body.len()
        );
        stream.write_all(head.as_bytes())?;
        stream.write_all(body.as_bytes())?;
        let mut answer = Vec::new();
        stream.take(MAX_ANSWER).read_to_end(&mut answer)?;
        parse(&answer).ok_or_else(|| io::ErrorKind::UnexpectedEof.into())
    }
}

/// Status and body of a whole answer.
fn parse(answer: &[u8]) -> Option<(u16, Vec<u8>)> {
    let end = answer.windows(4).position(|window| window == b"\r\n\r\n")?;
    let (head, body) = answer.split_at(end + 4);
    let head = std::str::from_utf8(head).ok()?;
    let status = head.split(' ').nth(1)?.parse().ok()?;
    let mut fields = head.lines().filter_map(|line| line.split_once(':'));
    let length = fields.find(|(name, _)| name.eq_ignore_ascii_case("content-length"));
    let length = length.map_or(Some(0), |(_, value)| value.trim().parse().ok())?;
    Some((status, body.get(..length)?.to_vec()))
}

fn refusal(status: u16, answer: &[u8]) -> Failure {
    let answer: Value = serde_json::from_slice(answer).unwrap_or_default();
    let message = answer["message"].as_str().map(str::to_owned);
    Failure::Refused(message.unwrap_or_else(|| format!("status {status}")))
}

fn broken(reason: &str) -> Failure {
    Failure::Unreachable(io::Error::other(reason.to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_whole_answers_count() {
        let whole = b"HTTP/1.1 200 \r\ncontent-length: 2\r\n\r\n{}";
        assert_eq!(parse(whole), Some((200, b"{}".to_vec())));
        assert_eq!(parse(b"HTTP/1.1 204 \r\n\r\n"), Some((204, Vec::new())));
        for cut in 0..whole.len() {
            assert_eq!(parse(&whole[..cut]), None, "{cut}");
        }
        let refused = refusal(500, br#"{"code":"UNDEFINED","message":"no"}"#);
        assert_eq!(refused.to_string(), "no");
        assert_eq!(refusal(503, b"").to_string(), "status 503");
    }
}
