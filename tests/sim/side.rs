//! Volumes that come and go beside the main one.

use std::cell::RefCell;
use std::rc::Rc;
use std::sync::Arc;

use bytes::Bytes;
use weft::env::sim::Choose;
use weft::env::sim::SeededRng;
use weft::error::ErrorKind;
use weft::volume::VolumeDirectory;
use weft::volume::pod::Pod;
use weft::volume::pod::VolumeSpec;

use crate::host::read_sectors;
use crate::model::Model;
use crate::model::SECTOR;

/// Sectors of a side volume that are used.
const SECTORS: u64 = 256;
/// Sectors written at once.
const WRITE_SECTORS: u64 = 64;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// Asked for; may or may not be there.
    Creating,
    There,
    /// May or may not be there.
    Deleting,
}

/// One side volume.
struct Side {
    state: State,
    model: Model,
}

/// All side volumes that may exist, by name.
#[derive(Default)]
pub struct Sides {
    volumes: RefCell<std::collections::BTreeMap<String, Rc<RefCell<Side>>>>,
    created: RefCell<u64>,
}

impl Sides {
    /// Creates, writes, reads and deletes one volume after another.
    pub async fn churn(&self, pod: &Arc<Pod>, rng: &SeededRng, rounds: u64) -> Result<(), String> {
        for _ in 0..rounds {
            let kept = self.volumes.borrow().keys().next().cloned();
            match kept {
                Some(name) if rng.chance(500_000) => self.delete(pod, &name).await?,
                _ => self.create_and_write(pod, rng).await?,
            }
        }
        Ok(())
    }

    async fn create_and_write(&self, pod: &Arc<Pod>, rng: &SeededRng) -> Result<(), String> {
        let name = format!("side-{}", self.created.borrow());
        *self.created.borrow_mut() += 1;
        let side = Side { state: State::Creating, model: Model::new(SECTORS, false, false) };
        let side = Rc::new(RefCell::new(side));
        self.volumes.borrow_mut().insert(name.clone(), Rc::clone(&side));
        let spec = VolumeSpec {
            name: name.clone(),
            size_bytes: 1 << 20,
            logical_block_bytes: 512,
            read_only: false,
            write_cache: false,
        };
        match pod.create_volume(spec).await {
            Ok(_) => side.borrow_mut().state = State::There,
            Err(error) if error.kind() == ErrorKind::ShuttingDown => return Ok(()),
            Err(error) => return Err(format!("create {name}: {}", error.chain())),
        }
        let volume = pod.find(&name).ok_or_else(|| format!("{name} was created and is gone"))?;
        for _ in 0..rng.below(4) {
            let first = rng.below(SECTORS / WRITE_SECTORS) * WRITE_SECTORS;
            let id = side.borrow_mut().model.issue(first, WRITE_SECTORS, false, true);
            let bytes = Bytes::from(side.borrow().model.bytes(id));
            match Arc::clone(&volume).write(first * SECTOR as u64, bytes).await {
                Ok(()) => side.borrow_mut().model.ack(id),
                Err(error)
                    if matches!(error.kind(), ErrorKind::NoSpace | ErrorKind::ShuttingDown) => {}
                Err(error) => return Err(format!("write {name}: {}", error.chain())),
            }
        }
        Ok(())
    }

    async fn delete(&self, pod: &Arc<Pod>, name: &str) -> Result<(), String> {
        let side = self.volumes.borrow().get(name).cloned();
        let Some(side) = side else { return Ok(()) };
        let before = std::mem::replace(&mut side.borrow_mut().state, State::Deleting);
        match pod.delete_volume(name).await {
            Ok(()) => {
                self.volumes.borrow_mut().remove(name);
                if pod.find(name).is_some() {
                    return Err(format!("{name} was deleted and is still there"));
                }
                Ok(())
            }
            Err(error) if error.kind() == ErrorKind::ShuttingDown => Ok(()),
            // Its creation, or an earlier deletion, was cut short by a close under load.
            Err(error) if error.kind() == ErrorKind::NotFound && before != State::There => Ok(()),
            Err(error) => Err(format!("delete {name}: {}", error.chain())),
        }
    }

    /// After an open: what must be there is, with its content.
    pub async fn settle(&self, pod: &Arc<Pod>) -> Result<(), String> {
        let names: Vec<String> = self.volumes.borrow().keys().cloned().collect();
        for name in names {
            let side = Rc::clone(&self.volumes.borrow()[&name]);
            let Some(volume) = pod.find(&name) else {
                if side.borrow().state == State::There {
                    return Err(format!("{name} was created and is gone"));
                }
                self.volumes.borrow_mut().remove(&name);
                continue;
            };
            for first in (0..SECTORS).step_by(WRITE_SECTORS as usize) {
                let bytes = read_sectors(&volume, first * SECTOR as u64, WRITE_SECTORS).await;
                let bytes = bytes.map_err(|error| format!("read {name}: {}", error.chain()))?;
                let settled = side.borrow_mut().model.settle(first, &bytes);
                settled.map_err(|what| format!("{name}: {what}"))?;
            }
            let mut side = side.borrow_mut();
            side.model.end_of_life();
            side.state = State::There;
        }
        let known = self.volumes.borrow();
        let stranger = pod
            .volumes()
            .into_iter()
            .find(|volume| volume.name.starts_with("side-") && !known.contains_key(&volume.name));
        match stranger {
            Some(volume) => Err(format!("{} was deleted and is back", volume.name)),
            None => Ok(()),
        }
    }
}
