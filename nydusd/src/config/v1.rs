//! Configuration version 1, JSON only: `device.backend`, `device.cache` and
//! file-system settings at the top level. What production clients send.

use super::section::Section;
use super::{Config, ConfigError, Prefetch, backend, cache_type, driver, file_cache, p2p};

/// Largest unit of reading ahead, in bytes.
const MAX_BATCH: u64 = 0x1000_0000;

/// Reads the whole file; `root` keeps the warnings.
pub(super) fn read(root: &mut Section<'_>) -> Result<Config, ConfigError> {
    let mut device = root.required_section("device")?;
    let id = device.text("id")?.unwrap_or_default().to_owned();

    let mut section = device.required_section("backend")?;
    let type_key = section.path_of("type");
    let kind = section.required_text("type")?;
    let mut settings = section.required_section("config")?;
    let mut backend = backend::read(kind, &type_key, &mut settings)?;
    let limits = backend::limits(&mut settings)?;
    section.close(settings);
    device.close(section);
    p2p::read(root, &mut backend)?;

    if device.has_content("external_backends") {
        return Err(ConfigError::Unsupported {
            key: device.path_of("external_backends"),
            feature: "external blobs",
            hint: "remove the key if the image has none",
        });
    }

    let mut section = device.required_section("cache")?;
    cache_type(&mut section)?;
    // The cache holds plain data and every chunk is verified, whatever these say.
    section.ignore(&["compressed", "validate"]);
    let mut file = section.required_section("config")?;
    let cache = file_cache(&mut file)?;
    section.close(file);
    device.close(section);
    root.close(device);

    top_level(root)?;
    let prefetch = prefetch(root)?;
    let driver = driver(root)?;
    Ok(Config {
        id,
        backend,
        limits,
        cache,
        prefetch,
        driver,
        warnings: Vec::new(),
    })
}

fn top_level(root: &mut Section<'_>) -> Result<(), ConfigError> {
    match root.required_text("mode")? {
        "direct" | "cached" => {}
        _ => return Err(root.wrong("mode", "\"direct\" or \"cached\"")),
    }
    root.number("amplify_io", 1 << 20, 0..=MAX_BATCH)?;
    for key in ["digest_validate", "enable_xattr"] {
        // Both are always on: chunks are verified, attributes are served.
        root.flag(key, true)?;
    }
    for key in ["iostats_files", "access_pattern", "latest_read_files"] {
        if root.flag(key, false)? {
            root.warn(key, "access statistics are not supported yet");
        }
    }
    Ok(())
}

fn prefetch(root: &mut Section<'_>) -> Result<Option<Prefetch>, ConfigError> {
    let Some(mut table) = root.section("fs_prefetch")? else {
        return Ok(None);
    };
    let enabled = table.flag("enable", false)?;
    let allowed_threads = if enabled {
        1..=1024
    } else {
        0..=u64::from(u32::MAX)
    };
    let prefetch = Prefetch {
        threads: table.number("threads_count", 8, allowed_threads)?,
        batch_size: table.number("merging_size", 1 << 20, 0..=MAX_BATCH)?,
        bandwidth: table.number("bandwidth_rate", 0, 0..=u64::from(u32::MAX))?,
        all: table.flag("prefetch_all", true)?,
    };
    if table.flag("stream_prefetch", false)? {
        table.warn("stream_prefetch", "no effect, the usual prefetch is done");
    }
    root.close(table);
    Ok(enabled.then_some(prefetch))
}
