//! What the format fuzzers run, shared by `tests/fuzz_format.rs` and the libFuzzer targets beside it.
//!
//! The structure drivers give arbitrary bytes to a decoder and hold what it accepts to its own
//! encoding: nothing panics, nothing is accepted that does not encode back to the same bytes. The
//! pod driver damages the devices of a small simulated pod and opens it: with at most m devices
//! damaged everything must be read right; with more, what is not right must be refused.

use std::cell::RefCell;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use weft::codec::compress::decompress;
use weft::device::sim::SimDisk;
use weft::device::sim::SimProfile;
use weft::engine::catalog::Catalog;
use weft::engine::catalog::CatalogChange;
use weft::env::EnvRef;
use weft::env::sim::SimEnv;
use weft::format::PodId;
use weft::format::batch::BatchHeader;
use weft::format::node::decode_node;
use weft::format::node::encode_node;
use weft::format::record::decode_record;
use weft::format::root::CheckpointRoot;
use weft::format::superblock::SUPERBLOCK_BYTES;
use weft::format::superblock::Superblock;
use weft::format::table::decode_page;
use weft::format::table::encode_page;
use weft::format::unit::UnitHeader;
use weft::units::SegmentId;
use weft::volume::Piece;
use weft::volume::VolumeDirectory;
use weft::volume::VolumeRef;
use weft::volume::pod::FormatOptions;
use weft::volume::pod::OpenOptions;
use weft::volume::pod::Pod;
use weft::volume::pod::VolumeSpec;

/// The pod that all structures of the fuzzers belong to.
pub const POD: PodId = PodId([0x5A; 16]);
/// The place all records of the fuzzers lie at.
pub const PLACE: u64 = 0x12340;
/// Strips per segment in table pages and roots.
pub const STRIPS: usize = 6;
/// Most bytes the compression driver decodes to.
const CONTENT_BYTES_MAX: usize = 64 << 10;

/// A superblock.
pub fn superblock(input: &[u8]) {
    if let Ok(superblock) = Superblock::decode(input) {
        let again = superblock.encode();
        assert_eq!(Superblock::decode(&again), Ok(superblock), "the encoding reads back");
        assert_eq!(again.len(), SUPERBLOCK_BYTES);
    }
}

/// A batch's header and body.
pub fn batch(input: &[u8]) {
    if let Ok(mut header) = BatchHeader::decode(input, POD) {
        let found = header.checksum;
        assert_eq!(header.encode(POD)[..], input[..96], "a header has one encoding");
        assert_eq!(header.checksum, found);
        let _ = header.body(input);
    }
}

/// A record.
pub fn record(input: &[u8]) {
    if let Ok((header, payload)) = decode_record(input, POD, PLACE) {
        assert_eq!(payload.len() as u64, u64::from(header.payload_bytes));
        assert_eq!(header.encode(POD, PLACE)[..], input[..64], "a header has one encoding");
    }
}

/// A unit.
pub fn unit(input: &[u8]) {
    if let Ok(header) = UnitHeader::decode(input, POD, SegmentId(5), 1, 2) {
        let mut again = input.to_vec();
        header.encode_into(POD, &mut again);
        assert_eq!(again, input, "a unit has one encoding");
    }
}

/// A map node or table directory.
pub fn node(input: &[u8]) {
    if let Ok(node) = decode_node(input) {
        assert_eq!(encode_node(&node), input, "a node has one encoding");
    }
}

/// A page of the segment table.
pub fn page(input: &[u8]) {
    if let Ok(entries) = decode_page(input, STRIPS) {
        assert_eq!(encode_page(&entries), input, "a page has one encoding");
    }
}

/// A checkpoint root.
pub fn root(input: &[u8]) {
    if let Ok(root) = CheckpointRoot::decode(input, STRIPS) {
        assert_eq!(root.encode(), input, "a root has one encoding");
    }
}

/// A catalog, and a change of it.
pub fn catalog(input: &[u8]) {
    if let Ok(mut catalog) = Catalog::decode(input) {
        let again = Catalog::decode(&catalog.encode()).expect("the encoding reads back");
        assert_eq!(again, catalog);
        if let Ok(change) = CatalogChange::decode(br#"{"delete_volume":{"id":1}}"#) {
            catalog.apply(u64::MAX, &change);
        }
    }
    if let Ok(change) = CatalogChange::decode(input) {
        assert_eq!(CatalogChange::decode(&change.encode()).ok(), Some(change));
    }
}

/// A compressed payload. The first two bytes say how much it shall decode to.
pub fn payload(input: &[u8]) {
    let Some((length, frame)) = input.split_first_chunk::<2>() else { return };
    let length = usize::from(u16::from_le_bytes(*length)).min(CONTENT_BYTES_MAX);
    let mut out = vec![0; length];
    let _ = decompress(frame, &mut out);
}

/// Devices, data and parity strips of the pod that is damaged.
const DEVICES: usize = 5;
const DATA: usize = 2;
const PARITY: usize = 2;
const DEVICE_BYTES: u64 = 6 << 20;
const VOLUME_BYTES: u64 = 4 << 20;
const CHUNK: usize = 32 << 10;
/// Blocks of the volume that are written, in chunks.
const CHUNKS: u64 = 24;
/// A pod that is not open and read by then hangs. Virtual time.
const LIFE_MAX: Duration = Duration::from_secs(600);

/// The devices of a pod as a kill left them.
struct Image {
    /// By device: offset and bytes of each page that is not zero.
    devices: Vec<Vec<(u64, Vec<u8>)>>,
}

thread_local! {
    static IMAGE: RefCell<Option<Arc<Image>>> = const { RefCell::new(None) };
}

/// Chunk `chunk` as written in `round`: half noise, half compressible; 0 is "never".
fn content(chunk: u64, round: u64) -> Vec<u8> {
    let mut state = chunk << 32 | round;
    let mut bytes = vec![0; CHUNK];
    if round > 0 {
        for (at, word) in bytes.chunks_exact_mut(8).enumerate() {
            if chunk.is_multiple_of(2) || at.is_multiple_of(64) {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(at as u64 | 1);
            }
            word.copy_from_slice(&(state ^ state >> 29).to_le_bytes());
        }
    }
    bytes
}

/// The last round that wrote `chunk`: the second writes every third only.
fn last_round(chunk: u64) -> u64 {
    if chunk.is_multiple_of(3) { 2 } else { 1 }
}

fn disks() -> Vec<SimDisk> {
    let disk = |index| SimDisk::new(format!("disk-{index}"), SimProfile::new(DEVICE_BYTES));
    (0..DEVICES).map(disk).collect()
}

async fn open(env: &EnvRef, disks: &[SimDisk]) -> weft::error::Result<Arc<Pod>> {
    let options = OpenOptions {
        cache_bytes: 1 << 20,
        map_cache_bytes: 1 << 20,
        force: false,
        replace_missing: false,
    };
    let devices = disks.iter().map(|disk| Some(disk.open(env))).collect();
    Pod::open(Arc::clone(env), devices, options).await
}

async fn write_round(volume: &VolumeRef, round: u64) {
    for chunk in (0..CHUNKS).filter(|chunk| last_round(*chunk) >= round) {
        let bytes = Bytes::from(content(chunk, round));
        let written = Arc::clone(volume).write(chunk * CHUNK as u64, bytes).await;
        written.expect("nothing fails here");
    }
}

/// Two lives: the first ends in a checkpoint, the second is killed with entries in the journal.
fn image() -> Arc<Image> {
    if let Some(image) = IMAGE.with_borrow(Option::clone) {
        return image;
    }
    let env = SimEnv::new(1);
    let disks = disks();
    for life in 1..=2 {
        let process = env.process();
        let own: EnvRef = process.clone();
        let done = process.run_for(LIFE_MAX, async {
            if life == 1 {
                let options = FormatOptions {
                    data_strips: DATA,
                    parity_strips: PARITY,
                    journal_bytes: 1 << 20,
                };
                let devices: Vec<_> = disks.iter().map(|disk| disk.open(&own)).collect();
                Pod::format(&own, &devices, &options).await.expect("formatted");
            }
            let pod = open(&own, &disks).await.expect("opened");
            if life == 1 {
                let spec = VolumeSpec {
                    name: "v".into(),
                    size_bytes: VOLUME_BYTES,
                    logical_block_bytes: 4096,
                    read_only: false,
                    write_cache: false,
                };
                pod.create_volume(spec).await.expect("created");
            }
            write_round(&pod.find("v").expect("there"), life).await;
            if life == 1 {
                pod.close().await.expect("closed");
            }
        });
        done.expect("it comes to an end");
        process.halt();
        let rng = weft::env::sim::SeededRng::new(1);
        disks.iter().for_each(|disk| disk.kill(&rng));
    }
    env.halt();
    let pages = |disk: &SimDisk| {
        let mut pages = Vec::new();
        for offset in (0..DEVICE_BYTES).step_by(4096) {
            let mut page = vec![0; 4096];
            disk.peek(offset, &mut page);
            if page.iter().any(|byte| *byte != 0) {
                pages.push((offset, page));
            }
        }
        pages
    };
    let image = Arc::new(Image { devices: disks.iter().map(pages).collect() });
    IMAGE.with_borrow_mut(|slot| *slot = Some(Arc::clone(&image)));
    image
}

/// One piece of damage.
struct Damage {
    device: usize,
    offset: u64,
    bytes: Vec<u8>,
}

/// Reads damage from the input: 8 bytes each. Half of it aims at pages that hold something.
fn damages(image: &Image, input: &[u8]) -> Vec<Damage> {
    let (chunks, _) = input.as_chunks::<8>();
    let pieces = chunks.iter().map(|[device, kind, a, b, c, fill, length, _]| {
        let device = usize::from(*device) % DEVICES;
        let at = u64::from(u32::from_le_bytes([*a, *b, *c, 0]));
        let pages = &image.devices[device];
        let offset = match kind % 4 {
            0 => at % DEVICE_BYTES,
            1 => at % 16384,
            _ => {
                let (page, _) = pages[usize::try_from(at).expect("24 bits") % pages.len()];
                page + u64::from(*length) % 64 * 64
            }
        };
        let length = match kind / 4 % 4 {
            0 => 1,
            1 => usize::from(*length) + 1,
            2 => 4096,
            _ => 65536,
        };
        let room = usize::try_from(DEVICE_BYTES - offset).expect("small");
        Damage { device, offset, bytes: vec![*fill; length.min(room)] }
    });
    pieces.collect()
}

/// A whole pod. The first byte says how many devices may be damaged: see the module.
pub fn pod(input: &[u8]) {
    let Some((most, input)) = input.split_first() else { return };
    let image = image();
    let most = usize::from(*most) % (DEVICES + 1);
    let disks = disks();
    for (disk, pages) in disks.iter().zip(&image.devices) {
        pages.iter().for_each(|(offset, page)| disk.poke(*offset, page));
    }
    let mut damaged = Vec::new();
    for damage in damages(&image, input) {
        if !damaged.contains(&damage.device) && damaged.len() < most {
            damaged.push(damage.device);
        }
        if damaged.contains(&damage.device) {
            disks[damage.device].poke(damage.offset, &damage.bytes);
        }
    }
    let survives = damaged.len() <= PARITY;
    let env = SimEnv::new(2);
    let process = env.process();
    let own: EnvRef = process.clone();
    let done = process.run_for(LIFE_MAX, async {
        match open(&own, &disks).await {
            Ok(pod) => read_all(&pod, survives).await,
            Err(error) => {
                assert!(!survives, "{} of {DEVICES} damaged: {}", damaged.len(), error.chain());
                assert!(!error.chain().is_empty());
            }
        }
    });
    process.halt();
    env.halt();
    assert!(done.is_ok(), "no end: {done:?}");
}

/// With too much damage a read may fail, or show what an earlier write left, since nobody can know
/// of a journal's last batch that no device holds; it never shows anything else.
async fn read_all(pod: &Arc<Pod>, survives: bool) {
    let Some(volume) = pod.find("v") else {
        assert!(!survives, "the volume is gone");
        return;
    };
    for chunk in 0..CHUNKS {
        let length = u32::try_from(CHUNK).expect("small");
        let pieces = match Arc::clone(&volume).read(chunk * CHUNK as u64, length).await {
            Ok(pieces) => pieces,
            Err(error) => {
                assert!(!survives, "chunk {chunk}: {}", error.chain());
                continue;
            }
        };
        let bytes: Vec<u8> = pieces.iter().flat_map(piece_bytes).collect();
        let last = last_round(chunk);
        let right = (0..=last).rev().find(|round| bytes == content(chunk, *round));
        match right {
            Some(round) => assert!(round == last || !survives, "chunk {chunk} is of {round}"),
            None => panic!("chunk {chunk} is nothing that was ever written"),
        }
    }
}

fn piece_bytes(piece: &Piece) -> Vec<u8> {
    match piece {
        Piece::Zero(length) => vec![0; *length],
        Piece::Data(data) => data.to_vec(),
    }
}
