//! Section `p2p`: blobs that travel between nodes. The same in both versions, at the top
//! of the file.
//!
//! An endpoint becomes a mirror of the registry, which knows how to speak to agents of
//! Dragonfly ([`storage::backend::registry::Dragonfly`]).

use std::time::Duration;

use storage::backend::registry::{
    Dragonfly, Fallback, Mirror, Scheduling, TASK_DISK, Tasks, Upstream, WhoFallsBack, WholeBlob,
};

use super::backend::{files, filled, seconds};
use super::section::Section;
use super::{Backend, ConfigError, Registry};

/// An agent is on the same node: a connection that takes longer will not come.
const CONNECT: Duration = Duration::from_secs(1);

/// Most requests per second that can be set.
const MAX_RATE: u64 = 1_000_000;

/// Requests that may leave the mirrors aside at once, if nothing else is set.
const BURST: u64 = 64;

/// Reads the section, if there is one, and adds its endpoints before the mirrors of the
/// registry.
pub(super) fn read(root: &mut Section<'_>, backend: &mut Backend) -> Result<(), ConfigError> {
    let Some(mut section) = root.section("p2p")? else {
        return Ok(());
    };
    let mode = match section.text("mode")?.unwrap_or("mirror") {
        "off" => None,
        "mirror" => Some(false),
        "forward" => Some(true),
        _ => return Err(section.wrong("mode", "\"mirror\", \"forward\" or \"off\"")),
    };
    let fallback = fallback(&mut section)?;
    let mut table = section.section("dragonfly")?;
    let dragonfly = match &mut table {
        Some(table) => dragonfly(table)?,
        None => Dragonfly::default(),
    };
    if let Some(table) = table {
        section.close(table);
    }
    let mut mirrors = Vec::new();
    for mut table in section.sections("endpoint")? {
        let forward = mode == Some(true);
        mirrors.extend(endpoint(&mut table, forward, &dragonfly, backend)?);
        section.close(table);
    }
    match (mode, backend) {
        (None, _) => {}
        (Some(_), Backend::Registry(registry)) => {
            mirrors.append(&mut registry.mirrors);
            registry.mirrors = mirrors;
            registry.fallback = fallback;
        }
        (Some(_), _) => root.warn("p2p", "no effect: it is for back end `registry`"),
    }
    root.close(section);
    Ok(())
}

fn fallback(section: &mut Section<'_>) -> Result<Fallback, ConfigError> {
    let who = match section.text("fallback")?.unwrap_or("on-demand") {
        "always" => WhoFallsBack::Always,
        "on-demand" => WhoFallsBack::OnDemand,
        "never" => WhoFallsBack::Never,
        _ => return Err(section.wrong("fallback", "\"always\", \"on-demand\" or \"never\"")),
    };
    let mut number = |key, usual| {
        let value = section.number(key, usual, 0..=MAX_RATE)?;
        // Never fails: it is in range.
        Ok(u32::try_from(value).unwrap_or(u32::MAX))
    };
    Ok(Fallback {
        who,
        rate: number("fallback_rate", 0)?,
        burst: number("fallback_burst", BURST)?,
    })
}

fn dragonfly(section: &mut Section<'_>) -> Result<Dragonfly, ConfigError> {
    let scheduling = match section.text("scheduling_policy")?.unwrap_or("always") {
        "always" => Scheduling::Always,
        "auto" => Scheduling::Auto,
        _ => return Err(section.wrong("scheduling_policy", "\"always\" or \"auto\"")),
    };
    let whole_blob = match section.text("prefetch")?.unwrap_or("profile") {
        "profile" => WholeBlob::Profile,
        "first-read" => WholeBlob::FirstRead,
        "never" => WholeBlob::Never,
        _ => return Err(section.wrong("prefetch", "\"profile\", \"first-read\" or \"never\"")),
    };
    let disk = section.number("task_disk", TASK_DISK, 0..=u64::MAX)?;
    let mut priority = |key| {
        let value = section.number(key, 6, 0..=6)?;
        Ok(u8::try_from(value).unwrap_or(6))
    };
    Ok(Dragonfly {
        scheduling,
        whole_blob,
        tasks: Tasks::Windows { disk },
        seed: false,
        priority_on_demand: priority("priority_on_demand")?,
        priority_prefetch: priority("priority_prefetch")?,
        tag: filled(section, "tag")?.unwrap_or_default().to_owned(),
        application: filled(section, "application")?
            .unwrap_or_default()
            .to_owned(),
    })
}

/// `None` for an endpoint that is not for this registry.
fn endpoint(
    table: &mut Section<'_>,
    forward: bool,
    dragonfly: &Dragonfly,
    backend: &Backend,
) -> Result<Option<Mirror>, ConfigError> {
    let url = table.required_text("url")?;
    if !url.starts_with("http://") && !url.starts_with("https://") {
        return Err(table.wrong("url", "an address that starts with http:// or https://"));
    }
    let is_dragonfly = match table.text("kind")?.unwrap_or("dragonfly") {
        "dragonfly" => true,
        "generic" => false,
        _ => return Err(table.wrong("kind", "\"dragonfly\" or \"generic\"")),
    };
    let usual = if is_dragonfly { "header" } else { "none" };
    let upstream = table.text("upstream")?.unwrap_or(usual);
    if !matches!(upstream, "header" | "ns" | "none") {
        return Err(table.wrong("upstream", "\"header\", \"ns\" or \"none\""));
    }
    let mut mirror = Mirror::new(url);
    mirror.headers = table.pairs("headers")?;
    mirror.ping_url = filled(table, "ping_url")?.map(str::to_owned);
    mirror.share_credentials = table.flag("forward_auth", is_dragonfly)?;
    mirror.skip_verify = table.flag("skip_verify", false)?;
    mirror.ca_files = files(table, "ca_cert_files")?;
    mirror.connect_timeout = Some(seconds(table, "connect_timeout")?.unwrap_or(CONNECT));
    mirror.first_byte_timeout = seconds(table, "first_byte_timeout")?;
    mirror.health_check_interval =
        seconds(table, "check_interval")?.unwrap_or(mirror.health_check_interval);
    let limit = table.number("failure_limit", u64::from(mirror.failure_limit), 1..=255)?;
    mirror.failure_limit = u32::try_from(limit).unwrap_or(mirror.failure_limit);
    mirror.dragonfly = match is_dragonfly {
        true => Some(of_endpoint(table, dragonfly.clone())?),
        false => None,
    };
    let registries = table.texts("registries")?;
    let Backend::Registry(registry) = backend else {
        return Ok(None);
    };
    match (forward, upstream) {
        (true, _) => mirror.upstream = Upstream::Proxy { plain: false },
        (false, "header") => mirror
            .headers
            .push(("X-Dragonfly-Registry".to_owned(), address_of(registry))),
        (false, "ns") => mirror.upstream = Upstream::Query,
        (false, _) => {}
    }
    let is_ours = |name: &String| name == "*" || *name == registry.host;
    let wanted = registries.is_empty() || registries.iter().any(is_ours);
    Ok(wanted.then_some(mirror))
}

/// What differs between an agent of the node and a seed peer, which fetches for all: those
/// who ask it share what it fetches in any case.
fn of_endpoint(table: &mut Section<'_>, settings: Dragonfly) -> Result<Dragonfly, ConfigError> {
    let seed = table.flag("seed", false)?;
    let usual = if seed { "blob" } else { "window" };
    let tasks = match table.text("tasks")?.unwrap_or(usual) {
        "window" => settings.tasks,
        "blob" => Tasks::Blobs,
        _ => return Err(table.wrong("tasks", "\"window\" or \"blob\"")),
    };
    let scheduling = if seed {
        Scheduling::Auto
    } else {
        settings.scheduling
    };
    Ok(Dragonfly {
        seed,
        tasks,
        scheduling,
        ..settings
    })
}

fn address_of(registry: &Registry) -> String {
    let scheme = if registry.plain_http { "http" } else { "https" };
    format!("{scheme}://{}", registry.host)
}

/// Table `proxy` of the registry's settings: a forward proxy, as Nydus v2 knows it.
pub(super) fn proxy(section: &mut Section<'_>) -> Result<Option<(Mirror, Fallback)>, ConfigError> {
    let Some(mut table) = section.section("proxy")? else {
        return Ok(None);
    };
    let url = filled(&mut table, "url")?;
    let fallback = table.flag("fallback", true)?;
    let ping_url = filled(&mut table, "ping_url")?.map(str::to_owned);
    let interval = seconds(&mut table, "check_interval")?;
    let plain = table.flag("use_http", false)?;
    // The proxy is looked at while it is believed to be ill, and only then.
    table.ignore(&["check_pause_elapsed"]);
    if filled(&mut table, "dragonfly_scheduler_endpoint")?.is_some() {
        table.warn(
            "dragonfly_scheduler_endpoint",
            "no effect: seed peers are not asked directly; name them in section `p2p`",
        );
    }
    if let Some(url) = url
        && !url.starts_with("http://")
        && !url.starts_with("https://")
    {
        return Err(table.wrong("url", "an address that starts with http:// or https://"));
    }
    section.close(table);
    Ok(url.map(|url| {
        let mut mirror = Mirror::new(url);
        mirror.upstream = Upstream::Proxy { plain };
        mirror.ping_url = ping_url;
        mirror.health_check_interval = interval.unwrap_or(mirror.health_check_interval);
        mirror.dragonfly = Some(Dragonfly {
            // What clients of Dragonfly's SDK send.
            priority_prefetch: 3,
            ..Dragonfly::default()
        });
        let who = if fallback {
            WhoFallsBack::Always
        } else {
            WhoFallsBack::Never
        };
        let fallback = Fallback {
            who,
            ..Fallback::default()
        };
        (mirror, fallback)
    }))
}
