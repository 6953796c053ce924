//! All processes of a daemon die at once: whoever holds its descriptors has the next one
//! go on, and containers only wait.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use support::notify::ServiceManager;
use support::registry::Auth;

use crate::node::{
    DRIVERS, MODES, Node, check_part, cold_reader, is_empty, kill_the_daemon, patiently, wait_for,
};

/// The plugin has what it needs to have the next daemon go on.
fn wait_until_held(node: &Node) {
    wait_for("descriptors", || node.plugin.log().contains("holding "));
}

#[test]
fn containers_survive_the_death_of_their_whole_daemon() {
    for (driver, mode) in DRIVERS
        .into_iter()
        .flat_map(|driver| MODES.map(|mode| (driver, mode)))
    {
        let mut node = Node::in_mode(Auth::Open, Some(driver), mode);
        let mut cri = node.containerd.cri().unwrap();
        cri.pull(&node.registry.reference("app:nydus"), None)
            .unwrap();
        let pod = cri.run_pod("steady", &node.logs()).unwrap();
        let mut containers = vec![cold_reader(&node, &mut cri, &pod, "first")];
        assert_eq!(node.mounted_as(), [driver]);
        for round in 0..4 {
            match round {
                1 => node.plugin.kill().unwrap(),
                2 => node.plugin.stop().unwrap(),
                _ => {}
            }
            if round == 1 || round == 2 {
                node.plugin.start_again().unwrap();
            }
            wait_until_held(&node);
            kill_the_daemon(&node);
            node.wait_for_progress(&mut cri, &containers);
            check_part(&node, &mut cri, &containers[0].1, round);
            let name = format!("after-{round}");
            containers.push(cold_reader(&node, &mut cri, &pod, &name));
            // Still the one mount, with one daemon.
            assert_eq!(node.mounted_as(), [driver]);
            node.wait_for_daemons(1);
        }
        node.wait_for_progress(&mut cri, &containers);
        node.check_that_daemons_are_needed();
        cri.remove_pod(&pod).unwrap();
        node.wait_for_daemons(0);
        let root = node.plugin.root();
        wait_for("the end of the mount", || node.mounted_as().is_empty());
        for directory in ["supervisor", "config", "cache/mounts"] {
            wait_for(directory, || is_empty(&root.join(directory)));
        }
    }
}

/// The plugin dies with the whole daemon, and its service manager holds what it held.
#[test]
fn containers_survive_the_death_of_plugin_and_daemon() {
    let mut node = Node::new(Auth::Open);
    let manager = ServiceManager::new(&node.directory.path().join("notify")).unwrap();
    let manager = Arc::new(Mutex::new(manager));
    let over = Arc::new(AtomicBool::new(false));
    let listening = {
        let (manager, over) = (Arc::clone(&manager), Arc::clone(&over));
        thread::spawn(move || {
            while !over.load(Ordering::Relaxed) {
                manager.lock().unwrap().listen().unwrap();
                thread::sleep(Duration::from_millis(1));
            }
        })
    };
    node.plugin.stop().unwrap();
    node.plugin.start_as_service(&manager).unwrap();
    let mut cri = node.containerd.cri().unwrap();
    let image = node.registry.reference("app:nydus");
    patiently(|| cri.pull(&image, None));
    let pod = cri.run_pod("steady", &node.logs()).unwrap();
    let mut containers = vec![cold_reader(&node, &mut cri, &pod, "first")];
    for round in 0..2 {
        wait_until_held(&node);
        let daemons = node.wait_for_daemons(1);
        node.plugin.kill().unwrap();
        node.plugin.kill_daemons(&daemons).unwrap();
        node.wait_for_daemons(0);
        node.plugin.start_as_service(&manager).unwrap();
        node.wait_for_progress(&mut cri, &containers);
        check_part(&node, &mut cri, &containers[0].1, round);
        let name = format!("after-{round}");
        containers.push(cold_reader(&node, &mut cri, &pod, &name));
    }
    wait_for("notice", || {
        manager
            .lock()
            .unwrap()
            .notices()
            .contains(&"READY=1".to_owned())
    });
    cri.remove_pod(&pod).unwrap();
    node.wait_for_daemons(0);
    // Nobody holds on to what is gone: the kernel would go on asking.
    wait_for("an empty store", || {
        manager.lock().unwrap().names().is_empty()
    });
    node.plugin.stop().unwrap();
    over.store(true, Ordering::Relaxed);
    listening.join().unwrap();
}
