//! The program as other programs call it: exit codes, streams, files and FIFOs.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "helpers of tests fail like tests"
)]

use std::io::{Read as _, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use nix::sys::stat::Mode;
use tempfile::TempDir;

/// A directory to work in, with a small tree `tree` and its archive `tree.tar`.
struct Place(TempDir);

struct Run {
    code: i32,
    stdout: String,
    stderr: String,
}

impl Place {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let tree = dir.path().join("tree");
        std::fs::create_dir_all(tree.join("sub")).unwrap();
        std::fs::write(tree.join("hello"), "hello\n").unwrap();
        std::fs::write(tree.join("sub/big"), "0123456789".repeat(300_000)).unwrap();
        std::fs::write(tree.join(".wh.gone"), "").unwrap();
        let mut archive =
            tar::Builder::new(std::fs::File::create(dir.path().join("tree.tar")).unwrap());
        archive.append_dir_all(".", &tree).unwrap();
        archive.finish().unwrap();
        std::fs::create_dir(dir.path().join("blobs")).unwrap();
        Self(dir)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn command(&self, line: &str) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_nydus-image"));
        command
            .current_dir(self.0.path())
            .args(line.split_whitespace())
            .env("RUST_BACKTRACE", "1")
            .stdin(Stdio::null());
        command
    }

    /// Runs the words of `line`.
    fn run(&self, line: &str) -> Run {
        Run::from(self.command(line).output().unwrap())
    }

    fn run_with_input(&self, line: &str, input: &str) -> Run {
        let mut command = self.command(line);
        command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        let mut child = command.spawn().unwrap();
        child
            .stdin
            .take()
            .unwrap()
            .write_all(input.as_bytes())
            .unwrap();
        Run::from(child.wait_with_output().unwrap())
    }

    fn ok(&self, line: &str) -> String {
        let run = self.run(line);
        assert_eq!(run.code, 0, "{line}\n{}", run.stderr);
        run.stdout
    }

    fn files(&self, dir: &str) -> Vec<String> {
        let entries = std::fs::read_dir(self.path(dir)).unwrap();
        let mut names: Vec<_> = entries
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }

    fn json(&self, name: &str) -> serde_json::Value {
        serde_json::from_slice(&std::fs::read(self.path(name)).unwrap()).unwrap()
    }

    fn fifo(&self, name: &str) -> PathBuf {
        let path = self.path(name);
        nix::unistd::mkfifo(&path, Mode::S_IRUSR | Mode::S_IWUSR).unwrap();
        path
    }
}

impl From<Output> for Run {
    fn from(output: Output) -> Self {
        Self {
            code: output.status.code().unwrap_or(-1),
            stdout: String::from_utf8(output.stdout).unwrap(),
            stderr: String::from_utf8(output.stderr).unwrap(),
        }
    }
}

#[test]
fn help_and_version_are_for_programs_too() {
    let place = Place::new();
    let version = place.ok("--version");
    assert!(version.contains("\rVersion: \tv"), "{version:?}");
    assert!(
        version
            .lines()
            .any(|line| line.starts_with("Git Commit: \t")),
        "{version:?}"
    );
    assert_eq!(place.run("-V").stdout, version);
    let help = place.ok("create -h");
    for feature in ["--type", "tar-rafs", "--batch-size", "--encrypt"] {
        assert!(help.contains(feature), "{feature} in {help}");
    }
    let run = place.run("");
    assert_eq!(
        (run.code, run.stdout.lines().count()),
        (0, 1),
        "{}",
        run.stdout
    );
}

#[test]
fn usage_errors_exit_with_2() {
    let place = Place::new();
    for (line, message) in [
        ("frobnicate", "error: "),
        ("create", "SOURCE"),
        ("create --bogus tree", "--bogus"),
        ("create -B b tree", "--blob"),
        ("create -D blobs --chunk-size 1000 tree", "--chunk-size"),
        (
            "create -D blobs --chunk-size 0x1000 --batch-size 0x2000 tree",
            "--batch-size",
        ),
        (
            "create -D blobs --compressor gzip tree",
            "none, lz4_block, zstd",
        ),
        (
            "create -B b --blob-inline-meta -D blobs tree",
            "cannot be used with",
        ),
        (
            "create --blob-id x --blob-inline-meta -D blobs tree",
            "cannot be used with",
        ),
        (
            "create -B b --blob-cache-dir blobs -t estargz-ref tree",
            "conversion type `estargz-ref` conflicts with `--blob-cache-dir`",
        ),
        (
            "create -B b --blob-cache-dir blobs --blob-dir blobs tree",
            "argument '--blob-dir <blob-dir>' cannot be used with '--blob-cache-dir <blob-cache-dir>'",
        ),
        (
            "create -B b --blob x --blob-cache-dir blobs tree",
            "argument '--blob <blob>' cannot be used with '--blob-cache-dir <blob-cache-dir>'",
        ),
        (
            "create --blob-inline-meta --blob-cache-dir blobs tree",
            "argument '--blob-inline-meta' cannot be used with '--blob-cache-dir <blob-cache-dir>'",
        ),
        (
            "create -B b --compressor none --blob-cache-dir blobs tree",
            "argument '--compressor <compressor>' cannot be used with '--blob-cache-dir <blob-cache-dir>'",
        ),
        ("merge -B out", "SOURCE"),
        ("merge x y", "--bootstrap"),
        (
            "merge -B out x y --blob-sizes 1",
            "--blob-sizes has 1 items for 2 sources",
        ),
        ("check", "BOOTSTRAP"),
    ] {
        let run = place.run(line);
        assert_eq!(run.code, 2, "{line}\n{}", run.stderr);
        assert!(run.stderr.starts_with("error: "), "{line}\n{}", run.stderr);
        assert!(run.stderr.contains(message), "{line}\n{}", run.stderr);
        assert_eq!(run.stdout, "", "{line}");
    }
    assert_eq!(place.files("blobs"), [""; 0]);
}

#[test]
fn what_is_not_supported_is_named() {
    let place = Place::new();
    for (line, feature) in [
        ("create -t estargz-ref -D blobs tree.tar", "estargz-ref"),
        ("create -t stargz_index -D blobs tree.tar", "estargztoc-ref"),
        ("create -t tar-tarfs -D blobs tree.tar", "tar-tarfs"),
        ("create -D blobs --encrypt tree", "encryption"),
        ("create -D blobs -v 5 tree", "RAFS version 5"),
        ("create -D blobs --attributes a tree", "external data"),
    ] {
        let run = place.run(line);
        assert_eq!(run.code, 1, "{line}\n{}", run.stderr);
        assert!(run.stderr.starts_with("Error: "), "{}", run.stderr);
        assert!(run.stderr.contains(feature), "{line}\n{}", run.stderr);
    }
    assert_eq!(place.files("blobs"), [""; 0]);
}

#[test]
fn create_names_blobs_and_reports_them() {
    let place = Place::new();
    let stdout =
        place.ok("create --log-level warn --bootstrap boot --blob-dir blobs -J out.json tree");
    assert_eq!(stdout, "");
    let report = place.json("out.json");
    let blob = report["blobs"][0].as_str().unwrap().to_owned();
    assert_eq!(place.files("blobs"), std::slice::from_ref(&blob));
    assert_eq!(report["bootstrap"], "boot");
    assert_eq!(report["fs_version"], "6");
    assert_eq!(report["compressor"], "zstd");
    assert!(report["version"].as_str().unwrap().starts_with('v'));
    assert!(report["trace"]["consumed_time"]["total_build"].is_number());
    let check = place.ok("check boot --blob-dir blobs");
    let mut lines = check.lines();
    assert_eq!(
        lines.next(),
        Some("RAFS filesystem metadata is valid, referenced data blobs: ")
    );
    assert!(
        lines
            .next()
            .unwrap()
            .starts_with(&format!("\t 0: {blob}, compressed size "))
    );
    // Equal input, equal output; options after the positional.
    place.ok("create tree --blob again.blob --bootstrap=again.boot -l warn");
    let read = |name: &str| std::fs::read(place.path(name)).unwrap();
    assert_eq!(read("boot"), read("again.boot"));
    assert_eq!(read(&format!("blobs/{blob}")), read("again.blob"));
}

#[test]
fn a_directory_takes_both_outputs() {
    let place = Place::new();
    place.ok("create --blob-dir blobs tree");
    assert_eq!(place.files("blobs").len(), 2);
    place.ok("create --blob-dir blobs --blob-id my-blob -B named tree");
    assert!(place.files("blobs").contains(&"my-blob".to_owned()));
    assert!(place.ok("check named -D blobs").contains("0: my-blob,"));
}

#[test]
fn output_without_data_is_no_blob() {
    let place = Place::new();
    std::fs::create_dir(place.path("empty")).unwrap();
    std::fs::write(place.path("old.blob"), "from an earlier build").unwrap();
    place.ok("create -B boot -b old.blob -J out.json empty");
    assert!(!place.path("old.blob").exists());
    assert_eq!(place.json("out.json")["blobs"], serde_json::json!([]));
    place.ok("check boot");
}

#[test]
fn a_failed_build_leaves_nothing() {
    let place = Place::new();
    let archive = std::fs::read(place.path("tree.tar")).unwrap();
    std::fs::write(place.path("cut.tar"), &archive[..archive.len() / 2]).unwrap();
    let before = place.files(".");
    for line in [
        "create -t tar-rafs -B boot -b blob cut.tar",
        "create -t tar-rafs -D blobs cut.tar",
        "create -B missing/boot -b blob tree",
        "create -B boot -b missing/blob tree",
        "create -B boot -b blob absent",
        "create -t tar-rafs -B boot -b blob absent",
    ] {
        let run = place.run(line);
        assert_eq!(run.code, 1, "{line}\n{}", run.stderr);
        assert!(
            run.stderr.contains("Caused by:") && !run.stderr.contains("backtrace"),
            "{}",
            run.stderr
        );
        assert_eq!(place.files("."), before, "{line}");
        assert_eq!(place.files("blobs"), [""; 0], "{line}");
    }
    let run = place.run("create -t tar-rafs -B boot -b blob cut.tar");
    assert!(run.stderr.contains("cut.tar: at byte "), "{}", run.stderr);
    assert!(run.stderr.contains("too early"), "{}", run.stderr);
}

#[test]
fn prefetch_patterns_come_from_standard_input_only_if_asked() {
    let place = Place::new();
    let run = place.run_with_input(
        "create --prefetch-policy fs -B a -b a.blob tree",
        "/sub\nbad\n",
    );
    assert_eq!(run.code, 0, "{}", run.stderr);
    assert!(run.stderr.contains("bad"), "{}", run.stderr);
    let image = rafs::Image::open(&place.path("a")).unwrap();
    assert_eq!(image.prefetch().count(), 1);
    // Standard input stays open and silent: nobody waits for it.
    let mut command = place.command("create -B b -b b.blob tree");
    let mut child = command.stdin(Stdio::piped()).spawn().unwrap();
    let open = child.stdin.take();
    assert!(child.wait().unwrap().success());
    drop(open);
}

#[test]
fn an_archive_can_come_from_standard_input() {
    let place = Place::new();
    for source in ["/dev/stdin", "-"] {
        let archive = std::fs::File::open(place.path("tree.tar")).unwrap();
        let mut command = place.command("create -t tar-rafs -B boot -b blob");
        let output = command.arg(source).stdin(archive).output().unwrap();
        assert!(
            output.status.success(),
            "{}",
            String::from_utf8_lossy(&output.stderr)
        );
        place.ok("check boot");
    }
}

/// Runs a command line that packs a layer as image builders do: from one FIFO into
/// another, patterns on standard input. Returns what came out.
fn pack(place: &Place, line: &str, source: &Path, blob: &Path) -> Vec<u8> {
    let mut command = place.command(line);
    command
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped());
    let mut child = command.spawn().unwrap();
    let archive = std::fs::read(place.path("tree.tar")).unwrap();
    let feed = {
        let source = source.to_owned();
        std::thread::spawn(move || std::fs::write(source, archive).unwrap())
    };
    child.stdin.take().unwrap().write_all(b"/\n").unwrap();
    let mut packed = Vec::new();
    std::fs::File::open(blob)
        .unwrap()
        .read_to_end(&mut packed)
        .unwrap();
    feed.join().unwrap();
    let output = child.wait_with_output().unwrap();
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    packed
}

#[test]
fn fifos_are_read_and_written_front_to_back() {
    let place = Place::new();
    let (source, blob) = (place.fifo("blob.targz"), place.fifo("blob.rafs"));
    let line = "create --log-level warn --prefetch-policy fs --blob blob.rafs --whiteout-spec none \
        --fs-version 6 --type tar-rafs --blob-inline-meta --features blob-toc --compressor zstd \
        --aligned-chunk --chunk-size 0x100000 --batch-size 0x1000 blob.targz";
    let packed = pack(&place, line, &source, &blob);
    let same = pack(&place, line, &source, &blob);
    assert_eq!(packed, same);
    // The same layer into a file, from a file.
    place.ok(&line
        .replace("blob.rafs", "plain.blob")
        .replace("blob.targz", "tree.tar")
        .replace("--prefetch-policy fs", "--prefetch-policy none"));
    assert!(place.path("plain.blob").exists());
    assert!(
        packed.ends_with(&[0; 200]),
        "the last section's tar header ends in padding"
    );
    assert!(packed[packed.len() - 512..].starts_with(b"rafs.blob.toc\0"));
}

/// Builds a layer of one file and returns the name of its bootstrap.
fn layer(place: &Place, name: &str, files: &[(&str, &str)], options: &str) -> String {
    let tree = place.path(&format!("{name}.tree"));
    for (file, data) in files {
        let path = tree.join(file);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, data).unwrap();
    }
    place.ok(&format!(
        "create -l warn --whiteout-spec none -B {name}.boot -D blobs {options} -J {name}.json {name}.tree"
    ));
    let report = place.json(&format!("{name}.json"));
    let id = report["blobs"][0].as_str().map_or(name, |id| id).to_owned();
    std::fs::rename(
        place.path(&format!("{name}.boot")),
        place.path(&format!("{id}.boot")),
    )
    .unwrap();
    format!("{id}.boot")
}

#[test]
fn merge_applies_whiteouts_and_names_blobs_by_files() {
    let place = Place::new();
    let lower = layer(
        &place,
        "lower",
        &[("a/gone", "1"), ("a/kept", "2"), ("b", "3")],
        "",
    );
    let upper = layer(&place, "upper", &[("a/.wh.gone", ""), ("b", "4444")], "");
    let stdout = place.ok(&format!(
        "merge -l warn --output-json m.json --bootstrap image {lower} {upper}"
    ));
    assert_eq!(stdout, "");
    let image = rafs::Image::open(&place.path("image")).unwrap();
    let dump = rafs::dump::dump(&image).unwrap();
    let names: Vec<_> = dump
        .lines()
        .filter_map(|line| line.split(' ').next())
        .collect();
    assert_eq!(names, ["/", "/a", "/b", "/a/kept"]);
    // In the order of first use: `/b` of the upper layer comes before `/a/kept`.
    let id = |file: &str| file.strip_suffix(".boot").unwrap().to_owned();
    assert_eq!(
        place.json("m.json")["blobs"],
        serde_json::json!([id(&upper), id(&lower)])
    );
    place.ok("check image -D blobs");
    let run = place.run(&format!(
        "merge -B image2 {lower} {upper} --blob-digests one,two"
    ));
    assert_eq!(run.code, 0, "{}", run.stderr);
    assert!(place.ok("check image2").contains("0: two,"));
    place.ok(&format!("merge -B image3 --parent-bootstrap image {upper}"));
    assert!(place.ok("check image3").contains(&id(&lower)));
}

#[test]
fn layers_that_cannot_be_merged_exit_with_2() {
    let place = Place::new();
    let lower = layer(&place, "lower", &[("f", "1")], "");
    for (name, options, what) in [
        ("lz4", "--compressor lz4_block", "compressor lz4_block"),
        ("sha", "--digester sha256", "digester sha256"),
        ("owners", "--repeatable", "owners not stored"),
    ] {
        let upper = layer(&place, name, &[("f", name)], options);
        let run = place.run(&format!("merge -B image {lower} {upper}"));
        assert_eq!(run.code, 2, "{}", run.stderr);
        assert!(
            run.stderr
                .contains("message:Inconsistent RAFS Filesystem: "),
            "{}",
            run.stderr
        );
        assert!(run.stderr.contains(what), "{}", run.stderr);
    }
    let upper = layer(&place, "chunks", &[("f", "2")], "--chunk-size 0x1000");
    let run = place.run(&format!("merge -B image {lower} {upper}"));
    assert_eq!(run.code, 1, "{}", run.stderr);
    assert!(
        run.stderr.contains("chunks of 4096 bytes"),
        "{}",
        run.stderr
    );
    std::fs::write(place.path("broken"), vec![1; 8192]).unwrap();
    let run = place.run(&format!("merge -B image {lower} broken"));
    assert_eq!(run.code, 1, "{}", run.stderr);
    assert!(run.stderr.contains("broken"), "{}", run.stderr);
    assert!(!place.path("image").exists());
}

#[test]
fn check_finds_every_damaged_chunk() {
    let place = Place::new();
    for compressor in ["none", "lz4_block", "zstd"] {
        let report = format!("{compressor}.json");
        place.ok(&format!(
            "create -B boot -D blobs -J {report} --compressor {compressor} tree"
        ));
        place.ok("check --blob-dir blobs boot");
        let id = place.json(&report)["blobs"][0].as_str().unwrap().to_owned();
        let path = place.path(&format!("blobs/{id}"));
        let good = std::fs::read(&path).unwrap();
        let mut bad = good.clone();
        bad[10] ^= 1;
        std::fs::write(&path, &bad).unwrap();
        let run = place.run("check --blob-dir blobs boot");
        assert_eq!(run.code, 1, "{compressor}");
        assert!(
            run.stderr.contains(&format!("blob {id}: chunk ")),
            "{}",
            run.stderr
        );
        std::fs::write(&path, &good[..good.len() / 2]).unwrap();
        let run = place.run("check --blob-dir blobs boot");
        assert_eq!(run.code, 1, "{compressor}");
        assert!(run.stderr.contains(&id), "{}", run.stderr);
        std::fs::remove_file(&path).unwrap();
        let run = place.run("check --blob-dir blobs boot");
        assert!(run.code == 1 && run.stderr.contains(&id), "{}", run.stderr);
    }
}

#[test]
fn check_reports_on_one_line() {
    let place = Place::new();
    place.ok("create -B boot -b blob -l warn tree");
    place.ok("check --log-level warn --output-json out.json --bootstrap boot");
    let text = std::fs::read_to_string(place.path("out.json")).unwrap();
    assert_eq!(text.lines().count(), 1);
    assert_eq!(place.json("out.json")["compressor"], "zstd");
    let verbose = place.ok("check --log-level error --bootstrap boot -v");
    assert!(verbose.contains("/sub/big"), "{verbose}");
    let run = place.run("check blob");
    assert!(
        run.code == 1 && run.stderr.contains("blob"),
        "{}",
        run.stderr
    );
}

#[test]
fn logs_go_to_standard_error_or_a_file() {
    let place = Place::new();
    let run = place.run("create -B boot -b blob tree");
    assert_eq!(run.stdout, "");
    let line = run.stderr.lines().next().unwrap();
    assert!(
        line.starts_with('[') && line.contains(" +00:00] INFO built "),
        "{line}"
    );
    let run = place.run("-L log create -B boot -b blob tree");
    assert_eq!((run.stdout.as_str(), run.stderr.as_str()), ("", ""));
    assert!(
        std::fs::read_to_string(place.path("log"))
            .unwrap()
            .contains("INFO built")
    );
}
