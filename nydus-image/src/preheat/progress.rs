//! What a user sees meanwhile: a bar on a terminal, a line for each blob elsewhere.
//!
//! Both go to standard error.

use std::io::{IsTerminal as _, Write as _};
use std::time::Duration;

use indicatif::{HumanBytes, ProgressBar, ProgressDrawTarget, ProgressStyle};

use super::plan::Target;
use super::seeds::Seed;

/// Characters of a digest that are shown.
const SHOWN: usize = 12;

/// Progress of a whole preheat.
#[derive(Debug)]
pub(super) struct Progress {
    bar: ProgressBar,
    interactive: bool,
}

impl Progress {
    /// * `total`: bytes that will be fetched; 0 if nobody knows.
    pub(super) fn new(total: u64) -> Self {
        let interactive = std::io::stderr().is_terminal();
        let bar = ProgressBar::new(total);
        bar.set_draw_target(match interactive {
            true => ProgressDrawTarget::stderr(),
            false => ProgressDrawTarget::hidden(),
        });
        let template = match total {
            0 => "preheating {spinner} {msg}",
            _ => "preheating [{bar:30}] {bytes:>11} of {total_bytes:11} {msg}",
        };
        // The template is a constant; should it ever be wrong, the default style serves.
        let style = ProgressStyle::with_template(template)
            .unwrap_or_else(|_err| ProgressStyle::default_bar());
        bar.set_style(style.progress_chars("=> "));
        bar.enable_steady_tick(Duration::from_millis(200));
        Self { bar, interactive }
    }

    pub(super) fn add(&self, bytes: u64) {
        self.bar.inc(bytes);
    }

    /// A seed holds what was wanted of a blob.
    pub(super) fn done(&self, target: &Target, seed: &Seed) {
        let short = target.digest.hex().get(..SHOWN).unwrap_or_default();
        let (bytes, size) = (HumanBytes(target.bytes()), HumanBytes(target.size));
        let part = match target.is_whole() {
            true => format!("all {size}"),
            false => format!("{bytes} of {size}"),
        };
        self.say(&format!("blob {short}: {part}, at {seed}"));
    }

    pub(super) fn say(&self, text: &str) {
        self.bar.set_message(text.to_owned());
        if !self.interactive {
            // A closed standard error is no reason to fail.
            let _ = writeln!(std::io::stderr(), "{text}");
        }
    }

    /// Removes the bar, so that what follows has lines of its own.
    pub(super) fn clear(&self) {
        self.bar.finish_and_clear();
    }
}
