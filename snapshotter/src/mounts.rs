//! The mounts that lead to a snapshot, as containerd performs them. Nothing is
//! looked up or mounted here.

use std::path::{Path, PathBuf};

use crate::api::types::Mount;
use crate::store::Kind;

/// Where the directories of snapshots are.
#[derive(Clone, Debug)]
pub struct Layout {
    root: PathBuf,
}

impl Layout {
    /// Below `root`.
    #[must_use]
    pub fn new(root: &Path) -> Self {
        Self {
            root: root.to_owned(),
        }
    }

    /// The directory of all snapshots.
    #[must_use]
    pub fn snapshots(&self) -> PathBuf {
        self.root.join("snapshots")
    }

    /// The directory of one snapshot.
    #[must_use]
    pub fn snapshot(&self, id: u64) -> PathBuf {
        self.snapshots().join(id.to_string())
    }

    /// What a snapshot adds to those below it.
    #[must_use]
    pub fn fs(&self, id: u64) -> PathBuf {
        self.snapshot(id).join("fs")
    }

    /// Scratch space of the kernel's overlayfs.
    #[must_use]
    pub fn work(&self, id: u64) -> PathBuf {
        self.snapshot(id).join("work")
    }

    /// Where the image whose metadata a snapshot holds is mounted by a daemon of its own.
    #[must_use]
    pub fn mountpoint(&self, id: u64) -> PathBuf {
        self.snapshot(id).join("mnt")
    }

    /// Where the daemon of all images mounts them.
    #[must_use]
    pub fn shared(&self) -> PathBuf {
        self.root.join("mnt")
    }

    /// Where that daemon mounts the image whose metadata a snapshot holds.
    #[must_use]
    pub fn shared_mountpoint(&self, id: u64) -> PathBuf {
        self.shared().join(id.to_string())
    }
}

/// A snapshot and what is below it.
#[derive(Debug)]
pub struct Stack<'a> {
    /// Active or view.
    pub kind: Kind,
    /// Its id.
    pub id: u64,
    /// Directories below it, topmost first.
    pub lower: &'a [PathBuf],
    /// Whether an image is mounted among them: then nothing can be bind-mounted
    /// instead of stacked.
    pub lazy: bool,
    /// Whether the upper directory may be lost in a crash.
    pub volatile: bool,
}

impl Stack<'_> {
    /// The mounts.
    #[must_use]
    pub fn mounts(&self, layout: &Layout) -> Vec<Mount> {
        let fs = layout.fs(self.id);
        vec![match (self.kind, self.lower) {
            (Kind::Active, []) => bind(&fs, "rw"),
            (Kind::View | Kind::Committed, []) => bind(&fs, "ro"),
            (Kind::Active, lower) => self.active(layout, &fs, lower),
            (Kind::View | Kind::Committed, [only]) if !self.lazy => bind(only, "ro"),
            // The kernel stacks no fewer than two: the view's own directory is empty.
            (Kind::View | Kind::Committed, [only]) => overlay(vec![lowerdir(&[only.clone(), fs])]),
            (Kind::View | Kind::Committed, lower) => overlay(vec![lowerdir(lower)]),
        }]
    }

    fn active(&self, layout: &Layout, fs: &Path, lower: &[PathBuf]) -> Mount {
        let mut options = vec![
            format!("workdir={}", layout.work(self.id).display()),
            format!("upperdir={}", fs.display()),
        ];
        if self.volatile {
            options.push("volatile".to_owned());
        }
        options.push(lowerdir(lower));
        overlay(options)
    }
}

fn bind(source: &Path, access: &str) -> Mount {
    Mount {
        r#type: "bind".to_owned(),
        source: source.display().to_string(),
        target: String::new(),
        options: vec![access.to_owned(), "rbind".to_owned()],
    }
}

fn overlay(options: Vec<String>) -> Mount {
    Mount {
        r#type: "overlay".to_owned(),
        source: "overlay".to_owned(),
        target: String::new(),
        options,
    }
}

fn lowerdir(directories: &[PathBuf]) -> String {
    let mut option = String::from("lowerdir=");
    for (index, directory) in directories.iter().enumerate() {
        if index > 0 {
            option.push(':');
        }
        option.push_str(&directory.display().to_string());
    }
    option
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options(kind: Kind, lower: &[&str], lazy: bool) -> (String, Vec<String>) {
        let layout = Layout::new(Path::new("/r"));
        let lower: Vec<PathBuf> = lower.iter().map(PathBuf::from).collect();
        let stack = Stack {
            kind,
            id: 7,
            lower: &lower,
            lazy,
            volatile: false,
        };
        let mount = stack.mounts(&layout).remove(0);
        (format!("{} {}", mount.r#type, mount.source), mount.options)
    }

    /// What a stack looks like as a mount.
    struct Shape {
        kind: Kind,
        lower: &'static [&'static str],
        lazy: bool,
        /// Type and source of the mount.
        head: &'static str,
        options: &'static [&'static str],
    }

    const SHAPES: &[Shape] = &[
        Shape {
            kind: Kind::Active,
            lower: &[],
            lazy: false,
            head: "bind /r/snapshots/7/fs",
            options: &["rw", "rbind"],
        },
        Shape {
            kind: Kind::View,
            lower: &[],
            lazy: false,
            head: "bind /r/snapshots/7/fs",
            options: &["ro", "rbind"],
        },
        Shape {
            kind: Kind::View,
            lower: &["/a"],
            lazy: false,
            head: "bind /a",
            options: &["ro", "rbind"],
        },
        Shape {
            kind: Kind::View,
            lower: &["/a"],
            lazy: true,
            head: "overlay overlay",
            options: &["lowerdir=/a:/r/snapshots/7/fs"],
        },
        Shape {
            kind: Kind::View,
            lower: &["/a", "/b"],
            lazy: false,
            head: "overlay overlay",
            options: &["lowerdir=/a:/b"],
        },
        Shape {
            kind: Kind::Active,
            lower: &["/a", "/b"],
            lazy: true,
            head: "overlay overlay",
            options: &[
                "workdir=/r/snapshots/7/work",
                "upperdir=/r/snapshots/7/fs",
                "lowerdir=/a:/b",
            ],
        },
    ];

    #[test]
    fn every_shape() {
        for shape in SHAPES {
            let (head, found) = options(shape.kind, shape.lower, shape.lazy);
            assert_eq!(head, shape.head);
            assert_eq!(found, shape.options);
        }
    }
}
