//! Everything on a node dies, one after the other, under twenty containers that read and
//! compare all the time.

use std::collections::BTreeSet;
use std::fs;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use support::registry::Auth;

use crate::node::{DRIVERS, Node, check_part, cold_reader, patiently, wait_for};

/// How many containers.
const CONTAINERS: usize = 20;

/// What is killed.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Victim {
    Worker,
    Keeper,
    Daemon,
    Plugin,
    Containerd,
    Registry,
    /// The plugin with the worker: nobody may need the plugin for that.
    PluginAndWorker,
}

use Victim::{Containerd, Daemon, Keeper, Plugin, PluginAndWorker, Registry, Worker};

/// In this order: each death meets what an earlier one has left.
const VICTIMS: [Victim; 13] = [
    Worker,
    Keeper,
    Daemon,
    Plugin,
    Daemon,
    Containerd,
    Registry,
    Keeper,
    PluginAndWorker,
    Worker,
    Daemon,
    Plugin,
    Keeper,
];

/// Kills one process of the daemon, and waits until it has a successor.
fn kill_one(node: &Node, is_keeper: bool) {
    let before = processes(node);
    let victim = before
        .iter()
        .copied()
        .find(|pid| node.plugin.is_keeper(*pid) == is_keeper);
    let victim = victim.unwrap_or_else(|| panic!("none of {before:?}:\n{}", node.plugin.log()));
    kill(Pid::from_raw(victim), Signal::SIGKILL).unwrap();
    wait_for("another process", || {
        let now = processes(node);
        now.len() == 2 && !now.contains(&victim)
    });
}

/// Both processes of the only daemon.
fn processes(node: &Node) -> BTreeSet<i32> {
    node.plugin.processes().unwrap().into_iter().collect()
}

pub(crate) fn kill_one_of_all(node: &mut Node, victim: Victim) {
    match victim {
        Worker => kill_one(node, false),
        Keeper => kill_one(node, true),
        Daemon => {
            wait_for("descriptors", || node.plugin.log().contains("holding "));
            let old = processes(node);
            node.plugin.kill_daemons(&node.wait_for_daemons(1)).unwrap();
            wait_for("another daemon", || {
                let now = processes(node);
                now.len() == 2 && now.is_disjoint(&old)
            });
        }
        Plugin => {
            node.plugin.kill().unwrap();
            node.plugin.start_again().unwrap();
        }
        PluginAndWorker => {
            node.plugin.kill().unwrap();
            kill_one(node, false);
            node.plugin.start_again().unwrap();
        }
        Containerd => {
            node.containerd.kill().unwrap();
            node.containerd.start_again().unwrap();
        }
        Registry => node.registry.kill().unwrap(),
    }
}

#[test]
fn twenty_containers_survive_everything() {
    for driver in DRIVERS {
        survive(driver);
    }
}

fn survive(driver: &str) {
    let mut node = Node::configured(Auth::Open, Some(driver));
    let mut cri = node.containerd.cri().unwrap();
    let image = node.registry.reference("app:nydus");
    cri.pull(&image, None).unwrap();
    let pod = cri.run_pod("chaos", &node.logs()).unwrap();
    let mut containers = Vec::new();
    for index in 0..CONTAINERS {
        containers.push(cold_reader(&node, &mut cri, &pod, &format!("c{index}")));
    }
    assert_eq!(node.mounted_as(), [driver]);
    let mut parts = 0..4;
    for victim in VICTIMS {
        kill_one_of_all(&mut node, victim);
        if victim == Containerd {
            cri = node.containerd.cri().unwrap();
        }
        // What was read before is there without a registry.
        node.wait_for_progress(&mut cri, &containers);
        match victim {
            Registry => node.registry.start_again().unwrap(),
            // Also what nobody has read yet.
            Daemon | PluginAndWorker => {
                check_part(&node, &mut cri, &containers[0].1, parts.next().unwrap());
            }
            _ => {}
        }
    }
    node.check_that_daemons_are_needed();
    // And new ones can be started.
    containers.push(cold_reader(&node, &mut cri, &pod, "last"));
    for (name, id) in &containers {
        assert_eq!(cri.exit_code(id).unwrap(), None, "{name}");
        let log = fs::read_to_string(node.logs().join(format!("{name}.log"))).unwrap();
        // Time, stream and a mark come first.
        let counts = log.lines().map(|line| line.splitn(4, ' ').nth(3).unwrap());
        // Nothing but its count: every round has found what is right.
        for (round, count) in counts.enumerate() {
            assert_eq!(count, (round + 1).to_string(), "{name}");
        }
    }
    patiently(|| cri.remove_pod(&pod));
    node.wait_for_daemons(0);
}
