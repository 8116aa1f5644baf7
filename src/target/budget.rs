//! Memory for requests in flight, over all connections and protocols of a node.
//!
//! Each connection has [`ALLOWANCE_BYTES`] of its own, so that small requests ask nobody. What is
//! beyond that it takes from the one [`Budget`] before it receives a payload or begins a read; while
//! there is none left it takes no further request, and its host waits in its socket. What comes back
//! goes to those who wait in the order they came, however much they want.
//!
//! Counted are payloads from their first byte to their answer, and data for the host until the socket
//! has it. Not counted is what every connection may have, and `connections_max` bounds: the
//! allowance, a receive buffer of up to 576 KiB, tables and headers, in all less than 2 MiB; data in
//! capsules as `nvmf/tcp/connection.rs` says. What a reply points into
//! is at most twice as long as what is counted, and the cache's until it lets go of it.
//!
//! # Invariants
//! * Takes are whole: nobody holds a part of what a request needs while it waits for the rest. So
//!   whoever holds bytes needs none to finish, and bytes come back.
//! * At most the budget is taken, but for one request larger than all of it, which goes alone.
//! * A host that does not move on what it holds bytes for is cut off once others have waited for
//!   [`STALL_TIME`], whatever else it does: it is up to no host how long others wait.

use std::collections::VecDeque;
use std::pin::Pin;
use std::sync::Arc;
use std::task::Context;
use std::task::Poll;
use std::task::Waker;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::time::Instant;
use tokio::time::Sleep;
use tokio::time::sleep;
use weft_api::InFlightStats;

use crate::target::gather::BATCH_BYTES;
use crate::target::gather::Gather;
use crate::units::bytes_u64;
use crate::volume::READ_BYTES_MIN;

/// What each connection may hold without asking: a batch of answers, and room for a small read more,
/// so that those from RAM never ask.
pub const ALLOWANCE_BYTES: u64 = BATCH_BYTES + READ_BYTES_MIN;
/// Takes are rounded up to this, so that small requests beyond the allowance do not ask one by one.
const STEP_BYTES: u64 = 256 << 10;
/// How long a host may stand still while others wait. Far above what a host that lives pauses for; with
/// a look more it is below the 30 s that Linux' NVMe host gives a command, so that those who wait are
/// served before they give up.
pub const STALL_TIME: Duration = Duration::from_secs(20);
/// How often in that time to look whether it moves.
const STALL_LOOKS: u32 = 4;
/// To have moved fewer bytes than this between two looks is to stand still: a host that trickles
/// would otherwise hold a large request for ever. It is 50 KB/s, less than any network for disks.
const STALL_BYTES: u64 = 256 << 10;

/// The memory that all connections share.
#[derive(Debug)]
pub struct Budget {
    bytes_max: u64,
    stall_time: Duration,
    /// Held for one take or return.
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    taken: u64,
    /// In order of arrival, which is that of their numbers.
    waiting: VecDeque<Waiter>,
    /// So many have had to wait.
    next_number: u64,
}

#[derive(Debug)]
struct Waiter {
    number: u64,
    bytes: u64,
    waker: Waker,
}

/// What became of a take.
enum Take {
    Granted,
    /// It has this number among those that wait.
    Waits(u64),
}

impl Budget {
    /// A budget of `bytes_max`.
    #[must_use]
    pub fn new(bytes_max: u64) -> Arc<Self> {
        Self::with_stall_time(bytes_max, STALL_TIME)
    }

    /// The same with another time that hosts may stand still.
    #[must_use]
    pub fn with_stall_time(bytes_max: u64, stall_time: Duration) -> Arc<Self> {
        Arc::new(Self { bytes_max, stall_time, state: Mutex::default() })
    }

    /// How much of it is taken.
    #[must_use]
    pub fn taken(&self) -> u64 {
        self.state.lock().taken
    }

    /// How many connections wait.
    #[must_use]
    pub fn waiting(&self) -> usize {
        self.state.lock().waiting.len()
    }

    /// What the management plane shows of it.
    #[must_use]
    pub fn stats(&self) -> InFlightStats {
        let state = self.state.lock();
        InFlightStats {
            limit_bytes: self.bytes_max,
            taken_bytes: state.taken,
            waiting: bytes_u64(state.waiting.len()),
            waits: state.next_number,
        }
    }

    /// Takes `bytes` if they are there, strictly, and nobody waits.
    fn try_take(&self, bytes: u64) -> bool {
        bytes <= self.bytes_max && self.state.lock().try_take(bytes, self.bytes_max)
    }

    /// Takes `bytes`, or waits behind those that wait already.
    fn take(&self, bytes: u64, waker: &Waker) -> Take {
        let mut state = self.state.lock();
        if state.try_take(bytes, self.bytes_max) {
            return Take::Granted;
        }
        let number = state.next_number;
        state.next_number += 1;
        state.waiting.push_back(Waiter { number, bytes, waker: waker.clone() });
        Take::Waits(number)
    }

    /// Looks after a take that waits, which now wants `bytes`; true if it has them. It had `before`
    /// in mind, and if that is what it was granted, this is how much it is.
    fn look(&self, number: u64, before: u64, bytes: u64, waker: &Waker) -> Option<u64> {
        let mut state = self.state.lock();
        let Some(at) = state.position(number) else { return Some(before) };
        let waiter = &mut state.waiting[at];
        waiter.bytes = bytes;
        waiter.waker.clone_from(waker);
        // It may want less than before.
        let woken = state.grant(self.bytes_max);
        let granted = state.position(number).is_none();
        drop(state);
        woken.into_iter().for_each(Waker::wake);
        granted.then_some(bytes)
    }

    /// Ends a take that waits; what it was granted meanwhile, `bytes`, goes back.
    fn cancel(&self, number: u64, bytes: u64) {
        let mut state = self.state.lock();
        match state.position(number) {
            Some(at) => drop(state.waiting.remove(at)),
            None => state.taken -= bytes,
        }
        let woken = state.grant(self.bytes_max);
        drop(state);
        woken.into_iter().for_each(Waker::wake);
    }

    fn give_back(&self, bytes: u64) {
        let mut state = self.state.lock();
        state.taken -= bytes;
        let woken = state.grant(self.bytes_max);
        drop(state);
        woken.into_iter().for_each(Waker::wake);
    }
}

impl State {
    fn try_take(&mut self, bytes: u64, bytes_max: u64) -> bool {
        let takes = self.waiting.is_empty() && self.fits(bytes, bytes_max);
        if takes {
            self.taken += bytes;
        }
        takes
    }

    fn fits(&self, bytes: u64, bytes_max: u64) -> bool {
        self.taken == 0 || self.taken + bytes <= bytes_max
    }

    fn position(&self, number: u64) -> Option<usize> {
        self.waiting.binary_search_by_key(&number, |waiter| waiter.number).ok()
    }

    /// Gives what there is to those at the front, who are to be woken.
    fn grant(&mut self, bytes_max: u64) -> Vec<Waker> {
        let mut woken = Vec::new();
        while self.waiting.front().is_some_and(|waiter| self.fits(waiter.bytes, bytes_max)) {
            let Some(waiter) = self.waiting.pop_front() else { break };
            self.taken += waiter.bytes;
            woken.push(waiter.waker);
        }
        woken
    }
}

/// One connection's part of the budget; dropping it gives everything back.
///
/// The connection counts what it holds itself, and says so with each call.
#[derive(Debug)]
pub struct Share {
    budget: Arc<Budget>,
    /// Taken from the budget.
    taken: u64,
    waiting: Option<Ticket>,
    watch: Option<Watch>,
}

#[derive(Debug)]
struct Ticket {
    number: u64,
    bytes: u64,
}

/// What memory waits for that comes back only if the host does something: data that it was asked
/// for, or answers that it is to take.
#[derive(Clone, Copy, Debug)]
pub struct Owed {
    /// There is some now.
    pub some: bool,
    /// Bytes of it that have moved, ever.
    pub moved: u64,
}

impl Owed {
    /// To take what waits in `out`.
    #[must_use]
    pub fn answers(out: &Gather) -> Self {
        Self { some: !out.is_empty(), moved: out.sent_bytes() }
    }
}

/// Whether a host that holds bytes moves.
#[derive(Debug)]
struct Watch {
    look: Pin<Box<Sleep>>,
    /// What had moved at the last one.
    moved: [u64; 2],
    /// Looks in a row at which it stood still and others waited.
    still: u32,
}

impl Share {
    /// A connection that holds nothing.
    #[must_use]
    pub fn new(budget: Arc<Budget>) -> Self {
        Self { budget, taken: 0, waiting: None, watch: None }
    }

    /// How much more a connection that holds `held` may hold without asking.
    #[must_use]
    pub fn room(&self, held: u64) -> u64 {
        (ALLOWANCE_BYTES + self.taken).saturating_sub(held)
    }

    /// Ready once there is room for `more` bytes beside the `held` ones. To be given up if the
    /// connection has no use for them any more: see [`Share::give_up`].
    pub fn poll_room(&mut self, cx: &mut Context<'_>, held: u64, more: u64) -> Poll<()> {
        loop {
            if self.room(held) >= more {
                self.give_up();
                return Poll::Ready(());
            }
            self.settle(held);
            let bytes = beyond_allowance(held + more) - self.taken;
            let Some(ticket) = &mut self.waiting else {
                match self.budget.take(bytes, cx.waker()) {
                    Take::Granted => self.taken += bytes,
                    Take::Waits(number) => self.waiting = Some(Ticket { number, bytes }),
                }
                if self.waiting.is_some() {
                    return Poll::Pending;
                }
                continue;
            };
            let Some(granted) = self.budget.look(ticket.number, ticket.bytes, bytes, cx.waker())
            else {
                ticket.bytes = bytes;
                return Poll::Pending;
            };
            self.waiting = None;
            self.taken += granted;
        }
    }

    /// Makes room for `more` bytes beside the `held` ones if nobody has to wait for that.
    pub fn try_room(&mut self, held: u64, more: u64) -> bool {
        if self.room(held) < more {
            let bytes = beyond_allowance(held + more) - self.taken;
            if !self.budget.try_take(bytes) {
                return false;
            }
            self.taken += bytes;
        }
        true
    }

    /// Waits no longer.
    pub fn give_up(&mut self) {
        if let Some(Ticket { number, bytes }) = self.waiting.take() {
            self.budget.cancel(number, bytes);
        }
    }

    /// Gives back what a connection that holds `held` does not need.
    pub fn settle(&mut self, held: u64) {
        let needed = beyond_allowance(held);
        if self.taken > needed {
            self.budget.give_back(self.taken - needed);
            self.taken = needed;
        }
    }

    /// The same with what waits in `out`, which is part of `held`. It may keep more alive than its
    /// bytes: that is counted too, or let go if there is no room for it. So it costs those nothing
    /// whose answers leave at once.
    pub fn settle_with(&mut self, held: u64, out: &mut Gather) {
        if out.kept_bytes() > 0 && !self.try_room(held, out.kept_bytes()) {
            out.copy_short();
        }
        self.settle(held + out.kept_bytes());
    }

    /// Ready when the connection is to be cut off: it holds what others wait for, and its host has
    /// let something that it owes stand still for [`STALL_TIME`].
    pub fn poll_stalled(&mut self, cx: &mut Context<'_>, owed: [Owed; 2]) -> Poll<()> {
        let moved = owed.map(|owed| owed.moved);
        let every = self.budget.stall_time / STALL_LOOKS;
        let watch = match &mut self.watch {
            Some(watch) => watch,
            None if self.taken == 0 => return Poll::Pending,
            None => {
                let look = Box::pin(sleep(every));
                self.watch.insert(Watch { look, moved, still: 0 })
            }
        };
        while watch.look.as_mut().poll(cx).is_ready() {
            if self.taken == 0 {
                self.watch = None;
                break;
            }
            let ours = usize::from(self.waiting.is_some());
            let stands = owed.iter().zip(watch.moved).any(|(owed, before)| {
                // Each by itself: who takes answers may not keep the data that it owes for that.
                owed.some && owed.moved - before < STALL_BYTES
            });
            let still = stands && self.budget.waiting() > ours;
            watch.still = if still { watch.still + 1 } else { 0 };
            // One look more: others may have come just before the first.
            if watch.still > STALL_LOOKS {
                return Poll::Ready(());
            }
            watch.moved = moved;
            watch.look.as_mut().reset(Instant::now() + every);
        }
        Poll::Pending
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        self.give_up();
        self.settle(0);
    }
}

/// What a connection that holds `held` has to have taken.
fn beyond_allowance(held: u64) -> u64 {
    held.saturating_sub(ALLOWANCE_BYTES).next_multiple_of(STEP_BYTES)
}

#[cfg(test)]
mod tests {
    use std::future::poll_fn;

    use futures_util::task::noop_waker_ref;
    use proptest::prelude::*;
    use tokio::runtime;

    use super::*;

    const MIB: u64 = 1 << 20;

    /// Asks for `more` beside what is held within the allowance, which has nothing to spare.
    fn ask(share: &mut Share, more: u64) -> bool {
        let mut cx = Context::from_waker(noop_waker_ref());
        share.poll_room(&mut cx, ALLOWANCE_BYTES, more).is_ready()
    }

    fn hold(budget: &Arc<Budget>, bytes: u64) -> Share {
        let mut share = Share::new(Arc::clone(budget));
        assert!(ask(&mut share, bytes));
        share
    }

    #[test]
    fn the_allowance_costs_nothing_and_what_is_beyond_is_taken_whole_and_given_back() {
        let budget = Budget::new(4 * MIB);
        let mut share = Share::new(Arc::clone(&budget));
        let mut cx = Context::from_waker(noop_waker_ref());
        assert!(share.poll_room(&mut cx, 0, ALLOWANCE_BYTES).is_ready());
        assert_eq!((share.room(0), budget.taken()), (ALLOWANCE_BYTES, 0));
        assert!(ask(&mut share, 1));
        assert_eq!((share.room(ALLOWANCE_BYTES), budget.taken()), (STEP_BYTES, STEP_BYTES));
        assert!(ask(&mut share, 3 * MIB));
        assert_eq!(budget.taken(), 3 * MIB);
        share.settle(ALLOWANCE_BYTES + MIB);
        assert_eq!(budget.taken(), MIB);
        drop(share);
        assert_eq!(budget.taken(), 0);
    }

    #[test]
    fn those_who_wait_are_served_in_order_and_nobody_passes_them() {
        let budget = Budget::new(4 * MIB);
        let holder = hold(&budget, 3 * MIB);
        let (mut first, mut second) = (Share::new(budget.clone()), Share::new(budget.clone()));
        assert!(!ask(&mut first, 3 * MIB));
        assert!(!ask(&mut second, MIB), "it would fit, and passes nobody");
        assert_eq!((budget.taken(), budget.waiting()), (3 * MIB, 2), "nothing is held by halves");
        drop(holder);
        assert_eq!((budget.taken(), budget.waiting()), (4 * MIB, 0), "theirs before they look");
        assert!(ask(&mut first, 3 * MIB) && ask(&mut second, MIB));
        assert_eq!(budget.taken(), 4 * MIB);
    }

    #[test]
    fn what_can_be_done_without_passes_nobody_and_waits_for_nothing() {
        let budget = Budget::new(4 * MIB);
        let mut share = Share::new(budget.clone());
        assert!(!share.try_room(ALLOWANCE_BYTES, 9 * MIB), "not even alone");
        let holder = hold(&budget, 2 * MIB);
        assert!(share.try_room(ALLOWANCE_BYTES, MIB));
        let mut waits = Share::new(budget.clone());
        assert!(!ask(&mut waits, 2 * MIB));
        assert!(!share.try_room(ALLOWANCE_BYTES, 2 * MIB), "though it would fit");
        assert_eq!((budget.taken(), budget.waiting()), (3 * MIB, 1));
        drop((holder, share));
        assert!(ask(&mut waits, 2 * MIB));
    }

    #[test]
    fn what_is_larger_than_everything_goes_alone() {
        let budget = Budget::new(4 * MIB);
        let holder = hold(&budget, MIB);
        let mut large = Share::new(budget.clone());
        assert!(!ask(&mut large, 9 * MIB));
        drop(holder);
        assert!(ask(&mut large, 9 * MIB));
        assert!(!ask(&mut Share::new(budget.clone()), MIB));
        drop(large);
        assert_eq!((budget.taken(), budget.waiting()), (0, 0));
    }

    #[test]
    fn who_gives_up_or_ends_makes_way_also_if_it_was_served_meanwhile() {
        let budget = Budget::new(4 * MIB);
        let holder = hold(&budget, 4 * MIB);
        let mut shares = [(); 3].map(|()| Share::new(budget.clone()));
        for share in &mut shares {
            assert!(!ask(share, 4 * MIB));
        }
        let [mut first, second, mut third] = shares;
        first.give_up();
        drop(holder);
        assert_eq!((budget.taken(), budget.waiting()), (4 * MIB, 1), "the second has it");
        drop(second);
        assert!(ask(&mut third, 4 * MIB));
        drop(third);
        assert_eq!((budget.taken(), budget.waiting()), (0, 0));
    }

    #[test]
    fn who_waits_and_needs_less_by_now_gets_less() {
        let budget = Budget::new(4 * MIB);
        let mut cx = Context::from_waker(noop_waker_ref());
        let _holder = hold(&budget, 3 * MIB);
        let mut share = Share::new(budget.clone());
        let mut asks = |held| share.poll_room(&mut cx, held, 2 * MIB).is_ready();
        assert!(!asks(ALLOWANCE_BYTES));
        assert!(asks(ALLOWANCE_BYTES - MIB), "some of what it held has come back");
        assert_eq!((budget.taken(), budget.waiting()), (4 * MIB, 0));
    }

    /// Whether a host that owes both is cut off that moves what `moves` says, while others wait.
    fn is_cut_off(moves: [bool; 2]) -> bool {
        let budget = Budget::with_stall_time(4 * MIB, Duration::from_millis(8));
        let mut share = hold(&budget, 4 * MIB);
        let mut waits = Share::new(budget);
        assert!(!ask(&mut waits, MIB));
        let mut owed = moves.map(|_| Owed { some: true, moved: 0 });
        let mut looks = 0;
        let cut_off = poll_fn(|cx| {
            for (owed, moves) in owed.iter_mut().zip(moves) {
                owed.moved += u64::from(moves) * STALL_BYTES;
            }
            looks += 1;
            match share.poll_stalled(cx, owed) {
                Poll::Ready(()) => Poll::Ready(true),
                Poll::Pending if looks > 4 * STALL_LOOKS => Poll::Ready(false),
                Poll::Pending => Poll::Pending,
            }
        });
        runtime::Builder::new_current_thread()
            .enable_time()
            .build()
            .expect("a runtime")
            .block_on(cut_off)
    }

    #[test]
    fn nothing_that_is_owed_may_stand_still_whatever_else_moves() {
        assert!(is_cut_off([false, false]));
        assert!(is_cut_off([true, false]) && is_cut_off([false, true]));
        assert!(!is_cut_off([true, true]));
    }

    proptest! {
        /// Connections that hold, wait, give up and end as they like.
        #[test]
        fn what_is_taken_is_bounded_and_accounted_for_and_nobody_waits_in_vain(
            steps in prop::collection::vec((0..6_usize, 0..5_u8, 0..24_u64), 1..200),
        ) {
            let budget = Budget::new(4 * MIB);
            let mut cx = Context::from_waker(noop_waker_ref());
            let new = || (Share::new(Arc::clone(&budget)), 0_u64);
            let mut all: Vec<_> = (0..6).map(|_| new()).collect();
            for (which, action, quarters) in steps {
                let more = quarters * MIB / 4;
                let (share, held) = &mut all[which];
                match action {
                    0 | 1 => {
                        if share.poll_room(&mut cx, *held, more).is_ready() {
                            *held += more;
                        }
                    }
                    2 => {
                        *held = held.saturating_sub(more);
                        share.settle(*held);
                    }
                    3 => share.give_up(),
                    _ => all[which] = new(),
                }
                for (share, held) in &all {
                    prop_assert!(share.waiting.is_some() || share.taken >= beyond_allowance(*held));
                    prop_assert!(*held <= ALLOWANCE_BYTES + share.taken);
                }
                let state = budget.state.lock();
                let waits = |of: &Ticket| state.position(of.number).is_some();
                let granted = |share: &Share| {
                    share.waiting.as_ref().filter(|of| !waits(of)).map_or(0, |of| of.bytes)
                };
                let known: u64 = all.iter().map(|(share, _)| share.taken + granted(share)).sum();
                prop_assert_eq!(state.taken, known);
                let holders = all.iter().filter(|(share, _)| share.taken + granted(share) > 0);
                prop_assert!(state.taken <= budget.bytes_max || holders.count() == 1);
                if let Some(front) = state.waiting.front() {
                    prop_assert!(!state.fits(front.bytes, budget.bytes_max));
                }
            }
            drop(all);
            prop_assert_eq!((budget.taken(), budget.waiting()), (0, 0));
        }
    }
}
