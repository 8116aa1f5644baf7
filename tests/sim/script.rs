//! Sequences of lives that chance would hardly ever hit upon, for bugs that need several things to
//! come together.

use std::cell::Cell;
use std::time::Duration;

use futures_util::future::Either;
use futures_util::future::select;
use weft::device::sim::SimFaults;
use weft::env::EnvRef;
use weft::env::sim::Choose;
use weft::env::sim::SeededRng;
use weft::format::superblock::JOURNAL_OFFSET;
use weft::format::superblock::SLOT_OFFSETS;
use weft::format::superblock::SUPERBLOCK_BYTES;
use weft::format::superblock::Superblock;

use crate::world::LIFE_MAX;
use crate::world::LOSE_ALL;
use crate::world::World;
use crate::world::text;

/// One seed in this many plays each script, or several times as many.
const ONE_IN: u64 = 30;
/// How often a script looks at the devices.
const LOOK_EVERY: Duration = Duration::from_micros(50);
/// How long it waits for what it wants to see there; then the life goes on to its end.
const LOOK_MAX: Duration = Duration::from_secs(2);

/// What happens in the lives of a seed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Script {
    /// Power is lost when only m devices have the superblock of a checkpoint; they are away while
    /// the others begin the next run, and back when m of the others are away.
    HalfTold,
    /// The last batch is on m devices only; the next run ends when only these have its first
    /// superblock; they are away in the run after it.
    ToldTwice,
    /// In some lives m devices store nothing in segments, so that what is there is of earlier lives.
    Forgetful,
}

impl Script {
    /// The script of a seed, if it has one. Not of the seed's own chance, so that the others stay
    /// what they were.
    pub fn draw(seed: u64) -> Option<Self> {
        match SeededRng::new(seed.rotate_left(20)).below(ONE_IN) {
            0 => Some(Self::HalfTold),
            1 => Some(Self::ToldTwice),
            2..=4 => Some(Self::Forgetful),
            _ => None,
        }
    }
}

impl World {
    pub fn play(&self, script: Script) -> Result<(), String> {
        match script {
            Script::HalfTold => self.half_told(),
            Script::ToldTwice => self.told_twice(),
            Script::Forgetful => self.forgetful(),
        }
    }

    fn half_told(&self) -> Result<(), String> {
        self.slow_down_the_telling();
        self.scripted_life(async |env| {
            let told = async { self.until_only_faulty_are_told(&env).await };
            self.write_until(&env, told).await
        })?;
        self.split_pod();
        self.repair();
        self.detach(&self.swarm.faulty);
        let opened = Cell::new(0);
        self.scripted_life(async |env| {
            let while_written = Duration::from_micros(self.rng.below(40_000));
            let moment = async {
                opened.set(self.newest_generation());
                env.sleep(while_written).await;
            };
            self.write_until(&env, moment).await
        })?;
        self.disks.iter().for_each(|disk| disk.crash(&LOSE_ALL));
        // With a checkpoint made without m devices, the pod can do without no others.
        let checkpointed = self.newest_generation() > opened.get();
        self.repair();
        if !checkpointed {
            let mut others: Vec<usize> = (0..self.swarm.devices).collect();
            others.retain(|index| !self.swarm.faulty.contains(index));
            let turn = self.rng.below(others.len() as u64) as usize;
            others.rotate_left(turn);
            self.detach(&others[..self.swarm.parity]);
        }
        self.life_of_reads()
    }

    fn told_twice(&self) -> Result<(), String> {
        self.repair();
        self.scripted_life(async |env| {
            let moment = env.sleep(Duration::from_micros(self.rng.below(40_000)));
            self.write_until(&env, moment).await
        })?;
        self.split_pod();
        self.slow_down_the_telling();
        self.scripted_life(async |env| {
            let told = std::pin::pin!(self.until_only_faulty_are_told(&env));
            match select(std::pin::pin!(self.open(&env)), told).await {
                Either::Left((opened, _)) => opened.map(drop).map_err(|error| text(&error)),
                Either::Right(((), _)) => Ok(()),
            }
        })?;
        self.split_pod();
        self.repair();
        self.detach(&self.swarm.faulty);
        self.life_of_reads()?;
        self.disks.iter().for_each(|disk| disk.crash(&LOSE_ALL));
        self.repair();
        self.life_of_reads()
    }

    fn forgetful(&self) -> Result<(), String> {
        for life in 0..self.swarm.lives {
            self.repair();
            if life > 0 && self.chance(60) {
                let lost_area = JOURNAL_OFFSET + self.swarm.journal_bytes..self.swarm.device_bytes;
                for index in &self.swarm.faulty {
                    let lost_area = lost_area.clone();
                    self.disks[*index].set_faults(SimFaults { lost_area, ..SimFaults::default() });
                }
            }
            self.scripted_life(async |env| {
                let pod = self.open(&env).await.map_err(|error| text(&error))?;
                self.read_all(&pod, true).await?;
                self.model.borrow_mut().end_of_life();
                let hosts = self.start_hosts(&env, &pod);
                if self.chance(70) {
                    let moment = Duration::from_micros(self.rng.below(2000 << self.rng.below(7)));
                    select(std::pin::pin!(hosts), env.sleep(moment)).await;
                    return Ok(());
                }
                hosts.await;
                self.read_all(&pod, false).await
            })?;
            self.disks.iter().for_each(|disk| disk.crash(&*self.rng));
        }
        Ok(())
    }

    fn scripted_life(
        &self,
        life: impl AsyncFnOnce(EnvRef) -> Result<(), String>,
    ) -> Result<(), String> {
        let (process, env) = self.process();
        let result = process.run_for(LIFE_MAX, life(env));
        process.halt();
        if let Some(failure) = self.failure.borrow_mut().take() {
            return Err(failure);
        }
        result.map_err(|stalled| format!("no progress: {stalled}"))?
    }

    /// Opens the pod and lets hosts write, at once, until `moment` is over. Nothing is settled, so
    /// of what was under way when the last life ended the model goes on to allow either outcome.
    async fn write_until(
        &self,
        env: &EnvRef,
        moment: impl Future<Output = ()>,
    ) -> Result<(), String> {
        let pod = self.open(env).await.map_err(|error| text(&error))?;
        let hosts = self.start_hosts(env, &pod);
        select(std::pin::pin!(hosts), std::pin::pin!(moment)).await;
        Ok(())
    }

    /// A life in which everything is read and nothing written; then the process is killed.
    fn life_of_reads(&self) -> Result<(), String> {
        self.scripted_life(async |env| {
            let pod = self.open(&env).await.map_err(|error| text(&error))?;
            self.read_all(&pod, true).await?;
            self.model.borrow_mut().end_of_life();
            Ok(())
        })?;
        self.disks.iter().for_each(|disk| disk.kill(&*self.rng));
        Ok(())
    }

    fn detach(&self, devices: &[usize]) {
        devices.iter().for_each(|index| self.attached.borrow_mut()[*index] = false);
    }

    /// All devices work, but those that are not faulty are slow to take superblocks.
    fn slow_down_the_telling(&self) {
        self.repair();
        let faults = SimFaults {
            slow_area: 0..JOURNAL_OFFSET,
            slow_area_by: Duration::from_millis(20),
            ..SimFaults::default()
        };
        for (index, disk) in self.disks.iter().enumerate() {
            if !self.swarm.faulty.contains(&index) {
                disk.set_faults(faults.clone());
            }
        }
    }

    async fn until_only_faulty_are_told(&self, env: &EnvRef) {
        let begun = env.now();
        while !self.only_faulty_are_told() && env.now().saturating_sub(begun) < LOOK_MAX {
            env.sleep(LOOK_EVERY).await;
        }
    }

    fn only_faulty_are_told(&self) -> bool {
        let newest = |told: bool| {
            let devices = (0..self.swarm.devices)
                .filter(move |index| self.swarm.faulty.contains(index) == told);
            devices.map(|index| self.generation_on(index))
        };
        newest(true).min() > newest(false).max()
    }

    fn newest_generation(&self) -> u64 {
        (0..self.swarm.devices).map(|index| self.generation_on(index)).max().unwrap_or(0)
    }

    /// The newest generation that a device holds.
    fn generation_on(&self, index: usize) -> u64 {
        let generations = SLOT_OFFSETS.map(|offset| {
            let mut bytes = [0; SUPERBLOCK_BYTES];
            self.disks[index].peek(offset, &mut bytes);
            Superblock::decode(&bytes).map_or(0, |superblock| superblock.generation)
        });
        generations.into_iter().max().unwrap_or(0)
    }
}
