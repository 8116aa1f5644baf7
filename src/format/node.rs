//! One page of a map: 512 locations, like a page table's.
//!
//! Level 0 nodes (leaves) hold the locations of 512 blocks, 2 MiB of a volume. A node of level
//! `n + 1` holds the locations of 512 nodes of level `n`. Stored as a record of kind `MapNode`
//! whose payload is the 4096 bytes of entries, compressed.

use super::DecodeError;
use super::location::Location;
use crate::units::Lba;

/// Entries per node.
pub const NODE_ENTRIES: usize = 512;
/// Bytes of a node's payload when decoded.
pub const NODE_BYTES: usize = NODE_ENTRIES * 8;
/// Bits of an LBA that one level resolves.
pub const NODE_BITS: u32 = 9;
/// Levels of every map: 2^36 blocks, 256 TiB.
pub const MAP_LEVELS: u8 = 4;
/// Blocks the largest volume can have.
pub const MAP_BLOCKS_MAX: u64 = 1 << (NODE_BITS * MAP_LEVELS as u32);

/// A node's entries.
pub type NodeEntries = Box<[Location; NODE_ENTRIES]>;

/// Which node of a map: its level and its number among the nodes of that level.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct NodeKey {
    /// 0 for leaves.
    pub level: u8,
    /// First block covered, shifted right by the bits of this level and those below.
    pub index: u64,
}

impl NodeKey {
    /// The node of `level` that covers `lba`.
    #[must_use]
    pub fn covering(lba: Lba, level: u8) -> Self {
        Self { level, index: lba.0 >> (NODE_BITS * (u32::from(level) + 1)) }
    }

    /// The node one level up, and this node's entry in it.
    #[must_use]
    pub fn parent(self) -> (Self, usize) {
        let slot = crate::units::bytes_usize(self.index & (NODE_ENTRIES as u64 - 1));
        (Self { level: self.level + 1, index: self.index >> NODE_BITS }, slot)
    }

    /// First block covered.
    #[must_use]
    pub fn first_lba(self) -> u64 {
        self.index << (NODE_BITS * (u32::from(self.level) + 1))
    }

    /// Blocks covered.
    #[must_use]
    pub fn blocks(self) -> u64 {
        1 << (NODE_BITS * (u32::from(self.level) + 1))
    }

    /// How the record that stores the node names it in its LBA field.
    #[must_use]
    pub fn to_record_lba(self) -> Lba {
        Lba(u64::from(self.level) << 56 | self.index)
    }

    /// The inverse of [`NodeKey::to_record_lba`].
    #[must_use]
    pub fn from_record_lba(lba: Lba) -> Option<Self> {
        let level = u8::try_from(lba.0 >> 56).ok().filter(|level| *level < MAP_LEVELS)?;
        Some(Self { level, index: lba.0 & ((1 << 56) - 1) })
    }
}

/// A node with nothing in it.
#[must_use]
pub fn empty_node() -> NodeEntries {
    Box::new([Location::HOLE; NODE_ENTRIES])
}

/// The payload of a node's record.
#[must_use]
pub fn encode_node(entries: &[Location; NODE_ENTRIES]) -> Vec<u8> {
    entries.iter().flat_map(|location| location.0.to_le_bytes()).collect()
}

/// Decodes a node's payload.
///
/// # Errors
/// [`DecodeError::Short`] unless there are exactly [`NODE_BYTES`].
pub fn decode_node(bytes: &[u8]) -> Result<NodeEntries, DecodeError> {
    if bytes.len() != NODE_BYTES {
        return Err(DecodeError::Short);
    }
    let mut node = empty_node();
    let (values, _) = bytes.as_chunks::<8>();
    for (entry, value) in node.iter_mut().zip(values) {
        *entry = Location(u64::from_le_bytes(*value));
    }
    Ok(node)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nodes_and_keys_survive_the_round_trip() {
        let mut node = empty_node();
        node[3] = Location(12345);
        node[511] = Location(u64::MAX);
        assert_eq!(decode_node(&encode_node(&node)), Ok(node));
        assert_eq!(decode_node(&[0; 4095]), Err(DecodeError::Short));

        let lba = Lba(0x1_2345_6789);
        let mut key = NodeKey::covering(lba, 0);
        assert!((key.first_lba()..key.first_lba() + key.blocks()).contains(&lba.0));
        for level in 0..MAP_LEVELS {
            assert_eq!(key, NodeKey::covering(lba, level));
            assert_eq!(NodeKey::from_record_lba(key.to_record_lba()), Some(key));
            key = key.parent().0;
        }
        assert_eq!(NodeKey::from_record_lba(Lba(u64::MAX)), None);
    }
}
