//! One seed: a pod on simulated devices, hosts that read and write, faults, crashes, restarts.

use std::cell::RefCell;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use weft::device::sim::SimDisk;
use weft::device::sim::SimFaults;
use weft::device::sim::SimProfile;
use weft::env::EnvRef;
use weft::env::sim::Choose;
use weft::env::sim::SeededRng;
use weft::env::sim::SimEnv;
use weft::error::ErrorKind;
use weft::volume::Piece;
use weft::volume::VolumeDirectory;
use weft::volume::VolumeRef;
use weft::volume::ZeroMode;
use weft::volume::pod::FormatOptions;
use weft::volume::pod::OpenOptions;
use weft::volume::pod::Pod;
use weft::volume::pod::VolumeSpec;

use crate::model::Model;
use crate::model::SECTOR;

/// Sectors the hosts use, in windows spread over a large volume so that maps have depth.
const WINDOW_SECTORS: u64 = 1024;
const WINDOWS: u64 = 4;
const WINDOW_STRIDE_BYTES: u64 = 3 << 30;
const VOLUME_BYTES: u64 = 16 << 30;
/// One life of the pod takes at most this long, in virtual time.
const LIFE_MAX: Duration = Duration::from_secs(600);

/// What a seed draws before it begins.
struct Swarm {
    devices: usize,
    data: usize,
    parity: usize,
    device_bytes: u64,
    hosts: usize,
    operations: usize,
    lives: usize,
    /// Devices that may misbehave, at most m.
    faulty: Vec<usize>,
    read_errors: bool,
    rot: bool,
    lost_writes: bool,
    misdirected: bool,
    slow: bool,
    hang: bool,
    gone: bool,
    latency_max: Duration,
    sector_bytes: u64,
    cache_bytes: u64,
    map_cache_bytes: u64,
}

impl Swarm {
    fn draw(rng: &SeededRng) -> Self {
        let (devices, data, parity) =
            [(6, 4, 2), (3, 2, 1), (5, 2, 2), (7, 3, 2), (3, 1, 1), (6, 3, 1)]
                [rng.below(6) as usize];
        let chance = |percent: u32| rng.chance(percent * 10_000);
        let mut faulty: Vec<usize> = (0..devices).collect();
        for at in 0..devices {
            faulty.swap(at, at + rng.below((devices - at) as u64) as usize);
        }
        faulty.truncate(rng.below(parity as u64 + 1) as usize);
        Self {
            devices,
            data,
            parity,
            device_bytes: (6 + rng.below(20)) << 20,
            hosts: 1 + rng.below(6) as usize,
            operations: 10 + rng.below(120) as usize,
            lives: 2 + rng.below(4) as usize,
            faulty,
            read_errors: chance(30),
            rot: chance(40),
            lost_writes: chance(20),
            misdirected: chance(20),
            slow: chance(20),
            hang: chance(10),
            gone: chance(20),
            latency_max: Duration::from_micros(50 + rng.below(5_000)),
            sector_bytes: if chance(20) { 4096 } else { 512 },
            cache_bytes: if chance(50) { 64 << 10 } else { 8 << 20 },
            map_cache_bytes: if chance(50) { 16 << 10 } else { 8 << 20 },
        }
    }

    fn faults(&self, rng: &SeededRng) -> SimFaults {
        let ppm = |on: bool, most: u64| if on { rng.below(most) as u32 } else { 0 };
        SimFaults {
            read_error_ppm: ppm(self.read_errors, 100_000),
            lost_write_ppm: ppm(self.lost_writes, 50_000),
            misdirected_write_ppm: ppm(self.misdirected, 20_000),
            slow_ppm: ppm(self.slow, 200_000),
            slow_by: Duration::from_millis(1 + rng.below(900)),
            hang_ppm: ppm(self.hang, 5_000),
            ..SimFaults::default()
        }
    }
}

/// A seed under way.
pub struct World {
    seed: u64,
    rng: Rc<SeededRng>,
    env: Arc<SimEnv>,
    swarm: Rc<Swarm>,
    disks: Vec<SimDisk>,
    model: Rc<RefCell<Model>>,
    failure: Rc<RefCell<Option<String>>>,
}

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

fn offset_of(sector: u64) -> u64 {
    sector / WINDOW_SECTORS * WINDOW_STRIDE_BYTES + sector % WINDOW_SECTORS * SECTOR as u64
}

/// Runs one seed; the hash is of everything that happened.
pub fn run(seed: u64) -> Result<u64, String> {
    let rng = SeededRng::new(seed);
    let swarm = Swarm::draw(&rng);
    let env = SimEnv::new(seed);
    let disks = (0..swarm.devices)
        .map(|index| {
            let mut profile = SimProfile::new(swarm.device_bytes);
            profile.sector_bytes = swarm.sector_bytes;
            profile.latency_max = profile.latency_min + swarm.latency_max;
            SimDisk::new(format!("disk-{index}"), profile)
        })
        .collect();
    let world = World {
        seed,
        rng: Rc::new(rng),
        env,
        swarm: Rc::new(swarm),
        disks,
        model: Rc::new(RefCell::new(Model::new(WINDOWS * WINDOW_SECTORS))),
        failure: Rc::default(),
    };
    let outcome = world.all_lives();
    let hash = world.env.trace_hash();
    world.env.halt();
    outcome.map(|()| hash).map_err(|what| format!("seed {}: {what}", world.seed))
}

impl World {
    fn all_lives(&self) -> Result<(), String> {
        self.create()?;
        for life in 0..self.swarm.lives {
            self.live(life).map_err(|what| format!("life {life}: {what}"))?;
        }
        // A last, quiet life: everything must be there.
        self.quiet_life()
    }

    fn process(&self) -> (Arc<SimEnv>, EnvRef) {
        let process = self.env.process();
        let env: EnvRef = process.clone();
        (process, env)
    }

    fn create(&self) -> Result<(), String> {
        let (process, env) = self.process();
        let options = FormatOptions {
            data_strips: self.swarm.data,
            parity_strips: self.swarm.parity,
            journal_bytes: 1 << 20,
        };
        let result = process.run_for(LIFE_MAX, async {
            let devices: Vec<_> = self.disks.iter().map(|disk| disk.open(&env)).collect();
            Pod::format(&env, &devices, &options).await.map_err(|error| error.chain())?;
            let pod = self.open(&env).await?;
            let spec = VolumeSpec {
                name: "v".into(),
                size_bytes: VOLUME_BYTES,
                logical_block_bytes: 512,
                read_only: false,
            };
            pod.create_volume(spec).await.map(drop).map_err(|error| error.chain())
        });
        process.halt();
        self.disks.iter().for_each(|disk| disk.crash(&*self.rng));
        result.map_err(|stalled| format!("create: {stalled}"))?
    }

    async fn open(&self, env: &EnvRef) -> Result<Arc<Pod>, String> {
        let options = OpenOptions {
            cache_bytes: self.swarm.cache_bytes,
            map_cache_bytes: self.swarm.map_cache_bytes,
            force: false,
            replace_missing: false,
        };
        let devices = self.disks.iter().map(|disk| Some(disk.open(env))).collect();
        Pod::open(Arc::clone(env), devices, options).await.map_err(|error| error.chain())
    }

    fn live(&self, life: usize) -> Result<(), String> {
        self.break_things();
        let (process, env) = self.process();
        let end = [End::Crash, End::Crash, End::Kill, End::Close][self.rng.below(4) as usize];
        let cut_short = self.rng.chance(700_000);
        let limit = Duration::from_millis(1 + self.rng.below(3_000));
        let result = process.run_for(LIFE_MAX, async {
            let pod = self.open(&env).await?;
            self.read_all(&pod, true).await?;
            self.model.borrow_mut().end_of_life();
            let hosts = self.start_hosts(&env, &pod);
            if cut_short && end != End::Close {
                env.sleep(limit).await;
                return Ok(());
            }
            hosts.await;
            self.read_all(&pod, false).await?;
            if end == End::Close {
                pod.close().await.map_err(|error| error.chain())?;
            }
            Ok::<(), String>(())
        });
        process.halt();
        match end {
            End::Crash => self.disks.iter().for_each(|disk| disk.crash(&*self.rng)),
            End::Kill | End::Close => self.disks.iter().for_each(|disk| disk.kill(&*self.rng)),
        }
        self.env.trace(life as u64);
        if let Some(failure) = self.failure.borrow_mut().take() {
            return Err(failure);
        }
        result.map_err(|stalled| format!("no progress: {stalled}"))?
    }

    fn quiet_life(&self) -> Result<(), String> {
        for disk in &self.disks {
            disk.set_faults(SimFaults::default());
            disk.release();
        }
        let (process, env) = self.process();
        let result = process.run_for(LIFE_MAX, async {
            let pod = self.open(&env).await?;
            self.read_all(&pod, true).await?;
            pod.close().await.map_err(|error| error.chain())?;
            Ok::<(), String>(())
        });
        process.halt();
        result.map_err(|stalled| format!("last life: {stalled}"))?
    }

    /// New faults for the faulty devices, and none for the others.
    fn break_things(&self) {
        for disk in &self.disks {
            disk.set_faults(SimFaults::default());
            disk.release();
        }
        for index in &self.swarm.faulty {
            let disk = &self.disks[*index];
            disk.set_faults(self.swarm.faults(&self.rng));
            if self.swarm.rot {
                for _ in 0..self.rng.below(20) {
                    let offset = self.rng.below(self.swarm.device_bytes - 65536);
                    disk.rot(offset, 65536, &*self.rng);
                }
            }
        }
    }

    /// Starts the hosts; the future completes when all have done their operations.
    fn start_hosts(&self, env: &EnvRef, pod: &Arc<Pod>) -> impl Future<Output = ()> + use<> {
        let (done, mut all_done) = tokio::sync::mpsc::channel::<()>(1);
        for number in 0..self.swarm.hosts {
            let volume = pod.find("v").expect("created");
            let host = Host {
                rng: SeededRng::new(
                    self.seed ^ (number as u64 + 1) << 32 ^ self.rng.below(u64::MAX),
                ),
                volume,
                model: Rc::clone(&self.model),
                failure: Rc::clone(&self.failure),
            };
            let (done, operations) = (done.clone(), self.swarm.operations);
            env.spawn(Box::pin(async move {
                for _ in 0..operations {
                    host.operate().await;
                }
                drop(done);
            }));
        }
        if self.swarm.gone {
            self.lose_devices(env);
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
    async fn read_all(&self, pod: &Arc<Pod>, settle: bool) -> Result<(), String> {
        let volume = pod.find("v").ok_or("the volume is gone")?;
        for first in (0..WINDOWS * WINDOW_SECTORS).step_by(128) {
            let begun = self.model.borrow_mut().begin_read();
            let bytes = read(&volume, first, 128).await.map_err(|error| error.chain())?;
            let mut model = self.model.borrow_mut();
            if settle {
                model.settle(first, &bytes)?;
            } else {
                model.check(begun, first, &bytes)?;
            }
        }
        Ok(())
    }
}

async fn read(volume: &VolumeRef, first: u64, sectors: u64) -> weft::error::Result<Vec<u8>> {
    let bytes = u32::try_from(sectors * SECTOR as u64).expect("small");
    let mut pieces = Vec::new();
    if !volume.try_read(offset_of(first), bytes, &mut pieces)? {
        pieces = Arc::clone(volume).read(offset_of(first), bytes).await?;
    }
    let mut out = Vec::new();
    for piece in pieces {
        match piece {
            Piece::Zero(length) => out.resize(out.len() + length, 0),
            Piece::Data(data) => out.extend_from_slice(&data),
        }
    }
    Ok(out)
}

/// A host doing one thing after another.
struct Host {
    rng: SeededRng,
    volume: VolumeRef,
    model: Rc<RefCell<Model>>,
    failure: Rc<RefCell<Option<String>>>,
}

impl Host {
    /// A range within one window: mostly whole blocks, sometimes single sectors.
    fn range(&self) -> (u64, u64) {
        let window = self.rng.below(WINDOWS) * WINDOW_SECTORS;
        let sectors = match self.rng.below(10) {
            0 => 1 + self.rng.below(12),
            1..=5 => 8,
            6..=8 => 8 * (1 + self.rng.below(16)),
            _ => 8 * (1 + self.rng.below(64)),
        };
        let first = self.rng.below(WINDOW_SECTORS - sectors + 1);
        let first = if sectors.is_multiple_of(8) { first / 8 * 8 } else { first };
        (window + first, sectors)
    }

    async fn operate(&self) {
        let outcome = match self.rng.below(20) {
            0..=9 => self.write().await,
            10..=11 => self.zero().await,
            _ => self.read().await,
        };
        if let Err(what) = outcome {
            self.failure.borrow_mut().get_or_insert(what);
        }
    }

    async fn write(&self) -> Result<(), String> {
        let (first, sectors) = self.range();
        let id = self.model.borrow_mut().issue(first, sectors, false, sectors <= 128);
        let bytes = Bytes::from(self.model.borrow().bytes(id));
        let result = Arc::clone(&self.volume).write(offset_of(first), bytes).await;
        self.acknowledge(id, result)
    }

    async fn zero(&self) -> Result<(), String> {
        let (first, sectors) = self.range();
        let id = self.model.borrow_mut().issue(first, sectors, true, false);
        let mode =
            if self.rng.chance(500_000) { ZeroMode::Deallocate } else { ZeroMode::KeepAllocated };
        let bytes = sectors * SECTOR as u64;
        let result = Arc::clone(&self.volume).zero(offset_of(first), bytes, mode).await;
        self.acknowledge(id, result)
    }

    fn acknowledge(&self, id: u64, result: weft::error::Result<()>) -> Result<(), String> {
        match result {
            Ok(()) => {
                self.model.borrow_mut().ack(id);
                Ok(())
            }
            Err(error) if error.kind() == ErrorKind::NoSpace => {
                self.model.borrow_mut().refused(id);
                Ok(())
            }
            Err(error) => Err(format!("write failed: {}", error.chain())),
        }
    }

    async fn read(&self) -> Result<(), String> {
        let (first, sectors) = self.range();
        let begun = self.model.borrow_mut().begin_read();
        let bytes = read(&self.volume, first, sectors)
            .await
            .map_err(|error| format!("read failed: {}", error.chain()))?;
        self.model.borrow_mut().check(begun, first, &bytes)
    }
}
