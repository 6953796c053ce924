//! Commands that talk to a running daemon, and `config check`: short text for people,
//! `--json` for programs.

use std::path::Path;

use anyhow::Context as _;
use serde_json::{Value, json};

use crate::api::client::{ask, encoded};
use crate::cli::{CheckOptions, Control, UmountOptions};
use crate::config::Config;

/// Carries out `control`.
///
/// * `socket`: of the daemon to talk to.
///
/// # Errors
/// The daemon does not answer or refuses, or the file is wrong.
pub(crate) fn run(socket: Option<&Path>, control: &Control) -> anyhow::Result<()> {
    let socket = || socket.context("--apisock is missing: the control socket of the daemon");
    match control {
        Control::Status(options) => status(socket()?, options.json),
        Control::Mounts(options) => mounts(socket()?, options.json),
        Control::Metrics(options) => metrics(socket()?, options.json),
        Control::Umount(options) => umount(socket()?, options),
        Control::CheckConfig(options) => check(options),
    }
}

#[allow(clippy::print_stdout, reason = "what the commands are for")]
fn say(text: impl std::fmt::Display) {
    println!("{text}");
}

fn get(socket: &Path, target: &str) -> anyhow::Result<Value> {
    let body = ask(socket, "GET", target)?;
    serde_json::from_str(&body).with_context(|| format!("{target}: broken answer"))
}

/// A text of the answer; `-` if it is not there.
fn text<'a>(value: &'a Value, pointer: &str) -> &'a str {
    let found = value.pointer(pointer).and_then(Value::as_str);
    found.unwrap_or("-")
}

fn images(daemon: &Value) -> impl Iterator<Item = (&String, &Value)> {
    let all = daemon.pointer("/backend_collection");
    all.and_then(Value::as_object).into_iter().flatten()
}

fn status(socket: &Path, as_json: bool) -> anyhow::Result<()> {
    let daemon = get(socket, "/api/v1/daemon")?;
    if as_json {
        say(daemon);
        return Ok(());
    }
    let waiting = get(socket, "/debug")?;
    let count = |key| {
        let list = waiting.get(key).and_then(Value::as_array);
        list.map_or(0, Vec::len)
    };
    say(format_args!("state     {}", text(&daemon, "/state")));
    let version = text(&daemon, "/version/package_ver");
    let commit = text(&daemon, "/version/git_commit");
    say(format_args!("version   {version} ({commit})"));
    say(format_args!("images    {}", images(&daemon).count()));
    say(format_args!("waiting   {} reads", count("reads")));
    say(format_args!("fetching  {} ranges", count("fetches")));
    Ok(())
}

fn mounts(socket: &Path, as_json: bool) -> anyhow::Result<()> {
    let daemon = get(socket, "/api/v1/daemon")?;
    if as_json {
        let all: Vec<&Value> = images(&daemon).map(|(_, about)| about).collect();
        say(json!(all));
        return Ok(());
    }
    for (path, about) in images(&daemon) {
        let kind = text(about, "/config/backend/type");
        say(format_args!(
            "{path}\t{kind}\t{}",
            text(about, "/mounted_time")
        ));
    }
    Ok(())
}

fn metrics(socket: &Path, as_json: bool) -> anyhow::Result<()> {
    if !as_json {
        let page = ask(socket, "GET", "/metrics")?;
        let numbers = page.lines().filter(|line| !line.starts_with('#'));
        for line in numbers.filter(|line| !line.ends_with(" 0")) {
            say(line);
        }
        return Ok(());
    }
    let daemon = get(socket, "/api/v1/daemon")?;
    let mut all = serde_json::Map::new();
    for (path, about) in images(&daemon) {
        let by_path = |what: &str| {
            let target = format!("/api/v1/metrics{what}?id={}", encoded(path));
            get(socket, &target)
        };
        let id = text(about, "/config/id");
        let cache = format!("/api/v1/metrics/blobcache?id={}", encoded(id));
        let report = json!({
            "files": by_path("")?,
            "backend": by_path("/backend")?,
            // An image without a configuration has no id to ask for.
            "cache": get(socket, &cache).unwrap_or_default(),
        });
        all.insert(path.clone(), report);
    }
    say(Value::Object(all));
    Ok(())
}

fn umount(socket: &Path, options: &UmountOptions) -> anyhow::Result<()> {
    match &options.path {
        Some(path) => {
            let target = format!("/api/v1/mount?mountpoint={}", encoded(path));
            ask(socket, "DELETE", &target)?;
        }
        None => {
            ask(socket, "PUT", "/api/v1/daemon/exit?unmount=true")?;
        }
    }
    if options.json {
        say(json!({ "unmounted": options.path }));
    }
    Ok(())
}

fn check(options: &CheckOptions) -> anyhow::Result<()> {
    let path = options.file.display();
    let config = Config::load(&options.file).with_context(|| path.to_string())?;
    if options.json {
        say(json!({ "config": config.shown(), "warnings": config.warnings }));
        return Ok(());
    }
    for warning in &config.warnings {
        say(format_args!("{path}: warning: {warning}"));
    }
    say(format_args!("{path}: good"));
    Ok(())
}
