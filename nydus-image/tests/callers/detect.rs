//! What callers find out before they call: help, version, reports.

use std::collections::BTreeSet;

use crate::place::Place;

/// The converter reads standard output only, and looks for words.
#[test]
fn features_are_in_the_help() {
    let place = Place::new();
    let run = place.run("create -h").ok("create -h");
    for words in [
        &["--type", "tar-rafs"][..],
        &["--batch-size"],
        &["--encrypt"],
    ] {
        assert!(
            words.iter().all(|word| run.stdout.contains(word)),
            "{words:?}: {}",
            run.stdout
        );
    }
    assert_eq!(run.stderr, "");
    for line in [
        "--help",
        "-h",
        "create --help",
        "merge -h",
        "check -h",
        "inspect -h",
        "stat -h",
        "unpack -h",
        "export -h",
        "convert -h",
    ] {
        let run = place.run(line).ok(line);
        assert!(
            run.stdout.contains("Usage: ") && run.stderr.is_empty(),
            "{line}"
        );
    }
}

/// Harbor looks for `Version:\s*(v.*)`, the snapshotter for `Git Commit:\s*(.+)`.
#[test]
fn the_version_is_a_table() {
    let place = Place::new();
    for line in ["--version", "-V"] {
        let run = place.run(line).ok(line);
        assert_eq!(run.stderr, "");
        let lines: Vec<_> = run.stdout.split('\n').collect();
        assert!(
            lines[0].starts_with("nydus-image \rVersion: \tv"),
            "{lines:?}"
        );
        for (line, key) in lines[1..].iter().zip([
            "Git Commit: \t",
            "Build Time: \t",
            "Profile: \t",
            "Rustc: \t\t",
        ]) {
            let value = line
                .strip_prefix(key)
                .unwrap_or_else(|| panic!("{key:?}: {line:?}"));
            assert!(!value.trim().is_empty(), "{line:?}");
        }
        assert!(
            lines[3].ends_with("debug") || lines[3].ends_with("release"),
            "{lines:?}"
        );
    }
}

/// Every report has every field, of one type.
#[test]
fn reports_have_one_schema() {
    let place = Place::new();
    place.quiet("create -l warn -J create.json -B boot -D blobs rootfs");
    place.quiet("create -l warn -J inline.json --blob-inline-meta -D blobs rootfs");
    place.quiet("merge -l warn -J merge.json -B merged boot");
    place.run("check -l warn -J check.json boot").ok("check");
    let keys: BTreeSet<&str> = [
        "version",
        "bootstrap",
        "blobs",
        "external_bootstrap",
        "external_blobs",
        "trace",
        "fs_version",
        "compressor",
    ]
    .into();
    for name in ["create.json", "inline.json", "merge.json", "check.json"] {
        let report = place.json(name);
        let found: BTreeSet<&str> = report
            .as_object()
            .unwrap()
            .keys()
            .map(String::as_str)
            .collect();
        assert_eq!(found, keys, "{name}");
        for key in [
            "version",
            "bootstrap",
            "external_bootstrap",
            "fs_version",
            "compressor",
        ] {
            assert!(report[key].is_string(), "{name}: {key}");
        }
        for key in ["blobs", "external_blobs"] {
            assert!(
                report[key]
                    .as_array()
                    .unwrap()
                    .iter()
                    .all(serde_json::Value::is_string)
            );
        }
        let times = report["trace"]["consumed_time"].as_object().unwrap();
        assert!(times.values().all(serde_json::Value::is_number), "{name}");
        let events = report["trace"]["registered_events"].as_object().unwrap();
        assert!(
            events.values().all(serde_json::Value::is_string),
            "{name}: {events:?}"
        );
        assert_eq!(report["fs_version"], "6");
        let version = report["version"].as_str().unwrap();
        assert!(
            version.starts_with('v') && version.contains('-'),
            "{version}"
        );
        let lines = place
            .read(name)
            .iter()
            .filter(|byte| **byte == b'\n')
            .count();
        assert_eq!(
            lines == 0,
            name == "check.json",
            "{name}: only check's is on one line"
        );
    }
    assert_eq!(place.json("inline.json")["bootstrap"], "");
    let id = place.json("create.json")["blobs"][0].clone();
    let digits = id.as_str().unwrap();
    assert!(
        digits.len() == 64
            && digits
                .bytes()
                .all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'))
    );
}
