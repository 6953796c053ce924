//! Which snapshots are lazily mounted images, and who uses them.
//!
//! All of this follows from the records: nothing else is stored, so nothing can
//! disagree with them after a crash. The snapshot with an image's metadata stands
//! for the image; every active or view snapshot above it is a user.

use std::collections::BTreeMap;
use std::path::PathBuf;

use crate::error::Error;
use crate::labels::{self, Labels};
use crate::mounts::Layout;
use crate::store::{Kind, Record};

/// Names of the metadata file in a bootstrap layer, today's first.
const BOOTSTRAPS: [&str; 2] = ["image/image.boot", "image.boot"];

/// A registry account, as labels of a request give it.
#[derive(Clone, PartialEq, Eq)]
pub struct Account {
    pub(crate) username: String,
    pub(crate) password: String,
}

impl std::fmt::Debug for Account {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Account(<redacted>)")
    }
}

impl Account {
    /// The account in the labels of a request, if they have one.
    #[must_use]
    pub fn of(labels: &Labels) -> Option<Self> {
        Some(Self {
            username: labels.get(labels::PULL_USERNAME)?.clone(),
            password: labels.get(labels::PULL_SECRET)?.clone(),
        })
    }
}

/// An image that can be mounted.
#[derive(Clone, Debug)]
pub struct Image {
    /// Id of the snapshot with its metadata.
    pub id: u64,
    /// The reference it was pulled by.
    pub reference: String,
    /// Its metadata.
    pub bootstrap: PathBuf,
    /// The account to fetch its data with, if the request had one.
    pub account: Option<Account>,
}

impl Image {
    /// The image whose metadata `record` holds.
    ///
    /// # Errors
    /// Nobody said what it is called, or the metadata is not there.
    pub fn new(record: &Record, layout: &Layout) -> Result<Self, Error> {
        let Some(reference) = labels::image_ref(&record.labels) else {
            return Err(Error::precondition(
                &record.name,
                format!(
                    "is a Nydus image without the label {}: set disable_snapshot_annotations = false \
                     in containerd's configuration and pull the image again",
                    labels::IMAGE_REF
                ),
            ));
        };
        let fs = layout.fs(record.id);
        let bootstrap = BOOTSTRAPS
            .iter()
            .map(|name| fs.join(name))
            .find(|path| path.is_file())
            .ok_or_else(|| Error::Mount {
                image: reference.to_owned(),
                reason: format!("{} has no {}", fs.display(), BOOTSTRAPS[0]),
            })?;
        Ok(Self {
            id: record.id,
            reference: reference.to_owned(),
            bootstrap,
            account: None,
        })
    }
}

/// Position, in a snapshot and everything below it, of the metadata of the image
/// that it stands on; `None` for ordinary images, and for the metadata itself.
#[must_use]
pub fn position(chain: &[Record]) -> Option<usize> {
    let below = chain.iter().skip(1);
    Some(1 + below.take_while(|record| !is_image(record)).count()).filter(|&at| at < chain.len())
}

/// Whether `record` holds the metadata of an image.
#[must_use]
pub fn is_image(record: &Record) -> bool {
    record.kind == Kind::Committed && record.labels.contains_key(labels::NYDUS_BOOTSTRAP)
}

/// Ids of the images that are in use, with the number of their users.
#[must_use]
pub fn in_use(records: &[Record]) -> BTreeMap<u64, usize> {
    let by_name: BTreeMap<&str, &Record> = records
        .iter()
        .map(|record| (record.name.as_str(), record))
        .collect();
    let mut users = BTreeMap::new();
    for user in records
        .iter()
        .filter(|record| record.kind != Kind::Committed)
    {
        let mut at = user;
        // As many steps as there are records, in case they form a cycle.
        for _ in 0..records.len() {
            let Some(parent) = at.parent.as_deref().and_then(|name| by_name.get(name)) else {
                break;
            };
            if is_image(parent) {
                *users.entry(parent.id).or_insert(0) += 1;
                break;
            }
            at = parent;
        }
    }
    users
}

#[cfg(test)]
mod tests {
    use super::*;

    fn records() -> Vec<Record> {
        let mut data = Record::for_tests("data", Kind::Committed, None);
        let mut boot = Record::for_tests("boot", Kind::Committed, Some("data"));
        let mut extra = Record::for_tests("extra", Kind::Committed, Some("boot"));
        let mut user = Record::for_tests("user", Kind::Active, Some("extra"));
        (data.id, boot.id, extra.id, user.id) = (1, 2, 3, 4);
        boot.labels
            .insert(labels::NYDUS_BOOTSTRAP.into(), "true".into());
        vec![user, extra, boot, data]
    }

    #[test]
    fn the_image_below_a_container_is_found() {
        let chain = records();
        assert_eq!(position(&chain), Some(2));
        assert_eq!(position(&chain[2..]), None);
        assert_eq!(position(&chain[3..]), None);
        assert_eq!(in_use(&chain), BTreeMap::from([(2, 1)]));
        assert!(in_use(&chain[1..]).is_empty());
    }

    #[test]
    fn an_image_without_reference_says_what_to_do() {
        let layout = Layout::new(std::path::Path::new("/nonexistent"));
        let error = Image::new(&records()[2], &layout).unwrap_err().to_string();
        assert!(error.contains("disable_snapshot_annotations"), "{error}");
    }
}
