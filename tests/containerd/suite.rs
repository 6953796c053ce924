//! What containerd's own test suite demands of every snapshotter, asked over gRPC.

use std::fs;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _, chown};
use std::thread;

use snapshotter::api::snapshots::Kind;
use support::binaries::nydus_snapshotter;
use support::command::run;
use support::plugin::code;
use tonic::Code;

use crate::Bench;

#[test]
fn only_its_owner_can_use_the_socket() {
    let bench = Bench::new();
    let address = bench.plugin.address();
    let mode = |path| fs::symlink_metadata(path).unwrap().mode() & 0o777;
    assert_eq!(mode(address.as_path()), 0o600);
    assert_eq!(mode(address.parent().unwrap()), 0o700);
    assert_eq!(mode(&bench.plugin.root()), 0o700);
    let mut second = nydus_snapshotter().unwrap();
    second.arg("--root").arg(bench.plugin.root());
    second
        .arg("--address")
        .arg(bench.directory.path().join("other.sock"));
    let refused = run(&mut second).unwrap();
    assert_eq!(refused.code(), 1, "{}", refused.stderr);
    assert!(refused.stderr.contains("open"), "{}", refused.stderr);
}

#[test]
fn a_snapshot_from_its_beginning_to_its_end() {
    let mut bench = Bench::new();
    let mounts = bench.client.prepare("a", "", &[("k", "v")]).unwrap();
    assert_eq!(mounts[0].r#type, "bind");
    let info = bench.client.stat("a").unwrap();
    assert_eq!((info.kind(), info.parent.as_str()), (Kind::Active, ""));
    assert_eq!(info.labels["k"], "v");
    assert!(info.created_at.is_some() && info.updated_at == info.created_at);

    let mounted = bench.mount("a");
    fs::write(mounted.path().join("foo"), "foo\n").unwrap();
    fs::create_dir_all(mounted.path().join("a/b/c")).unwrap();
    drop(mounted);
    bench
        .client
        .commit("one", "a", &[("committed", "yes")])
        .unwrap();
    let info = bench.client.stat("one").unwrap();
    assert_eq!(info.kind(), Kind::Committed);
    // Labels are replaced, not inherited.
    assert_eq!(
        info.labels.into_iter().collect::<Vec<_>>(),
        [("committed".to_owned(), "yes".to_owned())]
    );
    assert_eq!(code(bench.client.stat("a")), Code::NotFound);

    let mounts = bench.client.prepare("b", "one", &[]).unwrap();
    assert_eq!(mounts[0].r#type, "overlay");
    assert_eq!(bench.client.stat("b").unwrap().parent, "one");
    let mounted = bench.mount("b");
    assert_eq!(fs::read(mounted.path().join("foo")).unwrap(), b"foo\n");
    fs::write(mounted.path().join("bar"), "bar\n").unwrap();
    drop(mounted);
    bench.client.commit("two", "b", &[]).unwrap();
    assert_eq!(bench.client.stat("two").unwrap().parent, "one");

    assert_eq!(code(bench.client.remove("one")), Code::FailedPrecondition);
    for name in ["two", "one"] {
        bench.client.remove(name).unwrap();
        assert_eq!(code(bench.client.stat(name)), Code::NotFound);
    }
}

#[test]
fn every_wrong_request_has_its_code() {
    let mut bench = Bench::new();
    bench.client.prepare("active", "", &[]).unwrap();
    bench.layer("base", "", |_| {});
    bench.client.view("view", "base").unwrap();
    let client = &mut bench.client;
    assert_eq!(code(client.prepare("x", "nothing", &[])), Code::NotFound);
    assert_eq!(code(client.view("x", "nothing")), Code::NotFound);
    assert_eq!(
        code(client.prepare("active", "base", &[])),
        Code::AlreadyExists
    );
    assert_eq!(code(client.view("active", "base")), Code::AlreadyExists);
    assert_eq!(code(client.prepare("base", "", &[])), Code::AlreadyExists);
    assert_eq!(
        code(client.prepare("x", "active", &[])),
        Code::InvalidArgument
    );
    assert_eq!(code(client.view("x", "view")), Code::InvalidArgument);
    assert_eq!(code(client.prepare("", "", &[])), Code::InvalidArgument);
    assert_eq!(
        code(client.commit("", "active", &[])),
        Code::InvalidArgument
    );
    assert_eq!(
        code(client.commit("base", "active", &[])),
        Code::AlreadyExists
    );
    assert_eq!(code(client.commit("x", "nothing", &[])), Code::NotFound);
    assert_eq!(
        code(client.commit("x", "view", &[])),
        Code::FailedPrecondition
    );
    assert_eq!(
        code(client.commit("x", "base", &[])),
        Code::FailedPrecondition
    );
    assert_eq!(code(client.mounts("nothing")), Code::NotFound);
    assert_eq!(code(client.mounts("base")), Code::FailedPrecondition);
    assert_eq!(code(client.remove("nothing")), Code::NotFound);
    assert_eq!(code(client.remove("base")), Code::FailedPrecondition);
    assert_eq!(code(client.usage("nothing")), Code::NotFound);
    assert_eq!(code(client.update("nothing", &[], &[])), Code::NotFound);
    assert_eq!(
        code(client.update("base", &[], &["name"])),
        Code::InvalidArgument
    );
    assert_eq!(code(client.list(&["nonsense=="])), Code::InvalidArgument);
    // None of that has changed anything.
    let mut names: Vec<String> = client
        .list(&[])
        .unwrap()
        .into_iter()
        .map(|info| info.name)
        .collect();
    names.sort();
    assert_eq!(names, ["active", "base", "view"]);
}

#[test]
fn labels_change_one_by_one_or_all_together() {
    let mut bench = Bench::new();
    let client = &mut bench.client;
    client
        .prepare("a", "", &[("one", "1"), ("two", "2")])
        .unwrap();
    let before = client.stat("a").unwrap();
    let labels = |info: snapshotter::api::snapshots::Info| {
        let mut labels: Vec<_> = info
            .labels
            .into_iter()
            .map(|(k, v)| format!("{k}={v}"))
            .collect();
        labels.sort();
        labels.join(" ")
    };
    let changed = client
        .update("a", &[("two", "zwei"), ("three", "3")], &["labels.two"])
        .unwrap();
    assert_ne!(changed.updated_at, before.updated_at);
    assert_eq!(changed.created_at, before.created_at);
    assert_eq!(labels(changed), "one=1 two=zwei");
    let changed = client.update("a", &[], &["labels.one"]).unwrap();
    assert_eq!(labels(changed), "two=zwei");
    let changed = client.update("a", &[("four", "4")], &["labels"]).unwrap();
    assert_eq!(labels(changed), "four=4");
    client.update("a", &[("five", "5")], &[]).unwrap();
    assert_eq!(labels(client.stat("a").unwrap()), "five=5");
}

#[test]
fn lists_are_complete_and_filtered() {
    let mut bench = Bench::new();
    for index in 0..250 {
        let label = format!("{}", index % 10);
        bench
            .client
            .prepare(
                &format!("a{index}"),
                "",
                &[("containerd.io/gc.root", &label)],
            )
            .unwrap();
    }
    bench.client.commit("c", "a0", &[]).unwrap();
    bench.client.view("v", "c").unwrap();
    let count = |filters: &[&str], bench: &mut Bench| bench.client.list(filters).unwrap().len();
    assert_eq!(count(&[], &mut bench), 251);
    assert_eq!(count(&["kind==view", "kind==committed"], &mut bench), 2);
    assert_eq!(count(&["parent==c"], &mut bench), 1);
    assert_eq!(
        count(
            &[r#"labels."containerd.io/gc.root"==3,kind==active"#],
            &mut bench
        ),
        25
    );
    assert_eq!(
        count(
            &[r#"labels."containerd.io/gc.root"==3,name==a13"#],
            &mut bench
        ),
        1
    );
}

#[test]
fn removal_in_the_middle_and_directories() {
    let mut bench = Bench::new();
    bench.layer("one", "", |root| {
        fs::write(root.join("file"), vec![1; 100_000]).unwrap()
    });
    bench.client.prepare("two", "one", &[]).unwrap();
    assert_eq!(code(bench.client.remove("one")), Code::FailedPrecondition);
    bench.client.remove("two").unwrap();
    bench.client.remove("one").unwrap();
    let snapshots = bench.plugin.root().join("snapshots");
    bench.client.cleanup().unwrap();
    assert_eq!(fs::read_dir(&snapshots).unwrap().count(), 0);
    // The names are free again.
    bench.layer("one", "", |_| {});

    let mut at_once = Bench::configured("[snapshot]\nsync_remove = true");
    at_once.client.prepare("x", "", &[]).unwrap();
    at_once.client.remove("x").unwrap();
    assert_eq!(
        fs::read_dir(at_once.plugin.root().join("snapshots"))
            .unwrap()
            .count(),
        0
    );
}

#[test]
fn usage_is_what_a_snapshot_adds() {
    let mut bench = Bench::new();
    bench.layer("base", "", |root| {
        fs::write(root.join("large"), vec![1; 1_000_000]).unwrap()
    });
    let base = bench.client.usage("base").unwrap();
    assert!((1_000_000..1_200_000).contains(&base.size), "{base:?}");
    assert_eq!(base.inodes, 2);
    bench.client.prepare("top", "base", &[]).unwrap();
    let empty = bench.client.usage("top").unwrap();
    assert!(empty.size < 10_000, "{empty:?}");
    let mounted = bench.mount("top");
    fs::write(mounted.path().join("small"), vec![1; 50_000]).unwrap();
    let grown = bench.client.usage("top").unwrap();
    assert!(
        (50_000..100_000).contains(&(grown.size - empty.size)),
        "{grown:?}"
    );
    drop(mounted);
    bench.client.commit("committed", "top", &[]).unwrap();
    assert_eq!(bench.client.usage("committed").unwrap(), grown);
}

#[test]
fn owner_and_mode_of_roots() {
    let mut bench = Bench::new();
    bench.client.prepare("a", "", &[]).unwrap();
    let root = bench.upper("a");
    let mode = fs::metadata(&root).unwrap().permissions().mode() & 0o7777;
    assert_eq!(mode, 0o755);
    chown(&root, Some(1001), Some(1002)).unwrap();
    bench.client.commit("base", "a", &[]).unwrap();
    bench.client.prepare("b", "base", &[]).unwrap();
    let mounted = bench.mount("b");
    let metadata = fs::metadata(mounted.path()).unwrap();
    assert_eq!((metadata.uid(), metadata.gid()), (1001, 1002));
}

/// Data layers are committed instead of unpacked, and found as containerd looks
/// for them, in every namespace.
#[test]
fn data_layers_are_there_already() {
    const TARGET: &str = "containerd.io/snapshot.ref";
    const BLOB: &str = "containerd.io/snapshot/nydus-blob";
    let mut bench = Bench::new();
    bench.layer("k8s/1/lower", "", |_| {});
    bench.layer("moby/2/lower", "", |_| {});
    let client = &mut bench.client;
    for (key, parent) in [
        ("k8s/3/extract", "k8s/1/lower"),
        ("k8s/4/again", "k8s/1/lower"),
        ("moby/5/extract", "moby/2/lower"),
    ] {
        let labels = [
            (TARGET, "sha256:chain"),
            (BLOB, "true"),
            ("containerd.io/snapshot/pullsecret", "p"),
        ];
        let answer = client.prepare(key, parent, &labels);
        assert_eq!(code(answer), Code::AlreadyExists, "{key}");
        let filter = format!(r#"labels."{TARGET}"==sha256:chain,parent=="{parent}""#);
        let found = client.list(&[&filter]).unwrap();
        assert_eq!(found.len(), 1, "{key}");
        assert_eq!(found[0].kind(), Kind::Committed);
        assert!(!found[0].labels.values().any(|value| value == "p"));
    }
    let found = client.stat("sha256:chain").unwrap();
    assert_eq!(
        (found.kind(), found.parent.as_str()),
        (Kind::Committed, "k8s/1/lower")
    );
    assert_eq!(
        code(client.view("v", "sha256:chain")),
        Code::FailedPrecondition
    );
    // The layer with the metadata is unpacked like any other.
    let labels = [
        (TARGET, "sha256:boot"),
        ("containerd.io/snapshot/nydus-bootstrap", "true"),
    ];
    let mounts = client
        .prepare("k8s/6/extract", "sha256:chain", &labels)
        .unwrap();
    assert_eq!(mounts[0].r#type, "overlay");
    // Without the reference of the image, a container gets a hint.
    client
        .commit("sha256:boot", "k8s/6/extract", &labels)
        .unwrap();
    let refused = client.prepare("container", "sha256:boot", &[]).unwrap_err();
    assert_eq!(refused.code(), Code::FailedPrecondition);
    assert!(
        refused.message().contains("disable_snapshot_annotations"),
        "{refused}"
    );
    assert_eq!(code(client.stat("container")), Code::NotFound);
}

#[test]
fn many_requests_at_once() {
    let bench = Bench::new();
    thread::scope(|scope| {
        for worker in 0..8 {
            let mut client = bench.plugin.client().unwrap();
            scope.spawn(move || {
                for round in 0..10 {
                    let name = |what: &str| format!("{what}-{worker}-{round}");
                    client.prepare(&name("active"), "", &[]).unwrap();
                    client.commit(&name("base"), &name("active"), &[]).unwrap();
                    client.view(&name("view"), &name("base")).unwrap();
                    client.remove(&name("view")).unwrap();
                    if round % 2 == 0 {
                        client.remove(&name("base")).unwrap();
                        client.cleanup().unwrap();
                    }
                }
            });
        }
    });
    let mut client = bench.plugin.client().unwrap();
    client.cleanup().unwrap();
    assert_eq!(client.list(&[]).unwrap().len(), 40);
    assert_eq!(
        fs::read_dir(bench.plugin.root().join("snapshots"))
            .unwrap()
            .count(),
        40
    );
}
