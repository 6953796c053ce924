//! Removes cached blobs that no image refers to any more.
//!
//! What images refer to is in their metadata, not only in the digests of layers:
//! blobs of a chunk dictionary belong to no layer of their own. As long as one
//! bootstrap cannot be read, nothing is removed.

use std::collections::HashSet;
use std::fs;
use std::path::Path;

use crate::error::Error;
use crate::images::{self, Image};
use crate::labels;
use crate::mounts::Layout;
use crate::store::Record;
use crate::usage::is_blob_id;

/// Removes from `cache` every file of a blob that none of `records` needs.
///
/// # Errors
/// The directory cannot be listed.
pub(crate) fn collect(cache: &Path, records: &[Record], layout: &Layout) -> Result<(), Error> {
    let Some(needed) = needed(records, layout) else {
        return Ok(());
    };
    if !cache.is_dir() {
        return Ok(());
    }
    let mut names = Vec::new();
    for entry in fs::read_dir(cache).map_err(Error::io(cache, "cannot list"))? {
        let entry = entry.map_err(Error::io(cache, "cannot list"))?;
        names.extend(entry.file_name().into_string());
    }
    names.retain(|name| blob_of(name).is_some_and(|id| !needed.contains(id)));
    // Maps first: data without a map is fetched again, a map without data must never be.
    names.sort_by_key(|name| !name.ends_with("chunk_map"));
    for name in names {
        match fs::remove_file(cache.join(&name)) {
            Ok(()) => tracing::info!("cache: removed {name}, which no image needs"),
            Err(error) => tracing::warn!("cache: cannot remove {name}: {error}"),
        }
    }
    Ok(())
}

/// The blob that a file of the cache belongs to.
fn blob_of(name: &str) -> Option<&str> {
    name.get(..64)
        .filter(|id| is_blob_id(id) && matches!(name.as_bytes().get(64), None | Some(b'.')))
}

/// Ids of all blobs that are referred to; `None` if that cannot be found out.
fn needed(records: &[Record], layout: &Layout) -> Option<HashSet<String>> {
    let mut needed = HashSet::new();
    for record in records {
        if let Some(id) = record
            .labels
            .get(labels::LAYER_DIGEST)
            .and_then(|d| d.strip_prefix("sha256:"))
        {
            needed.insert(id.to_owned());
        }
        if !images::is_image(record) {
            continue;
        }
        let path = match Image::new(record, layout) {
            Ok(image) => image.bootstrap,
            Err(error) => {
                tracing::warn!("cache: nothing is removed: {error}");
                return None;
            }
        };
        match rafs::image::Image::open(&path) {
            Ok(image) => needed.extend(image.blobs().iter().map(|blob| blob.id.to_string())),
            Err(error) => {
                tracing::warn!("cache: nothing is removed: {}: {error}", path.display());
                return None;
            }
        }
    }
    Some(needed)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_files_of_unknown_blobs_go() {
        let directory = tempfile::tempdir().unwrap();
        let (kept, gone) = ("aa".repeat(32), "bb".repeat(32));
        let names = [
            format!("{kept}.blob.data"),
            format!("{gone}.blob.data"),
            format!("{gone}.blob.data.chunk_map"),
            "notes".to_owned(),
            format!("{gone}x"),
        ];
        for name in &names {
            fs::write(directory.path().join(name), "x").unwrap();
        }
        let mut record = Record::for_tests("layer", crate::store::Kind::Committed, None);
        record
            .labels
            .insert(labels::LAYER_DIGEST.into(), format!("sha256:{kept}"));
        let layout = Layout::new(directory.path());
        collect(directory.path(), std::slice::from_ref(&record), &layout).unwrap();
        let left = |name: &String| directory.path().join(name).exists();
        assert_eq!(
            names.iter().map(left).collect::<Vec<_>>(),
            [true, false, false, true, true]
        );

        // An image whose metadata is lost: what it needs is unknown.
        record
            .labels
            .insert(labels::NYDUS_BOOTSTRAP.into(), "true".into());
        record
            .labels
            .insert(labels::LAYER_DIGEST.into(), "sha256:none".into());
        collect(directory.path(), &[record], &layout).unwrap();
        assert!(left(&names[0]));
    }
}
