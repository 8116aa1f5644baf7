//! Where exponentiations run: on threads of their own, few at a time, so that neither one host's
//! authentication stalls the others of its data-plane thread nor a flood of them burns the machine.
//!
//! # Invariants
//! * At most `AT_ONCE_MAX` run; the others wait in the order they came. A queue has at most one.

use std::sync::Arc;

use tokio::sync::Semaphore;
use tokio::task::spawn_blocking;

use crate::target::nvmf::auth::Exponentiation;
use crate::target::nvmf::auth::Power;
use crate::target::nvmf::status::Status;

/// Exponentiations at once, on all data-plane threads. Two, so that one slow group does not hold up
/// all others, and a flood takes two cores at most.
const AT_ONCE_MAX: usize = 2;

/// The places to run them.
pub struct Exponentiations(Arc<Semaphore>);

impl Default for Exponentiations {
    fn default() -> Self {
        Self(Arc::new(Semaphore::new(AT_ONCE_MAX)))
    }
}

impl Exponentiations {
    /// Runs one when its turn has come.
    ///
    /// # Cancellation
    /// One that has begun runs to its end, and keeps its place until then.
    pub fn run(
        &self,
        exponentiation: Exponentiation,
    ) -> impl Future<Output = Result<Power, Status>> + use<> {
        let places = Arc::clone(&self.0);
        async move {
            let place = places.acquire_owned().await.expect("never closed");
            let run = spawn_blocking(move || {
                let power = exponentiation.run();
                drop(place);
                power
            });
            // Not run because the node stops.
            run.await.map_err(|_| Status::INTERNAL)
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use futures_util::future::join_all;
    use tokio::time::timeout;

    use super::*;
    use crate::target::nvmf::auth::groups::EXPONENT_BYTES_MAX;
    use crate::target::nvmf::auth::groups::Group;
    use crate::target::nvmf::auth::random;

    #[test]
    fn few_run_at_once_and_none_is_forgotten() {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        let places = Exponentiations::default();
        let one = || {
            let exponent = random::<EXPONENT_BYTES_MAX>();
            places.run(Exponentiation { group: Group::Ffdhe2048, exponent, base: None })
        };
        runtime.expect("a runtime").block_on(async {
            let held = Arc::clone(&places.0).acquire_many_owned(2).await.expect("free");
            let waiting = timeout(Duration::from_millis(20), one()).await;
            assert!(waiting.is_err(), "there is no place");
            drop(held);
            let all = join_all((0..5).map(|_| one())).await;
            assert!(all.into_iter().all(|power| power.is_ok_and(|power| power.is_some())));
            assert_eq!(places.0.available_permits(), AT_ONCE_MAX);
        });
    }
}
