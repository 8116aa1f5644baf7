//! Where every field of the fixed structures lies, for the test that holds `docs/format.md` to it.

use std::mem::offset_of;

use super::batch::RawBatch;
use super::record::RawHeader;
use super::superblock::RawSuperblock;
use super::unit::RawUnit;

/// One field of a structure on disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Field {
    /// The structure, as `docs/format.md` calls it.
    pub structure: &'static str,
    /// The field's name in the code.
    pub name: &'static str,
    /// Bytes from the start of the structure.
    pub offset: usize,
    /// Its length.
    pub bytes: usize,
}

fn bytes_of<S, F>(_field: fn(&S) -> &F) -> usize {
    size_of::<F>()
}

macro_rules! fields {
    ($structure:literal, $raw:ident: $($field:ident)*) => {
        [$(Field {
            structure: $structure,
            name: stringify!($field),
            offset: offset_of!($raw, $field),
            bytes: bytes_of(|raw: &$raw| &raw.$field),
        }),*]
    };
}

/// All fields, structure by structure, each in order of offset and without a gap.
#[must_use]
pub fn layouts() -> Vec<Field> {
    let superblock = fields!("superblock", RawSuperblock: magic checksum pod_uuid device_uuid
        generation epoch epoch_start tail_position tail_lsn tail_previous id_limit journal_bytes
        strip_bytes device_bytes root_location device_index device_count data_strips parity_strips
        zero checkpoint root_places reserved);
    let batch = fields!("batch", RawBatch: magic entries header_checksum body_checksum position
        epoch first_lsn previous durable_lsn body_bytes reserved);
    let record = fields!("record", RawHeader: magic kind codec flags header_checksum
        payload_checksum lsn branch lba blocks payload_bytes raw_bytes);
    let unit = fields!("unit", RawUnit: magic strip zero header_checksum body_checksum segment row
        epoch reserved);
    [&superblock[..], &batch, &record, &unit].concat()
}
