//! The connections of hosts, for an operator to look at. Plain atomics, which a connection updates
//! once a batch; nothing waits.

use std::cell::Cell;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::OnceLock;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering;

use parking_lot::Mutex;
use tokio::time::Instant;
use weft_api::FrontEnd;

/// The next connection's number, over all targets of the process.
static NEXT_ID: AtomicU64 = AtomicU64::new(1);

/// The open connections of a target.
#[derive(Debug, Default)]
pub struct Connections {
    /// Guards the table for one look or change.
    open: Mutex<BTreeMap<u64, Arc<Counts>>>,
}

thread_local! {
    static REQUESTS_OF_THREAD: Cell<u64> = const { Cell::new(0) };
}

/// Requests that this thread's connections have reported, ended ones included.
#[must_use]
pub fn requests_of_thread() -> u64 {
    REQUESTS_OF_THREAD.get()
}

/// An open connection; it leaves the table when this is dropped.
#[derive(Debug)]
pub struct Tracked<'a> {
    table: &'a Connections,
    id: u64,
    counts: Arc<Counts>,
}

/// What is known of a connection.
#[derive(Debug)]
pub struct Counts {
    front_end: FrontEnd,
    peer: String,
    since: Instant,
    identity: OnceLock<Identity>,
    tls: AtomicBool,
    in_flight: AtomicU64,
    requests: AtomicU64,
    errors: AtomicU64,
    bytes_read: AtomicU64,
    bytes_written: AtomicU64,
}

/// Who is at the other end, and what it uses.
#[derive(Debug, Default)]
pub struct Identity {
    /// The NVMe host's name.
    pub host: Option<String>,
    /// The export.
    pub volume: Option<String>,
    /// The NVMe controller.
    pub controller: Option<u16>,
    /// The queue of it.
    pub queue: Option<u16>,
}

/// What a connection counted since it last reported.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tally {
    /// Requests received, refused ones included.
    pub requests: u64,
    /// Requests answered with an error.
    pub errors: u64,
    /// Bytes returned by reads.
    pub bytes_read: u64,
    /// Bytes of completed writes.
    pub bytes_written: u64,
}

impl Connections {
    /// Takes a connection from `peer` into the table.
    #[must_use]
    pub fn track(&self, front_end: FrontEnd, peer: String) -> Tracked<'_> {
        let id = NEXT_ID.fetch_add(1, Ordering::Relaxed);
        let counts = Arc::new(Counts {
            front_end,
            peer,
            since: Instant::now(),
            identity: OnceLock::new(),
            tls: AtomicBool::new(false),
            in_flight: AtomicU64::new(0),
            requests: AtomicU64::new(0),
            errors: AtomicU64::new(0),
            bytes_read: AtomicU64::new(0),
            bytes_written: AtomicU64::new(0),
        });
        self.open.lock().insert(id, Arc::clone(&counts));
        Tracked { table: self, id, counts }
    }

    /// All of them, in order of number.
    #[must_use]
    pub fn list(&self) -> Vec<weft_api::Connection> {
        let open = self.open.lock();
        open.iter().map(|(id, counts)| counts.show(*id)).collect()
    }
}

impl Tracked<'_> {
    /// Says who it is; the first word counts.
    pub fn identify(&self, identity: Identity) {
        let _ = self.counts.identity.set(identity);
    }

    /// The other end, for people.
    #[must_use]
    pub fn peer(&self) -> &str {
        &self.counts.peer
    }

    /// Says that it is encrypted.
    pub fn encrypted(&self) {
        self.counts.tls.store(true, Ordering::Relaxed);
    }

    /// What is counted of it.
    #[must_use]
    pub fn counts(&self) -> &Arc<Counts> {
        &self.counts
    }
}

impl Drop for Tracked<'_> {
    fn drop(&mut self) {
        self.table.open.lock().remove(&self.id);
    }
}

impl Counts {
    /// Adds what was counted; `in_flight` is how many requests wait for an answer now.
    pub fn report(&self, tally: Tally, in_flight: usize) {
        let add = |counter: &AtomicU64, more: u64| {
            if more > 0 {
                counter.fetch_add(more, Ordering::Relaxed);
            }
        };
        self.in_flight.store(in_flight as u64, Ordering::Relaxed);
        REQUESTS_OF_THREAD.set(requests_of_thread() + tally.requests);
        add(&self.requests, tally.requests);
        add(&self.errors, tally.errors);
        add(&self.bytes_read, tally.bytes_read);
        add(&self.bytes_written, tally.bytes_written);
    }

    fn show(&self, id: u64) -> weft_api::Connection {
        let unknown = Identity::default();
        let identity = self.identity.get().unwrap_or(&unknown);
        weft_api::Connection {
            id,
            front_end: self.front_end,
            peer: self.peer.clone(),
            tls: self.tls.load(Ordering::Relaxed),
            host: identity.host.clone(),
            volume: identity.volume.clone(),
            controller: identity.controller,
            queue: identity.queue,
            open_s: self.since.elapsed().as_secs(),
            in_flight: self.in_flight.load(Ordering::Relaxed),
            requests: self.requests.load(Ordering::Relaxed),
            errors: self.errors.load(Ordering::Relaxed),
            bytes_read: self.bytes_read.load(Ordering::Relaxed),
            bytes_written: self.bytes_written.load(Ordering::Relaxed),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_connection_is_listed_until_it_ends() {
        let table = Connections::default();
        let first = table.track(FrontEnd::Nbd, "unix".to_owned());
        let second = table.track(FrontEnd::NvmeTcp, "127.0.0.1:5".to_owned());
        first.identify(Identity { volume: Some("vol0".to_owned()), ..Identity::default() });
        let tally = Tally { requests: 3, errors: 1, bytes_read: 10, bytes_written: 20 };
        first.counts().report(tally, 2);
        first.encrypted();
        first.counts().report(tally, 1);
        let listed = table.list();
        assert_eq!(listed.len(), 2);
        assert_eq!(
            (listed[0].volume.as_deref(), listed[1].volume.as_deref()),
            (Some("vol0"), None)
        );
        assert_eq!((listed[0].requests, listed[0].errors, listed[0].in_flight), (6, 2, 1));
        assert_eq!((listed[0].tls, listed[1].tls), (true, false));
        assert_eq!((listed[0].bytes_read, listed[0].bytes_written), (20, 40));
        drop(first);
        assert_eq!(table.list().len(), 1);
        assert_eq!(table.list()[0].peer, "127.0.0.1:5");
        drop(second);
        assert_eq!(table.list(), []);
    }
}
