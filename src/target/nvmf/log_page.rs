//! What Get Log Page answers. Pure. (NVMe Base 1.4, 5.14)

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::net::SocketAddr;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering;

use crate::target::nvmf::identify::ANA_GROUPS;
use crate::target::nvmf::identify::FIRMWARE;
use crate::target::nvmf::subsystem::DISCOVERY_NQN;
use crate::target::nvmf::subsystem::IoCounters;
use crate::target::nvmf::subsystem::Namespaces;
use crate::target::nvmf::subsystem::SecureChannel;
use crate::target::nvmf::subsystem::Subsystem;
use crate::target::nvmf::transport::Path;
use crate::target::nvmf::wire::opcode;
use crate::target::nvmf::wire::put;
use crate::target::nvmf::wire::put_text;

/// Log identifiers.
#[expect(missing_docs, reason = "the names are the specification's")]
pub mod id {
    pub const ERROR: u8 = 0x01;
    pub const SMART: u8 = 0x02;
    pub const FIRMWARE_SLOT: u8 = 0x03;
    pub const CHANGED_NAMESPACES: u8 = 0x04;
    pub const COMMANDS_AND_EFFECTS: u8 = 0x05;
    pub const ANA: u8 = 0x0c;
    pub const DISCOVERY: u8 = 0x70;
    pub const RESERVATION_NOTIFICATION: u8 = 0x80;
}

/// Changed namespaces the log has room for.
const CHANGED_MAX: usize = 1024;
/// Bytes of a discovery log entry, and of its header.
const DISCOVERY_ENTRY_BYTES: usize = 1024;

/// Error Information: one entry, always empty. We keep no such log.
#[must_use]
pub fn error() -> Vec<u8> {
    vec![0; 64]
}

/// SMART / Health Information. (NVMe Base 1.4, figure 194)
#[must_use]
pub fn smart(counters: &IoCounters) -> Vec<u8> {
    let mut page = vec![0; 512];
    put(&mut page, 1, &300_u16.to_le_bytes()); // composite temperature, K: we have no sensor
    page[3] = 100; // available spare, %
    page[4] = 10;
    let count = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
    // Data units are thousands of 512 bytes, rounded up.
    let units = |counter: &AtomicU64| count(counter).div_ceil(512 * 1000);
    put(&mut page, 32, &units(&counters.bytes_read).to_le_bytes());
    put(&mut page, 48, &units(&counters.bytes_written).to_le_bytes());
    put(&mut page, 64, &count(&counters.reads).to_le_bytes());
    put(&mut page, 80, &count(&counters.writes).to_le_bytes());
    page
}

/// Firmware Slot Information.
#[must_use]
pub fn firmware_slot() -> Vec<u8> {
    let mut page = vec![0; 512];
    page[0] = 1;
    put_text(&mut page, 8, 8, FIRMWARE);
    page
}

/// Changed Namespace List. (NVMe Base 1.4, 5.14.1.4)
#[must_use]
pub fn changed_namespaces(changed: &BTreeSet<u32>) -> Vec<u8> {
    let mut page = vec![0; 4 * CHANGED_MAX];
    if changed.len() > CHANGED_MAX {
        put(&mut page, 0, &u32::MAX.to_le_bytes());
        return page;
    }
    for (place, nsid) in page.chunks_exact_mut(4).zip(changed) {
        place.copy_from_slice(&nsid.to_le_bytes());
    }
    page
}

/// Commands Supported and Effects. (NVMe Base 1.4, 5.14.1.5)
#[must_use]
pub fn commands_and_effects() -> Vec<u8> {
    const SUPPORTED: u32 = 1;
    const CHANGES_BLOCKS: u32 = 1 << 1;
    let mut page = vec![0; 4096];
    let admin = [
        opcode::GET_LOG_PAGE,
        opcode::IDENTIFY,
        opcode::ABORT,
        opcode::SET_FEATURES,
        opcode::GET_FEATURES,
        opcode::ASYNC_EVENT_REQUEST,
        opcode::KEEP_ALIVE,
    ];
    for opcode in admin {
        put(&mut page, 4 * usize::from(opcode), &SUPPORTED.to_le_bytes());
    }
    let io = [
        (opcode::FLUSH, SUPPORTED),
        (opcode::WRITE, SUPPORTED | CHANGES_BLOCKS),
        (opcode::READ, SUPPORTED),
        (opcode::COMPARE, SUPPORTED),
        (opcode::VERIFY, SUPPORTED),
        (opcode::WRITE_ZEROES, SUPPORTED | CHANGES_BLOCKS),
        (opcode::DATASET_MANAGEMENT, SUPPORTED | CHANGES_BLOCKS),
        (opcode::RESERVATION_REGISTER, SUPPORTED),
        (opcode::RESERVATION_REPORT, SUPPORTED),
        (opcode::RESERVATION_ACQUIRE, SUPPORTED),
        (opcode::RESERVATION_RELEASE, SUPPORTED),
    ];
    for (opcode, effects) in io {
        put(&mut page, 1024 + 4 * usize::from(opcode), &effects.to_le_bytes());
    }
    page
}

/// Asymmetric Namespace Access: every namespace is in the one group, which is optimized.
/// (NVMe Base 1.4, 5.14.1.12)
#[must_use]
pub fn ana(namespaces: &Namespaces, groups_only: bool) -> Vec<u8> {
    let nsids: Vec<u32> = if groups_only {
        Vec::new()
    } else {
        namespaces.iter().map(|namespace| namespace.nsid).collect()
    };
    let count = u32::try_from(nsids.len()).expect("bounded by NAMESPACES_MAX");
    let mut page = vec![0; 16 + 32];
    page[8] = 1; // one descriptor
    put(&mut page, 16, &ANA_GROUPS.to_le_bytes());
    put(&mut page, 20, &count.to_le_bytes());
    page[32] = 1; // optimized
    page.extend(nsids.into_iter().flat_map(u32::to_le_bytes));
    page
}

/// The discovery log of a host: this discovery subsystem, and the subsystem at each address if the
/// host may connect to it. `generation` changes when anything else does. (NVMe-oF 1.1, 5.3)
#[must_use]
pub fn discovery(subsystem: &Subsystem, host_nqn: &str, path: Path, generation: u64) -> Vec<u8> {
    let portal = path.portal;
    let secure = subsystem.must_encrypt(host_nqn);
    const REFERS_TO_SUBSYSTEM: u8 = 2;
    const IS_THIS_ONE: u8 = 3;
    let mut page = vec![0; DISCOVERY_ENTRY_BYTES];
    // Where a secure channel is not required of all, discovery may be asked without.
    let secure_here = subsystem.secure_channel() == SecureChannel::Required;
    entry(&mut page, (IS_THIS_ONE, DISCOVERY_NQN), portal, 0, secure_here);
    let here = [portal];
    let advertised = match subsystem.advertised() {
        _ if !subsystem.admits(host_nqn, path.host) => &[],
        [] => here.as_slice(),
        advertised => advertised,
    };
    for (port_id, address) in (1..).zip(advertised) {
        let mut address = *address;
        if address.ip().is_unspecified() {
            address.set_ip(portal.ip());
        }
        entry(&mut page, (REFERS_TO_SUBSYSTEM, subsystem.nqn()), address, port_id, secure);
    }
    put(&mut page, 0, &generation.to_le_bytes()); // GENCTR
    let records = u64::try_from(page.len() / DISCOVERY_ENTRY_BYTES - 1).expect("a few");
    put(&mut page, 8, &records.to_le_bytes());
    page
}

fn entry(
    page: &mut Vec<u8>,
    (subtype, nqn): (u8, &str),
    address: SocketAddr,
    port_id: u16,
    secure: bool,
) {
    const TCP: u8 = 3;
    const SECURE_CHANNEL_REQUIRED: u8 = 1;
    const TLS_1_3: u8 = 2;
    let ip = address.ip().to_canonical();
    let mut entry = vec![0; DISCOVERY_ENTRY_BYTES];
    entry[0] = TCP;
    entry[1] = match ip {
        IpAddr::V4(_) => 1,
        IpAddr::V6(_) => 2,
    };
    entry[2] = subtype;
    // TREQ: SQ flow control may be disabled. Of a secure channel nothing is said to hosts that have
    // no key for one, since nvme-cli takes "not required" for a reason to ask for it.
    entry[3] = 1 << 2;
    if secure {
        entry[3] |= SECURE_CHANNEL_REQUIRED;
        entry[768] = TLS_1_3; // TSAS: SECTYPE
    }
    put(&mut entry, 4, &port_id.to_le_bytes());
    put(&mut entry, 6, &u16::MAX.to_le_bytes()); // CNTLID: dynamic controllers
    put(&mut entry, 8, &32_u16.to_le_bytes()); // ASQSZ
    put(&mut entry, 32, address.port().to_string().as_bytes());
    put(&mut entry, 256, nqn.as_bytes());
    put(&mut entry, 512, ip.to_string().as_bytes());
    page.extend(entry);
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use uuid::Uuid;

    use super::*;
    use crate::secret::tls_key::TlsKey;
    use crate::target::nvmf::subsystem::SubsystemOptions;
    use crate::volume::memory::MemoryDirectory;
    use crate::volume::memory::MemoryVolume;

    fn subsystem(advertised: &[&str]) -> Subsystem {
        let volumes = [3, 9].map(|id| {
            Arc::new(MemoryVolume::new(&format!("v{id}"), 1 << 20).with_identity(id, 512)) as _
        });
        let advertised = advertised.iter().map(|text| text.parse().expect("address")).collect();
        let options = SubsystemOptions { advertised, ..SubsystemOptions::new(Uuid::from_u128(7)) };
        Subsystem::new(Arc::new(MemoryDirectory::new(volumes)), options)
    }

    fn text(field: &[u8]) -> &str {
        let length = field.iter().position(|byte| *byte == 0).expect("padded");
        std::str::from_utf8(&field[..length]).expect("text")
    }

    #[test]
    fn discovery_names_addresses_a_host_can_use() {
        let portal = "192.0.2.1:8009".parse().expect("address");
        let path = Path { portal, host: IpAddr::from([127, 0, 0, 1]) };
        let page = discovery(&subsystem(&[]), "nqn.h", path, 5);
        assert_eq!(page[0], 5);
        assert_eq!(page.len(), 3 * 1024);
        assert_eq!(page[8], 2);
        assert_eq!((page[1024 + 2], page[2048 + 2]), (3, 2));
        assert_eq!(text(&page[2048 + 512..2048 + 768]), "192.0.2.1");
        assert_eq!(text(&page[2048 + 32..2048 + 64]), "8009");

        let page = discovery(&subsystem(&["0.0.0.0:4420", "[::1]:4421"]), "nqn.h", path, 5);
        assert_eq!(page[8], 3);
        assert_eq!(text(&page[2048 + 512..2048 + 768]), "192.0.2.1");
        assert_eq!(text(&page[2048 + 32..2048 + 64]), "4420");
        assert_eq!(text(&page[3072 + 512..3072 + 768]), "::1");
        assert_eq!(page[3072 + 1], 2);
        assert!(
            text(&page[2048 + 256..2048 + 512]).starts_with("nqn.2014-08.org.nvmexpress:uuid:")
        );
        assert_eq!((page[2048 + 3], page[2048 + 768]), (1 << 2, 0));
        let from_afar = Path { host: IpAddr::from([192, 0, 2, 9]), ..path };
        let page = discovery(&subsystem(&[]), "nqn.h", from_afar, 6);
        assert_eq!((page.len(), page[8]), (2 * 1024, 1), "only itself");
    }

    #[test]
    fn discovery_says_to_whom_a_secure_channel_is_required() {
        let path = Path {
            portal: "192.0.2.1:8009".parse().expect("address"),
            host: IpAddr::from([127, 0, 0, 1]),
        };
        let security =
            |page: &[u8]| [1024, 2048].map(|entry| (page[entry + 3] & 3, page[entry + 768]));
        for (secure_channel, with_key, without) in [
            (SecureChannel::Optional, [(0, 0), (1, 2)], [(0, 0), (0, 0)]),
            (SecureChannel::Required, [(1, 2), (1, 2)], [(1, 2), (1, 2)]),
        ] {
            let directory = MemoryDirectory::default();
            directory.set_host_tls_key("nqn.k", TlsKey::from_random(None, &[7; 64]).expect("good"));
            let options =
                SubsystemOptions { secure_channel, ..SubsystemOptions::new(Uuid::from_u128(7)) };
            let subsystem = Subsystem::new(Arc::new(directory), options);
            assert_eq!(security(&discovery(&subsystem, "nqn.k", path, 1)), with_key);
            assert_eq!(security(&discovery(&subsystem, "nqn.h", path, 1)), without);
        }
    }

    #[test]
    fn the_ana_log_names_every_namespace_in_order() {
        let namespaces = subsystem(&[]).namespaces("nqn.h");
        let page = ana(&namespaces, false);
        assert_eq!(page.len(), 16 + 32 + 8);
        assert_eq!((page[8], page[16], page[20], page[32]), (1, 1, 2, 1));
        assert_eq!((page[48], page[52]), (3, 9));
        assert_eq!(ana(&namespaces, true).len(), 48);
    }

    #[test]
    fn too_many_changes_say_so() {
        let few = changed_namespaces(&BTreeSet::from([2, 5]));
        assert_eq!((few.len(), few[0], few[4], few[8]), (4096, 2, 5, 0));
        let many = changed_namespaces(&(1..=1025).collect());
        assert_eq!(many[..8], [255, 255, 255, 255, 0, 0, 0, 0]);
    }
}
