//! What comes of an I/O: drawn from the faults in force when it is issued.

use std::ops::Range;
use std::time::Duration;

use super::OneShot;
use super::Shared;
use super::State;
use super::Work;
use crate::env::Rng;
use crate::env::sim::Choose;
use crate::units::bytes_u64;

/// What a pod writes as one piece is often this long and lies on a multiple of it.
const UNIT_BYTES: u64 = 64 << 10;

fn overlaps(offset: u64, length: usize, area: &Range<u64>) -> bool {
    offset < area.end && area.start < offset + bytes_u64(length)
}

fn drawn_up_to(most: Duration, rng: &dyn Rng) -> Duration {
    let most = u64::try_from(most.as_nanos()).unwrap_or(u64::MAX - 1);
    Duration::from_nanos(rng.below(most + 1))
}

/// What will come of an I/O, drawn when it is issued.
pub(super) enum Verdict {
    Good,
    /// Fails; the number seeds what becomes of the data.
    Fails(u64),
    Lost,
    Misdirected(u64),
}

impl State {
    /// Takes the first one-shot fault that `fits` an I/O at `offset`.
    fn one_shot(&mut self, offset: u64, fits: impl Fn(OneShot) -> bool) -> Option<OneShot> {
        let fits =
            |(fault, offsets): &(OneShot, Range<u64>)| offsets.contains(&offset) && fits(*fault);
        let index = self.one_shots.iter().position(fits)?;
        Some(self.one_shots.remove(index).0)
    }

    /// Draws what will come of an I/O.
    pub(super) fn judge(
        &mut self,
        offset: u64,
        work: &Work,
        disk: &Shared,
        rng: &dyn Rng,
    ) -> Verdict {
        let faults = self.faults.clone();
        let (error, error_ppm) = match work {
            Work::Read(_) => (OneShot::ReadError, faults.read_error_ppm),
            Work::Write { .. } => (OneShot::WriteError, faults.write_error_ppm),
            Work::Flush { .. } => (OneShot::FlushError, faults.flush_error_ppm),
            Work::Discard { .. } => return Verdict::Good,
        };
        let bad = matches!(work, Work::Read(buf) if overlaps(offset, buf.len(), &faults.bad_area));
        if bad || self.one_shot(offset, |fault| fault == error).is_some() || rng.chance(error_ppm) {
            return Verdict::Fails(rng.random_u64());
        }
        let Work::Write { data, .. } = work else { return Verdict::Good };
        let shot = self.one_shot(offset, |fault| {
            matches!(fault, OneShot::LostWrite | OneShot::MisdirectedWrite)
        });
        let forgotten = faults.lost_area.contains(&offset);
        if shot == Some(OneShot::LostWrite) || forgotten || rng.chance(faults.lost_write_ppm) {
            self.counters.lost_writes += 1;
            return Verdict::Lost;
        }
        let room = (disk.profile.len_bytes - bytes_u64(data.len())) / disk.profile.sector_bytes;
        let misdirected = shot.is_some() || rng.chance(faults.misdirected_write_ppm);
        if misdirected && room > 0 {
            self.counters.misdirected_writes += 1;
            // Near its place most of the time: that is where other data lies on a sparse disk.
            let step = disk.profile.sector_bytes;
            let place = offset / step;
            let by = match rng.below(4) {
                0 => 8 * (1 + rng.below(16)),
                1 => rng.below(room) + 1,
                // By whole units, forth or back: to where another one is expected.
                2 => UNIT_BYTES / step * (1 + rng.below(8)),
                _ => (room + 1).saturating_sub(UNIT_BYTES / step * (1 + rng.below(8))),
            };
            let wrong = (place + by) % (room + 1);
            let wrong = if wrong == place { (place + 1) % (room + 1) } else { wrong };
            return Verdict::Misdirected(wrong * step);
        }
        Verdict::Good
    }

    /// Draws how long an I/O takes; `None` if it hangs.
    pub(super) fn latency(
        &mut self,
        offset: u64,
        work: &Work,
        disk: &Shared,
        rng: &dyn Rng,
    ) -> Option<Duration> {
        let shot = self.one_shot(offset, |fault| matches!(fault, OneShot::Hang | OneShot::Slow(_)));
        if shot == Some(OneShot::Hang) || rng.chance(self.faults.hang_ppm) {
            self.counters.hangs += 1;
            return None;
        }
        let drawn = drawn_up_to(disk.profile.latency_max - disk.profile.latency_min, rng);
        let faults = &self.faults;
        let mut latency = disk.profile.latency_min + drawn + faults.always_slow_by;
        if faults.slow_area.contains(&offset) {
            latency += faults.slow_area_by;
        }
        if matches!(work, Work::Write { .. })
            && faults.stall_area.contains(&offset)
            && rng.chance(faults.stall_ppm)
        {
            latency += drawn_up_to(faults.stall_max, rng);
        }
        if let Some(OneShot::Slow(by)) = shot {
            self.counters.slowed += 1;
            latency += by;
        } else if rng.chance(faults.slow_ppm) {
            self.counters.slowed += 1;
            latency += faults.slow_by;
        } else if matches!(work, Work::Read(_)) && rng.chance(faults.slow_read_ppm) {
            self.counters.slowed += 1;
            latency += faults.slow_read_by;
        }
        Some(latency)
    }
}
