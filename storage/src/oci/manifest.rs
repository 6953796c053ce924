//! Manifests, indexes and the descriptors in them, as far as lazy loading needs.
//!
//! Documents are kept as JSON next to the few typed fields, so that fields and
//! annotations that this code does not know survive being rewritten. What makes an
//! image a Nydus image is in `docs/format-image.md`.
#![forbid(unsafe_code)]

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::content::ContentDigest;
use super::error::OciError;

/// Largest manifest, index or layout index accepted, in bytes: the size registries accept.
pub const MAX_MANIFEST: u64 = 4 << 20;
/// Largest image configuration accepted, in bytes.
pub const MAX_CONFIG: u64 = 8 << 20;

/// Media type of a layer that is a Nydus data blob.
pub const NYDUS_BLOB: &str = "application/vnd.oci.image.layer.nydus.blob.v1";
/// `artifactType` of a Nydus manifest in an index.
pub const NYDUS_ARTIFACT_TYPE: &str = "application/vnd.nydus.image.manifest.v1+json";
/// Older mark of a Nydus manifest in an index: a platform OS feature.
pub const NYDUS_OS_FEATURE: &str = "nydus.remoteimage.v1";
/// Annotation of a layer that is a Nydus data blob.
pub const ANNOTATION_BLOB: &str = "containerd.io/snapshot/nydus-blob";
/// Marks a layer that is the index of a layer used in place: its digest.
pub const ANNOTATION_REF: &str = "containerd.io/snapshot/nydus-ref";
/// Annotation of the layer that holds the bootstrap.
pub const ANNOTATION_BOOTSTRAP: &str = "containerd.io/snapshot/nydus-bootstrap";
/// Annotation with the RAFS version, on the bootstrap layer and on the manifest.
pub const ANNOTATION_FS_VERSION: &str = "containerd.io/snapshot/nydus-fs-version";
/// Annotation of a manifest: digest of the image it was converted from.
pub const ANNOTATION_SOURCE_DIGEST: &str = "containerd.io/snapshot/nydus-source-digest";
/// Annotation of a manifest: reference of the image it was converted from.
pub const ANNOTATION_SOURCE_REFERENCE: &str = "containerd.io/snapshot/nydus-source-reference";
/// Annotation of a manifest: version of the converter.
pub const ANNOTATION_BUILDER_VERSION: &str = "containerd.io/snapshot/nydus-builder-version";
/// Name of an image in a layout.
pub const ANNOTATION_REF_NAME: &str = "org.opencontainers.image.ref.name";

/// Media type of an OCI image manifest.
pub const OCI_MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
/// Media type of an OCI image index.
pub const OCI_INDEX: &str = "application/vnd.oci.image.index.v1+json";
/// Media type of an OCI image configuration.
pub const OCI_CONFIG: &str = "application/vnd.oci.image.config.v1+json";
/// Media type of a gzip-compressed OCI layer.
pub const OCI_LAYER_GZIP: &str = "application/vnd.oci.image.layer.v1.tar+gzip";
/// Media type of a Docker image manifest.
pub const DOCKER_MANIFEST: &str = "application/vnd.docker.distribution.manifest.v2+json";
/// Media type of a Docker manifest list.
pub const DOCKER_INDEX: &str = "application/vnd.docker.distribution.manifest.list.v2+json";
/// Media type of a Docker image configuration.
pub const DOCKER_CONFIG: &str = "application/vnd.docker.container.image.v1+json";
/// Media type of a gzip-compressed Docker layer.
pub const DOCKER_LAYER_GZIP: &str = "application/vnd.docker.image.rootfs.diff.tar.gzip";

/// Media types that a request for a manifest accepts.
pub const ACCEPTED: [&str; 4] = [OCI_MANIFEST, OCI_INDEX, DOCKER_MANIFEST, DOCKER_INDEX];

/// Points at an object: what it is, which bytes, how many.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Descriptor {
    /// What the object is.
    #[serde(default)]
    pub media_type: String,
    /// Which bytes.
    pub digest: ContentDigest,
    /// How many bytes.
    pub size: u64,
    /// All other fields: `annotations`, `platform`, `urls`, …
    #[serde(flatten)]
    pub rest: Map<String, Value>,
}

impl Descriptor {
    /// A descriptor without further fields.
    #[must_use]
    pub fn new(media_type: &str, digest: ContentDigest, size: u64) -> Self {
        Self {
            media_type: media_type.to_owned(),
            digest,
            size,
            rest: Map::new(),
        }
    }

    /// Describes `bytes`.
    #[must_use]
    pub fn of(media_type: &str, bytes: &[u8]) -> Self {
        Self::new(
            media_type,
            ContentDigest::of(bytes),
            super::content::byte_len(bytes),
        )
    }

    /// Value of an annotation.
    #[must_use]
    pub fn annotation(&self, key: &str) -> Option<&str> {
        self.rest.get("annotations")?.get(key)?.as_str()
    }

    /// Sets an annotation.
    pub fn annotate(&mut self, key: &str, value: &str) {
        annotate(&mut self.rest, key, value);
    }

    /// The platform, if the descriptor has a well-formed one.
    #[must_use]
    pub fn platform(&self) -> Option<Platform> {
        Platform::from_json(self.rest.get("platform")?)
    }

    /// Whether the object is an index; its media type decides.
    #[must_use]
    pub fn is_index(&self) -> bool {
        matches!(self.media_type.as_str(), OCI_INDEX | DOCKER_INDEX)
    }

    /// Whether an index entry is marked as a Nydus manifest.
    #[must_use]
    pub fn is_marked_nydus(&self) -> bool {
        let feature = || {
            let features = self.rest.get("platform")?.get("os.features")?.as_array()?;
            Some(features.iter().any(|feature| feature == NYDUS_OS_FEATURE))
        };
        self.rest
            .get("artifactType")
            .is_some_and(|kind| kind == NYDUS_ARTIFACT_TYPE)
            || feature().unwrap_or(false)
    }
}

/// Sets one annotation in the object `fields`.
pub fn annotate(fields: &mut Map<String, Value>, key: &str, value: &str) {
    let annotations = fields
        .entry("annotations")
        .or_insert_with(|| Value::Object(Map::new()));
    if !annotations.is_object() {
        *annotations = Value::Object(Map::new());
    }
    if let Some(annotations) = annotations.as_object_mut() {
        annotations.insert(key.to_owned(), Value::from(value));
    }
}

/// A manifest or an index.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Document {
    /// One image for one platform.
    Manifest(Manifest),
    /// Images for several platforms.
    Index(Index),
}

/// An image manifest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Manifest {
    /// The image configuration.
    pub config: Descriptor,
    /// Layers, lowest first.
    pub layers: Vec<Descriptor>,
    /// All other fields.
    #[serde(flatten)]
    pub rest: Map<String, Value>,
}

/// An image index (manifest list).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Index {
    /// One entry per manifest.
    pub manifests: Vec<Descriptor>,
    /// All other fields.
    #[serde(flatten)]
    pub rest: Map<String, Value>,
}

impl Document {
    /// Reads a manifest or an index; `at` names it in errors.
    ///
    /// # Errors
    /// [`OciError::Malformed`] for anything that is neither.
    pub fn parse(at: &str, bytes: &[u8]) -> Result<Self, OciError> {
        let malformed = |reason: &dyn fmt::Display| OciError::malformed(at, reason);
        let fields: Map<String, Value> = serde_json::from_slice(bytes)
            .map_err(|err| malformed(&format_args!("no manifest: {err}")))?;
        match fields.get("schemaVersion").and_then(Value::as_u64) {
            Some(2) => {}
            Some(1) => {
                return Err(malformed(
                    &"a Docker schema 1 manifest, which is too old; push the image again",
                ));
            }
            _ => return Err(malformed(&"no manifest: schemaVersion is missing")),
        }
        let value = Value::Object(fields);
        if value.get("manifests").is_some() && value.get("layers").is_none() {
            let index = serde_json::from_value(value)
                .map_err(|err| malformed(&format_args!("no index: {err}")))?;
            return Ok(Self::Index(index));
        }
        let manifest = serde_json::from_value(value)
            .map_err(|err| malformed(&format_args!("no image manifest: {err}")))?;
        Ok(Self::Manifest(manifest))
    }
}

impl Manifest {
    /// The layer with the bootstrap, if this is a Nydus image: the last layer, by its annotation.
    #[must_use]
    pub fn bootstrap_layer(&self) -> Option<&Descriptor> {
        let last = self.layers.last()?;
        (last.annotation(ANNOTATION_BOOTSTRAP) == Some("true")).then_some(last)
    }

    /// Whether any layer belongs to a Nydus image.
    #[must_use]
    pub fn is_nydus(&self) -> bool {
        self.layers.iter().any(|layer| {
            layer.media_type == NYDUS_BLOB
                || layer.annotation(ANNOTATION_BOOTSTRAP).is_some()
                || layer.annotation(ANNOTATION_BLOB).is_some()
        })
    }
}

/// Operating system and processor that an image is for.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Platform {
    /// `linux`, …
    pub os: String,
    /// Architecture in Go's words: `amd64`, `arm64`, …
    pub architecture: String,
    /// `v7`, `v8`, …; `None` means any when asked for.
    pub variant: Option<String>,
}

impl Platform {
    /// The platform of this machine.
    #[must_use]
    pub fn host() -> Self {
        let architecture = match std::env::consts::ARCH {
            "x86_64" => "amd64",
            "aarch64" => "arm64",
            "x86" => "386",
            other => other,
        };
        Self {
            os: "linux".to_owned(),
            architecture: architecture.to_owned(),
            variant: None,
        }
    }

    /// Reads `os`, `architecture` and `variant` of a platform object or an image configuration.
    #[must_use]
    pub fn from_json(value: &Value) -> Option<Self> {
        let text = |key: &str| value.get(key)?.as_str().filter(|text| !text.is_empty());
        Some(Self {
            os: text("os")?.to_owned(),
            architecture: text("architecture")?.to_owned(),
            variant: text("variant").map(str::to_owned),
        })
    }

    /// As a platform object.
    #[must_use]
    pub fn to_json(&self) -> Value {
        let mut fields = Map::new();
        fields.insert(
            "architecture".to_owned(),
            Value::from(self.architecture.as_str()),
        );
        fields.insert("os".to_owned(), Value::from(self.os.as_str()));
        if let Some(variant) = &self.variant {
            fields.insert("variant".to_owned(), Value::from(variant.as_str()));
        }
        Value::Object(fields)
    }

    /// Whether an image for `offered` is what `self` asks for.
    #[must_use]
    pub fn accepts(&self, offered: &Self) -> bool {
        // arm64 has only one variant in practice, and images often leave it out.
        let default = |platform: &Self| match (platform.architecture.as_str(), &platform.variant) {
            ("arm64", None) => Some("v8".to_owned()),
            (_, variant) => variant.clone(),
        };
        self.os == offered.os
            && self.architecture == offered.architecture
            && (self.variant.is_none() || default(self) == default(offered))
    }
}

impl FromStr for Platform {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut parts = text.split('/');
        let (Some(os), Some(architecture), variant, None) =
            (parts.next(), parts.next(), parts.next(), parts.next())
        else {
            return Err(
                "os/architecture[/variant] is expected, for example linux/amd64".to_owned(),
            );
        };
        if os.is_empty() || architecture.is_empty() || variant.is_some_and(str::is_empty) {
            return Err("os/architecture[/variant] has an empty part".to_owned());
        }
        Ok(Self {
            os: os.to_owned(),
            architecture: architecture.to_owned(),
            variant: variant.map(str::to_owned),
        })
    }
}

impl fmt::Display for Platform {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.os, self.architecture)?;
        match &self.variant {
            Some(variant) => write!(f, "/{variant}"),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn digest() -> String {
        format!("sha256:{}", "0".repeat(64))
    }

    #[test]
    fn unknown_fields_survive() {
        let json = json!({
            "schemaVersion": 2, "x-top": [1], "annotations": {"a": "b"},
            "config": {"mediaType": OCI_CONFIG, "digest": digest(), "size": 2, "data": "e30="},
            "layers": [{"mediaType": "m", "digest": digest(), "size": 3, "annotations": {"k": "v"}}],
        });
        let Document::Manifest(manifest) =
            Document::parse("x", json.to_string().as_bytes()).unwrap()
        else {
            panic!("a manifest")
        };
        assert_eq!(manifest.layers[0].annotation("k"), Some("v"));
        assert!(!manifest.is_nydus());
        assert_eq!(serde_json::to_value(&manifest).unwrap(), json);
    }

    #[test]
    fn documents_that_are_no_manifests_are_refused() {
        for bad in [
            "",
            "[]",
            "{}",
            "{\"schemaVersion\":1}",
            "{\"schemaVersion\":2}",
            "{\"schemaVersion\":2,\"manifests\":{}}",
            "{\"schemaVersion\":2,\"manifests\":[{\"digest\":\"sha256:00\",\"size\":1}]}",
            "{\"schemaVersion\":2,\"layers\":[],\"config\":{\"digest\":\"x\"}}",
        ] {
            assert!(
                matches!(
                    Document::parse("x", bad.as_bytes()),
                    Err(OciError::Malformed { .. })
                ),
                "{bad}"
            );
        }
    }

    #[test]
    fn a_nydus_manifest_is_recognised_by_its_last_layer() {
        let mut blob = Descriptor::of(NYDUS_BLOB, b"b");
        blob.annotate(ANNOTATION_BLOB, "true");
        let mut bootstrap = Descriptor::of(OCI_LAYER_GZIP, b"m");
        bootstrap.annotate(ANNOTATION_BOOTSTRAP, "true");
        let config = Descriptor::of(OCI_CONFIG, b"{}");
        let mut manifest = Manifest {
            config,
            layers: vec![blob, bootstrap.clone()],
            rest: Map::new(),
        };
        assert_eq!(manifest.bootstrap_layer(), Some(&bootstrap));
        manifest.layers.reverse();
        assert_eq!(manifest.bootstrap_layer(), None);
        assert!(manifest.is_nydus());
    }

    #[test]
    fn platforms_match_as_container_tools_do() {
        let platform = |text: &str| text.parse::<Platform>().unwrap();
        assert!(platform("linux/amd64").accepts(&platform("linux/amd64")));
        assert!(platform("linux/arm64").accepts(&platform("linux/arm64/v8")));
        assert!(platform("linux/arm64/v8").accepts(&platform("linux/arm64")));
        assert!(!platform("linux/arm/v7").accepts(&platform("linux/arm/v6")));
        assert!(!platform("linux/arm/v7").accepts(&platform("linux/arm")));
        assert!(!platform("linux/amd64").accepts(&platform("windows/amd64")));
        for bad in ["", "linux", "linux/", "linux/arm/", "a/b/c/d"] {
            assert!(bad.parse::<Platform>().is_err(), "{bad}");
        }
    }
}
