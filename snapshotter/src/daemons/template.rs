//! The template of daemons' configuration: what the administrator has chosen.

use std::fs;
use std::path::Path;

use serde_json::{Map, Value, json};

use crate::error::Error;

/// The template in `path`; a registry's if there is no such file.
pub(super) fn read(path: &Path) -> Result<Map<String, Value>, Error> {
    let text = match fs::read_to_string(path) {
        Ok(text) => text,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            tracing::info!("no {}: daemons get default settings", path.display());
            DEFAULT_TEMPLATE.to_owned()
        }
        Err(error) => return Err(Error::io(path, "cannot read")(error)),
    };
    let invalid = |reason: &str| Error::Invalid(format!("{}: {reason}", path.display()));
    // Not the parser's own words: they may quote a secret.
    let Ok(Value::Object(mut template)) = serde_json::from_str(&text) else {
        return Err(invalid("is no JSON object"));
    };
    let backend = template
        .get_mut("device")
        .and_then(|device| device.get_mut("backend"))
        .and_then(Value::as_object_mut)
        .ok_or_else(|| invalid("`device.backend` is missing"))?;
    let kind = backend.get("type").cloned();
    if !matches!(
        kind.as_ref().and_then(Value::as_str),
        Some("registry" | "localfs")
    ) {
        return Err(invalid(
            "`device.backend.type` must be \"registry\" or \"localfs\"",
        ));
    }
    let config = backend
        .entry("config")
        .or_insert_with(|| json!({}))
        .as_object_mut()
        .ok_or_else(|| invalid("`device.backend.config` is no object"))?;
    for secret in ["auth", "registry_token"] {
        if config
            .remove(secret)
            .is_some_and(|value| value.as_str() != Some(""))
        {
            tracing::warn!(
                "{}: `device.backend.config.{secret}` is not used; credentials come from docker's configuration",
                path.display()
            );
        }
    }
    let cache = &mut template["device"]["cache"];
    if !cache.is_object() {
        *cache = json!({});
    }
    if !cache["config"].is_object() {
        cache["config"] = json!({});
    }
    Ok(template)
}

/// Used if there is no template.
const DEFAULT_TEMPLATE: &str = r#"{
    "device": {
        "backend": {"type": "registry", "config": {"timeout": 5, "connect_timeout": 5, "retry_limit": 4}},
        "cache": {"type": "blobcache", "config": {}}
    },
    "mode": "direct",
    "digest_validate": false,
    "enable_xattr": true
}"#;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn templates_are_checked_and_lose_their_secrets() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("template.json");
        assert!(read(&path).is_ok());
        let table = [
            ("nonsense", "no JSON"),
            ("{}", "device.backend"),
            (
                r#"{"device":{"backend":{"type":"oss","config":{}}}}"#,
                "type",
            ),
        ];
        for (text, wanted) in table {
            fs::write(&path, text).unwrap();
            let error = read(&path).unwrap_err().to_string();
            assert!(error.contains(wanted), "{text}: {error}");
        }
        fs::write(
            &path,
            r#"{"device":{"backend":{"type":"registry","config":{"auth":"c2VjcmV0"}}}}"#,
        )
        .unwrap();
        let template = read(&path).unwrap();
        assert!(!Value::Object(template).to_string().contains("c2VjcmV0"));
    }
}
