//! The state of a daemon as bytes: what goes to a supervisor, and comes back from one.
//!
//! It is JSON: what it is and of which version, the program that wrote it, and the
//! names and notes of the deposits in it, with the number of descriptors of each. The
//! descriptors travel beside it, in the order of the list. A reader ignores fields that
//! it does not know, and refuses other versions and deposits that it does not know;
//! notes have versions of their own.

use std::collections::BTreeSet;
use std::os::fd::OwnedFd;

use anyhow::{Context as _, bail, ensure};
use serde::{Deserialize, Serialize};

use crate::keeper::{Deposit, Deposits};

/// What the text says it is.
const FORMAT: &str = "nydusd-state";
/// Version of the text. Raised when an older reader would misunderstand.
const VERSION: u32 = 1;
/// Longest text, in bytes: the notes of 255 images are far from it.
pub(super) const MAX_LEN: usize = 4 << 20;
/// Most descriptors of one state.
pub(super) const MAX_FILES: usize = 1 << 16;

/// What every version begins with.
#[derive(Debug, Deserialize)]
struct Head {
    format: String,
    version: u32,
    #[serde(default)]
    program: String,
}

/// The text of this version.
#[derive(Debug, Serialize, Deserialize)]
struct Text {
    format: String,
    version: u32,
    program: String,
    deposits: Vec<Entry>,
}

/// A deposit without its descriptors.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Entry {
    name: String,
    note: String,
    files: usize,
}

/// A state whose descriptors are still to come.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct State {
    /// The program that wrote it.
    pub program: String,
    /// How many descriptors belong to it.
    pub files: usize,
    deposits: Vec<Entry>,
}

/// The text for `deposits`.
///
/// # Errors
/// When it would be longer than a reader takes.
pub(super) fn encode(deposits: &Deposits) -> anyhow::Result<Vec<u8>> {
    let entries = deposits.iter().map(|(name, deposit)| Entry {
        name: name.clone(),
        note: deposit.note.clone(),
        files: deposit.files.len(),
    });
    let text = Text {
        format: FORMAT.to_owned(),
        version: VERSION,
        program: format!(
            "nydusd {} ({})",
            env!("CARGO_PKG_VERSION"),
            env!("NYDUS_BUILD_COMMIT")
        ),
        deposits: entries.collect(),
    };
    let bytes = serde_json::to_vec(&text)?;
    ensure!(
        bytes.len() <= MAX_LEN,
        "the state has {} bytes, {MAX_LEN} are the limit",
        bytes.len()
    );
    Ok(bytes)
}

/// Understands a text.
///
/// # Errors
/// When it is none, of another version, or contradicts itself. The message names what
/// was found.
pub(super) fn decode(bytes: &[u8]) -> anyhow::Result<State> {
    ensure!(!bytes.is_empty(), "the supervisor has no state: 0 bytes");
    ensure!(
        bytes.len() <= MAX_LEN,
        "more than {MAX_LEN} bytes are no state"
    );
    if bytes.first() != Some(&b'{') {
        bail!(
            "{} bytes that begin with {} are no state of this program; that of Nydus v2, \
             which is binary, cannot be taken over: unmount and mount again",
            bytes.len(),
            shown(bytes)
        );
    }
    let head: Head = serde_json::from_slice(bytes).context("the state is damaged")?;
    ensure!(
        head.format == FORMAT,
        "the state says that it is `{}`",
        head.format
    );
    ensure!(
        head.version == VERSION,
        "the state has version {}, written by {}; this program knows {VERSION}",
        head.version,
        head.program
    );
    let text: Text = serde_json::from_slice(bytes).context("the state is damaged")?;
    let mut names = BTreeSet::new();
    let mut files = 0_usize;
    for entry in &text.deposits {
        ensure!(
            names.insert(&entry.name),
            "the state has `{}` twice",
            entry.name
        );
        files = files.saturating_add(entry.files);
    }
    ensure!(files <= MAX_FILES, "a state with {files} descriptors");
    Ok(State {
        program: text.program,
        files,
        deposits: text.deposits,
    })
}

impl State {
    /// The deposits, with their descriptors.
    ///
    /// # Errors
    /// When there are too few or too many of them.
    pub(super) fn assemble(self, files: Vec<OwnedFd>) -> anyhow::Result<Deposits> {
        ensure!(
            files.len() == self.files,
            "{} descriptors came with a state of {}",
            files.len(),
            self.files
        );
        let mut files = files.into_iter();
        let deposits = self.deposits.into_iter().map(|entry| {
            let deposit = Deposit {
                note: entry.note,
                files: files.by_ref().take(entry.files).collect(),
            };
            (entry.name, deposit)
        });
        Ok(deposits.collect())
    }
}

/// The first bytes, for a message.
fn shown(bytes: &[u8]) -> String {
    let first = bytes.iter().take(8);
    let hex: Vec<String> = first.map(|byte| format!("{byte:02x}")).collect();
    hex.join(" ")
}

#[cfg(test)]
mod tests {
    use std::fs::File;

    use proptest::prelude::*;

    use super::*;

    fn null() -> OwnedFd {
        File::open("/dev/null").unwrap().into()
    }

    fn some() -> Deposits {
        let deposit = |note: &str, files: usize| Deposit {
            note: note.to_owned(),
            files: (0..files).map(|_| null()).collect(),
        };
        Deposits::from([
            ("mount-1".to_owned(), deposit("{\"a\":\"\u{e9}\"}", 1)),
            ("images".to_owned(), deposit("", 2)),
            ("none".to_owned(), deposit("x", 0)),
        ])
    }

    #[test]
    fn what_was_written_is_read_again() {
        let bytes = encode(&some()).unwrap();
        let state = decode(&bytes).unwrap();
        assert!(state.program.starts_with("nydusd "), "{}", state.program);
        assert_eq!(state.files, 3);
        let back = state.assemble(vec![null(), null(), null()]).unwrap();
        let sketch = |deposits: &Deposits| {
            let all = deposits.iter();
            all.map(|(name, deposit)| (name.clone(), deposit.note.clone(), deposit.files.len()))
                .collect::<Vec<_>>()
        };
        assert_eq!(sketch(&back), sketch(&some()));
        assert!(decode(&bytes).unwrap().assemble(vec![null()]).is_err());
    }

    #[test]
    fn refusals_name_what_was_found() {
        let good = String::from_utf8(encode(&some()).unwrap()).unwrap();
        let newer = good.replace("\"version\":1", "\"version\":7");
        let other = good.replace(FORMAT, "something");
        let twice = good.replace("\"none\"", "\"images\"");
        let many = good.replace("\"files\":2", "\"files\":99999999");
        for (bytes, words) in [
            (&b""[..], "0 bytes"),
            (
                b"\x00\x00\x64\x86\x84\x19\x10\x07more",
                "00 00 64 86 84 19 10 07",
            ),
            (b"{}", "damaged"),
            (newer.as_bytes(), "version 7"),
            (other.as_bytes(), "`something`"),
            (twice.as_bytes(), "`images` twice"),
            (many.as_bytes(), "descriptors"),
        ] {
            let error = format!("{:#}", decode(bytes).unwrap_err());
            assert!(error.contains(words), "{error}");
        }
        // A newer program of the same version may say more.
        let more = good.replacen('{', "{\"more\":[1],", 1);
        assert_eq!(decode(more.as_bytes()).unwrap().files, 3);
    }

    #[test]
    fn a_part_of_a_state_is_none() {
        let bytes = encode(&some()).unwrap();
        for len in 0..bytes.len() {
            assert!(decode(&bytes[..len]).is_err(), "{len} bytes");
        }
    }

    proptest! {
        #[test]
        fn any_state_survives(
            entries in prop::collection::btree_map(".{0,20}", (".{0,200}", 0_usize..5), 0..20)
        ) {
            let deposits = entries.iter().map(|(name, (note, files))| {
                let files = (0..*files).map(|_| null()).collect();
                (name.clone(), Deposit { note: note.clone(), files })
            });
            let deposits: Deposits = deposits.collect();
            let state = decode(&encode(&deposits).unwrap()).unwrap();
            prop_assert_eq!(state.files, entries.values().map(|(_, files)| files).sum::<usize>());
            let files = (0..state.files).map(|_| null()).collect();
            let back = state.assemble(files).unwrap();
            prop_assert_eq!(back.len(), entries.len());
            for (name, (note, files)) in entries {
                prop_assert_eq!(&back[&name].note, &note);
                prop_assert_eq!(back[&name].files.len(), files);
            }
        }

        #[test]
        fn any_bytes_are_judged(
            mut bytes in prop::collection::vec(any::<u8>(), 0..300),
            like_json: bool
        ) {
            if like_json && let Some(first) = bytes.first_mut() {
                *first = b'{';
            }
            // That random bytes make a state is as good as impossible.
            prop_assert!(decode(&bytes).is_err());
        }

        #[test]
        fn a_changed_byte_does_no_harm(at: prop::sample::Index, to: u8) {
            let mut bytes = encode(&some()).unwrap();
            let at = at.index(bytes.len());
            bytes[at] = to;
            if let Ok(state) = decode(&bytes) {
                prop_assert!(state.files <= MAX_FILES);
                let files = (0..state.files.min(9)).map(|_| null()).collect();
                let _ = state.assemble(files);
            }
        }
    }
}
