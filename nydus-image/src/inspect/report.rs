//! A summary as text.

use std::fmt::Write as _;

use indicatif::HumanBytes;

use super::summary::{Item, Summary};

/// Characters of a blob id that are shown.
const ID: usize = 16;

/// The report that `--summary` prints.
#[must_use]
pub fn text(summary: &Summary) -> String {
    let mut out = String::new();
    // Writing to a string does not fail.
    let _ = head(summary, &mut out);
    let _ = blobs(summary, &mut out);
    let _ = directories(summary, &mut out);
    let _ = files(summary, &mut out);
    out
}

fn head(summary: &Summary, out: &mut String) -> std::fmt::Result {
    let (image, names, content) = (&summary.image, &summary.names, &summary.content);
    writeln!(
        out,
        "Image       RAFS v{}, chunks up to {}, {}, {}, bootstrap of {}",
        image.fs_version,
        HumanBytes(image.chunk_size.into()),
        image.compressor,
        image.digester,
        HumanBytes(image.bootstrap_size),
    )?;
    writeln!(
        out,
        "Names       {} files, {} directories, {} symbolic links, {} hard links, {} others",
        names.files, names.directories, names.symlinks, names.hard_links, names.specials,
    )?;
    writeln!(out, "Files       {}", HumanBytes(content.file_size))?;
    writeln!(
        out,
        "Unique      {}, deduplication {:.2}x ({} chunks, used {} times)",
        HumanBytes(content.unique_size),
        content.dedup_ratio,
        content.chunks,
        content.chunk_references,
    )?;
    writeln!(
        out,
        "Stored      {}, {:.1} % of unique",
        HumanBytes(content.stored_size),
        content.compression_ratio * 100.0,
    )?;
    match summary.prefetch.as_slice() {
        [] => writeln!(out, "Prefetch    nothing"),
        paths => writeln!(out, "Prefetch    {}", escape(&paths.join(" "))),
    }
}

fn blobs(summary: &Summary, out: &mut String) -> std::fmt::Result {
    writeln!(out, "\nBlobs (one a layer, the lowest first)")?;
    writeln!(
        out,
        "  {:>6}  {:>11}  {:>11}  {:>17}  id",
        "share", "stored", "content", "chunks used"
    )?;
    for blob in &summary.blobs {
        writeln!(
            out,
            "  {:>5.1}%  {:>11}  {:>11}  {:>17}  {}",
            blob.share * 100.0,
            HumanBytes(blob.used_stored_size).to_string(),
            HumanBytes(blob.used_size).to_string(),
            format!("{} of {}", blob.used_chunks, blob.chunks),
            // Ids are ASCII; other tools show the beginning too.
            blob.id.get(..ID).unwrap_or(&blob.id),
        )?;
    }
    Ok(())
}

/// The largest directories as a tree. A directory is at least as large as those in
/// it, so the tree has no gaps but where equal ones were cut off.
fn directories(summary: &Summary, out: &mut String) -> std::fmt::Result {
    if summary.directories.is_empty() {
        return Ok(());
    }
    writeln!(out, "\nLargest directories")?;
    table_head(out)?;
    let mut pending: Vec<(&Item, usize)> = Vec::new();
    let known = |path: &str| summary.directories.iter().any(|other| other.path == path);
    // The next one comes last.
    let below = |inside: &dyn Fn(&Item) -> bool| {
        let items = summary.directories.iter().rev();
        items.filter(|item| inside(item)).collect::<Vec<_>>()
    };
    let tops = below(&|item| !known(parent_of(&item.path)));
    pending.extend(tops.into_iter().map(|item| (item, 0)));
    while let Some((item, depth)) = pending.pop() {
        let name = match depth {
            0 => &item.path,
            _ => item.path.rsplit('/').next().unwrap_or_default(),
        };
        line(
            item,
            &format!("{:indent$}{name}/", "", indent = 2 * depth),
            summary,
            out,
        )?;
        let inner = below(&|other| parent_of(&other.path) == item.path);
        pending.extend(inner.into_iter().map(|item| (item, depth + 1)));
    }
    Ok(())
}

fn parent_of(path: &str) -> &str {
    path.rsplit_once('/').map_or("", |(parent, _)| parent)
}

fn files(summary: &Summary, out: &mut String) -> std::fmt::Result {
    if summary.files.is_empty() {
        return Ok(());
    }
    writeln!(out, "\nLargest files")?;
    table_head(out)?;
    summary
        .files
        .iter()
        .try_for_each(|item| line(item, &item.path, summary, out))
}

fn table_head(out: &mut String) -> std::fmt::Result {
    writeln!(
        out,
        "  {:>6}  {:>11}  {:>11}  {:>7}  path",
        "share", "size", "stored", "files"
    )
}

fn line(item: &Item, name: &str, summary: &Summary, out: &mut String) -> std::fmt::Result {
    let share = super::summary::ratio(item.size, summary.content.file_size, 0.0);
    writeln!(
        out,
        "  {:>5.1}%  {:>11}  {:>11}  {:>7}  {}",
        share * 100.0,
        HumanBytes(item.size).to_string(),
        HumanBytes(item.stored_size).to_string(),
        item.files,
        escape(name),
    )
}

/// Control characters of a hostile name must not reach the terminal.
fn escape(text: &str) -> String {
    let plain = |c: char| {
        if c.is_control() {
            c.escape_default().to_string()
        } else {
            c.to_string()
        }
    };
    text.chars().map(plain).collect()
}
