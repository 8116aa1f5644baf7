//! Compares the tables of `docs/format.md` with the code.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use uuid::Uuid;
use weft::engine::catalog::Catalog;
use weft::engine::catalog::CatalogChange;
use weft::engine::catalog::Hold;
use weft::engine::catalog::HoldKind;
use weft::engine::catalog::HostRecord;
use weft::engine::catalog::MemberRecord;
use weft::engine::catalog::Reservations;
use weft::engine::catalog::VolumeRecord;
use weft::format::batch::BATCH_BYTES_MAX;
use weft::format::layouts::Field;
use weft::format::layouts::layouts;
use weft::format::location::Location;
use weft::format::location::RECORD_ALIGN;
use weft::format::location::SECTORS_MAX;
use weft::format::node::MAP_LEVELS;
use weft::format::node::NODE_ENTRIES;
use weft::format::root::CheckpointRoot;
use weft::format::superblock::JOURNAL_OFFSET;
use weft::format::superblock::SLOT_OFFSETS;
use weft::format::table::PAGE_ENTRIES;
use weft::format::table::Place;
use weft::format::table::STRIPS_MAX;
use weft::format::table::SegmentEntry;
use weft::format::table::encode_page;
use weft::format::unit::UNIT_BYTES;
use weft::secret::DhchapKey;
use weft::secret::HostKeys;
use weft::secret::tls_key::TlsKey;
use weft::units::BLOCK_BYTES;
use weft::units::IO_ALIGN;
use weft::units::Lsn;
use weft::units::SECTOR_BYTES;
use weft::units::SegmentId;

/// A row of a table: the heading above it, and its cells.
struct Row {
    heading: String,
    cells: Vec<String>,
}

fn rows() -> Vec<Row> {
    let page = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/format.md");
    let text = fs::read_to_string(page).expect("the page is part of the tree");
    let (mut heading, mut rows) = (String::new(), Vec::new());
    for line in text.lines() {
        if let Some(title) = line.strip_prefix("##") {
            heading = title.trim_start_matches('#').replace('`', "").trim().to_owned();
        }
        if let Some(cells) = line.strip_prefix("| ").and_then(|line| line.strip_suffix(" |")) {
            let cells = cells.split(" | ").map(|cell| cell.replace('`', "").trim().to_owned());
            rows.push(Row { heading: heading.clone(), cells: cells.collect() });
        }
    }
    rows
}

/// The first three cells of the rows under `heading`, without the table's head.
fn table(heading: &str) -> Vec<[String; 3]> {
    let own = rows().into_iter().filter(|row| row.heading == heading).skip(1);
    own.map(|row| std::array::from_fn(|cell| row.cells[cell].clone())).collect()
}

#[test]
fn every_field_is_drawn_where_it_lies() {
    let fields = layouts();
    for structure in ["superblock", "batch", "record", "unit"] {
        let own: Vec<&Field> = fields.iter().filter(|f| f.structure == structure).collect();
        let drawn = table(structure);
        let lies: Vec<[String; 3]> = own
            .iter()
            .map(|field| [field.offset.to_string(), field.bytes.to_string(), field.name.to_owned()])
            .collect();
        assert_eq!(drawn, lies, "docs/format.md, {structure}");
        // The list itself has no gap, so nothing can be missing in both.
        let mut end = 0;
        for field in own {
            assert_eq!(field.offset, end, "{structure}: {}", field.name);
            end += field.bytes;
        }
    }
    let end = |structure| {
        let own = fields.iter().filter(|field| field.structure == structure);
        own.map(|field| field.offset + field.bytes).max()
    };
    let ends = ["superblock", "batch", "record", "unit"].map(end);
    assert_eq!(ends, [512, 96, 64, 64].map(Some));
}

#[test]
fn constants_are_those_of_the_code() {
    let constants: Vec<(String, String)> =
        table("Constants").into_iter().map(|[name, value, _]| (name, value)).collect();
    let expected = [
        ("SLOT_OFFSET_0", SLOT_OFFSETS[0]),
        ("SLOT_OFFSET_1", SLOT_OFFSETS[1]),
        ("JOURNAL_OFFSET", JOURNAL_OFFSET),
        ("IO_ALIGN", IO_ALIGN),
        ("SECTOR_BYTES", SECTOR_BYTES),
        ("BLOCK_BYTES", BLOCK_BYTES as u64),
        ("BATCH_BYTES_MAX", BATCH_BYTES_MAX),
        ("UNIT_BYTES", UNIT_BYTES as u64),
        ("RECORD_ALIGN", RECORD_ALIGN),
        ("SECTORS_MAX", SECTORS_MAX),
        ("NODE_ENTRIES", NODE_ENTRIES as u64),
        ("MAP_LEVELS", u64::from(MAP_LEVELS)),
        ("PAGE_ENTRIES", PAGE_ENTRIES as u64),
        ("STRIPS_MAX", STRIPS_MAX as u64),
    ];
    let expected = expected.map(|(name, value)| (name.to_owned(), value.to_string()));
    assert_eq!(constants, expected);
}

fn word(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(*bytes[at..].first_chunk().expect("long enough"))
}

/// An entry whose fields hold 11, 1 (the flag), 13 to 16 and two places.
fn entry() -> SegmentEntry {
    SegmentEntry {
        id: SegmentId(11),
        metadata: true,
        rows: 13,
        live_blocks: 14,
        blocks_written: 15,
        bytes_written: 16,
        places: vec![Some(Place { device: 2, region: 7 }), None],
    }
}

#[test]
fn table_pages_and_roots_are_encoded_as_drawn() {
    let page = encode_page(&[entry()]);
    assert_eq!(word(&page, 0), 1, "the count");
    let values = [
        ("id", 11),
        ("flags", 1),
        ("rows", 13),
        ("live_blocks", 14),
        ("blocks_written", 15),
        ("bytes_written", 16),
        ("places", 2 << 48 | 7),
    ];
    let drawn = table("table page");
    assert_eq!(drawn.len(), values.len());
    for ([offset, bytes, field], (name, value)) in drawn.iter().zip(values) {
        assert_eq!(field, name);
        assert_eq!(bytes, if name == "places" { "8 s" } else { "8" });
        assert_eq!(word(&page, 8 + offset.parse::<usize>().expect("an offset")), value, "{name}");
    }
    assert_eq!((word(&page, 64), page.len()), (u64::MAX, 72), "the absent place, and the end");

    let root = CheckpointRoot {
        checkpoint: 21,
        cut: Lsn(22),
        catalog: vec![Location(23)],
        directories: vec![Location(24), Location(25)],
        pages: 26,
        metadata_segments: vec![entry()],
    };
    let bytes = root.encode();
    let words: Vec<u64> = (0..8).map(|at| word(&bytes, at * 8)).collect();
    assert_eq!(words, [21, 22, 1, 23, 2, 24, 25, 26]);
    assert_eq!(bytes[64..], page, "a list of entries is laid out as a page");
    let names: Vec<String> = table("root").into_iter().map(|[_, _, name]| name).collect();
    let order = ["checkpoint", "cut", "catalog", "directories", "pages", "metadata_segments"];
    assert_eq!(names, order);
}

/// With every field that may be left out, but reservations.
fn volume() -> VolumeRecord {
    VolumeRecord {
        id: 1,
        name: "V".to_owned(),
        uuid: Uuid::nil(),
        size_bytes: 4096,
        logical_block_bytes: 512,
        read_only: false,
        branch: 2,
        head: 3,
        hosts: Some(["nqn.h".to_owned()].into()),
        reservations: None,
        write_cache: true,
    }
}

/// Every name in the JSON of a catalog that has everything.
#[test]
fn the_catalog_is_drawn_with_every_name() {
    let kinds = [
        HoldKind::WriteExclusive,
        HoldKind::ExclusiveAccess,
        HoldKind::WriteExclusiveRegistrants,
        HoldKind::ExclusiveAccessRegistrants,
        HoldKind::WriteExclusiveAll,
        HoldKind::ExclusiveAccessAll,
    ];
    let reservations = |kind| Reservations {
        generation: 1,
        persistent: true,
        registrants: [(Uuid::nil(), 1)].into(),
        held: Some(Hold { kind, host: None }),
    };
    let key = |byte| DhchapKey::from_random(None, &[byte; 64]);
    let keys = HostKeys { key: key(1), ctrl_key: Some(key(2)) };
    let tls = TlsKey::from_random(None, &[3; 64]);
    let mut changes = vec![
        CatalogChange::CreateVolume(volume()),
        CatalogChange::ResizeVolume { id: 1, size_bytes: 8192 },
        CatalogChange::AddHost(HostRecord { nqn: "nqn.h".to_owned(), dhchap: Some(keys), tls }),
        CatalogChange::SetHostKeys { nqn: "nqn.h".to_owned(), dhchap: None },
        CatalogChange::SetVolumeHosts { id: 1, hosts: Some(BTreeSet::new()) },
        CatalogChange::SetWriteCache { id: 1, write_cache: true },
    ];
    let set = |kind| CatalogChange::SetReservations { id: 1, reservations: reservations(kind) };
    changes.extend(kinds.map(set));
    let mut catalog = Catalog::new(vec![MemberRecord { index: 0, uuid: Uuid::nil() }]);
    let mut json = Vec::new();
    for (lsn, change) in (1..).zip(&changes) {
        catalog.apply(lsn, change);
        json.extend(change.encode());
    }
    let nqn = || "nqn.h".to_owned();
    json.extend(CatalogChange::DeleteVolume { id: 1 }.encode());
    json.extend(CatalogChange::SetHostTlsKey { nqn: nqn(), tls: None }.encode());
    json.extend(CatalogChange::RemoveHost { nqn: nqn() }.encode());
    json.extend(catalog.encode());

    let page = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/format.md");
    let text = fs::read_to_string(page).expect("the page is part of the tree");
    let (_, section) = text.split_once("## Catalog").expect("a section");
    let (section, _) = section.split_once("\n## ").expect("not the last one");
    // Whatever stands in quotation marks, but identifiers and the volume's name.
    let json = String::from_utf8(json).expect("JSON");
    let words = json.split('"').skip(1).step_by(2);
    let is_name =
        |word: &&str| !word.contains('.') && word.starts_with(|c: char| c.is_ascii_lowercase());
    let named = words.filter(is_name);
    let mut count = 0;
    for word in named {
        let drawn =
            section.contains(&format!("\"{word}\"")) || section.contains(&format!("`{word}`"));
        assert!(drawn, "docs/format.md, Catalog: {word}");
        count += 1;
    }
    assert!(count > 60, "{count} names");
}
