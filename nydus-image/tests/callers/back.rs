//! `unpack` and `export` by the converter package and by the snapshotter.

use std::fs;
use std::io::{BufRead as _, BufReader, Write as _};
use std::os::unix::net::UnixListener;
use std::thread;

use crate::join::pack;
use crate::place::{Call, Place};

/// Paths and contents of an archive.
fn listing(tar: &[u8]) -> Vec<(String, u64)> {
    let mut archive = tar::Archive::new(tar);
    let entries = archive.entries().unwrap().map(|entry| {
        let entry = entry.unwrap();
        let path = entry.path().unwrap().display().to_string();
        let path = path.trim_start_matches("./").trim_matches('/').to_owned();
        (path, entry.size())
    });
    let mut listing: Vec<_> = entries.filter(|(path, _)| !path.is_empty()).collect();
    listing.sort();
    listing
}

/// An image whose one blob is `image.blob` too.
fn image(place: &Place) -> String {
    let id = pack(place, "layer", "");
    fs::copy(place.path(&id), place.path("image.boot")).unwrap();
    let line = format!("merge --bootstrap image.boot {id}");
    place.run(&line).ok(&line);
    fs::copy(place.path(&format!("blobs/{id}")), place.path("image.blob")).unwrap();
    id
}

fn expected() -> Vec<(String, u64)> {
    [
        ("hello", 6),
        ("usr", 0),
        ("usr/bin", 0),
        ("usr/bin/tool", 3_000_000),
        ("usr/link", 0),
        ("usr/same", 0),
    ]
    .map(|(path, size)| (path.to_owned(), size))
    .to_vec()
}

#[test]
fn a_whole_layer_into_a_fifo() {
    let place = Place::new();
    image(&place);
    let line = "unpack --log-level warn --bootstrap image.boot --output oci.tar --blob image.blob";
    let run = place.call(&Call::new(line).drain("oci.tar")).ok(line);
    assert_eq!((run.stdout.as_str(), run.stderr.as_str()), ("", ""));
    assert_eq!(listing(&run.blob), expected());
}

/// The converter serves the blob on a Unix socket: the length by HEAD, parts by GET, but
/// with the status 200.
#[test]
fn a_streamed_layer_into_a_fifo() {
    let place = Place::new();
    image(&place);
    let socket = place.path("socket");
    let listener = UnixListener::bind(&socket).unwrap();
    let blob = place.read("image.blob");
    thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            let blob = blob.clone();
            thread::spawn(move || serve(&stream, &blob));
        }
    });
    let line = format!(
        "unpack --log-level warn --bootstrap image.boot --output oci.tar --backend-type http-proxy \
         --backend-config '{{\"addr\":\"{}\"}}'",
        socket.display()
    );
    let run = place.call(&Call::new(&line).drain("oci.tar")).ok(&line);
    assert_eq!((run.stdout.as_str(), run.stderr.as_str()), ("", ""));
    assert_eq!(listing(&run.blob), expected());
}

/// Answers requests until the client goes.
fn serve(stream: &std::os::unix::net::UnixStream, blob: &[u8]) {
    let mut reader = BufReader::new(stream);
    let mut writer = stream;
    loop {
        let mut head = String::new();
        while !head.ends_with("\r\n\r\n") {
            if reader.read_line(&mut head).unwrap_or(0) == 0 {
                return;
            }
        }
        let range = head.lines().find_map(|line| {
            let (name, value) = line.split_once(':')?;
            let value = value.trim().strip_prefix("bytes=")?;
            let (first, last) = value.split_once('-')?;
            let range = first.parse::<usize>().ok()?..last.parse::<usize>().ok()? + 1;
            name.eq_ignore_ascii_case("range").then_some(range)
        });
        let body = if head.starts_with("HEAD ") {
            &[]
        } else {
            &blob[range.unwrap_or(0..blob.len())]
        };
        let length = if body.is_empty() {
            blob.len()
        } else {
            body.len()
        };
        let answer = format!("HTTP/1.1 200 OK\r\nContent-Length: {length}\r\n\r\n");
        if writer
            .write_all(answer.as_bytes())
            .and_then(|()| writer.write_all(body))
            .is_err()
        {
            return;
        }
    }
}

/// The snapshotter makes block devices of images.
#[test]
fn a_disk_image() {
    let place = Place::new();
    let id = image(&place);
    let output = format!("blobs/{id}.image.disk.tarfs.tmp");
    let line =
        format!("export --block --localfs-dir blobs --bootstrap image.boot --output {output}");
    let plain = place.run(&line).ok(&line);
    assert_eq!(plain.stdout, "");
    let size = fs::metadata(place.path(&output)).unwrap().len();
    let line = format!("{line} --verity");
    let run = place.run(&line).ok(&line);
    let first = run.stdout.lines().next().unwrap();
    let options = first
        .strip_prefix(
            "dm-verity options: --no-superblock --format=1 -s \"\" --hash=sha256 \
             --data-block-size=512 --hash-block-size=4096 --data-blocks ",
        )
        .unwrap_or_else(|| panic!("{first}"));
    let [blocks, "--hash-offset", offset, hash] = options.split(' ').collect::<Vec<_>>()[..] else {
        panic!("{first}");
    };
    let (blocks, offset): (u64, u64) = (blocks.parse().unwrap(), offset.parse().unwrap());
    assert!(
        blocks * 512 >= size.min(offset) && offset >= blocks * 512,
        "{first}, {size}"
    );
    assert!(
        hash.len() == 64 && hash.bytes().all(|byte| byte.is_ascii_hexdigit()),
        "{first}"
    );
    assert!(fs::metadata(place.path(&output)).unwrap().len() > offset);
}
