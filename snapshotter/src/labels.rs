//! Labels of snapshots that mean something here.
//!
//! containerd passes every annotation of a layer that begins with
//! `containerd.io/snapshot/` as a label, and its CRI plugin adds some of its own.

use std::collections::BTreeMap;

/// Labels of one snapshot.
pub type Labels = BTreeMap<String, String>;

/// The chain id that a layer will be committed as; only while an image is pulled.
pub const TARGET: &str = "containerd.io/snapshot.ref";
/// Reference of the image that a layer belongs to.
pub const IMAGE_REF: &str = "containerd.io/snapshot/cri.image-ref";
/// The same, as BuildKit says it.
pub const STARGZ_REF: &str = "containerd.io/snapshot/remote/stargz.reference";
/// Digest of the layer.
pub const LAYER_DIGEST: &str = "containerd.io/snapshot/cri.layer-digest";
/// A layer with data, which is never unpacked.
pub const NYDUS_BLOB: &str = "containerd.io/snapshot/nydus-blob";
/// The layer with an image's metadata.
pub const NYDUS_BOOTSTRAP: &str = "containerd.io/snapshot/nydus-bootstrap";
/// User name for the registry.
pub const PULL_USERNAME: &str = "containerd.io/snapshot/pullusername";
/// Password for the registry.
pub const PULL_SECRET: &str = "containerd.io/snapshot/pullsecret";
/// Asks for an upper directory that need not survive a crash.
pub const VOLATILE: &str = "containerd.io/snapshot/overlay.volatile";

/// The image reference among `labels`.
#[must_use]
pub fn image_ref(labels: &Labels) -> Option<&str> {
    [IMAGE_REF, STARGZ_REF]
        .iter()
        .find_map(|key| labels.get(*key))
        .map(String::as_str)
}

/// What may be kept of `labels`: no secrets, and no empty values, which containerd
/// itself takes for absent.
#[must_use]
pub fn kept(mut labels: Labels) -> Labels {
    labels.retain(|key, value| key != PULL_SECRET && !value.is_empty());
    labels
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn secrets_are_not_kept() {
        let labels = Labels::from([
            (PULL_SECRET.to_owned(), "word".to_owned()),
            (PULL_USERNAME.to_owned(), "name".to_owned()),
            ("empty".to_owned(), String::new()),
        ]);
        assert_eq!(
            kept(labels).into_keys().collect::<Vec<_>>(),
            [PULL_USERNAME]
        );
    }
}
