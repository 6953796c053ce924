//! Ctrl-C for commands that wait for the network: they stop, and clean up.

use std::time::Duration;

use anyhow::Context as _;

/// How long threads may take to notice that the command was interrupted.
pub(crate) const FAREWELL: Duration = Duration::from_secs(2);

/// Becomes ready at the first SIGINT or SIGTERM. The second one ends the process at once.
pub(crate) fn first() -> anyhow::Result<impl Future<Output = ()>> {
    let (sender, receiver) = tokio::sync::oneshot::channel();
    let mut signals = signal_hook::iterator::Signals::new([
        signal_hook::consts::SIGINT,
        signal_hook::consts::SIGTERM,
    ])
    .context("cannot watch for signals")?;
    std::thread::Builder::new()
        .name("signals".to_owned())
        .spawn(move || {
            let mut sender = Some(sender);
            for signal in signals.forever() {
                match sender.take() {
                    Some(sender) => drop(sender.send(())),
                    None => drop(signal_hook::low_level::emulate_default_handler(signal)),
                }
            }
        })
        .context("cannot start a thread")?;
    Ok(async move {
        if receiver.await.is_err() {
            // The thread is gone, which is no signal.
            std::future::pending::<()>().await;
        }
    })
}
