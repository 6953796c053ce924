//! The command line as plain data; nothing is opened or checked against the
//! system here.
//!
//! Three forms lead to a mount: options alone, which is what older clients use;
//! the same options after `fuse`; and `mount IMAGE MOUNTPOINT`. Options of
//! features that do not exist yet are parsed all the same, so that the error
//! names the feature instead of the option ([`FuseOptions::check`]).

use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::error::ErrorKind;
use clap::{Args, CommandFactory as _, Parser, Subcommand, ValueEnum};
use storage::gate::Limits;

use crate::driver::Choice;
use crate::upgrade::waiting;

/// Text of `--version`: one item per line, behind a carriage return that makes
/// the program name disappear on a terminal; clients search for `Git Commit:`.
const VERSION: &str = concat!(
    "\rVersion: \tv",
    env!("CARGO_PKG_VERSION"),
    "\nGit Commit: \t",
    env!("NYDUS_BUILD_COMMIT"),
    "\nBuild Time: \t",
    env!("NYDUS_BUILD_TIME"),
    "\nProfile: \t",
    env!("NYDUS_BUILD_PROFILE"),
    "\nRustc: \t\t",
    env!("NYDUS_BUILD_RUSTC"),
);

/// Mount container images whose content is fetched when it is read.
#[derive(Parser, Debug)]
#[command(
    name = "nydusd",
    version = VERSION,
    subcommand_negates_reqs = true,
    after_help = "Examples:\n  \
        nydusd mount registry.example/app:latest-nydus /mnt\n  \
        nydusd mount oci:./layout:v1 /mnt --cache-dir /var/cache/nydus\n  \
        nydusd --bootstrap image.boot --localfs-dir ./blobs --mountpoint /mnt"
)]
pub(crate) struct Cli {
    #[command(flatten)]
    pub global: Global,
    #[command(flatten)]
    fuse: FuseOptions,
    #[command(subcommand)]
    command: Option<Command>,
}

/// What to do.
#[derive(Subcommand, Debug)]
enum Command {
    /// Mount an image given by configuration file and bootstrap
    Fuse(FuseOptions),
    /// Mount an image by reference: fetch its metadata now and its content on demand
    Mount(MountOptions),
    /// Show a running daemon and its state
    Status(Plain),
    /// List the images that a running daemon has mounted
    Mounts(Plain),
    /// Show the numbers of a running daemon
    Metrics(Plain),
    /// Unmount one image of a running daemon, or everything, which ends it
    Umount(UmountOptions),
    /// Look at configuration files
    #[command(subcommand)]
    Config(ConfigCommand),
    /// Serve the kernel's cache (not supported yet)
    #[command(hide = true)]
    Singleton(Rest),
    /// Serve a virtual machine (not supported yet)
    #[command(hide = true)]
    Virtiofs(Rest),
    /// Export as a network block device (not supported yet)
    #[command(hide = true)]
    Nbd(Rest),
    /// Export as a user-fault block device (not supported yet)
    #[command(hide = true)]
    Uffd(Rest),
}

/// The work that a valid command line asks for.
#[derive(Debug)]
pub(crate) enum Task {
    /// Mount what a bootstrap and a configuration describe.
    Fuse(FuseOptions),
    /// Mount an image by reference.
    Mount(MountOptions),
    /// Talk to a running daemon, or check a file; nothing is mounted.
    Control(Control),
}

impl Task {
    /// Where something is mounted.
    pub(crate) fn mountpoint(&self) -> Option<&Path> {
        match self {
            Self::Fuse(options) => options.mountpoint.as_deref(),
            Self::Mount(options) => Some(&options.mountpoint),
            Self::Control(_) => None,
        }
    }

    /// What becomes of requests in flight at a take-over.
    pub(crate) fn failover_policy(&self) -> FailoverPolicy {
        let chosen = match self {
            Self::Fuse(options) => options.failover_policy,
            Self::Mount(_) | Self::Control(_) => None,
        };
        chosen.unwrap_or(FailoverPolicy::Resend)
    }
}

/// Tasks that mount nothing.
#[derive(Debug)]
pub(crate) enum Control {
    /// Show state and version.
    Status(Plain),
    /// List images.
    Mounts(Plain),
    /// Show numbers.
    Metrics(Plain),
    /// Unmount.
    Umount(UmountOptions),
    /// Check a configuration file.
    CheckConfig(CheckOptions),
}

/// Options of commands that show something.
#[derive(Args, Debug)]
pub(crate) struct Plain {
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

/// Options of `umount`.
#[derive(Args, Debug)]
pub(crate) struct UmountOptions {
    /// Path inside the daemon's mount, as `nydusd mounts` lists it
    /// [default: everything; the daemon ends]
    #[arg(value_name = "PATH")]
    pub path: Option<String>,

    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

/// Commands for configuration files.
#[derive(Subcommand, Debug)]
enum ConfigCommand {
    /// Check a configuration file, and show what it means
    Check(CheckOptions),
}

/// Options of `config check`.
#[derive(Args, Debug)]
pub(crate) struct CheckOptions {
    /// Configuration file: version 2 as JSON or TOML, version 1 as JSON
    #[arg(value_name = "FILE")]
    pub file: PathBuf,

    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

/// Any arguments: of modes that are refused as a whole.
#[derive(Args, Debug)]
struct Rest {
    #[arg(trailing_var_arg = true, allow_hyphen_values = true, hide = true)]
    rest: Vec<String>,
}

/// Options of every mode.
#[derive(Args, Debug)]
pub(crate) struct Global {
    /// Path of the control socket: made by a daemon, used by status, mounts, metrics, umount
    #[arg(short = 'A', long, value_name = "path", global = true)]
    pub apisock: Option<PathBuf>,

    /// Configuration file: version 2 as JSON or TOML, version 1 as JSON
    #[arg(short = 'C', long, value_name = "file", global = true)]
    pub config: Option<PathBuf>,

    /// Name of this daemon at its supervisor
    #[arg(long, requires = "supervisor", global = true)]
    pub id: Option<String>,

    /// Socket on which a supervisor takes and offers the state of this daemon, so that
    /// another one can go on with its mounts
    #[arg(long, value_name = "path", requires = "id", global = true)]
    pub supervisor: Option<PathBuf>,

    /// Mount nothing: wait to be told, by the control socket, to take over the mounts
    /// whose state the supervisor has
    #[arg(long, global = true)]
    pub upgrade: bool,

    /// Least severe messages to log
    #[arg(
        short = 'l',
        long,
        value_name = "level",
        default_value = "info",
        global = true
    )]
    pub log_level: LogLevel,

    /// File to append log messages to; `.log` is added to a name without extension
    /// [default: standard error]
    #[arg(short = 'L', long, value_name = "file", global = true)]
    pub log_file: Option<PathBuf>,

    /// Size at which the log file is rotated, in MiB; 0 is never (no effect yet)
    #[arg(long, value_name = "MiB", default_value_t = 0, global = true)]
    pub log_rotation_size: u64,

    /// Log reads that wait longer than this, with chunk and source; 0 is never
    #[arg(long, value_name = "ms", default_value_t = 1000, global = true)]
    pub slow_read_ms: u64,

    /// Limit of open files to ask for; 0 leaves it alone
    #[arg(long, value_name = "count", default_value_t = 1_000_000, global = true)]
    pub rlimit_nofile: u64,

    /// Address for backend updates (no effect)
    #[arg(long, value_name = "address", hide = true, global = true)]
    pub backend_source: Option<String>,
}

/// Severity of log messages.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum LogLevel {
    /// Everything, requests included.
    Trace,
    /// Decisions and their reasons.
    Debug,
    /// Life of the daemon.
    Info,
    /// Something failed and may recover.
    Warn,
    /// Data or a mount was lost.
    Error,
}

/// Options of a mount by bootstrap.
#[derive(Args, Debug, Default)]
pub(crate) struct FuseOptions {
    /// Directory to mount on; must exist
    #[arg(short = 'M', long, value_name = "mountpoint")]
    pub mountpoint: Option<PathBuf>,

    /// Bootstrap file: the metadata of the image
    #[arg(short = 'B', long, value_name = "file", conflicts_with = "shared_dir")]
    pub bootstrap: Option<PathBuf>,

    /// Directory with blobs, also used as cache; instead of a configuration file
    #[arg(short = 'D', long, value_name = "dir")]
    pub localfs_dir: Option<PathBuf>,

    /// Directory to pass through instead of an image (not supported yet)
    #[arg(short = 's', long, value_name = "dir")]
    pub shared_dir: Option<PathBuf>,

    /// File with absolute paths to fetch early, one per line
    #[arg(long, value_name = "file", requires = "bootstrap")]
    pub prefetch_files: Option<PathBuf>,

    /// Path inside the mount at which the image appears [default: /]
    #[arg(short = 'm', long, value_name = "path")]
    pub virtual_mountpoint: Option<PathBuf>,

    /// Database of chunks shared by images (not supported yet)
    #[arg(long, value_name = "file")]
    pub dedup_db: Option<PathBuf>,

    /// What becomes of FUSE requests that the old daemon had taken and not answered
    /// [default: resend]
    #[arg(long, value_name = "policy")]
    pub failover_policy: Option<FailoverPolicy>,

    /// Threads that answer file system requests [default: 4]
    #[arg(
        long,
        alias = "thread-num",
        value_name = "count",
        value_parser = clap::value_parser!(u16).range(1..=1024)
    )]
    pub fuse_threads: Option<u16>,

    /// What serves the mount: the kernel's EROFS, or FUSE; `auto` tries in that order. For
    /// images of the control API it tries once, in the cache directory of --config, and means
    /// FUSE without that [default: fuse]
    #[arg(long, value_name = "driver")]
    pub driver: Option<Choice>,

    /// Allow changes, kept in an overlay (not supported yet)
    #[arg(long)]
    pub writable: bool,
}

/// What a take-over does with requests in flight.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum FailoverPolicy {
    /// Leave them: their readers wait until they are killed.
    None,
    /// Have the kernel send them again.
    Resend,
    /// Answer them with an error.
    Flush,
}

/// Options of a mount by reference.
#[derive(Args, Debug)]
pub(crate) struct MountOptions {
    /// Image: `host/repository:tag[@digest]`, `oci:DIR[:TAG]`, or a bootstrap file
    #[arg(value_name = "IMAGE")]
    pub image: String,

    /// Directory to mount on; must exist
    #[arg(value_name = "MOUNTPOINT")]
    pub mountpoint: PathBuf,

    /// Directory for fetched content, shared by all mounts of this machine
    #[arg(long, value_name = "dir", default_value = "/var/lib/nydus/cache")]
    pub cache_dir: PathBuf,

    /// Directory with the blobs of a bootstrap file
    #[arg(long, value_name = "dir")]
    pub localfs_dir: Option<PathBuf>,

    /// Platform to choose from a multi-platform image, like linux/arm64/v8
    /// [default: this machine's]
    #[arg(long, value_name = "os/arch")]
    pub platform: Option<String>,

    /// Talk plain HTTP to the registry; loopback registries always do
    #[arg(long)]
    pub plain_http: bool,

    /// File with absolute paths to fetch early, one per line
    /// [default: the files that the image names itself]
    #[arg(long, value_name = "file")]
    pub prefetch_files: Option<PathBuf>,

    /// Write the paths of the files that are read to this file, for --prefetch-files
    #[arg(long, value_name = "file")]
    pub record_files: Option<PathBuf>,

    /// Fetch the whole image in the background
    #[arg(long)]
    pub prefetch_all: bool,

    /// What serves the mount: the kernel's EROFS, or FUSE; `auto` tries in that order
    #[arg(long, value_name = "driver", default_value = "auto")]
    pub driver: Choice,

    /// Fetch no more bytes per second from the registry, counted for all images of
    /// this process; what nobody waits for gets what readers leave
    #[arg(
        long,
        value_name = "bytes",
        value_parser = clap::value_parser!(u64).range(1024..)
    )]
    pub bandwidth_limit: Option<u64>,

    /// Threads that answer file system requests, with FUSE
    #[arg(
        long,
        value_name = "count",
        default_value_t = 4,
        value_parser = clap::value_parser!(u16).range(1..=1024)
    )]
    pub fuse_threads: u16,
}

impl MountOptions {
    /// Limits of the registry, if any were chosen.
    pub(crate) fn limits(&self) -> Option<Limits> {
        self.bandwidth_limit.map(|bandwidth| Limits {
            bandwidth,
            ..Limits::default()
        })
    }
}

impl Cli {
    /// Checks what clap cannot express and says what is to be done.
    ///
    /// # Errors
    /// A usage error (exit code 2), or the name of a mode that is not there yet.
    pub(crate) fn task(self) -> anyhow::Result<(Global, Task)> {
        let usage = |kind, text: &str| Self::command().error(kind, text);
        if self.command.is_some() && self.fuse.is_used() {
            return Err(usage(
                ErrorKind::ArgumentConflict,
                "options of a mount must follow the subcommand",
            )
            .into());
        }
        let task = match self.command {
            None => Task::Fuse(self.fuse),
            Some(Command::Fuse(options)) => Task::Fuse(options),
            Some(Command::Mount(options)) => Task::Mount(options),
            Some(Command::Status(options)) => Task::Control(Control::Status(options)),
            Some(Command::Mounts(options)) => Task::Control(Control::Mounts(options)),
            Some(Command::Metrics(options)) => Task::Control(Control::Metrics(options)),
            Some(Command::Umount(options)) => Task::Control(Control::Umount(options)),
            Some(Command::Config(ConfigCommand::Check(options))) => {
                Task::Control(Control::CheckConfig(options))
            }
            Some(Command::Singleton(_)) => anyhow::bail!("mode `singleton` is not supported yet"),
            Some(Command::Virtiofs(_)) => anyhow::bail!("mode `virtiofs` is not supported yet"),
            Some(Command::Nbd(_)) => anyhow::bail!("mode `nbd` is not supported yet"),
            Some(Command::Uffd(_)) => anyhow::bail!("mode `uffd` is not supported yet"),
        };
        if let Task::Fuse(options) = &task {
            if options.mountpoint.is_none() {
                return Err(usage(
                    ErrorKind::MissingRequiredArgument,
                    "the following required argument was not provided: --mountpoint <mountpoint>",
                )
                .into());
            }
            if options.localfs_dir.is_some() && self.global.config.is_some() {
                return Err(usage(
                    ErrorKind::ArgumentConflict,
                    "the argument '--localfs-dir <dir>' cannot be used with '--config <file>'",
                )
                .into());
            }
        }
        Ok((self.global, task))
    }
}

impl Global {
    /// Waits of readers that are logged.
    pub(crate) fn slow_read(&self) -> Option<Duration> {
        (self.slow_read_ms > 0).then(|| Duration::from_millis(self.slow_read_ms))
    }

    /// Says what is missing for `--upgrade`.
    ///
    /// # Errors
    /// One line that names it.
    pub(crate) fn check(&self) -> anyhow::Result<()> {
        if self.upgrade {
            waiting::check(self.apisock.as_deref(), self.supervisor.as_deref())?;
        }
        Ok(())
    }

    /// Options that are accepted and change nothing.
    pub(crate) fn without_effect(&self) -> Vec<&'static str> {
        let mut options = Vec::new();
        if self.log_rotation_size > 0 {
            options.push("--log-rotation-size");
        }
        if self.backend_source.is_some() {
            options.push("--backend-source");
        }
        options
    }
}

impl FuseOptions {
    fn is_used(&self) -> bool {
        self.mountpoint.is_some()
            || self.bootstrap.is_some()
            || self.localfs_dir.is_some()
            || self.shared_dir.is_some()
            || self.prefetch_files.is_some()
            || self.virtual_mountpoint.is_some()
            || self.dedup_db.is_some()
            || self.failover_policy.is_some()
            || self.fuse_threads.is_some()
            || self.driver.is_some()
            || self.writable
    }

    /// Names the first option whose feature does not exist yet.
    ///
    /// # Errors
    /// One line that names option and feature.
    pub(crate) fn check(&self) -> anyhow::Result<()> {
        let inside = self
            .virtual_mountpoint
            .as_ref()
            .is_some_and(|path| path.as_os_str() != "/");
        refuse(
            self.shared_dir.is_some(),
            "--shared-dir",
            "passing a directory through",
        )?;
        refuse(
            inside,
            "--virtual-mountpoint",
            "an image below the mount's root",
        )?;
        refuse(self.dedup_db.is_some(), "--dedup-db", "the chunk database")?;
        refuse(self.writable, "--writable", "a writable mount")
    }
}

fn refuse(given: bool, option: &str, feature: &str) -> anyhow::Result<()> {
    anyhow::ensure!(
        !given,
        "{option}: {feature} is not supported yet; leave the option out"
    );
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(line: &str) -> Result<(Global, Task), String> {
        Cli::try_parse_from(line.split_whitespace())
            .map_err(|err| err.to_string())?
            .task()
            .map_err(|err| err.to_string())
    }

    #[test]
    fn definition_is_consistent() {
        Cli::command().debug_assert();
    }

    /// Lines that clients really produce.
    #[test]
    fn lines_of_known_clients() {
        for line in [
            "nydusd --config c.json --mountpoint /m --bootstrap b --apisock a --log-level warn",
            "nydusd fuse --thread-num 4 --id i --config c --bootstrap b --mountpoint /m --apisock a \
             --log-level info --log-rotation-size 100 --supervisor s --log-file f \
             --failover-policy resend",
            "nydusd --mountpoint /m --apisock s --log-level error --thread-num 10 --writable",
            "nydusd -l trace fuse -M /m -B b -D d",
        ] {
            let (_, task) = parse(line).unwrap();
            assert!(matches!(task, Task::Fuse(_)), "{line}");
        }
        let (global, Task::Mount(mount)) =
            parse("nydusd mount h/r:t /m --plain-http --log-level debug").unwrap()
        else {
            panic!("not a mount");
        };
        assert_eq!(global.log_level, LogLevel::Debug);
        assert!(mount.plain_http);
        assert_eq!(
            mount.cache_dir,
            std::path::Path::new("/var/lib/nydus/cache")
        );
    }

    #[test]
    fn usage_errors() {
        for (line, wanted) in [
            ("nydusd", "--mountpoint"),
            ("nydusd fuse", "--mountpoint"),
            ("nydusd --mountpoint /m --id x", "--supervisor"),
            (
                "nydusd --mountpoint /m fuse --mountpoint /m",
                "must follow the subcommand",
            ),
            ("nydusd --mountpoint /m -D d -C c", "cannot be used with"),
            (
                "nydusd fuse --mountpoint /m -D d -C c",
                "cannot be used with",
            ),
            ("nydusd --mountpoint /m -B b -s d", "cannot be used with"),
            ("nydusd --mountpoint /m --fuse-threads 0", "1..=1024"),
            ("nydusd --mountpoint /m --prefetch-files f", "--bootstrap"),
            ("nydusd mount image", "MOUNTPOINT"),
            (
                "nydusd singleton --fscache d",
                "`singleton` is not supported",
            ),
        ] {
            let message = parse(line).expect_err(line);
            assert!(message.contains(wanted), "{line}: {message}");
        }
    }

    #[test]
    fn options_of_missing_features_name_the_feature() {
        for (line, wanted) in [
            ("nydusd -M /m --upgrade", "--supervisor"),
            ("nydusd -M /m --upgrade --id i --supervisor s", "--apisock"),
            ("nydusd -M /m --writable", "writable"),
            ("nydusd -M /m --dedup-db d", "chunk database"),
            (
                "nydusd -M /m --virtual-mountpoint /x",
                "below the mount's root",
            ),
        ] {
            let (global, Task::Fuse(options)) = parse(line).unwrap() else {
                panic!("{line}")
            };
            let err = global
                .check()
                .and_then(|()| options.check())
                .unwrap_err()
                .to_string();
            assert!(err.contains(wanted), "{line}: {err}");
        }
    }

    #[test]
    fn version_has_what_clients_look_for() {
        let text = Cli::command().render_version();
        assert!(text.contains("Version: \tv"), "{text}");
        assert!(
            text.lines().any(|line| line.starts_with("Git Commit: \t")),
            "{text}"
        );
    }
}
