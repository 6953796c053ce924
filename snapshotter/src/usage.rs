//! Disk space of directories and of cached blobs.

use std::collections::{BTreeMap, HashSet};
use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

use crate::error::Error;
use crate::store::Usage;

/// Bytes per unit of `st_blocks`, whatever the file system (stat(2)).
const SECTOR: u64 = 512;

/// What the tree at `root` takes, a file with several links once. Entries that
/// vanish meanwhile do not count.
///
/// # Errors
/// A directory cannot be read.
pub fn of_tree(root: &Path) -> Result<Usage, Error> {
    let mut usage = Usage::default();
    let mut seen = HashSet::new();
    let mut left = vec![root.to_owned()];
    while let Some(path) = left.pop() {
        let Ok(metadata) = fs::symlink_metadata(&path) else {
            continue;
        };
        if metadata.nlink() > 1
            && !metadata.is_dir()
            && !seen.insert((metadata.dev(), metadata.ino()))
        {
            continue;
        }
        usage.bytes = usage
            .bytes
            .saturating_add(metadata.blocks().saturating_mul(SECTOR));
        usage.inodes += 1;
        if metadata.is_dir() {
            let entries = fs::read_dir(&path).map_err(Error::io(&path, "cannot list"))?;
            for entry in entries {
                left.push(entry.map_err(Error::io(&path, "cannot list"))?.path());
            }
        }
    }
    Ok(usage)
}

/// What the cache holds of the blob with the digest `sha256:HEX`.
#[must_use]
pub fn of_cached_blob(cache: &Path, digest: &str) -> Usage {
    let mut usage = Usage::default();
    let Some(id) = digest.strip_prefix("sha256:").filter(|id| is_blob_id(id)) else {
        return usage;
    };
    for suffix in CACHE_SUFFIXES {
        if let Ok(metadata) = fs::symlink_metadata(cache.join(format!("{id}{suffix}"))) {
            usage.bytes = usage
                .bytes
                .saturating_add(metadata.blocks().saturating_mul(SECTOR));
            usage.inodes += 1;
        }
    }
    usage
}

/// What the cache holds, by blob.
///
/// # Errors
/// The directory cannot be listed.
pub(crate) fn cached_blobs(cache: &Path) -> Result<BTreeMap<String, Usage>, Error> {
    let mut blobs = BTreeMap::new();
    let entries = match fs::read_dir(cache) {
        Ok(entries) => entries,
        // Nothing was mounted yet.
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(blobs),
        Err(error) => return Err(Error::io(cache, "cannot list")(error)),
    };
    for entry in entries {
        let name = entry.map_err(Error::io(cache, "cannot list"))?.file_name();
        let name = name.to_string_lossy();
        if let Some(id) = name.split('.').next().filter(|id| is_blob_id(id)) {
            let usage = || of_cached_blob(cache, &format!("sha256:{id}"));
            blobs.entry(id.to_owned()).or_insert_with(usage);
        }
    }
    Ok(blobs)
}

/// Endings of the files that a cache directory keeps of a blob; some of them only
/// by other versions (`docs/format-blob.md`, "Cache directory").
pub(crate) const CACHE_SUFFIXES: [&str; 7] = [
    "",
    ".chunk_map",
    ".blob.meta",
    ".image.disk",
    ".layer.disk",
    ".blob.data",
    ".blob.data.chunk_map",
];

/// Whether `id` is a SHA-256 in hexadecimal.
pub(crate) fn is_blob_id(id: &str) -> bool {
    id.len() == 64
        && id
            .bytes()
            .all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn links_count_once_and_holes_not_at_all() {
        let directory = tempfile::tempdir().unwrap();
        let root = directory.path();
        let empty = of_tree(root).unwrap();
        assert_eq!(empty.inodes, 1);
        fs::write(root.join("a"), vec![1; 100_000]).unwrap();
        fs::hard_link(root.join("a"), root.join("b")).unwrap();
        let sparse = fs::File::create(root.join("c")).unwrap();
        sparse.set_len(1 << 30).unwrap();
        let usage = of_tree(root).unwrap();
        assert_eq!(usage.inodes, 3);
        let grown = usage.bytes - empty.bytes;
        assert!((100_000..200_000).contains(&grown), "{grown}");
    }

    #[test]
    fn cached_blobs_are_found_by_digest() {
        let directory = tempfile::tempdir().unwrap();
        let id = "ab".repeat(32);
        fs::write(directory.path().join(format!("{id}.blob.data")), [1; 5000]).unwrap();
        let usage = of_cached_blob(directory.path(), &format!("sha256:{id}"));
        assert_eq!(usage.inodes, 1);
        assert!(usage.bytes >= 5000);
        fs::write(directory.path().join(format!("{id}.chunk_map")), [1; 9000]).unwrap();
        fs::create_dir(directory.path().join("mounts")).unwrap();
        let blobs = cached_blobs(directory.path()).unwrap();
        let whole = of_cached_blob(directory.path(), &format!("sha256:{id}"));
        assert_eq!(blobs, BTreeMap::from([(id, whole)]));
        assert!(whole.bytes >= 14000);
        let missing = directory.path().join("missing");
        assert!(cached_blobs(&missing).unwrap().is_empty());
        assert_eq!(
            of_cached_blob(directory.path(), "sha256:../etc"),
            Usage::default()
        );
    }
}
