//! The table of a run, and the starts on several nodes as bars.

use std::fmt::Write as _;
use std::time::Duration;

use anyhow::Result;

use crate::runs::{Row, Way};

/// Room for labels, and what one bar and one panel take, in pixels.
const LEFT: usize = 150;
const BAR: usize = 14;
const GAP: usize = 14;
const PANEL: usize = 330;
const TOP: usize = 64;
const WIDTH: usize = LEFT + 2 * PANEL;

/// Colours that can be told apart on white and on black.
const COLOURS: [(Way, &str); 3] = [
    (Way::Direct, "#8c959f"),
    (Way::Dragonfly, "#2f81f7"),
    (Way::AsIs, "#d29922"),
];

pub(crate) fn table(rows: &[Row], mbit: u32) -> Result<String> {
    let mut table = format!(
        "origin {mbit} Mbit/s; seconds from nothing to the end, of one node or daemon\n\
         {:<9}{:<28}{:>6}  {:<9}{:>8}{:>8}{:>8}{:>8}{:>12}{:>8}\n",
        "", "", "count", "", "first", "median", "last", "whole", "origin MB", "ratio"
    );
    for row in rows {
        let order = match (row.count, row.at_once) {
            (1, _) => "",
            (_, true) => "at once",
            (_, false) => "in turn",
        };
        let time = |at: usize| row.times.get(at).copied().unwrap_or_default().as_secs_f64();
        writeln!(
            table,
            "{:<9}{:<28}{:>6}  {order:<9}{:>8.2}{:>8.2}{:>8.2}{:>8.2}{:>12.1}{:>8.2}",
            row.what,
            row.way.label(),
            row.count,
            time(0),
            time(row.count / 2),
            time(row.count.saturating_sub(1)),
            row.whole.as_secs_f64(),
            megabytes(row.origin),
            megabytes(row.origin) / megabytes(one_direct(rows, row.what)),
        )?;
    }
    writeln!(
        table,
        "ratio: bytes from the origin, to those of one direct start"
    )?;
    Ok(table)
}

/// What one direct start costs the origin.
fn one_direct(rows: &[Row], what: &str) -> u64 {
    let is = |row: &&Row| row.what == what && row.way == Way::Direct && row.count == 1;
    rows.iter().find(is).map_or(0, |row| row.origin)
}

#[allow(clippy::cast_precision_loss, reason = "a figure for people to read")]
fn megabytes(bytes: u64) -> f64 {
    bytes as f64 / 1e6
}

/// Bars of the starts: the slowest node's time, and what the origin sent.
pub(crate) fn bars(rows: &[Row], mbit: u32) -> Result<String> {
    let mut groups: Vec<(usize, bool)> = Vec::new();
    for row in rows.iter().filter(|row| row.what == "start") {
        if !groups.contains(&(row.count, row.at_once)) {
            groups.push((row.count, row.at_once));
        }
    }
    groups.sort_by_key(|(count, at_once)| (*at_once, *count));
    let height = TOP + groups.len() * (COLOURS.len() * BAR + GAP) + 10;
    let mut svg = head(height, mbit)?;
    let seconds = |row: &Row| {
        row.times
            .last()
            .copied()
            .unwrap_or(Duration::ZERO)
            .as_secs_f64()
    };
    let sent = |row: &Row| megabytes(row.origin);
    for (panel, title, unit, value) in [
        (
            0,
            "until the slowest node is done",
            "s",
            &seconds as &dyn Fn(&Row) -> f64,
        ),
        (1, "sent by the registry", "MB", &sent),
    ] {
        let left = LEFT + panel * PANEL;
        writeln!(svg, r#"<text x="{left}" y="{}">{title}</text>"#, TOP - 10)?;
        let longest = rows.iter().map(value).fold(0.0, f64::max).max(1e-9);
        for (at, group) in groups.iter().enumerate() {
            let top = TOP + at * (COLOURS.len() * BAR + GAP);
            if panel == 0 {
                label(&mut svg, *group, top)?;
            }
            for (index, (way, colour)) in COLOURS.iter().enumerate() {
                let is = |row: &&Row| {
                    (row.count, row.at_once) == *group && row.way == *way && row.what == "start"
                };
                let Some(row) = rows.iter().find(is) else {
                    continue;
                };
                let y = top + index * BAR;
                bar(&mut svg, (left, y), colour, value(row), longest, unit)?;
            }
        }
    }
    svg.push_str("</svg>\n");
    Ok(svg)
}

fn head(height: usize, mbit: u32) -> Result<String> {
    let mut svg = format!(
        r#"<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" font-family="sans-serif" font-size="12">
<style>text {{ fill: #1f2328 }} @media (prefers-color-scheme: dark) {{ text {{ fill: #e6edf3 }} }}</style>
<title>Starts of a program over a registry of {mbit} Mbit/s</title>
"#
    );
    let mut left = 10;
    for (way, colour) in COLOURS {
        let text = way.label();
        writeln!(
            svg,
            r#"<rect x="{left}" y="12" width="12" height="12" fill="{colour}"/><text x="{}" y="22">{text}</text>"#,
            left + 18
        )?;
        left += 40 + text.len() * 7;
    }
    Ok(svg)
}

fn label(svg: &mut String, (count, at_once): (usize, bool), top: usize) -> Result<()> {
    let text = match (count, at_once) {
        (1, _) => "1 node".to_owned(),
        (_, true) => format!("{count} nodes at once"),
        (_, false) => format!("{count} nodes in turn"),
    };
    let y = top + COLOURS.len() * BAR / 2 + 4;
    writeln!(svg, r#"<text x="10" y="{y}">{text}</text>"#)?;
    Ok(())
}

fn bar(
    svg: &mut String,
    (left, y): (usize, usize),
    colour: &str,
    value: f64,
    longest: f64,
    unit: &str,
) -> Result<()> {
    // Room for the figure behind the longest one.
    let width = value / longest * 250.0;
    writeln!(
        svg,
        r#"<rect x="{left}" y="{y}" width="{width:.1}" height="{}" fill="{colour}"/>"#,
        BAR - 2
    )?;
    #[allow(clippy::cast_precision_loss, reason = "a few hundred pixels")]
    let end = left as f64 + width + 4.0;
    writeln!(
        svg,
        r#"<text x="{end:.1}" y="{}" font-size="10">{value:.1} {unit}</text>"#,
        y + BAR - 4
    )?;
    Ok(())
}
