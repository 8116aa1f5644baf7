//! Pods of released format versions: today's build opens them, and damaged ones fail by name.
//!
//! `fixtures/pod-1.zst` holds every page that is not zero of the devices of a small pod of format
//! version 1 (2 data + 1 parity), killed with a checkpoint behind it and entries in its journal.
//! It is never written again: a build that cannot read it broke the format. A new version gets a
//! new file beside it (`cargo test --test formats -- --ignored`).

use std::fs;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use weft::codec::compress::compress;
use weft::codec::compress::decompress;
use weft::device::sim::SimDisk;
use weft::device::sim::SimProfile;
use weft::engine::catalog::Catalog;
use weft::env::EnvRef;
use weft::env::sim::SeededRng;
use weft::env::sim::SimEnv;
use weft::format::DecodeError;
use weft::format::location::AddressSpace;
use weft::format::location::Location;
use weft::format::node::MAP_LEVELS;
use weft::format::node::NODE_BYTES;
use weft::format::node::NodeKey;
use weft::format::node::decode_node;
use weft::format::record::PayloadCodec;
use weft::format::record::RecordHeader;
use weft::format::record::RecordKind;
use weft::format::record::decode_record;
use weft::format::root::CheckpointRoot;
use weft::format::superblock::JOURNAL_OFFSET;
use weft::format::superblock::SLOT_OFFSETS;
use weft::format::superblock::Superblock;
use weft::format::table::Place;
use weft::format::table::SegmentEntry;
use weft::format::table::decode_page;
use weft::units::Lba;
use weft::units::bytes_usize;
use weft::volume::Piece;
use weft::volume::VolumeDirectory;
use weft::volume::pod::FormatOptions;
use weft::volume::pod::OpenOptions;
use weft::volume::pod::Pod;
use weft::volume::pod::VolumeSpec;

const DEVICES: usize = 3;
const DEVICE_BYTES: u64 = 5 << 20;
const PAGE_BYTES: usize = 4096;
const LIFE_MAX: Duration = Duration::from_secs(600);
const FIXTURE_BYTES_MAX: usize = 64 << 10;

fn fixture() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/pod-1.zst")
}

/// What block `block` holds: 0 to 19 from the checkpoint, 16 to 23 from the journal.
fn content(block: u64) -> Vec<u8> {
    let round = if block < 16 { 1 } else { 2 };
    format!("block {block} of round {round} ").into_bytes().into_iter().cycle().take(4096).collect()
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

/// Runs one life of a process on the disks.
fn live<T>(disks: &[SimDisk], life: impl AsyncFnOnce(&EnvRef) -> T) -> T {
    let world = SimEnv::new(1);
    let process = world.process();
    let env: EnvRef = process.clone();
    let done = process.run_for(LIFE_MAX, life(&env));
    process.halt();
    world.halt();
    let rng = SeededRng::new(1);
    disks.iter().for_each(|disk| disk.kill(&rng));
    done.expect("it comes to an end")
}

/// The disks of the fixture.
fn stored() -> Vec<SimDisk> {
    let packed = fs::read(fixture()).expect("the fixture is part of the tree");
    let (length, packed) = packed.split_first_chunk::<4>().expect("a length");
    let mut bytes = vec![0; usize::try_from(u32::from_le_bytes(*length)).expect("small")];
    decompress(packed, &mut bytes).expect("intact");
    let disks = disks();
    for page in bytes.chunks_exact(8 + PAGE_BYTES) {
        let (place, page) = page.split_first_chunk::<8>().expect("a place");
        let place = u64::from_le_bytes(*place);
        disks[bytes_usize(place >> 48)].poke(place & ((1 << 48) - 1), page);
    }
    disks
}

#[test]
#[ignore = "writes the fixture of a new format version"]
fn write_the_fixture() {
    assert!(!fixture().exists(), "a fixture is never written again");
    let disks = disks();
    for round in 1..=2 {
        live(&disks, async |env| {
            let devices: Vec<_> = disks.iter().map(|disk| disk.open(env)).collect();
            if round == 1 {
                let options =
                    FormatOptions { data_strips: 2, parity_strips: 1, journal_bytes: 1 << 20 };
                Pod::format(env, &devices, &options).await.expect("formatted");
            }
            let pod = open(env, &disks).await.expect("opened");
            if round == 1 {
                let spec = VolumeSpec {
                    name: "db".into(),
                    size_bytes: 1 << 30,
                    logical_block_bytes: 512,
                    read_only: false,
                    write_cache: false,
                };
                pod.create_volume(spec).await.expect("created");
            }
            let blocks = if round == 1 { 0..20 } else { 16..24 };
            let volume = pod.find("db").expect("there");
            for block in blocks {
                let bytes = Bytes::from(content(block));
                Arc::clone(&volume).write(block * 4096, bytes).await.expect("written");
            }
            if round == 1 {
                pod.close().await.expect("closed");
            }
        });
    }
    let mut bytes = Vec::new();
    for (index, disk) in disks.iter().enumerate() {
        for offset in (0..DEVICE_BYTES).step_by(PAGE_BYTES) {
            let mut page = vec![0; PAGE_BYTES];
            disk.peek(offset, &mut page);
            if page.iter().any(|byte| *byte != 0) {
                bytes.extend((u64::try_from(index).expect("small") << 48 | offset).to_le_bytes());
                bytes.extend(page);
            }
        }
    }
    let mut packed = u32::try_from(bytes.len()).expect("small").to_le_bytes().to_vec();
    assert!(compress(&bytes, 19, &mut packed));
    assert!(packed.len() <= FIXTURE_BYTES_MAX, "{} bytes are too many", packed.len());
    fs::write(fixture(), packed).expect("written");
}

#[test]
fn version_1_opens_and_reads() {
    let disks = stored();
    live(&disks, async |env| {
        let pod = open(env, &disks).await.expect("opens");
        let volume = pod.find("db").expect("there");
        assert_eq!(volume.size_bytes(), 1 << 30);
        for block in 0..24 {
            let pieces = Arc::clone(&volume).read(block * 4096, 4096).await.expect("reads");
            let [Piece::Data(data)] = &pieces[..] else { panic!("block {block} is a hole") };
            assert_eq!(data[..], content(block), "block {block}");
        }
        let pieces = Arc::clone(&volume).read(24 * 4096, 4096).await.expect("reads");
        assert!(matches!(pieces[..], [Piece::Zero(4096)]));
    });
}

#[test]
fn what_is_damaged_or_of_another_version_fails_by_name() {
    let cases: [(u64, &[u8], &str); 4] = [
        (0, b"WEFTSB02", "no device holds one"),
        (16, &[0xFF; 16], "no device holds one"),
        (JOURNAL_OFFSET + 96, &[0xFF; 8], "are on no readable device"),
        (JOURNAL_OFFSET + (1 << 20), &[0xFF; 3 << 20], "Root"),
    ];
    for (offset, bytes, words) in cases {
        let disks = stored();
        let newest = Superblock::decode(&slot(&disks[0], 1)).expect("intact");
        for disk in &disks {
            match offset {
                0..4096 => SLOT_OFFSETS.iter().for_each(|slot| disk.poke(slot + offset, bytes)),
                // The first of two batches that follow the checkpoint.
                at if at < JOURNAL_OFFSET + 4096 => {
                    let tail = JOURNAL_OFFSET + newest.tail_position % newest.journal_bytes;
                    disk.poke(tail + at - JOURNAL_OFFSET, bytes);
                }
                at => disk.poke(at, bytes),
            }
        }
        let refused = live(&disks, async |env| open(env, &disks).await.err());
        let error = refused.expect(words).chain();
        assert!(error.contains(words), "{offset}: {error}");
    }
}

fn slot(disk: &SimDisk, slot: usize) -> Vec<u8> {
    let mut bytes = vec![0; 512];
    disk.peek(SLOT_OFFSETS[slot], &mut bytes);
    bytes
}

/// Follows `docs/format.md`, "By hand": no engine, no pool, only bytes and the decoders.
struct Hand {
    disks: Vec<SimDisk>,
    head: Superblock,
    segments: Vec<SegmentEntry>,
}

impl Hand {
    /// Step 1: the newest superblock of any device.
    fn new(disks: Vec<SimDisk>) -> Self {
        let slots = disks.iter().flat_map(|disk| [slot(disk, 0), slot(disk, 1)]);
        let head = slots.filter_map(|slot| Superblock::decode(&slot).ok());
        let head = head.max_by_key(|superblock| superblock.generation).expect("a superblock");
        Self { disks, head, segments: Vec::new() }
    }

    /// A location's record: segment, strip, byte; the strip's place; its bytes on the device.
    fn record(&self, location: Location, places: &[Option<Place>]) -> (RecordHeader, Vec<u8>) {
        let (k, strip_bytes) = (u64::from(self.head.data_strips), self.head.strip_bytes);
        let log_address = (location.0 >> 7) * 16;
        let (strip, byte) = (log_address / strip_bytes % k, log_address % strip_bytes);
        let place = places[bytes_usize(strip)].expect("all strips are there");
        let data_area = JOURNAL_OFFSET + self.head.journal_bytes;
        let at = data_area + u64::from(place.region) * strip_bytes + byte;
        let mut bytes = vec![0; bytes_usize((location.0 & 127) * 512 - byte % 512)];
        self.disks[usize::from(place.device)].peek(at, &mut bytes);
        let (header, payload) =
            decode_record(&bytes, self.head.pod, log_address).expect("an intact record");
        let mut content = vec![0; bytes_usize(header.raw_bytes.into())];
        match header.codec {
            PayloadCodec::Raw => content.copy_from_slice(payload),
            PayloadCodec::Zstd => decompress(payload, &mut content).expect("intact"),
        }
        (header, content)
    }

    fn find(&self, location: Location, kind: RecordKind) -> Vec<u8> {
        let space = AddressSpace {
            data_strips: self.head.data_strips.into(),
            strip_bytes: self.head.strip_bytes,
        };
        let id = space.address(location).expect("stored").segment;
        let segment = self.segments.iter().find(|segment| segment.id == id).expect("known");
        let (header, content) = self.record(location, &segment.places);
        assert_eq!(header.kind, kind);
        content
    }
}

#[test]
fn everything_is_found_by_hand_from_a_superblock() {
    let mut hand = Hand::new(stored());
    let strips = usize::from(hand.head.data_strips + hand.head.parity_strips);
    let (header, payload) = hand.record(hand.head.root, &hand.head.root_places);
    assert_eq!((header.kind, header.lba), (RecordKind::Root, Lba(hand.head.checkpoint)));
    let root = CheckpointRoot::decode(&payload, strips).expect("a root");
    hand.segments = root.metadata_segments.clone();

    for directory in &root.directories {
        let pages = decode_node(&hand.find(*directory, RecordKind::TableDirectory)).expect("one");
        for page in pages.iter().filter(|page| page.is_stored()) {
            let page = hand.find(*page, RecordKind::TablePage);
            hand.segments.extend(decode_page(&page, strips).expect("a page"));
        }
    }
    let parts = root.catalog.iter().map(|part| hand.find(*part, RecordKind::Catalog));
    let catalog = Catalog::decode(&parts.collect::<Vec<_>>().concat()).expect("a catalog");
    let volume = catalog.volume_named("db").expect("there");

    for block in 0..16 {
        let mut at = Location(catalog.layers[&volume.head].root);
        for level in (0..MAP_LEVELS).rev() {
            let node = hand.find(at, RecordKind::MapNode);
            assert_eq!(node.len(), NODE_BYTES);
            let entry = match level {
                0 => bytes_usize(block % 512),
                _ => NodeKey::covering(Lba(block), level - 1).parent().1,
            };
            at = decode_node(&node).expect("a node")[entry];
        }
        let data = hand.find(at, RecordKind::Data);
        assert_eq!(data, content(block), "block {block}");
    }
}

#[test]
fn each_kind_of_damage_has_a_name() {
    let disks = stored();
    let mut bytes = slot(&disks[0], 0);
    assert_eq!(Superblock::decode(&bytes[..511]), Err(DecodeError::Short));
    bytes[200] ^= 1;
    assert_eq!(Superblock::decode(&bytes), Err(DecodeError::Checksum));
    bytes[7] += 1;
    assert_eq!(Superblock::decode(&bytes), Err(DecodeError::Magic));
}
