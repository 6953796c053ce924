//! The plugin killed at any moment, and its directory damaged meanwhile.

use std::collections::BTreeMap;
use std::fs;
use std::thread;
use std::time::Duration;

use snapshotter::api::snapshots::Kind;
use support::plugin::code;
use tonic::Code;

use crate::Bench;

/// A client works while the plugin is killed again and again. What was confirmed
/// is there afterwards, what was not confirmed is whole or not there at all, and no
/// directory is left over.
#[test]
fn killed_at_any_moment() {
    let mut bench = Bench::new();
    let mut confirmed = BTreeMap::new();
    // A slow disk gets more rounds, for as much to be checked.
    for round in 0..60_u32 {
        if round >= 6 && confirmed.len() > 20 {
            break;
        }
        let mut client = bench.plugin.client().unwrap();
        let worker = thread::spawn(move || {
            let mut confirmed = BTreeMap::new();
            for step in 0_u32.. {
                let name = |what: &str| format!("{what}-{round}-{step}");
                if client.prepare(&name("a"), "", &[]).is_err() {
                    return confirmed;
                }
                confirmed.insert(name("a"), Kind::Active);
                if step % 2 == 0 {
                    // Either name may be the right one if the answer is lost.
                    confirmed.remove(&name("a"));
                    if client.commit(&name("c"), &name("a"), &[]).is_err() {
                        return confirmed;
                    }
                    confirmed.insert(name("c"), Kind::Committed);
                }
                if step % 3 == 0 {
                    confirmed.remove(&name("c"));
                    confirmed.remove(&name("a"));
                    let last = if step % 2 == 0 { name("c") } else { name("a") };
                    if client.remove(&last).is_err() {
                        return confirmed;
                    }
                }
            }
            confirmed
        });
        thread::sleep(Duration::from_millis(40 + u64::from(round) * 17));
        bench.plugin.kill().unwrap();
        confirmed.extend(worker.join().unwrap());
        bench.plugin.start_again().unwrap();
        bench.client = bench.plugin.client().unwrap();
        let found: BTreeMap<String, Kind> = bench
            .client
            .list(&[])
            .unwrap()
            .into_iter()
            .map(|info| (info.name.clone(), info.kind()))
            .collect();
        for (name, kind) in &confirmed {
            assert_eq!(found.get(name), Some(kind), "{name}");
        }
        let directories = fs::read_dir(bench.plugin.root().join("snapshots"))
            .unwrap()
            .count();
        assert_eq!(directories, found.len());
    }
    assert!(
        confirmed.len() > 20,
        "only {} steps in all",
        confirmed.len()
    );
}

#[test]
fn a_damaged_directory_is_repaired() {
    let mut bench = Bench::new();
    let skip = [
        ("containerd.io/snapshot.ref", "data"),
        ("containerd.io/snapshot/nydus-blob", "true"),
    ];
    assert_eq!(
        code(bench.client.prepare("x", "", &skip)),
        Code::AlreadyExists
    );
    bench.layer("good", "", |_| {});
    bench.layer("lost", "", |_| {});
    bench.layer("on-lost", "lost", |_| {});
    bench.client.prepare("container", "on-lost", &[]).unwrap();
    let snapshots = bench.plugin.root().join("snapshots");
    bench.plugin.stop().unwrap();
    // Ids count from 1 in the order of creation.
    for id in ["1", "3"] {
        fs::remove_dir_all(snapshots.join(id)).unwrap();
    }
    fs::create_dir_all(snapshots.join("new-torn/fs")).unwrap();
    fs::create_dir_all(snapshots.join("77/fs")).unwrap();
    bench.plugin.start_again().unwrap();
    bench.client = bench.plugin.client().unwrap();
    let mut names: Vec<String> = bench
        .client
        .list(&[])
        .unwrap()
        .into_iter()
        .map(|info| info.name)
        .collect();
    names.sort();
    assert_eq!(names, ["data", "good"]);
    assert_eq!(fs::read_dir(&snapshots).unwrap().count(), 2);
    let log = bench.plugin.log();
    for word in [
        "\"lost\"",
        "\"on-lost\"",
        "\"container\"",
        "new-torn",
        "/77 ",
        "/1/fs",
    ] {
        assert!(
            log.lines()
                .any(|line| line.contains("repair") && line.contains(word)),
            "{word}:\n{log}"
        );
    }
}
