//! What hosts wrote, and what a read may therefore return.
//!
//! The model knows, for every 512-byte sector, which writes covered it and when each was issued
//! and acknowledged. A value may be read unless a write that was issued after that value's
//! acknowledgement has itself been acknowledged before the read began. A value once read counts as
//! acknowledged: a crash must not take it back, unless there is a volatile write cache.

use std::collections::BTreeMap;

/// Bytes per sector of the model.
pub const SECTOR: usize = 512;
/// Not acknowledged.
const NEVER: u64 = u64::MAX;

/// A write, trim or write-zeroes. Zeroing operations all have the same content.
#[derive(Clone, Copy, Debug)]
struct Write {
    issued: u64,
    acked: u64,
    /// When its host gave it up: what is not in the order of writes by then never is.
    given_up: u64,
    zero: bool,
    first: u64,
    sectors: u64,
    atomic: bool,
}

impl Write {
    /// By when it has its place in the order of writes, if it ever has.
    fn ordered(&self) -> u64 {
        self.acked.min(self.given_up)
    }
}

/// The history of one volume.
pub struct Model {
    clock: u64,
    writes: BTreeMap<u64, Write>,
    next_id: u64,
    /// Writes that may still be read, by sector; 0 is "never written".
    sectors: Vec<Vec<u64>>,
    /// Writes that only reads under way may still see, by sector, with when they were superseded.
    retired: Vec<Vec<(u64, u64)>>,
    /// When the reads under way began.
    reading: Vec<u64>,
    /// All content is noise, so that nothing compresses.
    noise: bool,
    /// What is read may be taken back by a crash unless it was acknowledged.
    volatile: bool,
}

/// The content that write `id` gives `sector`: noise first, then one byte repeated, so that it
/// compresses, but not to nothing; some writes are pure noise.
pub fn content(id: u64, sector: u64, noise: bool, out: &mut [u8]) {
    assert_eq!(out.len(), SECTOR);
    let mut state =
        id.wrapping_mul(0x9E37_79B9_7F4A_7C15) ^ sector.wrapping_mul(0xBF58_476D_1CE4_E5B9);
    let noisy = if noise || id.is_multiple_of(4) { SECTOR } else { SECTOR / 4 };
    let (words, rest) = out.split_at_mut(noisy);
    for word in words.chunks_exact_mut(8) {
        state =
            state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        word.copy_from_slice(&(state ^ state >> 29).to_le_bytes());
    }
    rest.fill((id % 251) as u8);
    out[..8].copy_from_slice(&id.to_le_bytes());
    out[8..16].copy_from_slice(&sector.to_le_bytes());
}

impl Model {
    pub fn new(sectors: u64, noise: bool, volatile: bool) -> Self {
        let never_written = Write {
            issued: 0,
            acked: 0,
            given_up: NEVER,
            zero: true,
            first: 0,
            sectors,
            atomic: false,
        };
        Self {
            clock: 1,
            writes: BTreeMap::from([(0, never_written)]),
            next_id: 1,
            sectors: vec![vec![0]; sectors as usize],
            retired: vec![Vec::new(); sectors as usize],
            reading: Vec::new(),
            noise,
            volatile,
        }
    }

    fn tick(&mut self) -> u64 {
        self.clock += 1;
        self.clock
    }

    /// A write is about to be sent. Returns its id.
    pub fn issue(&mut self, first: u64, sectors: u64, zero: bool, atomic: bool) -> u64 {
        let id = self.next_id;
        self.next_id += 1;
        let issued = self.tick();
        self.writes.insert(
            id,
            Write { issued, acked: NEVER, given_up: NEVER, zero, first, sectors, atomic },
        );
        for sector in first..first + sectors {
            self.sectors[sector as usize].push(id);
        }
        id
    }

    /// The bytes of a write.
    pub fn bytes(&self, id: u64) -> Vec<u8> {
        let write = self.writes[&id];
        let mut bytes = vec![0; write.sectors as usize * SECTOR];
        for (at, chunk) in bytes.chunks_mut(SECTOR).enumerate() {
            content(id, write.first + at as u64, self.noise, chunk);
        }
        bytes
    }

    /// A write was acknowledged: what was acknowledged before it was issued is gone.
    pub fn ack(&mut self, id: u64) {
        let now = self.tick();
        let write = self.writes.get_mut(&id).expect("issued");
        write.acked = write.acked.min(now);
        let write = *write;
        let oldest_read = self.reading.iter().copied().min().unwrap_or(now);
        for sector in write.first..write.first + write.sectors {
            let sector = sector as usize;
            let (writes, retired) = (&self.writes, &mut self.retired[sector]);
            retired.retain(|(_, superseded)| *superseded >= oldest_read);
            self.sectors[sector].retain(|other| {
                let stays = *other == id || writes[other].ordered() >= write.issued;
                if !stays && oldest_read < now {
                    retired.push((*other, now));
                }
                stays
            });
        }
    }

    /// The host of a write gave it up: it is there or not, but it comes before what is issued now.
    pub fn give_up(&mut self, id: u64) {
        let now = self.tick();
        self.writes.get_mut(&id).expect("issued").given_up = now;
    }

    /// A read begins; the token is for [`Model::check`].
    pub fn begin_read(&mut self) -> u64 {
        let begun = self.tick();
        self.reading.push(begun);
        begun
    }

    /// A read failed.
    pub fn end_read(&mut self, begun: u64) {
        self.reading.retain(|other| *other != begun);
    }

    /// Checks what a read returned. `candidates` were allowed when it began or came in since.
    pub fn check(&mut self, begun: u64, first: u64, bytes: &[u8]) -> Result<(), String> {
        let outcome = self.check_read(begun, first, bytes);
        self.end_read(begun);
        outcome
    }

    fn check_read(&mut self, begun: u64, first: u64, bytes: &[u8]) -> Result<(), String> {
        let mut seen: Vec<(u64, u64)> = Vec::new();
        for (at, data) in bytes.chunks(SECTOR).enumerate() {
            let sector = first + at as u64;
            seen.push((sector, self.value_of(begun, sector, data)?));
        }
        if bytes.len() <= 64 << 10 {
            self.check_atomic(&seen)?;
        }
        let now = self.tick();
        for (_, id) in &seen {
            let write = self.writes.get_mut(id).expect("known");
            // Of a larger write other parts may still be under way.
            if write.atomic && !self.volatile {
                write.acked = write.acked.min(now);
            }
        }
        Ok(())
    }

    /// Which write `data` is from, if that may be read.
    fn value_of(&self, begun: u64, sector: u64, data: &[u8]) -> Result<u64, String> {
        let id = if data.iter().all(|byte| *byte == 0) {
            None
        } else {
            Some(u64::from_le_bytes(data[..8].try_into().expect("eight bytes")))
        };
        let allowed = self.allowed(begun, sector);
        let found = allowed.iter().copied().find(|candidate| match id {
            None => self.writes[candidate].zero,
            Some(id) => *candidate == id && !self.writes[candidate].zero,
        });
        let Some(found) = found else {
            return Err(format!(
                "sector {sector}: read {}, allowed are {allowed:?}",
                id.map_or("zeroes".into(), |id| format!("write {id}")),
            ));
        };
        if id.is_some() {
            let mut expected = [0; SECTOR];
            content(found, sector, self.noise, &mut expected);
            if data != expected {
                return Err(format!("sector {sector}: write {found} is there, but damaged"));
            }
        }
        Ok(found)
    }

    /// Writes a read of `sector` that began at `begun` may return: everything still possible now,
    /// and what an acknowledgement during the read made impossible.
    fn allowed(&self, begun: u64, sector: u64) -> Vec<u64> {
        let (now, retired) = (&self.sectors[sector as usize], &self.retired[sector as usize]);
        let retired = || retired.iter().map(|(id, _)| id);
        let superseded = |id: &u64| {
            let acked = self.writes[id].ordered();
            now.iter().chain(retired()).any(|other| {
                let other = &self.writes[other];
                other.acked < begun && other.issued > acked
            })
        };
        now.iter().chain(retired()).copied().filter(|id| !superseded(id)).collect()
    }

    /// Whether zeroes may be read from `sector` by who began at `begun`.
    pub fn may_be_zero(&self, begun: u64, sector: u64) -> bool {
        let none_retired = self.retired[sector as usize].is_empty();
        match self.sectors[sector as usize][..] {
            [only] if none_retired => self.writes[&only].zero,
            _ => self.allowed(begun, sector).iter().any(|id| self.writes[id].zero),
        }
    }

    /// If an atomic write is seen on one sector, none of its other sectors may show a value that
    /// is certainly older.
    fn check_atomic(&self, seen: &[(u64, u64)]) -> Result<(), String> {
        let mut ids: Vec<u64> = seen.iter().map(|(_, id)| *id).collect();
        ids.sort_unstable();
        ids.dedup();
        for id in &ids {
            let write = self.writes[id];
            if !write.atomic || write.zero {
                continue;
            }
            for (sector, other) in seen {
                let inside = write.first <= *sector && *sector < write.first + write.sectors;
                if inside && other != id && self.writes[other].ordered() < write.issued {
                    let newer_zero = self.sectors[*sector as usize].iter().any(|candidate| {
                        let candidate = &self.writes[candidate];
                        candidate.zero && candidate.acked >= write.issued
                    });
                    if !(self.writes[other].zero && newer_zero) {
                        return Err(format!("write {id} is visible by halves at sector {sector}"));
                    }
                }
            }
        }
        Ok(())
    }

    /// After a restart: what is there now is what is there for good.
    pub fn settle(&mut self, first: u64, bytes: &[u8]) -> Result<(), String> {
        let begun = self.begin_read();
        self.check(begun, first, bytes)?;
        for (at, data) in bytes.chunks(SECTOR).enumerate() {
            let sector = first + at as u64;
            let mut id = self.value_of(begun, sector, data)?;
            if self.writes[&id].zero {
                // Zeroes do not say whose they are. Were they put down to the oldest that is
                // possible, what that one overwrote would later seem to have come back.
                let possible = self.allowed(begun, sector).into_iter();
                let zeroes = possible.filter(|candidate| self.writes[candidate].zero);
                id = zeroes.max_by_key(|zero| self.writes[zero].issued).unwrap_or(id);
            }
            self.sectors[sector as usize] = vec![id];
            self.retired[sector as usize].clear();
        }
        Ok(())
    }

    /// Ends the life of all writes that were under way: they are there, or never will be.
    pub fn end_of_life(&mut self) {
        let now = self.tick();
        let kept: std::collections::BTreeSet<u64> =
            self.sectors.iter().flatten().copied().collect();
        self.retired.iter_mut().for_each(Vec::clear);
        self.reading.clear();
        self.writes.retain(|id, _| *id == 0 || kept.contains(id));
        for write in self.writes.values_mut() {
            write.acked = write.acked.min(now);
        }
    }
}
