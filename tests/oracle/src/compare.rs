//! Says how two descriptions of a tree differ, by name and by field.
//!
//! [`Rules`] holds the few differences that the format or the way an image was
//! made excuses; everything else counts. Where to read next: `matrix.rs`.

use std::collections::BTreeMap;

use crate::describe::{Entry, text};

/// How many differences a report lists before it only counts.
const LISTED: usize = 20;

/// Which differences are excused.
#[derive(Clone, Copy, Debug, Default)]
pub struct Rules {
    /// The root's time: builders that read a directory drop it to be repeatable.
    pub ignore_root_mtime: bool,
    /// Directory times, in images merged from layers.
    pub ignore_dir_mtimes: bool,
    /// Times are cut to seconds and sockets are missing: the image came from a tar.
    pub tar: bool,
}

impl Rules {
    fn apply(self, entry: &Entry) -> Option<Entry> {
        let mut entry = entry.clone();
        if self.tar {
            if entry.is_socket() {
                return None;
            }
            entry.mtime_ns = entry.mtime_ns.div_euclid(1_000_000_000) * 1_000_000_000;
        }
        let root = entry.path == b"/";
        if root && self.ignore_root_mtime || entry.is_dir() && self.ignore_dir_mtimes {
            entry.mtime_ns = 0;
        }
        Some(entry)
    }
}

/// Compares `found` with `expected`; an empty answer means equal.
pub fn differences(expected: &[Entry], found: &[Entry], rules: Rules) -> Vec<String> {
    let expected = by_path(expected, rules);
    let found = by_path(found, rules);
    let mut out = Vec::new();
    for (path, want) in &expected {
        match found.get(path) {
            None => out.push(format!("{}: missing", text(path))),
            Some(have) if have != want => out.push(fields(want, have)),
            Some(_) => {}
        }
    }
    for path in found.keys().filter(|p| !expected.contains_key(*p)) {
        out.push(format!("{}: not in the source", text(path)));
    }
    out
}

/// `Ok` when `differences` is empty, else an error that lists the first of them.
pub fn equal(expected: &[Entry], found: &[Entry], rules: Rules) -> anyhow::Result<()> {
    let all = differences(expected, found, rules);
    if all.is_empty() {
        return Ok(());
    }
    let listed = all
        .iter()
        .take(LISTED)
        .cloned()
        .collect::<Vec<_>>()
        .join("\n  ");
    anyhow::bail!(
        "{} of {} entries differ:\n  {listed}",
        all.len(),
        expected.len()
    )
}

fn by_path(tree: &[Entry], rules: Rules) -> BTreeMap<Vec<u8>, Entry> {
    tree.iter()
        .filter_map(|e| rules.apply(e))
        .map(|e| (e.path.clone(), e))
        .collect()
}

/// Only the fields that differ, expected then found.
fn fields(want: &Entry, have: &Entry) -> String {
    let (want_json, have_json) = (want.to_json(), have.to_json());
    let mut keys: Vec<_> = want_json
        .as_object()
        .into_iter()
        .flat_map(|o| o.keys())
        .collect();
    keys.extend(have_json.as_object().into_iter().flat_map(|o| o.keys()));
    keys.sort();
    keys.dedup();
    let differing = keys
        .iter()
        .filter(|k| want_json.get(**k) != have_json.get(**k));
    let list: Vec<_> = differing
        .map(|k| {
            format!(
                "{k}: want {} have {}",
                show(want_json.get(*k)),
                show(have_json.get(*k))
            )
        })
        .collect();
    format!("{}: {}", text(&want.path), list.join(", "))
}

fn show(value: Option<&serde_json::Value>) -> String {
    let mut shown = value.map_or_else(|| "nothing".into(), ToString::to_string);
    if shown.chars().count() > 120 {
        shown = shown.chars().take(120).collect::<String>() + "…";
    }
    shown
}
