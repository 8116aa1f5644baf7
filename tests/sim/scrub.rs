//! Scrubs: beside everything else that goes on, and alone on a pod that is damaged as far as may be.
//!
//! What must hold: a scrub ends; it finds nothing on devices that do not misbehave; and what it
//! calls healed is healed, so that afterwards any m other devices may be lost.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use weft::device::sim::SimFaults;
use weft::env::EnvRef;
use weft::env::sim::Choose;
use weft::env::sim::SeededRng;
use weft::error::ErrorKind;
use weft::format::PodId;
use weft::format::superblock::SLOT_OFFSETS;
use weft::format::superblock::SUPERBLOCK_BYTES;
use weft::format::superblock::Superblock;
use weft::format::unit::UNIT_BYTES;
use weft::format::unit::UnitHeader;
use weft::pool::scrub::UnitPlace;
use weft::volume::pod::Pod;
use weft_api::Task;
use weft_api::TaskState;

use crate::world::LIFE_MAX;
use crate::world::World;
use crate::world::text;

/// A rate that is no limit.
const NO_LIMIT: u64 = 1 << 40;
/// How often a scrub is looked at.
const LOOK_EVERY: Duration = Duration::from_millis(5);
/// Rows are mapped within this time once they are written: devices are done within milliseconds.
const SETTLE: Duration = Duration::from_secs(1);
/// Redundancy is back within this time, if there is room.
const REBUILD_MAX: Duration = Duration::from_secs(60);

/// Whether pods of a seed are scrubbed. Not drawn from its own chance, so that the others stay what
/// they were; no seed of `seeds.txt` of before there were scrubs ends in these digits.
pub fn scrubs(seed: u64) -> bool {
    matches!(seed % 10, 0 | 3 | 6)
}

/// Starts a few scrubs, one after the other, at any moment and at any rate; cancels some.
pub async fn scrub_now_and_then(
    env: &EnvRef,
    pod: &Arc<Pod>,
    rng: &SeededRng,
) -> Result<(), String> {
    for _ in 0..1 + rng.below(3) {
        env.sleep(Duration::from_micros(rng.below(1000 << rng.below(9)))).await;
        let rate = if rng.chance(700_000) { NO_LIMIT } else { 8 << 20 };
        let started = match pod.start_scrub(rate) {
            Ok(task) => task,
            Err(error) if error.kind() == ErrorKind::ShuttingDown => return Ok(()),
            Err(error) => return Err(format!("start a scrub: {}", error.chain())),
        };
        match pod.start_scrub(rate).map_err(|error| error.kind()) {
            Err(ErrorKind::Busy | ErrorKind::ShuttingDown) => {}
            other => return Err(format!("a second scrub at once: {other:?}")),
        }
        if rng.chance(150_000) {
            env.sleep(Duration::from_micros(rng.below(100_000))).await;
            // It may have ended already.
            let _ = pod.tasks().cancel(&started.id);
        }
        let ended = end_of(env, pod, &started.id).await?;
        let damage = ended.damage.ok_or("a scrub that says nothing of damage")?;
        if damage.found != damage.healed + damage.left {
            return Err(format!("a scrub's counts do not agree: {ended:?}"));
        }
        if ended.state == TaskState::Done && ended.done != ended.total {
            return Err(format!("a scrub is done before its end: {ended:?}"));
        }
    }
    Ok(())
}

async fn end_of(env: &EnvRef, pod: &Arc<Pod>, id: &str) -> Result<Task, String> {
    loop {
        let task = pod.tasks().find(id).map_err(|error| text(&error))?;
        match task.state {
            TaskState::Running => env.sleep(LOOK_EVERY).await,
            TaskState::Done | TaskState::Cancelled => return Ok(task),
            TaskState::Failed | TaskState::Unknown => {
                return Err(format!("a scrub failed: {task:?}"));
            }
        }
    }
}

impl World {
    /// Devices that do not misbehave have nothing that could be found or healed.
    pub fn check_good_devices(&self, pod: &Arc<Pod>) -> Result<(), String> {
        for device in pod.status().devices {
            let good = !self.swarm.faulty.contains(&device.index);
            if good && (device.checksum_errors > 0 || device.healed > 0) {
                return Err(format!("damage on a device without faults: {device:?}"));
            }
        }
        Ok(())
    }

    /// Damages the faulty devices of the open pod, and scrubs it; then others may be lost.
    pub fn scrubbed_lives(&self) -> Result<(), String> {
        self.repair();
        let (process, env) = self.process();
        let result = process.run_for(LIFE_MAX, async {
            let pod = self.open(&env).await.map_err(|error| text(&error))?;
            self.damage_at_rest();
            // It may have hit rows that no map names yet: a scrub plans only for what is live when it
            // begins.
            env.sleep(SETTLE).await;
            if self.chance(40) {
                self.scrub_forgetful_devices(&env, &pod).await?;
                // The same of rows written meanwhile, and lost.
                env.sleep(SETTLE).await;
            }
            self.scrub_all(&env, &pod).await?;
            self.check_superblocks(&pod)?;
            self.check_good_devices(&pod)?;
            let begun = env.now();
            while pod.status().can_lose < self.swarm.parity
                && env.now().saturating_sub(begun) < REBUILD_MAX
            {
                env.sleep(Duration::from_millis(500)).await;
            }
            let status = pod.status();
            let whole = status.can_lose == self.swarm.parity;
            // One that lost both its superblocks stays out.
            let all_serve = status.devices.iter().all(|device| device.state == "in service");
            if !whole && all_serve && !self.swarm.may_be_full() {
                return Err(format!("redundancy does not come back: {status:?}"));
            }
            // A close writes the checkpoint anew, damaged parts of the old one and all.
            if self.seed % 20 < 10 {
                pod.close().await.map_err(|error| text(&error))?;
            }
            Ok::<bool, String>(whole)
        });
        process.halt();
        let whole = result.map_err(|stalled| format!("no progress: {stalled}"))??;
        if whole { self.lose_others() } else { Ok(()) }
    }

    /// Rot in units, superblocks and all else that is stored, on the faulty devices.
    fn damage_at_rest(&self) {
        for index in &self.swarm.faulty {
            let disk = &self.disks[*index];
            self.rot(disk);
            for slot in SLOT_OFFSETS {
                if self.chance(30) {
                    disk.rot(slot, SUPERBLOCK_BYTES as u64, &*self.rng);
                }
            }
        }
    }

    /// Devices forget some of what a scrub writes back: it must not call that healed.
    async fn scrub_forgetful_devices(&self, env: &EnvRef, pod: &Arc<Pod>) -> Result<(), String> {
        let lost_write_ppm = 400_000;
        for index in &self.swarm.faulty {
            let faults = SimFaults { lost_write_ppm, ..SimFaults::default() };
            self.disks[*index].set_faults(faults);
        }
        let before: BTreeSet<UnitPlace> = pod.live_units().into_iter().collect();
        let started = pod.start_scrub(NO_LIMIT).map_err(|error| text(&error))?;
        let ended = end_of(env, pod, &started.id).await?;
        if ended.damage.is_some_and(|damage| damage.left == 0) {
            // What the mapper wrote meanwhile may be lost too.
            let mut units = pod.live_units();
            units.retain(|unit| before.contains(unit));
            self.check_units(&units).map_err(|what| format!("{what} after {ended:?}"))?;
        }
        self.repair();
        Ok(())
    }

    /// With at most m damaged units in a row a scrub heals them all.
    async fn scrub_all(&self, env: &EnvRef, pod: &Arc<Pod>) -> Result<(), String> {
        let started = pod.start_scrub(NO_LIMIT).map_err(|error| text(&error))?;
        let ended = end_of(env, pod, &started.id).await?;
        if !ended.succeeded() {
            return Err(format!("a scrub did not heal everything: {ended:?}"));
        }
        self.check_units(&pod.live_units()).map_err(|what| format!("{what} after {ended:?}"))
    }

    /// Looks at the devices themselves.
    fn check_units(&self, units: &[UnitPlace]) -> Result<(), String> {
        let id = PodId(*self.pod.get().as_bytes());
        let mut bytes = vec![0; UNIT_BYTES];
        for unit in units {
            self.disks[unit.device].peek(unit.offset, &mut bytes);
            let UnitPlace { segment, strip, row, .. } = *unit;
            if let Err(error) = UnitHeader::decode(&bytes, id, segment, strip, row) {
                return Err(format!("{unit:?} does not verify ({error:?})"));
            }
        }
        Ok(())
    }

    /// A device that lost both before it was opened is not in service.
    fn check_superblocks(&self, pod: &Arc<Pod>) -> Result<(), String> {
        let devices = pod.status().devices;
        for device in devices.iter().filter(|device| device.state == "in service") {
            let (index, disk) = (device.index, &self.disks[device.index]);
            for offset in SLOT_OFFSETS {
                let mut bytes = [0; SUPERBLOCK_BYTES];
                disk.peek(offset, &mut bytes);
                if let Err(error) = Superblock::decode(&bytes) {
                    return Err(format!("device {index}: superblock at {offset}: {error:?}"));
                }
            }
        }
        Ok(())
    }

    /// A life without any m of the devices that were not damaged before the scrub.
    fn lose_others(&self) -> Result<(), String> {
        let mut others: Vec<usize> = (0..self.swarm.devices).collect();
        others.retain(|index| !self.swarm.faulty.contains(index));
        let turn = self.rng.below(others.len() as u64) as usize;
        others.rotate_left(turn);
        others.truncate(self.swarm.parity);
        others.iter().for_each(|index| self.attached.borrow_mut()[*index] = false);
        let (process, env) = self.process();
        let result = process.run_for(LIFE_MAX, async {
            let pod = self.open(&env).await.map_err(|error| text(&error))?;
            self.read_all(&pod, true).await
        });
        process.halt();
        let outcome = result.map_err(|stalled| format!("no progress: {stalled}"))?;
        outcome.map_err(|what| format!("without {others:?}: {what}"))
    }
}
