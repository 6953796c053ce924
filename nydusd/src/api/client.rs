//! The other side of the socket: one request, one answer.

use std::io::{Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, bail};
use serde_json::Value;

/// As long as a daemon may take to mount.
const PATIENCE: Duration = Duration::from_secs(30);
/// Longest answer that is read, in bytes.
const MAX_ANSWER: u64 = 64 << 20;

/// Asks the daemon behind `socket`, and returns the body of its answer.
///
/// # Errors
/// Nobody answers, or the daemon refuses: its message is the error.
pub(crate) fn ask(socket: &Path, method: &str, target: &str) -> anyhow::Result<String> {
    let name = socket.display();
    let mut stream = UnixStream::connect(socket)
        .with_context(|| format!("no daemon answers on {name}; is it running?"))?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    let request = format!(
        "{method} {target} HTTP/1.1\r\nHost: unix\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"
    );
    let context = || format!("asking the daemon on {name}");
    stream.write_all(request.as_bytes()).with_context(context)?;
    let mut answer = String::new();
    let mut limited = stream.take(MAX_ANSWER);
    limited.read_to_string(&mut answer).with_context(context)?;
    let (head, body) = answer
        .split_once("\r\n\r\n")
        .with_context(|| format!("{name}: broken answer"))?;
    let status = head.split(' ').nth(1).unwrap_or_default();
    match status {
        "200" | "204" => Ok(body.to_owned()),
        _ => {
            let refusal: Value = serde_json::from_str(body).unwrap_or_default();
            let message = refusal.get("message").and_then(Value::as_str);
            bail!("the daemon refuses: {}", message.unwrap_or(status))
        }
    }
}

/// A value of a query, encoded.
pub(crate) fn encoded(text: &str) -> String {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.~/".contains(&byte);
    let mut encoded = String::new();
    for byte in text.bytes() {
        if plain(byte) {
            encoded.push(char::from(byte));
        } else {
            encoded.push_str(&format!("%{byte:02X}"));
        }
    }
    encoded
}
