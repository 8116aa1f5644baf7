//! More goes wrong than the contract covers: the pod must refuse, not lie.

use std::ops::ControlFlow;

use weft::device::sim::SimDisk;
use weft::env::sim::Choose;
use weft::format::PodId;
use weft::format::batch::BatchHeader;
use weft::format::superblock::JOURNAL_OFFSET;
use weft::format::superblock::SLOT_OFFSETS;
use weft::format::superblock::SUPERBLOCK_BYTES;
use weft::format::superblock::Superblock;
use weft::units::Lsn;

use crate::world::LIFE_MAX;
use crate::world::World;

/// Batches start on multiples of this.
const BATCH_ALIGN: u64 = 4096;

impl World {
    /// Some seeds end with damage of a kind that must be noticed. `Break`: data is lost for good.
    pub fn beyond_the_contract(&self) -> Result<ControlFlow<()>, String> {
        self.repair();
        match self.rng.below(10) {
            0..=2 => self.lose_a_batch_everywhere().map(ControlFlow::Break),
            3..=4 => self.open_too_few().map(ControlFlow::Continue),
            _ => Ok(ControlFlow::Continue(())),
        }
    }

    /// A batch that others prove durable disappears from every device. The pod is not opened,
    /// unless a checkpoint holds what was in it.
    fn lose_a_batch_everywhere(&self) -> Result<(), String> {
        let pod = PodId(*self.pod.get().as_bytes());
        let journal_bytes = self.swarm.journal_bytes;
        let mut batches = Vec::new();
        let mut durable = Lsn::default();
        for disk in &self.disks {
            // What a disk without a superblock proves nobody can read: it is no device of the pod.
            let proves = has_superblock(disk);
            let mut ring = vec![0; journal_bytes as usize];
            disk.peek(JOURNAL_OFFSET, &mut ring);
            for at in (0..journal_bytes).step_by(BATCH_ALIGN as usize) {
                let Ok(header) = BatchHeader::decode(&ring[at as usize..], pod) else { continue };
                let in_place = header.position % journal_bytes == at;
                if in_place && header.body(&ring[at as usize..]).is_ok() {
                    if proves {
                        durable = durable.max(header.durable_lsn);
                    }
                    batches.push(header);
                }
            }
        }
        let lost = batches.iter().filter(|batch| batch.next_lsn().0 <= durable.0 + 1);
        let Some(lost) = lost.max_by_key(|batch| batch.first_lsn).copied() else { return Ok(()) };
        let offset = JOURNAL_OFFSET + lost.position % journal_bytes;
        for disk in &self.disks {
            let mut head = vec![0; BATCH_ALIGN as usize];
            disk.peek(offset, &mut head);
            if BatchHeader::decode(&head, pod).is_ok_and(|found| found.checksum == lost.checksum) {
                disk.poke(offset, &[0; BATCH_ALIGN as usize]);
            }
        }
        let (process, env) = self.process();
        let result = process.run_for(LIFE_MAX, async {
            match self.open(&env).await {
                Ok(pod) => self.read_what_can_be(&pod).await,
                Err(_) => Ok(()),
            }
        });
        process.halt();
        result.map_err(|stalled| format!("a lost batch: {stalled}"))?
    }

    /// More than f devices are away: another half of the pod could be open.
    fn open_too_few(&self) -> Result<(), String> {
        let away = self.swarm.parity + 1;
        let first = self.rng.below(self.swarm.devices as u64) as usize;
        for index in first..first + away {
            self.attached.borrow_mut()[index % self.swarm.devices] = false;
        }
        let (process, env) = self.process();
        let result = process.run_for(LIFE_MAX, async { self.open(&env).await.is_ok() });
        process.halt();
        match result {
            Ok(false) => Ok(()),
            Ok(true) => Err(format!("opened although {away} devices are away")),
            Err(stalled) => Err(format!("open with {away} devices away: {stalled}")),
        }
    }
}

fn has_superblock(disk: &SimDisk) -> bool {
    SLOT_OFFSETS.into_iter().any(|offset| {
        let mut slot = vec![0; SUPERBLOCK_BYTES];
        disk.peek(offset, &mut slot);
        Superblock::decode(&slot).is_ok()
    })
}
