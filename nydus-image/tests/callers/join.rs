//! `merge` by the converter package: layers, each in a file named by the digest of its
//! blob, become one image.

use std::fs;

use crate::pack::{REFERENCE, TAR};
use crate::place::{Call, Place, sha256};

const MERGE: &str = "merge --log-level warn --prefetch-policy fs \
    --output-json merge-output.json --bootstrap bootstrap";

/// Packs `NAME.tar`, stores the blob in `blobs` under its digest, and its bootstrap in
/// a file of that name, as the converter does. Returns the digest.
pub(crate) fn pack(place: &Place, name: &'static str, tail: &str) -> String {
    let line = format!("{TAR} {tail} {name}.fifo");
    let feed: &'static str = Box::leak(format!("{name}.tar").into_boxed_str());
    let fifo: &'static str = Box::leak(format!("{name}.fifo").into_boxed_str());
    let call = Call::new(&line)
        .patterns("/")
        .drain("blob.rafs")
        .feed(feed, fifo);
    let blob = place.call(&call).ok(&line).blob;
    store(place, &blob)
}

/// Stores a packed layer; see [`pack`].
fn store(place: &Place, blob: &[u8]) -> String {
    let id = sha256(blob);
    fs::write(place.path(&format!("blobs/{id}")), blob).unwrap();
    fs::write(place.path(&id), bootstrap(blob)).unwrap();
    id
}

/// The bootstrap in a blob whose last section is the bootstrap or the table of contents.
pub(crate) fn bootstrap(blob: &[u8]) -> Vec<u8> {
    use storage::format::toc::{Tail, locate};
    match locate(blob).unwrap() {
        Tail::Toc(toc) => {
            let entry = toc.entry("image.boot").unwrap();
            let start = usize::try_from(entry.offset).unwrap();
            let end = start + usize::try_from(entry.stored_size).unwrap();
            entry.extract(&blob[start..end], 1 << 30).unwrap()
        }
        Tail::Bootstrap { size } => {
            let end = blob.len() - 512;
            blob[end - usize::try_from(size).unwrap()..end].to_vec()
        }
    }
}

/// Two layers: the second removes a file of the first and adds one.
fn layers(place: &Place) {
    let upper = place.path("upper");
    fs::create_dir_all(upper.join("usr/bin")).unwrap();
    fs::write(upper.join("usr/.wh.same"), "").unwrap();
    fs::write(upper.join("usr/bin/second"), "second".repeat(1000)).unwrap();
    place.archive("upper", "upper");
}

fn blobs(place: &Place, report: &str) -> Vec<String> {
    let report = place.json(report);
    assert_eq!(report["fs_version"], "6");
    assert_eq!(report["external_blobs"], serde_json::json!([]));
    let blobs = report["blobs"].as_array().unwrap();
    blobs
        .iter()
        .map(|id| id.as_str().unwrap().to_owned())
        .collect()
}

fn tree(place: &Place, bootstrap: &str) -> String {
    place
        .run(&format!(
            "check --log-level error --bootstrap {bootstrap} -v"
        ))
        .ok(bootstrap)
        .stdout
}

#[test]
fn layers_become_an_image() {
    let place = Place::new();
    layers(&place);
    for tail in [
        "",
        "--features blob-toc",
        "--batch-size 0x10000 --features blob-toc",
    ] {
        let (lower, upper) = (pack(&place, "layer", tail), pack(&place, "upper", tail));
        let line = format!("{MERGE} {lower} {upper}");
        let run = place.call(&Call::new(&line).patterns("/")).ok(&line);
        assert_eq!(
            (run.stdout.as_str(), run.stderr.as_str()),
            ("", ""),
            "{tail}"
        );
        assert_eq!(blobs(&place, "merge-output.json"), [lower, upper], "{tail}");
        assert_eq!(place.json("merge-output.json")["bootstrap"], "bootstrap");
        assert_eq!(place.json("merge-output.json")["compressor"], "zstd");
        let tree = tree(&place, "bootstrap");
        assert!(
            tree.contains("/usr/bin/second") && !tree.contains("/usr/same"),
            "{tree}"
        );
        assert!(tree.contains("/hello"), "{tree}");
        // What the snapshotter asks of the file.
        let bytes = place.read("bootstrap");
        assert_eq!(bytes[1024..1028], [0xe2, 0xe1, 0xf5, 0xe0]);
        assert_eq!((bytes[1036], bytes.len() % 4096), (12, 0));
    }
}

/// The file's name is the blob's id up to the first dot, and an empty layer has none.
#[test]
fn names_of_sources_are_blob_ids() {
    let place = Place::new();
    layers(&place);
    let lower = pack(&place, "layer", "");
    for (name, id) in [("boot1", "boot1"), ("abc.x.y", "abc")] {
        fs::copy(place.path(&lower), place.path(name)).unwrap();
        let line = format!("{MERGE} {name}");
        place.call(&Call::new(&line).patterns("/")).ok(&line);
        assert_eq!(blobs(&place, "merge-output.json"), [id]);
    }
    fs::create_dir(place.path("none")).unwrap();
    place.archive("none", "none");
    let empty = pack(&place, "none", "");
    let line = format!("{MERGE} {lower} {empty}");
    place.call(&Call::new(&line).patterns("/")).ok(&line);
    assert_eq!(blobs(&place, "merge-output.json"), [lower]);
}

#[test]
fn with_a_parent_and_a_dictionary() {
    let place = Place::new();
    layers(&place);
    let (lower, upper) = (pack(&place, "layer", ""), pack(&place, "upper", ""));
    fs::copy(place.path(&lower), place.path("parent.boot")).unwrap();
    // The ids of a parent and of a dictionary are those in them.
    let line = format!("{MERGE} {lower}");
    place.call(&Call::new(&line).patterns("/")).ok(&line);
    fs::copy(place.path("bootstrap"), place.path("base.boot")).unwrap();
    let line = format!("{MERGE} --parent-bootstrap base.boot {upper}");
    place.call(&Call::new(&line).patterns("/")).ok(&line);
    assert_eq!(
        blobs(&place, "merge-output.json"),
        [lower.clone(), upper.clone()]
    );
    assert!(!tree(&place, "bootstrap").contains("/usr/same"));

    let third = pack(
        &place,
        "layer",
        "--chunk-dict bootstrap=base.boot --features blob-toc",
    );
    let line = format!("{MERGE} --chunk-dict bootstrap=base.boot {third} {upper}");
    place.call(&Call::new(&line).patterns("/")).ok(&line);
    assert_eq!(
        blobs(&place, "merge-output.json"),
        [lower, upper],
        "all of it is in the dictionary"
    );
}

/// Layers that stay what they are bring their lists, behind the sources.
#[test]
fn reference_layers() {
    let place = Place::new();
    layers(&place);
    let mut lists = [Vec::new(), Vec::new(), Vec::new()];
    let mut sources = Vec::new();
    for (layer, fifo) in [("layer.tar.gz", "first"), ("upper.tar.gz", "second")] {
        let line = format!("{REFERENCE} {fifo}");
        let call = Call::new(&line).drain("blob.rafs").feed(layer, fifo);
        let blob = place.call(&call).ok(&line).blob;
        // The file is named by the digest of the layer, which is the blob.
        let id = sha256(&place.read(layer));
        fs::write(place.path(&id), bootstrap(&blob)).unwrap();
        sources.push(id);
        lists[0].push(sha256(&blob));
        lists[1].push(sha256(&blob[blob.len() - 1024..]));
        lists[2].push(blob.len().to_string());
        fs::write(place.path(&format!("blobs/{}", sha256(&blob))), blob).unwrap();
    }
    let line = format!(
        "{MERGE} {} --blob-digests {} --blob-toc-digests {} --blob-sizes {}",
        sources.join(" "),
        lists[0].join(","),
        lists[1].join(","),
        lists[2].join(","),
    );
    place.call(&Call::new(&line).patterns("/")).ok(&line);
    assert_eq!(blobs(&place, "merge-output.json"), sources);
    let line = line.replace(&lists[2].join(","), "1");
    place
        .call(&Call::new(&line).patterns("/"))
        .refused(2, &["--blob-sizes"], &line);
}
