//! `inspect`, `stat`, `unpack` and `export` as other programs call them.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "helpers of tests fail like tests"
)]

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::process::{Command, Stdio};

use serde_json::Value;
use tempfile::TempDir;

/// A directory with the tree `tree` and its image `image.boot`, blob in `blobs`;
/// and with the same as one layer, taken apart: `layer`, `boot` and `data`.
struct Place(TempDir);

struct Run {
    code: i32,
    stdout: String,
    stderr: String,
}

impl Place {
    fn new() -> Self {
        let place = Self(tempfile::tempdir().unwrap());
        let tree = place.path("tree");
        std::fs::create_dir_all(tree.join("sub/deeper")).unwrap();
        std::fs::create_dir(place.path("blobs")).unwrap();
        std::fs::write(tree.join("hello"), "hello\n").unwrap();
        std::fs::hard_link(tree.join("hello"), tree.join("hello-again")).unwrap();
        std::fs::write(tree.join("sub/big"), "0123456789".repeat(300_000)).unwrap();
        std::fs::write(tree.join("sub/deeper/copy"), "0123456789".repeat(300_000)).unwrap();
        std::os::unix::fs::symlink("hello", tree.join("link")).unwrap();
        place.ok("create --bootstrap image.boot --blob-dir blobs tree");
        place
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn command(&self, line: &str) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_nydus-image"));
        command
            .current_dir(self.0.path())
            .args(line.split_whitespace())
            .stdin(Stdio::null());
        command
    }

    fn run(&self, command: &mut Command) -> Run {
        let output = command.output().unwrap();
        Run {
            code: output.status.code().unwrap_or(-1),
            stdout: String::from_utf8(output.stdout).unwrap(),
            stderr: String::from_utf8(output.stderr).unwrap(),
        }
    }

    fn ok(&self, line: &str) -> String {
        let run = self.run(&mut self.command(line));
        assert_eq!(run.code, 0, "{line}\n{}", run.stderr);
        run.stdout
    }

    fn fails(&self, line: &str, code: i32) -> String {
        let run = self.run(&mut self.command(line));
        assert_eq!(run.code, code, "{line}\n{}", run.stderr);
        assert_eq!(run.stdout, "", "{line}");
        run.stderr
    }

    fn blob(&self) -> String {
        let mut files = std::fs::read_dir(self.path("blobs")).unwrap();
        files
            .next()
            .unwrap()
            .unwrap()
            .file_name()
            .into_string()
            .unwrap()
    }

    /// Answers of the prompt to these lines.
    fn prompt(&self, lines: &str) -> String {
        let mut command = self.command("inspect image.boot");
        command.stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command.spawn().unwrap();
        child
            .stdin
            .take()
            .unwrap()
            .write_all(lines.as_bytes())
            .unwrap();
        let output = child.wait_with_output().unwrap();
        assert!(output.status.success());
        String::from_utf8(output.stdout).unwrap()
    }

    /// GNU tar's idea of an archive is the tree.
    fn assert_is_tree(&self, tar: &str) {
        let to = tempfile::tempdir().unwrap();
        let mut command = Command::new("tar");
        command
            .arg("-xpf")
            .arg(self.path(tar))
            .arg("-C")
            .arg(to.path());
        assert!(command.status().unwrap().success());
        let mut command = Command::new("diff");
        command
            .args(["-r", "--no-dereference"])
            .arg(self.path("tree"))
            .arg(to.path());
        let output = command.output().unwrap();
        assert!(
            output.status.success(),
            "{}",
            String::from_utf8_lossy(&output.stdout)
        );
    }
}

#[test]
fn requests_are_answered_with_nothing_but_json() {
    let place = Place::new();
    for arguments in [
        &["inspect", "-R blobs", "image.boot"][..],
        &["inspect", "image.boot", "--request", "blobs"],
        &[
            "inspect",
            "-B",
            "image.boot",
            "--request=blobs",
            "-D",
            "blobs",
        ],
    ] {
        let mut command = place.command("");
        let run = place.run(command.args(arguments));
        assert_eq!((run.code, run.stderr.as_str()), (0, ""), "{arguments:?}");
        let id = format!(r#"[{{"blob_id":"{}","readahead_offset":0,"#, place.blob());
        assert!(run.stdout.starts_with(&id), "{}", run.stdout);
        assert!(run.stdout.ends_with("}]"), "{}", run.stdout);
        assert!(!run.stdout.contains(' '));
        let json: Value = serde_json::from_str(&run.stdout).unwrap();
        let keys: Vec<_> = json[0]
            .as_object()
            .unwrap()
            .keys()
            .map(String::as_str)
            .collect();
        let mut expected = vec![
            "blob_id",
            "readahead_offset",
            "readahead_size",
            "decompressed_size",
            "compressed_size",
        ];
        expected.sort_unstable();
        assert_eq!(keys, expected);
    }
    assert_eq!(
        place.ok("inspect image.boot --request stats"),
        r#"{"inodes_count":8}"#
    );
    assert_eq!(place.ok("inspect image.boot --request prefetch"), "[]");
    let mut command = place.command("inspect image.boot --request");
    let run = place.run(command.arg("stat /sub/big"));
    assert!(run.stdout.ends_with("\nnull"), "{}", run.stdout);
    for bad in [
        "",
        "nonsense",
        "stat",
        "blobs now",
        "chunk x",
        "icheck 0",
        "stat /nowhere",
    ] {
        let mut command = place.command("inspect image.boot --request");
        let run = place.run(command.arg(bad));
        assert_eq!((run.code, run.stdout.as_str()), (1, ""), "{bad}");
    }
}

#[test]
fn prefetched_paths_are_listed() {
    let place = Place::new();
    let mut command =
        place.command("create --bootstrap p.boot --blob-dir blobs --prefetch-policy fs tree");
    command.stdin(Stdio::piped());
    let mut child = command.spawn().unwrap();
    child
        .stdin
        .take()
        .unwrap()
        .write_all(b"/hello\n/sub\n")
        .unwrap();
    assert!(child.wait().unwrap().success());
    let json: Value = serde_json::from_str(&place.ok("inspect p.boot --request prefetch")).unwrap();
    let paths = |entry: usize| json[entry]["path"].clone();
    assert_eq!(paths(0), serde_json::json!(["/hello", "/hello-again"]));
    assert_eq!(paths(1), serde_json::json!(["/sub"]));
    let inode = json[0]["inode"].as_u64().unwrap();
    let names = place.run(
        place
            .command("inspect p.boot --request")
            .arg(format!("icheck {inode}")),
    );
    assert_eq!(names.stdout, "/hello\n/hello-again\nnull");
}

#[test]
fn the_prompt_walks_through_the_tree() {
    let place = Place::new();
    let output =
        place.prompt("ls\ncd sub\nls\ncd ..\nls sub/deeper\nfoo\nchunk 0\nstat hello\nq\nls\n");
    let answers: Vec<_> = output.split("Inspecting RAFS :> ").collect();
    // The first is empty, and nothing follows `q`.
    assert_eq!(answers.len(), 10, "{output}");
    assert!(answers[1].contains("hello-again") && answers[1].contains("link -> hello"));
    assert!(answers[3].contains("big") && answers[3].contains("deeper"));
    assert!(answers[5].contains("3000000 copy"), "{}", answers[5]);
    assert!(answers[6].contains("`foo` is no command"));
    assert!(answers[7].contains("/hello at 0"), "{}", answers[7]);
    assert!(answers[8].contains("links     2"));
    assert!(
        place
            .prompt("help")
            .ends_with("leave\nInspecting RAFS :> \n")
    );
}

#[test]
fn the_summary_adds_up() {
    let place = Place::new();
    let json: Value = serde_json::from_str(&place.ok("inspect --json image.boot")).unwrap();
    assert_eq!(json["version"], 1);
    assert_eq!(json["names"]["files"], 3);
    assert_eq!(json["names"]["hard_links"], 1);
    assert_eq!(json["names"]["directories"], 3);
    assert_eq!(json["content"]["file_size"], 6_000_006);
    assert_eq!(json["content"]["unique_size"], 3_000_006);
    assert_eq!(json["content"]["dedup_ratio"], 2.0);
    assert_eq!(json["blobs"][0]["share"], 1.0);
    assert_eq!(
        json["blobs"][0]["used_stored_size"],
        json["content"]["stored_size"]
    );
    let directories: Vec<_> = json["directories"].as_array().unwrap().iter().collect();
    assert_eq!(directories[0]["path"], "/sub");
    assert_eq!(directories[0]["size"], 6_000_000);
    assert_eq!(directories[1]["path"], "/sub/deeper");
    assert_eq!(json["files"][0]["path"], "/sub/big");
    assert_eq!(json["files"][1]["stored_size"], 0);

    // Batches: the parts add up to the whole, but for rounding.
    place.ok("create --bootstrap batch.boot --blob batch.blob --batch-size 0x100000 tree");
    let json: Value = serde_json::from_str(&place.ok("inspect --json batch.boot")).unwrap();
    let blob = &json["blobs"][0];
    let (all, used) = (&blob["stored_size"], &blob["used_stored_size"]);
    let lost = all.as_u64().unwrap() - used.as_u64().unwrap();
    assert!(lost <= blob["chunks"].as_u64().unwrap(), "{blob}");

    let text = place.ok("inspect --summary --top 1 image.boot");
    assert!(text.contains("deduplication 2.00x"), "{text}");
    assert!(
        text.contains("  /sub/\n") && !text.contains("deeper"),
        "{text}"
    );
    place.fails("inspect --summary --request stats image.boot", 2);
    place.fails("inspect --summary tree/hello", 1);
}

#[test]
fn stat_tells_what_images_share() {
    let place = Place::new();
    std::fs::create_dir_all(place.path("other/blobs")).unwrap();
    std::fs::write(place.path("other/hello"), "hello\n").unwrap();
    std::fs::write(place.path("other/new"), "not seen before\n").unwrap();
    place.ok("create --bootstrap other.boot --blob-dir blobs other");

    place.ok("stat --bootstrap image.boot --target other.boot --output-json stat.json");
    let json: Value =
        serde_json::from_slice(&std::fs::read(place.path("stat.json")).unwrap()).unwrap();
    assert_eq!(json["dedup_enabled"], true);
    assert_eq!(json["target_enabled"], true);
    let (base, target) = (&json["base_image"], &json["target_image"]);
    assert_eq!(
        (base["dirs"].as_u64(), base["files"].as_u64()),
        (Some(3), Some(3))
    );
    assert_eq!(base["symlinks"], 1);
    assert_eq!(base["chunks"], 4);
    assert_eq!(base["chunk_sizes"].as_array().unwrap().len(), 9);
    assert_eq!(base["file_sizes"].as_array().unwrap().len(), 45);
    assert_eq!(base["uncomp_size"], 3_000_006);
    assert_eq!(base["padding_size"], 4090 + 2 * (733 * 4096 - 3_000_000));
    assert_eq!(base["own_chunks"], 4);
    assert_eq!(target["ref_chunks"], 1);
    assert_eq!(target["ref_uncomp_size"], 6);
    assert_eq!(target["own_uncomp_size"], 16);
    assert_eq!(target["dedup_chunks"], 1);

    let text = place.ok("stat image.boot other.boot");
    assert!(text.contains("would save 6 B of"), "{text}");
    // Bootstraps named like blobs, beside blobs.
    std::fs::copy(place.path("image.boot"), place.path("blobs/one")).unwrap();
    std::fs::copy(place.path("other.boot"), place.path("blobs/two")).unwrap();
    assert_eq!(place.ok("stat --blob-dir blobs"), text);
    // The same blob is no second copy.
    std::fs::copy(place.path("image.boot"), place.path("again.boot")).unwrap();
    let text = place.ok("stat image.boot again.boot");
    assert!(text.contains("would save 0 B of"), "{text}");
    place.fails("stat", 2);
    place.fails("stat --blob-dir tree", 1);
    place.fails("stat tree/hello", 1);
}

#[test]
fn unpack_finds_blobs_in_all_places() {
    let place = Place::new();
    place.ok("unpack image.boot --blob-dir blobs --output a.tar");
    place.assert_is_tree("a.tar");
    std::fs::copy(
        place.path("blobs").join(place.blob()),
        place.path("image.blob"),
    )
    .unwrap();
    place.ok("unpack --log-level warn --bootstrap image.boot --output b.tar --blob image.blob");
    let read = |name: &str| std::fs::read(place.path(name)).unwrap();
    assert!(read("a.tar") == read("b.tar"));

    // A layer that carries its bootstrap is both.
    for (name, more) in [("one", ""), ("two", "--features blob-toc")] {
        place.ok(&format!(
            "create --blob {name} --blob-inline-meta {more} tree"
        ));
        place.ok(&format!("unpack {name} --blob {name} --output {name}.tar"));
        assert!(read("a.tar") == read(&format!("{name}.tar")), "{name}");
        assert_eq!(
            place.ok(&format!("inspect -R stats {name}")),
            r#"{"inodes_count":8}"#
        );
    }

    let error = place.fails("unpack image.boot --output c.tar", 2);
    assert!(error.contains("--blob-dir"), "{error}");
    place.fails(
        "unpack image.boot --output c.tar --blob x --blob-dir blobs",
        2,
    );
    place.fails("unpack image.boot --blob-dir blobs", 2);
    place.fails("unpack image.boot --blob-dir blobs --output=", 2);
    place.fails("unpack image.boot --blob-dir tree --output c.tar", 1);
    for kind in ["oss", "s3", "localdisk", "localfs"] {
        let error = place.fails(
            &format!(
                "unpack image.boot --output c.tar --backend-type {kind} --backend-config {{}}"
            ),
            1,
        );
        assert!(error.contains(kind), "{error}");
    }
    assert!(!place.path("c.tar").exists());
}

#[test]
fn unpack_writes_to_a_fifo_from_a_socket() {
    let place = Place::new();
    let blob = std::fs::read(place.path("blobs").join(place.blob())).unwrap();
    let socket = place.path("socket");
    let listener = UnixListener::bind(&socket).unwrap();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            serve(stream.unwrap(), &blob);
        }
    });
    let fifo = place.path("oci.tar");
    nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::S_IRWXU).unwrap();
    let mut command =
        place.command("unpack --log-level warn --bootstrap image.boot --output oci.tar");
    command.args(["--backend-type", "http-proxy", "--backend-config"]);
    command.arg(format!(r#"{{"addr":"{}"}}"#, socket.display()));
    let mut child = command.spawn().unwrap();
    let mut tar = Vec::new();
    std::fs::File::open(&fifo)
        .unwrap()
        .read_to_end(&mut tar)
        .unwrap();
    assert!(child.wait().unwrap().success());
    std::fs::write(place.path("read.tar"), tar).unwrap();
    place.assert_is_tree("read.tar");
}

/// What the clients of the builder run: 200 for a range, with just its bytes.
fn serve(mut stream: UnixStream, blob: &[u8]) {
    let mut lines = BufReader::new(&mut stream).lines().map_while(Result::ok);
    let request = lines.next().unwrap_or_default();
    let headers: Vec<_> = lines.take_while(|line| !line.is_empty()).collect();
    let range = headers.iter().find_map(|line| {
        let (name, value) = line.split_once(": ")?;
        name.eq_ignore_ascii_case("range").then_some(value)
    });
    let body = match range {
        Some(range) => {
            let (first, last) = range
                .strip_prefix("bytes=")
                .unwrap()
                .split_once('-')
                .unwrap();
            &blob[first.parse().unwrap()..=last.parse().unwrap()]
        }
        None => blob,
    };
    let head = format!(
        "HTTP/1.1 200 OK\r\nContent-Length: {}\r\nConnection: close\r\n\r\n",
        body.len()
    );
    stream.write_all(head.as_bytes()).unwrap();
    if !request.starts_with("HEAD") {
        let _ = stream.write_all(body);
    }
}

#[test]
fn unpack_needs_no_blob_where_there_is_no_data() {
    let place = Place::new();
    std::fs::create_dir(place.path("empty")).unwrap();
    place.ok("create --bootstrap empty.boot --blob-dir blobs empty");
    place.ok("unpack --bootstrap empty.boot --blob nowhere --output empty.tar");
    let members = tar::Archive::new(std::fs::File::open(place.path("empty.tar")).unwrap())
        .entries()
        .unwrap()
        .count();
    assert_eq!(members, 1);
}

#[test]
fn export_prints_one_line_at_most() {
    let place = Place::new();
    assert_eq!(
        place.ok("export --block --bootstrap image.boot --localfs-dir blobs --output a.disk"),
        ""
    );
    let line = place.ok("export --block -B image.boot -D blobs -O b.disk --verity --threads 2");
    let size = std::fs::metadata(place.path("a.disk")).unwrap().len();
    let options = format!(
        "dm-verity options: --no-superblock --format=1 -s \"\" --hash=sha256 --data-block-size=512 --hash-block-size=4096 --data-blocks {} --hash-offset {size} ",
        size / 512
    );
    let root = line
        .strip_prefix(&options)
        .expect(&line)
        .strip_suffix('\n')
        .unwrap();
    assert!(
        root.len() == 64 && root.bytes().all(|b| b.is_ascii_hexdigit()),
        "{line}"
    );
    let read = |name| std::fs::read(place.path(name)).unwrap();
    let (plain, verity) = (read("a.disk"), read("b.disk"));
    assert!(verity.starts_with(&plain) && verity.len() > plain.len());

    place.ok("export --block -B image.boot -D blobs");
    let name = format!(
        "blobs/{}.layer.disk",
        place.blob().split('.').next().unwrap()
    );
    assert!(read(&name) == plain);
    place.fails("export -B image.boot -D blobs -O c.disk", 2);
    place.fails("export --block -B image.boot -O c.disk", 2);
    place.fails("export --block -D blobs -O c.disk", 2);
    place.fails(
        "export --block -B image.boot -D blobs -O c.disk --threads 0",
        2,
    );
    place.fails("export --block -B image.boot -D tree -O c.disk", 1);
    place.fails("export --block -C config.json -O c.disk", 1);
    assert!(!place.path("c.disk").exists());
}
