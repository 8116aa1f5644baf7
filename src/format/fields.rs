//! Sequential little-endian fields of variable-length payloads (checkpoint root, table pages).
//!
//! The payload's integrity is the record's business; the reader still refuses anything that runs
//! past the end or claims an absurd count, so that no bytes can make it panic or allocate much.

use super::DecodeError;

/// Appends fields to a payload.
#[derive(Default)]
pub(super) struct FieldWriter {
    bytes: Vec<u8>,
}

impl FieldWriter {
    pub(super) fn u64(&mut self, value: u64) -> &mut Self {
        self.bytes.extend_from_slice(&value.to_le_bytes());
        self
    }

    /// A count, then that many values.
    pub(super) fn list(&mut self, values: &[u64]) -> &mut Self {
        self.u64(values.len() as u64);
        for value in values {
            self.u64(*value);
        }
        self
    }

    pub(super) fn finish(self) -> Vec<u8> {
        self.bytes
    }
}

/// Takes fields from the front of a payload.
pub(super) struct FieldReader<'a> {
    rest: &'a [u8],
}

impl<'a> FieldReader<'a> {
    pub(super) fn new(bytes: &'a [u8]) -> Self {
        Self { rest: bytes }
    }

    pub(super) fn u64(&mut self) -> Result<u64, DecodeError> {
        let (value, rest) = self.rest.split_first_chunk::<8>().ok_or(DecodeError::Short)?;
        self.rest = rest;
        Ok(u64::from_le_bytes(*value))
    }

    /// A count that the remaining bytes can hold at `item_bytes` each.
    pub(super) fn count(&mut self, item_bytes: usize) -> Result<usize, DecodeError> {
        let count = usize::try_from(self.u64()?).map_err(|_| DecodeError::Field)?;
        if count > self.rest.len() / item_bytes {
            return Err(DecodeError::Field);
        }
        Ok(count)
    }

    pub(super) fn list(&mut self) -> Result<Vec<u64>, DecodeError> {
        let count = self.count(8)?;
        (0..count).map(|_| self.u64()).collect()
    }

    /// Everything must have been taken.
    pub(super) fn finish(&self) -> Result<(), DecodeError> {
        if self.rest.is_empty() { Ok(()) } else { Err(DecodeError::Field) }
    }
}
