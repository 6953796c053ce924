//! `nydusify`, the snapshotter's own calls, and the smoke tests: what they run beside the
//! converter package.

use std::fs;

use crate::pack::TAR;
use crate::place::{Call, Place};

/// `nydusify build`: a directory into files, with a report.
#[test]
fn build() {
    let place = Place::new();
    place.quiet("create -l warn -B dict.boot -D blobs rootfs");
    fs::create_dir(place.path("more")).unwrap();
    fs::write(place.path("more/file"), "more").unwrap();
    for (before, after, source) in [
        ("", "", "rootfs"),
        (
            "--aligned-chunk",
            "--compressor lz4_block --prefetch-policy fs --chunk-size 0x100000",
            "rootfs",
        ),
        (
            "--chunk-dict bootstrap=dict.boot",
            "--compressor zstd --prefetch-policy fs",
            "more",
        ),
        ("--parent-bootstrap dict.boot", "", "more"),
        // Unset, as it is written there.
        ("--parent-bootstrap ''", "", "rootfs"),
    ] {
        for spec in ["oci", "overlayfs", "none"] {
            let line = format!(
                "create {before} --bootstrap built.boot --log-level warn --whiteout-spec {spec} \
                 --output-json out.json --blob built.blob --fs-version 6 {after} {source}"
            );
            let run = place.call(&Call::new(&line).patterns("/")).ok(&line);
            assert_eq!(
                (run.stdout.as_str(), run.stderr.as_str()),
                ("", ""),
                "{line}"
            );
            let report = place.json("out.json");
            assert!(!report["blobs"].as_array().unwrap().is_empty(), "{report}");
            place
                .run("check --log-level warn --output-json c.json --bootstrap built.boot")
                .ok(&line);
            assert_eq!(place.json("c.json")["blobs"], report["blobs"], "{line}");
        }
    }
}

#[test]
fn check_and_commit() {
    let place = Place::new();
    place.quiet("create -l warn -B boot -D blobs --compressor lz4_block rootfs");
    for line in [
        "check --log-level warn --output-json out.json --bootstrap boot",
        "check --log-level warn --bootstrap boot --output-json out.json",
    ] {
        let run = place.run(line).ok(line);
        assert_eq!(run.stderr, "");
        let report = place.json("out.json");
        assert_eq!(
            (&report["fs_version"], &report["compressor"]),
            (&"6".into(), &"lz4_block".into())
        );
        assert_eq!(
            place
                .read("out.json")
                .iter()
                .filter(|byte| **byte == b'\n')
                .count(),
            0
        );
    }
}

/// `nydusify` reads standard output and standard error as one JSON value; the
/// snapshotter passes command and argument as one word.
#[test]
fn inspect() {
    let place = Place::new();
    place.quiet("create -l warn -J out.json -B boot -D blobs rootfs");
    let id = place.json("out.json")["blobs"][0]
        .as_str()
        .unwrap()
        .to_owned();
    for line in [
        "inspect boot --request blobs",
        "inspect '-R blobs' boot",
        "inspect -R blobs boot",
    ] {
        let run = place.run(line).ok(line);
        assert_eq!(run.stderr, "", "{line}");
        assert!(
            run.stdout.contains(&format!("\"blob_id\":\"{id}\"")),
            "{}",
            run.stdout
        );
        let rows: serde_json::Value = serde_json::from_str(&run.stdout).unwrap();
        for key in [
            "readahead_offset",
            "readahead_size",
            "decompressed_size",
            "compressed_size",
        ] {
            assert!(rows[0][key].is_u64(), "{rows}");
        }
        let compact = |text: &str| !text.contains(|c: char| c.is_ascii_whitespace());
        assert!(compact(&run.stdout), "{:?}", run.stdout);
    }
    let stats: serde_json::Value =
        serde_json::from_str(&place.run("inspect boot -R stats").ok("stats").stdout).unwrap();
    assert_eq!(stats, serde_json::json!({"inodes_count": 7}));
    let prefetch = place.run("inspect boot -R prefetch").ok("prefetch").stdout;
    assert_eq!(prefetch, "[]");
    for request in ["q", "exit", "'cd usr'"] {
        let run = place.run(&format!("inspect boot -R {request}")).ok(request);
        assert_eq!(run.stdout, "null", "{request}");
    }
    for request in ["bogus", "'chunk x'", "'stat'"] {
        let run = place.run(&format!("inspect boot -R {request}"));
        assert_eq!(run.code, 1, "{request}");
    }
}

/// Not what a smoke test asserts of them, but that each is run.
#[test]
fn smoke_tests() {
    let place = Place::new();
    for (kind, source) in [
        ("dir-rafs", "rootfs"),
        ("directory", "rootfs"),
        ("tar-rafs", "layer.tar"),
        ("targz-rafs", "layer.tar.gz"),
    ] {
        let line = format!("create -t {kind} -B {kind}.boot -D blobs {source}");
        place.quiet(&line);
        let run = place
            .run(&format!(
                "check --log-level error --bootstrap {kind}.boot -v"
            ))
            .ok(&line);
        let title = "RAFS filesystem metadata is valid, referenced data blobs: \n";
        assert!(run.stdout.contains(title), "{}", run.stdout);
        assert!(run.stdout.starts_with(title), "{}", run.stdout);
        let short = place.run(&format!("check {kind}.boot")).ok(&line).stdout;
        assert!(short.starts_with(title), "{short}");
        assert!(run.stdout.contains("/usr/bin/tool") && run.stderr.is_empty());
    }
    place.quiet("create -t targz-ref --bootstrap ref.boot --blob-dir blobs layer.tar.gz");
    place
        .run("check --log-level error --bootstrap ref.boot -v")
        .ok("targz-ref");
}

/// The smoke test of cache files: two for every blob, under the names of a daemon.
#[test]
fn blob_cache() {
    let place = Place::new();
    for (kind, source) in [
        ("targz-ref", "layer.tar.gz"),
        ("targz-ref", "layer.tar"),
        ("tar-rafs", "layer.tar"),
        ("dir-rafs", "rootfs"),
    ] {
        fs::create_dir(place.path("cache")).unwrap();
        place.quiet(&format!(
            "create -t {kind} --bootstrap c.boot --blob-cache-dir cache -J c.json {source}"
        ));
        let report = place.json("c.json");
        let id = report["blobs"][0].as_str().unwrap();
        let names = [format!("{id}.blob.data"), format!("{id}.blob.meta")];
        assert_eq!(place.names("cache"), names, "{kind}");
        let compressor = if kind == "targz-ref" { "gzip" } else { "none" };
        assert_eq!(report["compressor"], compressor);
        let line = "check c.boot";
        let size = fs::metadata(place.path("cache").join(&names[0]))
            .unwrap()
            .len();
        let listed = place.run(line).ok(line).stdout;
        assert!(
            listed.contains(&format!("uncompressed size {size},")),
            "{listed}"
        );
        fs::remove_dir_all(place.path("cache")).unwrap();
    }
}

/// The converter's own merge after `inspect`, without standard input to read.
#[test]
fn nobody_waits_for_standard_input() {
    let place = Place::new();
    let id = crate::join::pack(&place, "layer", "");
    for line in [
        format!("merge --bootstrap image.boot {id}"),
        "create --bootstrap boot --blob blob rootfs".to_owned(),
        TAR.replace("--prefetch-policy fs", "")
            .replace("tar-rafs", "dir-rafs")
            + " --blob x rootfs",
    ] {
        let line = line.replace("--blob blob.rafs", "");
        let words: Vec<String> = line.split_whitespace().map(str::to_owned).collect();
        let mut child = place.spawn(&words);
        let open = child.stdin.take();
        let output = child.wait_with_output().unwrap();
        assert!(
            output.status.success(),
            "{line}: {}",
            String::from_utf8_lossy(&output.stderr)
        );
        drop(open);
    }
}
