//! `nydus-snapshotter containerd-config`: what to add to containerd's configuration.
//!
//! containerd changed the names of its tables with version 2; the settings are the
//! same. Without `disable_snapshot_annotations = false` nobody tells a snapshotter
//! what an image is called, and its data could not be found.

use std::path::Path;

/// Which containerd to write for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Generation {
    /// 1.6 and 1.7: configuration version 2.
    One,
    /// 2.0 and later: configuration version 3.
    Two,
}

impl Generation {
    /// The generation that the text of a configuration file is for, by its `version`.
    #[must_use]
    pub fn of(text: &str) -> Option<Self> {
        let table: toml::Table = toml::from_str(text).ok()?;
        match table.get("version")?.as_integer()? {
            2 => Some(Self::One),
            3 | 4 => Some(Self::Two),
            _ => None,
        }
    }
}

/// The tables to add, for a plugin that listens on `address`.
#[must_use]
pub fn section(generation: Generation, address: &Path) -> String {
    let proxy = format!(
        "[proxy_plugins.nydus]\n  type = \"snapshot\"\n  address = \"{}\"\n",
        address.display()
    );
    let table = match generation {
        Generation::One => "[plugins.\"io.containerd.grpc.v1.cri\".containerd]",
        Generation::Two => "[plugins.'io.containerd.cri.v1.images']",
    };
    format!(
        "{proxy}\n{table}\n  snapshotter = \"nydus\"\n  disable_snapshot_annotations = false\n  \
         discard_unpacked_layers = false\n"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sections_are_toml_with_the_right_tables() {
        let address = Path::new("/run/s.sock");
        for (generation, plugin, inner) in [
            (
                Generation::One,
                "io.containerd.grpc.v1.cri",
                Some("containerd"),
            ),
            (Generation::Two, "io.containerd.cri.v1.images", None),
        ] {
            let table: toml::Table = toml::from_str(&section(generation, address)).unwrap();
            assert_eq!(
                table["proxy_plugins"]["nydus"]["address"].as_str(),
                Some("/run/s.sock")
            );
            let mut settings = &table["plugins"][plugin];
            if let Some(inner) = inner {
                settings = &settings[inner];
            }
            assert_eq!(settings["snapshotter"].as_str(), Some("nydus"));
            assert_eq!(
                settings["disable_snapshot_annotations"].as_bool(),
                Some(false)
            );
        }
    }

    #[test]
    fn versions_are_told_apart() {
        assert_eq!(Generation::of("version = 2"), Some(Generation::One));
        assert_eq!(Generation::of("version = 3"), Some(Generation::Two));
        assert_eq!(Generation::of("version = 1"), None);
        assert_eq!(Generation::of("x"), None);
    }
}
