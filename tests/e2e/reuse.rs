//! `--chunk-dict` and `--parent-bootstrap`: what another image has is not stored again.

use std::fs;
use std::path::Path;

use support::binaries::nydus_image;
use support::command::{run, succeed};

use crate::scene::{Build, Scene, assert_fails, assert_same_tree};

/// Bytes of all data blobs of a build.
fn stored(build: &Build) -> u64 {
    let files = fs::read_dir(&build.blob_dir).unwrap();
    files
        .map(|file| file.unwrap().metadata().unwrap().len())
        .sum()
}

/// Puts the blobs of `from` beside those of `to`.
fn share_blobs(from: &Build, to: &Build) {
    for blob in &from.blobs {
        let target = to.blob_dir.join(blob);
        if !target.exists() {
            fs::copy(from.blob_dir.join(blob), target).unwrap();
        }
    }
}

fn path(path: &Path) -> &str {
    path.to_str().unwrap()
}

fn assert_mounts(scene: &Scene, build: &Build, source: &Path) {
    let mut check = nydus_image().unwrap();
    check.arg("check").arg(&build.bootstrap);
    succeed(check.arg("--blob-dir").arg(&build.blob_dir)).unwrap();
    let daemon = scene.mount(build);
    assert_same_tree(source, daemon.point());
    daemon.stop().unwrap();
}

#[test]
fn a_dictionary_saves_what_it_has() {
    let scene = Scene::new();
    let source = scene.small_tree();
    let first = scene.create("first", &[], &source);
    let dictionary = format!("bootstrap={}", path(&first.bootstrap));

    let same = scene.create("same", &["--chunk-dict", &dictionary], &source);
    assert_eq!(same.blobs, first.blobs);
    assert_eq!(stored(&same), 0);
    share_blobs(&first, &same);
    assert_mounts(&scene, &same, &source);

    fs::write(source.join("a-new-file"), "only this is new\n").unwrap();
    for (name, arguments) in [
        ("more", &[][..]),
        ("toc", &["--features", "blob-toc"]),
        ("batch", &["--batch-size", "0x10000"]),
    ] {
        let arguments = [&["--chunk-dict", path(&first.bootstrap)], arguments].concat();
        let more = scene.create(name, &arguments, &source);
        assert_eq!(more.blobs.len(), 2, "{:?}", more.blobs);
        assert!(more.blobs.contains(&first.blobs[0]));
        assert!(stored(&more) < 20_000, "{}", stored(&more));
        share_blobs(&first, &more);
        assert_mounts(&scene, &more, &source);
    }
}

#[test]
fn layers_with_a_dictionary_are_merged() {
    let scene = Scene::new();
    let source = scene.small_tree();
    let first = scene.create("first", &[], &source);
    let dictionary = format!("bootstrap={}", path(&first.bootstrap));
    fs::write(source.join("a-new-file"), "only this is new\n").unwrap();
    let layer = scene.create("layer", &["--chunk-dict", &dictionary], &source);
    let own = layer
        .blobs
        .iter()
        .find(|id| **id != first.blobs[0])
        .unwrap();
    let named = scene.path(own);
    fs::copy(&layer.bootstrap, &named).unwrap();
    let merged = scene.path("merged");
    let merge = |dictionary: &str| {
        let mut merge = nydus_image().unwrap();
        merge.arg("merge").arg("--bootstrap").arg(&merged);
        merge.arg(&named).args(["--chunk-dict", dictionary]);
        merge
    };
    succeed(&mut merge(&dictionary)).unwrap();
    share_blobs(&first, &layer);
    let build = Build {
        bootstrap: merged.clone(),
        blob_dir: layer.blob_dir,
        blobs: layer.blobs.clone(),
    };
    assert_mounts(&scene, &build, &source);

    let other = scene.create("other", &["--digester", "sha256"], &source);
    let finished = run(&mut merge(path(&other.bootstrap))).unwrap();
    assert_eq!(finished.code(), 2, "{}", finished.stderr);
    assert!(finished.stderr.contains("digester"), "{}", finished.stderr);
}

#[test]
fn a_parent_gives_the_tree_below() {
    let scene = Scene::new();
    let parent_tree = scene.small_tree();
    fs::write(parent_tree.join("gone"), "not for long\n").unwrap();
    let parent = scene.create("parent", &[], &parent_tree);
    let layer = scene.dir("layer");
    fs::write(layer.join(".wh.gone"), "").unwrap();
    fs::create_dir(layer.join("etc")).unwrap();
    fs::write(layer.join("etc/more"), "more\n").unwrap();
    // Known to the parent under another name.
    fs::copy(parent_tree.join("first"), layer.join("copy")).unwrap();
    let expected = scene.dir("expected");
    for (from, to) in [
        (parent_tree.join("first"), "first"),
        (parent_tree.join("second"), "second"),
        (parent_tree.join("third"), "third"),
        (layer.join("copy"), "copy"),
    ] {
        support::command::succeed(
            std::process::Command::new("cp")
                .arg("-p")
                .arg(from)
                .arg(expected.join(to)),
        )
        .unwrap();
    }
    support::command::succeed(
        std::process::Command::new("cp")
            .arg("-a")
            .arg(layer.join("etc"))
            .arg(&expected),
    )
    .unwrap();
    support::command::succeed(
        std::process::Command::new("cp")
            .arg("-p")
            .arg(parent_tree.join("etc/name"))
            .arg(expected.join("etc/name")),
    )
    .unwrap();
    for target in [expected.join("etc"), expected.clone()] {
        let reference = if target == expected {
            layer.clone()
        } else {
            layer.join("etc")
        };
        support::command::succeed(
            std::process::Command::new("touch")
                .arg("-r")
                .arg(reference)
                .arg(target),
        )
        .unwrap();
    }

    let build = scene.create(
        "child",
        &["--parent-bootstrap", path(&parent.bootstrap)],
        &layer,
    );
    assert_eq!(
        build.blobs[0], parent.blobs[0],
        "the parent's blobs come first"
    );
    assert!(stored(&build) < 20_000, "{}", stored(&build));
    share_blobs(&parent, &build);
    assert_mounts(&scene, &build, &expected);
}

#[test]
fn images_that_do_not_fit_are_refused() {
    let scene = Scene::new();
    let source = scene.small_tree();
    let first = scene.create("first", &[], &source);
    for (name, arguments, word) in [
        ("digester", &["--digester", "sha256"][..], "digester"),
        ("compressor", &["--compressor", "lz4_block"], "compressor"),
        ("chunks", &["--chunk-size", "0x1000"], "chunk size"),
        ("owners", &["--repeatable"], "owners"),
    ] {
        for option in ["--chunk-dict", "--parent-bootstrap"] {
            let mut command = scene.create_command(name);
            command.args(arguments).arg(option).arg(&first.bootstrap);
            assert_fails(name, command.arg(&source), &[word, "first.boot"]);
        }
    }
    let mut command = scene.create_command("kind");
    command.args(["--chunk-dict", "database=x"]).arg(&source);
    assert_fails("kind", &mut command, &["database", "bootstrap="]);
}
