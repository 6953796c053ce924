//! Images by reference: registries and OCI layouts behind one interface.
//!
//! [`ImageRef`] names an image, [`Images`] reads and writes it wherever it is:
//! manifests and indexes as exact bytes ([`manifest`]), blobs as streams
//! ([`stream`]), uploads from files or memory ([`blob_source`]). What a mount needs,
//! the manifest for a platform and the bootstrap in it, is in [`bootstrap`].
//!
//! Promises: nothing is believed before its digest and length were checked; every
//! wait has a deadline; credentials ([`credentials`]) reach no log and no error.

use bytes::{Bytes, BytesMut};

pub mod blob_source;
pub mod bootstrap;
pub mod content;
pub mod credentials;
pub mod error;
pub mod layer;
pub mod layout;
pub mod manifest;
pub mod reference;
pub mod registry;
pub mod stream;

pub use blob_source::BlobSource;
pub use content::ContentDigest;
pub use credentials::Credentials;
pub use error::OciError;
pub use manifest::{Descriptor, Document, Index, Manifest, Platform};
pub use reference::{ImageRef, LayoutRef, RegistryRef};
pub use stream::{BlobReader, BlobStream};

use layout::Layout;
use registry::Registry;
pub use registry::upload::Progress;

/// How registries are reached.
#[derive(Clone, Debug, Default)]
pub struct Access {
    /// Speak plain HTTP to registries on other machines too.
    pub plain_http: bool,
    /// Log in with these; `None` takes them from docker's configuration.
    pub credentials: Option<Credentials>,
}

/// One image's place: a repository or a layout. Cheap to clone.
#[derive(Clone, Debug)]
pub enum Images {
    /// In a registry.
    Registry(Registry),
    /// In a directory.
    Layout(Layout),
}

impl Images {
    /// Prepares access to `reference`. No manifest is read yet.
    ///
    /// # Errors
    /// [`OciError::Credentials`] if docker's configuration cannot be used.
    pub async fn open(reference: &ImageRef, access: &Access) -> Result<Self, OciError> {
        match reference {
            ImageRef::Registry(name) => Registry::open(name, access).await.map(Self::Registry),
            ImageRef::Layout(name) => Ok(Self::Layout(Layout::open(name))),
        }
    }

    /// Fetches the manifest or index that the reference names.
    ///
    /// # Errors
    /// [`OciError::NotFound`], [`OciError::Unauthorized`], [`OciError::Digest`], and
    /// whatever else fetching it may meet.
    pub async fn resolve(&self) -> Result<(Descriptor, Bytes), OciError> {
        match self {
            Self::Registry(registry) => registry.resolve().await,
            Self::Layout(layout) => {
                let descriptor = layout.resolve()?;
                let bytes = layout.read_small(&descriptor, manifest::MAX_MANIFEST)?;
                Ok((descriptor, bytes))
            }
        }
    }

    /// Fetches the manifest or index that `descriptor` points at.
    ///
    /// # Errors
    /// As [`Images::resolve`].
    pub async fn manifest(&self, descriptor: &Descriptor) -> Result<Bytes, OciError> {
        match self {
            Self::Registry(registry) => registry.manifest(descriptor).await,
            Self::Layout(layout) => layout.read_small(descriptor, manifest::MAX_MANIFEST),
        }
    }

    /// Starts reading a blob.
    ///
    /// # Errors
    /// [`OciError::NotFound`] or [`OciError::Io`] in a layout; a registry is asked when
    /// the first bytes are wanted.
    pub fn blob_stream(&self, descriptor: &Descriptor) -> Result<BlobStream, OciError> {
        match self {
            Self::Registry(registry) => Ok(BlobStream::Registry(Box::new(
                registry::download::Download::new(registry, descriptor),
            ))),
            Self::Layout(layout) => Ok(BlobStream::Layout(Box::new(layout.open_blob(descriptor)?))),
        }
    }

    /// Reads a blob of at most `limit` bytes into memory.
    ///
    /// # Errors
    /// [`OciError::TooLarge`], and as [`BlobStream::next`].
    pub async fn small_blob(&self, descriptor: &Descriptor, limit: u64) -> Result<Bytes, OciError> {
        if descriptor.size > limit {
            return Err(OciError::TooLarge {
                at: descriptor.digest.to_string(),
                limit,
            });
        }
        let mut stream = self.blob_stream(descriptor)?;
        let mut bytes = BytesMut::new();
        while let Some(piece) = stream.next().await? {
            bytes.extend_from_slice(&piece);
        }
        Ok(bytes.freeze())
    }

    /// Whether the blob is there already.
    ///
    /// # Errors
    /// What asking the registry said.
    pub async fn has_blob(&self, descriptor: &Descriptor) -> Result<bool, OciError> {
        match self {
            Self::Registry(registry) => registry.has_blob(&descriptor.digest).await,
            Self::Layout(layout) => Ok(layout.has_blob(descriptor)),
        }
    }

    /// Stores a blob; `progress` is told how many of its bytes are sent.
    ///
    /// # Errors
    /// What the registry or the file system said.
    pub async fn push_blob(
        &self,
        source: &BlobSource,
        descriptor: &Descriptor,
        progress: Progress,
    ) -> Result<(), OciError> {
        let Descriptor { digest, size, .. } = descriptor;
        match self {
            Self::Registry(registry) => registry.push_blob(source, digest, *size, progress).await,
            Self::Layout(layout) => layout.write_blob(source, digest, *size, &*progress).await,
        }
    }

    /// Stores a manifest or index that only another document points at.
    ///
    /// # Errors
    /// As [`Images::push_blob`].
    pub async fn push_manifest(
        &self,
        bytes: &Bytes,
        descriptor: &Descriptor,
    ) -> Result<(), OciError> {
        let Descriptor {
            media_type,
            digest,
            size,
            ..
        } = descriptor;
        match self {
            Self::Registry(registry) => {
                registry
                    .push_manifest(bytes, media_type, digest.as_str())
                    .await
            }
            Self::Layout(layout) => {
                let source = BlobSource::Bytes(bytes.clone());
                layout.write_blob(&source, digest, *size, &|_| {}).await
            }
        }
    }

    /// Stores a manifest or index under the name of the reference: the image exists from now on.
    ///
    /// # Errors
    /// As [`Images::push_blob`].
    pub async fn publish(&self, bytes: &Bytes, descriptor: &Descriptor) -> Result<(), OciError> {
        match self {
            Self::Registry(registry) => {
                let name = registry.name();
                let target = name.tag.as_deref().unwrap_or(descriptor.digest.as_str());
                registry
                    .push_manifest(bytes, &descriptor.media_type, target)
                    .await
            }
            Self::Layout(layout) => {
                self.push_manifest(bytes, descriptor).await?;
                layout.tag(descriptor)
            }
        }
    }
}
