//! `nydus-image merge`: layers with whiteouts become the tree that they add up to.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use support::binaries::nydus_image;
use support::command::succeed;
use support::image::layer::{changes, write_tar};
use support::tree::nasty::{self, Options};

use crate::scene::{Build, Scene, assert_same_tree};

/// Three states of one tree, the later grown from the earlier.
pub(crate) fn three_states(scene: &Scene) -> [PathBuf; 3] {
    let first = scene.dir("state-1");
    nasty::make(
        &first,
        Options {
            without_sockets: true,
            without_huge: true,
        },
    )
    .unwrap();
    let second = grown_from(scene, &first, "state-2");
    fs::remove_dir_all(second.join("directories/of-1000")).unwrap();
    fs::remove_file(second.join("files/zeros")).unwrap();
    fs::write(second.join("files/text-4096"), "new content").unwrap();
    fs::create_dir_all(second.join("added/below")).unwrap();
    fs::write(second.join("added/below/file"), nasty::noise(200_000, 77)).unwrap();
    let third = grown_from(scene, &second, "state-3");
    // A directory becomes a file, and a file a directory.
    fs::remove_dir_all(third.join("added")).unwrap();
    fs::write(third.join("added"), "now a file").unwrap();
    fs::remove_file(third.join("links/dangling")).unwrap();
    fs::create_dir(third.join("links/dangling")).unwrap();
    fs::write(third.join("links/dangling/file"), "now a directory").unwrap();
    // What an earlier layer removed comes back.
    fs::write(third.join("files/zeros"), "back again").unwrap();
    [first, second, third]
}

fn grown_from(scene: &Scene, lower: &Path, name: &str) -> PathBuf {
    let upper = scene.path(name);
    succeed(Command::new("cp").arg("-a").arg(lower).arg(&upper)).unwrap();
    upper
}

/// The tars of the layers that lead from state to state.
pub(crate) fn layer_tars(scene: &Scene, states: &[PathBuf]) -> Vec<PathBuf> {
    let mut lower = None;
    let mut tars = Vec::new();
    for (index, upper) in states.iter().enumerate() {
        let tar = scene.path(&format!("layer-{index}.tar"));
        write_tar(upper, &changes(lower, upper).unwrap(), &tar).unwrap();
        tars.push(tar);
        lower = Some(upper.as_path());
    }
    tars
}

/// Builds each layer and merges them.
fn merge(scene: &Scene, tars: &[PathBuf]) -> Build {
    let blob_dir = scene.dir("blobs");
    let mut sources = Vec::new();
    for (index, tar) in tars.iter().enumerate() {
        let name = format!("layer-{index}");
        let layer = scene.create(&name, &["--type", "tar-rafs"], tar);
        // A merge takes the id of a layer's blob from the name of its bootstrap.
        let id = layer.blobs.first().unwrap_or(&name);
        for blob in &layer.blobs {
            fs::rename(layer.blob_dir.join(blob), blob_dir.join(blob)).unwrap();
        }
        let renamed = scene.dir("bootstraps").join(id);
        fs::rename(&layer.bootstrap, &renamed).unwrap();
        sources.push(renamed);
    }
    let mut command = nydus_image().unwrap();
    command
        .arg("merge")
        .arg("--bootstrap")
        .arg(scene.path("merged.boot"));
    command
        .arg("--output-json")
        .arg(scene.path("merged.json"))
        .args(sources);
    succeed(&mut command).unwrap();
    Build {
        blob_dir,
        ..scene.build("merged")
    }
}

#[test]
fn three_layers_with_whiteouts() {
    let scene = Scene::new();
    let states = three_states(&scene);
    let build = merge(&scene, &layer_tars(&scene, &states));
    let daemon = scene.mount(&build);
    assert_same_tree(&states[2], daemon.point());
    daemon.stop().unwrap();
}

#[test]
fn an_opaque_directory_hides_what_is_below() {
    let scene = Scene::new();
    let tar = |name: &str, files: &[&str]| {
        let root = scene.dir(name);
        for file in files {
            fs::create_dir_all(root.join(file).parent().unwrap()).unwrap();
            fs::write(root.join(file), file).unwrap();
        }
        let tar = scene.path(&format!("{name}.tar"));
        support::image::layer::write_tree(&root, &tar).unwrap();
        tar
    };
    let layers = [
        tar("lower", &["opaque/old", "opaque/deep/old", "beside"]),
        tar("upper", &["opaque/.wh..wh..opq", "opaque/new"]),
    ];
    let daemon = scene.mount(&merge(&scene, &layers));
    let listed = |directory: &str| {
        let entries = fs::read_dir(daemon.point().join(directory)).unwrap();
        let mut names: Vec<_> = entries.map(|e| e.unwrap().file_name()).collect();
        names.sort();
        names
    };
    assert_eq!(listed(""), ["beside", "opaque"]);
    assert_eq!(listed("opaque"), ["new"]);
    daemon.stop().unwrap();
}
