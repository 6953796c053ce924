//! The latest warnings and errors, for the control API.

use std::collections::VecDeque;
use std::fmt::{self, Write as _};
use std::sync::{Arc, Mutex, PoisonError};

use serde_json::{Value, json};
use tracing::field::{Field, Visit};
use tracing::{Event, Level, Subscriber};
use tracing_subscriber::layer::{Context, Layer};

/// Messages that are kept.
const MAX_MESSAGES: usize = 500;
/// Bytes of messages that are kept.
const MAX_BYTES: usize = 51_200;

/// The ring of messages.
#[derive(Debug, Default)]
pub(super) struct Recent(Mutex<Ring>);

#[derive(Debug, Default)]
struct Ring {
    messages: VecDeque<String>,
    bytes: usize,
    total: u64,
    total_bytes: usize,
}

impl Recent {
    pub(super) fn layer(self: Arc<Self>) -> RecentLayer {
        RecentLayer(self)
    }

    fn add(&self, mut message: String) {
        let mut ring = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        ring.total += 1;
        ring.total_bytes = ring.total_bytes.saturating_add(message.len());
        let end = (0..=MAX_BYTES / 10)
            .rev()
            .find(|end| message.is_char_boundary(*end));
        if message.len() > MAX_BYTES / 10 {
            message.truncate(end.unwrap_or(0));
        }
        ring.bytes += message.len();
        ring.messages.push_back(message);
        while ring.messages.len() > MAX_MESSAGES || ring.bytes > MAX_BYTES {
            match ring.messages.pop_front() {
                Some(oldest) => ring.bytes -= oldest.len(),
                None => break,
            }
        }
    }

    pub(super) fn report(&self) -> Value {
        let ring = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        json!({
            "max_errors": MAX_MESSAGES,
            "total_errors": ring.total,
            "max_size": MAX_BYTES,
            "total_size": ring.total_bytes,
            "errors": ring.messages,
        })
    }
}

/// Puts warnings and errors into the ring.
pub(super) struct RecentLayer(Arc<Recent>);

impl<S: Subscriber> Layer<S> for RecentLayer {
    fn on_event(&self, event: &Event<'_>, _ctx: Context<'_, S>) {
        if *event.metadata().level() <= Level::WARN {
            let mut text = Text(format!("{} ", event.metadata().level()));
            event.record(&mut text);
            self.0.add(text.0);
        }
    }
}

struct Text(String);

impl Visit for Text {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        // Writing to a string cannot fail.
        let _ = match field.name() {
            "message" => write!(self.0, "{value:?}"),
            name => write!(self.0, " {name}={value:?}"),
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn old_messages_make_room() {
        let recent = Recent::default();
        for index in 0..1000 {
            recent.add(format!("message {index}"));
        }
        let report = recent.report();
        assert_eq!(report["total_errors"], 1000);
        let errors = report["errors"].as_array().unwrap();
        assert_eq!((errors.len(), &errors[0]), (500, &json!("message 500")));
        recent.add("é".repeat(100_000));
        let report = recent.report();
        let bytes: usize = report["errors"]
            .as_array()
            .unwrap()
            .iter()
            .map(|text| text.as_str().unwrap().len())
            .sum();
        assert!(bytes <= MAX_BYTES, "{bytes}");
    }
}
