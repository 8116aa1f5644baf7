//! Writing a rebuilt unit back over its damaged copy.

use super::Pool;
use super::member::Counters;
use super::read::Lease;
use crate::device::Durability;
use crate::format::location::Address;
use crate::format::unit::UNIT_BYTES;
use crate::observe::event;

impl Pool {
    /// Rebuilds the unit that holds `address` from intact units and writes it in place.
    ///
    /// The caller's lease keeps the region from being reused while the write is under way; the
    /// bytes are those that were there before the damage, so readers cannot see a difference.
    /// Returns whether the device took them.
    pub(super) async fn heal_unit(&self, lease: &Lease<'_>, address: Address) -> bool {
        let row = address.byte / UNIT_BYTES as u64;
        let unit = match self.rebuild_unit(lease, address.strip, row).await {
            Ok(unit) => unit,
            Err(error) => {
                let message = format_args!(
                    "segment {}, strip {}, row {row}: {}",
                    lease.segment.0,
                    address.strip,
                    error.chain()
                );
                event::raise(event::DAMAGE_LEFT, "pod", message);
                return false;
            }
        };
        let Some((member, offset)) = self.strip_member(lease, address.strip) else { return false };
        let offset = offset + row * UNIT_BYTES as u64;
        if member.write(offset, unit.freeze(), Durability::Durable).await.is_err() {
            return false;
        }
        Counters::add(&member.counters.healed);
        let message = format_args!("segment {}, row {row} was rebuilt", lease.segment.0);
        event::raise(event::DAMAGE_HEALED, member.name(), message);
        true
    }
}
