//! The image configuration, of which only `rootfs.diff_ids` and `history` change.
//!
//! All other fields keep their bytes: they are carried as raw JSON, in their order.

use anyhow::{Context as _, ensure};
use serde::de::{MapAccess, Visitor};
use serde::ser::SerializeMap as _;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use serde_json::value::{RawValue, to_raw_value};
use storage::oci::{ContentDigest, Platform};

/// `created_by` of the history entry for the bootstrap layer. Reverse conversions look
/// for exactly this text.
const CREATED_BY: &str = "Nydus Converter";
/// `comment` of that entry, likewise.
const COMMENT: &str = "Nydus Bootstrap Layer";

/// A parsed configuration.
#[derive(Debug, Clone)]
pub(super) struct Config {
    fields: RawObject,
    rootfs: RawObject,
    /// Digests of the uncompressed layers, lowest first.
    pub(super) diff_ids: Vec<ContentDigest>,
}

impl Config {
    /// Reads a configuration.
    pub(super) fn parse(bytes: &[u8]) -> anyhow::Result<Self> {
        let fields: RawObject = serde_json::from_slice(bytes).context("it is no JSON object")?;
        let rootfs = fields
            .get("rootfs")
            .context("it has no rootfs: this is no container image")?;
        let rootfs: RawObject =
            serde_json::from_str(rootfs.get()).context("rootfs is no object")?;
        let diff_ids = rootfs
            .get("diff_ids")
            .context("it has no rootfs.diff_ids")?;
        let diff_ids = serde_json::from_str(diff_ids.get()).context("rootfs.diff_ids")?;
        Ok(Self {
            fields,
            rootfs,
            diff_ids,
        })
    }

    /// What the image is for, as far as the configuration says it.
    pub(super) fn platform(&self) -> Option<Platform> {
        let text = |key: &str| -> Option<String> {
            let value = serde_json::from_str::<String>(self.fields.get(key)?.get()).ok()?;
            Some(value).filter(|value| !value.is_empty())
        };
        Some(Platform {
            os: text("os")?,
            architecture: text("architecture")?,
            variant: text("variant"),
        })
    }

    /// The configuration of the converted image.
    ///
    /// * `diff_ids`: of all layers of the converted image, the bootstrap last.
    pub(super) fn converted(&self, diff_ids: &[ContentDigest]) -> anyhow::Result<Vec<u8>> {
        let mut history: Vec<Box<RawValue>> = match self.fields.get("history") {
            Some(history) if history.get() != "null" => {
                serde_json::from_str(history.get()).context("history is no list")?
            }
            _ => Vec::new(),
        };
        let entry = serde_json::json!({ "comment": COMMENT, "created_by": CREATED_BY });
        history.push(to_raw_value(&entry)?);
        let mut rootfs = self.rootfs.clone();
        rootfs.set("diff_ids", to_raw_value(diff_ids)?);
        let mut fields = self.fields.clone();
        fields.set("rootfs", to_raw_value(&rootfs)?);
        fields.set("history", to_raw_value(&history)?);
        Ok(serde_json::to_vec(&fields)?)
    }

    /// Refuses a configuration that does not fit a manifest with `layers` layers.
    pub(super) fn check_layers(&self, layers: usize) -> anyhow::Result<()> {
        let listed = self.diff_ids.len();
        ensure!(
            listed == layers,
            "it lists {listed} layers, but the manifest has {layers}"
        );
        Ok(())
    }
}

/// A JSON object whose values keep their bytes.
#[derive(Debug, Clone, Default)]
struct RawObject(Vec<(String, Box<RawValue>)>);

impl RawObject {
    /// As for every reader of JSON, the last of several fields of one name counts.
    fn get(&self, key: &str) -> Option<&RawValue> {
        self.0
            .iter()
            .rev()
            .find(|(name, _)| name == key)
            .map(|(_, value)| &**value)
    }

    /// Replaces the value in its place, or adds the field at the end.
    fn set(&mut self, key: &str, value: Box<RawValue>) {
        match self.0.iter_mut().rev().find(|(name, _)| name == key) {
            Some((_, old)) => *old = value,
            None => self.0.push((key.to_owned(), value)),
        }
    }
}

impl<'de> Deserialize<'de> for RawObject {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Fields;
        impl<'de> Visitor<'de> for Fields {
            type Value = RawObject;

            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<RawObject, A::Error> {
                let mut fields = Vec::new();
                while let Some(field) = map.next_entry()? {
                    fields.push(field);
                }
                Ok(RawObject(fields))
            }
        }
        deserializer.deserialize_map(Fields)
    }
}

impl Serialize for RawObject {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(Some(self.0.len()))?;
        for (key, value) in &self.0 {
            map.serialize_entry(key, value)?;
        }
        map.end()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn digest(byte: &str) -> ContentDigest {
        format!("sha256:{}", byte.repeat(32)).parse().unwrap()
    }

    #[test]
    fn only_layers_and_history_change() {
        let source = format!(
            concat!(
                r#"{{"z":1.0,"os":"linux","architecture":"arm","variant":"v7","#,
                r#""config":{{"Env":["A=b"], "ArgsEscaped" :true,"n":18446744073709551616}},"#,
                r#""rootfs":{{"type":"layers","diff_ids":["{a}"],"x":null}},"#,
                r#""history":[{{"created":"2020-01-01T00:00:00Z","empty_layer":true}}],"a":[]}}"#
            ),
            a = digest("aa"),
        );
        let config = Config::parse(source.as_bytes()).unwrap();
        assert_eq!(config.platform().unwrap().to_string(), "linux/arm/v7");
        assert!(config.check_layers(1).is_ok());
        assert!(config.check_layers(2).is_err());
        let converted = config.converted(&[digest("bb"), digest("cc")]).unwrap();
        let expected = source
            .replace(
                &format!(r#"["{}"]"#, digest("aa")),
                &format!(r#"["{}","{}"]"#, digest("bb"), digest("cc")),
            )
            .replace(
                r#""empty_layer":true}]"#,
                r#""empty_layer":true},{"comment":"Nydus Bootstrap Layer","created_by":"Nydus Converter"}]"#,
            );
        assert_eq!(String::from_utf8(converted).unwrap(), expected);
    }

    #[test]
    fn a_missing_history_is_begun() {
        for history in ["", r#","history":null"#, r#","history":[]"#] {
            let source = format!(r#"{{"rootfs":{{"type":"layers","diff_ids":[]}}{history}}}"#);
            let converted = Config::parse(source.as_bytes())
                .unwrap()
                .converted(&[])
                .unwrap();
            let value: serde_json::Value = serde_json::from_slice(&converted).unwrap();
            assert_eq!(value["history"].as_array().unwrap().len(), 1);
        }
    }

    #[test]
    fn what_is_no_configuration_is_refused() {
        for bad in [
            "",
            "[]",
            "{}",
            r#"{"rootfs":1}"#,
            r#"{"rootfs":{"diff_ids":["x"]}}"#,
        ] {
            assert!(Config::parse(bad.as_bytes()).is_err(), "{bad}");
        }
    }
}
