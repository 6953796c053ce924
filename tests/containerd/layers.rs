//! Changes of layers, seen through the mounts that the snapshotter hands out.

use std::fs;
use std::io::Write as _;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _, chown, symlink};
use std::path::Path;

use crate::Bench;

/// The paths below `root`, sorted.
fn names(root: &Path) -> Vec<String> {
    let mut names = Vec::new();
    let mut left = vec![root.to_owned()];
    while let Some(directory) = left.pop() {
        for entry in fs::read_dir(directory).unwrap() {
            let path = entry.unwrap().path();
            names.push(path.strip_prefix(root).unwrap().display().to_string());
            if path.is_dir() && !path.is_symlink() {
                left.push(path);
            }
        }
    }
    names.sort();
    names
}

#[test]
fn what_one_layer_does_the_next_one_sees() {
    let mut bench = Bench::new();
    bench.layer("1", "", |root| {
        fs::create_dir_all(root.join("etc/deep/er")).unwrap();
        fs::write(root.join("etc/hosts"), "one\n").unwrap();
        fs::write(root.join("etc/gone"), "x").unwrap();
        fs::create_dir(root.join("opaque")).unwrap();
        fs::write(root.join("opaque/old"), "x").unwrap();
        fs::write(root.join("moves"), "moved").unwrap();
        fs::write(root.join("owned"), "x").unwrap();
        symlink("etc/hosts", root.join("link")).unwrap();
    });
    bench.layer("2", "1", |root| {
        let mut hosts = fs::OpenOptions::new()
            .append(true)
            .open(root.join("etc/hosts"))
            .unwrap();
        hosts.write_all(b"two\n").unwrap();
        fs::remove_file(root.join("etc/gone")).unwrap();
        fs::remove_dir_all(root.join("opaque")).unwrap();
        fs::create_dir(root.join("opaque")).unwrap();
        fs::write(root.join("opaque/new"), "x").unwrap();
        fs::rename(root.join("moves"), root.join("etc/moved")).unwrap();
        fs::remove_dir_all(root.join("etc/deep")).unwrap();
        chown(root.join("owned"), Some(7), Some(8)).unwrap();
        fs::set_permissions(root.join("owned"), fs::Permissions::from_mode(0o4711)).unwrap();
    });
    bench.layer("3", "2", |root| {
        fs::hard_link(root.join("etc/moved"), root.join("linked")).unwrap()
    });
    bench.client.view("v", "3").unwrap();
    let mounted = bench.mount("v");
    let root = mounted.path();
    assert_eq!(
        names(root),
        [
            "etc",
            "etc/hosts",
            "etc/moved",
            "link",
            "linked",
            "opaque",
            "opaque/new",
            "owned"
        ]
    );
    assert_eq!(fs::read_to_string(root.join("link")).unwrap(), "one\ntwo\n");
    assert_eq!(fs::read_to_string(root.join("linked")).unwrap(), "moved");
    let owned = fs::metadata(root.join("owned")).unwrap();
    assert_eq!(
        (owned.uid(), owned.gid(), owned.mode() & 0o7777),
        (7, 8, 0o4711)
    );
    drop(mounted);
    // The layers below have not changed.
    bench.client.view("first", "1").unwrap();
    let first = bench.mount("first");
    assert_eq!(
        fs::read_to_string(first.path().join("etc/hosts")).unwrap(),
        "one\n"
    );
    assert!(first.path().join("opaque/old").exists());
}

#[test]
fn views_cannot_be_written_to() {
    let mut bench = Bench::new();
    bench.layer("1", "", |root| fs::write(root.join("file"), "x").unwrap());
    bench.layer("2", "1", |_| {});
    for (view, parent) in [("alone", ""), ("of-one", "1"), ("of-two", "2")] {
        bench.client.view(view, parent).unwrap();
        let mounted = bench.mount(view);
        let refused = fs::write(mounted.path().join("new"), "x").unwrap_err();
        assert_eq!(refused.raw_os_error(), Some(30), "{view}: {refused}");
        assert_eq!(mounted.path().join("file").exists(), !parent.is_empty());
    }
}

#[test]
fn containers_do_not_see_each_other() {
    let mut bench = Bench::new();
    bench.layer("1", "", |root| {
        fs::write(root.join("file"), "base").unwrap()
    });
    for key in ["a", "b"] {
        bench.client.prepare(key, "1", &[]).unwrap();
    }
    let (a, b) = (bench.mount("a"), bench.mount("b"));
    fs::write(a.path().join("file"), "a").unwrap();
    fs::write(a.path().join("only-a"), "a").unwrap();
    assert_eq!(fs::read_to_string(b.path().join("file")).unwrap(), "base");
    assert!(!b.path().join("only-a").exists());
}

#[test]
fn a_hundred_and_twenty_eight_layers() {
    let mut bench = Bench::new();
    let mut parent = String::new();
    for index in 1..=127 {
        let name = format!("layer-{index}");
        let key = format!("k{index}");
        bench.client.prepare(&key, &parent, &[]).unwrap();
        let upper = bench.upper(&key);
        fs::write(upper.join(&name), &name).unwrap();
        fs::write(upper.join("last"), &name).unwrap();
        bench.client.commit(&name, &key, &[]).unwrap();
        parent = name;
    }
    bench.client.prepare("top", &parent, &[]).unwrap();
    let mounted = bench.mount("top");
    assert_eq!(names(mounted.path()).len(), 128);
    assert_eq!(
        fs::read_to_string(mounted.path().join("last")).unwrap(),
        "layer-127"
    );
}
