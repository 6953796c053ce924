//! `create` by the converter package: one layer from a FIFO into a FIFO.

use crate::place::{Call, Place, Run, sha256};

/// What every conversion of a tar begins with.
pub(crate) const TAR: &str = "create --log-level warn --prefetch-policy fs --blob blob.rafs \
    --whiteout-spec none --fs-version 6 --type tar-rafs --blob-inline-meta";

/// From a directory, where streams are switched off.
const DIRECTORY: &str = "create --log-level warn --prefetch-policy fs --blob blob \
    --whiteout-spec none --fs-version 6 --source-type directory --inline-bootstrap";

/// An unconverted layer with a table that makes it readable in parts.
pub(crate) const REFERENCE: &str = "create --log-level warn --type targz-ref --blob-inline-meta \
    --features blob-toc --blob blob.rafs";

/// Every option that the converter may add, alone and all together.
const TAILS: [&str; 10] = [
    "",
    "--features blob-toc",
    "--compressor none",
    "--compressor lz4_block",
    "--compressor zstd",
    "--aligned-chunk",
    "--chunk-size 0x1000",
    "--batch-size 0x100000",
    "--chunk-dict bootstrap=dict.boot",
    "--features blob-toc --chunk-dict bootstrap=dict.boot --compressor zstd --aligned-chunk \
        --chunk-size 0x100000 --batch-size 0x100000",
];

/// The name at the end of a blob says what a reader finds there.
fn ends_in(blob: &[u8], name: &str) -> bool {
    blob.len() > 512 && blob[blob.len() - 512..].starts_with(format!("{name}\0").as_bytes())
}

/// The layer as the converter stores it, under its digest, and a check of its tree.
fn accept(place: &Place, blob: &[u8], what: &str) {
    let id = sha256(blob);
    std::fs::write(place.path(&format!("blobs/{id}")), blob).unwrap();
    let last = if what.contains("blob-toc") {
        "rafs.blob.toc"
    } else {
        "image.boot"
    };
    assert!(ends_in(blob, last), "{what}");
}

fn silent(run: Run, what: &str) -> Vec<u8> {
    let run = run.ok(what);
    assert_eq!(
        (run.stdout.as_str(), run.stderr.as_str()),
        ("", ""),
        "{what}"
    );
    run.blob
}

#[test]
fn a_tar_through_fifos() {
    let place = Place::new();
    place.quiet("create -l warn -B dict.boot -D blobs rootfs");
    for tail in TAILS {
        let line = format!("{TAR} {tail} blob.targz");
        // The FIFO has this name although what comes is not compressed.
        let call = Call::new(&line)
            .patterns("/")
            .drain("blob.rafs")
            .feed("layer.tar", "blob.targz");
        let blob = silent(place.call(&call), &line);
        accept(&place, &blob, &line);
        assert_eq!(
            blob,
            silent(place.call(&call), &line),
            "the same again: {line}"
        );
    }
}

#[test]
fn a_directory_into_a_fifo() {
    let place = Place::new();
    place.quiet("create -l warn -B dict.boot -D blobs rootfs");
    for tail in TAILS {
        let line = format!("{DIRECTORY} {tail} rootfs");
        let call = Call::new(&line).patterns("/usr\n/hello").drain("blob");
        accept(&place, &silent(place.call(&call), &line), &line);
    }
}

#[test]
fn a_layer_that_stays_what_it_is() {
    let place = Place::new();
    for source in ["layer.tar.gz", "layer.tar"] {
        let line = format!("{REFERENCE} blob.targz");
        let call = Call::new(&line)
            .drain("blob.rafs")
            .feed(source, "blob.targz");
        let blob = silent(place.call(&call), &line);
        accept(&place, &blob, &line);
        assert!(
            blob.len() < 200_000,
            "the data is not in it: {} bytes",
            blob.len()
        );
    }
}

/// `nydusify` has a copy of the converter that names the type by what the source is.
#[test]
fn the_converter_of_nydusify() {
    let place = Place::new();
    let line = TAR.replace("tar-rafs", "dir-rafs");
    let line = format!("{line} --features blob-toc --compressor zstd --chunk-size 0x100000 rootfs");
    let call = Call::new(&line).patterns("/").drain("blob.rafs");
    accept(&place, &silent(place.call(&call), &line), &line);
    let line = format!("{TAR} --crc blob.targz");
    let call = Call::new(&line)
        .patterns("/")
        .drain("blob.rafs")
        .feed("layer.tar", "blob.targz");
    place.call(&call).refused(2, &["--crc"], &line);
}

/// Patterns of any form never stop a conversion.
#[test]
fn patterns() {
    let place = Place::new();
    for patterns in [
        "/",
        "/\n",
        "",
        "\n\n",
        " /usr \n\nrelative\n",
        "/absent\n",
        "/usr\n/usr/bin\n",
    ] {
        for policy in ["fs", "blob"] {
            let line = format!("create --prefetch-policy {policy} -B boot -D blobs rootfs");
            let run = place.call(&Call::new(&line).patterns(patterns)).ok(&line);
            assert_eq!(run.stdout, "", "{patterns:?}");
            let warned = run.stderr.contains("relative");
            assert_eq!(warned, patterns.contains("relative"), "{}", run.stderr);
        }
    }
}
