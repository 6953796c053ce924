//! What a user sees while layers are converted: bars on a terminal, lines elsewhere.
//!
//! Both go to standard error; standard output gets only the final line.

use std::io::{IsTerminal as _, Read, Write as _};
use std::sync::Arc;
use std::time::Duration;

use indicatif::{HumanBytes, MultiProgress, ProgressBar, ProgressDrawTarget, ProgressStyle};
use storage::oci::{ContentDigest, Progress as OnSent};

/// Characters of a digest that are shown.
const SHOWN: usize = 12;

/// Progress of a whole conversion.
#[derive(Debug)]
pub(super) struct Progress {
    bars: MultiProgress,
    interactive: bool,
}

/// Progress of one layer.
#[derive(Debug, Clone)]
pub(super) struct LayerProgress {
    bar: ProgressBar,
    name: String,
    interactive: bool,
}

impl Progress {
    /// Bars if standard error is a terminal.
    pub(super) fn new() -> Self {
        let interactive = std::io::stderr().is_terminal();
        let target = if interactive {
            ProgressDrawTarget::stderr()
        } else {
            ProgressDrawTarget::hidden()
        };
        Self {
            bars: MultiProgress::with_draw_target(target),
            interactive,
        }
    }

    /// Announces layer `number` of `total`, of `size` bytes.
    pub(super) fn layer(
        &self,
        (number, total): (usize, usize),
        digest: &ContentDigest,
        size: u64,
    ) -> LayerProgress {
        let short = digest.hex().get(..SHOWN).unwrap_or_default();
        let name = format!("layer {number}/{total} {short}");
        let bar = self.bars.add(ProgressBar::new(size));
        let template = "{prefix} [{bar:30}] {bytes:>11} of {total_bytes:11} {msg}";
        // The template is a constant; should it ever be wrong, the default style serves.
        let style = ProgressStyle::with_template(template)
            .unwrap_or_else(|_err| ProgressStyle::default_bar());
        bar.set_style(style.progress_chars("=> "));
        bar.set_prefix(name.clone());
        LayerProgress {
            bar,
            name,
            interactive: self.interactive,
        }
    }

    /// Removes the bars, so that what follows has lines of its own.
    pub(super) fn clear(&self) {
        // A terminal that cannot be written to is no reason to fail.
        let _ = self.bars.clear();
    }
}

impl LayerProgress {
    /// The layer is being fetched from now on, through the reader that is returned.
    pub(super) fn fetching<R: Read>(&self, reader: R) -> impl Read + use<R> {
        self.bar.set_position(0);
        self.say("converting");
        self.bar.enable_steady_tick(Duration::from_millis(200));
        self.bar.wrap_read(reader)
    }

    /// A blob of `size` bytes is being sent from now on.
    pub(super) fn sending(&self, size: u64) -> OnSent {
        self.bar.set_length(size);
        self.bar.set_position(0);
        self.bar.set_message("sending");
        let bar = self.bar.clone();
        Arc::new(move |position| bar.set_position(position))
    }

    /// The layer is complete: a blob of `size` bytes, which was sent or was there already.
    pub(super) fn done(&self, size: u64, sent: bool) {
        let what = if sent { "sent" } else { "already there" };
        self.bar.set_length(size);
        self.bar.set_position(size);
        self.bar.finish_with_message(what);
        if !self.interactive {
            line(&format!("{}: {}, {what}", self.name, HumanBytes(size)));
        }
    }

    /// Says something about the layer that should not be overlooked.
    pub(super) fn warn(&self, what: &str) {
        // Bars would overwrite a line of somebody else.
        self.bar.suspend(|| tracing::warn!("{}: {what}", self.name));
    }

    fn say(&self, what: &'static str) {
        self.bar.set_message(what);
        if !self.interactive {
            let size = HumanBytes(self.bar.length().unwrap_or_default());
            line(&format!("{}: {what} {size}", self.name));
        }
    }
}

/// A line on standard error. A closed standard error is no reason to fail.
fn line(text: &str) {
    let _ = writeln!(std::io::stderr(), "{text}");
}
