//! A TCP relay that behaves like a slower, longer link.
//!
//! Not every kernel that our tests run on has `netem`, so the delay of a link has to
//! come from user space. Every connection is forwarded to one upstream address. All
//! connections share the bandwidth of the link, each direction on its own and in
//! turns of `PIECE` bytes; what has left arrives half a round trip later. The first
//! byte of a connection moves one round trip after it was opened, as the handshake of
//! TCP would cost.
//!
//! TCP's slow start is not imitated: the relay is kinder to short connections than a
//! real link of the same length.

use std::io::{Read as _, Write as _};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::sync_channel;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};

/// Bytes that are sent at once; small enough for the rate to look smooth.
const PIECE: usize = 16 << 10;

/// Pieces of one connection and direction that are under way: a window of 4 MiB.
const WINDOW: usize = 256;

/// Longest queue in front of the link: what a well-kept router allows. Connections
/// wait for their turn beyond it, so a short answer is not held up by a long one.
const QUEUE: Duration = Duration::from_millis(4);

/// What the link is like.
#[derive(Clone, Copy, Debug)]
pub struct Link {
    /// Bits per second in each direction; 0 for no limit.
    pub rate: u64,
    /// Time for a byte to go there and back.
    pub round_trip: Duration,
}

/// One direction of the link.
#[derive(Debug)]
struct Lane {
    link: Link,
    /// When everything that was let in has left.
    free_at: Mutex<Instant>,
    bytes: AtomicU64,
}

impl Lane {
    fn new(link: Link) -> Self {
        Self {
            link,
            free_at: Mutex::new(Instant::now()),
            bytes: AtomicU64::new(0),
        }
    }

    /// Waits for a turn and sends `len` bytes; returns when the last of them arrives.
    fn send(&self, len: usize) -> Instant {
        let len = u64::try_from(len).unwrap_or(u64::MAX);
        self.bytes.fetch_add(len, Ordering::Relaxed);
        let nanoseconds = len.saturating_mul(8_000_000_000);
        let busy = nanoseconds.checked_div(self.link.rate).unwrap_or(0);
        loop {
            let now = Instant::now();
            let wait = {
                let mut free_at = self.free_at.lock().unwrap_or_else(PoisonError::into_inner);
                let queue = free_at.saturating_duration_since(now);
                if queue <= QUEUE {
                    *free_at = (*free_at).max(now) + Duration::from_nanos(busy);
                    return *free_at + self.link.round_trip / 2;
                }
                queue - QUEUE
            };
            thread::sleep(wait);
        }
    }
}

/// A running relay; it takes no new connections once dropped.
#[derive(Debug)]
pub struct Relay {
    address: SocketAddr,
    up: Arc<Lane>,
    down: Arc<Lane>,
    connections: Arc<AtomicU64>,
    stop: Arc<AtomicBool>,
}

impl Relay {
    /// Listens on `listen` (port 0 picks one) and forwards to `upstream`.
    ///
    /// # Errors
    /// The address cannot be bound.
    pub fn start(listen: SocketAddr, upstream: SocketAddr, link: Link) -> Result<Self> {
        let listener =
            TcpListener::bind(listen).with_context(|| format!("cannot listen on {listen}"))?;
        let relay = Self {
            address: listener.local_addr()?,
            up: Arc::new(Lane::new(link)),
            down: Arc::new(Lane::new(link)),
            connections: Arc::default(),
            stop: Arc::default(),
        };
        let (up, down) = (Arc::clone(&relay.up), Arc::clone(&relay.down));
        let (connections, stop) = (Arc::clone(&relay.connections), Arc::clone(&relay.stop));
        thread::spawn(move || {
            for client in listener.incoming() {
                if stop.load(Ordering::Relaxed) {
                    return;
                }
                let Ok(client) = client else { continue };
                connections.fetch_add(1, Ordering::Relaxed);
                let (up, down) = (Arc::clone(&up), Arc::clone(&down));
                thread::spawn(move || serve(&client, upstream, link, &up, &down));
            }
        });
        Ok(relay)
    }

    /// Where the relay listens.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Bytes sent from the upstream to clients so far.
    #[must_use]
    pub fn received(&self) -> u64 {
        self.down.bytes.load(Ordering::Relaxed)
    }

    /// Bytes sent from clients to the upstream so far.
    #[must_use]
    pub fn sent(&self) -> u64 {
        self.up.bytes.load(Ordering::Relaxed)
    }

    /// Connections accepted so far.
    #[must_use]
    pub fn connections(&self) -> u64 {
        self.connections.load(Ordering::Relaxed)
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        // Wakes the loop; if nobody answers, it has ended already.
        let _ = TcpStream::connect_timeout(&self.address, Duration::from_secs(1));
    }
}

fn serve(client: &TcpStream, upstream: SocketAddr, link: Link, up: &Lane, down: &Lane) {
    let opened = Instant::now() + link.round_trip;
    // Without an upstream the client sees its connection close.
    let Ok(server) = TcpStream::connect(upstream) else {
        return;
    };
    let _ = client.set_nodelay(true);
    let _ = server.set_nodelay(true);
    thread::scope(|scope| {
        scope.spawn(|| pump(client, &server, up, opened));
        pump(&server, client, down, opened);
    });
}

/// Moves bytes one way until either side closes.
fn pump(mut from: &TcpStream, mut to: &TcpStream, lane: &Lane, not_before: Instant) {
    let (sender, receiver) = sync_channel::<(Instant, Vec<u8>)>(WINDOW);
    thread::scope(|scope| {
        scope.spawn(move || {
            for (due, piece) in receiver {
                thread::sleep(due.saturating_duration_since(Instant::now()));
                if to.write_all(&piece).is_err() {
                    break;
                }
            }
            // Who is gone needs not be told.
            let _ = to.shutdown(Shutdown::Write);
        });
        let mut piece = vec![0; PIECE];
        while let Ok(len @ 1..) = from.read(&mut piece) {
            let due = lane.send(len).max(not_before);
            let bytes = piece.get(..len).unwrap_or_default().to_vec();
            if sender.send((due, bytes)).is_err() {
                break;
            }
        }
        drop(sender);
    });
    let _ = from.shutdown(Shutdown::Read);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn echo() -> SocketAddr {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        thread::spawn(move || {
            let mut socket = listener.accept().unwrap().0;
            let mut copy = socket.try_clone().unwrap();
            std::io::copy(&mut socket, &mut copy).unwrap();
        });
        address
    }

    #[test]
    fn bytes_arrive_intact_and_no_sooner_than_the_link_allows() {
        let link = Link {
            rate: 80_000_000,
            round_trip: Duration::from_millis(20),
        };
        let relay = Relay::start("127.0.0.1:0".parse().unwrap(), echo(), link).unwrap();
        let mut socket = TcpStream::connect(relay.address()).unwrap();
        let sent: Vec<u8> = (0..250_000_u32).flat_map(u32::to_le_bytes).collect();
        let start = Instant::now();
        let mut got = Vec::new();
        thread::scope(|scope| {
            let mut writer = socket.try_clone().unwrap();
            let sent = &sent;
            scope.spawn(move || {
                writer.write_all(sent).unwrap();
                writer.shutdown(Shutdown::Write).unwrap();
            });
            socket.read_to_end(&mut got).unwrap();
        });
        assert!(got == sent, "{} bytes came back", got.len());
        // 100 ms for a megabyte, and half a round trip each way.
        assert!(start.elapsed() >= Duration::from_millis(115));
        assert_eq!(relay.received(), 1_000_000);
        assert_eq!(relay.connections(), 1);
    }
}
