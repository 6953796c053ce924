//! Manifests and indexes of converted images.
//!
//! Fields that the format does not touch are taken over. Docker manifests stay
//! Docker manifests: only a source in OCI's format becomes one.

use serde_json::{Map, Value};
use storage::oci::manifest::{
    ANNOTATION_BLOB, ANNOTATION_BOOTSTRAP, ANNOTATION_BUILDER_VERSION, ANNOTATION_FS_VERSION,
    ANNOTATION_REF, ANNOTATION_SOURCE_DIGEST, ANNOTATION_SOURCE_REFERENCE, DOCKER_LAYER_GZIP,
    DOCKER_MANIFEST, NYDUS_ARTIFACT_TYPE, NYDUS_BLOB, OCI_LAYER_GZIP, OCI_MANIFEST, annotate,
};
use storage::oci::{ContentDigest, Descriptor, Index, Manifest};

use crate::version;

/// Version of the metadata format, as annotations have it.
const FS_VERSION: &str = "6";
/// Fields of a descriptor that describe the old content.
const STALE: [&str; 3] = ["data", "urls", "artifactType"];

/// Describes a data blob as a layer.
///
/// * `original`: the layer that has the data, if the blob is its index only.
pub(super) fn blob_layer(
    digest: ContentDigest,
    size: u64,
    original: Option<&ContentDigest>,
) -> Descriptor {
    let mut layer = Descriptor::new(NYDUS_BLOB, digest, size);
    layer.annotate(ANNOTATION_BLOB, "true");
    if let Some(original) = original {
        layer.annotate(ANNOTATION_REF, original.as_str());
    }
    layer
}

/// Describes the bootstrap layer of the image converted from `source`.
pub(super) fn bootstrap_layer(source: &Manifest, digest: ContentDigest, size: u64) -> Descriptor {
    let media_type = if is_docker(source) {
        DOCKER_LAYER_GZIP
    } else {
        OCI_LAYER_GZIP
    };
    let mut layer = Descriptor::new(media_type, digest, size);
    layer.annotate(ANNOTATION_BOOTSTRAP, "true");
    layer.annotate(ANNOTATION_FS_VERSION, FS_VERSION);
    layer
}

/// The manifest of the image converted from `source`.
///
/// * `layers`: blob layers lowest first, then the bootstrap layer.
/// * `origin`: digest of the source manifest, and its reference if that is worth keeping.
pub(super) fn manifest(
    source: &Manifest,
    config: &[u8],
    layers: Vec<Descriptor>,
    origin: (&ContentDigest, Option<&str>),
) -> Manifest {
    let mut rest = source.rest.clone();
    rest.insert("schemaVersion".to_owned(), Value::from(2));
    rest.entry("mediaType")
        .or_insert_with(|| Value::from(OCI_MANIFEST));
    annotate(&mut rest, ANNOTATION_FS_VERSION, FS_VERSION);
    annotate(&mut rest, ANNOTATION_BUILDER_VERSION, version::TAG);
    annotate(&mut rest, ANNOTATION_SOURCE_DIGEST, origin.0.as_str());
    if let Some(reference) = origin.1 {
        annotate(&mut rest, ANNOTATION_SOURCE_REFERENCE, reference);
    }
    let config = replaced(
        &source.config,
        Descriptor::of(&source.config.media_type, config),
    );
    Manifest {
        config,
        layers,
        rest,
    }
}

/// The media type under which `manifest` is stored.
pub(super) fn media_type(manifest: &Manifest) -> &str {
    manifest
        .rest
        .get("mediaType")
        .and_then(Value::as_str)
        .unwrap_or(OCI_MANIFEST)
}

/// The entry for a converted manifest, in the place of `source`, its entry in the
/// source's index.
pub(super) fn index_entry(source: &Descriptor, converted: Descriptor) -> Descriptor {
    let mut entry = replaced(source, converted);
    entry
        .rest
        .insert("artifactType".to_owned(), Value::from(NYDUS_ARTIFACT_TYPE));
    entry
}

/// The index of several converted images.
pub(super) fn index(source: &Map<String, Value>, entries: Vec<Descriptor>) -> Index {
    Index {
        manifests: entries,
        rest: source.clone(),
    }
}

/// `new` with those fields of `old` that do not depend on the content.
fn replaced(old: &Descriptor, mut new: Descriptor) -> Descriptor {
    new.rest = old.rest.clone();
    for key in STALE {
        new.rest.remove(key);
    }
    new
}

fn is_docker(manifest: &Manifest) -> bool {
    manifest
        .rest
        .get("mediaType")
        .is_some_and(|kind| kind == DOCKER_MANIFEST)
}

#[cfg(test)]
mod tests {
    use serde_json::json;
    use storage::oci::Document;
    use storage::oci::manifest::{DOCKER_CONFIG, OCI_CONFIG, OCI_INDEX};

    use super::*;

    fn parse(value: &Value) -> Manifest {
        match Document::parse("x", value.to_string().as_bytes()).unwrap() {
            Document::Manifest(manifest) => manifest,
            Document::Index(_) => panic!("an index"),
        }
    }

    fn digest(byte: &str) -> ContentDigest {
        format!("sha256:{}", byte.repeat(32)).parse().unwrap()
    }

    #[test]
    fn an_oci_manifest_keeps_its_own_fields() {
        let source = parse(&json!({
            "schemaVersion": 2,
            "annotations": {"org.example": "kept"},
            "config": {"mediaType": OCI_CONFIG, "digest": digest("00"), "size": 1, "data": "e30=", "x": 1},
            "layers": [{"mediaType": OCI_LAYER_GZIP, "digest": digest("11"), "size": 9,
                        "annotations": {"toc": "of the old layer"}}],
        }));
        let layers = vec![
            blob_layer(digest("22"), 5, None),
            bootstrap_layer(&source, digest("33"), 6),
        ];
        let origin = (&digest("44"), Some("r.io/a:1"));
        let result = serde_json::to_value(manifest(&source, b"{}", layers, origin)).unwrap();
        let expected = json!({
            "schemaVersion": 2,
            "mediaType": OCI_MANIFEST,
            "annotations": {
                "org.example": "kept",
                "containerd.io/snapshot/nydus-builder-version": version::TAG,
                "containerd.io/snapshot/nydus-fs-version": "6",
                "containerd.io/snapshot/nydus-source-digest": digest("44"),
                "containerd.io/snapshot/nydus-source-reference": "r.io/a:1",
            },
            "config": {"mediaType": OCI_CONFIG, "digest": ContentDigest::of(b"{}"), "size": 2, "x": 1},
            "layers": [
                {"mediaType": "application/vnd.oci.image.layer.nydus.blob.v1", "digest": digest("22"),
                 "size": 5, "annotations": {"containerd.io/snapshot/nydus-blob": "true"}},
                {"mediaType": "application/vnd.oci.image.layer.v1.tar+gzip", "digest": digest("33"), "size": 6,
                 "annotations": {"containerd.io/snapshot/nydus-bootstrap": "true",
                                 "containerd.io/snapshot/nydus-fs-version": "6"}},
            ],
        });
        assert_eq!(result, expected);
    }

    #[test]
    fn a_docker_manifest_stays_one() {
        let source = parse(&json!({
            "schemaVersion": 2, "mediaType": DOCKER_MANIFEST, "layers": [],
            "config": {"mediaType": DOCKER_CONFIG, "digest": digest("00"), "size": 1},
        }));
        assert_eq!(
            bootstrap_layer(&source, digest("33"), 6).media_type,
            DOCKER_LAYER_GZIP
        );
        let result = manifest(&source, b"{}", vec![], (&digest("44"), None));
        assert_eq!(media_type(&result), DOCKER_MANIFEST);
        assert_eq!(result.config.media_type, DOCKER_CONFIG);
    }

    #[test]
    fn index_entries_keep_their_platform() {
        let mut source = Descriptor::new(OCI_MANIFEST, digest("00"), 1);
        let platform =
            json!({"os": "linux", "architecture": "arm", "variant": "v7", "os.features": ["f"]});
        source.rest.insert("platform".to_owned(), platform.clone());
        source.rest.insert("data".to_owned(), json!("e30="));
        let entry = index_entry(&source, Descriptor::new(OCI_MANIFEST, digest("11"), 2));
        assert!(entry.is_marked_nydus());
        let rest = Map::from_iter([
            ("mediaType".to_owned(), json!(OCI_INDEX)),
            ("schemaVersion".to_owned(), json!(2)),
        ]);
        let expected = json!({
            "schemaVersion": 2, "mediaType": OCI_INDEX,
            "manifests": [{"mediaType": OCI_MANIFEST, "digest": digest("11"), "size": 2, "platform": platform,
                           "artifactType": "application/vnd.nydus.image.manifest.v1+json"}],
        });
        assert_eq!(
            serde_json::to_value(index(&rest, vec![entry])).unwrap(),
            expected
        );
    }
}
