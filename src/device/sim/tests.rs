//! What the simulated disk promises, by name.

use super::*;

use crate::env::Clock;
use crate::env::sim::SimEnv;
use crate::env::sim::Stalled;

const ANYWHERE: Range<u64> = 0..u64::MAX;

struct Lab {
    env: Arc<SimEnv>,
    disk: SimDisk,
    device: DeviceRef,
}

fn lab(seed: u64) -> Lab {
    let env = SimEnv::new(seed);
    let disk = SimDisk::new("sim-0", SimProfile::new(1 << 40));
    let env_ref: EnvRef = env.clone();
    let device = disk.open(&env_ref);
    Lab { env, disk, device }
}

fn block(fill: u8) -> Bytes {
    AlignedBuf::padded(&[fill; 4096], 4096).freeze()
}

impl Lab {
    fn write(&self, offset: u64, fill: u8, durability: Durability) -> Result<()> {
        self.env.run(self.device.write(offset, block(fill), durability))
    }

    fn read(&self, offset: u64) -> Result<Vec<u8>> {
        self.env.run(self.device.read(offset, AlignedBuf::zeroed(4096))).map(|buf| buf.to_vec())
    }

    /// The one byte that fills a block, if it is not torn.
    fn fill(&self, offset: u64) -> Option<u8> {
        let bytes = self.read(offset).expect("read");
        bytes.iter().all(|&byte| byte == bytes[0]).then_some(bytes[0])
    }

    fn crash(&self) {
        self.disk.crash(&*self.env);
    }

    fn set(&self, change: impl FnOnce(&mut SimFaults)) {
        let mut faults = SimFaults::default();
        change(&mut faults);
        self.disk.set_faults(faults);
    }
}

#[test]
fn completed_durable_and_flushed_writes_survive_any_crash() {
    for seed in 0..50 {
        let lab = lab(seed);
        lab.write(0, 1, Durability::Durable).expect("write");
        lab.write(4096, 2, Durability::Volatile).expect("write");
        lab.env.run(lab.device.flush()).expect("flush");
        lab.crash();
        assert_eq!((lab.fill(0), lab.fill(4096)), (Some(1), Some(2)), "seed {seed}");
    }
}

#[test]
fn unflushed_write_is_kept_lost_or_torn_by_a_crash() {
    let (mut kept, mut lost, mut torn) = (0, 0, 0);
    for seed in 0..300 {
        let lab = lab(seed);
        lab.write(0, 1, Durability::Volatile).expect("write");
        assert_eq!(lab.fill(0), Some(1));
        lab.crash();
        match lab.fill(0) {
            Some(1) => kept += 1,
            Some(0) => lost += 1,
            _ => torn += 1,
        }
    }
    assert!(kept > 60 && lost > 60 && torn > 10, "{kept} {lost} {torn}");
}

#[test]
fn durable_write_in_flight_may_be_lost_by_a_crash_but_a_later_one_never_undoes_it() {
    let mut fates = BTreeSet::new();
    for seed in 0..100 {
        let lab = lab(seed);
        lab.write(0, 1, Durability::Volatile).expect("write");
        lab.write(0, 2, Durability::Durable).expect("write");
        let in_flight = lab.device.write(4096, block(3), Durability::Durable);
        lab.crash();
        assert!(lab.env.run(in_flight).is_err());
        assert_eq!(lab.fill(0), Some(2), "seed {seed}: an older write came back");
        fates.insert(lab.fill(4096));
    }
    assert_eq!(fates, BTreeSet::from([None, Some(0), Some(3)]));
}

#[test]
fn flush_covers_only_writes_completed_before_it() {
    let mut lost = 0;
    for seed in 0..100 {
        let lab = lab(seed);
        lab.env.run(async {
            let write = lab.device.write(0, block(1), Durability::Volatile);
            // The write is over long before the flush, but not before it starts.
            lab.disk.inject(OneShot::Slow(Duration::from_millis(1)), ANYWHERE);
            let flush = lab.device.flush();
            let (write, flush) = futures_util::future::join(write, flush).await;
            write.and(flush).expect("both complete");
        });
        lab.crash();
        lost += u32::from(lab.fill(0) == Some(0));
    }
    assert!(lost > 10, "{lost}");
}

#[test]
fn killed_process_leaves_completed_writes_and_perhaps_those_in_flight() {
    let mut fates = BTreeSet::new();
    for seed in 0..50 {
        let lab = lab(seed);
        lab.write(0, 1, Durability::Volatile).expect("write");
        drop(lab.device.write(4096, block(2), Durability::Volatile));
        lab.disk.kill(&*lab.env);
        assert_eq!(lab.fill(0), Some(1));
        fates.insert(lab.fill(4096));
    }
    assert!(fates.is_superset(&BTreeSet::from([Some(0), Some(2)])), "{fates:?}");
}

#[test]
fn dropping_a_future_does_not_cancel_the_write() {
    let lab = lab(1);
    drop(lab.device.write(0, block(9), Durability::Durable));
    assert_eq!(lab.disk.in_flight(), 1);
    lab.env.run(lab.env.sleep(Duration::from_millis(1)));
    assert_eq!(lab.fill(0), Some(9));
    assert_eq!(lab.disk.in_flight(), 0);
}

#[test]
fn io_completes_out_of_order() {
    let lab = &lab(2);
    let order = lab.env.run(async {
        let writes = (0..8_u8).map(|index| {
            let write =
                lab.device.write(u64::from(index) * 4096, block(index), Durability::Volatile);
            write.map(move |_| (lab.env.now(), index))
        });
        let mut done = futures_util::future::join_all(writes).await;
        done.sort_unstable();
        done.into_iter().map(|(_, index)| index).collect::<Vec<_>>()
    });
    assert!(!order.is_sorted(), "{order:?}");
}

#[test]
fn read_and_write_errors_are_transient_and_one_shots_hit_once() {
    let lab = lab(3);
    lab.disk.inject(OneShot::ReadError, 4096..8192);
    assert!(lab.read(0).is_ok());
    assert_eq!(lab.read(4096).map_err(|e| e.kind()), Err(ErrorKind::DeviceTransient));
    assert!(lab.read(4096).is_ok());

    lab.set(|faults| faults.write_error_ppm = 1_000_000);
    let result = lab.write(0, 1, Durability::Durable);
    assert_eq!(result.map_err(|e| e.kind()), Err(ErrorKind::DeviceTransient));
    assert_eq!(lab.disk.counters().write_errors, 1);
}

#[test]
fn gone_disk_fails_what_is_issued_and_what_was_in_flight() {
    let lab = lab(4);
    lab.disk.inject(OneShot::Hang, ANYWHERE);
    let hanging = lab.device.read(0, AlignedBuf::zeroed(512));
    lab.set(|faults| faults.gone = true);
    for result in [lab.env.run(hanging).map(|_| ()), lab.write(0, 1, Durability::Durable)] {
        assert_eq!(result.map_err(|e| e.kind()), Err(ErrorKind::DeviceFailed));
    }
    lab.set(|_| ());
    lab.write(0, 1, Durability::Durable).expect("the disk is back");
}

#[test]
fn hung_io_never_completes_until_released() {
    let lab = lab(5);
    let write = lab.device.write(0, block(1), Durability::Durable);
    lab.set(|faults| faults.hung = true);
    let mut write = Box::pin(write);
    assert_eq!(
        lab.env.run_for(Duration::from_secs(60), write.as_mut()).map(|_| ()),
        Err(Stalled::Deadlock)
    );
    lab.disk.release();
    lab.env.run(write).expect("released");
    assert_eq!(lab.fill(0), Some(1));
}

#[test]
fn lost_and_misdirected_writes_are_acknowledged() {
    let lab = lab(6);
    lab.disk.inject(OneShot::LostWrite, ANYWHERE);
    lab.write(0, 1, Durability::Durable).expect("acknowledged");
    assert_eq!((lab.fill(0), lab.disk.allocated_bytes()), (Some(0), 0));

    lab.disk.inject(OneShot::MisdirectedWrite, ANYWHERE);
    lab.write(0, 1, Durability::Durable).expect("acknowledged");
    assert_eq!(lab.fill(0), Some(0));
    assert!(lab.disk.allocated_bytes() > 0);
    let counters = lab.disk.counters();
    assert_eq!((counters.lost_writes, counters.misdirected_writes), (1, 1));
}

#[test]
fn full_disk_takes_overwrites_and_what_a_discard_freed() {
    let lab = lab(7);
    lab.write(0, 1, Durability::Durable).expect("write");
    lab.set(|faults| faults.full = true);
    lab.write(0, 2, Durability::Durable).expect("overwrite");
    let result = lab.write(4096, 1, Durability::Durable);
    assert_eq!(result.map_err(|e| e.kind()), Err(ErrorKind::DeviceFull));
    lab.env.run(lab.device.discard(0, 4096)).expect("discard");
    assert_eq!((lab.fill(0), lab.disk.allocated_bytes()), (Some(0), 0));
}

#[test]
fn rot_flips_bits_in_the_range_only_and_survives_a_crash() {
    let lab = lab(8);
    lab.write(0, 0, Durability::Durable).expect("write");
    lab.disk.rot(512, 512, &*lab.env);
    lab.crash();
    let bytes = lab.read(0).expect("read");
    let flipped: Vec<usize> = (0..4096).filter(|&at| bytes[at] != 0).collect();
    assert!(!flipped.is_empty() && flipped.iter().all(|at| (512..1024).contains(at)));
}

#[test]
fn lying_disk_loses_what_it_called_durable() {
    let mut lost = 0;
    for seed in 0..50 {
        let lab = lab(seed);
        lab.set(|faults| faults.lies_about_flush = true);
        lab.write(0, 1, Durability::Durable).expect("write");
        lab.env.run(lab.device.flush()).expect("flush");
        lab.crash();
        lost += u32::from(lab.fill(0) != Some(1));
    }
    assert!(lost > 10, "{lost}");
}

#[test]
fn flush_that_failed_once_may_succeed_later_without_the_data() {
    let mut lost = 0;
    for seed in 0..100 {
        let lab = lab(seed);
        lab.write(0, 1, Durability::Volatile).expect("write");
        lab.disk.inject(OneShot::FlushError, ANYWHERE);
        assert!(lab.env.run(lab.device.flush()).is_err());
        lab.env.run(lab.device.flush()).expect("the second flush succeeds");
        lab.crash();
        lost += u32::from(lab.fill(0) == Some(0));
    }
    assert!(lost > 20, "{lost}");
}

#[test]
fn past_the_end_is_refused() {
    let lab = lab(9);
    let result = lab.write((1 << 40) - 512, 1, Durability::Durable);
    assert_eq!(result.map_err(|e| e.kind()), Err(ErrorKind::OutOfRange));
}

#[test]
fn one_seed_is_one_run() {
    let run = |seed| {
        let lab = lab(seed);
        lab.set(|faults| (faults.write_error_ppm, faults.slow_ppm) = (100_000, 100_000));
        for index in 0..50 {
            let _ = lab.write(index * 4096, 1, Durability::Volatile);
        }
        lab.crash();
        (lab.env.trace_hash(), lab.disk.counters(), lab.disk.allocated_bytes())
    };
    assert_eq!(run(1), run(1));
    assert_ne!(run(1), run(2));
}
