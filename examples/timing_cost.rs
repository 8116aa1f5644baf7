//! What it costs the processor to time a request that is answered from RAM, in batches of 1 and 32.
//!
//! `cargo run --release --example timing_cost`
//!
//! Loads on a socket are too noisy to tell a part in a hundred; this runs what the data plane does
//! for a batch, and nothing else.

use std::sync::Arc;

use tokio::time::Instant;
use weft::observe::requests::Requests;
use weft::target::timing::Timing;
use weft_api::FrontEnd;
use weft_api::Operation;

/// Batches of a measurement.
const BATCHES: u32 = 200_000;
/// Measurements, of which the median counts.
const ROUNDS: usize = 11;

fn main() {
    for requests in [1, 32] {
        let mut rounds: Vec<f64> = (0..ROUNDS).map(|_| ns_per_request(requests)).collect();
        rounds.sort_by(f64::total_cmp);
        println!("batch of {requests}: {:.1} ns each", rounds[ROUNDS / 2]);
    }
}

fn ns_per_request(requests: u32) -> f64 {
    let counted = Arc::new(Requests::default());
    let mut timing = Timing::new(FrontEnd::Nbd, true);
    let start = Instant::now();
    for _ in 0..BATCHES {
        timing.received();
        for _ in 0..requests {
            timing.answered(&counted, Operation::Read, 4096);
        }
        let ready = Instant::now();
        timing.sent(ready, Instant::now());
    }
    let ns = start.elapsed().as_secs_f64() * 1e9;
    ns / f64::from(BATCHES) / f64::from(requests)
}
