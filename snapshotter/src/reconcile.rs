//! After a start: records, directories, mounts and daemons agree again.
//!
//! The records are right. Directories without record are removed. A record without
//! directory is repaired where nothing was lost (data layers are empty anyway);
//! otherwise it is removed with everything that stands on it, because a container
//! that does not start is better than one with an empty layer. Images that have
//! users are mounted, all others unmounted. Every repair is logged.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::thread;

use crate::error::{Error, chain};
use crate::images::{self, Image};
use crate::labels;
use crate::lifecycle::{Snapshots, make_directory};
use crate::store::{Kind, Record};

/// Images that are mounted at the same time.
const PARALLEL: usize = 8;

/// Repairs records and directories; call before requests are served.
///
/// # Errors
/// Records or the directory of snapshots cannot be read.
pub fn directories(snapshots: &Snapshots) -> Result<(), Error> {
    let records = snapshots.store.all()?;
    let mut lost = BTreeSet::new();
    for record in &records {
        let fs = snapshots.layout.fs(record.id);
        if fs.is_dir() {
            continue;
        }
        if record.kind == Kind::Committed && record.labels.contains_key(labels::NYDUS_BLOB) {
            tracing::warn!(
                "repair: {} was lost and is empty again, as it should be",
                fs.display()
            );
            make_directory(&fs, 0o755)?;
        } else {
            tracing::error!(
                "repair: {} was lost, and with it snapshot {:?}",
                fs.display(),
                record.name
            );
            lost.insert(record.name.clone());
        }
    }
    for name in with_those_above(&records, lost) {
        tracing::error!("repair: removing snapshot {name:?}; pull or start again what used it");
        snapshots.store.remove(&name)?;
    }
    for directory in snapshots.directories_without_record()? {
        tracing::warn!(
            "repair: {} belongs to no snapshot and is removed",
            directory.display()
        );
    }
    snapshots.cleanup()
}

/// `names` and every snapshot above one of them, topmost first.
fn with_those_above(records: &[Record], names: BTreeSet<String>) -> Vec<String> {
    let mut order: Vec<String> = names.iter().cloned().collect();
    let mut seen = names;
    let mut next = 0;
    while let Some(name) = order.get(next).cloned() {
        next += 1;
        for record in records {
            if record.parent.as_ref() == Some(&name) && seen.insert(record.name.clone()) {
                order.push(record.name.clone());
            }
        }
    }
    // Breadth first from several starts is not yet children before parents.
    let depths = depths(records);
    order.sort_by_key(|name| {
        std::cmp::Reverse(depths.get(name.as_str()).copied().unwrap_or_default())
    });
    order
}

/// Number of snapshots below each.
fn depths(records: &[Record]) -> BTreeMap<&str, usize> {
    let parents: BTreeMap<&str, Option<&str>> = records
        .iter()
        .map(|record| (record.name.as_str(), record.parent.as_deref()))
        .collect();
    let depth = |name: &str| {
        let mut at = name;
        let mut steps = 0;
        while let Some(Some(parent)) = parents.get(at)
            && steps < records.len()
        {
            at = parent;
            steps += 1;
        }
        steps
    };
    parents.keys().map(|name| (*name, depth(name))).collect()
}

/// Finds out which daemons of an earlier life serve which images; call before requests are
/// served.
///
/// # Errors
/// The records cannot be read.
pub fn daemons(snapshots: &Snapshots) -> Result<(), Error> {
    let records = snapshots.store.all()?;
    let users = images::in_use(&records);
    let all = records.iter().filter(|record| images::is_image(record));
    let all: Vec<_> = all
        .map(|record| {
            let reference = labels::image_ref(&record.labels).unwrap_or_default();
            (record.id, reference, users.contains_key(&record.id))
        })
        .collect();
    snapshots.daemons.adopt(&all);
    Ok(())
}

/// Mounts every image that has users and unmounts the others; requests may be
/// served meanwhile. Returns how many images could not be mounted.
///
/// # Errors
/// The records cannot be read.
pub fn mounts(snapshots: &Arc<Snapshots>) -> Result<usize, Error> {
    let records = snapshots.store.all()?;
    let users = images::in_use(&records);
    let all = records.iter().filter(|record| images::is_image(record));
    let (used, unused): (Vec<&Record>, Vec<&Record>) =
        all.partition(|record| users.contains_key(&record.id));
    for record in unused {
        if snapshots.daemons.knows(record.id) {
            tracing::warn!(
                "repair: nobody uses the image of snapshot {:?} any more",
                record.name
            );
            snapshots.release(record.id);
        }
    }
    let mut failed = 0;
    for batch in used.chunks(PARALLEL) {
        let outcomes: Vec<_> = thread::scope(|scope| {
            let threads: Vec<_> = batch
                .iter()
                .map(|record| scope.spawn(|| mount(snapshots, record)))
                .collect();
            threads
                .into_iter()
                .map(|thread| thread.join().unwrap_or(false))
                .collect()
        });
        failed += outcomes.into_iter().filter(|mounted| !mounted).count();
    }
    snapshots.daemons.forget_strangers();
    Ok(failed)
}

fn mount(snapshots: &Snapshots, record: &Record) -> bool {
    let outcome =
        Image::new(record, &snapshots.layout).and_then(|image| snapshots.daemons.attach(&image));
    // Its last user may have gone while it was mounted.
    snapshots.release(record.id);
    match outcome {
        Ok(_) => true,
        Err(error) => {
            tracing::error!(
                "repair: {}; containers that start from it will try again",
                chain(&error)
            );
            false
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_stands_on_a_lost_snapshot_goes_first() {
        let records = [
            Record::for_tests("a", Kind::Committed, None),
            Record::for_tests("c", Kind::Committed, Some("b")),
            Record::for_tests("b", Kind::Committed, Some("a")),
            Record::for_tests("d", Kind::Active, Some("c")),
            Record::for_tests("other", Kind::Active, Some("a")),
        ];
        let lost = BTreeSet::from(["b".to_owned(), "d".to_owned()]);
        assert_eq!(with_those_above(&records, lost), ["d", "c", "b"]);
    }
}
