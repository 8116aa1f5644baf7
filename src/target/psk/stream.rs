//! The bytes of an encrypted connection.

use std::io;
use std::io::IoSlice;
use std::pin::Pin;
use std::task::Context;
use std::task::Poll;

use bytes::BufMut;
use s2n_tls_tokio::TlsStream;
use tokio::io::AsyncReadExt;
use tokio::io::AsyncWrite;

use crate::target::stream::ByteStream;
use crate::target::stream::Socket;

/// Bytes encrypted by one call: a few records. Arbitrary; more would only be copied again if the
/// socket takes less.
const GATHER_BYTES_MAX: usize = 64 * 1024;
/// Longest content of a record. (RFC 8446, 5.1)
const RECORD_BYTES_MAX: usize = 16 * 1024;

/// An encrypted connection.
pub struct PskStream {
    stream: TlsStream<Socket>,
    /// Short slices, joined, so that headers do not get records of their own.
    gathered: Vec<u8>,
}

impl PskStream {
    pub(super) fn new(stream: TlsStream<Socket>) -> Self {
        Self { stream, gathered: Vec::new() }
    }
}

impl ByteStream for PskStream {
    fn poll_receive(
        &mut self,
        cx: &mut Context<'_>,
        buffer: &mut Vec<u8>,
        limit: usize,
    ) -> Poll<io::Result<usize>> {
        let mut part = buffer.limit(limit);
        // `read_buf` keeps nothing between polls, so a new one each time loses nothing.
        std::pin::pin!(self.stream.read_buf(&mut part)).poll(cx)
    }

    /// The library wants bytes that the socket did not take once more, from the first, and no fewer
    /// than a record of them; callers repeat what is unsent in the same order, so it gets them.
    fn poll_send(
        &mut self,
        cx: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let bytes = match slices.iter().find(|slice| !slice.is_empty()) {
            Some(first) if first.len() >= RECORD_BYTES_MAX => &**first,
            _ => {
                self.gathered.clear();
                for slice in slices {
                    let room = GATHER_BYTES_MAX - self.gathered.len();
                    self.gathered.extend(slice.iter().take(room));
                }
                &self.gathered
            }
        };
        Pin::new(&mut self.stream).poll_write(cx, bytes)
    }

    fn poll_flush(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_close(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}
