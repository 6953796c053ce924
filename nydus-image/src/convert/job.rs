//! The work of a conversion: layers into the target, then what names them.
//!
//! Everything runs in one future, so dropping it (after an error, or Ctrl-C) stops all
//! transfers at once.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context as _, ensure};
use bytes::Bytes;
use futures_util::{StreamExt as _, TryStreamExt as _, stream};
use rafs::Image;
use storage::oci::{BlobSource, ContentDigest, Descriptor, Images};
use storage::{BlobFeatures, BlobInfo};

use super::layer::{self, Converted};
use super::plan::{Plan, SourceImage, SourceLayer};
use super::progress::{LayerProgress, Progress};
use super::{bootstrap, manifest};
use crate::build::BuildOptions;
use crate::pipeline::Engine;

/// A conversion at work.
pub(super) struct Job {
    pub(super) from: Images,
    pub(super) to: Images,
    pub(super) engine: Engine,
    /// How layers are built.
    pub(super) options: BuildOptions,
    /// If layers stay the data blobs and only indexes of them are made: how.
    pub(super) in_place: Option<BuildOptions>,
    /// Blobs of the chunk dictionary.
    pub(super) dictionary: Vec<BlobInfo>,
    pub(super) work_dir: PathBuf,
    pub(super) progress: Progress,
}

/// A converted layer, and whether it had to be sent.
pub(super) struct Done {
    pub(super) layer: Arc<Converted>,
    pub(super) sent: bool,
}

/// Converted layers by the digest of their source.
pub(super) type Layers = HashMap<ContentDigest, Done>;

impl Job {
    /// Converts and sends all layers, `jobs` at a time.
    pub(super) async fn convert_layers(
        &self,
        layers: Vec<SourceLayer>,
        jobs: usize,
    ) -> anyhow::Result<Layers> {
        let total = layers.len();
        let work = layers
            .into_iter()
            .enumerate()
            .map(|(index, layer)| async move {
                let digest = layer.descriptor.digest.clone();
                let done = self.convert_layer((index + 1, total), layer).await;
                let done = done.with_context(|| format!("cannot convert layer {digest}"))?;
                anyhow::Ok((digest, done))
            });
        stream::iter(work)
            .buffer_unordered(jobs)
            .try_collect()
            .await
    }

    async fn convert_layer(
        &self,
        number: (usize, usize),
        source: SourceLayer,
    ) -> anyhow::Result<Done> {
        let progress =
            self.progress
                .layer(number, &source.descriptor.digest, source.descriptor.size);
        let indexed = match &self.in_place {
            Some(options) => self.index(&source, options, &progress).await?,
            None => None,
        };
        let mut layer = match indexed {
            Some(layer) => layer,
            None => self.build(&source, &progress).await?,
        };
        let blob = blob_layer(&layer);
        // Frees the disk space as soon as the blob is sent.
        let source = BlobSource::File(layer.file.take().context("the blob is gone")?);
        let sent = self
            .send(&source, &blob, progress.sending(layer.size))
            .await?;
        progress.done(layer.size, sent);
        Ok(Done {
            layer: Arc::new(layer),
            sent,
        })
    }

    /// Stores the files of a layer anew.
    async fn build(
        &self,
        source: &SourceLayer,
        progress: &LayerProgress,
    ) -> anyhow::Result<Converted> {
        let reader = self.from.blob_stream(&source.descriptor)?.into_reader();
        let reader = progress.fetching(reader);
        let (engine, options) = (self.engine.clone(), self.options.clone());
        let (source, work_dir) = (source.clone(), self.work_dir.clone());
        let work = tokio::task::spawn_blocking(move || {
            let digests = (&source.descriptor.digest, &source.diff_id);
            layer::convert(&engine, reader, digests, &options, &work_dir)
        });
        work.await.context("the conversion crashed")?
    }

    /// Makes an index of a layer, which stays what it is, and takes it to where it is
    /// needed. `None` for the rare layer that cannot be used in place.
    async fn index(
        &self,
        source: &SourceLayer,
        options: &BuildOptions,
        progress: &LayerProgress,
    ) -> anyhow::Result<Option<Converted>> {
        let original = &source.descriptor;
        let reader = self.from.blob_stream(original)?.into_reader();
        let reader = progress.fetching(reader);
        let (engine, options) = (self.engine.clone(), options.clone());
        let work_dir = self.work_dir.clone();
        // The layer itself, if it is needed where it is not yet.
        let copy = match self.to.has_blob(original).await? {
            false => Some(Arc::new(tempfile::tempfile_in(&work_dir).with_context(
                || format!("cannot write a temporary file in {}", work_dir.display()),
            )?)),
            true => None,
        };
        let (layer, target) = (source.clone(), copy.clone());
        let work = tokio::task::spawn_blocking(move || {
            let digests = (&layer.descriptor.digest, &layer.diff_id);
            let files = (work_dir.as_path(), target.as_ref());
            layer::index(&engine, reader, digests, &options, files)
        });
        let layer = match work.await.context("the conversion crashed")? {
            Err(error) if layer::cannot_stay(&error) => {
                let reason = error.root_cause();
                progress.warn(&format!(
                    "converted, because it cannot stay as it is: {reason}"
                ));
                return Ok(None);
            }
            result => result?,
        };
        if let Some(copy) = copy {
            self.send(&BlobSource::File(copy), original, silent())
                .await?;
        }
        Ok(Some(layer))
    }

    /// Sends a blob unless the target has it. Returns whether it was sent.
    async fn send(
        &self,
        source: &BlobSource,
        blob: &Descriptor,
        progress: storage::oci::Progress,
    ) -> anyhow::Result<bool> {
        if self.to.has_blob(blob).await? {
            return Ok(false);
        }
        self.to.push_blob(source, blob, progress).await?;
        Ok(true)
    }

    /// Sends manifests and what they need, and names the result.
    pub(super) async fn publish(
        &self,
        plan: &Plan,
        layers: &Layers,
        name: Option<String>,
    ) -> anyhow::Result<Descriptor> {
        let mut entries = Vec::new();
        let mut last = None;
        for image in &plan.images {
            let (bytes, descriptor) = self
                .complete(image, layers, name.as_deref())
                .await
                .with_context(|| format!("cannot complete the image {}", image.entry.digest))?;
            if plan.index.is_some() {
                self.to.push_manifest(&bytes, &descriptor).await?;
                entries.push(manifest::index_entry(&image.entry, descriptor.clone()));
            }
            last = Some((bytes, descriptor));
        }
        let (bytes, descriptor) = match &plan.index {
            Some((media_type, rest)) => {
                let bytes = serde_json::to_vec(&manifest::index(rest, entries))?;
                let descriptor = Descriptor::of(media_type, &bytes);
                (Bytes::from(bytes), descriptor)
            }
            None => last.context("there is no image")?,
        };
        self.to.publish(&bytes, &descriptor).await?;
        Ok(descriptor)
    }

    /// Describes those of the blobs in `used` that are the dictionary's. The target must
    /// have them: what they were made from is not known here.
    async fn borrowed(
        &self,
        layers: &[Arc<Converted>],
        used: &[BlobInfo],
    ) -> anyhow::Result<Vec<Descriptor>> {
        let mut borrowed = Vec::new();
        for info in used {
            let known = self.dictionary.iter().any(|blob| blob.id == info.id);
            let own = layers
                .iter()
                .any(|layer| layer.data().hex() == info.id.as_str());
            if !known || own {
                continue;
            }
            let data: ContentDigest = format!("sha256:{}", info.id).parse()?;
            let blob = if info.features.contains(BlobFeatures::SEPARATE) {
                let index = ContentDigest::from_sha256(&info.meta_blob_digest);
                let data_layer = Descriptor::new("", data.clone(), info.compressed_size);
                self.need(&data_layer).await?;
                manifest::blob_layer(index, info.meta_blob_size, Some(&data))
            } else {
                manifest::blob_layer(data, info.compressed_size, None)
            };
            self.need(&blob).await?;
            borrowed.push(blob);
        }
        Ok(borrowed)
    }

    async fn need(&self, blob: &Descriptor) -> anyhow::Result<()> {
        ensure!(
            self.to.has_blob(blob).await?,
            "the target does not have blob {} of the chunk dictionary; put the image that the dictionary is from into the same repository",
            blob.digest
        );
        Ok(())
    }

    /// Makes and sends the bootstrap layer and the configuration of one image. Returns its
    /// manifest, which is not sent yet.
    async fn complete(
        &self,
        image: &SourceImage,
        layers: &Layers,
        name: Option<&str>,
    ) -> anyhow::Result<(Bytes, Descriptor)> {
        let converted = image
            .layers()
            .map(|(layer, _)| Some(Arc::clone(&layers.get(&layer.digest)?.layer)))
            .collect::<Option<Vec<_>>>()
            .context("a layer is missing")?;
        let options = self.in_place.as_ref().unwrap_or(&self.options).clone();
        let (packed, used) = pack(converted.clone(), options, &self.work_dir).await?;
        let borrowed = self.borrowed(&converted, &used).await?;
        let bootstrap =
            manifest::bootstrap_layer(&image.manifest, packed.digest.clone(), packed.size);
        self.send(&BlobSource::File(packed.file), &bootstrap, silent())
            .await?;

        // A blob is not compressed as a whole, so its digest is its diff_id too.
        let mut diff_ids: Vec<_> = converted.iter().map(|layer| layer.digest.clone()).collect();
        let mut list: Vec<_> = converted.iter().map(|layer| blob_layer(layer)).collect();
        for blob in borrowed {
            diff_ids.push(blob.digest.clone());
            list.push(blob);
        }
        diff_ids.push(packed.diff_id);
        let config = Bytes::from(image.config.converted(&diff_ids)?);
        list.push(bootstrap);
        let origin = (&image.entry.digest, name);
        let manifest = manifest::manifest(&image.manifest, &config, list, origin);
        self.send(&BlobSource::Bytes(config), &manifest.config, silent())
            .await?;
        let bytes = Bytes::from(serde_json::to_vec(&manifest)?);
        let descriptor = Descriptor::of(manifest::media_type(&manifest), &bytes);
        Ok((bytes, descriptor))
    }
}

/// Describes the blob of a converted layer.
fn blob_layer(layer: &Converted) -> Descriptor {
    let original = layer.in_place.then_some(&layer.source);
    manifest::blob_layer(layer.digest.clone(), layer.size, original)
}

/// Merging and packing take time, so they get a thread. Returns the blobs that the
/// bootstrap lists, too.
async fn pack(
    layers: Vec<Arc<Converted>>,
    options: BuildOptions,
    work_dir: &Path,
) -> anyhow::Result<(bootstrap::Packed, Vec<BlobInfo>)> {
    let work_dir = work_dir.to_owned();
    let work = tokio::task::spawn_blocking(move || {
        let bytes = bootstrap::merged(&layers, &options)?;
        let packed = bootstrap::pack(&bytes, &layers, &work_dir)?;
        let image = Image::from_bytes(bytes).context("cannot read the merged bootstrap")?;
        Ok((packed, image.blobs().to_vec()))
    });
    work.await.context("packing crashed")?
}

/// For small transfers that nobody watches.
fn silent() -> storage::oci::Progress {
    Arc::new(|_| ())
}
