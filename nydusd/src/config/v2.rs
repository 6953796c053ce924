//! Configuration version 2, JSON or TOML: sections `backend`, `cache`, `rafs`.

use storage::gate;

use super::section::Section;
use super::{Cache, Config, ConfigError, Prefetch, backend, cache_type, driver, file_cache, p2p};

/// Largest unit of prefetching, in bytes.
const MAX_BATCH: u64 = 0x1000_0000;

/// Reads the whole file; `root` keeps the warnings.
pub(super) fn read(root: &mut Section<'_>) -> Result<Config, ConfigError> {
    root.ignore(&["version"]);
    let id = root.text("id")?.unwrap_or_default().to_owned();

    let mut section = root.required_section("backend")?;
    let (mut backend, limits) = read_backend(&mut section)?;
    root.close(section);
    p2p::read(root, &mut backend)?;

    if root.has_content("external_backends") {
        return Err(ConfigError::Unsupported {
            key: root.path_of("external_backends"),
            feature: "external blobs",
            hint: "remove the key if the image has none",
        });
    }

    let mut section = root.required_section("cache")?;
    cache_type(&mut section)?;
    // The cache holds plain data and every chunk is verified, whatever these say.
    section.ignore(&["compressed", "validate", "fscache"]);
    let cache = match section.section("filecache")? {
        Some(mut file) => {
            let cache = file_cache(&mut file)?;
            section.close(file);
            cache
        }
        None => Cache::default(),
    };
    let of_cache = prefetch(&mut section)?;
    root.close(section);

    let mut section = root.required_section("rafs")?;
    let of_rafs = rafs(&mut section)?;
    let driver = driver(&mut section)?;
    root.close(section);

    if root.section("overlay")?.is_some() {
        root.warn(
            "overlay",
            "writable mounts are not supported yet, mounting read-only",
        );
    }
    Ok(Config {
        id,
        backend,
        limits,
        cache,
        prefetch: of_rafs.or(of_cache),
        driver,
        warnings: Vec::new(),
    })
}

fn read_backend(
    section: &mut Section<'_>,
) -> Result<(super::Backend, Option<gate::Limits>), ConfigError> {
    let type_key = section.path_of("type");
    let kind = section.required_text("type")?;
    // Settings of back ends that are not chosen are nobody's business.
    section.ignore(backend::KINDS);
    let key = backend::KINDS
        .iter()
        .find(|known| **known == kind)
        .ok_or_else(|| backend::unsupported(kind, &type_key))?;
    let mut settings = section.required_section(key)?;
    let backend = backend::read(kind, &type_key, &mut settings)?;
    let limits = backend::limits(&mut settings)?;
    section.close(settings);
    Ok((backend, limits))
}

fn rafs(section: &mut Section<'_>) -> Result<Option<Prefetch>, ConfigError> {
    match section.text("mode")?.unwrap_or("direct") {
        "direct" | "cached" => {}
        _ => return Err(section.wrong("mode", "\"direct\" or \"cached\"")),
    }
    section.number("batch_size", 1 << 20, 0..=MAX_BATCH)?;
    for key in ["validate", "enable_xattr"] {
        // Both are always on: chunks are verified, attributes are served.
        section.flag(key, true)?;
    }
    for key in ["iostats_files", "access_pattern", "latest_read_files"] {
        if section.flag(key, false)? {
            section.warn(key, "access statistics are not supported yet");
        }
    }
    prefetch(section)
}

fn prefetch(section: &mut Section<'_>) -> Result<Option<Prefetch>, ConfigError> {
    let Some(mut table) = section.section("prefetch")? else {
        return Ok(None);
    };
    let enabled = table.required_flag("enable")?;
    let allowed_threads = if enabled {
        1..=1024
    } else {
        0..=u64::from(u32::MAX)
    };
    let prefetch = Prefetch {
        threads: table.number("threads", 8, allowed_threads)?,
        batch_size: table.number("batch_size", 1 << 20, 0..=MAX_BATCH)?,
        bandwidth: table.number("bandwidth_limit", 0, 0..=u64::from(u32::MAX))?,
        all: table.flag("prefetch_all", false)?,
    };
    if table.flag("stream_prefetch", false)? {
        table.warn("stream_prefetch", "no effect, the usual prefetch is done");
    }
    section.close(table);
    Ok(enabled.then_some(prefetch))
}
