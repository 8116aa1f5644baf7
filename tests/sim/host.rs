//! A host of the main volume: reads, writes, trims, asks for block status, and checks each answer.

use std::cell::Cell;
use std::cell::RefCell;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures_util::future::Either;
use futures_util::future::select;
use weft::env::EnvRef;
use weft::env::LocalBoxFuture;
use weft::env::sim::Choose;
use weft::env::sim::SeededRng;
use weft::error::Error;
use weft::error::ErrorKind;
use weft::volume::Extent;
use weft::volume::Piece;
use weft::volume::VolumeRef;
use weft::volume::ZeroMode;

use crate::model::Model;
use crate::model::SECTOR;
use crate::swarm::Load;
use crate::swarm::Swarm;
use crate::world::Failure;
use crate::world::VOLUME_BYTES;

/// A lazy host rests no longer than this in all, so that its life ends in time.
const PAUSES_MAX: Duration = Duration::from_secs(300);

/// Reads as a target does: from RAM if that is possible, else by asking devices.
pub async fn read_sectors(
    volume: &VolumeRef,
    offset: u64,
    sectors: u64,
) -> weft::error::Result<Vec<u8>> {
    let bytes = u32::try_from(sectors * SECTOR as u64).expect("small");
    let mut pieces = Vec::new();
    if !volume.try_read(offset, bytes, &mut pieces)? {
        pieces = Arc::clone(volume).read(offset, bytes).await?;
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

/// What became of a write.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    Done,
    Full,
}

/// A host doing one thing after another.
pub struct Host {
    pub rng: SeededRng,
    /// By what it waits, if it gives some reads and writes up.
    pub patience: Option<EnvRef>,
    pub volume: VolumeRef,
    pub swarm: Rc<Swarm>,
    pub model: Rc<RefCell<Model>>,
    pub failure: Failure,
    /// The pod is being closed: requests may be refused for that.
    pub closing: Rc<Cell<bool>>,
    /// Where hosts that fill the pod go on, in sectors; all of them share it.
    pub cursor: Rc<Cell<u64>>,
}

impl Host {
    pub async fn work(&self, env: &EnvRef) {
        let mut paused = Duration::ZERO;
        for _ in 0..self.swarm.operations {
            if let Err(what) = self.operate().await {
                self.failure.borrow_mut().get_or_insert(what);
                return;
            }
            if self.swarm.lazy && self.rng.chance(20_000) {
                let pause = Duration::from_millis(self.rng.below(40_000));
                if paused < PAUSES_MAX {
                    env.sleep(pause).await;
                    paused += pause;
                }
            }
        }
    }

    /// A range within one window: mostly whole blocks, sometimes single sectors.
    fn range(&self) -> (u64, u64) {
        let window_sectors = self.swarm.window_sectors;
        let window = self.rng.below(self.swarm.windows) * window_sectors;
        let (first, sectors) = match self.swarm.load {
            Load::Hot => {
                let sectors: u64 = [1, 3, 8, 8, 8, 16][self.rng.below(6) as usize];
                (self.rng.below(32), sectors)
            }
            Load::Churn { sectors, places } => (sectors * self.rng.below(places), sectors),
            Load::Mixed | Load::Fill => {
                let sectors = match self.rng.below(10) {
                    0 => 1 + self.rng.below(12),
                    1..=5 => 8,
                    6..=8 => 8 * (1 + self.rng.below(16)),
                    _ => 8 * (1 + self.rng.below(64)),
                };
                let sectors = sectors.min(window_sectors);
                (self.rng.below(window_sectors - sectors + 1), sectors)
            }
        };
        let first = if sectors.is_multiple_of(8) { first / 8 * 8 } else { first };
        match self.swarm.load {
            Load::Hot => (window * self.rng.below(2) + first, sectors),
            Load::Churn { .. } => (first, sectors),
            Load::Mixed | Load::Fill => (window + first, sectors),
        }
    }

    /// The next range of those that together are the whole volume.
    fn next_range(&self) -> (u64, u64) {
        /// The largest write that is all or nothing.
        const FILL_SECTORS: u64 = 128;
        let first = self.cursor.get();
        let all = self.swarm.windows * self.swarm.window_sectors;
        self.cursor.set((first + FILL_SECTORS) % all);
        (first, FILL_SECTORS)
    }

    async fn operate(&self) -> Result<(), String> {
        match self.rng.below(20) {
            0..=9 => {
                let fill = matches!(self.swarm.load, Load::Fill) && self.rng.chance(800_000);
                let (first, sectors) = if fill { self.next_range() } else { self.range() };
                self.write_sectors(first, sectors).await.map(drop)
            }
            10..=11 => self.zero().await,
            12 => self.block_status().await,
            _ => self.read().await,
        }
    }

    pub async fn write_sectors(&self, first: u64, sectors: u64) -> Result<Outcome, String> {
        let id = self.model.borrow_mut().issue(first, sectors, false, sectors <= 128);
        let bytes = Bytes::from(self.model.borrow().bytes(id));
        let offset = self.swarm.offset_of(first);
        let write = self.durably(|volume| volume.write(offset, bytes));
        match self.while_patient(write).await {
            Some(result) => self.acknowledge(id, result),
            None => {
                self.model.borrow_mut().give_up(id);
                Ok(Outcome::Done)
            }
        }
    }

    /// Makes a change that is durable then; with a write cache by FUA or by a flush.
    async fn durably(
        &self,
        change: impl FnOnce(VolumeRef) -> LocalBoxFuture<weft::error::Result<()>>,
    ) -> weft::error::Result<()> {
        let volume = Arc::clone(&self.volume);
        if !self.swarm.write_cache {
            return change(volume).await;
        }
        if self.rng.chance(300_000) {
            return change(volume.write_through()).await;
        }
        change(Arc::clone(&volume)).await?;
        volume.flush().await
    }

    /// What a request comes to; `None` if it was given up, as when the host's connection is lost.
    async fn while_patient<T>(&self, request: impl Future<Output = T>) -> Option<T> {
        let Some(env) = self.patience.as_ref().filter(|_| self.rng.chance(300_000)) else {
            return Some(request.await);
        };
        let patience = Duration::from_micros(self.rng.below(100 << self.rng.below(12)));
        match select(std::pin::pin!(request), env.sleep(patience)).await {
            Either::Left((result, _)) => Some(result),
            Either::Right(_) => None,
        }
    }

    async fn zero(&self) -> Result<(), String> {
        let mode =
            if self.rng.chance(500_000) { ZeroMode::Deallocate } else { ZeroMode::KeepAllocated };
        // Sometimes from somewhere in one window to somewhere in a later one.
        let (first, sectors) = match self.rng.below(10) {
            0 => {
                let sectors = self.swarm.windows * self.swarm.window_sectors;
                let first = self.rng.below(sectors);
                (first, 1 + self.rng.below(sectors - first))
            }
            _ => self.range(),
        };
        self.zero_sectors(first, sectors, mode).await
    }

    pub async fn zero_sectors(
        &self,
        first: u64,
        sectors: u64,
        mode: ZeroMode,
    ) -> Result<(), String> {
        let id = self.model.borrow_mut().issue(first, sectors, true, false);
        let offset = self.swarm.offset_of(first);
        let end = self.swarm.offset_of(first + sectors - 1) + SECTOR as u64;
        let zero = self.durably(|volume| volume.zero(offset, end - offset, mode));
        self.acknowledge(id, zero.await).map(drop)
    }

    fn acknowledge(&self, id: u64, result: weft::error::Result<()>) -> Result<Outcome, String> {
        match result {
            Ok(()) => {
                self.model.borrow_mut().ack(id);
                Ok(Outcome::Done)
            }
            Err(error) if error.kind() == ErrorKind::NoSpace && self.swarm.may_be_full() => {
                Ok(Outcome::Full)
            }
            Err(error) if self.is_closing(&error) => Ok(Outcome::Done),
            Err(error) => Err(format!("write failed: {}", error.chain())),
        }
    }

    fn is_closing(&self, error: &Error) -> bool {
        self.closing.get() && error.kind() == ErrorKind::ShuttingDown
    }

    async fn read(&self) -> Result<(), String> {
        let (first, sectors) = self.range();
        let begun = self.model.borrow_mut().begin_read();
        let read = read_sectors(&self.volume, self.swarm.offset_of(first), sectors);
        match self.while_patient(read).await {
            Some(Ok(bytes)) => self.model.borrow_mut().check(begun, first, &bytes),
            None => {
                self.model.borrow_mut().end_read(begun);
                Ok(())
            }
            Some(Err(error)) => {
                self.model.borrow_mut().end_read(begun);
                if self.is_closing(&error) {
                    return Ok(());
                }
                Err(format!("read failed: {}", error.chain()))
            }
        }
    }

    /// Asks for the status of some range, often across windows.
    async fn block_status(&self) -> Result<(), String> {
        let (first, end) = match self.rng.below(3) {
            0 => (0, VOLUME_BYTES),
            1 => {
                let (first, sectors) = self.range();
                let offset = self.swarm.offset_of(first);
                (offset, offset + sectors * SECTOR as u64)
            }
            _ => {
                let first = self.rng.below(VOLUME_BYTES / SECTOR as u64);
                let sectors = 1 + self.rng.below(VOLUME_BYTES / SECTOR as u64 - first);
                (first * SECTOR as u64, (first + sectors) * SECTOR as u64)
            }
        };
        let extents_max = [1, 2, 7, 1000][self.rng.below(4) as usize];
        match self.check_status(first, end, extents_max).await {
            Ok(outcome) => outcome,
            Err(error) if self.is_closing(&error) => Ok(()),
            Err(error) => Err(format!("block status failed: {}", error.chain())),
        }
    }

    /// Walks `first..end` as a copying host does: nothing that may be other than zero is called
    /// zero.
    ///
    /// # Errors
    /// The volume's; `Ok(Err)` if an answer was wrong.
    pub async fn check_status(
        &self,
        first: u64,
        end: u64,
        extents_max: usize,
    ) -> weft::error::Result<Result<(), String>> {
        let mut at = first;
        while at < end {
            let begun = self.model.borrow_mut().begin_read();
            let volume = Arc::clone(&self.volume);
            let answer = volume.block_status(at, end - at, extents_max).await;
            let extents = match answer {
                Ok(extents) => extents,
                Err(error) => {
                    self.model.borrow_mut().end_read(begun);
                    return Err(error);
                }
            };
            let checked = self.check_extents(begun, at..end, &extents, extents_max);
            self.model.borrow_mut().end_read(begun);
            match checked {
                Ok(next) => at = next,
                Err(what) => return Ok(Err(format!("block status at {at}: {what}"))),
            }
        }
        Ok(Ok(()))
    }

    /// Checks one answer; returns where it ends.
    fn check_extents(
        &self,
        begun: u64,
        asked: std::ops::Range<u64>,
        extents: &[Extent],
        extents_max: usize,
    ) -> Result<u64, String> {
        let kind = |extent: &Extent| (extent.hole, extent.zero);
        let merged = extents.windows(2).all(|pair| kind(&pair[0]) != kind(&pair[1]));
        let mut at = asked.start;
        for extent in extents {
            let end = at + extent.bytes;
            if extent.bytes == 0 || end > asked.end || (extent.hole && !extent.zero) {
                return Err(format!("{extent:?} makes no sense"));
            }
            if extent.zero {
                let model = self.model.borrow();
                let wrong = self.swarm.sectors_in(at..end).find(|s| !model.may_be_zero(begun, *s));
                if let Some(sector) = wrong {
                    return Err(format!("sector {sector} is called zero, and is not"));
                }
            }
            at = end;
        }
        let complete = at == asked.end || extents.len() == extents_max;
        if extents.is_empty() || extents.len() > extents_max || !merged || !complete {
            return Err(format!("{} of {extents_max} extents, up to {at}", extents.len()));
        }
        Ok(at)
    }
}
