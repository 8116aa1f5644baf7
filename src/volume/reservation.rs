//! Reservations: which hosts may read or write a volume that several of them share.
//!
//! What they are is in the catalog, so that they can outlive a restart; how hosts change them is a
//! protocol's affair (`target/nvmf/reservation.rs`). Here is what they mean for a request, and the
//! one place where everybody who uses a volume looks. (NVMe Base 1.4, 8.8)

use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::Ordering;

use parking_lot::Mutex;
use uuid::Uuid;

pub use crate::engine::catalog::Hold;
pub use crate::engine::catalog::HoldKind;
pub use crate::engine::catalog::Reservations;
use crate::error::Error;
use crate::error::ErrorKind;
use crate::error::Result;

/// Most hosts registered with a volume. With all of them a change has about 20 KiB in the log.
pub const REGISTRANTS_MAX: usize = 256;

/// What a request does, as far as reservations go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Looks at content.
    Read,
    /// Changes it, or makes it durable.
    Write,
}

impl HoldKind {
    /// Whether those kept out may not even read.
    #[must_use]
    pub fn keeps_readers_out(self) -> bool {
        matches!(
            self,
            Self::ExclusiveAccess | Self::ExclusiveAccessRegistrants | Self::ExclusiveAccessAll
        )
    }

    /// Whether every registrant may do what the holder may.
    #[must_use]
    pub fn admits_registrants(self) -> bool {
        !matches!(self, Self::WriteExclusive | Self::ExclusiveAccess)
    }

    /// Whether every registrant is a holder.
    #[must_use]
    pub fn held_by_all(self) -> bool {
        matches!(self, Self::WriteExclusiveAll | Self::ExclusiveAccessAll)
    }
}

impl Reservations {
    /// Whether a host may do this. A user without an identifier is like a host that has not
    /// registered.
    #[must_use]
    pub fn allows(&self, host: Option<Uuid>, access: Access) -> bool {
        let Some(held) = self.held else { return true };
        if access == Access::Read && !held.kind.keeps_readers_out() {
            return true;
        }
        let Some(host) = host else { return false };
        held.host == Some(host)
            || held.kind.admits_registrants() && self.registrants.contains_key(&host)
    }
}

/// The reservations of a volume as they are now.
#[derive(Default)]
pub(super) struct CurrentReservations {
    /// Whether anyone holds the volume. If not, nobody is kept out: all that most requests look at.
    held: AtomicBool,
    /// Guards the rest, for one look or one change.
    all: Mutex<Arc<Reservations>>,
}

impl CurrentReservations {
    pub(super) fn new(reservations: Reservations) -> Self {
        let current = Self::default();
        current.publish(reservations);
        current
    }

    pub(super) fn get(&self) -> Arc<Reservations> {
        Arc::clone(&self.all.lock())
    }

    /// Makes `reservations` what every later [`CurrentReservations::check`] goes by.
    pub(super) fn publish(&self, reservations: Reservations) {
        let mut all = self.all.lock();
        self.held.store(reservations.held.is_some(), Ordering::Release);
        *all = Arc::new(reservations);
    }

    /// Whether nothing was published since `seen` was got.
    pub(super) fn is(&self, seen: &Arc<Reservations>) -> bool {
        Arc::ptr_eq(&self.all.lock(), seen)
    }

    /// Refuses a request of a host that is kept out, with `Reserved`.
    pub(super) fn check(&self, host: Option<Uuid>, access: Access, op: &'static str) -> Result<()> {
        if !self.held.load(Ordering::Acquire) || self.all.lock().allows(host, access) {
            return Ok(());
        }
        Err(Error::new(ErrorKind::Reserved, op))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The table of NVMe Base 1.4, figure 484: what a holder, another registrant and anyone else
    /// may do.
    #[test]
    fn each_kind_keeps_out_whom_it_should() {
        use HoldKind::*;
        let [holder, registrant, other] = [1, 2, 3].map(Uuid::from_u128);
        let registrants = [(holder, 10), (registrant, 20)].into();
        let mut reservations = Reservations { registrants, ..Reservations::default() };
        let may = |reservations: &Reservations| {
            [Some(holder), Some(registrant), Some(other), None].map(|host| {
                [Access::Read, Access::Write].map(|access| reservations.allows(host, access))
            })
        };
        assert_eq!(may(&reservations), [[true, true]; 4], "nobody holds it");
        let (all, reads, none) = ([true, true], [true, false], [false, false]);
        for (kind, expected) in [
            (WriteExclusive, [all, reads, reads, reads]),
            (ExclusiveAccess, [all, none, none, none]),
            (WriteExclusiveRegistrants, [all, all, reads, reads]),
            (ExclusiveAccessRegistrants, [all, all, none, none]),
            (WriteExclusiveAll, [all, all, reads, reads]),
            (ExclusiveAccessAll, [all, all, none, none]),
        ] {
            let host = (!kind.held_by_all()).then_some(holder);
            reservations.held = Some(Hold { kind, host });
            assert_eq!(may(&reservations), expected, "{kind:?}");
        }
    }
}
