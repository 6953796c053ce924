//! Layers on each other: what `create`, `merge` and `unpack` make of a stack of archives
//! is what a plain map of paths becomes when the layers are applied one after another.

#![allow(
    clippy::unwrap_used,
    reason = "a test that cannot go on fails where it stands"
)]

use std::collections::BTreeMap;
use std::io::Read as _;
use std::path::Path;
use std::process::Command;

use proptest::prelude::*;
use sha2::{Digest as _, Sha256};
use tar::EntryType;

/// What is at a path: permissions and content.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Object {
    Directory(u32),
    File(u32, Vec<u8>),
    Symlink(String),
}

/// An entry of a layer. Its path starts without a slash.
#[derive(Clone, Debug)]
enum Entry {
    Object(Object),
    /// A link to the first file of the layer; left out if there is none.
    Link,
    /// The path is gone, as `.wh.NAME` in its directory.
    Whiteout,
    /// Everything below the path is gone, as `.wh..wh..opq` in it.
    Opaque,
}

type Layer = BTreeMap<String, Entry>;
type Model = BTreeMap<String, Object>;

fn content() -> impl Strategy<Value = Vec<u8>> {
    prop_oneof![
        // Small ones meet in batches, equal ones in deduplication.
        (0..4_u8, 0..300_usize).prop_map(|(byte, len)| vec![byte; len]),
        (0..4_u8, 4000..14_000_usize).prop_map(|(seed, len)| {
            let bytes = (0_u8..=255).cycle().take(len);
            bytes.map(|b| b.wrapping_mul(seed | 1) ^ (b >> 3)).collect()
        }),
    ]
}

fn entry() -> impl Strategy<Value = Entry> {
    prop_oneof![
        3 => (0..0o1000_u32).prop_map(|mode| Entry::Object(Object::Directory(mode))),
        4 => (0..0o1000_u32, content())
            .prop_map(|(mode, bytes)| Entry::Object(Object::File(mode, bytes))),
        1 => "[a-c](/[a-c]){0,3}".prop_map(|target| Entry::Object(Object::Symlink(target))),
        1 => Just(Entry::Link),
        2 => Just(Entry::Whiteout),
        1 => Just(Entry::Opaque),
    ]
}

/// Few names, so that layers meet.
fn layer() -> impl Strategy<Value = Layer> {
    prop::collection::btree_map("[a-c](/[a-c]){0,3}", entry(), 0..14).prop_map(with_parents)
}

fn parents(path: &str) -> impl Iterator<Item = &str> {
    path.match_indices('/').map(|(at, _)| &path[..at])
}

/// Layers as they are packed: every directory around an entry is listed. What is below
/// an entry that is no directory is left out.
fn with_parents(mut layer: Layer) -> Layer {
    let paths: Vec<String> = layer.keys().cloned().collect();
    for path in paths {
        for parent in parents(&path) {
            let blank = || Entry::Object(Object::Directory(0o755));
            layer.entry(parent.to_owned()).or_insert_with(blank);
        }
    }
    // In this order parents are kept or gone before their entries are looked at.
    let mut kept = Layer::new();
    for (path, entry) in layer {
        let is_dir = |at| match kept.get(at) {
            Some(entry) => matches!(entry, Entry::Object(Object::Directory(_)) | Entry::Opaque),
            None => false,
        };
        if parents(&path).all(is_dir) {
            kept.insert(path, entry);
        }
    }
    kept
}

fn first_file(layer: &Layer) -> Option<(&String, &Object)> {
    layer.iter().find_map(|(path, entry)| match entry {
        Entry::Object(file @ Object::File(..)) => Some((path, file)),
        _ => None,
    })
}

/// The layer as an archive, with its whiteouts.
fn archive(layer: &Layer) -> Vec<u8> {
    let mut tar = tar::Builder::new(Vec::new());
    let mut put = |path: &str, kind: EntryType, mode: u32, link: Option<&str>, data: &[u8]| {
        let mut header = tar::Header::new_gnu();
        header.set_entry_type(kind);
        header.set_mode(mode);
        header.set_size(data.len().try_into().unwrap());
        match link {
            Some(link) => tar.append_link(&mut header, path, link).unwrap(),
            None => tar.append_data(&mut header, path, data).unwrap(),
        }
    };
    for (path, entry) in layer {
        let (dir, name) = path.rsplit_once('/').unwrap_or(("", path));
        match entry {
            Entry::Object(Object::Directory(mode)) => {
                put(path, EntryType::Directory, *mode, None, &[]);
            }
            Entry::Object(Object::File(mode, data)) => {
                put(path, EntryType::Regular, *mode, None, data);
            }
            Entry::Object(Object::Symlink(target)) => {
                put(path, EntryType::Symlink, 0o777, Some(target), &[]);
            }
            Entry::Link => {}
            Entry::Whiteout => {
                let mark = Path::new(dir).join(format!(".wh.{name}"));
                put(mark.to_str().unwrap(), EntryType::Regular, 0, None, &[]);
            }
            Entry::Opaque => {
                put(path, EntryType::Directory, 0o711, None, &[]);
                let mark = format!("{path}/.wh..wh..opq");
                put(&mark, EntryType::Regular, 0, None, &[]);
            }
        }
    }
    // Behind what they lead to.
    for (path, _) in layer.iter().filter(|(_, e)| matches!(e, Entry::Link)) {
        if let Some((target, _)) = first_file(layer) {
            put(path, EntryType::Link, 0, Some(target), &[]);
        }
    }
    tar.into_inner().unwrap()
}

/// First everything that the layer hides, then everything that it has.
fn apply(model: &mut Model, layer: &Layer) {
    let hide = |model: &mut Model, path: &str| {
        model.retain(|other, _| !parents(other).any(|parent| parent == path));
    };
    for (path, entry) in layer {
        match entry {
            Entry::Opaque => hide(model, path),
            Entry::Whiteout => {
                model.remove(path);
                hide(model, path);
            }
            _ => {}
        }
    }
    for (path, entry) in layer {
        let object = match entry {
            Entry::Object(object) => Some(object.clone()),
            Entry::Link => first_file(layer).map(|(_, file)| file.clone()),
            Entry::Opaque => Some(Object::Directory(0o711)),
            Entry::Whiteout => None,
        };
        if let Some(object) = object {
            if !matches!(object, Object::Directory(_)) {
                hide(model, path);
            }
            model.insert(path.clone(), object);
        }
    }
}

fn run(dir: &Path, line: &str) {
    let output = Command::new(env!("CARGO_BIN_EXE_nydus-image"))
        .current_dir(dir)
        .args(line.split_whitespace())
        .output()
        .unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{line}: {stderr}");
}

/// What an archive unpacks to.
fn unpacked(bytes: &[u8]) -> Model {
    let mut model = Model::new();
    let mut archive = tar::Archive::new(bytes);
    for entry in archive.entries().unwrap() {
        let mut entry = entry.unwrap();
        let path = entry.path().unwrap().to_str().unwrap().to_owned();
        let path = path.trim_start_matches("./").trim_matches('/').to_owned();
        if path.is_empty() || path == "." {
            continue;
        }
        let link = entry
            .link_name()
            .unwrap()
            .map(|link| link.to_str().unwrap().to_owned());
        let mode = entry.header().mode().unwrap();
        let object = match entry.header().entry_type() {
            EntryType::Directory => Object::Directory(mode),
            EntryType::Symlink => Object::Symlink(link.unwrap()),
            EntryType::Link => model[link.unwrap().trim_start_matches("./")].clone(),
            _ => {
                let mut data = Vec::new();
                entry.read_to_end(&mut data).unwrap();
                Object::File(mode, data)
            }
        };
        model.insert(path, object);
    }
    model
}

/// The stack through the program: every layer is built, they are merged, and the image
/// is unpacked.
fn through_the_program(stack: &[Layer], options: &str) -> Model {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    std::fs::create_dir(at("blobs")).unwrap();
    let mut sources = Vec::new();
    for (number, layer) in stack.iter().enumerate() {
        std::fs::write(at("layer.tar"), archive(layer)).unwrap();
        let line = format!("create -l warn -t tar-rafs {options} -B boot -b blob layer.tar");
        run(dir.path(), &line);
        // Merging takes the id of a blob from the name of its bootstrap.
        let id = match std::fs::read(at("blob")) {
            Ok(blob) => {
                let id: String = Sha256::digest(&blob)
                    .iter()
                    .map(|byte| format!("{byte:02x}"))
                    .collect();
                std::fs::rename(at("blob"), at("blobs").join(&id)).unwrap();
                id
            }
            // Nothing in the layer has data.
            Err(_) => format!("layer-{number}"),
        };
        // The same layer may come twice.
        let source = format!("{id}.{number}");
        std::fs::rename(at("boot"), at(&source)).unwrap();
        sources.push(source);
    }
    run(
        dir.path(),
        &format!("merge -l warn -B image {}", sources.join(" ")),
    );
    run(dir.path(), "check -l warn image -D blobs");
    run(
        dir.path(),
        "unpack -l warn -B image -D blobs --output image.tar",
    );
    unpacked(&std::fs::read(at("image.tar")).unwrap())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]

    #[test]
    fn merged_layers_are_layers_applied_one_by_one(
        mut stack in prop::collection::vec(layer(), 1..5),
        options in prop_oneof![
            Just("--chunk-size 0x1000"),
            Just("--chunk-size 0x1000 --batch-size 0x1000 --features blob-toc"),
            Just("--compressor lz4_block --digester sha256"),
        ],
    ) {
        // Below the lowest layer is nothing to hide, and its marks would stay.
        stack[0].retain(|_, entry| !matches!(entry, Entry::Whiteout | Entry::Opaque));
        stack[0] = with_parents(std::mem::take(&mut stack[0]));
        let mut model = Model::new();
        for layer in &stack {
            apply(&mut model, layer);
        }
        prop_assert_eq!(through_the_program(&stack, options), model);
    }
}
