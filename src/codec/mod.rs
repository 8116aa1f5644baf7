//! Checksums, compression and the erasure code: thin, pure wrappers over libraries.
//!
//! Everything here is bytes in, bytes out: no I/O, no clock, no identity of any device or volume.
//! Callers are `format` (checksums), `pool` (parity, rebuilding) and `engine` (chunks). What each
//! library may not be trusted with is asserted here once, so that callers need not know it:
//!
//! * [`checksum`]: CRC-64/NVME, the only checksum on our devices.
//! * [`compress`]: zstd frames of known size; any bytes may be given to the decoder.
//! * [`erasure`]: Reed-Solomon over 64-byte blocks; misaligned ranges are refused loudly, since
//!   the library answers them with wrong bytes.

pub mod checksum;
pub mod compress;
pub mod erasure;
