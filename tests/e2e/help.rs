//! What the programs say about themselves, and what other programs read in it.

use std::process::Command;

use support::binaries::{nydus_image, nydusd};
use support::command::{Finished, run};

fn output(mut command: Command, arguments: &[&str]) -> Finished {
    run(command.args(arguments)).unwrap()
}

#[test]
fn every_command_explains_itself() {
    for arguments in [
        &["--help"][..],
        &["create", "--help"],
        &["merge", "--help"],
        &["check", "--help"],
        &["convert", "--help"],
        &["preheat", "--help"],
        &["inspect", "--help"],
        &["stat", "--help"],
        &["unpack", "--help"],
        &["export", "--help"],
    ] {
        let finished = output(nydus_image().unwrap(), arguments);
        assert_eq!(finished.code(), 0, "{arguments:?}");
        assert!(
            finished.stdout.contains("Usage: nydus-image"),
            "{}",
            finished.stdout
        );
        assert!(finished.stderr.is_empty(), "{}", finished.stderr);
    }
    for arguments in [
        &["--help"][..],
        &["fuse", "--help"],
        &["mount", "--help"],
        &["status", "--help"],
        &["umount", "--help"],
        &["config", "check", "--help"],
    ] {
        let finished = output(nydusd().unwrap(), arguments);
        assert_eq!(finished.code(), 0, "{arguments:?}");
        assert!(
            finished.stdout.contains("Usage: nydusd"),
            "{}",
            finished.stdout
        );
    }
}

/// Converters decide by these words which way of building they take.
#[test]
fn the_short_help_of_create_names_what_it_can_do() {
    let help = output(nydus_image().unwrap(), &["create", "-h"]).stdout;
    assert!(
        help.contains("--type") && help.contains("tar-rafs"),
        "{help}"
    );
}

#[test]
fn versions_can_be_parsed() {
    for command in [nydus_image().unwrap(), nydusd().unwrap()] {
        let finished = output(command, &["--version"]);
        assert!(
            finished.stdout.contains("Version: \tv"),
            "{:?}",
            finished.stdout
        );
        assert!(
            finished.stdout.contains("\nGit Commit: \t"),
            "{:?}",
            finished.stdout
        );
    }
}

#[test]
fn wrong_usage_has_its_own_exit_code() {
    for (command, arguments) in [
        (nydus_image().unwrap(), &["create"][..]),
        (nydus_image().unwrap(), &["create", "--no-such-option", "x"]),
        (nydus_image().unwrap(), &["convert", "only-one"]),
        (nydusd().unwrap(), &[]),
        (nydusd().unwrap(), &["mount", "only-one"]),
    ] {
        let finished = output(command, arguments);
        assert_eq!(finished.code(), 2, "{arguments:?}: {}", finished.stderr);
        assert!(
            finished.stderr.starts_with("error: "),
            "{}",
            finished.stderr
        );
    }
}
