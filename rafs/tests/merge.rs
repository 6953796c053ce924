//! Merging agrees with a plain model: a map from paths to what is there.
#![allow(clippy::unwrap_used, reason = "a failed unwrap fails the test")]

#[allow(dead_code, reason = "every test uses its part")]
mod common;

use std::collections::BTreeMap;

use common::{Entry, Flat, FlatContent, Node, build, flatten, node, options};
use proptest::prelude::*;
use rafs::Image;
use rafs::merge::{WhiteoutSpec, apply};
use rafs::tree::{Attr, Content, Inode, Tree};
use rafs::writer::{BlobOrder, WriteOptions, write};

const OPAQUE: &[u8] = b"trusted.overlay.opaque";

/// Names that collide often, among them whiteouts of each other.
fn layer() -> impl Strategy<Value = Vec<(usize, Vec<u8>, Node)>> {
    let name = prop_oneof![
        6 => "[a-c]",
        3 => "\\.wh\\.[a-c]",
        1 => Just(".wh..wh..opq".to_owned()),
        1 => Just(".wh.".to_owned()),
    ]
    .prop_map(String::into_bytes);
    let node = (node(), 0..8_u8).prop_map(|(mut node, choice)| {
        match choice {
            0 => node.kind = common::Kind::Char(0),
            1 => drop(node.xattrs.insert(OPAQUE.into(), b"y"[..].into())),
            2..=4 => node.kind = common::Kind::Directory,
            _ => {}
        }
        node
    });
    prop::collection::vec((any::<usize>(), name, node), 0..25)
}

fn split(path: &[u8]) -> (&[u8], &[u8]) {
    let at = path.iter().rposition(|&b| b == b'/').unwrap();
    (&path[..at], &path[at + 1..])
}

/// Removes everything below a directory, given without a slash at its end.
fn clear(model: &mut Flat, dir: &[u8]) {
    let prefix = [dir, b"/"].concat();
    model.retain(|path, _| path == b"/" || !path.starts_with(&prefix));
}

fn remove(model: &mut Flat, path: &[u8]) {
    model.remove(path);
    clear(model, path);
}

fn is_overlay_whiteout(entry: &Entry) -> bool {
    entry.content == FlatContent::Other(Content::CharDevice(0))
}

fn has_oci_whiteout(path: &[u8]) -> bool {
    path.split(|&b| b == b'/')
        .any(|name| name.starts_with(b".wh."))
}

/// The upper layer on the model, path by path: first all whiteouts, then the rest.
fn merge_model(model: &mut Flat, upper: &Flat, spec: WhiteoutSpec, layer: usize) {
    for (path, entry) in upper.iter().filter(|(path, _)| *path != b"/") {
        let (dir, name) = split(path);
        // What is below a whiteout is gone with it.
        if spec == WhiteoutSpec::Oci && has_oci_whiteout(dir) {
            continue;
        }
        match spec {
            WhiteoutSpec::Oci if name == b".wh..wh..opq" => clear(model, dir),
            WhiteoutSpec::Oci if name.starts_with(b".wh.") && name.len() > 4 => {
                remove(model, &[dir, b"/", &name[4..]].concat());
            }
            WhiteoutSpec::Overlayfs if is_overlay_whiteout(entry) => remove(model, path),
            _ => {}
        }
    }
    for (path, entry) in upper {
        let hidden = |path: &[u8]| match spec {
            WhiteoutSpec::Oci => has_oci_whiteout(path),
            WhiteoutSpec::Overlayfs => is_overlay_whiteout(entry),
            WhiteoutSpec::None => false,
        };
        if hidden(path) {
            continue;
        }
        let mut entry = entry.clone();
        let dir = if path == b"/" { b"" } else { &path[..] };
        if spec == WhiteoutSpec::Overlayfs
            && entry.content == FlatContent::Directory
            && entry.xattrs.get(OPAQUE).is_some_and(|v| **v == *b"y")
        {
            entry.xattrs.remove(OPAQUE);
            clear(model, dir);
        }
        let both = entry.content == FlatContent::Directory
            && model
                .get(path)
                .is_some_and(|e| e.content == FlatContent::Directory);
        if !both && path != b"/" {
            remove(model, path);
        }
        // Links of different layers are never the same file.
        entry.first_link = [&entry.first_link[..], b"@", layer.to_string().as_bytes()].concat();
        model.insert(path.clone(), entry);
    }
}

/// Renames groups of links after the first path that is left of each.
fn normalise(model: Flat) -> Flat {
    let mut first = BTreeMap::new();
    model
        .into_iter()
        .map(|(path, mut entry)| {
            entry.first_link = match entry.content {
                FlatContent::File(..) => first
                    .entry(entry.first_link)
                    .or_insert(path.clone())
                    .clone(),
                _ => path.clone(),
            };
            (path, entry)
        })
        .collect()
}

fn check(layers: &[Vec<(usize, Vec<u8>, Node)>], spec: WhiteoutSpec) {
    let mut model = Flat::new();
    let mut merged: Option<Tree> = None;
    for (number, nodes) in layers.iter().enumerate() {
        let root = Attr {
            uid: u32::try_from(number).unwrap(),
            ..Attr::default()
        };
        // Two layers of equal name may share a blob only if it is the same.
        let tree = build(&format!("blob{number}"), root, nodes);
        let flat = flatten(&tree);
        match &mut merged {
            // The lowest layer is taken as it is.
            None => {
                merge_model(&mut model, &flat, WhiteoutSpec::None, number);
                merged = Some(tree);
            }
            Some(lower) => {
                merge_model(&mut model, &flat, spec, number);
                apply(lower, tree, spec).unwrap();
            }
        }
    }
    let Some(merged) = merged else { return };
    let expected = normalise(model);
    assert_eq!(flatten(&merged), expected);
    // And it can be written and read.
    let options = WriteOptions {
        blob_order: BlobOrder::FirstUse,
        ..options()
    };
    let image = Image::from_bytes(write(&merged, &options).unwrap()).unwrap();
    image.verify_tree().unwrap();
    assert_eq!(flatten(&Tree::from_image(&image).unwrap()), expected);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(150))]

    #[test]
    fn oci_layers(layers in prop::collection::vec(layer(), 1..4)) {
        check(&layers, WhiteoutSpec::Oci);
    }

    #[test]
    fn overlayfs_layers(layers in prop::collection::vec(layer(), 1..4)) {
        check(&layers, WhiteoutSpec::Overlayfs);
    }

    #[test]
    fn plain_layers(layers in prop::collection::vec(layer(), 1..4)) {
        check(&layers, WhiteoutSpec::None);
    }
}

/// A directory that a layer only implies keeps what a lower layer says of it.
#[test]
fn an_implied_directory_changes_nothing_but_its_entries() {
    let attr = |permissions| Attr {
        permissions,
        mtime: 77,
        ..Attr::default()
    };
    let mut lower = Tree::new(attr(0o700));
    let root = lower.root();
    let known = lower
        .insert(
            root,
            b"known",
            Inode::new(attr(0o1777), Content::directory()),
        )
        .unwrap();
    let default = Attr {
        permissions: 0o755,
        ..Attr::default()
    };
    let mut upper = Tree::new(default);
    let upper_root = upper.root();
    upper.inode_mut(upper_root).implied = true;
    for dir in [&b"known"[..], b"new"] {
        let dir = upper
            .insert(upper_root, dir, Inode::implied_directory(default))
            .unwrap();
        upper
            .insert(dir, b"fifo", Inode::new(attr(0o600), Content::Fifo))
            .unwrap();
    }
    apply(&mut lower, upper, WhiteoutSpec::Oci).unwrap();
    assert_eq!(lower.inode(root).attr, attr(0o700));
    assert_eq!(lower.inode(known).attr, attr(0o1777));
    assert!(lower.entry(known, b"fifo").is_some());
    let new = lower.entry(root, b"new").unwrap();
    assert_eq!(lower.inode(new).attr, default);
}
