//! A node under test, and commands against it.

use std::fs;
use std::io::BufRead;
use std::io::BufReader;
use std::io::Read;
use std::io::Write;
use std::path::Path;
use std::path::PathBuf;
use std::process::Child;
use std::process::Command;
use std::process::ExitStatus;
use std::process::Stdio;
use std::sync::atomic::AtomicUsize;
use std::sync::atomic::Ordering;
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use rustix::process::Pid;
use rustix::process::Signal;

/// How long anything may take before the test fails. Generous: the machine may be busy.
pub const PATIENCE: Duration = Duration::from_secs(30);

/// The last line a node prints once it serves.
const READY_LINE: &str = "Ctrl-C stops it.";

/// A directory that is removed in the end.
pub struct Scratch(PathBuf);

impl Scratch {
    pub fn new() -> Self {
        static COUNT: AtomicUsize = AtomicUsize::new(0);
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        let path = std::env::temp_dir().join(format!("weft-cli-{}-{count}", std::process::id()));
        fs::create_dir_all(&path).expect("created");
        Self(path)
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }

    /// Writes a configuration with small devices, and `more` keys.
    pub fn config(&self, more: &str) -> PathBuf {
        let path = self.path("weft.toml");
        let text = format!(
            "data_dir = {:?}\nnbd.listen = [\"127.0.0.1:0\"]\n\
             nvme_tcp.listen = [\"127.0.0.1:0\"]\nnvme_tcp.discovery = []\nmemory.cache = \"16MiB\"\n{more}\n",
            self.path("data").display()
        );
        fs::write(&path, text).expect("written");
        path
    }

    /// The usual configuration.
    pub fn small(&self) -> PathBuf {
        self.config("pod.device_size = \"256MiB\"")
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// What a command printed and how it ended.
#[derive(Debug)]
pub struct Outcome {
    pub code: Option<i32>,
    pub out: String,
    pub err: String,
}

/// Runs `weft` with these arguments to its end. One that serves instead is killed, and has no code.
pub fn weft(arguments: &[&str]) -> Outcome {
    let mut command = Command::new("timeout");
    command.args(["--signal=KILL", &PATIENCE.as_secs().to_string()]);
    command.arg(env!("CARGO_BIN_EXE_weft")).args(arguments);
    let output = command.output().expect("runs");
    Outcome {
        code: output.status.code(),
        out: String::from_utf8(output.stdout).expect("text"),
        err: String::from_utf8(output.stderr).expect("text"),
    }
}

/// A path as an argument.
pub fn text(path: &Path) -> &str {
    path.to_str().expect("temporary paths are text")
}

/// Writes certificate and key for `localhost` and 127.0.0.1 as NAME.pem and NAME.key.
pub fn certificate(scratch: &Scratch, name: &str) {
    let key = rcgen::KeyPair::generate().expect("generated");
    let names = vec!["localhost".to_owned(), "127.0.0.1".to_owned()];
    let parameters = rcgen::CertificateParams::new(names).expect("names");
    let certificate = parameters.self_signed(&key).expect("signed");
    fs::write(scratch.path(&format!("{name}.pem")), certificate.pem()).expect("written");
    fs::write(scratch.path(&format!("{name}.key")), key.serialize_pem()).expect("written");
}

/// A running node; killed if the test ends without having stopped it.
pub struct Node {
    child: Child,
    lines: mpsc::Receiver<String>,
    log: PathBuf,
    pub data: PathBuf,
    /// Everything printed until it served.
    pub banner: String,
}

impl Node {
    /// Starts a node with a configuration file, and waits until it serves.
    pub fn start(scratch: &Scratch, config: &Path) -> Self {
        let mut command = Command::new(env!("CARGO_BIN_EXE_weft"));
        command.args(["--config", text(config)]);
        Self::run(scratch, command)
    }

    /// The same with any command line.
    pub fn run(scratch: &Scratch, mut command: Command) -> Self {
        let log = scratch.path("log");
        let stderr = fs::OpenOptions::new().create(true).append(true).open(&log).expect("opened");
        let mut child = command.stdout(Stdio::piped()).stderr(stderr).spawn().expect("runs");
        let stdout = BufReader::new(child.stdout.take().expect("piped"));
        let (sender, lines) = mpsc::channel();
        let forward = move || {
            stdout.lines().map_while(Result::ok).try_for_each(|line| sender.send(line)).ok();
        };
        thread::Builder::new().spawn(forward).expect("a thread");
        let data = scratch.path("data");
        let mut node = Self { child, lines, log, data, banner: String::new() };
        node.wait_until_ready();
        node
    }

    fn wait_until_ready(&mut self) {
        while !self.banner.contains(READY_LINE) {
            match self.lines.recv_timeout(PATIENCE) {
                Ok(line) => self.banner.push_str(&(line + "\n")),
                Err(_) => panic!("the node does not serve; its log:\n{}", self.log()),
            }
        }
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// What it wrote to standard error, over all starts in this scratch directory.
    pub fn log(&self) -> String {
        fs::read_to_string(&self.log).expect("readable")
    }

    pub fn signal(&self, signal: Signal) {
        let pid = Pid::from_child(&self.child);
        rustix::process::kill_process(pid, signal).expect("it runs");
    }

    /// Waits for its end.
    pub fn wait(mut self) -> ExitStatus {
        // Its standard output closes when it ends.
        loop {
            match self.lines.recv_timeout(PATIENCE) {
                Ok(_) => {}
                Err(mpsc::RecvTimeoutError::Disconnected) => break,
                Err(mpsc::RecvTimeoutError::Timeout) => panic!("no end; its log:\n{}", self.log()),
            }
        }
        self.child.wait().expect("it has ended")
    }

    /// Stops it as systemd would, which must succeed; nor may it have warned of anything.
    pub fn stop(self) {
        self.stop_despite(None);
    }

    /// The same for a node that had to warn with these words.
    pub fn stop_despite(self, expected: Option<&str>) {
        self.signal(Signal::TERM);
        let log = self.log.clone();
        let status = self.wait();
        let log = fs::read_to_string(log).expect("readable");
        assert!(status.success(), "{status}\n{log}");
        let odd = |line: &&str| line.contains(" WARN ") || line.contains(" ERROR ");
        let unexpected = |line: &&str| !expected.is_some_and(|words| line.contains(words));
        let lines: Vec<_> = log.lines().filter(odd).filter(unexpected).collect();
        assert!(lines.is_empty(), "{lines:#?}");
    }

    /// Runs a command against it.
    pub fn weft(&self, arguments: &[&str]) -> Outcome {
        let mut all = arguments.to_vec();
        all.extend(["--data", text(&self.data)]);
        weft(&all)
    }

    /// The same, with the answer as JSON; must succeed.
    pub fn json(&self, arguments: &[&str]) -> serde_json::Value {
        let mut all = arguments.to_vec();
        all.extend(["-o", "json"]);
        let done = self.weft(&all);
        assert_eq!(done.code, Some(0), "{done:?}");
        serde_json::from_str(&done.out).expect("JSON")
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// What goes with the option GO for vol0.
const GO_DATA: &[u8] = b"\0\0\0\x04vol0\0\0";

/// Types of replies to an NBD option; the first ends them.
pub const REPLY_ACK: u32 = 1;
pub const REPLY_INFO: u32 = 3;
pub const ERROR_POLICY: u32 = 0x8000_0002;
pub const ERROR_TLS_REQUIRED: u32 = 0x8000_0005;

/// Asks an NBD listener for vol0 in plain text and returns the type of the first reply.
pub fn plain_answer(mut stream: impl Read + Write) -> u32 {
    greet(&mut stream);
    option(&mut stream, 7, GO_DATA);
    reply(&mut stream).0
}

/// Agrees with an NBD listener that TLS begins next.
pub fn start_tls(stream: &mut (impl Read + Write)) {
    greet(stream);
    option(stream, 5, &[]);
    assert_eq!(reply(stream), (REPLY_ACK, 0));
}

/// Brings a client of NBD to the transmission phase of vol0, with simple replies.
pub fn attach(stream: &mut (impl Read + Write)) {
    greet(stream);
    attach_greeted(stream);
}

/// The same for one that has been greeted already, as within TLS.
pub fn attach_greeted(stream: &mut (impl Read + Write)) {
    option(stream, 7, GO_DATA);
    loop {
        let (kind, length) = reply(stream);
        assert!(kind == REPLY_ACK || kind == REPLY_INFO, "{kind:#x}");
        stream.read_exact(&mut vec![0; length]).expect("its data");
        if kind == REPLY_ACK {
            return;
        }
    }
}

/// Takes the greeting and answers it.
fn greet(stream: &mut (impl Read + Write)) {
    let mut greeting = [0; 18];
    stream.read_exact(&mut greeting).expect("greeted");
    stream.write_all(&[0, 0, 0, 3]).expect("sent");
}

/// Sends an option.
fn option(stream: &mut impl Write, number: u32, data: &[u8]) {
    let length = u32::try_from(data.len()).expect("short").to_be_bytes();
    let option = [b"IHAVEOPT", &number.to_be_bytes()[..], &length, data].concat();
    stream.write_all(&option).expect("sent");
}

/// Type and length of the next reply to an option.
fn reply(stream: &mut impl Read) -> (u32, usize) {
    let mut header = [0; 20];
    stream.read_exact(&mut header).expect("answered");
    let field = |at| u32::from_be_bytes(*header[at..].first_chunk().expect("long enough"));
    (field(12), field(16).try_into().expect("64 bits"))
}
