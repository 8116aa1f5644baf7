//! How a connection takes turns: with its host, as it receives a batch, answers it and sends the
//! answers in one go, and with the other connections of its thread. The numbers are from runtime.md.

use std::io;
use std::task::Context;
use std::task::Poll;

use tokio::time::Instant;

use crate::target::gather::Gather;
use crate::target::stream;
use crate::target::stream::ByteStream;
use crate::target::timing::Timing;

/// Receive buffer of a connection that is busy.
pub const RECEIVE_BYTES_MAX: usize = 512 * 1024;
/// Receive buffer to begin with; it grows when one receive fills it.
pub const RECEIVE_BYTES_MIN: usize = 64 * 1024;
/// Full batches after which other connections of the thread get their turn.
const BATCHES_BEFORE_YIELD: usize = 2;
/// The same for turns that fill no batch: they are short, but a quick host never lets them end.
const TURNS_BEFORE_YIELD: usize = 8;

/// What a turn did.
pub struct Turn {
    /// Anything was received, executed or sent, so there may be more.
    pub moved: bool,
    /// It reached the bound of a batch.
    pub full: bool,
}

/// Takes turns while there is something to do, but lets others have theirs. Ready with what ends the
/// connection.
pub fn poll_turns<E>(
    cx: &mut Context<'_>,
    mut turn: impl FnMut(&mut Context<'_>) -> Result<Turn, E>,
) -> Poll<E> {
    let mut full_batches = 0;
    for _ in 0..TURNS_BEFORE_YIELD {
        match turn(cx) {
            Err(end) => return Poll::Ready(end),
            // Everything that could move was polled and has our waker.
            Ok(Turn { moved: false, .. }) => return Poll::Pending,
            Ok(Turn { full, .. }) => full_batches += usize::from(full),
        }
        if full_batches == BATCHES_BEFORE_YIELD {
            break;
        }
    }
    cx.waker().wake_by_ref();
    Poll::Pending
}

/// [`stream::send`], and tells `timing` once all has left. True if anything did.
///
/// # Errors
/// The stream's.
pub fn send(
    stream: &mut impl ByteStream,
    cx: &mut Context<'_>,
    out: &mut Gather,
    unflushed: &mut bool,
    timing: &mut Timing,
) -> io::Result<bool> {
    let ready = timing.pending().then(Instant::now);
    let sent = stream::send(stream, cx, out, unflushed)?;
    if let Some(ready) = ready
        && out.is_empty()
        && !*unflushed
    {
        timing.sent(ready, Instant::now());
    }
    Ok(sent > 0)
}
