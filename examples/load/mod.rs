//! What the load generators share: requests kept in flight on one or several connections, and
//! what is counted.
//!
//! Whenever replies arrive, as many new requests go out in one send. That costs a client far less
//! than one system call per request, so that the server is what is measured. The clock is read once
//! per receive: a reply's latency ends when the receive that brought it returns.

#![allow(dead_code, reason = "each generator uses its part")]

use std::io;
use std::io::Read;
use std::io::Write;
use std::net::SocketAddr;
use std::net::TcpStream;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;

use clap::Args;
use rustix::event::epoll;
use rustix::time::ClockId;
use rustix::time::Timespec;
use rustix::time::clock_gettime;

const RECEIVE_BYTES: usize = 1 << 20;
const FILL_BYTES: u32 = 1 << 20;
const WARM_UP_NS: u64 = 1_000_000_000;
/// Latencies are counted in steps of this many nanoseconds, up to `LATENCY_STEPS` of them.
const LATENCY_STEP_NS: u64 = 100;
const LATENCY_STEPS: usize = 200_000;

/// What is asked for.
#[derive(Args, Clone)]
pub struct LoadOptions {
    /// Requests in flight on each connection.
    #[arg(long, default_value_t = 32, value_parser = clap::value_parser!(u16).range(1..=1024))]
    pub depth: u16,
    /// Connections, served in turn by one thread.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=128))]
    pub connections: u16,
    /// Bytes of each request.
    #[arg(long, default_value = "4KiB", value_parser = weft::units::parse_size)]
    pub block: u64,
    /// Bytes to touch, from the start.
    #[arg(long, default_value = "256MiB", value_parser = weft::units::parse_size)]
    pub span: u64,
    /// How long, after one second of warming up.
    #[arg(long, default_value_t = 3)]
    pub seconds: u64,
    /// Poll the sockets instead of sleeping in them.
    #[arg(long)]
    pub poll: bool,
    /// Process whose CPU time is reported per request.
    #[arg(long)]
    pub server_pid: Option<u32>,
}

/// One request.
#[derive(Clone, Copy, Default)]
pub struct Request {
    /// Echoed by the reply; an index below the connection's depth.
    pub tag: u16,
    pub write: bool,
    pub offset: u64,
    pub bytes: u32,
}

/// What the head of a reply says.
pub enum Reply {
    /// The request is done; so many bytes of data follow.
    Done { tag: u16, data_bytes: usize },
    /// The protocol answered it itself; nothing follows.
    GoOn,
}

/// How requests and replies look.
pub trait Protocol {
    /// Bytes of every reply's head.
    const HEAD_BYTES: usize;

    /// Puts a request, with its data if it is a write.
    fn put(&mut self, out: &mut Vec<u8>, request: &Request);

    /// Understands a reply's head; `requests` are those in flight, by tag. What must be sent before
    /// the request can be done goes to `out`.
    fn reply(&mut self, head: &[u8], requests: &[Request], out: &mut Vec<u8>) -> io::Result<Reply>;
}

/// Puts the data of a write: one byte repeated, another for each place.
pub fn put_data(out: &mut Vec<u8>, request: &Request) {
    let [_, byte, ..] = (request.offset >> 4).to_le_bytes();
    out.resize(out.len() + request.bytes as usize, byte | 1);
}

/// A connected socket.
pub trait Stream: Read + Write + AsFd {
    fn set_nonblocking(&self) -> io::Result<()>;
}

impl Stream for UnixStream {
    fn set_nonblocking(&self) -> io::Result<()> {
        UnixStream::set_nonblocking(self, true)
    }
}

impl Stream for TcpStream {
    fn set_nonblocking(&self) -> io::Result<()> {
        TcpStream::set_nonblocking(self, true)
    }
}

/// Connects over TCP without delay.
pub fn connect_tcp(address: SocketAddr) -> io::Result<TcpStream> {
    let stream = TcpStream::connect(address)?;
    stream.set_nodelay(true)?;
    Ok(stream)
}

/// A connection that is ready for requests.
pub struct Connection<P> {
    stream: Box<dyn Stream>,
    protocol: P,
    requests: Vec<Request>,
    started_ns: Vec<u64>,
    free: Vec<u16>,
    out: Vec<u8>,
    /// Of the reply being received: its head so far, then the bytes of data still to come.
    head: Vec<u8>,
    data_missing: usize,
}

impl<P: Protocol> Connection<P> {
    pub fn new(stream: Box<dyn Stream>, protocol: P, depth: u16) -> Self {
        Self {
            stream,
            protocol,
            requests: vec![Request::default(); usize::from(depth)],
            started_ns: vec![0; usize::from(depth)],
            free: (0..depth).collect(),
            out: Vec::new(),
            head: Vec::with_capacity(P::HEAD_BYTES),
            data_missing: 0,
        }
    }

    fn idle(&self) -> bool {
        self.free.len() == self.requests.len()
    }

    /// Puts requests as long as `next` has any and the depth allows.
    fn refill(&mut self, now_ns: u64, mut next: impl FnMut() -> Option<Request>) {
        while let Some(tag) = self.free.pop() {
            let Some(request) = next() else {
                self.free.push(tag);
                return;
            };
            let request = Request { tag, ..request };
            self.protocol.put(&mut self.out, &request);
            self.requests[usize::from(tag)] = request;
            self.started_ns[usize::from(tag)] = now_ns;
        }
    }

    /// Sends everything, also on a socket that does not block.
    fn send(&mut self) -> io::Result<()> {
        let mut bytes = self.out.as_slice();
        while !bytes.is_empty() {
            match self.stream.write(bytes) {
                Ok(sent) => bytes = &bytes[sent..],
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Err(error),
            }
        }
        self.out.clear();
        Ok(())
    }

    /// Takes what arrived; `done` is told when each finished request had begun.
    fn take(&mut self, mut bytes: &[u8], mut done: impl FnMut(u64)) -> io::Result<()> {
        while !bytes.is_empty() {
            let skipped = self.data_missing.min(bytes.len());
            self.data_missing -= skipped;
            bytes = &bytes[skipped..];
            let wanted = (P::HEAD_BYTES - self.head.len()).min(bytes.len());
            self.head.extend_from_slice(&bytes[..wanted]);
            bytes = &bytes[wanted..];
            if self.head.len() < P::HEAD_BYTES {
                return Ok(());
            }
            let reply = self.protocol.reply(&self.head, &self.requests, &mut self.out)?;
            self.head.clear();
            if let Reply::Done { tag, data_bytes } = reply {
                let started = self.started_ns.get(usize::from(tag));
                done(*started.ok_or_else(|| io::Error::other("a reply to no request"))?);
                self.free.push(tag);
                self.data_missing = data_bytes;
            }
        }
        Ok(())
    }
}

/// What was counted.
struct Meter {
    done: u64,
    /// Latencies by step; the last holds all that took longer.
    latencies: Vec<u32>,
}

impl Meter {
    fn new() -> Self {
        Self { done: 0, latencies: vec![0; LATENCY_STEPS] }
    }

    fn count(&mut self, latency_ns: u64) {
        self.done += 1;
        let step = usize::try_from(latency_ns / LATENCY_STEP_NS).unwrap_or(usize::MAX);
        self.latencies[step.min(LATENCY_STEPS - 1)] += 1;
    }

    /// The latency that `share` of the requests did not exceed, in microseconds.
    fn quantile_us(&self, share: f64) -> f64 {
        let mut left = self.done as f64 * share;
        let step = self.latencies.iter().position(|count| {
            left -= f64::from(*count);
            left <= 0.0
        });
        let steps = step.unwrap_or(LATENCY_STEPS) as f64;
        steps * LATENCY_STEP_NS as f64 / 1000.0
    }
}

/// A generator.
pub struct Load<P> {
    connections: Vec<Connection<P>>,
    options: LoadOptions,
    meter: Meter,
    buffer: Vec<u8>,
    random: u64,
}

impl<P: Protocol> Load<P> {
    /// Takes connections that are ready for requests.
    pub fn new(connections: Vec<Connection<P>>, options: &LoadOptions) -> Self {
        Self {
            connections,
            options: options.clone(),
            meter: Meter::new(),
            buffer: vec![0; RECEIVE_BYTES],
            random: 0x9e37_79b9_7f4a_7c15,
        }
    }

    /// Writes the span once, in pieces of 1 MiB.
    pub fn fill(&mut self) -> io::Result<()> {
        let (mut offset, span) = (0, self.options.span);
        let mut next = || {
            let bytes = u32::try_from(span - offset).unwrap_or(u32::MAX).min(FILL_BYTES);
            let request = Request { tag: 0, write: true, offset, bytes };
            offset += u64::from(bytes);
            (bytes > 0).then_some(request)
        };
        let first = &mut self.connections[0];
        loop {
            first.refill(0, &mut next);
            first.send()?;
            if first.idle() {
                return Ok(());
            }
            let received = receive(first.stream.as_mut(), &mut self.buffer)?;
            first.take(&self.buffer[..received], |_| {})?;
        }
    }

    /// Loads the server with random reads or writes, and prints what was counted.
    pub fn measure(&mut self, write: bool) -> io::Result<()> {
        let epoll = self.prepare()?;
        self.run_until(now_ns() + WARM_UP_NS, write, epoll.as_ref())?;
        self.meter = Meter::new();
        let (started, own, server) = (now_ns(), own_cpu_ns(), self.server_cpu_ns());
        self.run_until(started + self.options.seconds * 1_000_000_000, write, epoll.as_ref())?;
        let elapsed = (now_ns() - started) as f64;
        let (own, server) = (own_cpu_ns() - own, self.server_cpu_ns() - server);
        self.drain(epoll.as_ref())?;
        let done = self.meter.done.max(1) as f64;
        print!("{:.0} requests/s", done * 1e9 / elapsed);
        print!(", p50 {:.1} us", self.meter.quantile_us(0.5));
        print!(", p99 {:.1} us", self.meter.quantile_us(0.99));
        print!(", {:.2} us of own CPU each", own as f64 / 1000.0 / done);
        if self.options.server_pid.is_some() {
            print!(", {:.2} us of server CPU each", server as f64 / 1000.0 / done);
            print!(", server {:.0} % busy", server as f64 / elapsed * 100.0);
        }
        println!();
        Ok(())
    }

    /// Several connections are waited for with epoll; one is just received from.
    fn prepare(&self) -> io::Result<Option<std::os::fd::OwnedFd>> {
        let several = self.connections.len() > 1;
        if several || self.options.poll {
            for connection in &self.connections {
                connection.stream.set_nonblocking()?;
            }
        }
        if !several {
            return Ok(None);
        }
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        for (index, connection) in (0..).zip(&self.connections) {
            let data = epoll::EventData::new_u64(index);
            epoll::add(&epoll, connection.stream.as_fd(), data, epoll::EventFlags::IN)?;
        }
        Ok(Some(epoll))
    }

    fn run_until(&mut self, end_ns: u64, write: bool, epoll: Option<&impl AsFd>) -> io::Result<()> {
        let every: Vec<usize> = (0..self.connections.len()).collect();
        for index in every {
            self.refill(index, now_ns(), write)?;
        }
        loop {
            let mut now = 0;
            for index in self.ready(epoll)? {
                now = self.receive(index)?;
                if now > 0 {
                    self.refill(index, now, write)?;
                }
            }
            if now >= end_ns {
                return Ok(());
            }
        }
    }

    /// Waits for the replies to what is in flight, so that no server is left in the middle of one.
    fn drain(&mut self, epoll: Option<&impl AsFd>) -> io::Result<()> {
        while !self.connections.iter().all(Connection::idle) {
            for index in self.ready(epoll)? {
                self.receive(index)?;
                self.connections[index].send()?;
            }
        }
        Ok(())
    }

    /// The connections that may have something.
    fn ready(&self, epoll: Option<&impl AsFd>) -> io::Result<Vec<usize>> {
        let Some(epoll) = epoll else { return Ok(vec![0]) };
        let mut events = Vec::with_capacity(self.connections.len());
        let at_once = Timespec { tv_sec: 0, tv_nsec: 0 };
        let timeout = self.options.poll.then_some(&at_once);
        epoll::wait(epoll, rustix::buffer::spare_capacity(&mut events), timeout)?;
        let index = |event: epoll::Event| usize::try_from(event.data.u64()).expect("an index");
        Ok(events.into_iter().map(index).collect())
    }

    fn refill(&mut self, index: usize, now_ns: u64, write: bool) -> io::Result<()> {
        let bytes = u32::try_from(self.options.block).map_err(io::Error::other)?;
        let blocks = (self.options.span / self.options.block).max(1);
        let random = &mut self.random;
        let connection = &mut self.connections[index];
        connection.refill(now_ns, || {
            // xorshift: cheap, and random enough to defeat read-ahead.
            *random ^= *random << 13;
            *random ^= *random >> 7;
            *random ^= *random << 17;
            let offset = *random % blocks * u64::from(bytes);
            Some(Request { tag: 0, write, offset, bytes })
        });
        connection.send()
    }

    /// Receives once; the time then, or 0 if nothing was there.
    fn receive(&mut self, index: usize) -> io::Result<u64> {
        let connection = &mut self.connections[index];
        let received = match receive(connection.stream.as_mut(), &mut self.buffer) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(0),
            received => received?,
        };
        let now = now_ns();
        let meter = &mut self.meter;
        let bytes = &self.buffer[..received];
        connection.take(bytes, |started| meter.count(now - started))?;
        Ok(now)
    }

    fn server_cpu_ns(&self) -> u64 {
        self.options.server_pid.map_or(0, process_cpu_ns)
    }
}

fn receive(stream: &mut dyn Stream, buffer: &mut [u8]) -> io::Result<usize> {
    match stream.read(buffer)? {
        0 => Err(io::ErrorKind::UnexpectedEof.into()),
        received => Ok(received),
    }
}

fn clock_ns(clock: ClockId) -> u64 {
    let now = clock_gettime(clock);
    let part = |value| u64::try_from(value).expect("clocks count up from 0");
    part(now.tv_sec) * 1_000_000_000 + part(now.tv_nsec)
}

fn now_ns() -> u64 {
    clock_ns(ClockId::Monotonic)
}

fn own_cpu_ns() -> u64 {
    clock_ns(ClockId::ProcessCPUTime)
}

/// User and system time of a process so far (proc(5), fields 14 and 15 of `stat`).
fn process_cpu_ns(pid: u32) -> u64 {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    let after_name = stat.rsplit(')').next().unwrap_or_default();
    let fields = after_name.split_whitespace().skip(11).take(2);
    let ticks: u64 = fields.filter_map(|field| field.parse::<u64>().ok()).sum();
    ticks * 1_000_000_000 / rustix::param::clock_ticks_per_second()
}
