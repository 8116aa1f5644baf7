//! Writing a rebuilt unit back over its damaged copy.
//!
//! A read that met damage is answered first; its unit is healed by a task of its own, which holds
//! the segment until the device is done. A host that gives the read up changes nothing about that.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;

use super::Pool;
use super::member::Counters;
use super::read::Lease;
use crate::device::Durability;
use crate::format::location::Address;
use crate::format::unit::UNIT_BYTES;
use crate::observe::event;
use crate::units::SegmentId;

/// Units healed at once because a read met their damage; a scrub, or a later read, heals the rest.
/// Arbitrary: each needs k + 1 units of memory, and hosts want the devices too.
const HEALS_MAX: usize = 16;
/// How often a closing pod looks whether the last heal is over.
const HEAL_POLL: Duration = Duration::from_millis(1);

/// A unit, by segment, strip and row.
type Unit = (SegmentId, usize, u64);

/// The heals that reads ask for.
#[derive(Default)]
pub(super) struct Heals(Mutex<State>);

#[derive(Default)]
struct State {
    phase: Phase,
    /// Asked for while the pod was being opened.
    waiting: Vec<Address>,
    under_way: BTreeSet<Unit>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Phase {
    /// Nothing may be written before the epoch is durable.
    #[default]
    Opening,
    Open,
    Closed,
}

/// A heal under way, until dropped.
struct Healing {
    pool: Arc<Pool>,
    unit: Unit,
}

impl Healing {
    /// `None` if the unit is being healed already, too many others are, or now is not the time.
    fn begin(pool: &Arc<Pool>, address: Address) -> Option<Self> {
        let unit = (address.segment, address.strip, address.byte / UNIT_BYTES as u64);
        let State { phase, waiting, under_way } = &mut *pool.heals.0.lock();
        match *phase {
            Phase::Opening if waiting.len() < HEALS_MAX => waiting.push(address),
            Phase::Open if under_way.len() < HEALS_MAX && under_way.insert(unit) => {
                return Some(Self { pool: Arc::clone(pool), unit });
            }
            Phase::Opening | Phase::Open | Phase::Closed => {}
        }
        None
    }
}

impl Drop for Healing {
    fn drop(&mut self) {
        self.pool.heals.0.lock().under_way.remove(&self.unit);
    }
}

impl Pool {
    /// Lets heals begin, those first that were asked for before: the pod is open.
    pub fn start_heals(self: &Arc<Self>) {
        let waiting = {
            let mut state = self.heals.0.lock();
            state.phase = Phase::Open;
            std::mem::take(&mut state.waiting)
        };
        waiting.into_iter().for_each(|address| self.heal_later(address));
    }

    /// Has the unit that holds `address` healed in the background.
    pub(super) fn heal_later(self: &Arc<Self>, address: Address) {
        let Some(healing) = Healing::begin(self, address) else { return };
        self.env.spawn(Box::pin(async move {
            // If the segment is gone by now, so is the damage.
            if let Some(lease) = healing.pool.lease(address.segment) {
                healing.pool.heal_unit(&lease, address).await;
            }
        }));
    }

    /// Waits for the heals under way, and lets no other begin: nothing of them is left to be
    /// written when devices are let go.
    pub async fn stop_heals(&self) {
        self.heals.0.lock().phase = Phase::Closed;
        while !self.heals.0.lock().under_way.is_empty() {
            self.env.sleep(HEAL_POLL).await;
        }
    }

    /// Rebuilds the unit that holds `address` from intact units and writes it in place.
    ///
    /// The caller's lease keeps the region from being reused while the write is under way, so the
    /// future must not be dropped before it is over; the bytes are those that were there before the
    /// damage, so readers cannot see a difference. Returns whether the device took them.
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
