//! What is not supported: refused before anything is written, by name.

use crate::pack::{REFERENCE, TAR};
use crate::place::{Call, Place};

/// Runs `line`, which must fail with `code`, name `words`, and leave no new file.
fn refused(place: &Place, code: i32, line: &str, words: &[&str]) {
    let before = (place.names("."), place.names("blobs"));
    let run = place.call(&Call::new(line).patterns("/"));
    run.refused(code, words, line);
    assert_eq!((place.names("."), place.names("blobs")), before, "{line}");
}

/// The snapshotter's tarfs mode: no image of it comes from here.
#[test]
fn tarfs() {
    let place = Place::new();
    let id = "0".repeat(64);
    let line = format!(
        "create --type tar-tarfs --bootstrap layer.boot.tarfs.tmp --blob-id {id} --blob-dir blobs layer.tar"
    );
    refused(&place, 1, &line, &["tar-tarfs", "not supported"]);
}

#[test]
fn features_of_layers() {
    let place = Place::new();
    for (line, word) in [
        (
            format!("{TAR} --encrypt layer.tar").replace("blob.rafs", "x"),
            "encryption",
        ),
        (
            TAR.replace("--fs-version 6", "--fs-version 5")
                .replace("blob.rafs", "x")
                + " layer.tar",
            "RAFS version 5",
        ),
        (
            TAR.replace("blob.rafs", "x") + " --attributes a layer.tar",
            "external data (--attributes)",
        ),
        (
            TAR.replace("blob.rafs", "x") + " --external-blob e layer.tar",
            "external data (--external-blob)",
        ),
        (
            REFERENCE
                .replace("targz-ref", "estargz-ref")
                .replace("blob.rafs", "x")
                + " layer.tar.gz",
            "estargz-ref",
        ),
        (
            "create -t estargz-rafs -B b -D blobs layer.tar.gz".to_owned(),
            "estargz-rafs",
        ),
        (
            "create -t estargztoc-ref --blob-id x --blob-data-size 0x10 -B b -D blobs layer.tar"
                .to_owned(),
            "estargztoc-ref",
        ),
        (
            "create -t stargz_index --blob-id x --blob-data-size 10 -B b -D blobs layer.tar"
                .to_owned(),
            "estargztoc-ref",
        ),
    ] {
        refused(&place, 1, &line, &[word, "not supported"]);
    }
}

#[test]
fn commands() {
    let place = Place::new();
    for (line, word) in [
        (
            "compact --bootstrap boot --blob-dir blobs --min-used-ratio 5 --compact-blob-size 10485760 \
             --max-compact-size 104857600 --layers-to-compact 32 --backend-type registry \
             --backend-config-file cfg --log-level info --output-json blobs/compact-result.json \
             --output-bootstrap boot.compact --chunk-dict bootstrap=x",
            "compact",
        ),
        (
            "chunkdict generate --log-level warn --bootstrap boot --database sqlite:///d.db \
             --output-json out.json a.boot b.boot",
            "chunkdict",
        ),
        (
            "optimize --log-level warn --prefetch-files p --bootstrap boot --output-blob-dir blobs \
             --output-bootstrap out --output-json out.json --blob-dir blobs",
            "optimize",
        ),
        (
            "optimize --log-level warn --prefetch-files p --bootstrap boot --output-blob-dir blobs \
             --output-bootstrap out --output-json out.json --backend-type registry --backend-config '{}'",
            "optimize",
        ),
    ] {
        refused(&place, 1, line, &[word, "not supported"]);
    }
}

/// The text that a smoke test looks for, with each of them.
#[test]
fn conflicts_with_a_blob_cache() {
    let place = Place::new();
    let cannot = |option: &str| {
        format!("argument '{option}' cannot be used with '--blob-cache-dir <blob-cache-dir>'")
    };
    let mut rows = vec![
        (
            "create -t targz-ref --blob-dir blobs".to_owned(),
            cannot("--blob-dir <blob-dir>"),
        ),
        (
            "create -t targz-ref --bootstrap b --blob b".to_owned(),
            cannot("--blob <blob>"),
        ),
        (
            "create -t targz-ref --blob-inline-meta".to_owned(),
            cannot("--blob-inline-meta"),
        ),
        (
            "create -t targz-ref --bootstrap b --compressor zstd".to_owned(),
            cannot("--compressor <compressor>"),
        ),
    ];
    for kind in ["tar-tarfs", "estargztoc-ref", "estargz-rafs", "estargz-ref"] {
        let text = format!("conversion type `{kind}` conflicts with `--blob-cache-dir`");
        rows.push((format!("create -t {kind} --bootstrap b --blob-id x"), text));
    }
    for (line, text) in rows {
        refused(
            &place,
            2,
            &format!("{line} --blob-cache-dir blobs layer.tar"),
            &[&text],
        );
    }
}

#[test]
fn other_combinations() {
    let place = Place::new();
    for (line, word) in [
        ("create rootfs", "--blob"),
        ("create --blob b rootfs", "--bootstrap"),
        (
            "create -B b --blob-inline-meta -D blobs rootfs",
            "cannot be used with",
        ),
        (
            "create --blob-inline-meta --blob-id x -D blobs rootfs",
            "cannot be used with",
        ),
        ("create -D blobs --chunk-size 0x1800 rootfs", "--chunk-size"),
        (
            "create -D blobs --chunk-size 0x2000000 rootfs",
            "--chunk-size",
        ),
        (
            "create -D blobs --batch-size 0x200000 rootfs",
            "--batch-size",
        ),
        (
            "create -D blobs --features blob-toc --fs-version 5 rootfs",
            "--fs-version",
        ),
        ("create -D blobs --features tarfs rootfs", "blob-toc"),
        ("create -D blobs --type unknown rootfs", "--type"),
        (
            "create -D blobs -t targz-ref --blob-id x layer.tar.gz",
            "--blob-id",
        ),
        (
            "create -D blobs -t targz-ref --prefetch-policy blob layer.tar.gz",
            "--prefetch-policy",
        ),
        ("merge layer.tar", "--bootstrap"),
        ("merge -B b layer.tar --blob-digests a,b", "--blob-digests"),
        (
            "merge -B b layer.tar --original-blob-ids a,b",
            "--original-blob-ids",
        ),
        (
            "merge -B b layer.tar --blob-toc-sizes 1,2",
            "--blob-toc-sizes",
        ),
    ] {
        refused(&place, 2, line, &[word]);
    }
}
