//! The numbers as text.

use std::fmt::Write as _;

use indicatif::HumanBytes;

use super::counts::Counts;
use crate::inspect::summary::ratio;

/// The report that is printed without `--output-json`.
pub(super) fn text(images: usize, base: &Counts, target: Option<&Counts>) -> String {
    let mut out = String::new();
    // Writing to a string does not fail.
    let plural = if images == 1 { "" } else { "s" };
    let _ = image(&format!("Base: {images} image{plural}"), base, &mut out);
    if images > 1 {
        let _ = shared(base, &mut out);
    }
    if let Some(target) = target {
        let _ = image("\nTarget", target, &mut out);
        let _ = known(target, &mut out);
    }
    out
}

fn image(title: &str, counts: &Counts, out: &mut String) -> std::fmt::Result {
    writeln!(out, "{title}")?;
    writeln!(
        out,
        "  names       {} files, {} directories, {} symbolic links",
        counts.files, counts.dirs, counts.symlinks
    )?;
    writeln!(out, "  file size   {}", HumanBytes(counts.file_size))?;
    line(
        "chunks",
        counts.chunks,
        counts.uncomp_size,
        counts.comp_size,
        out,
    )
}

fn line(
    name: &str,
    chunks: u64,
    uncompressed: u64,
    stored: u64,
    out: &mut String,
) -> std::fmt::Result {
    writeln!(
        out,
        "  {name:<11} {chunks} chunks, {}, {} stored",
        HumanBytes(uncompressed),
        HumanBytes(stored)
    )
}

fn shared(c: &Counts, out: &mut String) -> std::fmt::Result {
    line(
        "in one blob",
        c.own_chunks,
        c.own_uncomp_size,
        c.own_comp_size,
        out,
    )?;
    line(
        "in several",
        c.ref_chunks,
        c.ref_uncomp_size,
        c.ref_comp_size,
        out,
    )?;
    writeln!(
        out,
        "A chunk dictionary of these images would save {} of {} stored ({:.1} %), {} chunks.",
        HumanBytes(c.dedup_comp_size),
        HumanBytes(c.comp_size),
        ratio(c.dedup_comp_size, c.comp_size, 0.0) * 100.0,
        c.dedup_chunks,
    )
}

fn known(c: &Counts, out: &mut String) -> std::fmt::Result {
    line("new", c.own_chunks, c.own_uncomp_size, c.own_comp_size, out)?;
    line(
        "in base",
        c.ref_chunks,
        c.ref_uncomp_size,
        c.ref_comp_size,
        out,
    )?;
    writeln!(
        out,
        "A chunk dictionary of the base would save {} of {} stored ({:.1} %), {} chunks.",
        HumanBytes(c.dedup_comp_size),
        HumanBytes(c.comp_size),
        ratio(c.dedup_comp_size, c.comp_size, 0.0) * 100.0,
        c.dedup_chunks,
    )
}
