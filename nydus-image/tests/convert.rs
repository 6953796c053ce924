//! `nydus-image convert` from layout to layout, against a plain model of layers.
//!
//! The model applies layers to a map of paths, as the image specification says. The
//! converted image is read back the long way: index, manifest, bootstrap layer,
//! bootstrap, chunks, blobs.
#![allow(
    clippy::unwrap_used,
    reason = "a test fails by panicking, in helpers too"
)]

use std::collections::BTreeMap;
use std::io::{Read as _, Write as _};
use std::path::Path;
use std::process::{Command, Output};

use rafs::tree::Content;
use rafs::{Image, Tree};
use serde_json::{Value, json};
use storage::oci::{ContentDigest, Descriptor, bootstrap};
use storage::{Compressor, codec};

/// One entry of a layer: path, what it is, permissions.
type Entry = (&'static str, Kind, u16);

#[derive(Clone, Debug, PartialEq, Eq)]
enum Kind {
    Directory,
    File(Vec<u8>),
    Symlink(&'static str),
    HardLink(&'static str),
}

use Kind::{Directory, File, HardLink, Symlink};

fn file(text: &str) -> Kind {
    File(text.as_bytes().to_vec())
}

/// Bytes that do not compress, different for every seed.
fn noise(seed: u64, len: usize) -> Kind {
    let mut state = seed | 1;
    let next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()
    };
    File(std::iter::repeat_with(next).flatten().take(len).collect())
}

/// Layers that use every rule: replacing, whiteouts, opaque directories, changes of type.
fn layers() -> Vec<Vec<Entry>> {
    vec![
        vec![
            ("etc", Directory, 0o755),
            ("etc/changed", file("old"), 0o644),
            ("etc/removed", file("gone"), 0o644),
            ("etc/kept", file("kept"), 0o4755),
            ("opaque", Directory, 0o700),
            ("opaque/hidden", file("hidden"), 0o644),
            ("opaque/sub", Directory, 0o755),
            ("opaque/sub/hidden", file("hidden"), 0o644),
            ("to-file", Directory, 0o755),
            ("to-file/child", file("child"), 0o644),
            ("to-dir", file("was a file"), 0o644),
            ("tree", Directory, 0o755),
            ("tree/a", file("a"), 0o644),
            ("link", Symlink("etc/kept"), 0o777),
            ("large", noise(1, 2_500_000), 0o644),
            ("zeros", File(vec![0; 3_000_000]), 0o600),
            ("hard", HardLink("large"), 0o644),
        ],
        vec![
            ("etc", Directory, 0o750),
            ("etc/changed", file("new"), 0o600),
            ("etc/.wh.removed", file(""), 0o644),
            ("etc/.wh.never-was", file(""), 0o644),
            ("opaque", Directory, 0o711),
            ("opaque/new", file("new"), 0o644),
            ("opaque/.wh..wh..opq", file(""), 0o644),
            ("to-file", file("now a file"), 0o644),
            ("to-dir", Directory, 0o755),
            ("to-dir/child", file("child"), 0o644),
            (".wh.tree", file(""), 0o644),
            ("hard", noise(2, 1_200_000), 0o640),
        ],
        // Nothing in this one has data.
        vec![
            ("empty", file(""), 0o644),
            ("link", Symlink("/elsewhere"), 0o777),
        ],
        // A layer may come twice.
        vec![
            ("last", Directory, 0o1777),
            ("last/large", noise(1, 2_500_000), 0o644),
        ],
    ]
}

/// What a path of the finished image leads to.
#[derive(Debug, PartialEq, Eq)]
struct Found {
    kind: Kind,
    permissions: u16,
}

/// The files of the image, by the rules for layers.
fn model(layers: &[Vec<Entry>]) -> BTreeMap<String, Found> {
    let mut files: BTreeMap<String, Found> = BTreeMap::new();
    let below = |dir: &str, path: &str| {
        path.strip_prefix(dir)
            .is_some_and(|rest| rest.starts_with('/'))
    };
    for layer in layers {
        for (path, ..) in layer {
            let (dir, name) = path.rsplit_once('/').unwrap_or(("", path));
            if name == ".wh..wh..opq" {
                files.retain(|other, _| !below(dir, other));
            } else if let Some(name) = name.strip_prefix(".wh.") {
                let gone = if dir.is_empty() {
                    name.to_owned()
                } else {
                    format!("{dir}/{name}")
                };
                files.retain(|other, _| *other != gone && !below(&gone, other));
            }
        }
        for (path, kind, permissions) in layer {
            if path.rsplit('/').next().unwrap().starts_with(".wh.") {
                continue;
            }
            let kind = match kind {
                HardLink(target) => files[*target].kind.clone(),
                other => other.clone(),
            };
            if kind != Directory {
                files.retain(|other, _| !below(path, other));
            }
            files.insert(
                (*path).to_owned(),
                Found {
                    kind,
                    permissions: *permissions,
                },
            );
        }
    }
    files
}

fn tar_of(layer: &[Entry]) -> Vec<u8> {
    let mut tar = tar::Builder::new(Vec::new());
    for (path, kind, permissions) in layer {
        let mut header = tar::Header::new_gnu();
        header.set_mode(u32::from(*permissions));
        header.set_mtime(1_700_000_000);
        header.set_uid(1000);
        header.set_gid(1000);
        let (entry_type, link, data): (_, _, &[u8]) = match kind {
            Directory => (tar::EntryType::Directory, None, &[]),
            File(data) => (tar::EntryType::Regular, None, data),
            Symlink(target) => (tar::EntryType::Symlink, Some(target), &[]),
            HardLink(target) => (tar::EntryType::Link, Some(target), &[]),
        };
        header.set_entry_type(entry_type);
        header.set_size(data.len() as u64);
        match link {
            Some(target) => tar.append_link(&mut header, path, target).unwrap(),
            None => tar.append_data(&mut header, path, data).unwrap(),
        }
    }
    tar.into_inner().unwrap()
}

/// A layout under construction.
struct Layout<'d>(&'d Path);

impl Layout<'_> {
    fn put(&self, media_type: &str, bytes: &[u8]) -> Descriptor {
        let descriptor = Descriptor::of(media_type, bytes);
        std::fs::create_dir_all(self.0.join("blobs/sha256")).unwrap();
        std::fs::write(self.blob(&descriptor.digest), bytes).unwrap();
        descriptor
    }

    fn blob(&self, digest: &ContentDigest) -> std::path::PathBuf {
        self.0.join("blobs/sha256").join(digest.hex())
    }

    fn json(&self, digest: &Value) -> Value {
        let digest = digest.as_str().unwrap().parse().unwrap();
        serde_json::from_slice(&std::fs::read(self.blob(&digest)).unwrap()).unwrap()
    }

    /// Stores an image; each layer is compressed in another way.
    fn image(&self, layers: &[Vec<Entry>], architecture: &str) -> Descriptor {
        let mut stored = Vec::new();
        let mut diff_ids = Vec::new();
        for (index, layer) in layers.iter().enumerate() {
            let tar = tar_of(layer);
            diff_ids.push(ContentDigest::of(&tar));
            let (suffix, bytes) = match index % 3 {
                0 => {
                    let level = flate2::Compression::fast();
                    let mut gzip = flate2::write::GzEncoder::new(Vec::new(), level);
                    gzip.write_all(&tar).unwrap();
                    ("+gzip", gzip.finish().unwrap())
                }
                1 => ("+zstd", zstd::encode_all(tar.as_slice(), 1).unwrap()),
                _ => ("", tar),
            };
            let media_type = format!("application/vnd.oci.image.layer.v1.tar{suffix}");
            stored.push(self.put(&media_type, &bytes));
        }
        let config = json!({
            "architecture": architecture, "os": "linux", "config": {"Env": ["A=b"]},
            "rootfs": {"type": "layers", "diff_ids": diff_ids},
            "history": [{"created_by": "test"}],
        });
        let config = self.put(
            "application/vnd.oci.image.config.v1+json",
            config.to_string().as_bytes(),
        );
        let manifest =
            json!({"schemaVersion": 2, "mediaType": MANIFEST, "config": config, "layers": stored});
        self.put(MANIFEST, manifest.to_string().as_bytes())
    }

    /// Makes `image` the only one in the layout.
    fn finish(&self, image: &Descriptor) {
        let index = json!({"schemaVersion": 2, "manifests": [image]});
        std::fs::write(self.0.join("index.json"), index.to_string()).unwrap();
        std::fs::write(
            self.0.join("oci-layout"),
            r#"{"imageLayoutVersion":"1.0.0"}"#,
        )
        .unwrap();
    }

    /// The digest of the only image.
    fn image_digest(&self) -> Value {
        let index: Value =
            serde_json::from_slice(&std::fs::read(self.0.join("index.json")).unwrap()).unwrap();
        assert_eq!(index["manifests"].as_array().unwrap().len(), 1);
        index["manifests"][0]["digest"].clone()
    }

    /// Reads a converted image back.
    fn files(&self, manifest: &Value) -> BTreeMap<String, Found> {
        let layers = manifest["layers"].as_array().unwrap();
        let digest = layers.last().unwrap()["digest"]
            .as_str()
            .unwrap()
            .parse()
            .unwrap();
        let layer = std::fs::File::open(self.blob(&digest)).unwrap();
        let dir = tempfile::tempdir().unwrap();
        let unpacked = bootstrap::extract("the layer", layer, dir.path()).unwrap();
        for (id, path) in &unpacked.blob_metas {
            assert!(
                layers
                    .iter()
                    .any(|layer| layer["digest"] == format!("sha256:{id}"))
            );
            assert_eq!(std::fs::metadata(path).unwrap().len() % 4096, 0);
        }
        let image = Image::open(&unpacked.bootstrap).unwrap();
        for blob in image.blobs() {
            let path = self.0.join("blobs/sha256").join(blob.id.as_str());
            assert_eq!(std::fs::metadata(path).unwrap().len(), blob.compressed_size);
            assert_ne!(blob.toc_size, 0);
            assert!(unpacked.blob_metas.iter().any(|(id, _)| *id == blob.id));
        }
        let tree = Tree::from_image(&image).unwrap();
        let mut files = BTreeMap::new();
        for entry in tree.walk() {
            let inode = tree.inode(entry.id);
            let path = String::from_utf8(entry.path).unwrap();
            let kind = match &inode.content {
                Content::Directory(_) => Directory,
                Content::File { size, .. } => File(self.read(&tree, &inode.content, *size)),
                Content::Symlink(target) => {
                    Symlink(String::from_utf8(target.to_vec()).unwrap().leak())
                }
                other => panic!("{path}: {other:?}"),
            };
            if path != "/" {
                assert_eq!(
                    (inode.attr.uid, inode.attr.mtime),
                    (1000, 1_700_000_000),
                    "{path}"
                );
                let found = Found {
                    kind,
                    permissions: inode.attr.permissions,
                };
                files.insert(path.trim_start_matches('/').to_owned(), found);
            }
        }
        files
    }

    fn read(&self, tree: &Tree, content: &Content, size: u64) -> Vec<u8> {
        let Content::File { chunks, .. } = content else {
            panic!("a file")
        };
        let mut data = Vec::new();
        for chunk in chunks.iter().map(|id| tree.chunk(*id)) {
            let blob = &tree.blobs[chunk.blob.as_usize()];
            let stored = std::fs::read(self.0.join("blobs/sha256").join(blob.id.as_str())).unwrap();
            let start = usize::try_from(chunk.compressed_offset).unwrap();
            let stored = &stored[start..][..chunk.compressed_size as usize];
            let mut plain = vec![0; chunk.uncompressed_size as usize];
            let compressor = if chunk.compressed {
                blob.compressor
            } else {
                Compressor::None
            };
            codec::decompress_into(compressor, stored, &mut plain).unwrap();
            data.extend_from_slice(&plain);
        }
        assert_eq!(data.len() as u64, size);
        data
    }
}

const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
const INDEX: &str = "application/vnd.oci.image.index.v1+json";

fn convert(source: &Path, target: &Path, options: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_nydus-image"))
        .arg("convert")
        .arg(format!("oci:{}", source.display()))
        .arg(format!("oci:{}", target.display()))
        // The model below reads chunks that stand alone.
        .args(["--batch-size", "0"])
        .args(options)
        .env_remove("RUST_BACKTRACE")
        .output()
        .unwrap()
}

fn text(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

#[test]
fn the_converted_image_has_the_files_of_the_layers() {
    let dir = tempfile::tempdir().unwrap();
    let source = dir.path().join("source");
    let layers = layers();
    let image = Layout(&source).image(&layers, "amd64");
    Layout(&source).finish(&image);
    let options: [&[&str]; 3] = [
        &[],
        &["--jobs", "1"],
        &[
            "--compressor",
            "lz4_block",
            "--digester",
            "sha256",
            "--chunk-size",
            "0x10000",
        ],
    ];
    let mut digests = Vec::new();
    for (index, options) in options.iter().enumerate() {
        let path = dir.path().join(format!("target{index}"));
        let work = dir.path().join("work");
        std::fs::create_dir_all(&work).unwrap();
        let work_dir = ["--work-dir", work.to_str().unwrap()];
        let output = convert(&source, &path, &[options, &work_dir[..]].concat());
        assert!(output.status.success(), "{}", text(&output));
        assert_eq!(std::fs::read_dir(&work).unwrap().count(), 0);
        let target = Layout(&path);
        let digest = target.image_digest();
        assert!(String::from_utf8_lossy(&output.stdout).contains(digest.as_str().unwrap()));
        let manifest = target.json(&digest);
        assert_eq!(target.files(&manifest), model(&layers));
        digests.push((digest, manifest));
    }
    assert_eq!(
        digests[0], digests[1],
        "the same source gives the same digests"
    );
    assert_ne!(digests[0].0, digests[2].0);

    let manifest = &digests[0].1;
    let annotations = &manifest["annotations"];
    assert_eq!(
        annotations["containerd.io/snapshot/nydus-source-digest"],
        json!(image.digest)
    );
    let stored = manifest["layers"].as_array().unwrap();
    assert_eq!(stored.len(), layers.len() + 1);
    let config = Layout(&dir.path().join("target0")).json(&manifest["config"]["digest"]);
    let diff_ids = config["rootfs"]["diff_ids"].as_array().unwrap();
    assert_eq!(diff_ids.len(), stored.len());
    for (layer, diff_id) in stored.iter().zip(diff_ids).take(layers.len()) {
        assert_eq!(layer["digest"], *diff_id);
    }
    assert_eq!(config["config"], json!({"Env": ["A=b"]}));
}

#[test]
fn an_index_stays_one_and_shared_layers_are_converted_once() {
    let dir = tempfile::tempdir().unwrap();
    let (source, target) = (dir.path().join("source"), dir.path().join("target"));
    let (layout, layers) = (Layout(&source), layers());
    let entry = |image: Descriptor, architecture: &str| {
        let mut image = image;
        image.rest.insert(
            "platform".into(),
            json!({"os": "linux", "architecture": architecture}),
        );
        image
    };
    let mut attestation = entry(layout.put(MANIFEST, b"{}"), "unknown");
    attestation.annotate("vnd.docker.reference.type", "attestation-manifest");
    let index = json!({"schemaVersion": 2, "mediaType": INDEX, "annotations": {"k": "v"}, "manifests": [
        entry(layout.image(&layers, "amd64"), "amd64"),
        entry(layout.image(&layers[..2], "arm64"), "arm64"),
        attestation,
    ]});
    layout.finish(&layout.put(INDEX, index.to_string().as_bytes()));

    let output = convert(&source, &target, &[]);
    assert!(output.status.success(), "{}", text(&output));
    assert!(text(&output).contains("layer 4/4"), "{}", text(&output));
    let converted = Layout(&target).json(&Layout(&target).image_digest());
    assert_eq!(
        (&converted["mediaType"], &converted["annotations"]["k"]),
        (&json!(INDEX), &json!("v"))
    );
    let entries = converted["manifests"].as_array().unwrap();
    assert_eq!(entries.len(), 2);
    for (entry, (architecture, layers)) in entries
        .iter()
        .zip([("amd64", &layers[..]), ("arm64", &layers[..2])])
    {
        assert_eq!(entry["platform"]["architecture"], architecture);
        assert_eq!(
            entry["artifactType"],
            "application/vnd.nydus.image.manifest.v1+json"
        );
        let manifest = Layout(&target).json(&entry["digest"]);
        assert_eq!(Layout(&target).files(&manifest), model(layers));
    }

    let again = convert(&target, &dir.path().join("again"), &[]);
    assert_eq!(again.status.code(), Some(1));
    assert!(
        text(&again).contains("a Nydus image already"),
        "{}",
        text(&again)
    );
    let one = dir.path().join("one");
    let output = convert(&source, &one, &["--platform", "linux/arm64/v8"]);
    assert!(output.status.success(), "{}", text(&output));
    let manifest = Layout(&one).json(&Layout(&one).image_digest());
    assert_eq!(manifest["layers"].as_array().unwrap().len(), 3);
    let none = convert(
        &source,
        &dir.path().join("none"),
        &["--platform", "linux/s390x"],
    );
    assert!(
        text(&none).contains("linux/amd64, linux/arm64"),
        "{}",
        text(&none)
    );
}

#[test]
fn bad_input_is_named_and_leaves_no_output() {
    let dir = tempfile::tempdir().unwrap();
    let layers = layers();
    let target = dir.path().join("target");
    let damage = |name: &str,
                  expected: &[&str],
                  spoil: &dyn Fn(&Layout<'_>, &[Descriptor], &mut Value)| {
        let path = dir.path().join(name);
        let source = Layout(&path);
        let image = source.image(&layers, "amd64");
        let mut manifest = source.json(&json!(image.digest));
        let stored: Vec<Descriptor> = serde_json::from_value(manifest["layers"].clone()).unwrap();
        spoil(&source, &stored, &mut manifest);
        source.finish(&source.put(MANIFEST, manifest.to_string().as_bytes()));
        let output = convert(&path, &target, &[]);
        assert_eq!(output.status.code(), Some(1), "{name}");
        assert!(!target.exists(), "{name} leaves output");
        let message = text(&output);
        for word in expected {
            assert!(message.contains(word), "{name}: {word} is not in {message}");
        }
        assert!(!message.contains("panicked"), "{message}");
    };
    let first = Layout(&dir.path().join("x")).image(&layers[..1], "amd64");
    let first = Layout(&dir.path().join("x")).json(&json!(first.digest));
    let first = first["layers"][0]["digest"].as_str().unwrap();

    damage(
        "wrong-bytes",
        &[first, "has the digest"],
        &|source, layers, _| {
            let mut bytes = std::fs::read(source.blob(&layers[0].digest)).unwrap();
            bytes[1000] ^= 0x55;
            std::fs::write(source.blob(&layers[0].digest), bytes).unwrap();
        },
    );
    damage("truncated", &[first, "bytes, not"], &|source, layers, _| {
        let bytes = std::fs::read(source.blob(&layers[0].digest)).unwrap();
        std::fs::write(source.blob(&layers[0].digest), &bytes[..bytes.len() / 2]).unwrap();
    });
    damage("missing", &[first, "not found"], &|source, layers, _| {
        std::fs::remove_file(source.blob(&layers[0].digest)).unwrap();
    });
    damage(
        "bad-gzip",
        &["cannot decompress", "bytes of tar"],
        &|source, _, manifest| {
            let broken = [&[0x1f, 0x8b, 8, 0, 0, 0, 0, 0, 0, 3][..], &[0xff; 100]].concat();
            manifest["layers"][0] =
                json!(source.put("application/vnd.oci.image.layer.v1.tar+gzip", &broken));
        },
    );
    damage("other-tar", &["rootfs.diff_ids"], &|source, _, manifest| {
        let tar = tar_of(&[("other", file("other"), 0o644)]);
        manifest["layers"][0] = json!(source.put("application/vnd.oci.image.layer.v1.tar", &tar));
    });
    damage(
        "layer-count",
        &["lists 4 layers, but the manifest has 3"],
        &|_, _, manifest| {
            manifest["layers"].as_array_mut().unwrap().pop();
        },
    );
    damage("no-tar", &["layer sha256:"], &|source, _, manifest| {
        let noise = vec![b'x'; 5000];
        manifest["layers"][0] = json!(source.put("application/vnd.oci.image.layer.v1.tar", &noise));
        let mut config = source.json(&manifest["config"]["digest"]);
        config["rootfs"]["diff_ids"][0] = json!(ContentDigest::of(&noise));
        let media_type = manifest["config"]["mediaType"].as_str().unwrap().to_owned();
        manifest["config"] = json!(source.put(&media_type, config.to_string().as_bytes()));
    });

    let usage = convert(Path::new("a"), Path::new("a"), &[]);
    assert_eq!(usage.status.code(), Some(2), "{}", text(&usage));
    let usage = convert(Path::new("a"), Path::new("b"), &["--platform", "linux"]);
    assert_eq!(usage.status.code(), Some(2), "{}", text(&usage));
}

/// Regular files of a tar, by name.
fn files_of_tar(path: &Path) -> BTreeMap<String, Vec<u8>> {
    let mut files = BTreeMap::new();
    let mut archive = tar::Archive::new(std::fs::File::open(path).unwrap());
    for entry in archive.entries().unwrap() {
        let mut entry = entry.unwrap();
        let path = entry.path().unwrap().display().to_string();
        let mut data = Vec::new();
        entry.read_to_end(&mut data).unwrap();
        match entry.header().entry_type() {
            tar::EntryType::Regular => drop(files.insert(path, data)),
            tar::EntryType::Link => {
                let target = entry.link_name().unwrap().unwrap().display().to_string();
                files.insert(path, files[&target].clone());
            }
            _ => {}
        }
    }
    files
}

/// Layers of gzip and tar stay; the one of zstd cannot, and is converted.
#[test]
fn layers_that_cannot_be_used_in_place_are_converted() {
    let dir = tempfile::tempdir().unwrap();
    let (source, target) = (dir.path().join("source"), dir.path().join("target"));
    let layers = layers();
    let image = Layout(&source).image(&layers, "amd64");
    Layout(&source).finish(&image);
    let program = || Command::new(env!("CARGO_BIN_EXE_nydus-image"));
    let output = program()
        .arg("convert")
        .arg(format!("oci:{}", source.display()))
        .arg(format!("oci:{}", target.display()))
        .arg("--oci-ref")
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", text(&output));
    let warnings: Vec<_> = text(&output)
        .lines()
        .filter(|line| line.contains("WARN"))
        .map(str::to_owned)
        .collect();
    assert_eq!(warnings.len(), 1, "{warnings:?}");
    for words in ["layer 2/4", "zstd", "converted, because it cannot stay"] {
        assert!(warnings[0].contains(words), "{warnings:?}");
    }

    let target = Layout(&target);
    let manifest = target.json(&target.image_digest());
    let stored = manifest["layers"].as_array().unwrap();
    let is_index = |layer: &Value| {
        layer["annotations"]
            .get("containerd.io/snapshot/nydus-ref")
            .is_some()
    };
    let kinds: Vec<_> = stored.iter().map(is_index).collect();
    assert_eq!(kinds, [true, false, true, true, false]);
    let packed = stored[4]["digest"].as_str().unwrap().parse().unwrap();
    let packed = std::fs::File::open(target.blob(&packed)).unwrap();
    let boot = bootstrap::extract("the layer", packed, dir.path()).unwrap();
    let tar = dir.path().join("image.tar");
    let blobs = target.0.join("blobs/sha256");
    for command in ["check", "unpack"] {
        let mut run = program();
        run.arg(command).arg(&boot.bootstrap);
        run.arg("--blob-dir").arg(&blobs);
        if command == "unpack" {
            run.arg("--output").arg(&tar);
        }
        let output = run.output().unwrap();
        assert!(output.status.success(), "{command}: {}", text(&output));
    }
    let expected = model(&layers).into_iter().filter_map(|(path, found)| {
        let File(data) = found.kind else { return None };
        Some((path, data))
    });
    assert!(files_of_tar(&tar) == expected.collect(), "files differ");
}
