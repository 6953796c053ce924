//! What is to be converted: the images behind the source reference, and their layers.
//!
//! Everything small is read here, before any layer: manifests and configurations.
//! So an image that cannot be converted is refused before much is transferred.

use anyhow::{Context as _, bail, ensure};
use bytes::Bytes;
use serde_json::{Map, Value};
use storage::oci::manifest::{DOCKER_CONFIG, MAX_CONFIG, OCI_CONFIG};
use storage::oci::{ContentDigest, Descriptor, Document, ImageRef, Images, Manifest, Platform};

use super::config::Config;

/// Images of one index that are converted; far above what registries hold.
const MAX_IMAGES: usize = 128;
/// The annotation by which build tools mark entries that describe other entries.
const REFERENCE_TYPE: &str = "vnd.docker.reference.type";

/// An image for one platform.
#[derive(Debug)]
pub(super) struct SourceImage {
    /// Its entry in the source's index, or what the reference resolved to.
    pub(super) entry: Descriptor,
    /// Its manifest.
    pub(super) manifest: Manifest,
    /// Its configuration.
    pub(super) config: Config,
}

impl SourceImage {
    /// The platform by the index or, without one, by the configuration.
    fn platform(&self) -> Option<Platform> {
        self.entry.platform().or_else(|| self.config.platform())
    }

    /// Its layers and the digests of their tars, lowest first.
    pub(super) fn layers(&self) -> impl Iterator<Item = (&Descriptor, &ContentDigest)> {
        self.manifest.layers.iter().zip(&self.config.diff_ids)
    }
}

/// Everything that is to be converted.
#[derive(Debug)]
pub(super) struct Plan {
    /// The images, in the order of the index.
    pub(super) images: Vec<SourceImage>,
    /// Fields of the source's index, if the result is an index too.
    pub(super) index: Option<(String, Map<String, Value>)>,
}

/// A layer that is converted once, however many images have it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct SourceLayer {
    /// Points at the stored layer.
    pub(super) descriptor: Descriptor,
    /// Digest of the tar in it.
    pub(super) diff_id: ContentDigest,
}

impl Plan {
    /// Reads what `source` names, and picks the images for `platforms`, all if there are none.
    pub(super) async fn read(
        images: &Images,
        source: &ImageRef,
        platforms: &[Platform],
    ) -> anyhow::Result<Self> {
        let (descriptor, bytes) = images.resolve().await?;
        match Document::parse(&source.to_string(), &bytes)? {
            Document::Manifest(manifest) => {
                let image = read_image(images, descriptor, manifest).await?;
                check_platform(&image, platforms)?;
                Ok(Self {
                    images: vec![image],
                    index: None,
                })
            }
            Document::Index(index) => {
                let found = read_index(images, &index.manifests, platforms).await?;
                let several = found.len() > 1;
                let media_type = descriptor.media_type;
                Ok(Self {
                    images: found,
                    index: several.then_some((media_type, index.rest)),
                })
            }
        }
    }

    /// All layers, each once, in the order in which images first use them.
    pub(super) fn layers(&self) -> anyhow::Result<Vec<SourceLayer>> {
        let mut layers: Vec<SourceLayer> = Vec::new();
        for (descriptor, diff_id) in self.images.iter().flat_map(SourceImage::layers) {
            match layers
                .iter()
                .find(|known| known.descriptor.digest == descriptor.digest)
            {
                Some(known) => ensure!(
                    known.diff_id == *diff_id && known.descriptor.size == descriptor.size,
                    "layer {} is described differently in two places",
                    descriptor.digest
                ),
                None => layers.push(SourceLayer {
                    descriptor: descriptor.clone(),
                    diff_id: diff_id.clone(),
                }),
            }
        }
        Ok(layers)
    }
}

/// Reads the images of an index that can be converted and are wanted.
async fn read_index(
    images: &Images,
    entries: &[Descriptor],
    platforms: &[Platform],
) -> anyhow::Result<Vec<SourceImage>> {
    let mut found = Vec::new();
    let mut nydus = false;
    for entry in entries {
        if let Some(reason) = unwanted(entry, platforms) {
            tracing::debug!(digest = %entry.digest, reason, "entry of the index left out");
            continue;
        }
        if entry.is_marked_nydus() {
            nydus = true;
            continue;
        }
        let bytes = images.manifest(entry).await?;
        let Document::Manifest(manifest) = Document::parse(entry.digest.as_str(), &bytes)? else {
            bail!(
                "entry {} of the index is an index again, which is not supported",
                entry.digest
            );
        };
        if !is_image(&manifest) {
            tracing::warn!(digest = %entry.digest, "entry of the index is no container image; left out");
            continue;
        }
        if manifest.is_nydus() {
            nydus = true;
            continue;
        }
        ensure!(
            found.len() < MAX_IMAGES,
            "the index has more than {MAX_IMAGES} images"
        );
        found.push(read_image(images, entry.clone(), manifest).await?);
    }
    if found.is_empty() {
        ensure!(
            !nydus,
            "the source is a Nydus image already; there is nothing to convert"
        );
        let offered: Vec<_> = entries
            .iter()
            .filter_map(Descriptor::platform)
            .map(|p| p.to_string())
            .collect();
        bail!(
            "no image for the chosen platform; there are: {}",
            offered.join(", ")
        );
    }
    Ok(found)
}

/// Why an entry of an index is passed over, if it is.
fn unwanted(entry: &Descriptor, platforms: &[Platform]) -> Option<&'static str> {
    if entry.annotation(REFERENCE_TYPE).is_some() {
        return Some("it describes another entry, which will have another digest");
    }
    match entry.platform() {
        Some(platform) if platform.os != "linux" => Some("it is not for Linux"),
        Some(platform) if !is_wanted(&platform, platforms) => Some("its platform was not chosen"),
        _ => None,
    }
}

fn is_wanted(offered: &Platform, platforms: &[Platform]) -> bool {
    platforms.is_empty() || platforms.iter().any(|wanted| wanted.accepts(offered))
}

fn check_platform(image: &SourceImage, platforms: &[Platform]) -> anyhow::Result<()> {
    match image.platform() {
        Some(offered) if !is_wanted(&offered, platforms) => {
            bail!("the image is for {offered} only, which is not the chosen platform")
        }
        _ => Ok(()),
    }
}

/// Other artifacts are stored as manifests too; their configuration gives them away.
fn is_image(manifest: &Manifest) -> bool {
    matches!(
        manifest.config.media_type.as_str(),
        OCI_CONFIG | DOCKER_CONFIG
    )
}

/// Reads the configuration and checks that the image can be converted.
async fn read_image(
    images: &Images,
    entry: Descriptor,
    manifest: Manifest,
) -> anyhow::Result<SourceImage> {
    ensure!(
        !manifest.is_nydus(),
        "the source is a Nydus image already; there is nothing to convert"
    );
    ensure!(
        is_image(&manifest),
        "manifest {} is no container image: its configuration has the type {:?}",
        entry.digest,
        manifest.config.media_type
    );
    for layer in &manifest.layers {
        ensure!(
            !layer.media_type.ends_with("+encrypted"),
            "layer {} is encrypted, which is not supported",
            layer.digest
        );
    }
    let bytes: Bytes = images.small_blob(&manifest.config, MAX_CONFIG).await?;
    let in_config = || format!("in the image configuration {}", manifest.config.digest);
    let config = Config::parse(&bytes).with_context(in_config)?;
    config
        .check_layers(manifest.layers.len())
        .with_context(in_config)?;
    Ok(SourceImage {
        entry,
        manifest,
        config,
    })
}
