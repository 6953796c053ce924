//! What one daemon serves: one image, or all images of the node.

use std::path::PathBuf;

use crate::images::Image;
use crate::mounts::Layout;

/// Number of the daemon that serves all images. Those that serve one have the number of
/// its snapshot, and snapshots count from 1.
pub(crate) const SHARED: u64 = 0;
/// Most names in a message.
const MAX_NAMES: usize = 4;

/// The task of a daemon.
#[derive(Clone, Debug)]
pub(crate) struct Service {
    /// Number of the daemon.
    pub(crate) id: u64,
    /// The image or images, for people.
    pub(crate) name: String,
    /// Where it mounts, or below which.
    pub(crate) mountpoint: PathBuf,
    /// The only image; none for the daemon of all.
    pub(crate) image: Option<Image>,
}

impl Service {
    /// One image.
    pub(crate) fn one(image: &Image, layout: &Layout) -> Self {
        Self {
            id: image.id,
            name: image.reference.clone(),
            mountpoint: layout.mountpoint(image.id),
            image: Some(image.clone()),
        }
    }

    /// All images, of which these are there now.
    pub(crate) fn all(references: &[String], layout: &Layout) -> Self {
        let mut name = match references {
            [] => "(none)".to_owned(),
            some => some[..some.len().min(MAX_NAMES)].join(", "),
        };
        if references.len() > MAX_NAMES {
            name.push_str(&format!(" and {} more", references.len() - MAX_NAMES));
        }
        Self {
            id: SHARED,
            name,
            mountpoint: layout.shared(),
            image: None,
        }
    }
}

/// What directories and people call the daemon with this number.
pub(crate) fn label(id: u64) -> String {
    match id {
        SHARED => "shared".to_owned(),
        id => id.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn many_images_have_a_short_name() {
        let layout = Layout::new("/r".as_ref());
        let names: Vec<String> = ["a", "b", "c", "d", "e", "f"].map(str::to_owned).into();
        let name = |count: usize| Service::all(&names[..count], &layout).name;
        assert_eq!(name(2), "a, b");
        assert_eq!(name(6), "a, b, c, d and 2 more");
        assert_eq!(name(0), "(none)");
    }
}
