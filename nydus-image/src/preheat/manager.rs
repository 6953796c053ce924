//! Warming through the open API of a Dragonfly manager: a job, and waiting for it.
//!
//! The manager knows whole files only, and has its schedulers tell seeds to fetch them.
//! What a job says about itself is not taken at its word: one that lists failures has
//! failed, whatever its state.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail, ensure};
use reqwest::header::{AUTHORIZATION, HeaderValue};
use reqwest::redirect::Policy;
use reqwest::{RequestBuilder, StatusCode};
use serde::Serialize;
use serde_json::{Value, json};
use storage::oci::registry::{Registry, client_builder};

use super::plan::Target;
use super::progress::Progress;

/// Where a token may be, if no file is named.
pub(super) const TOKEN_VARIABLE: &str = "DRAGONFLY_MANAGER_TOKEN";
/// Longest token, and longest answer, in bytes.
const MAX_TOKEN: u64 = 16 << 10;
const MAX_ANSWER: usize = 16 << 20;
/// Pause between two questions, and how many in a row may fail.
const POLL: Duration = Duration::from_secs(1);
const MAX_FAILURES: u32 = 10;
/// A manager that says nothing for this long has not answered.
const SILENCE: Duration = Duration::from_secs(30);
/// How much of an error is quoted.
const QUOTED: usize = 300;

/// A job that succeeded.
#[derive(Debug, Serialize)]
pub(super) struct Done {
    /// Its number.
    pub(super) job: u64,
    /// Blobs that were asked for.
    pub(super) blobs: usize,
    /// Copies that it says were made, if it says so.
    pub(super) reported: usize,
    /// How long it took.
    pub(super) seconds: f64,
}

/// A manager, and how to log in to it.
#[derive(Debug)]
pub(super) struct Manager {
    http: reqwest::Client,
    jobs: String,
    token: HeaderValue,
    /// The token, to keep it out of what is quoted.
    secret: String,
}

/// The token in `file`, or in the environment.
pub(super) fn token(file: Option<&Path>) -> anyhow::Result<String> {
    let text = match file {
        Some(path) => {
            let read = || -> anyhow::Result<String> {
                let size = std::fs::metadata(path)?.len();
                ensure!(size <= MAX_TOKEN, "it has more than {MAX_TOKEN} bytes");
                Ok(std::fs::read_to_string(path)?)
            };
            read().with_context(|| format!("cannot read the token in {}", path.display()))?
        }
        None => std::env::var(TOKEN_VARIABLE).with_context(|| {
            format!("the manager wants a personal access token: give --manager-token-file, or set {TOKEN_VARIABLE}")
        })?,
    };
    let text = text.trim();
    ensure!(!text.is_empty(), "the token for the manager is empty");
    Ok(text.to_owned())
}

impl Manager {
    /// * `url`: without a slash at its end.
    pub(super) fn new(url: &str, token: String) -> anyhow::Result<Self> {
        let http = client_builder()
            .read_timeout(SILENCE)
            .no_proxy()
            .redirect(Policy::none())
            .build()
            .context("cannot set up the HTTP client for the manager")?;
        let mut value = HeaderValue::from_str(&format!("Bearer {token}"))
            .ok()
            .context("the token for the manager has characters that HTTP does not allow")?;
        value.set_sensitive(true);
        Ok(Self {
            http,
            jobs: format!("{url}/oapi/v1/jobs"),
            token: value,
            secret: token,
        })
    }

    /// Makes a job for `targets` and waits until it is over.
    ///
    /// * `replicas`: seeds that get a copy.
    /// * `limit`: how long it may take.
    pub(super) async fn warm(
        &self,
        registry: &Registry,
        targets: &[Target],
        replicas: usize,
        (limit, progress): (Duration, &Progress),
    ) -> anyhow::Result<Done> {
        let began = Instant::now();
        let job = job(registry, targets, replicas, limit).await?;
        let created = self.ask(self.http.post(&self.jobs).json(&job)).await;
        let created = created.context("cannot create a preheat job")?;
        let id = created.get("id").and_then(Value::as_u64);
        let id = id.context("the manager's answer names no job")?;
        progress.say(&format!("job {id}: {} blobs", targets.len()));
        let wait = self.wait(id, progress);
        let Ok(finished) = tokio::time::timeout(limit, wait).await else {
            bail!(
                "job {id} is not over after {} s; it goes on without us",
                limit.as_secs()
            );
        };
        let finished = finished.with_context(|| format!("preheat job {id}"))?;
        let mut copies = Copies::default();
        copies.count(&finished);
        let state = finished.get("state").and_then(Value::as_str);
        if state != Some("SUCCESS") || !copies.failures.is_empty() {
            bail!(
                "{}",
                self.why(id, state.unwrap_or_default(), &copies, &finished)
            );
        }
        ensure!(
            copies.successes == 0 || copies.successes >= targets.len(),
            "preheat job {id} reports {} of {} blobs",
            copies.successes,
            targets.len()
        );
        // Managers name what they fetch by its URL, daemons by its digest, unless they are
        // told otherwise: then the job succeeds, and no node finds what it fetched.
        tracing::warn!(
            "nodes find what a manager's job has fetched only if all daemons have `proxy.registryMirror.enableTaskIDBasedBlobDigest: false`"
        );
        Ok(Done {
            job: id,
            blobs: targets.len(),
            reported: copies.successes,
            seconds: began.elapsed().as_secs_f64(),
        })
    }

    /// Asks until the job is over, and returns what the manager says then.
    async fn wait(&self, id: u64, progress: &Progress) -> anyhow::Result<Value> {
        let mut failures = 0;
        let mut last = String::new();
        loop {
            match self.ask(self.http.get(format!("{}/{id}", self.jobs))).await {
                Ok(job) => {
                    failures = 0;
                    let state = job.get("state").and_then(Value::as_str).unwrap_or("?");
                    if matches!(state, "SUCCESS" | "FAILURE") {
                        return Ok(job);
                    }
                    if last != state {
                        state.clone_into(&mut last);
                        progress.say(&format!("job {id}: {}", self.quoted(state)));
                    }
                }
                Err(error) => {
                    failures += 1;
                    if failures >= MAX_FAILURES {
                        return Err(error);
                    }
                    tracing::debug!("job {id}: {error:#}; asking again");
                }
            }
            tokio::time::sleep(POLL).await;
        }
    }

    /// The JSON that answers a request.
    async fn ask(&self, request: RequestBuilder) -> anyhow::Result<Value> {
        let request = request.header(AUTHORIZATION, self.token.clone());
        let failed = || format!("{}: no answer", self.jobs);
        let plain = |error: reqwest::Error| anyhow::Error::new(error.without_url());
        let mut answer = request.send().await.map_err(plain).with_context(failed)?;
        let status = answer.status();
        let mut body = Vec::new();
        while let Some(piece) = answer.chunk().await.map_err(plain).with_context(failed)? {
            ensure!(
                body.len() + piece.len() <= MAX_ANSWER,
                "{}: the answer has more than {MAX_ANSWER} bytes",
                self.jobs
            );
            body.extend_from_slice(&piece);
        }
        if status != StatusCode::OK {
            let advice = match status {
                StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => {
                    "; the token must be a personal access token with access to jobs"
                }
                _ => "",
            };
            let text = self.quoted(&String::from_utf8_lossy(&body));
            bail!("{}: {status}{advice} {text}", self.jobs);
        }
        serde_json::from_slice(&body)
            .ok()
            .with_context(|| format!("{}: the answer is no JSON", self.jobs))
    }

    fn why(&self, id: u64, state: &str, copies: &Copies, job: &Value) -> String {
        let mut text = format!("preheat job {id} ended as {}", self.quoted(state));
        for failure in copies.failures.iter().take(3) {
            text.push_str("; ");
            text.push_str(&self.quoted(failure));
        }
        if copies.failures.is_empty()
            && let Some(result) = job.get("result")
        {
            text.push_str("; ");
            text.push_str(&self.quoted(&result.to_string()));
        }
        text
    }

    /// A short excerpt in one line, without the token.
    fn quoted(&self, text: &str) -> String {
        let text = text.replace(&self.secret, "…");
        let words: Vec<_> = text.split_whitespace().collect();
        let line = words.join(" ");
        let plain = line.chars().filter(|char| !char.is_control());
        plain.take(QUOTED).collect()
    }
}

/// The job that is asked for.
async fn job(
    registry: &Registry,
    targets: &[Target],
    replicas: usize,
    limit: Duration,
) -> anyhow::Result<Value> {
    let (origin, repository) = (registry.origin(), &registry.name().repository);
    let urls: Vec<_> = targets
        .iter()
        .map(|target| format!("{origin}/v2/{repository}/blobs/{}", target.digest))
        .collect();
    let mut headers = BTreeMap::new();
    if let Some(value) = registry.authorization(false).await? {
        let text = value.to_str().context("the registry's token is no text")?;
        headers.insert("Authorization", text.to_owned());
    }
    let mut args = json!({
        "type": "file",
        "urls": urls,
        "headers": headers,
        "scope": "single_seed_peer",
        // A duration of Go.
        "timeout": u64::try_from(limit.as_nanos()).unwrap_or(u64::MAX),
    });
    if replicas > 1 {
        args["scope"] = json!("all_seed_peers");
        args["count"] = json!(replicas);
    }
    Ok(json!({"type": "preheat", "args": args}))
}

/// What a job says about single files, wherever in its result.
#[derive(Debug, Default)]
struct Copies {
    successes: usize,
    failures: Vec<String>,
}

impl Copies {
    fn count(&mut self, value: &Value) {
        match value {
            Value::Object(fields) => {
                for (name, value) in fields {
                    match (name.as_str(), value) {
                        ("success_tasks", Value::Array(tasks)) => self.successes += tasks.len(),
                        ("failure_tasks", Value::Array(tasks)) => {
                            self.failures.extend(tasks.iter().map(Value::to_string));
                        }
                        _ => self.count(value),
                    }
                }
            }
            Value::Array(values) => values.iter().for_each(|value| self.count(value)),
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn failures_are_found_wherever_they_are() {
        let job = json!({"state": "SUCCESS", "result": {"job_states": [{"results": [
            {"success_tasks": [{"url": "a"}, {"url": "b"}], "failure_tasks": null},
            {"success_tasks": [], "failure_tasks": [{"url": "c", "description": "no room"}]},
        ]}]}});
        let mut copies = Copies::default();
        copies.count(&job);
        assert_eq!(copies.successes, 2);
        assert!(copies.failures[0].contains("no room"));
    }

    #[test]
    fn the_token_is_not_quoted() {
        let manager = Manager::new("http://m:8080", "s3cret".to_owned()).unwrap();
        let quoted = manager.quoted("the token\n s3cret\u{7} is wrong");
        assert_eq!(quoted, "the token … is wrong");
        assert!(!format!("{:?}", manager.token).contains("s3cret"));
        assert!(Manager::new("http://m", "a\nb".to_owned()).is_err());
    }
}
