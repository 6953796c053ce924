//! Writes images as an OCI layout: a directory with `index.json` and blobs named
//! by their SHA-256.

use std::fs::{self, File};
use std::io::{self, BufReader, BufWriter, Read, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use flate2::write::GzEncoder;
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};

use crate::tree::describe::hex;

const INDEX: &str = "application/vnd.oci.image.index.v1+json";
const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
const CONFIG: &str = "application/vnd.oci.image.config.v1+json";
const LAYER: &str = "application/vnd.oci.image.layer.v1.tar";

/// One image for one platform.
#[derive(Clone, Debug)]
pub struct Image {
    /// Uncompressed tars, lowest first, each with the words of its history entry.
    pub layers: Vec<(PathBuf, String)>,
    /// CPU architecture in Go's words, like `amd64`.
    pub architecture: String,
    /// The `config` object of the image configuration.
    pub config: Value,
    /// Whether layers are gzipped.
    pub gzip: bool,
}

impl Image {
    /// An image of gzipped `layers` for this kind of machine.
    #[must_use]
    pub fn new(layers: &[&Path]) -> Self {
        let layers = layers
            .iter()
            .map(|path| (path.to_path_buf(), "layer".to_owned()));
        let architecture = match std::env::consts::ARCH {
            "x86_64" => "amd64",
            "aarch64" => "arm64",
            other => other,
        };
        Self {
            layers: layers.collect(),
            architecture: architecture.to_owned(),
            config: json!({"Env": ["PATH=/usr/sbin:/usr/bin:/sbin:/bin"], "Cmd": ["sh"]}),
            gzip: true,
        }
    }
}

/// Writes a layout to the new directory `at` in which `tag` names `images`: the
/// manifest itself if there is one, an index of them otherwise.
///
/// # Errors
/// A tar cannot be read, or the disk is full.
pub fn write(at: &Path, tag: &str, images: &[Image]) -> Result<()> {
    let layout = Layout {
        blobs: at.join("blobs/sha256"),
    };
    fs::create_dir_all(&layout.blobs).with_context(|| format!("cannot make {}", at.display()))?;
    fs::write(at.join("oci-layout"), r#"{"imageLayoutVersion":"1.0.0"}"#)?;
    let mut manifests = images
        .iter()
        .map(|i| layout.image(i))
        .collect::<Result<Vec<_>>>()?;
    let mut top = match manifests.as_mut_slice() {
        [only] => only.take(),
        _ => layout.json(
            INDEX,
            &json!({"schemaVersion": 2, "mediaType": INDEX, "manifests": manifests}),
        )?,
    };
    top["annotations"] = json!({"org.opencontainers.image.ref.name": tag});
    let index = json!({"schemaVersion": 2, "mediaType": INDEX, "manifests": [top]});
    fs::write(at.join("index.json"), index.to_string())?;
    Ok(())
}

struct Layout {
    blobs: PathBuf,
}

impl Layout {
    /// Writes one image; returns the descriptor of its manifest.
    fn image(&self, image: &Image) -> Result<Value> {
        let (mut layers, mut diff_ids, mut history) = (Vec::new(), Vec::new(), Vec::new());
        for (tar, words) in &image.layers {
            let (descriptor, diff_id) = self.layer(tar, image.gzip)?;
            layers.push(descriptor);
            diff_ids.push(diff_id);
            history.push(json!({"created": "1970-01-01T00:00:00Z", "created_by": words}));
        }
        let config = self.json(
            CONFIG,
            &json!({
                "architecture": image.architecture,
                "os": "linux",
                "config": image.config,
                "rootfs": {"type": "layers", "diff_ids": diff_ids},
                "history": history,
            }),
        )?;
        let mut manifest = self.json(
            MANIFEST,
            &json!({"schemaVersion": 2, "mediaType": MANIFEST, "config": config, "layers": layers}),
        )?;
        manifest["platform"] = json!({"os": "linux", "architecture": image.architecture});
        Ok(manifest)
    }

    /// Writes one layer; returns its descriptor and the digest of the plain tar.
    fn layer(&self, tar: &Path, gzip: bool) -> Result<(Value, String)> {
        let file = File::open(tar).with_context(|| format!("cannot open {}", tar.display()))?;
        let mut plain = Hashing::new(BufReader::with_capacity(1 << 20, file));
        let partial = self.blobs.join("partial");
        let mut stored = Hashing::new(BufWriter::new(File::create(&partial)?));
        let media_type = if gzip {
            let mut encoder = GzEncoder::new(&mut stored, flate2::Compression::default());
            io::copy(&mut plain, &mut encoder)?;
            encoder.finish()?;
            format!("{LAYER}+gzip")
        } else {
            io::copy(&mut plain, &mut stored)?;
            LAYER.to_owned()
        };
        stored.flush()?;
        let (digest, size) = stored.finish();
        fs::rename(partial, self.blobs.join(&digest))?;
        Ok((
            descriptor(&media_type, &digest, size),
            format!("sha256:{}", plain.finish().0),
        ))
    }

    fn json(&self, media_type: &str, value: &Value) -> Result<Value> {
        let bytes = value.to_string().into_bytes();
        let digest = hex(&Sha256::digest(&bytes));
        fs::write(self.blobs.join(&digest), &bytes)?;
        Ok(descriptor(media_type, &digest, u64::try_from(bytes.len())?))
    }
}

fn descriptor(media_type: &str, digest: &str, size: u64) -> Value {
    json!({"mediaType": media_type, "digest": format!("sha256:{digest}"), "size": size})
}

/// Counts and hashes what passes.
struct Hashing<T> {
    inner: T,
    hash: Sha256,
    size: u64,
}

impl<T> Hashing<T> {
    fn new(inner: T) -> Self {
        Self {
            inner,
            hash: Sha256::new(),
            size: 0,
        }
    }

    fn pass(&mut self, bytes: &[u8]) {
        self.hash.update(bytes);
        self.size = self
            .size
            .saturating_add(u64::try_from(bytes.len()).unwrap_or(u64::MAX));
    }

    /// Digest in hexadecimal, and size.
    fn finish(self) -> (String, u64) {
        (hex(&self.hash.finalize()), self.size)
    }
}

impl<R: Read> Read for Hashing<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.inner.read(buffer)?;
        self.pass(&buffer[..count]);
        Ok(count)
    }
}

impl<W: Write> Write for Hashing<W> {
    fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
        let count = self.inner.write(buffer)?;
        self.pass(&buffer[..count]);
        Ok(count)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.inner.flush()
    }
}
