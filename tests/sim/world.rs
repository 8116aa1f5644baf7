//! One seed: a pod on simulated devices, hosts that read and write, faults, crashes, restarts.

use std::cell::Cell;
use std::cell::RefCell;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use futures_util::future::Either;
use futures_util::future::select;
use weft::device::sim::SimDisk;
use weft::device::sim::SimFaults;
use weft::device::sim::SimProfile;
use weft::env::EnvRef;
use weft::env::Rng;
use weft::env::sim::Choose;
use weft::env::sim::SeededRng;
use weft::env::sim::SimEnv;
use weft::error::Error;
use weft::volume::VolumeDirectory;
use weft::volume::ZeroMode;
use weft::volume::pod::FormatOptions;
use weft::volume::pod::OpenOptions;
use weft::volume::pod::Pod;
use weft::volume::pod::VolumeSpec;

use crate::host::Host;
use crate::host::Outcome;
use crate::host::read_sectors;
use crate::model::Model;
use crate::script::Script;
use crate::scrub::scrub_now_and_then;
use crate::scrub::scrubs;
use crate::side::Sides;
use crate::swarm::Swarm;

/// Bytes of the volume.
pub const VOLUME_BYTES: u64 = 64 << 30;
/// Sectors that are read at once.
const READ_SECTORS: u64 = 128;
/// One life of the pod takes at most this long, in virtual time.
pub const LIFE_MAX: Duration = Duration::from_secs(900);
/// After trims a full pod must take writes again within this time.
const ROOM_MAX: Duration = Duration::from_secs(60);
/// A device that was given a batch of the journal takes it within this time, or is out of service.
const COPY_MAX: Duration = Duration::from_secs(12);
/// A seed under way.
pub struct World {
    pub seed: u64,
    pub rng: Rc<SeededRng>,
    pub env: Arc<SimEnv>,
    pub swarm: Rc<Swarm>,
    /// What the lives are, unless chance decides.
    script: Option<Script>,
    pub disks: Vec<SimDisk>,
    /// Which devices are attached.
    pub attached: RefCell<Vec<bool>>,
    /// The pod's UUID.
    pub pod: Cell<uuid::Uuid>,
    pub model: Rc<RefCell<Model>>,
    sides: Rc<Sides>,
    pub failure: Failure,
    /// The pod is being closed: requests may be refused for that.
    closing: Rc<Cell<bool>>,
    /// Where hosts that fill the pod go on.
    cursor: Rc<Cell<u64>>,
    /// Hosts give up some reads and writes.
    impatient: bool,
    /// What chooses which bytes of faulty devices cannot be read, in seeds where there are any.
    bad_areas: Option<SeededRng>,
    /// Pods are scrubbed, at any time.
    scrubs: bool,
    /// After a crash that split the pod: in how many lives the faulty devices are away.
    split: Cell<Option<u32>>,
    /// A split is being played out in this life: little is written.
    quiet: Cell<bool>,
}

/// Chance that always says the same.
pub struct Fixed(u64);

impl Rng for Fixed {
    fn random_u64(&self) -> u64 {
        self.0
    }
}

/// For [`SimDisk::crash`]: nothing that is not durable survives.
pub const LOSE_ALL: Fixed = Fixed(0);
/// For [`SimDisk::crash`]: everything survives.
const KEEP_ALL: Fixed = Fixed(1 << 62 | 1);

/// The first thing a host found wrong.
pub type Failure = Rc<RefCell<Option<String>>>;

/// How a life ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    /// Power loss.
    Crash,
    /// `kill -9`.
    Kill,
    /// A clean stop.
    Close,
}

pub fn text(error: &Error) -> String {
    error.chain()
}

impl World {
    pub fn new(seed: u64) -> Self {
        let rng = SeededRng::new(seed);
        let mut swarm = Swarm::draw(seed, &rng);
        let script = Script::draw(seed);
        script.into_iter().for_each(|script| swarm.suit(script, &rng));
        let disks: Vec<SimDisk> = (0..swarm.devices)
            .map(|index| {
                let mut profile = SimProfile::new(swarm.device_bytes);
                profile.sector_bytes = swarm.sector_bytes;
                profile.latency_max = profile.latency_min + swarm.latency_max;
                SimDisk::new(format!("disk-{index}"), profile)
            })
            .collect();
        let env = SimEnv::new(seed);
        env.set_pauses(swarm.pause_ppm, swarm.pause_max);
        Self {
            seed,
            rng: Rc::new(rng),
            env,
            attached: RefCell::new(vec![true; disks.len()]),
            disks,
            pod: Cell::default(),
            model: Rc::new(RefCell::new(Model::new(
                swarm.sectors(),
                swarm.noise,
                swarm.write_cache,
            ))),
            swarm: Rc::new(swarm),
            script,
            sides: Rc::default(),
            failure: Rc::default(),
            closing: Rc::default(),
            cursor: Rc::default(),
            // Not of `rng`, so that the other seeds stay what they were.
            impatient: SeededRng::new(!seed).chance(200_000),
            bad_areas: {
                let rng = SeededRng::new(seed.rotate_left(40));
                rng.chance(250_000).then_some(rng)
            },
            scrubs: scrubs(seed),
            split: Cell::default(),
            quiet: Cell::default(),
        }
    }

    pub fn all_lives(&self) -> Result<(), String> {
        self.create()?;
        match self.script {
            Some(script) => self.play(script).map_err(|what| format!("{script:?}: {what}"))?,
            None => {
                for life in 0..self.swarm.lives {
                    self.live(life).map_err(|what| format!("life {life}: {what}"))?;
                }
            }
        }
        let beyond = self.beyond_the_contract().map_err(|what| format!("beyond: {what}"))?;
        if beyond.is_continue() {
            // A last, quiet life: everything must be there.
            self.quiet_life().map_err(|what| format!("last life: {what}"))?;
            if self.scrubs {
                self.scrubbed_lives().map_err(|what| format!("scrubbed: {what}"))?;
            }
        }
        Ok(())
    }

    pub fn process(&self) -> (Arc<SimEnv>, EnvRef) {
        let process = self.env.process();
        let env: EnvRef = process.clone();
        (process, env)
    }

    pub fn chance(&self, percent: u32) -> bool {
        self.rng.chance(percent * 10_000)
    }

    fn create(&self) -> Result<(), String> {
        let (process, env) = self.process();
        let options = FormatOptions {
            data_strips: self.swarm.data,
            parity_strips: self.swarm.parity,
            journal_bytes: self.swarm.journal_bytes,
        };
        let result = process.run_for(LIFE_MAX, async {
            let devices: Vec<_> = self.disks.iter().map(|disk| disk.open(&env)).collect();
            let pod = Pod::format(&env, &devices, &options).await.map_err(|e| text(&e))?;
            self.pod.set(pod);
            let pod = self.open(&env).await.map_err(|e| text(&e))?;
            let spec = VolumeSpec {
                name: "v".into(),
                size_bytes: VOLUME_BYTES,
                logical_block_bytes: 512,
                read_only: false,
                write_cache: self.swarm.write_cache,
            };
            pod.create_volume(spec).await.map(drop).map_err(|e| text(&e))
        });
        process.halt();
        self.disks.iter().for_each(|disk| disk.crash(&*self.rng));
        result.map_err(|stalled| format!("create: {stalled}"))?
    }

    pub async fn open(&self, env: &EnvRef) -> weft::error::Result<Arc<Pod>> {
        let options = OpenOptions {
            cache_bytes: self.swarm.cache_bytes,
            map_cache_bytes: self.swarm.map_cache_bytes,
            force: false,
            replace_missing: false,
        };
        let attached = self.attached.borrow().clone();
        let devices =
            self.disks.iter().zip(attached).map(|(disk, there)| there.then(|| disk.open(env)));
        Pod::open(Arc::clone(env), devices.collect(), options).await
    }

    fn live(&self, life: usize) -> Result<(), String> {
        self.break_things();
        self.closing.set(false);
        let (process, env) = self.process();
        let end = [End::Crash, End::Crash, End::Kill, End::Close][self.rng.below(4) as usize];
        let cut_open = self.swarm.cut_opens && self.chance(30);
        let open_limit = Duration::from_micros(self.rng.below(100_000));
        let result = process.run_for(LIFE_MAX, async {
            let body = std::pin::pin!(self.life(&env, end));
            if !cut_open {
                return body.await;
            }
            match select(body, env.sleep(open_limit)).await {
                Either::Left((outcome, _)) => outcome,
                Either::Right(((), _)) => Ok(()),
            }
        });
        process.halt();
        match end {
            End::Crash => self.lose_power(),
            End::Kill | End::Close => self.disks.iter().for_each(|disk| disk.kill(&*self.rng)),
        }
        self.env.trace(life as u64);
        if let Some(failure) = self.failure.borrow_mut().take() {
            return Err(failure);
        }
        result.map_err(|stalled| format!("no progress: {stalled}"))?
    }

    /// Power loss. Sometimes all devices lose what they may, or keep it. Sometimes it splits the pod:
    /// the last writes are on the faulty devices only, which then are away in the next life or the
    /// one after.
    fn lose_power(&self) {
        match self.rng.below(10) {
            0..=2 if !self.swarm.faulty.is_empty() => {
                self.split_pod();
                self.split.set(Some(u32::from(self.chance(50))));
            }
            3..=4 => self.disks.iter().for_each(|disk| disk.crash(&LOSE_ALL)),
            5 => self.disks.iter().for_each(|disk| disk.crash(&KEEP_ALL)),
            _ => self.disks.iter().for_each(|disk| disk.crash(&*self.rng)),
        }
    }

    /// Power loss that leaves the last writes on the faulty devices only.
    pub fn split_pod(&self) {
        for (index, disk) in self.disks.iter().enumerate() {
            let faulty = self.swarm.faulty.contains(&index);
            disk.crash(if faulty { &KEEP_ALL } else { &LOSE_ALL });
        }
    }

    async fn life(&self, env: &EnvRef, end: End) -> Result<(), String> {
        let pod = self.open(env).await.map_err(|e| text(&e))?;
        self.read_all(&pod, true).await?;
        self.model.borrow_mut().end_of_life();
        self.sides.settle(&pod).await?;
        if self.chance(if self.quiet.get() { 60 } else { 10 }) {
            return Ok(()); // Nothing is written at all.
        }
        let hosts = self.start_hosts(env, &pod);
        if self.chance(60) {
            env.sleep(Duration::from_micros(self.rng.below(1000 << self.rng.below(13)))).await;
            if end == End::Close {
                self.closing.set(true);
                return pod.close().await.map_err(|e| text(&e));
            }
            return Ok(());
        }
        hosts.await;
        self.read_all(&pod, false).await?;
        self.check_good_devices(&pod)?;
        self.check_copies_end(env, &pod).await?;
        if self.swarm.full {
            self.make_room(env, &pod).await?;
        }
        if end == End::Close {
            pod.close().await.map_err(|e| text(&e))?;
        }
        Ok(())
    }

    /// With nothing being written, no device owes a copy of a batch for long.
    async fn check_copies_end(&self, env: &EnvRef, pod: &Pod) -> Result<(), String> {
        let begun = env.now();
        while pod.late_journal_copies() > 0 {
            if env.now().saturating_sub(begun) > COPY_MAX {
                return Err(format!("{} late copies never end", pod.late_journal_copies()));
            }
            env.sleep(Duration::from_millis(100)).await;
        }
        Ok(())
    }

    /// Trims all there is; then writes must be taken again.
    async fn make_room(&self, env: &EnvRef, pod: &Arc<Pod>) -> Result<(), String> {
        let host = self.host(pod, 0);
        host.zero_sectors(0, self.swarm.sectors(), ZeroMode::Deallocate).await?;
        let sectors = READ_SECTORS.min(self.swarm.window_sectors);
        let begun = env.now();
        for window in 0..self.swarm.windows {
            while host.write_sectors(window * self.swarm.window_sectors, sectors).await?
                == Outcome::Full
            {
                if env.now().saturating_sub(begun) > ROOM_MAX {
                    let status = pod.status();
                    return Err(format!("the pod was trimmed and is still full: {status:?}"));
                }
                env.sleep(Duration::from_millis(100)).await;
            }
        }
        Ok(())
    }

    /// Ends all faults.
    pub fn repair(&self) {
        self.attached.borrow_mut().fill(true);
        for disk in &self.disks {
            disk.set_faults(SimFaults::default());
            disk.release();
        }
    }

    fn quiet_life(&self) -> Result<(), String> {
        self.repair();
        let (process, env) = self.process();
        let result = process.run_for(LIFE_MAX, async {
            let pod = self.open(&env).await.map_err(|e| text(&e))?;
            self.read_all(&pod, true).await?;
            self.sides.settle(&pod).await?;
            self.check_good_devices(&pod)?;
            pod.close().await.map_err(|e| text(&e))
        });
        process.halt();
        result.map_err(|stalled| format!("no progress: {stalled}"))?
    }

    /// New faults for the faulty devices, and none for the others.
    fn break_things(&self) {
        self.repair();
        let away = self.split.get() == Some(0);
        self.quiet.set(self.split.get().is_some());
        self.split.set(self.split.get().and_then(|lives| lives.checked_sub(1)));
        let slow_area = self.swarm.draw_slow_area(&self.rng);
        for disk in &self.disks {
            disk.set_faults(slow_area.clone());
        }
        for index in &self.swarm.faulty {
            let disk = &self.disks[*index];
            let mut faults = self.swarm.draw_faults(&self.rng, slow_area.clone());
            faults.bad_area = self.bad_areas.as_ref().map_or(0..0, |r| self.swarm.draw_bad_area(r));
            disk.set_faults(faults);
            if away || (self.swarm.faults.absent && self.chance(40)) {
                self.attached.borrow_mut()[*index] = false;
            }
            if self.swarm.faults.rot {
                self.rot(disk);
            }
        }
    }

    /// Flips bits, mostly where something is stored.
    pub fn rot(&self, disk: &SimDisk) {
        let places = self.rng.below(if self.chance(30) { 300 } else { 20 });
        for _ in 0..places {
            let stored = if self.chance(75) { disk.stored_page(&*self.rng) } else { None };
            match stored {
                Some(page) => disk.rot(page, 4096, &*self.rng),
                None => {
                    disk.rot(self.rng.below(self.swarm.device_bytes - 65536), 65536, &*self.rng);
                }
            }
        }
    }

    fn host(&self, pod: &Arc<Pod>, number: u64) -> Host {
        let seed = self.seed ^ (number + 1) << 32 ^ self.rng.below(u64::MAX);
        Host {
            rng: SeededRng::new(seed),
            patience: None,
            volume: pod.find("v").expect("created"),
            swarm: Rc::clone(&self.swarm),
            model: Rc::clone(&self.model),
            failure: Rc::clone(&self.failure),
            closing: Rc::clone(&self.closing),
            cursor: Rc::clone(&self.cursor),
        }
    }

    /// Starts the hosts; the future completes when all have done their operations.
    pub fn start_hosts(&self, env: &EnvRef, pod: &Arc<Pod>) -> impl Future<Output = ()> + use<> {
        let (done, mut all_done) = tokio::sync::mpsc::channel::<()>(1);
        for number in 0..self.swarm.hosts {
            let mut host = self.host(pod, number as u64);
            host.patience = self.impatient.then(|| Arc::clone(env));
            let done = done.clone();
            let task_env = Arc::clone(env);
            env.spawn(Box::pin(async move {
                host.work(&task_env).await;
                drop(done);
            }));
        }
        if self.swarm.side_volumes {
            let (sides, failure) = (Rc::clone(&self.sides), Rc::clone(&self.failure));
            let (pod, rng) = (Arc::clone(pod), SeededRng::new(self.rng.below(u64::MAX)));
            let done = done.clone();
            env.spawn(Box::pin(async move {
                if let Err(what) = sides.churn(&pod, &rng, rng.below(8)).await {
                    failure.borrow_mut().get_or_insert(what);
                }
                drop(done);
            }));
        }
        if self.swarm.faults.gone {
            self.lose_devices(env);
        }
        if self.scrubs && self.script.is_none() {
            let (failure, pod, done) = (Rc::clone(&self.failure), Arc::clone(pod), done.clone());
            let (task_env, rng) = (Arc::clone(env), SeededRng::new(self.rng.below(u64::MAX)));
            env.spawn(Box::pin(async move {
                if let Err(what) = scrub_now_and_then(&task_env, &pod, &rng).await {
                    failure.borrow_mut().get_or_insert(what);
                }
                drop(done);
            }));
        }
        drop(done);
        async move {
            let _ = all_done.recv().await;
        }
    }

    /// Some of the faulty devices disappear at some moment.
    fn lose_devices(&self, env: &EnvRef) {
        for index in &self.swarm.faulty {
            let disk = self.disks[*index].clone();
            let after = Duration::from_micros(self.rng.below(200_000));
            let sleep = env.sleep(after);
            env.spawn(Box::pin(async move {
                sleep.await;
                disk.set_faults(SimFaults { gone: true, ..SimFaults::default() });
            }));
        }
    }

    /// Reads everything the hosts use; `settle` makes what is there final.
    pub async fn read_all(&self, pod: &Arc<Pod>, settle: bool) -> Result<(), String> {
        let volume = pod.find("v").ok_or("the volume is gone")?;
        let sectors = READ_SECTORS.min(self.swarm.window_sectors);
        for first in (0..self.swarm.sectors()).step_by(sectors as usize) {
            let begun = self.model.borrow_mut().begin_read();
            let bytes = read_sectors(&volume, self.swarm.offset_of(first), sectors).await;
            let bytes = bytes.map_err(|error| format!("read failed: {}", error.chain()))?;
            let mut model = self.model.borrow_mut();
            if settle {
                model.end_read(begun);
                model.settle(first, &bytes)?;
            } else {
                model.check(begun, first, &bytes)?;
            }
        }
        let status = self.host(pod, 0).check_status(0, VOLUME_BYTES, 16).await;
        status.map_err(|error| format!("block status failed: {}", error.chain()))?
    }

    /// Reads everything: what can be read must be right.
    pub async fn read_what_can_be(&self, pod: &Arc<Pod>) -> Result<(), String> {
        let Some(volume) = pod.find("v") else { return Err("the volume is gone".into()) };
        let sectors = READ_SECTORS.min(self.swarm.window_sectors);
        for first in (0..self.swarm.sectors()).step_by(sectors as usize) {
            let begun = self.model.borrow_mut().begin_read();
            match read_sectors(&volume, self.swarm.offset_of(first), sectors).await {
                Ok(bytes) => self.model.borrow_mut().check(begun, first, &bytes)?,
                Err(_) => self.model.borrow_mut().end_read(begun),
            }
        }
        Ok(())
    }
}
