//! Fused commands: a Compare and the Write right behind it, executed as one. (NVMe Base 1.4, 6.2)
//!
//! Which two belong together is settled by the order in which they were submitted; the host's data
//! for either may come much later, and in any order. No I/O here: [`Fused`] remembers the halves
//! until both can be executed, and what becomes of one whose partner was refused.
//!
//! # Invariants
//! * Nothing of a pair is done unless both halves were accepted and all their data is here.
//! * Every half accepted is returned exactly once: executed, or failed.

use bytes::Bytes;

use crate::target::nvmf::queue::Transfer;
use crate::target::nvmf::status::Status;
use crate::target::nvmf::wire::Sqe;
use crate::target::nvmf::wire::opcode;

/// The FUSE field of either half. (NVMe Base 1.4, figure 104)
const FIRST: u8 = 1;
const SECOND: u8 = 2;

/// The pairs of one queue that are not executed yet, in order of submission.
#[derive(Default)]
pub struct Fused {
    pairs: Vec<Pair>,
}

struct Pair {
    first: Half,
    /// `None`: not submitted yet, which must be the next command.
    second: Option<Half>,
    /// Neither half will be executed, and this is what becomes of those not yet returned.
    failed: Option<Status>,
}

struct Half {
    sqe: Sqe,
    state: State,
}

enum State {
    /// Accepted; its data is on the way.
    Coming,
    /// Ready, with the host's data.
    Here(Bytes),
    /// Refused, or failed: returned.
    Gone,
}

/// Two halves, ready.
#[derive(Debug, PartialEq, Eq)]
pub struct Both {
    /// The Compare.
    pub first: Sqe,
    /// What it compares with.
    pub expected: Bytes,
    /// The Write.
    pub second: Sqe,
    /// What it writes.
    pub data: Bytes,
}

impl Half {
    fn new(sqe: &Sqe, accepted: bool) -> Self {
        Self { sqe: *sqe, state: if accepted { State::Coming } else { State::Gone } }
    }

    fn is_coming(&self, sqe: &Sqe) -> bool {
        matches!(self.state, State::Coming) && self.sqe == *sqe
    }

    fn is_gone(&self) -> bool {
        matches!(self.state, State::Gone)
    }

    /// The identifier of a half that waits; it is gone then.
    fn take_waiting(&mut self) -> Option<u16> {
        let waits = matches!(self.state, State::Here(_));
        waits.then(|| {
            self.state = State::Gone;
            self.sqe.cid()
        })
    }
}

impl Pair {
    fn halves(&mut self) -> impl Iterator<Item = &mut Half> {
        std::iter::once(&mut self.first).chain(&mut self.second)
    }

    /// Both, if both are here.
    fn both(&self) -> Option<Both> {
        let second = self.second.as_ref()?;
        match (&self.first.state, &second.state) {
            (State::Here(expected), State::Here(data)) => Some(Both {
                first: self.first.sqe,
                expected: expected.clone(),
                second: second.sqe,
                data: data.clone(),
            }),
            _ => None,
        }
    }
}

impl Fused {
    /// Whether nothing is remembered: then a command that is not fused need not be submitted.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.pairs.is_empty()
    }

    /// A command was submitted, and `verdict` is what was found of it by itself; returns what
    /// holds. To be called with every command, in order.
    pub fn submit(
        &mut self,
        sqe: &Sqe,
        verdict: Result<Transfer, Status>,
    ) -> Result<Transfer, Status> {
        match (sqe.fuse(), sqe.opcode()) {
            (SECOND, opcode::WRITE) => self.submit_second(sqe, verdict),
            (FIRST, opcode::COMPARE) => {
                self.end_open_pair();
                self.pairs.push(Pair {
                    first: Half::new(sqe, verdict.is_ok()),
                    second: None,
                    failed: verdict.err().map(|_| Status::FUSED_FAILED),
                });
                verdict
            }
            (fuse, _) => {
                self.end_open_pair();
                if fuse == 0 { verdict } else { Err(Status::INVALID_FIELD) }
            }
        }
    }

    fn submit_second(
        &mut self,
        sqe: &Sqe,
        verdict: Result<Transfer, Status>,
    ) -> Result<Transfer, Status> {
        let open = self.pairs.last_mut().filter(|pair| pair.second.is_none());
        let Some(pair) = open else { return Err(Status::FUSED_MISSING) };
        let verdict = match pair.failed {
            Some(status) => Err(status),
            None if !same_range(&pair.first.sqe, sqe) => Err(Status::INVALID_FIELD),
            None => verdict,
        };
        pair.second = Some(Half::new(sqe, verdict.is_ok()));
        if verdict.is_err() {
            pair.failed = Some(Status::FUSED_FAILED);
        }
        verdict
    }

    /// What was submitted is no second half, so a first one that needed it has none.
    fn end_open_pair(&mut self) {
        if let Some(pair) = self.pairs.last_mut()
            && pair.second.is_none()
        {
            pair.failed = pair.failed.or(Some(Status::FUSED_MISSING));
            // Stands for the one that is missing.
            pair.second = Some(Half::new(&pair.first.sqe, false));
        }
    }

    /// All data of a half that was accepted is here; returns the pair if it was the last.
    pub fn arrive(&mut self, sqe: &Sqe, data: Bytes) -> Option<Both> {
        let index = self.set_coming(sqe, State::Here(data))?;
        let pair = self.pairs.get(index).filter(|pair| pair.failed.is_none())?;
        let both = pair.both()?;
        self.pairs.remove(index);
        Some(both)
    }

    /// A half that was accepted is refused after all: its data did not come as it should.
    pub fn refuse(&mut self, sqe: &Sqe) {
        if let Some(index) = self.set_coming(sqe, State::Gone)
            && let Some(pair) = self.pairs.get_mut(index)
        {
            pair.failed = pair.failed.or(Some(Status::FUSED_FAILED));
        }
    }

    /// The next half that waits for a partner that will not come, and its status. To be called
    /// until there is none, after anything else.
    pub fn take_failed(&mut self) -> Option<(u16, Status)> {
        for pair in &mut self.pairs {
            if let Some(status) = pair.failed
                && let Some(cid) = pair.halves().find_map(Half::take_waiting)
            {
                return Some((cid, status));
            }
        }
        // One whose second half may still be submitted has to be remembered.
        self.pairs.retain_mut(|pair| {
            pair.failed.is_none()
                || pair.second.is_none()
                || !pair.halves().all(|half| half.is_gone())
        });
        None
    }

    /// Finds the half whose data is to come and says what became of it; the index of its pair.
    fn set_coming(&mut self, sqe: &Sqe, state: State) -> Option<usize> {
        let mut pairs = self.pairs.iter_mut().enumerate();
        let (index, half) = pairs.find_map(|(index, pair)| {
            let half = pair.halves().find(|half| half.is_coming(sqe))?;
            Some((index, half))
        })?;
        half.state = state;
        Some(index)
    }
}

/// Whether two commands name the same blocks.
fn same_range(first: &Sqe, second: &Sqe) -> bool {
    let range = |sqe: &Sqe| (sqe.nsid(), sqe.u64(40), sqe.u16(48));
    range(first) == range(second)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::target::nvmf::wire::SQE_BYTES;

    const ACCEPTED: Result<Transfer, Status> = Ok(Transfer::FromHost(512));

    fn sqe(opcode: u8, fuse: u8, cid: u8, slba: u8) -> Sqe {
        let mut bytes = [0; SQE_BYTES];
        (bytes[0], bytes[1], bytes[2], bytes[40]) = (opcode, fuse, cid, slba);
        Sqe::new(bytes)
    }

    fn pair(cid: u8) -> (Sqe, Sqe) {
        (sqe(opcode::COMPARE, FIRST, cid, 7), sqe(opcode::WRITE, SECOND, cid + 1, 7))
    }

    fn bytes(byte: u8) -> Bytes {
        Bytes::copy_from_slice(&[byte])
    }

    #[test]
    fn both_are_executed_whichever_data_comes_first_and_whatever_comes_between() {
        for second_first in [false, true] {
            let mut fused = Fused::default();
            let (first, second) = pair(1);
            assert_eq!(fused.submit(&first, ACCEPTED), ACCEPTED);
            assert_eq!(fused.submit(&second, ACCEPTED), ACCEPTED);
            assert_eq!(fused.submit(&sqe(opcode::READ, 0, 9, 7), ACCEPTED), ACCEPTED);
            let both = Both { first, expected: bytes(1), second, data: bytes(2) };
            if second_first {
                assert_eq!(fused.arrive(&second, bytes(2)), None);
                assert_eq!(fused.arrive(&first, bytes(1)), Some(both));
            } else {
                assert_eq!(fused.arrive(&first, bytes(1)), None);
                assert_eq!(fused.arrive(&second, bytes(2)), Some(both));
            }
            assert!(fused.is_empty() && fused.take_failed().is_none());
        }
    }

    #[test]
    fn a_half_without_a_partner_fails_and_so_does_one_whose_partner_was_refused() {
        let mut fused = Fused::default();
        let (first, second) = pair(1);
        // Nothing before it.
        assert_eq!(fused.submit(&second, ACCEPTED), Err(Status::FUSED_MISSING));
        // Another command behind it, with its own data here before or after.
        for here_before in [false, true] {
            assert_eq!(fused.submit(&first, ACCEPTED), ACCEPTED);
            if here_before {
                assert_eq!(fused.arrive(&first, bytes(1)), None);
                assert_eq!(fused.take_failed(), None);
            }
            assert_eq!(fused.submit(&sqe(opcode::READ, 0, 9, 7), ACCEPTED), ACCEPTED);
            if !here_before {
                assert_eq!(fused.take_failed(), None);
                assert_eq!(fused.arrive(&first, bytes(1)), None);
            }
            assert_eq!(fused.take_failed(), Some((1, Status::FUSED_MISSING)));
            assert_eq!(fused.take_failed(), None);
            assert!(fused.is_empty());
        }
        // The first was refused.
        let refused = Err(Status::LBA_OUT_OF_RANGE);
        assert_eq!(fused.submit(&first, refused), refused);
        assert_eq!(fused.take_failed(), None);
        assert_eq!(fused.submit(&second, ACCEPTED), Err(Status::FUSED_FAILED));
        assert_eq!(fused.take_failed(), None);
        assert!(fused.is_empty());
        // The second was, or names other blocks, or its data was damaged.
        let elsewhere = sqe(opcode::WRITE, SECOND, 2, 8);
        for (second, verdict, result) in [
            (second, refused, refused),
            (elsewhere, ACCEPTED, Err(Status::INVALID_FIELD)),
            (second, ACCEPTED, ACCEPTED),
        ] {
            assert_eq!(fused.submit(&first, ACCEPTED), ACCEPTED);
            assert_eq!(fused.arrive(&first, bytes(1)), None);
            assert_eq!(fused.submit(&second, verdict), result);
            if result.is_ok() {
                fused.refuse(&second);
            }
            assert_eq!(fused.take_failed(), Some((1, Status::FUSED_FAILED)));
            assert_eq!(fused.take_failed(), None);
            assert!(fused.is_empty());
        }
    }

    #[test]
    fn only_a_compare_and_a_write_may_be_fused() {
        let mut fused = Fused::default();
        for (opcode, fuse) in
            [(opcode::READ, FIRST), (opcode::WRITE, FIRST), (opcode::COMPARE, SECOND)]
        {
            let verdict = fused.submit(&sqe(opcode, fuse, 1, 0), ACCEPTED);
            assert_eq!(verdict, Err(Status::INVALID_FIELD));
        }
        assert_eq!(
            fused.submit(&sqe(opcode::WRITE, 3, 1, 0), ACCEPTED),
            Err(Status::INVALID_FIELD)
        );
        assert!(fused.is_empty());
    }
}
