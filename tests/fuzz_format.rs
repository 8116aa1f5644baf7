//! Fuzzes every structure on disk, and whole pods on damaged devices. See `fuzz/seeded.rs`.
//!
//! Inputs are valid encodings of drawn, often absurd values, so that their checksums hold and the
//! checks behind them are reached; most are then damaged. The judges are in
//! `fuzz/format_drivers.rs`, which the libFuzzer targets in `fuzz/` share.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::fs;
use std::path::Path;

use uuid::Uuid;
use weft::codec::checksum::crc64;
use weft::codec::compress::compress;
use weft::engine::catalog::Catalog;
use weft::engine::catalog::CatalogChange;
use weft::engine::catalog::Hold;
use weft::engine::catalog::HoldKind;
use weft::engine::catalog::MemberRecord;
use weft::engine::catalog::Reservations;
use weft::engine::catalog::VolumeRecord;
use weft::format::batch::BatchHeader;
use weft::format::location::Location;
use weft::format::node::empty_node;
use weft::format::node::encode_node;
use weft::format::record::PayloadCodec;
use weft::format::record::RecordHeader;
use weft::format::record::RecordKind;
use weft::format::root::CheckpointRoot;
use weft::format::superblock::Superblock;
use weft::format::table::Place;
use weft::format::table::SegmentEntry;
use weft::format::table::encode_page;
use weft::format::unit::UNIT_BYTES;
use weft::format::unit::UnitHeader;
use weft::units::BranchId;
use weft::units::Lba;
use weft::units::Lsn;
use weft::units::SegmentId;

#[path = "../fuzz/format_drivers.rs"]
mod drivers;
#[path = "../fuzz/seeded.rs"]
mod seeded;

use drivers::PLACE;
use drivers::POD;
use drivers::STRIPS;
use seeded::Random;
use seeded::fuzz;

/// A number as fields hold them, or an absurd one.
fn number(random: &mut Random) -> u64 {
    match random.below(8) {
        0 => random.next(),
        1 => random.pick(&[0, 1, u64::MAX, u64::MAX - 1, 1 << 63, u64::from(u32::MAX)]),
        2 => 1 << random.below(64),
        3 => random.below(1 << 20) << 12,
        _ => random.below(1000),
    }
}

fn short(random: &mut Random) -> u16 {
    u16::try_from(number(random) & 0xFFFF).unwrap()
}

fn tiny(random: &mut Random) -> u8 {
    u8::try_from(random.pick(&[0, 1, 2, 4, 6, 16, 31, 32, 255])).unwrap()
}

fn bytes(random: &mut Random, most: usize) -> Vec<u8> {
    let (length, noise) = (random.index(most), random.below(2) == 0);
    (0..length).map(|_| if noise { random.byte() } else { 7 }).collect()
}

fn places(random: &mut Random, count: usize) -> Vec<Option<Place>> {
    let place = |random: &mut Random| Place {
        device: short(random),
        region: u32::try_from(number(random) & 0xFFFF_FFFF).unwrap(),
    };
    (0..count).map(|_| (random.below(4) > 0).then(|| place(random))).collect()
}

fn superblock(random: &mut Random) -> Vec<u8> {
    let superblock = Superblock {
        pod: POD,
        device_uuid: [random.byte(); 16],
        device_index: short(random),
        device_count: short(random),
        data_strips: tiny(random),
        parity_strips: tiny(random),
        strip_bytes: number(random),
        journal_bytes: number(random),
        device_bytes: number(random),
        generation: number(random),
        epoch: number(random),
        epoch_start: Lsn(number(random)),
        tail_position: number(random),
        tail_lsn: Lsn(number(random)),
        tail_previous: number(random),
        id_limit: number(random),
        checkpoint: number(random),
        root: Location(number(random)),
        root_places: places(random, STRIPS),
    };
    superblock.encode().to_vec()
}

fn batch(random: &mut Random) -> Vec<u8> {
    let body = bytes(random, 600);
    let absurd = random.below(4) == 0;
    let mut header = BatchHeader {
        checksum: 0,
        entries: u32::try_from(number(random) & 0xFFFF_FFFF).unwrap(),
        body_checksum: crc64(&body),
        position: number(random),
        epoch: number(random),
        first_lsn: Lsn(number(random)),
        previous: number(random),
        durable_lsn: Lsn(number(random)),
        body_bytes: if absurd { number(random) } else { body.len() as u64 },
    };
    [&header.encode(POD)[..], &body].concat()
}

fn record(random: &mut Random) -> Vec<u8> {
    let payload = bytes(random, 600);
    let kind = random.pick(&[RecordKind::Data, RecordKind::Zero, RecordKind::Root]);
    let absurd = random.below(4) == 0;
    let header = RecordHeader {
        kind,
        codec: random.pick(&[PayloadCodec::Raw, PayloadCodec::Zstd]),
        last_of_entry: random.below(2) == 0,
        keep_allocated: random.below(2) == 0,
        payload_checksum: crc64(&payload),
        lsn: Lsn(number(random)),
        branch: BranchId(number(random)),
        lba: Lba(number(random)),
        blocks: number(random),
        payload_bytes: if absurd { u32::MAX } else { u32::try_from(payload.len()).unwrap() },
        raw_bytes: u32::try_from(number(random) & 0xFFFF_FFFF).unwrap(),
    };
    [&header.encode(POD, PLACE)[..], &payload].concat()
}

fn unit(random: &mut Random) -> Vec<u8> {
    let mut unit = vec![random.byte(); UNIT_BYTES];
    let right = random.below(2) == 0;
    let header = UnitHeader {
        segment: SegmentId(if right { 5 } else { number(random) }),
        strip: if right { 1 } else { short(random) },
        row: if right { 2 } else { number(random) },
        epoch: number(random),
    };
    header.encode_into(POD, &mut unit);
    unit
}

fn node(random: &mut Random) -> Vec<u8> {
    let mut node = empty_node();
    for _ in 0..random.below(20) {
        node[random.index(512)] = Location(number(random));
    }
    encode_node(&node)
}

fn entries(random: &mut Random) -> Vec<SegmentEntry> {
    let entry = |random: &mut Random| SegmentEntry {
        id: SegmentId(number(random)),
        metadata: random.below(2) == 0,
        rows: number(random),
        live_blocks: number(random),
        blocks_written: number(random),
        bytes_written: number(random),
        places: places(random, STRIPS),
    };
    (0..random.below(5)).map(|_| entry(random)).collect()
}

fn page(random: &mut Random) -> Vec<u8> {
    encode_page(&entries(random))
}

fn root(random: &mut Random) -> Vec<u8> {
    let list = |random: &mut Random| -> Vec<Location> {
        (0..random.below(5)).map(|_| Location(number(random))).collect()
    };
    let root = CheckpointRoot {
        checkpoint: number(random),
        cut: Lsn(number(random)),
        catalog: list(random),
        directories: list(random),
        pages: number(random),
        metadata_segments: entries(random),
    };
    root.encode()
}

fn volume(random: &mut Random) -> VolumeRecord {
    VolumeRecord {
        id: number(random) >> 1,
        name: random.pick(&["v", "", "a/b", "\u{fffd}"]).to_owned(),
        uuid: Uuid::from_u128(u128::from(random.next())),
        size_bytes: number(random),
        logical_block_bytes: u32::from(short(random)),
        read_only: random.below(2) == 0,
        branch: number(random) >> 1,
        head: number(random) >> 1,
        hosts: (random.below(2) == 0).then(|| ["nqn.h".to_owned()].into()),
        reservations: (random.below(2) == 0).then(|| reservations(random)),
        write_cache: random.below(2) == 0,
    }
}

fn reservations(random: &mut Random) -> Reservations {
    let host = Uuid::from_u128(u128::from(random.next()));
    Reservations {
        generation: u32::from(short(random)),
        persistent: random.below(2) == 0,
        registrants: [(host, number(random))].into(),
        held: Some(Hold { kind: HoldKind::WriteExclusive, host: Some(host) }),
    }
}

fn catalog(random: &mut Random) -> Vec<u8> {
    let change = CatalogChange::CreateVolume(volume(random));
    if random.below(3) == 0 {
        return change.encode();
    }
    let member = MemberRecord { index: 3, uuid: Uuid::nil() };
    let mut catalog = Catalog::new(vec![member]);
    catalog.apply(number(random), &change);
    catalog.encode()
}

fn payload(random: &mut Random) -> Vec<u8> {
    let content = bytes(random, 8192);
    let mut input = u16::try_from(content.len()).unwrap().to_le_bytes().to_vec();
    compress(&content, -1, &mut input);
    input
}

/// Damage for the pod driver: on up to all devices, more often on few.
fn pod(random: &mut Random) -> Vec<u8> {
    let mut input = vec![random.pick(&[0, 1, 1, 2, 2, 2, 3, 4, 5])];
    for _ in 0..random.below(60) {
        input.extend(random.next().to_le_bytes());
    }
    input
}

#[test]
fn superblocks() {
    fuzz("format_superblock", 1, superblock, drivers::superblock);
}

#[test]
fn batches() {
    fuzz("format_batch", 1, batch, drivers::batch);
}

#[test]
fn records() {
    fuzz("format_record", 1, record, drivers::record);
}

#[test]
fn units() {
    fuzz("format_unit", 10, unit, drivers::unit);
}

#[test]
fn nodes() {
    fuzz("format_node", 1, node, drivers::node);
}

#[test]
fn pages() {
    fuzz("format_page", 1, page, drivers::page);
}

#[test]
fn roots() {
    fuzz("format_root", 1, root, drivers::root);
}

#[test]
fn catalogs() {
    fuzz("format_catalog", 1, catalog, drivers::catalog);
}

#[test]
fn payloads() {
    fuzz("format_payload", 1, payload, drivers::payload);
}

#[test]
fn pods_on_damaged_devices() {
    fuzz("format_pod", 100, pod, drivers::pod);
}

/// Writes a first corpus: one whole input of each kind.
#[test]
#[ignore = "changes the tree: run it when a structure changes"]
fn write_corpus() {
    type Make = fn(&mut Random) -> Vec<u8>;
    let makers: [(&str, Make); 10] = [
        ("superblock", superblock),
        ("batch", batch),
        ("record", record),
        ("unit", unit),
        ("node", node),
        ("page", page),
        ("root", root),
        ("catalog", catalog),
        ("payload", payload),
        ("pod", pod),
    ];
    for (name, make) in makers {
        let directory = format!("{}/fuzz/corpus/format_{name}", env!("CARGO_MANIFEST_DIR"));
        fs::create_dir_all(&directory).unwrap();
        for seed in 1..=4 {
            let input = make(&mut Random(seed));
            fs::write(Path::new(&directory).join(format!("seed-{seed}")), input).unwrap();
        }
    }
}
