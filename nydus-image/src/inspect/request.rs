//! The commands of the prompt, and their answers for programs.
//!
//! Programs send `blobs`, `stats` or `prefetch` and parse the combined output of the
//! process: one JSON value without white space and without a line break. The other
//! commands are for people: text, and then `null`.

use std::collections::HashMap;
use std::fmt::Write as _;

use anyhow::{Context as _, bail};
use rafs::fs::Inode;
use rafs::{FileKind, Image, Nid};
use serde::Serialize;

use crate::listing;

/// What `help` prints.
pub(super) const HELP: &str = "\
stats          number of names
ls [DIR]       list a directory
cd [DIR]       go to a directory; without one, to the root
stat NAME      everything about a file, with its chunks
blobs          the blobs of the image
prefetch       what the builder asked to prefetch
chunk OFFSET   the chunks stored at a byte of their blob, and the files that use them
icheck INODE   the names of an inode number
exit, q        leave
";

#[derive(Serialize)]
struct BlobJson<'a> {
    blob_id: &'a str,
    readahead_offset: u32,
    readahead_size: u32,
    decompressed_size: u64,
    compressed_size: u64,
}

#[derive(Serialize)]
struct StatsJson {
    inodes_count: u64,
}

#[derive(Serialize)]
struct PrefetchJson {
    inode: u64,
    path: Vec<String>,
}

/// What one command prints for a program.
///
/// * `request`: white space around it does not count.
///
/// # Errors
/// It is no command, or cannot be carried out.
pub fn answer(image: &Image, request: &str) -> anyhow::Result<String> {
    match request.trim() {
        "blobs" => json(&blobs(image)),
        "stats" => json(&StatsJson {
            inodes_count: image.inode_count(),
        }),
        "prefetch" => json(&prefetch(image)?),
        // What ends a prompt has nothing to say here.
        "exit" | "q" => Ok("null".to_owned()),
        other => Ok(text(image, &mut image.root(), other)? + "null"),
    }
}

fn json(value: &impl Serialize) -> anyhow::Result<String> {
    serde_json::to_string(value).context("cannot encode the answer")
}

/// What one command prints for a person.
///
/// * `dir`: where relative names start; `cd` changes it.
///
/// # Errors
/// It is no command, or cannot be carried out.
pub fn text(image: &Image, dir: &mut Nid, request: &str) -> anyhow::Result<String> {
    let request = request.trim();
    let (command, argument) = match request.split_once(char::is_whitespace) {
        Some((command, argument)) => (command, Some(argument.trim())),
        None => (request, None),
    };
    match (command, argument) {
        ("stats", None) => Ok(format!("{} names\n", image.inode_count())),
        ("blobs", None) => Ok(blobs_text(image)),
        ("prefetch", None) => prefetch_text(image),
        ("ls", None) => ls(image, *dir),
        ("ls", Some(name)) => ls(image, find(image, *dir, name)?),
        ("cd", argument) => {
            let target = find(image, *dir, argument.unwrap_or("/"))?;
            if image.inode(target)?.kind() != FileKind::Directory {
                bail!("{} is no directory", argument.unwrap_or("/"));
            }
            *dir = target;
            Ok(String::new())
        }
        ("stat", Some(name)) => stat(image, find(image, *dir, name)?),
        ("chunk", Some(offset)) => chunk(image, number(offset)?),
        ("icheck", Some(inode)) => icheck(image, Nid::new(number(inode)?)),
        ("help", None) => Ok(HELP.to_owned()),
        ("stat", None) => bail!("stat wants a name: stat NAME"),
        ("chunk", None) => bail!("chunk wants a position in a blob: chunk OFFSET"),
        ("icheck", None) => bail!("icheck wants an inode number: icheck INODE"),
        ("", None) => bail!("there is no command; help lists them"),
        ("stats" | "blobs" | "prefetch" | "help", Some(_)) => bail!("{command} takes no argument"),
        _ => bail!(
            "`{}` is no command; help lists them",
            command.escape_debug()
        ),
    }
}

fn number(text: &str) -> anyhow::Result<u64> {
    match text.strip_prefix("0x") {
        Some(digits) => u64::from_str_radix(digits, 16),
        None => text.parse(),
    }
    .with_context(|| format!("`{}` is no number", text.escape_debug()))
}

/// The inode at a path, from `dir` on; `..` goes up, symbolic links stay.
fn find(image: &Image, dir: Nid, path: &str) -> anyhow::Result<Nid> {
    let start = if path.starts_with('/') {
        image.root()
    } else {
        dir
    };
    let names = path.split('/').filter(|name| !name.is_empty());
    names.into_iter().try_fold(start, |dir, name| {
        let found = image.lookup(dir, name.as_bytes())?;
        found.with_context(|| format!("there is no {}", name.escape_debug()))
    })
}

/// An inode with its paths.
pub(super) type Names = (Nid, Vec<Vec<u8>>);

/// The names of some inodes, in the order of `wanted`.
pub(super) fn names_of(image: &Image, wanted: &[Nid]) -> Result<Vec<Names>, rafs::Error> {
    let mut found: Vec<_> = wanted.iter().map(|nid| (*nid, Vec::new())).collect();
    if wanted.is_empty() {
        return Ok(found);
    }
    let mut places = HashMap::<Nid, Vec<usize>>::new();
    for (place, nid) in wanted.iter().enumerate() {
        places.entry(*nid).or_default().push(place);
    }
    listing::walk(image, |name| {
        for place in places.get(&name.inode.nid()).into_iter().flatten() {
            found[*place].1.push(name.path.clone());
        }
        Ok::<_, rafs::Error>(())
    })?;
    Ok(found)
}

fn blobs(image: &Image) -> Vec<BlobJson<'_>> {
    let blobs = image.blobs().iter();
    blobs
        .map(|info| BlobJson {
            blob_id: info.id.as_str(),
            readahead_offset: 0,
            readahead_size: 0,
            decompressed_size: info.uncompressed_size,
            compressed_size: info.compressed_size,
        })
        .collect()
}

fn blobs_text(image: &Image) -> String {
    let mut out = String::new();
    for (index, info) in image.blobs().iter().enumerate() {
        // Writing to a string does not fail.
        let _ = writeln!(
            out,
            "{index}: {}\n   {} chunks, {}, {} bytes stored, {} bytes uncompressed",
            info.id,
            info.chunk_count,
            info.compressor,
            info.compressed_size,
            info.uncompressed_size,
        );
    }
    out
}

fn prefetch(image: &Image) -> anyhow::Result<Vec<PrefetchJson>> {
    let names = names_of(image, &image.prefetch().collect::<Vec<_>>())?;
    let lossy = |path: &Vec<u8>| String::from_utf8_lossy(path).into_owned();
    let entry = |(nid, names): Names| PrefetchJson {
        inode: nid.get(),
        path: names.iter().map(lossy).collect(),
    };
    Ok(names.into_iter().map(entry).collect())
}

fn prefetch_text(image: &Image) -> anyhow::Result<String> {
    let mut out = String::new();
    for (nid, names) in names_of(image, &image.prefetch().collect::<Vec<_>>())? {
        for name in names {
            let _ = writeln!(out, "{:>10}  {}", nid.get(), name.escape_ascii());
        }
    }
    Ok(out)
}

fn ls(image: &Image, dir: Nid) -> anyhow::Result<String> {
    let mut out = String::new();
    for (name, nid) in listing::entries(image, dir)? {
        let inode = image.inode(nid)?;
        let _ = writeln!(
            out,
            "{}{:04o} {:>6}:{:<6} {:>14} {}{}",
            letter(inode.kind()),
            inode.attr().permissions,
            inode.attr().uid,
            inode.attr().gid,
            inode.size(),
            name.escape_ascii(),
            target(image, &inode)?,
        );
    }
    Ok(out)
}

/// The letter that `ls -l` shows.
fn letter(kind: FileKind) -> char {
    match kind {
        FileKind::File => '-',
        FileKind::Directory => 'd',
        FileKind::CharDevice => 'c',
        FileKind::BlockDevice => 'b',
        FileKind::Fifo => 'p',
        FileKind::Socket => 's',
        FileKind::Symlink => 'l',
    }
}

fn target(image: &Image, inode: &Inode) -> anyhow::Result<String> {
    match inode.kind() {
        FileKind::Symlink => {
            let target = image.readlink(inode.nid())?;
            Ok(format!(" -> {}", target.escape_ascii()))
        }
        _ => Ok(String::new()),
    }
}

fn stat(image: &Image, nid: Nid) -> anyhow::Result<String> {
    let inode = image.inode(nid)?;
    let attr = inode.attr();
    let mut out = format!(
        "inode     {}\nmode      {}{:04o}{}\nowner     {}:{}\ntime      {}.{:09}\nlinks     {}\nsize      {}\n",
        nid,
        letter(inode.kind()),
        attr.permissions,
        target(image, &inode)?,
        attr.uid,
        attr.gid,
        attr.mtime,
        attr.mtime_nsec,
        inode.nlink(),
        inode.size(),
    );
    if matches!(inode.kind(), FileKind::CharDevice | FileKind::BlockDevice) {
        let _ = writeln!(out, "device    {:#x}", inode.rdev());
    }
    for xattr in image.xattrs(nid)? {
        let (key, value) = (xattr.key(), xattr.value);
        let _ = writeln!(
            out,
            "attribute {}={}",
            key.escape_ascii(),
            value.escape_ascii()
        );
    }
    if inode.kind() == FileKind::File {
        for extent in image.extents(nid, 0..inode.size()) {
            let extent = extent?;
            let position = image.chunk_position(extent.blob, extent.chunk);
            let record = position.map(|at| image.chunk_record(at)).transpose()?;
            let Some(record) = record else { continue };
            let _ = writeln!(
                out,
                "chunk     {:>12}  blob {}, chunk {}, {} bytes, stored {}  {}",
                extent.file_offset,
                extent.blob,
                extent.chunk,
                record.uncompressed_size,
                place(&record),
                record.digest,
            );
        }
    }
    Ok(out)
}

/// Where a chunk is stored, as far as the bootstrap tells.
fn place(record: &rafs::tree::ChunkRecord) -> String {
    if record.compressed_size == 0 {
        return "in a batch".to_owned();
    }
    let kind = if record.compressed {
        "compressed"
    } else {
        "as it is"
    };
    format!(
        "at {} in {} bytes, {kind}",
        record.compressed_offset, record.compressed_size
    )
}

fn chunk(image: &Image, offset: u64) -> anyhow::Result<String> {
    let hit = |record: &rafs::tree::ChunkRecord| {
        let start = record.compressed_offset;
        let end = start.saturating_add(record.compressed_size.into());
        (start..end).contains(&offset)
    };
    let mut found = Vec::new();
    for position in 0..image.chunk_record_count() {
        let record = image.chunk_record(position)?;
        if hit(&record) {
            found.push(record);
        }
    }
    found.sort_by_key(|record| (record.blob, record.index));
    let places: HashMap<_, _> = (0_usize..)
        .zip(&found)
        .map(|(place, record)| ((record.blob, record.index), place))
        .collect();
    let mut users = vec![Vec::new(); found.len()];
    listing::walk(image, |name| {
        let inode = &name.inode;
        if inode.kind() != FileKind::File || found.is_empty() {
            return Ok(());
        }
        for extent in image.extents(inode.nid(), 0..inode.size()) {
            let extent = extent?;
            if let Some(&place) = places.get(&(extent.blob, extent.chunk)) {
                users[place].push((name.path.clone(), extent.file_offset));
            }
        }
        Ok::<_, rafs::Error>(())
    })?;
    let mut out = String::new();
    for (record, users) in found.iter().zip(users) {
        let _ = writeln!(
            out,
            "blob {}, chunk {}: {} bytes, {}, {}",
            record.blob,
            record.index,
            record.uncompressed_size,
            place(record),
            record.digest
        );
        for (path, at) in users {
            let _ = writeln!(out, "  {} at {at}", path.escape_ascii());
        }
    }
    if out.is_empty() {
        bail!("no chunk is stored at byte {offset}");
    }
    Ok(out)
}

fn icheck(image: &Image, nid: Nid) -> anyhow::Result<String> {
    let names = names_of(image, &[nid])?;
    let mut out = String::new();
    for name in names.into_iter().flat_map(|(_, names)| names) {
        let _ = writeln!(out, "{}", name.escape_ascii());
    }
    if out.is_empty() {
        bail!("no name leads to inode {nid}");
    }
    Ok(out)
}
