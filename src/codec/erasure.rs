//! The erasure code of a segment: k data strips and m parity strips, any k of which give the rest.
//!
//! Reed-Solomon over GF(2^16) by the reed-solomon-simd crate, whose *high rate* code is named
//! explicitly: the crate's default may choose another code for another geometry or version, and
//! parity on devices must mean the same for ever. A fixture below pins its bytes.
//!
//! # Invariants
//!
//! * Every 64-byte block is coded alone (32 low bytes, then 32 high bytes of 32 elements). So any
//!   range of the strips may be coded by itself **if it starts and ends on a multiple of
//!   [`CODING_BYTES`] from the start of the strip**. Given other ranges the library answers with
//!   wrong bytes; lengths are asserted here, offsets are the caller's to assert.
//! * Strips are numbered 0..k (data), then k..k+m (parity).
//! * The code is linear: a lost strip is a sum of k survivors, each multiplied by a coefficient that
//!   depends on nothing but which strips they are. Decoding through the library costs some 165 us
//!   flat, so we let it decode unit vectors once per set of survivors and keep the coefficients; the
//!   multiplication takes about a microsecond per 4 KiB.
//! * Rotten survivors decode silently: the caller verifies what was rebuilt.

use std::sync::Arc;

use parking_lot::Mutex;
use reed_solomon_simd::engine::DefaultEngine;
use reed_solomon_simd::engine::Engine;
use reed_solomon_simd::engine::GfElement;
use reed_solomon_simd::engine::tables;
use reed_solomon_simd::engine::utils;
use reed_solomon_simd::rate::HighRateDecoder;
use reed_solomon_simd::rate::HighRateEncoder;
use reed_solomon_simd::rate::RateDecoder;
use reed_solomon_simd::rate::RateEncoder;
use rustc_hash::FxHashMap;

use crate::error::Error;
use crate::error::ErrorKind;
use crate::error::Result;

/// Strips are coded in blocks of this many bytes; ranges start and end on a multiple of it.
pub const CODING_BYTES: usize = 64;

/// Most strips in a code: a set of strips is the bits of a `u64`.
pub const STRIPS_MAX: usize = 64;

/// Bytes of each strip encoded at a time, so that the work of one step stays in the core's cache.
const ENCODE_STEP_BYTES: usize = 16 * 1024;

/// Blocks rebuilt at a time: the product of one survivor waits on the stack.
const REBUILD_STEP_BLOCKS: usize = 32;

/// Sets of survivors whose coefficients are kept. 10+4 has 4004 of them, which is ample; a pod that
/// meets more starts over, at 165 us each.
const COEFFICIENT_SETS_MAX: usize = 8192;

/// Which strip is wanted, and the set of strips it is rebuilt from, one bit each.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
struct Rebuild {
    lost: usize,
    survivors: u64,
}

impl Rebuild {
    /// The survivor's place among the survivors, in the order of their numbers.
    fn rank(self, strip: usize) -> usize {
        (0..strip).filter(|&lower| self.survivors >> lower & 1 == 1).count()
    }
}

/// A k+m code, shared by all threads.
pub struct ErasureCode {
    data_strips: usize,
    parity_strips: usize,
    engine: DefaultEngine,
    /// Idle encoders, at most one per thread that ever encoded at the same time. Held to pop or push.
    encoders: Mutex<Vec<HighRateEncoder<DefaultEngine>>>,
    /// Logarithms of the coefficients, by rank of the survivor. Held to look up or insert.
    coefficients: Mutex<FxHashMap<Rebuild, Arc<[GfElement]>>>,
}

impl ErasureCode {
    /// A code of `data_strips` + `parity_strips`. Without parity nothing can be rebuilt.
    ///
    /// # Errors
    /// `InvalidRequest` without data strips, or with more than [`STRIPS_MAX`] strips.
    pub fn new(data_strips: usize, parity_strips: usize) -> Result<Self> {
        if data_strips == 0 || data_strips.saturating_add(parity_strips) > STRIPS_MAX {
            let context = format!(
                "{data_strips}+{parity_strips}; use at least 1 data strip and at most \
                 {STRIPS_MAX} strips in all"
            );
            return Err(
                Error::new(ErrorKind::InvalidRequest, "set up erasure code").context(context)
            );
        }
        Ok(Self {
            data_strips,
            parity_strips,
            engine: DefaultEngine::new(),
            encoders: Mutex::new(Vec::new()),
            coefficients: Mutex::new(FxHashMap::default()),
        })
    }

    /// Number of data strips, k.
    #[must_use]
    pub fn data_strips(&self) -> usize {
        self.data_strips
    }

    /// Number of parity strips, m.
    #[must_use]
    pub fn parity_strips(&self) -> usize {
        self.parity_strips
    }

    /// Fills the m `parity` buffers from the same range of all k `data` strips.
    ///
    /// # Panics
    /// If a count is wrong, lengths differ, or the length is not a multiple of [`CODING_BYTES`].
    pub fn encode(&self, data: &[&[u8]], parity: &mut [&mut [u8]]) {
        assert_eq!(data.len(), self.data_strips, "one buffer per data strip");
        assert_eq!(parity.len(), self.parity_strips, "one buffer per parity strip");
        let length = data[0].len();
        assert!(length.is_multiple_of(CODING_BYTES), "length {length} is not whole coding blocks");
        assert!(data.iter().all(|strip| strip.len() == length), "data strips differ in length");
        assert!(parity.iter().all(|strip| strip.len() == length), "parity strips differ in length");
        if self.parity_strips == 0 {
            return;
        }

        let idle = self.encoders.lock().pop();
        let mut encoder = idle.unwrap_or_else(|| self.encoder(CODING_BYTES));
        for start in (0..length).step_by(ENCODE_STEP_BYTES) {
            let range = start..length.min(start + ENCODE_STEP_BYTES);
            encoder
                .reset(self.data_strips, self.parity_strips, range.len())
                .expect("the geometry was accepted before and the length is even");
            for strip in data {
                encoder.add_original_shard(&strip[range.clone()]).expect("lengths are equal");
            }
            let encoded = encoder.encode().expect("all data strips were added");
            for (strip, bytes) in parity.iter_mut().zip(encoded.recovery_iter()) {
                strip[range.clone()].copy_from_slice(bytes);
            }
        }
        self.encoders.lock().push(encoder);
    }

    /// Fills `out` with strip `lost`, data or parity, from the same range of exactly k others, each
    /// with its number, in any order.
    ///
    /// # Panics
    /// If there are not k different survivors, one of them is `lost`, a number is not below k+m,
    /// lengths differ, or the length is not a multiple of [`CODING_BYTES`].
    pub fn reconstruct(&self, lost: usize, survivors: &[(usize, &[u8])], out: &mut [u8]) {
        let rebuild = self.check_rebuild(lost, survivors, out.len());
        let coefficients = self.coefficients(rebuild);
        let mut product = [[0; CODING_BYTES]; REBUILD_STEP_BLOCKS];

        let (out_blocks, _) = out.as_chunks_mut::<CODING_BYTES>();
        for (step, sum) in out_blocks.chunks_mut(REBUILD_STEP_BLOCKS).enumerate() {
            let start = step * REBUILD_STEP_BLOCKS;
            sum.fill([0; CODING_BYTES]);
            for &(strip, bytes) in survivors {
                let (blocks, _) = bytes.as_chunks::<CODING_BYTES>();
                let product = &mut product[..sum.len()];
                product.copy_from_slice(&blocks[start..start + sum.len()]);
                self.engine.mul(product, coefficients[rebuild.rank(strip)]);
                utils::xor(sum, product);
            }
        }
    }

    /// Asserts what [`ErasureCode::reconstruct`] promises to panic on.
    fn check_rebuild(&self, lost: usize, survivors: &[(usize, &[u8])], length: usize) -> Rebuild {
        let strips = self.data_strips + self.parity_strips;
        assert!(lost < strips, "strip {lost} of a code of {strips}");
        assert!(length.is_multiple_of(CODING_BYTES), "length {length} is not whole coding blocks");
        assert_eq!(survivors.len(), self.data_strips, "exactly k survivors");
        let mut set = 0_u64;
        for &(strip, bytes) in survivors {
            assert!(strip < strips && strip != lost, "strip {strip} cannot help to rebuild {lost}");
            assert!(set >> strip & 1 == 0, "strip {strip} is given twice");
            assert_eq!(bytes.len(), length, "survivors and output differ in length");
            set |= 1 << strip;
        }
        Rebuild { lost, survivors: set }
    }

    /// The coefficients' logarithms, computed at most once while they are kept.
    fn coefficients(&self, rebuild: Rebuild) -> Arc<[GfElement]> {
        if let Some(known) = self.coefficients.lock().get(&rebuild) {
            return Arc::clone(known);
        }
        // Not under the lock: two threads may compute the same, which does no harm.
        let computed = self.compute_coefficients(rebuild);
        let mut kept = self.coefficients.lock();
        if kept.len() >= COEFFICIENT_SETS_MAX {
            kept.clear();
        }
        kept.insert(rebuild, Arc::clone(&computed));
        computed
    }

    /// Lets the library rebuild the strip from unit vectors: block i of survivor i holds the element
    /// 1 and all else is zero, so block i of the answer holds the coefficient of survivor i.
    fn compute_coefficients(&self, rebuild: Rebuild) -> Arc<[GfElement]> {
        let units = self.data_strips * CODING_BYTES;
        let mut decoder = HighRateDecoder::new(
            self.data_strips,
            self.parity_strips,
            units,
            DefaultEngine::new(),
            None,
        )
        .expect("the geometry was accepted and a strip without survivors cannot be asked for");
        let mut data = vec![vec![0_u8; units]; self.data_strips];
        for strip in (0..STRIPS_MAX).filter(|&strip| rebuild.survivors >> strip & 1 == 1) {
            let mut unit = vec![0; units];
            unit[rebuild.rank(strip) * CODING_BYTES] = 1;
            if let Some(parity) = strip.checked_sub(self.data_strips) {
                decoder.add_recovery_shard(parity, &unit).expect("a parity strip, once");
            } else {
                decoder.add_original_shard(strip, &unit).expect("a data strip, once");
                data[strip] = unit;
            }
        }
        let decoded = decoder.decode().expect("k survivors are enough");
        for (strip, bytes) in decoded.restored_original_iter() {
            data[strip].copy_from_slice(bytes);
        }

        let Some(parity) = rebuild.lost.checked_sub(self.data_strips) else {
            return logarithms(&data[rebuild.lost]);
        };
        let mut encoder = self.encoder(units);
        for strip in &data {
            encoder.add_original_shard(strip).expect("lengths are equal");
        }
        let encoded = encoder.encode().expect("all data strips were added");
        logarithms(encoded.recovery(parity).expect("the strip is below k+m"))
    }

    /// A new encoder for strips of `length` bytes; not for codes without parity.
    fn encoder(&self, length: usize) -> HighRateEncoder<DefaultEngine> {
        let engine = DefaultEngine::new();
        HighRateEncoder::new(self.data_strips, self.parity_strips, length, engine, None)
            .expect("at most 64 strips, of even length, and some parity")
    }
}

/// The logarithm of the first element of each block: what [`Engine::mul`] multiplies by.
fn logarithms(strip: &[u8]) -> Arc<[GfElement]> {
    let log = &tables::get_exp_log().log;
    let (blocks, _) = strip.as_chunks::<CODING_BYTES>();
    let logarithm = |block: &[u8; CODING_BYTES]| {
        let element = GfElement::from_le_bytes([block[0], block[CODING_BYTES / 2]]);
        // If one survivor did not matter, k-1 strips would determine another.
        assert!(element != 0, "every survivor counts in a code that rebuilds from any k");
        log[usize::from(element)]
    };
    blocks.iter().map(logarithm).collect()
}

#[cfg(test)]
mod tests {
    use proptest::collection::vec;
    use proptest::prelude::any;
    use proptest::proptest;
    use proptest::sample::Index;
    use reed_solomon_simd::engine::Naive;

    use super::*;
    use crate::codec::checksum::Checksum;

    const GEOMETRIES: [(usize, usize); 7] =
        [(1, 1), (2, 1), (1, 2), (3, 2), (4, 2), (8, 3), (10, 4)];

    /// Bytes that depend on strip and place alone, the same on every machine.
    fn strip_bytes(strip: usize, length: usize) -> Vec<u8> {
        let mut state = 0x9E37_79B9_7F4A_7C15_u64.wrapping_mul(u64::try_from(strip).unwrap() + 1);
        let next = |_| {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            state.to_le_bytes()[7]
        };
        (0..length).map(next).collect()
    }

    /// All k+m strips of `data`.
    fn encoded(code: &ErasureCode, mut strips: Vec<Vec<u8>>) -> Vec<Vec<u8>> {
        let length = strips[0].len();
        let mut parity = vec![vec![0xAA; length]; code.parity_strips()];
        let data: Vec<&[u8]> = strips.iter().map(Vec::as_slice).collect();
        let mut buffers: Vec<&mut [u8]> = parity.iter_mut().map(Vec::as_mut_slice).collect();
        code.encode(&data, &mut buffers);
        strips.append(&mut parity);
        strips
    }

    fn sample(k: usize, m: usize, length: usize) -> (ErasureCode, Vec<Vec<u8>>) {
        let code = ErasureCode::new(k, m).unwrap();
        let strips = encoded(&code, (0..k).map(|strip| strip_bytes(strip, length)).collect());
        (code, strips)
    }

    /// Every set of exactly `k` out of `n` strips, as their numbers.
    fn survivor_sets(k: usize, n: usize) -> impl Iterator<Item = Vec<usize>> {
        (0..1_u32 << n)
            .filter(move |set| usize::try_from(set.count_ones()) == Ok(k))
            .map(move |set| (0..n).filter(|strip| set >> strip & 1 == 1).collect())
    }

    fn pick<'a>(strips: &'a [Vec<u8>], chosen: &[usize]) -> Vec<(usize, &'a [u8])> {
        chosen.iter().map(|&strip| (strip, strips[strip].as_slice())).collect()
    }

    #[test]
    fn any_strip_comes_back_from_any_k_others() {
        for (k, m) in GEOMETRIES {
            let (code, strips) = sample(k, m, 128);
            for chosen in survivor_sets(k, k + m) {
                for lost in (0..k + m).filter(|strip| !chosen.contains(strip)) {
                    let mut out = vec![0x55; 128];
                    code.reconstruct(lost, &pick(&strips, &chosen), &mut out);
                    assert_eq!(out, strips[lost], "{k}+{m}: {lost} from {chosen:?}");
                }
            }
        }
    }

    #[test]
    fn coefficients_agree_with_the_library_decoder() {
        for (k, m) in [(1, 1), (4, 2), (8, 3)] {
            let (code, strips) = sample(k, m, 4096);
            for chosen in survivor_sets(k, k + m) {
                let engine = DefaultEngine::new();
                let mut decoder = HighRateDecoder::new(k, m, 4096, engine, None).unwrap();
                for &strip in &chosen {
                    match strip.checked_sub(k) {
                        Some(parity) => decoder.add_recovery_shard(parity, &strips[strip]).unwrap(),
                        None => decoder.add_original_shard(strip, &strips[strip]).unwrap(),
                    }
                }
                for (lost, expected) in decoder.decode().unwrap().restored_original_iter() {
                    let mut out = vec![0; 4096];
                    code.reconstruct(lost, &pick(&strips, &chosen), &mut out);
                    assert_eq!(out, expected, "{k}+{m}: {lost} from {chosen:?}");
                }
            }
        }
    }

    #[test]
    fn parity_bytes_are_those_of_every_pod_written_so_far() {
        let checksum = |(k, m)| {
            let (_, strips) = sample(k, m, 64 * 1024);
            let mut checksum = Checksum::new();
            strips[k..].iter().for_each(|parity| _ = checksum.update(parity));
            format!("{k}+{m} {:016x}", checksum.finish())
        };
        let written = [(4, 2), (2, 1), (8, 3), (10, 4)].map(checksum);
        assert_eq!(
            written,
            [
                "4+2 46ce94d25f4a6f61",
                "2+1 605820e587caa447",
                "8+3 b8850bf73c984fab",
                "10+4 2789b616d1ff47a2"
            ]
        );
    }

    #[test]
    fn fast_engine_agrees_with_the_reference_engine() {
        let (_, strips) = sample(4, 2, 1024);
        let mut encoder = HighRateEncoder::new(4, 2, 1024, Naive::new(), None).unwrap();
        for strip in &strips[..4] {
            encoder.add_original_shard(strip).unwrap();
        }
        let encoded = encoder.encode().unwrap();
        assert!(encoded.recovery_iter().eq(strips[4..].iter().map(Vec::as_slice)));
    }

    #[test]
    fn one_parity_strip_is_the_exclusive_or() {
        let (_, strips) = sample(3, 1, 256);
        let sum = |at: usize| strips[0][at] ^ strips[1][at] ^ strips[2][at];
        assert_eq!(strips[3], (0..256).map(sum).collect::<Vec<_>>());
    }

    #[test]
    fn without_parity_encode_does_nothing() {
        let code = ErasureCode::new(2, 0).unwrap();
        code.encode(&[&[1; 64], &[2; 64]], &mut []);
    }

    #[test]
    fn impossible_geometries_are_refused() {
        for (k, m) in [(0, 0), (0, 2), (64, 1), (65, 0), (usize::MAX, 1)] {
            let error = ErasureCode::new(k, m).err().expect("refused");
            assert_eq!(error.kind(), ErrorKind::InvalidRequest);
        }
        assert!(ErasureCode::new(60, 4).is_ok());
    }

    #[test]
    #[should_panic(expected = "not whole coding blocks")]
    fn misaligned_encode_is_refused() {
        let code = ErasureCode::new(2, 1).unwrap();
        code.encode(&[&[0; 96], &[0; 96]], &mut [&mut [0; 96]]);
    }

    #[test]
    #[should_panic(expected = "not whole coding blocks")]
    fn misaligned_rebuild_is_refused() {
        let code = ErasureCode::new(2, 1).unwrap();
        code.reconstruct(0, &[(1, &[0; 32]), (2, &[0; 32])], &mut [0; 32]);
    }

    #[test]
    #[should_panic(expected = "given twice")]
    fn survivor_given_twice_is_refused() {
        let code = ErasureCode::new(2, 1).unwrap();
        code.reconstruct(0, &[(1, &[0; 64]), (1, &[0; 64])], &mut [0; 64]);
    }

    #[test]
    #[should_panic(expected = "cannot help")]
    fn lost_strip_among_survivors_is_refused() {
        let code = ErasureCode::new(2, 1).unwrap();
        code.reconstruct(0, &[(0, &[0; 64]), (1, &[0; 64])], &mut [0; 64]);
    }

    #[test]
    #[should_panic(expected = "exactly k survivors")]
    fn too_few_survivors_are_refused() {
        let code = ErasureCode::new(2, 1).unwrap();
        code.reconstruct(0, &[(1, &[0; 64])], &mut [0; 64]);
    }

    proptest! {
        #[test]
        fn any_m_lost_strips_come_back(
            geometry in any::<Index>(),
            order in vec(any::<u32>(), 14),
            blocks in 1..600_usize,
            seed in 0..1000_usize,
        ) {
            let (k, m) = *geometry.get(&GEOMETRIES);
            let code = ErasureCode::new(k, m).unwrap();
            let data = (0..k).map(|strip| strip_bytes(seed + strip, blocks * 64)).collect();
            let strips = encoded(&code, data);
            let mut shuffled: Vec<usize> = (0..k + m).collect();
            shuffled.sort_by_key(|&strip| order[strip]);
            let (lost, survivors) = shuffled.split_at(m);
            for &strip in lost {
                let mut out = vec![0; blocks * 64];
                code.reconstruct(strip, &pick(&strips, survivors), &mut out);
                assert_eq!(out, strips[strip]);
            }
        }

        #[test]
        fn aligned_ranges_are_coded_alone(start in 0..64_usize, blocks in 1..64_usize) {
            let (code, strips) = sample(4, 2, 128 * 64);
            let range = start * 64..(start + blocks) * 64;
            let cut = |strip: usize| (strip, &strips[strip][range.clone()]);
            let mut out = vec![0; blocks * 64];
            code.reconstruct(2, &[cut(5), cut(0), cut(4), cut(1)], &mut out);
            assert_eq!(out, strips[2][range.clone()]);
        }
    }
}
