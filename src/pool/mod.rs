//! Devices as erasure-coded segments: placement, rows, degraded reads, superblocks.
//!
//! A *segment* is k data and m parity strips on k+m different devices. The pool writes rows of a
//! segment, reads ranges of a strip, rebuilds what cannot be read and decides, alone, when a
//! device is out of service. It knows records only as far as a read must be verified, and no
//! volume.
//!
//! ```text
//!  device: | superblocks | journal ring | region 0 | region 1 | ...        region = one strip
//!  strip:  | unit of row 0 (64 KiB) | unit of row 1 | ...
//! ```

use std::sync::Arc;

use parking_lot::Mutex;

use crate::canary::Bug;
use crate::canary::planted;
use crate::codec::erasure::ErasureCode;
use crate::env::EnvRef;
use crate::error::Error;
use crate::error::ErrorKind;
use crate::error::Result;
use crate::format::PodId;
use crate::format::location::AddressSpace;
use crate::format::superblock::JOURNAL_OFFSET;
use crate::format::superblock::Superblock;
use crate::format::table::STRIPS_MAX;
use crate::format::unit::UNIT_BYTES;
use crate::units::IO_ALIGN;
use crate::units::round_up;

pub mod heal;
pub mod member;
pub mod read;
pub mod rebuild;
pub mod row;
pub mod scrub;
pub mod superblock;
pub mod table;

use member::Member;
use table::Redundancy;
use table::SegmentTable;

/// What is fixed when a pod is created.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Geometry {
    /// The pod's UUID.
    pub pod: PodId,
    /// Devices in the pod (n).
    pub devices: usize,
    /// Data strips per segment (k).
    pub data_strips: usize,
    /// Parity strips per segment (m).
    pub parity_strips: usize,
    /// Bytes of a strip.
    pub strip_bytes: u64,
    /// Bytes of the journal's ring on each device.
    pub journal_bytes: u64,
}

impl Geometry {
    /// Strips per segment (k + m).
    #[must_use]
    pub fn strips(&self) -> usize {
        self.data_strips + self.parity_strips
    }

    /// Devices each journal batch must be durable on (m + 1).
    #[must_use]
    pub fn journal_copies(&self) -> usize {
        self.parity_strips + 1
    }

    /// Devices that may be absent when the pod opens: `min(m, (n - 1) / 2)`.
    #[must_use]
    pub fn absent_max(&self) -> usize {
        self.parity_strips.min((self.devices - 1) / 2)
    }

    /// Rows per segment.
    #[must_use]
    pub fn rows(&self) -> u64 {
        self.strip_bytes / UNIT_BYTES as u64
    }

    /// Bytes of data strips in a segment, unit headers included.
    #[must_use]
    pub fn segment_bytes(&self) -> u64 {
        self.strip_bytes * self.data_strips as u64
    }

    /// How many segments must be free on the `present` devices so that `segments` can be opened
    /// when m devices are lost: more, where more are left than a segment has strips.
    #[must_use]
    pub fn with_losses(&self, segments: u64, present: usize) -> u64 {
        let left = present.min(self.devices - self.parity_strips).max(1);
        let seats = |devices: usize| devices.min(self.strips()) as u64;
        (segments * present as u64 * seats(left)).div_ceil(seats(present).max(1) * left as u64)
    }

    /// Byte offset of region 0 on every device.
    #[must_use]
    pub fn data_offset(&self) -> u64 {
        round_up(JOURNAL_OFFSET + self.journal_bytes, IO_ALIGN)
    }

    /// Regions of a device of `device_bytes` bytes.
    #[must_use]
    pub fn regions(&self, device_bytes: u64) -> u64 {
        device_bytes.saturating_sub(self.data_offset()) / self.strip_bytes
    }

    /// How log addresses are counted.
    #[must_use]
    pub fn space(&self) -> AddressSpace {
        AddressSpace { data_strips: self.data_strips as u64, strip_bytes: self.strip_bytes }
    }

    /// Refuses geometries that could not keep the contract.
    ///
    /// # Errors
    /// `InvalidRequest` with the reason.
    pub fn validate(&self) -> Result<()> {
        let (n, k, m) = (self.devices, self.data_strips, self.parity_strips);
        let refuse = |reason: String| {
            Err(Error::new(ErrorKind::InvalidRequest, "choose the geometry").context(reason))
        };
        if k == 0 || m == 0 {
            return refuse(format!("{k}+{m}: at least 1 data and 1 parity strip are needed"));
        }
        if k + m > STRIPS_MAX {
            return refuse(format!("{k}+{m}: at most {STRIPS_MAX} strips are supported"));
        }
        if n < k + m {
            return refuse(format!("{k}+{m} needs at least {} devices, {n} given", k + m));
        }
        if n < 2 * m + 1 {
            return refuse(format!(
                "{m} parity strips need at least {} devices, {n} given: with fewer, two halves of \
                 the pod could both open",
                2 * m + 1
            ));
        }
        Ok(())
    }
}

impl From<&Superblock> for Geometry {
    fn from(superblock: &Superblock) -> Self {
        Self {
            pod: superblock.pod,
            devices: usize::from(superblock.device_count),
            data_strips: usize::from(superblock.data_strips),
            parity_strips: usize::from(superblock.parity_strips),
            strip_bytes: superblock.strip_bytes,
            journal_bytes: superblock.journal_bytes,
        }
    }
}

/// The devices of a pod and its segment table.
pub struct Pool {
    /// Time and tasks.
    pub env: EnvRef,
    /// Fixed at creation.
    pub geometry: Geometry,
    /// By index; a missing device has its place too.
    pub members: Vec<Arc<Member>>,
    /// Short lock, innermost: nothing else is locked while it is held.
    pub table: Mutex<SegmentTable>,
    code: ErasureCode,
    /// The superblock as last committed; also serialises commits.
    head: tokio::sync::Mutex<Superblock>,
    hedges: read::HedgeBudget,
    heals: heal::Heals,
}

impl Pool {
    /// A pool over `members` whose newest superblock is `head`. The table is still empty.
    ///
    /// # Errors
    /// If the erasure code does not know the geometry.
    pub fn new(env: EnvRef, members: Vec<Arc<Member>>, head: Superblock) -> Result<Self> {
        let geometry = Geometry::from(&head);
        let regions = members
            .iter()
            .map(|member| member.device_bytes().map_or(0, |bytes| geometry.regions(bytes)))
            .collect();
        let first_id = if planted(Bug::IdsReused) {
            head.id_limit.saturating_sub(4096)
        } else {
            head.id_limit
        };
        Ok(Self {
            env,
            geometry,
            members,
            table: Mutex::new(SegmentTable::new(geometry, regions, first_id)),
            code: ErasureCode::new(geometry.data_strips, geometry.parity_strips)?,
            head: tokio::sync::Mutex::new(head),
            hedges: read::HedgeBudget::default(),
            heals: heal::Heals::default(),
        })
    }

    /// Which devices take new writes, by index.
    #[must_use]
    pub fn in_service(&self) -> Vec<bool> {
        self.members.iter().map(|member| member.in_service()).collect()
    }

    /// How many devices are in service.
    #[must_use]
    pub fn in_service_count(&self) -> usize {
        self.members.iter().filter(|member| member.in_service()).count()
    }

    /// Whether as many devices are in service as a segment has data strips: with fewer, nothing new
    /// is stored and most of what is cannot be read.
    #[must_use]
    pub fn has_enough_devices(&self) -> bool {
        self.in_service_count() >= self.geometry.data_strips
    }

    /// How many more devices may fail without loss of data or service.
    #[must_use]
    pub fn can_lose(&self) -> usize {
        let lost = self.members.len() - self.in_service_count();
        let spare_strips = self.redundancy().strips_min.saturating_sub(self.geometry.data_strips);
        self.geometry.parity_strips.saturating_sub(lost).min(spare_strips)
    }

    /// How well the segments with live blocks are protected.
    #[must_use]
    pub fn redundancy(&self) -> Redundancy {
        let in_service = self.in_service();
        self.table.lock().redundancy(&in_service)
    }
}
