//! Reading and committing superblocks.
//!
//! A commit writes the next generation to the older slot of every device in service and counts
//! once `f + 1` hold it, `f = min(m, (n - 1) / 2)`. Opening needs `n - f` devices, so it always
//! meets one that holds the newest committed generation; the newest valid one wins.

use std::sync::atomic::Ordering;

use futures_util::future::join_all;

use super::Pool;
use crate::canary::Bug;
use crate::canary::planted;
use crate::device::AlignedBuf;
use crate::device::DeviceRef;
use crate::device::Durability;
use crate::error::Error;
use crate::error::ErrorKind;
use crate::error::Result;
use crate::format::superblock::SLOT_OFFSETS;
use crate::format::superblock::Superblock;
use crate::units::IO_ALIGN;
use crate::units::bytes_usize;

/// What a device holds.
pub struct DeviceSuperblock {
    /// The newer valid superblock.
    pub superblock: Superblock,
    /// The slot it was in.
    pub slot: u64,
}

/// Reads both slots of a device; `None` if neither holds a superblock. One that cannot be read is no
/// worse than one that is damaged.
///
/// # Errors
/// The device's, if no superblock was found and it could not be read everywhere.
pub async fn read_superblock(device: &DeviceRef) -> Result<Option<DeviceSuperblock>> {
    let mut newest: Option<DeviceSuperblock> = None;
    let mut unreadable = None;
    for (slot, offset) in SLOT_OFFSETS.into_iter().enumerate() {
        let buf = match device.read(offset, AlignedBuf::zeroed(bytes_usize(IO_ALIGN))).await {
            Ok(buf) => buf,
            Err(error) => {
                unreadable = Some(error);
                continue;
            }
        };
        let Ok(superblock) = Superblock::decode(&buf) else { continue };
        let age = |superblock: &Superblock| (superblock.epoch, superblock.generation);
        let newer = newest.as_ref().is_none_or(|found| age(&found.superblock) < age(&superblock));
        if newer {
            newest = Some(DeviceSuperblock { superblock, slot: slot as u64 });
        }
    }
    match (newest, unreadable) {
        (None, Some(error)) => Err(error),
        (newest, _) => Ok(newest),
    }
}

/// Writes `superblock` to `slot` of a device that is not yet part of an open pod.
///
/// # Errors
/// The device's.
pub async fn write_superblock(
    device: &DeviceRef,
    superblock: &Superblock,
    slot: u64,
) -> Result<()> {
    let buf = AlignedBuf::padded(&superblock.encode(), bytes_usize(IO_ALIGN));
    device.write(SLOT_OFFSETS[bytes_usize(slot)], buf.freeze(), Durability::Durable).await
}

impl Pool {
    /// The superblock as last committed.
    pub async fn head(&self) -> Superblock {
        self.head.lock().await.clone()
    }

    /// The same, and nothing is committed as long as it is held.
    pub(super) async fn head_locked(&self) -> tokio::sync::MutexGuard<'_, Superblock> {
        self.head.lock().await
    }

    /// Applies `change` to the superblock and commits it as the next generation.
    ///
    /// # Durability
    /// When it returns `Ok`, any open of the pod will see it.
    ///
    /// # Errors
    /// `Poisoned` if fewer than f + 1 devices took it; it may or may not be seen later.
    pub async fn commit_superblock(&self, change: impl FnOnce(&mut Superblock)) -> Result<()> {
        let mut head = self.head.lock().await;
        let mut next = head.clone();
        change(&mut next);
        next.generation += 1;
        let told = if planted(Bug::SuperblockOnOne) { 1 } else { self.members.len() };
        let in_service = self.members.iter().filter(|member| member.in_service());
        let writes = in_service.take(told).map(|member| {
            let mut own = next.clone();
            own.device_uuid = member.uuid;
            own.device_index = u16::try_from(member.index).expect("at most 65535 devices");
            own.device_bytes = member.device_bytes().unwrap_or(own.device_bytes);
            let buf = AlignedBuf::padded(&own.encode(), bytes_usize(IO_ALIGN)).freeze();
            let slot = 1 - member.slot.load(Ordering::Acquire);
            async move {
                let offset = SLOT_OFFSETS[bytes_usize(slot)];
                let durability = if planted(Bug::SuperblockNotDurable) {
                    Durability::Volatile
                } else {
                    Durability::Durable
                };
                member.write(offset, buf, durability).await.map(|()| {
                    member.slot.store(slot, Ordering::Release);
                })
            }
        });
        let written = join_all(writes).await.iter().filter(|result| result.is_ok()).count();
        *head = next;
        let needed = self.geometry.absent_max() + 1;
        if written < needed.min(told) {
            return Err(Error::new(ErrorKind::Poisoned, "commit superblock")
                .context(format_args!("{written} devices took it, {needed} are needed")));
        }
        Ok(())
    }
}
