//! A stand-in for Dragonfly's manager: the part of its open API that makes a job and
//! tells what became of it. The real one needs a database.

use std::io::{Read as _, Write as _};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;

use anyhow::{Context as _, Result};
use serde_json::{Value, json};

use crate::proxy::Head;

/// The token that it wants.
pub const TOKEN: &str = "p3rs0nal-t0ken";
/// The number of every job.
const ID: u64 = 7;

#[derive(Debug, Default)]
struct State {
    /// What is told of the job, in turn; the last one for ever.
    story: Vec<Value>,
    jobs: Vec<Value>,
}

/// A running stand-in; it ends with the test program.
#[derive(Debug)]
pub struct Manager {
    host: String,
    state: Arc<Mutex<State>>,
}

impl Manager {
    /// Starts one whose jobs go through `story`: fields like `state` and `result`.
    ///
    /// # Errors
    /// There is no free port.
    pub fn start(story: &[Value]) -> Result<Self> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
        let host = listener.local_addr()?.to_string();
        let state = Arc::new(Mutex::new(State {
            story: story.to_vec(),
            jobs: Vec::new(),
        }));
        let shared = Arc::clone(&state);
        thread::spawn(move || {
            for stream in listener.incoming().map_while(Result::ok) {
                // One bad client is no reason to stop serving the others.
                drop(serve(stream, &shared));
            }
        });
        Ok(Self { host, state })
    }

    /// `http://127.0.0.1:port`.
    #[must_use]
    pub fn url(&self) -> String {
        format!("http://{}", self.host)
    }

    /// The jobs that were made.
    #[must_use]
    pub fn jobs(&self) -> Vec<Value> {
        let state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.jobs.clone()
    }
}

fn serve(mut stream: TcpStream, state: &Mutex<State>) -> Result<()> {
    let head = Head::read(&mut stream)?;
    let length = head.header("content-length").unwrap_or("0").parse()?;
    let mut body = vec![0; length];
    stream.read_exact(&mut body)?;
    let (status, answer) = answer(&head, &body, state)?;
    let answer = answer.to_string();
    write!(
        stream,
        "HTTP/1.1 {status}\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\
         Connection: close\r\n\r\n{answer}",
        answer.len()
    )?;
    Ok(())
}

fn answer(head: &Head, body: &[u8], state: &Mutex<State>) -> Result<(&'static str, Value)> {
    if head.header("authorization") != Some(&format!("Bearer {TOKEN}")) {
        return Ok(("401 Unauthorized", json!({"message": "Unauthorized"})));
    }
    let mut state = state.lock().unwrap_or_else(PoisonError::into_inner);
    let jobs = "/oapi/v1/jobs";
    match (head.method.as_str(), head.target.strip_prefix(jobs)) {
        ("POST", Some("")) => {
            state.jobs.push(serde_json::from_slice(body)?);
            Ok(("200 OK", json!({"id": ID, "state": "PENDING"})))
        }
        ("GET", Some("/7")) => {
            let mut job = match state.story.len() {
                0 | 1 => state.story.first().cloned().context("no story")?,
                _ => state.story.remove(0),
            };
            job["id"] = json!(ID);
            Ok(("200 OK", job))
        }
        _ => Ok(("404 Not Found", json!({"message": "Not Found"}))),
    }
}
