//! What is special about a mirror that is a node of a Dragonfly network.
//!
//! Its agent, `dfdaemon`, moves pieces of at least [`PIECE`] bytes between nodes. By
//! default it fetches a small range straight from the registry and tells nobody, so
//! requests say in headers that they want to be scheduled. Its errors say in a header
//! whose they are, and only that can be relied upon: one of them has status 200.

use std::ops::Range;

use reqwest::header::{HeaderMap, HeaderName, HeaderValue};
use reqwest::{Response, StatusCode};
use url::Url;

use super::answer::public_name;
use super::retry::Failure;
use crate::backend::{BackendError, Priority};
use crate::blob_id::BlobId;

/// Least length of the pieces that Dragonfly moves, in bytes; they begin at multiples of
/// their length.
pub const PIECE: u64 = 4 << 20;

const ERROR_TYPE: &str = "x-dragonfly-error-type";

/// Which ranges are fetched by way of other nodes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum Scheduling {
    /// All: what one node fetched serves the next.
    #[default]
    Always,
    /// Dragonfly decides: nothing of at most one piece.
    Auto,
}

/// When the agent is to fetch the whole blob in the background.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum WholeBlob {
    /// If most of it is to be prefetched.
    #[default]
    Profile,
    /// With the first request for each blob.
    FirstRead,
    /// Never.
    Never,
}

/// What a task of Dragonfly is: agents find each other by tasks, and a task that one of
/// them has begun is not waited for by others for what lies elsewhere in it. So nodes
/// that start at the same time share what they fetch only if each piece is a task of its
/// own. An agent reserves disk space for the whole blob with each of its tasks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tasks {
    /// One for each window of a blob: as few pieces as fit.
    Windows {
        /// Most disk space that an agent may reserve for a blob, in bytes.
        disk: u64,
    },
    /// One for each blob, by its digest, as other clients have it.
    Blobs,
}

impl Default for Tasks {
    fn default() -> Self {
        Self::Windows { disk: TASK_DISK }
    }
}

/// What [`Tasks::Windows`] has if nothing else is set: one piece for each window of blobs
/// of up to 88 MiB.
pub const TASK_DISK: u64 = 2 << 30;

impl Tasks {
    /// The part of a blob around `at` that is a task of its own; `None` if the whole blob
    /// is one. The same for everybody who has the same settings.
    ///
    /// * `len`: of the blob.
    #[must_use]
    pub fn window(self, len: Option<u64>, at: u64) -> Option<Range<u64>> {
        let (Self::Windows { disk }, Some(len)) = (self, len) else {
            return None;
        };
        let pieces = len.div_ceil(PIECE).max(1);
        let windows = (disk / len.max(1)).min(pieces);
        if windows <= 1 {
            return None;
        }
        let size = pieces.div_ceil(windows).saturating_mul(PIECE);
        let start = at / size * size;
        Some(start..start.saturating_add(size))
    }

    /// What the identity of such a task is made of.
    #[must_use]
    pub fn content(blob: &BlobId, window: &Range<u64>) -> String {
        format!("nydus {blob} {}-{}", window.start, window.end)
    }
}

/// What requests to a Dragonfly agent say.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Dragonfly {
    /// Which ranges are fetched by way of other nodes.
    pub scheduling: Scheduling,
    /// When to fetch whole blobs.
    pub whole_blob: WholeBlob,
    /// What a task is.
    pub tasks: Tasks,
    /// It is a seed peer of several, perhaps: each blob has the one it is asked of first.
    pub seed: bool,
    /// Dragonfly's priority, 0 to 6, of what readers wait for.
    pub priority_on_demand: u8,
    /// The same for everything else.
    pub priority_prefetch: u8,
    /// Names in Dragonfly's metrics and rules; empty for none.
    pub tag: String,
    /// The same.
    pub application: String,
}

impl Default for Dragonfly {
    fn default() -> Self {
        Self {
            scheduling: Scheduling::default(),
            whole_blob: WholeBlob::default(),
            tasks: Tasks::default(),
            seed: false,
            priority_on_demand: 6,
            priority_prefetch: 6,
            tag: String::new(),
            application: String::new(),
        }
    }
}

impl Dragonfly {
    /// Headers that go with every request.
    ///
    /// # Errors
    /// [`BackendError::Config`] for a tag or application that cannot be sent.
    pub(super) fn fixed_headers(&self) -> Result<HeaderMap, BackendError> {
        let mut headers = HeaderMap::new();
        headers.insert(name("use-p2p"), HeaderValue::from_static("true"));
        if self.scheduling == Scheduling::Always {
            let value = HeaderValue::from_static("always");
            headers.insert(name("scheduling-policy"), value);
        }
        for (key, text) in [("tag", &self.tag), ("application", &self.application)] {
            if !text.is_empty() {
                let value = HeaderValue::from_str(text).map_err(|_not_text| {
                    BackendError::Config(format!("{key} {text:?} cannot be sent in a header"))
                })?;
                headers.insert(name(key), value);
            }
        }
        Ok(headers)
    }

    /// Headers that say what is wanted, and why.
    ///
    /// * `whole`: whether to fetch the rest of the blob in the background.
    /// * `window`: the part of the blob that is a task of its own.
    pub(super) fn headers(
        &self,
        blob: &BlobId,
        priority: Priority,
        whole: bool,
        window: Option<&Range<u64>>,
    ) -> HeaderMap {
        let number = match priority {
            Priority::OnDemand => self.priority_on_demand,
            Priority::Speculation | Priority::Prefetch => self.priority_prefetch,
        };
        // Always said: the agent's own default may be either.
        let prefetch = if whole { "true" } else { "false" };
        let mut headers = HeaderMap::from_iter([
            (name("priority"), HeaderValue::from(u16::from(number))),
            (name("prefetch"), HeaderValue::from_static(prefetch)),
        ]);
        let task = window.map(|window| Tasks::content(blob, window));
        if let Some(Ok(value)) = task.map(|task| HeaderValue::from_str(&task)) {
            headers.insert(name("content-for-calculating-task-id"), value);
        }
        headers
    }
}

fn name(suffix: &'static str) -> HeaderName {
    match suffix {
        "use-p2p" => HeaderName::from_static("x-dragonfly-use-p2p"),
        "scheduling-policy" => HeaderName::from_static("x-dragonfly-scheduling-policy"),
        "tag" => HeaderName::from_static("x-dragonfly-tag"),
        "application" => HeaderName::from_static("x-dragonfly-application"),
        "content-for-calculating-task-id" => {
            HeaderName::from_static("x-dragonfly-content-for-calculating-task-id")
        }
        "priority" => HeaderName::from_static("x-dragonfly-priority"),
        _ => HeaderName::from_static("x-dragonfly-prefetch"),
    }
}

/// Whose error an answer of the agent is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum AgentFault {
    /// More requests than the agent takes.
    #[error("too many requests for Dragonfly's agent")]
    Throttled,
    /// The operator forbids this blob.
    #[error("forbidden by Dragonfly's block list")]
    Forbidden,
    /// The agent does not take requests like ours.
    #[error("refused by Dragonfly's agent")]
    Refused,
    /// Its disk is full.
    #[error("Dragonfly's agent has no disk space")]
    NoSpace,
    /// It takes longer than anybody can wait.
    #[error("Dragonfly's agent takes too long")]
    Slow,
    /// Something else went wrong in the agent.
    #[error("failure of Dragonfly's agent")]
    Agent,
    /// The registry behind it failed.
    #[error("failure of the registry, seen by Dragonfly's agent")]
    Registry,
}

/// The error that an answer is, whatever its status says.
pub(super) fn fault(answer: &Response) -> Option<AgentFault> {
    let kind = answer.headers().get(ERROR_TYPE)?;
    Some(match (kind.as_bytes(), answer.status()) {
        (b"proxy", StatusCode::TOO_MANY_REQUESTS) => AgentFault::Throttled,
        (b"proxy", StatusCode::FORBIDDEN) => AgentFault::Forbidden,
        (b"proxy", _) => AgentFault::Refused,
        (b"backend", _) => AgentFault::Registry,
        (_, StatusCode::INSUFFICIENT_STORAGE) => AgentFault::NoSpace,
        _ => AgentFault::Agent,
    })
}

/// The failure of an attempt that took too long.
pub(super) fn too_slow(url: &Url) -> Failure {
    Failure::later(BackendError::Agent {
        url: public_name(url),
        status: StatusCode::GATEWAY_TIMEOUT.as_u16(),
        fault: AgentFault::Slow,
    })
}

/// The same as a failed attempt.
pub(super) fn failure(url: &Url, answer: &Response, fault: AgentFault) -> Failure {
    Failure::later(BackendError::Agent {
        url: public_name(url),
        status: answer.status().as_u16(),
        fault,
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn windows_are_pieces_as_long_as_there_is_room() {
        let tasks = Tasks::default();
        assert_eq!(
            tasks.window(Some(64 << 20), 5 << 20),
            Some(PIECE..2 * PIECE)
        );
        assert_eq!(tasks.window(Some(200 << 20), 0), Some(0..5 * PIECE));
        assert_eq!(tasks.window(Some(2 << 30), 0), None);
        assert_eq!(tasks.window(None, 0), None);
        assert_eq!(tasks.window(Some(0), 0), None);
        assert_eq!(Tasks::Blobs.window(Some(64 << 20), 0), None);
    }

    proptest! {
        #[test]
        fn windows_hold_what_is_asked_for_and_take_no_more_room(
            len in 1..1_u64 << 40, disk in 0..1_u64 << 40, at in 0..1_u64 << 40,
        ) {
            let at = at % len;
            if let Some(window) = (Tasks::Windows { disk }).window(Some(len), at) {
                prop_assert!(window.contains(&at));
                prop_assert_eq!(window.start % PIECE, 0);
                let windows = len.div_ceil(window.end - window.start);
                prop_assert!(windows * len <= disk);
            }
        }
    }
}
