//! Machines on a network of their own: network namespaces joined by a bridge, each with
//! a link that can be made slow, cut, or counted.
//!
//! Namespaces have no names. A descriptor of ours and the processes inside keep one; when
//! these are gone, the kernel takes it away with its links. So nothing is left behind by
//! a test that fails, nor by one that is killed, and two tests never meet.
//!
//! A program enters by `setns` between fork and exec. `ip netns exec` would enter a new
//! mount namespace, too, in which what is mounted is seen by nobody else.

use std::fs::File;
use std::io;
use std::net::Ipv4Addr;
use std::os::fd::{AsRawFd as _, RawFd};
use std::os::unix::process::CommandExt as _;
use std::panic::resume_unwind;
use std::process::Command;
use std::sync::Arc;
use std::thread;

use anyhow::{Context as _, Result};
use nix::libc;
use serde_json::Value;

use crate::command::succeed;

/// The one link of each machine, beside its loopback.
const LINK: &str = "eth0";

/// A network namespace.
#[derive(Debug)]
struct Namespace(File);

impl Namespace {
    fn new() -> Result<Self> {
        // A thread of its own: leaving the namespace of this program would last.
        let made = thread::spawn(|| {
            // SAFETY: it changes nothing but the network of the calling thread.
            if unsafe { libc::unshare(libc::CLONE_NEWNET) } != 0 {
                return Err(io::Error::last_os_error());
            }
            File::open("/proc/thread-self/ns/net")
        });
        let file = made.join().unwrap_or_else(|panic| resume_unwind(panic));
        let file = file.context("cannot make a network namespace; run as root")?;
        let namespace = Self(file);
        namespace.ip(&["link", "set", "lo", "up"])?;
        Ok(namespace)
    }

    /// Has `command` run inside.
    fn enter(&self, command: &mut Command) {
        let descriptor: RawFd = self.0.as_raw_fd();
        let enter = move || {
            // SAFETY: the parent keeps the descriptor open until the child runs.
            if unsafe { libc::setns(descriptor, libc::CLONE_NEWNET) } != 0 {
                return Err(io::Error::last_os_error());
            }
            Ok(())
        };
        // SAFETY: between fork and exec only the async-signal-safe setns system call is made.
        unsafe {
            command.pre_exec(enter);
        }
    }

    /// Runs `work` on a thread inside; threads that it starts are inside, too, and so
    /// are their sockets.
    fn inside<T: Send>(&self, work: impl FnOnce() -> T + Send) -> Result<T> {
        let descriptor: RawFd = self.0.as_raw_fd();
        thread::scope(|scope| {
            let thread = scope.spawn(move || {
                // SAFETY: it changes nothing but the network of this thread.
                if unsafe { libc::setns(descriptor, libc::CLONE_NEWNET) } != 0 {
                    return Err(io::Error::last_os_error());
                }
                Ok(work())
            });
            let done = thread.join().unwrap_or_else(|panic| resume_unwind(panic));
            done.context("cannot enter a network namespace")
        })
    }

    fn run(&self, program: &str, arguments: &[&str]) -> Result<String> {
        let mut command = Command::new(program);
        self.enter(command.args(arguments));
        Ok(succeed(&mut command)?.stdout)
    }

    fn ip(&self, arguments: &[&str]) -> Result<String> {
        self.run("ip", arguments)
    }

    /// A path by which other programs find it.
    fn path(&self) -> String {
        format!("/proc/{}/fd/{}", std::process::id(), self.0.as_raw_fd())
    }
}

/// A bridge and what is plugged into it.
#[derive(Debug)]
pub struct Network {
    bridge: Arc<Namespace>,
    machines: u8,
}

/// A machine of a [`Network`], where programs can run.
#[derive(Debug)]
pub struct Machine {
    namespace: Namespace,
    bridge: Arc<Namespace>,
    /// Its end of the link at the bridge.
    port: String,
    address: Ipv4Addr,
}

impl Network {
    /// A network without machines.
    ///
    /// # Errors
    /// Not root, or the package iproute2 is missing.
    pub fn new() -> Result<Self> {
        let bridge = Namespace::new()?;
        bridge.ip(&["link", "add", "bridge", "type", "bridge"])?;
        bridge.ip(&["link", "set", "bridge", "up"])?;
        Ok(Self {
            bridge: Arc::new(bridge),
            machines: 0,
        })
    }

    /// Plugs in a new machine.
    ///
    /// # Errors
    /// The kernel refuses, or there are too many.
    pub fn machine(&mut self) -> Result<Machine> {
        self.machines = self
            .machines
            .checked_add(1)
            .filter(|number| *number < 255)
            .context("too many machines for one network")?;
        let machine = Machine {
            namespace: Namespace::new()?,
            bridge: Arc::clone(&self.bridge),
            port: format!("port{}", self.machines),
            address: Ipv4Addr::new(10, 77, 0, self.machines),
        };
        machine.plug_in()?;
        Ok(machine)
    }
}

impl Machine {
    fn plug_in(&self) -> Result<()> {
        let there = self.namespace.path();
        let port = self.port.as_str();
        self.bridge.ip(&[
            "link", "add", port, "type", "veth", "peer", "name", LINK, "netns", &there,
        ])?;
        let at_bridge = ["link", "set", port, "master", "bridge", "up"];
        self.bridge.ip(&at_bridge)?;
        let address = format!("{}/24", self.address);
        self.namespace
            .ip(&["address", "add", &address, "dev", LINK])?;
        self.namespace.ip(&["link", "set", LINK, "up"])?;
        // A server that is killed and started again wants its port back at once, also if
        // it does not say so (SO_REUSEADDR).
        let forget = "echo 0 >/proc/sys/net/ipv4/tcp_max_tw_buckets";
        self.namespace.run("sh", &["-c", forget])?;
        Ok(())
    }

    /// Its address.
    #[must_use]
    pub fn address(&self) -> Ipv4Addr {
        self.address
    }

    /// Has `command` run on it.
    pub fn enter<'c>(&self, command: &'c mut Command) -> &'c mut Command {
        self.namespace.enter(command);
        command
    }

    /// A command that will run on it.
    #[must_use]
    pub fn command(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        self.namespace.enter(&mut command);
        command
    }

    /// Runs `work` on a thread of this program that is on the machine; threads and
    /// sockets that it makes stay there.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn inside<T: Send>(&self, work: impl FnOnce() -> T + Send) -> Result<T> {
        self.namespace.inside(work)
    }

    /// A path by which `nsenter --net=PATH` finds it while this program runs.
    #[must_use]
    pub fn path(&self) -> String {
        self.namespace.path()
    }

    /// Lets it send no more than `mbit` Mbit/s from now on.
    ///
    /// # Errors
    /// The kernel has no token bucket filter (`sch_tbf`).
    pub fn limit(&self, mbit: u32) -> Result<()> {
        let rate = format!("{mbit}mbit");
        let filter = ["rate", &rate, "burst", "128kb", "latency", "50ms"];
        let mut arguments = vec!["qdisc", "replace", "dev", LINK, "root", "tbf"];
        arguments.extend(filter);
        self.namespace.run("tc", &arguments)?;
        Ok(())
    }

    /// Bytes that it has sent over its link so far, headers included.
    ///
    /// # Errors
    /// The kernel does not tell.
    pub fn sent(&self) -> Result<u64> {
        let shown = self
            .namespace
            .ip(&["-json", "-stats", "link", "show", "dev", LINK])?;
        let shown: Value = serde_json::from_str(&shown)?;
        shown[0]["stats64"]["tx"]["bytes"]
            .as_u64()
            .with_context(|| format!("no counter in {shown}"))
    }

    /// Loses every packet from here to `other` from now on, without a word.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn cut(&self, other: &Self) -> Result<()> {
        let address = other.address.to_string();
        let nobody = ["lladdr", "02:00:00:00:00:fe", "nud", "permanent"];
        let mut arguments = vec!["neighbour", "replace", &address, "dev", LINK];
        arguments.extend(nobody);
        self.namespace.ip(&arguments)?;
        Ok(())
    }

    /// Ends a [`Machine::cut`].
    ///
    /// # Errors
    /// There was none.
    pub fn heal(&self, other: &Self) -> Result<()> {
        let address = other.address.to_string();
        self.namespace
            .ip(&["neighbour", "delete", &address, "dev", LINK])?;
        Ok(())
    }

    /// Pulls the plug, or puts it in again.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn plug(&self, plugged: bool) -> Result<()> {
        let state = if plugged { "up" } else { "down" };
        self.bridge.ip(&["link", "set", &self.port, state])?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::command::run;

    fn reaches(from: &Machine, to: &Machine) -> bool {
        let target = format!("/dev/tcp/{}/9", to.address());
        // Nobody listens: a refusal is an answer, and silence is none.
        let script = format!("exec 3<>{target}");
        let mut bash = from.command("timeout");
        let said = run(bash.args(["2", "bash", "-c", &script])).unwrap().stderr;
        said.contains("refused")
    }

    #[test]
    fn machines_reach_each_other_unless_the_link_is_cut() {
        let mut network = Network::new().unwrap();
        let (one, two) = (network.machine().unwrap(), network.machine().unwrap());
        assert!(reaches(&one, &two));
        one.cut(&two).unwrap();
        assert!(!reaches(&one, &two));
        one.heal(&two).unwrap();
        assert!(reaches(&one, &two));
        two.plug(false).unwrap();
        assert!(!reaches(&one, &two));
        two.plug(true).unwrap();
        assert!(reaches(&one, &two));
        one.limit(100).unwrap();
        let before = one.sent().unwrap();
        assert!(reaches(&one, &two));
        assert!(one.sent().unwrap() > before);
    }
}
