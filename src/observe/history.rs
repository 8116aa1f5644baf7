//! What the node counted, second by second, on its own disk: the flight recorder.
//!
//! Samples of the last hour are kept as they come, those of the last week one in ten seconds, in
//! no more than a given number of bytes: the oldest go first. A crash may lose the newest minute;
//! a file that is damaged is begun anew. Nothing else depends on it.
//!
//! All functions block for as long as the disk takes.

use std::fs;
use std::path::Path;
use std::time::Duration;

use parking_lot::Mutex;
use redb::Database;
use redb::Durability;
use redb::ReadableDatabase;
use redb::ReadableTable;
use redb::Table;
use redb::TableDefinition;
use zstd_safe::CCtx;
use zstd_safe::CParameter;

use crate::error::Error;
use crate::error::ErrorKind;
use crate::error::Result;

/// From milliseconds since 1970 to a sample.
const SAMPLES: TableDefinition<'_, u64, &[u8]> = TableDefinition::new("samples");
/// The sum of the samples' lengths.
const TOTALS: TableDefinition<'_, &str, u64> = TableDefinition::new("totals");
const BYTES: &str = "bytes";

/// Samples are kept as they come for so long.
const FINE: Duration = Duration::from_hours(1);
/// One in each of these is kept of older ones,
const COARSE_STEP: Duration = Duration::from_secs(10);
/// for so long.
const COARSE: Duration = Duration::from_hours(24 * 7);
/// A sample is less than this; a longer one is not kept. Far above what 500 volumes need.
const SAMPLE_BYTES_MAX: usize = 16 << 20;
/// Memory the store may use for its pages.
const CACHE_BYTES: usize = 4 << 20;

/// The recorder's store.
pub struct History {
    db: Database,
    bytes_max: u64,
    /// Kept, since making its tables costs more than a sample.
    compressor: Mutex<CCtx<'static>>,
}

impl History {
    /// Opens the store at `path`, or begins one; `bytes_max` bounds what it keeps.
    ///
    /// # Errors
    /// `Unsupported` if the file can neither be used nor begun anew.
    pub fn open(path: &Path, bytes_max: u64) -> Result<Self> {
        let open = || -> std::result::Result<Self, redb::Error> {
            let db = Database::builder().set_cache_size(CACHE_BYTES).create(path)?;
            let begin = db.begin_write()?;
            begin.open_table(SAMPLES)?;
            begin.open_table(TOTALS)?;
            begin.commit()?;
            Ok(Self { db, bytes_max, compressor: Mutex::new(CCtx::create()) })
        };
        let failed = |error: redb::Error| {
            Error::new(ErrorKind::Unsupported, "open history").context(path.display()).source(error)
        };
        open().or_else(|error| {
            tracing::warn!(path = %path.display(), %error, "history cannot be read and is begun anew");
            fs::remove_file(path).map_err(|error| failed(redb::Error::Io(error)))?;
            open().map_err(failed)
        })
    }

    /// Keeps a sample. It is on disk once [`History::tidy`] has run.
    ///
    /// # Errors
    /// `InvalidRequest` for one that is too long, else that of the store.
    pub fn record(&self, unix_ms: u64, sample: &[u8]) -> Result<()> {
        const OP: &str = "record history";
        if sample.len() > SAMPLE_BYTES_MAX {
            return Err(Error::new(ErrorKind::InvalidRequest, OP)
                .context(format_args!("a sample of {} bytes", sample.len())));
        }
        let packed = pack(&mut self.compressor.lock(), sample);
        let packed = packed.map_err(|reason| failed(OP, reason))?;
        self.change(Durability::None, |samples, bytes| {
            *bytes += packed.len() as u64;
            let before = samples.insert(unix_ms, packed.as_slice())?;
            *bytes -= before.map_or(0, |before| before.value().len() as u64);
            Ok(())
        })
        .map_err(|error| failed(OP, error))
    }

    /// Lets go of what is too old or too much, and brings the rest to disk.
    ///
    /// # Errors
    /// Those of the store.
    pub fn tidy(&self, now_ms: u64) -> Result<()> {
        let fine_from = now_ms.saturating_sub(ms(FINE));
        let coarse_from = now_ms.saturating_sub(ms(COARSE));
        let bytes_max = self.bytes_max;
        let tidied = self.change(Durability::Immediate, |samples, bytes| {
            let mut slot_kept = None;
            let old = samples.extract_from_if(..fine_from, |unix_ms, _| {
                let slot = Some(unix_ms / ms(COARSE_STEP));
                let keep = unix_ms >= coarse_from && slot != slot_kept;
                slot_kept = slot;
                !keep
            })?;
            for removed in old {
                *bytes -= removed?.1.value().len() as u64;
            }
            while *bytes > bytes_max {
                let Some((_, removed)) = samples.pop_first()? else { break };
                *bytes -= removed.value().len() as u64;
            }
            Ok(())
        });
        tidied.map_err(|error| failed("tidy history", error))
    }

    /// Samples from `from_ms` to `to_ms`, both included, at least `step_ms` apart and `count_max`
    /// at most, oldest first.
    ///
    /// # Errors
    /// Those of the store; `Corrupt` if a sample cannot be unpacked.
    pub fn range(
        &self,
        from_ms: u64,
        to_ms: u64,
        step_ms: u64,
        count_max: usize,
    ) -> Result<Vec<Vec<u8>>> {
        const OP: &str = "read history";
        let read = || -> std::result::Result<Vec<Vec<u8>>, redb::Error> {
            let samples = self.db.begin_read()?.open_table(SAMPLES)?;
            let mut found = Vec::new();
            let mut next = from_ms;
            while found.len() < count_max && next <= to_ms {
                let Some(first) = samples.range(next..=to_ms)?.next() else { break };
                let (unix_ms, packed) = first?;
                found.push(packed.value().to_vec());
                next = unix_ms.value().saturating_add(step_ms.max(1));
            }
            Ok(found)
        };
        let packed = read().map_err(|error| failed(OP, error))?;
        let unpacked = packed.iter().map(|packed| {
            unpack(packed).ok_or_else(|| {
                Error::new(ErrorKind::Corrupt, OP).context("a sample cannot be unpacked")
            })
        });
        unpacked.collect()
    }

    /// One change, with the sum of lengths kept true.
    fn change(
        &self,
        durability: Durability,
        work: impl FnOnce(&mut Table<'_, u64, &[u8]>, &mut u64) -> std::result::Result<(), redb::Error>,
    ) -> std::result::Result<(), redb::Error> {
        let mut change = self.db.begin_write()?;
        change.set_durability(durability)?;
        {
            let mut samples = change.open_table(SAMPLES)?;
            let mut totals = change.open_table(TOTALS)?;
            let mut bytes = totals.get(BYTES)?.map_or(0, |bytes| bytes.value());
            work(&mut samples, &mut bytes)?;
            totals.insert(BYTES, bytes)?;
        }
        Ok(change.commit()?)
    }
}

fn failed(op: &'static str, error: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Error {
    Error::new(ErrorKind::Unsupported, op).source(error)
}

fn ms(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

/// A sample as it is stored: one zstd frame, which says how long the content is.
fn pack(context: &mut CCtx<'_>, sample: &[u8]) -> std::result::Result<Vec<u8>, String> {
    let text = |code| zstd_safe::get_error_name(code).to_owned();
    context.set_parameter(CParameter::CompressionLevel(1)).map_err(text)?;
    context.set_parameter(CParameter::ChecksumFlag(true)).map_err(text)?;
    let mut packed = vec![0; zstd_safe::compress_bound(sample.len())];
    let length = context.compress2(packed.as_mut_slice(), sample).map_err(text)?;
    packed.truncate(length);
    Ok(packed)
}

fn unpack(packed: &[u8]) -> Option<Vec<u8>> {
    let length = zstd_safe::get_frame_content_size(packed).ok()??;
    let length = usize::try_from(length).ok().filter(|length| *length <= SAMPLE_BYTES_MAX)?;
    let mut sample = vec![0; length];
    let filled = zstd_safe::decompress(sample.as_mut_slice(), packed).ok()?;
    (filled == length).then_some(sample)
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use super::*;
    use crate::env::Rng;
    use crate::env::sim::SeededRng;

    struct Place(PathBuf);

    impl Place {
        fn new(name: &str) -> Self {
            let path =
                std::env::temp_dir().join(format!("weft-history-{name}-{}", std::process::id()));
            let _ = fs::remove_file(&path);
            Self(path)
        }
    }

    impl Drop for Place {
        fn drop(&mut self) {
            let _ = fs::remove_file(&self.0);
        }
    }

    fn all(history: &History) -> Vec<Vec<u8>> {
        history.range(0, u64::MAX, 0, usize::MAX).expect("read")
    }

    #[test]
    fn samples_thin_out_with_age_and_outlive_the_process() {
        let place = Place::new("thin");
        // Room for what is kept, not for all there was.
        let history = History::open(&place.0, 100_000).expect("opened");
        let (hour, now) = (ms(FINE), 200 * ms(FINE));
        // Every second of the last two hours; one of eight days ago.
        for second in 0..7200 {
            history.record(now - 2 * hour + second * 1000, &second.to_le_bytes()).expect("kept");
        }
        history.record(now - 8 * 24 * hour, b"old").expect("kept");
        history.tidy(now).expect("tidied");
        assert_eq!(all(&history).len(), 3600 + 360);
        // Thinning what is thin changes nothing.
        history.tidy(now + 1).expect("tidied");
        assert_eq!(all(&history).len(), 3600 + 360);
        drop(history);
        let history = History::open(&place.0, 1 << 20).expect("opened");
        assert_eq!(all(&history).len(), 3600 + 360);

        let minute = history.range(now - 60_000, now, 10_000, 100).expect("read");
        let seconds: Vec<_> =
            minute.iter().map(|s| u64::from_le_bytes(s[..].try_into().expect("8 bytes"))).collect();
        assert_eq!(seconds, [7140, 7150, 7160, 7170, 7180, 7190]);
        assert_eq!(history.range(now - 60_000, now, 10_000, 2).expect("read").len(), 2);
        assert!(history.range(5, 4, 0, 10).expect("read").is_empty());
    }

    #[test]
    fn the_oldest_go_when_there_is_too_much() {
        let place = Place::new("bound");
        let history = History::open(&place.0, 10_000).expect("opened");
        let noise = |seed: u64| -> Vec<u8> {
            let random = SeededRng::new(seed);
            (0..125).flat_map(|_| random.random_u64().to_le_bytes()).collect()
        };
        for number in 0..50 {
            history.record(number, &noise(number)).expect("kept");
            // The same again takes the place of the first.
            history.record(number, &noise(number)).expect("kept");
        }
        history.tidy(50).expect("tidied");
        let kept = all(&history);
        assert!((5..=10).contains(&kept.len()), "{} kept", kept.len());
        assert_eq!(kept.last(), Some(&noise(49)));
    }

    #[test]
    fn a_damaged_file_is_begun_anew() {
        let place = Place::new("damaged");
        fs::write(&place.0, b"this was never a store").expect("written");
        let history = History::open(&place.0, 1 << 20).expect("begun anew");
        history.record(1, b"a").expect("kept");
        assert_eq!(all(&history), [b"a"]);
    }
}
