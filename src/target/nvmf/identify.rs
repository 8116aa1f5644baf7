//! What Identify answers: 4096 bytes each. Pure. (NVMe Base 1.4, 5.15; NVM Command Set)

use crate::target::nvmf::controller::ADMIN_QUEUE_ENTRIES_MAX;
use crate::target::nvmf::controller::Controller;
use crate::target::nvmf::controller::IO_QUEUE_ENTRIES_MAX;
use crate::target::nvmf::controller::Kind;
use crate::target::nvmf::controller::VERSION;
use crate::target::nvmf::io::FUSED_BYTES_MAX;
use crate::target::nvmf::subsystem::NAMESPACES_MAX;
use crate::target::nvmf::subsystem::NSID_MAX;
use crate::target::nvmf::subsystem::Namespace;
use crate::target::nvmf::subsystem::Namespaces;
use crate::target::nvmf::subsystem::Subsystem;
use crate::target::nvmf::wire::SQE_BYTES;
use crate::target::nvmf::wire::put;
use crate::target::nvmf::wire::put_text;
use crate::units::BLOCK_BYTES_U64;

/// Bytes of every answer.
pub const IDENTIFY_BYTES: usize = 4096;
/// Largest transfer of one command (MDTS): 2^8 pages of 4 KiB.
pub const TRANSFER_BYTES_MAX: u32 = 1 << 20;
const MDTS: u8 = 8;
/// Data a host may send along with a command (IOCCSZ).
pub const IN_CAPSULE_BYTES_MAX: u32 = 8192;
/// Asynchronous events a host may wait for at once, counted from 0 (AERL).
pub const EVENT_REQUESTS_MAX: u8 = 3;
/// What we are called.
pub const MODEL: &str = "Weft";
/// What firmware slot 1 holds: our version, as far as 8 characters go.
pub const FIRMWARE: &str = env!("CARGO_PKG_VERSION");
/// ANA groups; the only one is always optimized.
pub const ANA_GROUPS: u32 = 1;

/// Feature bits of asynchronous events we send: namespace attribute changes (OAES).
pub const EVENTS_SUPPORTED: u32 = 1 << 8;
/// Of a discovery controller: changes of the discovery log.
pub const DISCOVERY_EVENTS_SUPPORTED: u32 = 1 << 31;

/// Identify Controller. (NVMe Base 1.4, figure 247; NVMe-oF 1.1, 4.1)
#[must_use]
pub fn controller(subsystem: &Subsystem, controller: &Controller) -> Vec<u8> {
    let mut page = vec![0; IDENTIFY_BYTES];
    let is_io = controller.identity().kind == Kind::Io;
    put_text(&mut page, 4, 20, subsystem.serial_number());
    put_text(&mut page, 24, 40, MODEL);
    put_text(&mut page, 64, 8, FIRMWARE);
    page[72] = 6; // RAB
    // CMIC: several ports and controllers; ANA.
    page[76] = if is_io { 0b1011 } else { 0b0011 };
    page[77] = MDTS;
    put(&mut page, 78, &controller.id().to_le_bytes());
    put(&mut page, 80, &VERSION.to_le_bytes());
    let events = if is_io { EVENTS_SUPPORTED } else { DISCOVERY_EVENTS_SUPPORTED };
    put(&mut page, 92, &events.to_le_bytes());
    // CTRATT: host identifiers of 128 bits; any command keeps alive.
    put(&mut page, 96, &(1_u32 | 1 << 6).to_le_bytes());
    page[111] = if is_io { 1 } else { 2 }; // CNTRLTYPE
    page[258] = 3; // ACL
    page[259] = EVENT_REQUESTS_MAX;
    page[260] = 0b11; // FRMW: one slot, read-only
    // LPA: effects log; offsets in logs.
    page[261] = if is_io { 0b110 } else { 0b100 };
    page[263] = 0; // NPSS
    put(&mut page, 266, &343_u16.to_le_bytes()); // WCTEMP
    put(&mut page, 268, &353_u16.to_le_bytes()); // CCTEMP
    put(&mut page, 320, &10_u16.to_le_bytes()); // KAS: 1 s
    put(&mut page, 514, &(IO_QUEUE_ENTRIES_MAX + 1).to_le_bytes()); // MAXCMD
    page[512] = 0x66; // SQES
    page[513] = 0x44; // CQES
    // SGLS: supported, with offsets in capsules, and transport data blocks.
    put(&mut page, 536, &(1_u32 | 1 << 20 | 1 << 21).to_le_bytes());
    let nqn = controller.identity().subsystem_nqn.as_bytes();
    put(&mut page, 768, nqn);
    if is_io {
        of_namespaces(&mut page);
    } else {
        let entries = ADMIN_QUEUE_ENTRIES_MAX + 1;
        put(&mut page, 514, &entries.to_le_bytes());
    }
    // IOCCSZ and IORCSZ, in units of 16 bytes.
    let capsule = (u32::try_from(SQE_BYTES).expect("64") + IN_CAPSULE_BYTES_MAX) / 16;
    put(&mut page, 1792, &capsule.to_le_bytes());
    put(&mut page, 1796, &1_u32.to_le_bytes());
    page[1803] = 1; // MSDBD
    page[1806] = if is_io { 0 } else { 1 }; // DCTYPE: direct discovery controller
    put(&mut page, 2048, &0x09c4_u16.to_le_bytes()); // PSD0: 25 W, a plausible figure
    page[2052] = 0x10;
    page[2056] = 4;
    page
}

/// What only a controller with namespaces has.
fn of_namespaces(page: &mut [u8]) {
    page[342] = 10; // ANATT, s
    // ANACAP: the optimized state is reported; a namespace never changes its group.
    page[343] = 1 | 1 << 6;
    put(page, 344, &ANA_GROUPS.to_le_bytes()); // ANAGRPMAX
    put(page, 348, &ANA_GROUPS.to_le_bytes()); // NANAGRPID
    put(page, 516, &NSID_MAX.to_le_bytes()); // NN
    // ONCS: Compare, Dataset Management, Write Zeroes, reservations, Verify.
    put(page, 520, &(1_u16 | 1 << 2 | 1 << 3 | 1 << 5 | 1 << 7).to_le_bytes());
    put(page, 522, &1_u16.to_le_bytes()); // FUSES: Compare and Write
    // VWC: no volatile write cache, what is acknowledged is durable; Flush takes any namespace.
    page[525] = 0b110;
    // AWUN, AWUPF: in blocks of the largest length, since they bind every namespace.
    put(page, 526, &15_u16.to_le_bytes());
    put(page, 528, &15_u16.to_le_bytes());
    let namespaces = u32::try_from(NAMESPACES_MAX).expect("a constant");
    put(page, 540, &namespaces.to_le_bytes()); // MNAN
}

/// Identify Namespace. (NVMe Base 1.4, figure 245)
#[must_use]
pub fn namespace(namespace: &Namespace) -> Vec<u8> {
    let mut page = vec![0; IDENTIFY_BYTES];
    let volume = &namespace.volume;
    let blocks = namespace.blocks();
    for at in [0, 8, 16] {
        // NSZE, NCAP, NUSE: thin, but what is in use is not told.
        put(&mut page, at, &blocks.to_le_bytes());
    }
    // NSFEAT: thin; the namespace's own atomic units; preferred units.
    page[24] = 0b1_0011;
    page[30] = 1; // NMIC: several controllers
    // RESCAP: every type of reservation, persistent or not; IEKEY as of NVMe 1.3.
    page[31] = 0xff;
    page[33] = 0b1001; // DLFEAT: deallocated reads as zero; Write Zeroes may deallocate
    // All in logical blocks, counted from 0.
    let units =
        |bytes: u64| u16::try_from((bytes >> namespace.block_shift).max(1) - 1).unwrap_or(0);
    let atomic = units(u64::from(volume.atomic_write_bytes()));
    put(&mut page, 34, &atomic.to_le_bytes()); // NAWUN
    put(&mut page, 36, &atomic.to_le_bytes()); // NAWUPF
    put(&mut page, 38, &units(u64::from(FUSED_BYTES_MAX)).to_le_bytes()); // NACWU
    let good = units(BLOCK_BYTES_U64);
    for at in [64, 66, 68, 70] {
        // NPWG, NPWA, NPDG, NPDA: 4096 is the good size and alignment.
        put(&mut page, at, &good.to_le_bytes());
    }
    put(&mut page, 92, &ANA_GROUPS.to_le_bytes()); // ANAGRPID: the only group
    page[99] = u8::from(volume.read_only()); // NSATTR
    put(&mut page, 104, volume.uuid().as_bytes()); // NGUID
    page[130] = u8::try_from(namespace.block_shift).unwrap_or(9); // LBAF0.LBADS
    page
}

/// The identifiers of a namespace. (NVMe Base 1.4, figure 249)
#[must_use]
pub fn descriptors(namespace: &Namespace) -> Vec<u8> {
    let mut page = vec![0; IDENTIFY_BYTES];
    let uuid = namespace.volume.uuid();
    put(&mut page, 0, &[2, 16]);
    put(&mut page, 4, uuid.as_bytes());
    put(&mut page, 20, &[3, 16]);
    put(&mut page, 24, uuid.as_bytes());
    // CSI: the NVM command set.
    put(&mut page, 40, &[4, 1]);
    page
}

/// Active NSIDs above `above`. (NVMe Base 1.4, 5.15.2.3)
#[must_use]
pub fn active(namespaces: &Namespaces, above: u32) -> Vec<u8> {
    let mut page = vec![0; IDENTIFY_BYTES];
    let listed = namespaces.iter().map(|namespace| namespace.nsid).filter(|nsid| *nsid > above);
    for (place, nsid) in page.chunks_exact_mut(4).zip(listed) {
        place.copy_from_slice(&nsid.to_le_bytes());
    }
    page
}

/// The NVM command set's part of Identify Controller. (NVM Command Set 1.0, 4.1.5.2)
#[must_use]
pub fn nvm_controller() -> Vec<u8> {
    let mut page = vec![0; IDENTIFY_BYTES];
    page[1] = 13; // WZSL: 32 MiB; 65536 blocks of 512
    page[3] = u8::MAX; // DMRL: ranges of one Dataset Management
    page
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::time::Duration;

    use uuid::Uuid;

    use super::*;
    use crate::target::nvmf::controller::Identity;
    use crate::target::nvmf::subsystem::SubsystemOptions;
    use crate::volume::memory::MemoryDirectory;
    use crate::volume::memory::MemoryVolume;

    fn word(page: &[u8], at: usize) -> u32 {
        u32::from_le_bytes(page[at..at + 4].try_into().expect("4 bytes"))
    }

    fn half(page: &[u8], at: usize) -> u16 {
        u16::from_le_bytes([page[at], page[at + 1]])
    }

    fn subsystem() -> Subsystem {
        let volumes = [(2, 512, false), (7, 4096, true)].map(|(id, block_bytes, read_only)| {
            let volume = MemoryVolume::new(&format!("v{id}"), 1 << 20);
            let volume = volume.with_identity(id, block_bytes);
            Arc::new(if read_only { volume.read_only() } else { volume }) as _
        });
        let options = SubsystemOptions::new(Uuid::from_u128(7));
        Subsystem::new(Arc::new(MemoryDirectory::new(volumes)), options)
    }

    #[test]
    fn what_hosts_refuse_controllers_for_is_right() {
        let subsystem = subsystem();
        for kind in [Kind::Io, Kind::Discovery] {
            let identity = Identity {
                kind,
                subsystem_nqn: subsystem.nqn().to_owned(),
                host_nqn: "nqn.h".to_owned(),
                host_id: [0; 16],
            };
            let made = subsystem.create_controller(identity, Duration::ZERO).expect("made");
            let page = super::controller(&subsystem, &made);
            assert_eq!(page.len(), IDENTIFY_BYTES);
            assert_eq!(half(&page, 78), made.id());
            assert_eq!(word(&page, 80), 0x0001_0400);
            assert_eq!(word(&page, 1792), 516);
            assert_eq!(word(&page, 1796), 1);
            assert_eq!(word(&page, 536) & 3, 1);
            assert!(half(&page, 514) > 0);
            assert!(half(&page, 320) > 0);
            assert_eq!(page[511..514], [0, 0x66, 0x44]);
            let nqn = &page[768..768 + subsystem.nqn().len()];
            assert_eq!(nqn, subsystem.nqn().as_bytes());
            assert_eq!(page[76] & 8 != 0, kind == Kind::Io);
            if kind == Kind::Io {
                // The ANA log fits one transfer.
                assert!((1..=NSID_MAX).contains(&word(&page, 540)));
                assert!(16 + 32 * word(&page, 348) + 4 * word(&page, 540) < TRANSFER_BYTES_MAX);
            }
        }
    }

    #[test]
    fn namespaces_tell_size_identity_and_units() {
        let namespaces = subsystem().namespaces("nqn.h");
        let small = super::namespace(namespaces.find(2).expect("active"));
        let large = super::namespace(namespaces.find(7).expect("active"));
        assert_eq!(word(&small, 0), 2048);
        assert_eq!(word(&large, 8), 256);
        assert_eq!((small[130], large[130]), (9, 12));
        assert_eq!((small[99], large[99]), (0, 1));
        // The atomic unit is 64 KiB whatever the block.
        assert_eq!((half(&small, 36), half(&large, 36)), (127, 15));
        assert_eq!((half(&small, 64), half(&large, 64)), (7, 0));
        let uuid = namespaces.find(7).expect("active").volume.uuid();
        assert_eq!(large[104..120], *uuid.as_bytes());
        let names = descriptors(namespaces.find(7).expect("active"));
        assert_eq!(names[0..4], [2, 16, 0, 0]);
        assert_eq!(names[20..24], [3, 16, 0, 0]);
        assert_eq!(names[24..40], *uuid.as_bytes());
        assert_eq!(names[40..45], [4, 1, 0, 0, 0]);
    }

    #[test]
    fn the_list_starts_above_what_was_asked() {
        let namespaces = subsystem().namespaces("nqn.h");
        let ids = |above| [0, 4, 8].map(|at| word(&active(&namespaces, above), at));
        assert_eq!(ids(0), [2, 7, 0]);
        assert_eq!(ids(2), [7, 0, 0]);
        assert_eq!(ids(7), [0, 0, 0]);
        assert!(namespaces.find(3).is_none());
    }
}
