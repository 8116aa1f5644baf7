//! What a controller has to tell its host of reservations: the Reservation Notification log.
//! (NVMe Base 1.4, 5.14.1.9.1, 8.8.1)
//!
//! Each read of the log takes its oldest page. A page that finds the log full is lost, which a host
//! sees by the gap in their count.

use std::collections::BTreeMap;
use std::collections::VecDeque;

use crate::target::nvmf::wire::put;

/// Bytes of a log page.
const PAGE_BYTES: usize = 64;
/// Pages kept for a host that does not read them.
const PAGES_MAX: usize = 64;

/// What happened. The values are those of the log page, and their bits in the mask.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Notice {
    /// Another host took the host's registration out.
    RegistrationPreempted = 1,
    /// The reservation is gone, the host's registration is not.
    ReservationReleased = 2,
    /// Another host cleared reservation and registrations.
    ReservationPreempted = 3,
}

/// Bits a mask may have.
pub const MASK_BITS: u32 = 0b1110;

/// The log of one controller, and what its host does not want to hear of.
#[derive(Default)]
pub struct Notices {
    pages: VecDeque<Page>,
    /// Notices so far, lost ones included.
    count: u64,
    /// By namespace: a bit set for each notice not wanted.
    masks: BTreeMap<u32, u32>,
}

struct Page {
    count: u64,
    notice: Notice,
    nsid: u32,
}

impl Notices {
    /// Adds a page, unless it is masked; true if it was added.
    pub fn add(&mut self, nsid: u32, notice: Notice) -> bool {
        if self.mask(nsid) & 1 << notice as u32 != 0 {
            return false;
        }
        self.count += 1;
        if self.pages.len() >= PAGES_MAX {
            return false;
        }
        self.pages.push_back(Page { count: self.count, notice, nsid });
        true
    }

    /// Whether there is anything to read.
    #[must_use]
    pub fn any(&self) -> bool {
        !self.pages.is_empty()
    }

    /// The oldest page, or an empty one, as it is read; it stays if `keep`.
    pub fn read(&mut self, keep: bool) -> Vec<u8> {
        let mut bytes = vec![0; PAGE_BYTES];
        let Some(page) = self.pages.front() else { return bytes };
        put(&mut bytes, 0, &page.count.to_le_bytes());
        bytes[8] = page.notice as u8;
        bytes[9] = u8::try_from(self.pages.len() - 1).unwrap_or(u8::MAX);
        put(&mut bytes, 12, &page.nsid.to_le_bytes());
        if !keep {
            self.pages.pop_front();
        }
        bytes
    }

    /// What the host does not want to hear of a namespace.
    #[must_use]
    pub fn mask(&self, nsid: u32) -> u32 {
        self.masks.get(&nsid).copied().unwrap_or(0)
    }

    /// Changes that, for namespaces that exist.
    pub fn set_mask(&mut self, nsids: impl IntoIterator<Item = u32>, mask: u32) {
        self.masks.extend(nsids.into_iter().map(|nsid| (nsid, mask)));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_are_read_in_order_and_a_gap_tells_of_lost_ones() {
        let mut notices = Notices::default();
        assert!(!notices.any());
        assert_eq!(notices.read(false), [0; 64]);
        for nsid in 1..=70 {
            let added = notices.add(nsid, Notice::ReservationReleased);
            assert_eq!(added, nsid <= 64);
        }
        let kept = notices.read(true);
        assert_eq!((kept[0], kept[8], kept[9], kept[12]), (1, 2, 63, 1));
        assert_eq!(notices.read(false), kept);
        for _ in 2..=64 {
            notices.read(false);
        }
        assert!(!notices.any());
        notices.add(5, Notice::RegistrationPreempted);
        assert_eq!(notices.read(false)[..16], [71, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 5, 0, 0, 0]);
    }

    #[test]
    fn what_is_masked_is_not_told() {
        let mut notices = Notices::default();
        notices.set_mask([3, 4], 1 << 1 | 1 << 3);
        assert!(!notices.add(3, Notice::RegistrationPreempted));
        assert!(!notices.add(4, Notice::ReservationPreempted));
        assert!(notices.add(4, Notice::ReservationReleased));
        assert!(notices.add(5, Notice::ReservationPreempted));
        assert_eq!((notices.mask(3), notices.mask(5)), (0b1010, 0));
    }
}
