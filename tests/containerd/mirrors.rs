//! Lazily started pods whose data come through mirrors: files of containerd's, and a
//! second registry that pulls through.

use std::fs;
use std::path::Path;
use std::process::Command;

use support::command::succeed;
use support::registry::{Auth, Registry};

use crate::node::{Node, reader};

/// Tells of one mirror, as `dfinit` does.
fn write_hosts(directory: &Path, registry: &Registry, mirror: &Registry) {
    let (host, port) = registry.host().split_once(':').unwrap();
    let at = directory.join(format!("{host}_{port}_"));
    fs::create_dir_all(&at).unwrap();
    let text = format!(
        "server = \"http://{}\"\n[host.\"http://{}\"]\ncapabilities = [\"pull\", \"resolve\"]\n\
         [host.\"http://{1}\".header]\nX-Dragonfly-Registry = \"http://{0}\"\n",
        registry.host(),
        mirror.host()
    );
    fs::write(at.join("hosts.toml"), text).unwrap();
}

/// Blobs that a registry was asked for since its log had `mark` bytes, and gave.
fn blobs_served(registry: &Registry, mark: usize) -> usize {
    let log = registry.log();
    let lines = log[mark..]
        .lines()
        .filter(|line| line.contains("GET /v2/app/blobs/"));
    let served = lines.filter(|line| line.contains("\" 200 ") || line.contains("\" 206 "));
    served.count()
}

#[test]
fn data_come_through_the_mirror_and_without_it_from_the_registry() {
    let (node, directory) = Node::with_mirrors(Auth::Open);
    let origin = format!("http://{}", node.registry.host());
    let mut mirror = Registry::pulling_through(&origin).unwrap();
    write_hosts(&directory, &node.registry, &mirror);
    let mut cri = node.containerd.cri().unwrap();
    let image = node.registry.reference("app:nydus");
    // containerd itself has no mirrors here.
    cri.pull(&image, None).unwrap();
    assert_eq!(blobs_served(&mirror, 0), 0, "{}", mirror.log());

    let pod = cri.run_pod("mirrored", &node.logs()).unwrap();
    let container = reader(&node, &mut cri, &pod, "reader");
    assert!(blobs_served(&mirror, 0) > 0, "{}", mirror.log());
    // Nobody reads ahead into this one: it has to be fetched now.
    mirror.kill().unwrap();
    let mark = node.registry.log().len();
    let sum = |root: &Path| format!("sha256sum < {}", root.join("spare/never").display());
    let wanted = succeed(Command::new("sh").args(["-c", &sum(&node.tree)])).unwrap();
    let script = sum(Path::new("/"));
    let read = node.exec(&mut cri, &container, &["sh", "-c", &script]);
    assert_eq!(read, wanted.stdout, "{}", node.plugin.log());
    assert!(
        blobs_served(&node.registry, mark) > 0,
        "{}",
        node.registry.log()
    );
}
