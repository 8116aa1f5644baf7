//! The subsystem hosts connect to: one per pod, with a namespace for each volume and a controller
//! for each host connection to it. Shared by all threads.
//!
//! A namespace's NSID is the volume's number, which is never used for another; its UUID and NGUID
//! are the volume's UUID. A volume whose number or place in the list lies beyond what we tell
//! hosts ([`NSID_MAX`], [`NAMESPACES_MAX`]) is not served over NVMe.

use std::collections::BTreeMap;
use std::fmt;
use std::net::IpAddr;
use std::net::SocketAddr;
use std::ops::RangeInclusive;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::sync::watch;
use uuid::Uuid;

use crate::observe::event;
use crate::secret::HostKeys;
use crate::secret::tls_key::TlsKey;
use crate::target::nvmf::auth::Policy;
use crate::target::nvmf::auth::elsewhere::Exponentiations;
use crate::target::nvmf::controller::Controller;
use crate::target::nvmf::controller::Identity;
use crate::target::nvmf::controller::Kind;
use crate::target::nvmf::notices::Notice;
use crate::volume::VolumeDirectory;
use crate::volume::VolumeRef;

/// Highest NSID (NN). Arbitrary, far above what a pod's life needs.
pub const NSID_MAX: u32 = 1 << 20;
/// Most namespaces at once (MNAN). With it the ANA log has 66 KiB, which a host must be able to
/// get in one piece.
pub const NAMESPACES_MAX: usize = 16 * 1024;
/// Controllers at once, of all hosts. Each has at least one connection.
const CONTROLLERS_MAX: usize = 4096;
/// Highest controller number; those above are reserved. (NVMe-oF 1.1, 4.2)
pub const CONTROLLER_ID_MAX: u16 = 0xffef;
/// The name under which any subsystem answers discovery. (NVMe-oF 1.1, 1.5.5)
pub const DISCOVERY_NQN: &str = "nqn.2014-08.org.nvmexpress.discovery";

/// What tells a subsystem from others.
#[derive(Clone, Debug)]
pub struct SubsystemOptions {
    /// The pod's identity; name and serial number are made of it.
    pub uuid: Uuid,
    /// Its name; `None`: made of the identity.
    pub nqn: Option<String>,
    /// Numbers for controllers: no other node of the pod may use any of them.
    pub controller_ids: RangeInclusive<u16>,
    /// From where hosts may connect that were never added.
    pub unknown_hosts: UnknownHosts,
    /// Addresses the discovery log names; empty: the one the host itself used.
    pub advertised: Vec<SocketAddr>,
    /// How hosts with a key may authenticate.
    pub authentication: Policy,
    /// Whether hosts may or must encrypt.
    pub secure_channel: SecureChannel,
}

impl SubsystemOptions {
    /// The defaults for a pod.
    #[must_use]
    pub fn new(uuid: Uuid) -> Self {
        Self {
            uuid,
            nqn: None,
            controller_ids: 1..=CONTROLLER_ID_MAX,
            unknown_hosts: UnknownHosts::Loopback,
            advertised: Vec::new(),
            authentication: Policy::default(),
            secure_channel: SecureChannel::Optional,
        }
    }
}

/// Whether connections are encrypted, by TLS. (NVMe-oF 1.1, 1.5.1)
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SecureChannel {
    /// None is; hosts that have a key for it are refused.
    Off,
    /// Those of hosts that have a key for it, and only those.
    Optional,
    /// All are: hosts without a key are refused, also for discovery.
    Required,
}

/// From where hosts may connect that were never added.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum UnknownHosts {
    /// From nowhere.
    Refused,
    /// From this machine.
    Loopback,
    /// From anywhere.
    Anywhere,
}

/// The subsystem.
pub struct Subsystem {
    nqn: String,
    serial_number: String,
    controller_ids: RangeInclusive<u16>,
    unknown_hosts: UnknownHosts,
    advertised: Vec<SocketAddr>,
    authentication: Policy,
    secure_channel: SecureChannel,
    exponentiations: Exponentiations,
    directory: Arc<dyn VolumeDirectory>,
    /// Guards the table for one lookup or change.
    controllers: Mutex<Controllers>,
    counters: IoCounters,
}

#[derive(Default)]
struct Controllers {
    by_id: BTreeMap<u16, Arc<Controller>>,
    /// Where the search for a free number goes on, so that numbers are not reused soon.
    next_id: u16,
}

/// What hosts did, over all controllers since the node started.
#[derive(Debug, Default)]
pub struct IoCounters {
    /// Read and Compare commands.
    pub reads: AtomicU64,
    /// Write commands.
    pub writes: AtomicU64,
    /// Bytes returned by reads.
    pub bytes_read: AtomicU64,
    /// Bytes of completed writes.
    pub bytes_written: AtomicU64,
    /// Commands of any kind answered with an error.
    pub errors: AtomicU64,
    /// Authentications that failed, for whatever reason.
    pub authentications_failed: AtomicU64,
}

/// A volume as hosts see it.
#[derive(Clone)]
pub struct Namespace {
    /// Its number.
    pub nsid: u32,
    /// The volume behind it.
    pub volume: VolumeRef,
    /// Logical block length as a power of two.
    pub block_shift: u32,
}

impl Namespace {
    /// What hosts must hear of when it changes.
    #[must_use]
    pub fn facts(&self) -> (Uuid, u64, bool) {
        (self.volume.uuid(), self.volume.size_bytes(), self.volume.read_only())
    }

    /// Logical blocks.
    #[must_use]
    pub fn blocks(&self) -> u64 {
        self.volume.size_bytes() >> self.block_shift
    }
}

/// All namespaces at one moment, in order of NSID.
#[derive(Clone, Default)]
pub struct Namespaces(Vec<Namespace>);

impl Namespaces {
    /// The namespace of that number, if it is active.
    #[must_use]
    pub fn find(&self, nsid: u32) -> Option<&Namespace> {
        let index = self.0.binary_search_by_key(&nsid, |namespace| namespace.nsid).ok()?;
        self.0.get(index)
    }

    /// The same as a host uses them: what reservations forbid it is refused, and changes are durable.
    #[must_use]
    pub fn used_by(mut self, host: Option<Uuid>) -> Self {
        for namespace in &mut self.0 {
            let volume = VolumeRef::clone(&namespace.volume).write_through();
            namespace.volume = match host {
                Some(host) => volume.for_host(host),
                None => volume,
            };
        }
        self
    }

    /// All of them.
    pub fn iter(&self) -> std::slice::Iter<'_, Namespace> {
        self.0.iter()
    }
}

impl Subsystem {
    /// The subsystem of these volumes.
    #[must_use]
    pub fn new(directory: Arc<dyn VolumeDirectory>, options: SubsystemOptions) -> Self {
        let mut serial_number = options.uuid.simple().to_string();
        serial_number.truncate(20);
        Self {
            nqn: options.nqn.unwrap_or_else(|| nqn(options.uuid)),
            serial_number,
            controller_ids: options.controller_ids,
            unknown_hosts: options.unknown_hosts,
            advertised: options.advertised,
            authentication: options.authentication,
            secure_channel: options.secure_channel,
            exponentiations: Exponentiations::default(),
            directory,
            controllers: Mutex::default(),
            counters: IoCounters::default(),
        }
    }

    /// Its name.
    #[must_use]
    pub fn nqn(&self) -> &str {
        &self.nqn
    }

    /// Its serial number: 20 characters.
    #[must_use]
    pub fn serial_number(&self) -> &str {
        &self.serial_number
    }

    /// Addresses for the discovery log; empty: the one the host used.
    #[must_use]
    pub fn advertised(&self) -> &[SocketAddr] {
        &self.advertised
    }

    /// The keys of a host, as they are now; `None`: it need not authenticate.
    #[must_use]
    pub fn host_keys(&self, host_nqn: &str) -> Option<HostKeys> {
        self.directory.host_keys(host_nqn)
    }

    /// The key by which a host encrypts, as it is now; `None`: it has none.
    #[must_use]
    pub fn host_tls_key(&self, host_nqn: &str) -> Option<TlsKey> {
        self.directory.host_tls_key(host_nqn)
    }

    /// Whether hosts may or must encrypt.
    #[must_use]
    pub fn secure_channel(&self) -> SecureChannel {
        self.secure_channel
    }

    /// Whether this host must.
    #[must_use]
    pub fn must_encrypt(&self, host_nqn: &str) -> bool {
        self.secure_channel == SecureChannel::Required || self.host_tls_key(host_nqn).is_some()
    }

    /// How hosts may authenticate.
    #[must_use]
    pub fn authentication(&self) -> &Policy {
        &self.authentication
    }

    /// Where what takes long is computed.
    #[must_use]
    pub fn exponentiations(&self) -> &Exponentiations {
        &self.exponentiations
    }

    /// What hosts did.
    #[must_use]
    pub fn counters(&self) -> &IoCounters {
        &self.counters
    }

    /// Counts that a host did not prove who it is, and tells the operator.
    pub fn authentication_failed(&self, message: fmt::Arguments<'_>) {
        self.counters.authentications_failed.fetch_add(1, Ordering::Relaxed);
        // One subject, whoever it is: a flood is one event.
        event::raise(event::HOST_AUTHENTICATION_FAILED, "nvme-tcp", message);
    }

    /// Whether a host may connect from that address.
    #[must_use]
    pub fn admits(&self, host_nqn: &str, from: IpAddr) -> bool {
        let unknown_admitted = match self.unknown_hosts {
            UnknownHosts::Refused => false,
            UnknownHosts::Loopback => from.to_canonical().is_loopback(),
            UnknownHosts::Anywhere => true,
        };
        unknown_admitted || self.directory.knows_host(host_nqn)
    }

    /// The volumes that a host is served, as they are now.
    #[must_use]
    pub fn namespaces(&self, host_nqn: &str) -> Namespaces {
        let volumes = self.directory.list().into_iter();
        let served = volumes.filter(|volume| volume.admits(Some(host_nqn)));
        let mut namespaces: Vec<Namespace> = served.filter_map(namespace).collect();
        namespaces.sort_by_key(|namespace| namespace.nsid);
        namespaces.truncate(NAMESPACES_MAX);
        Namespaces(namespaces)
    }

    /// Changes whenever [`Subsystem::namespaces`] or [`Subsystem::admits`] may have.
    #[must_use]
    pub fn changes(&self) -> watch::Receiver<u64> {
        self.directory.changes()
    }

    /// Makes a controller for a host; `None` if there are too many.
    #[must_use]
    pub fn create_controller(
        &self,
        identity: Identity,
        keep_alive: Duration,
    ) -> Option<Arc<Controller>> {
        let mut controllers = self.controllers.lock();
        if controllers.by_id.len() >= CONTROLLERS_MAX {
            return None;
        }
        let id = controllers.free_id(&self.controller_ids)?;
        let controller = Arc::new(Controller::new(id, identity, keep_alive));
        controllers.by_id.insert(id, Arc::clone(&controller));
        Some(controller)
    }

    /// The controller of that number.
    #[must_use]
    pub fn controller(&self, id: u16) -> Option<Arc<Controller>> {
        self.controllers.lock().by_id.get(&id).cloned()
    }

    /// How many controllers there are.
    #[must_use]
    pub fn controller_count(&self) -> usize {
        self.controllers.lock().by_id.len()
    }

    /// Tells hosts, on all their controllers, of a change of a namespace's reservations.
    pub fn notify(&self, nsid: u32, notices: &[(Uuid, Notice)]) {
        let controllers = self.controllers.lock();
        for (host, notice) in notices {
            let theirs = |controller: &&Arc<Controller>| {
                let identity = controller.identity();
                identity.kind == Kind::Io && identity.host() == Some(*host)
            };
            for controller in controllers.by_id.values().filter(theirs) {
                controller.notify(nsid, *notice);
            }
        }
    }

    /// Takes a controller out and ends its connections. Its admin queue is gone.
    pub fn remove_controller(&self, controller: &Controller) {
        self.controllers.lock().by_id.remove(&controller.id());
        controller.end();
    }
}

impl Controllers {
    /// A number no controller has, if there is one.
    fn free_id(&mut self, ids: &RangeInclusive<u16>) -> Option<u16> {
        if self.by_id.len() >= ids.len() {
            return None;
        }
        loop {
            let next = self.next_id.checked_add(1).filter(|id| ids.contains(id));
            self.next_id = next.unwrap_or(*ids.start());
            if !self.by_id.contains_key(&self.next_id) {
                return Some(self.next_id);
            }
        }
    }
}

/// The name of a pod's subsystem.
#[must_use]
pub fn nqn(pod: Uuid) -> String {
    format!("nqn.2014-08.org.nvmexpress:uuid:{pod}")
}

fn namespace(volume: VolumeRef) -> Option<Namespace> {
    let nsid = u32::try_from(volume.id()).ok().filter(|nsid| (1..=NSID_MAX).contains(nsid))?;
    let block_shift = volume.logical_block_bytes().trailing_zeros();
    (!volume.closed()).then_some(Namespace { nsid, volume, block_shift })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::volume::memory::MemoryDirectory;
    use crate::volume::memory::MemoryVolume;

    fn identity() -> Identity {
        Identity {
            kind: crate::target::nvmf::controller::Kind::Io,
            subsystem_nqn: "nqn.s".into(),
            host_nqn: "nqn.h".into(),
            host_id: [0; 16],
        }
    }

    #[test]
    fn controller_numbers_come_from_the_range_and_are_used_again_when_free() {
        let options =
            SubsystemOptions { controller_ids: 7..=8, ..SubsystemOptions::new(Uuid::nil()) };
        let subsystem = Subsystem::new(Arc::new(MemoryDirectory::default()), options);
        let create = || subsystem.create_controller(identity(), Duration::ZERO);
        let (first, second) = (create().expect("free"), create().expect("free"));
        assert_eq!([first.id(), second.id()], [7, 8]);
        assert!(create().is_none());
        subsystem.remove_controller(&first);
        assert_eq!(create().expect("free again").id(), 7);
    }

    #[test]
    fn hosts_are_let_in_by_name_or_by_where_they_are_and_see_what_is_theirs() {
        let mine = Arc::new(MemoryVolume::new("mine", 4096).with_identity(1, 512));
        let open = Arc::new(MemoryVolume::new("open", 4096).with_identity(2, 512));
        mine.serve_only(Some("nqn.known"));
        let directory = Arc::new(MemoryDirectory::new([mine as VolumeRef, open as VolumeRef]));
        directory.set_host("nqn.known", true);
        let [loopback, mapped, remote] = ["127.0.0.9", "::ffff:127.0.0.1", "192.0.2.1"]
            .map(|text| text.parse::<IpAddr>().expect("an address"));
        for (unknown_hosts, local, from_afar) in [
            (UnknownHosts::Refused, false, false),
            (UnknownHosts::Loopback, true, false),
            (UnknownHosts::Anywhere, true, true),
        ] {
            let options = SubsystemOptions { unknown_hosts, ..SubsystemOptions::new(Uuid::nil()) };
            let subsystem = Subsystem::new(Arc::clone(&directory) as _, options);
            assert_eq!(subsystem.admits("nqn.other", loopback), local);
            assert_eq!(subsystem.admits("nqn.other", mapped), local);
            assert_eq!(subsystem.admits("nqn.other", remote), from_afar);
            assert!(subsystem.admits("nqn.known", remote));
            let seen = |nqn| -> Vec<u32> {
                subsystem.namespaces(nqn).iter().map(|namespace| namespace.nsid).collect()
            };
            assert_eq!((seen("nqn.known"), seen("nqn.other")), (vec![1, 2], vec![2]));
        }
    }
}
