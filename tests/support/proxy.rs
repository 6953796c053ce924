//! An HTTP/1.1 reverse proxy that misbehaves as told: the failures that registries
//! and networks really have, on request.
//!
//! Every connection carries one request, so that each one meets the rules afresh.
//! The first rule that fits a request and is not used up decides; without one the
//! request and its answer pass unchanged. Every request is kept for inspection.
//! In place of rules, [`chaos`] draws a failure for every request.

pub mod chaos;

use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, Shutdown, TcpListener, TcpStream};
use std::os::fd::AsFd as _;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use nix::sys::socket::{setsockopt, sockopt};

use chaos::Chaos;

/// A head beyond this is no head.
const HEAD_LIMIT: usize = 64 * 1024;

/// One way to fail.
#[derive(Clone, Debug)]
pub enum Fault {
    /// Answer with this status and header lines instead of asking upstream.
    Status(u16, Vec<(&'static str, String)>),
    /// Send so many bytes of the body, then close although more were announced.
    CloseAfter(usize),
    /// Announce and send only so many bytes, as if that were all.
    Shorten(usize),
    /// Send a body of the right length whose bytes are wrong.
    Garble,
    /// Close the connection without an answer.
    Hangup,
    /// Wait so long, then go on as usual.
    Stall(Duration),
    /// Send the client to this host for the same path, with status 307.
    Redirect(String),
    /// Ask upstream for everything whatever range the client wants.
    IgnoreRange,
    /// Announce so many bytes more than there are, then close.
    LengthenHead(u64),
    /// Say in `Content-Range` that the bytes begin so much later.
    ShiftRange(u64),
    /// Ask upstream for a range that begins so much later.
    OtherRange(u64),
    /// Send so many bytes of the body, then nothing for so long.
    StallAfter(usize, Duration),
    /// Send so many bytes of the body, then reset the connection.
    ResetAfter(usize),
    /// Send the client to the same path of this proxy with a signature that ends
    /// after so many milliseconds; later requests with it are refused with 403.
    SignedRedirect(u64),
}

/// When to fail, and how.
#[derive(Clone, Debug)]
struct Rule {
    method: Option<&'static str>,
    path: String,
    fault: Fault,
    /// How often; `None` is always.
    left: Option<u32>,
    /// One in so many requests, and how many it has passed over.
    every: u32,
    passed: u32,
}

/// The first line and the headers of a request or an answer.
#[derive(Clone, Debug)]
pub struct Head {
    /// `GET`; of an answer the protocol version.
    pub method: String,
    /// Path and query; of an answer the status.
    pub target: String,
    /// The rest of the first line.
    rest: String,
    headers: Vec<(String, String)>,
}

#[derive(Debug, Default)]
struct State {
    /// Headers that answers get.
    headers: Vec<(String, String)>,
    rules: Vec<Rule>,
    chaos: Option<Chaos>,
    seen: Vec<Head>,
}

/// A running proxy; it ends with the test program.
#[derive(Debug)]
pub struct Proxy {
    host: String,
    state: Arc<Mutex<State>>,
}

impl Proxy {
    /// Starts a proxy in front of `upstream` (`host:port`) on a free loopback port.
    ///
    /// # Errors
    /// There is no free port.
    pub fn start(upstream: &str) -> Result<Self> {
        Self::start_at(Ipv4Addr::LOCALHOST, upstream)
    }

    /// The same on another address of the machine that the calling thread is on.
    ///
    /// # Errors
    /// It has no such address, or no free port.
    pub fn start_at(address: Ipv4Addr, upstream: &str) -> Result<Self> {
        let listener = TcpListener::bind((address, 0))?;
        let host = listener.local_addr()?.to_string();
        let state = Arc::new(Mutex::new(State::default()));
        let (shared, upstream) = (Arc::clone(&state), upstream.to_owned());
        thread::spawn(move || {
            for client in listener.incoming().map_while(Result::ok) {
                let (shared, upstream) = (Arc::clone(&shared), upstream.clone());
                // A connection that breaks is what this program is for.
                thread::spawn(move || drop(serve(client, &upstream, &shared)));
            }
        });
        Ok(Self { host, state })
    }

    /// Where it listens, as `address:port`.
    #[must_use]
    pub fn host(&self) -> &str {
        &self.host
    }

    /// Fails every request whose path contains `path`.
    pub fn fail(&self, path: &str, fault: Fault) {
        self.add(None, path, fault, None);
    }

    /// Fails the next `times` requests whose path contains `path`.
    pub fn fail_times(&self, times: u32, path: &str, fault: Fault) {
        self.add(None, path, fault, Some(times));
    }

    /// Fails every `method` request whose path contains `path`.
    pub fn fail_method(&self, method: &'static str, path: &str, fault: Fault) {
        self.add(Some(method), path, fault, None);
    }

    fn add(&self, method: Option<&'static str>, path: &str, fault: Fault, left: Option<u32>) {
        lock(&self.state).rules.push(Rule {
            method,
            path: path.to_owned(),
            fault,
            left,
            every: 1,
            passed: 0,
        });
    }

    /// Fails the last of every `every` requests whose path contains `path`.
    pub fn fail_one_in(&self, every: u32, path: &str, fault: Fault) {
        self.add(None, path, fault, None);
        if let Some(rule) = lock(&self.state).rules.last_mut() {
            rule.every = every;
        }
    }

    /// Adds a header to every answer that comes from upstream.
    pub fn add_header(&self, name: &str, value: &str) {
        let header = (name.to_owned(), value.to_owned());
        lock(&self.state).headers.push(header);
    }

    /// Draws a failure for each request from now on.
    pub fn run(&self, chaos: Chaos) {
        lock(&self.state).chaos = Some(chaos);
    }

    /// How many requests met a failure that was drawn.
    #[must_use]
    pub fn failed(&self) -> u64 {
        lock(&self.state).chaos.as_ref().map_or(0, Chaos::failed)
    }

    /// Forgets every rule: from now on all is well. Signed redirects stay good for
    /// as long as they were.
    pub fn heal(&self) {
        let mut state = lock(&self.state);
        state.rules.clear();
        if let Some(chaos) = &mut state.chaos {
            chaos.stop();
        }
    }

    /// The requests so far, in order of arrival.
    #[must_use]
    pub fn requests(&self) -> Vec<Head> {
        lock(&self.state).seen.clone()
    }
}

fn lock(state: &Mutex<State>) -> MutexGuard<'_, State> {
    // Plain data: a panic in between leaves nothing half done.
    state.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Serves the one request of a connection.
fn serve(mut client: TcpStream, upstream: &str, state: &Mutex<State>) -> Result<()> {
    let mut head = Head::read(&mut client)?;
    let fault = choose(state, &head);
    let headers = lock(state).headers.clone();
    if let Some((path, end)) = head.target.split_once("?until=") {
        if end.parse::<u128>().is_ok_and(|end| end < since_start()) {
            return refuse(client, 403, &[]);
        }
        head.target = path.to_owned();
    }
    match fault {
        Some(Fault::Status(status, headers)) => refuse(client, status, &headers),
        Some(Fault::Redirect(host)) => {
            let location = format!("http://{host}{}", head.target);
            refuse(client, 307, &[("Location", location)])
        }
        Some(Fault::SignedRedirect(life)) => {
            let end = since_start() + u128::from(life);
            let host = client.local_addr()?;
            let location = format!("http://{host}{}?until={end}", head.target);
            refuse(client, 307, &[("Location", location)])
        }
        Some(Fault::OtherRange(by)) => {
            head.shift("range", by)?;
            relay(client, &head, upstream, &headers)
        }
        Some(Fault::Hangup) => Ok(client.shutdown(Shutdown::Both)?),
        Some(Fault::Stall(time)) => {
            thread::sleep(time);
            relay(client, &head, upstream, &headers)
        }
        Some(Fault::IgnoreRange) => {
            head.remove("range");
            relay(client, &head, upstream, &headers)
        }
        Some(fault) => spoil(client, &head, upstream, (&fault, &headers)),
        None => relay(client, &head, upstream, &headers),
    }
}

/// Notes the request; the fault that it meets, if any.
fn choose(state: &Mutex<State>, head: &Head) -> Option<Fault> {
    let mut state = lock(state);
    if let Some(chaos) = &mut state.chaos {
        return chaos.draw();
    }
    state.seen.push(head.clone());
    let rule = state.rules.iter_mut().find(|rule| {
        rule.left != Some(0)
            && rule.method.is_none_or(|method| method == head.method)
            && head.target.contains(&rule.path)
    })?;
    rule.passed = (rule.passed + 1) % rule.every.max(1);
    if rule.passed != 0 {
        return None;
    }
    rule.left = rule.left.map(|left| left.saturating_sub(1));
    Some(rule.fault.clone())
}

/// Milliseconds since the first call.
fn since_start() -> u128 {
    static START: std::sync::OnceLock<Instant> = std::sync::OnceLock::new();
    START.get_or_init(Instant::now).elapsed().as_millis()
}

/// Answers without asking upstream.
fn refuse(mut client: TcpStream, status: u16, headers: &[(&'static str, String)]) -> Result<()> {
    // A client that is still sending would lose the answer if we closed on it.
    client.set_read_timeout(Some(Duration::from_millis(100)))?;
    drain(&mut client);
    write!(
        client,
        "HTTP/1.1 {status} as told\r\nConnection: close\r\nContent-Length: 0\r\n"
    )?;
    for (name, value) in headers {
        write!(client, "{name}: {value}\r\n")?;
    }
    write!(client, "\r\n")?;
    client.shutdown(Shutdown::Write)?;
    drain(&mut client);
    Ok(())
}

/// Reads until the other side pauses or ends.
fn drain(client: &mut TcpStream) {
    let mut buffer = [0; 65536];
    while client.read(&mut buffer).is_ok_and(|count| count > 0) {}
}

/// Passes request and answer on, with `headers` added to the latter.
fn relay(
    mut client: TcpStream,
    head: &Head,
    upstream: &str,
    headers: &[(String, String)],
) -> Result<()> {
    let mut server = ask(head, upstream)?;
    let (mut from, mut to) = (client.try_clone()?, server.try_clone()?);
    let body = thread::spawn(move || drop(io::copy(&mut from, &mut to)));
    if !headers.is_empty() {
        let mut answer = Head::read(&mut server)?;
        answer.headers.extend_from_slice(headers);
        client.write_all(answer.to_text().as_bytes())?;
    }
    let copied = io::copy(&mut server, &mut client);
    client.shutdown(Shutdown::Both)?;
    // It ends now that there is nothing more to read from the client.
    drop(body.join());
    copied.map(drop).context("the answer broke off")
}

/// Passes the answer on with a damaged body.
fn spoil(
    mut client: TcpStream,
    head: &Head,
    upstream: &str,
    (fault, headers): (&Fault, &[(String, String)]),
) -> Result<()> {
    let mut server = ask(head, upstream)?;
    let mut answer = Head::read(&mut server)?;
    answer.headers.extend_from_slice(headers);
    let mut body = Vec::new();
    server.read_to_end(&mut body)?;
    match fault {
        Fault::CloseAfter(count) => body.truncate(*count),
        Fault::Shorten(count) => {
            body.truncate(*count);
            answer.set("Content-Length", body.len().to_string());
        }
        Fault::Garble => body.iter_mut().for_each(|byte| *byte ^= 0x55),
        Fault::StallAfter(count, _) | Fault::ResetAfter(count) => body.truncate(*count),
        Fault::LengthenHead(by) => {
            let length = u64::try_from(body.len())? + by;
            answer.set("Content-Length", length.to_string());
        }
        Fault::ShiftRange(by) => answer.shift("content-range", *by)?,
        other => bail!("{other:?} has no body to damage"),
    }
    client.write_all(answer.to_text().as_bytes())?;
    client.write_all(&body)?;
    match fault {
        Fault::StallAfter(_, time) => thread::sleep(*time),
        Fault::ResetAfter(_) => {
            // Closing a socket that does not linger sends a reset.
            let at_once = nix::libc::linger {
                l_onoff: 1,
                l_linger: 0,
            };
            setsockopt(&client.as_fd(), sockopt::Linger, &at_once)?;
            return Ok(());
        }
        _ => {}
    }
    Ok(client.shutdown(Shutdown::Both)?)
}

/// Sends the head of a request upstream.
fn ask(head: &Head, upstream: &str) -> Result<TcpStream> {
    let mut server = TcpStream::connect(upstream)?;
    let mut head = head.clone();
    head.remove("connection");
    head.headers
        .push(("Connection".to_owned(), "close".to_owned()));
    server.write_all(head.to_text().as_bytes())?;
    Ok(server)
}

impl Head {
    /// Reads up to the empty line and not one byte further.
    ///
    /// # Errors
    /// The connection ends first, or this is not HTTP.
    pub fn read(stream: &mut impl Read) -> Result<Self> {
        let mut text = Vec::new();
        let mut byte = [0];
        while !text.ends_with(b"\r\n\r\n") {
            ensure!(text.len() < HEAD_LIMIT, "the head does not end");
            stream.read_exact(&mut byte)?;
            text.push(byte[0]);
        }
        let text = String::from_utf8(text)?;
        let mut lines = text.lines();
        let mut first = lines.next().unwrap_or_default().splitn(3, ' ');
        let mut word = || first.next().unwrap_or_default().to_owned();
        let (method, target, rest) = (word(), word(), word());
        let headers = lines
            .filter_map(|line| line.split_once(':'))
            .map(|(name, value)| (name.to_owned(), value.trim().to_owned()))
            .collect();
        Ok(Self {
            method,
            target,
            rest,
            headers,
        })
    }

    /// The value of a header; `name` in lower case.
    #[must_use]
    pub fn header(&self, name: &str) -> Option<&str> {
        let found = self
            .headers
            .iter()
            .find(|(key, _)| key.eq_ignore_ascii_case(name));
        found.map(|(_, value)| value.as_str())
    }

    fn set(&mut self, name: &str, value: String) {
        self.remove(name);
        self.headers.push((name.to_owned(), value));
    }

    /// Moves the first number of a header up, if there is one.
    fn shift(&mut self, name: &str, by: u64) -> Result<()> {
        let Some(value) = self.header(name).map(str::to_owned) else {
            return Ok(());
        };
        let (before, rest) = value.split_once(['=', ' ']).context("no range")?;
        let (first, after) = rest.split_once('-').context("no range")?;
        let separator = if value.contains('=') { '=' } else { ' ' };
        let first = first.parse::<u64>()?.saturating_add(by);
        self.set(name, format!("{before}{separator}{first}-{after}"));
        Ok(())
    }

    fn remove(&mut self, name: &str) {
        self.headers
            .retain(|(key, _)| !key.eq_ignore_ascii_case(name));
    }

    fn to_text(&self) -> String {
        let mut text = format!("{} {} {}\r\n", self.method, self.target, self.rest);
        for (name, value) in &self.headers {
            text.push_str(&format!("{name}: {value}\r\n"));
        }
        text + "\r\n"
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::command::{Finished, run};
    use crate::registry::{Auth, Registry};
    use std::process::Command;

    fn get(proxy: &Proxy) -> Finished {
        let mut curl = Command::new("curl");
        run(curl.args([
            "-s",
            "-m",
            "10",
            "-w",
            "%{http_code}",
            &format!("http://{}/v2/", proxy.host()),
        ]))
        .unwrap()
    }

    #[test]
    fn fails_as_told_and_heals() {
        let registry = Registry::start(Auth::Open).unwrap();
        let proxy = Proxy::start(registry.host()).unwrap();
        assert_eq!(get(&proxy).stdout, "{}200");

        proxy.fail_times(
            1,
            "/v2/",
            Fault::Status(429, vec![("Retry-After", "1".to_owned())]),
        );
        assert_eq!(get(&proxy).stdout, "429");
        assert_eq!(get(&proxy).stdout, "{}200");

        for (fault, code, output) in [
            (Fault::CloseAfter(1), 18, "{200"),
            (Fault::Shorten(1), 0, "{200"),
            (Fault::Garble, 0, ".(200"),
            (Fault::Hangup, 52, "000"),
            (Fault::Redirect("127.0.0.1:1".to_owned()), 0, "307"),
        ] {
            proxy.fail("/v2/", fault.clone());
            let finished = get(&proxy);
            assert_eq!(
                (finished.code(), finished.stdout.as_str()),
                (code, output),
                "{fault:?}"
            );
            proxy.heal();
        }
        assert_eq!(get(&proxy).stdout, "{}200");
        assert_eq!(proxy.requests().len(), 9);
    }
}
