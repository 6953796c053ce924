//! Refusals, in the shape that clients know.

use serde_json::json;

/// A call that was refused.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct ApiError {
    /// HTTP status.
    pub status: u16,
    /// What is wrong.
    pub message: String,
}

impl ApiError {
    fn new(status: u16, message: impl Into<String>) -> Self {
        Self {
            status,
            message: message.into(),
        }
    }

    /// The request itself, or its moment, is wrong.
    pub(super) fn bad(message: impl Into<String>) -> Self {
        Self::new(400, message)
    }

    pub(super) fn not_found(message: impl Into<String>) -> Self {
        Self::new(404, message)
    }

    /// There are no metrics of that name. Clients look for these words.
    pub(super) fn no_counter(call: &str) -> Self {
        Self::not_found(format!("{call}(Metrics(Stats(NoCounter)))"))
    }

    pub(super) fn failed(message: impl Into<String>) -> Self {
        Self::new(500, message)
    }

    /// It is too early.
    pub(super) fn not_ready(call: &str, words: &str) -> Self {
        Self::new(503, format!("{call}(NotReady({words:?}))"))
    }

    /// This kind of daemon cannot do that.
    pub(super) fn unsupported(call: &str) -> Self {
        Self::new(501, format!("{call}(DaemonAbnormal(Unsupported))"))
    }

    /// The body of the answer. The code never varies; clients do not read it.
    pub(super) fn body(&self) -> String {
        json!({ "code": "UNDEFINED", "message": self.message }).to_string()
    }
}
