//! Byte streams a session runs on: TCP, Unix sockets, and TLS over either.
//!
//! [`ByteStream`] is poll-based, because one task drives a connection's receiving, sending and
//! requests in flight together. For plain sockets a receive or send is one system call, tried at
//! once if the socket may be ready; an extra attempt costs less than a wait (runtime.md).

use std::io;
use std::io::ErrorKind::WouldBlock;
use std::io::IoSlice;
use std::pin::Pin;
use std::task::Context;
use std::task::Poll;
use std::task::ready;
use std::time::Duration;

use bytes::BufMut;
use rustix::net::sockopt;
use tokio::io::AsyncRead;
use tokio::io::AsyncReadExt;
use tokio::io::AsyncWrite;
use tokio::io::Interest;
use tokio::io::ReadBuf;
use tokio::net::TcpStream;
use tokio::net::UnixStream;
use tokio_rustls::server::TlsStream;

use crate::target::gather::Gather;

/// Idle time after which TCP asks whether the client still lives, so that vanished clients do not
/// hold connections for ever. Arbitrary; a lab switch reboots in less.
const KEEPALIVE_IDLE: Duration = Duration::from_secs(60);

/// A connection's bytes.
pub trait ByteStream {
    /// Receives at most `limit` bytes onto the end of `buffer`, within its capacity or growing it.
    /// 0 is the end of the stream.
    fn poll_receive(
        &mut self,
        cx: &mut Context<'_>,
        buffer: &mut Vec<u8>,
        limit: usize,
    ) -> Poll<io::Result<usize>>;

    /// Sends some of `slices`.
    fn poll_send(
        &mut self,
        cx: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>>;

    /// Pushes out what [`ByteStream::poll_send`] took but kept.
    fn poll_flush(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>>;

    /// Tells the client that nothing more comes.
    fn poll_close(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>>;
}

/// Sends as much of `out` as the stream takes, and flushes it once all has left; `unflushed` says
/// whether the stream may still hold any of it back. Returns how many bytes it took.
///
/// # Errors
/// The stream's.
pub fn send(
    stream: &mut impl ByteStream,
    cx: &mut Context<'_>,
    out: &mut Gather,
    unflushed: &mut bool,
) -> io::Result<usize> {
    let mut sent = 0;
    while !out.is_empty() {
        let Poll::Ready(bytes) = stream.poll_send(cx, &out.slices()) else { return Ok(sent) };
        let bytes = bytes?;
        if bytes == 0 {
            return Err(io::ErrorKind::WriteZero.into());
        }
        out.sent(bytes);
        sent += bytes;
        *unflushed = true;
    }
    if *unflushed && let Poll::Ready(flushed) = stream.poll_flush(cx) {
        flushed?;
        *unflushed = false;
    }
    Ok(sent)
}

/// A connected client.
#[derive(Debug)]
pub enum Socket {
    /// Over TCP.
    Tcp(TcpStream),
    /// Over a Unix socket.
    Unix(UnixStream),
}

impl Socket {
    /// The other end, for people: `127.0.0.1:50122`, or `unix`.
    #[must_use]
    pub fn peer(&self) -> String {
        match self {
            Self::Tcp(stream) => {
                stream.peer_addr().map_or_else(|_| "unknown".to_owned(), |peer| peer.to_string())
            }
            Self::Unix(_) => "unix".to_owned(),
        }
    }

    /// The first byte that the other end sends, which stays there to be received; `None` if it
    /// sends none. Not for Unix sockets, of which it says `None` at once.
    pub async fn first_byte(&self) -> io::Result<Option<u8>> {
        let mut byte = [0];
        match self {
            Self::Tcp(stream) => Ok((stream.peek(&mut byte).await? > 0).then_some(byte[0])),
            Self::Unix(_) => Ok(None),
        }
    }

    /// A receive that got less than it asked for has emptied the socket: more is announced by
    /// epoll (edge-triggered; see epoll(7)). Says so to tokio, which saves asking in vain.
    fn note_drained(&self) {
        let empty = || Err::<(), _>(WouldBlock.into());
        let _ = match self {
            Self::Tcp(stream) => stream.try_io(Interest::READABLE, empty),
            Self::Unix(stream) => stream.try_io(Interest::READABLE, empty),
        };
    }
}

impl From<TcpStream> for Socket {
    /// Takes a TCP connection, sets TCP_NODELAY and keep-alive. (proto.md asks for the former.)
    fn from(stream: TcpStream) -> Self {
        let options = stream
            .set_nodelay(true)
            .and_then(|()| Ok(sockopt::set_socket_keepalive(&stream, true)?))
            .and_then(|()| Ok(sockopt::set_tcp_keepidle(&stream, KEEPALIVE_IDLE)?));
        if let Err(error) = options {
            // The client hung up already; the first receive will say so.
            tracing::debug!(%error, "set socket options");
        }
        Self::Tcp(stream)
    }
}

impl From<UnixStream> for Socket {
    fn from(stream: UnixStream) -> Self {
        Self::Unix(stream)
    }
}

impl ByteStream for Socket {
    fn poll_receive(
        &mut self,
        cx: &mut Context<'_>,
        buffer: &mut Vec<u8>,
        limit: usize,
    ) -> Poll<io::Result<usize>> {
        loop {
            let room = limit.min(buffer.capacity() - buffer.len());
            let mut part = (&mut *buffer).limit(limit);
            let received = match self {
                Self::Tcp(stream) => stream.try_read_buf(&mut part),
                Self::Unix(stream) => stream.try_read_buf(&mut part),
            };
            match received {
                Err(error) if error.kind() == WouldBlock => ready!(match self {
                    Self::Tcp(stream) => stream.poll_read_ready(cx),
                    Self::Unix(stream) => stream.poll_read_ready(cx),
                })?,
                received => {
                    if matches!(received, Ok(bytes) if bytes < room) {
                        self.note_drained();
                    }
                    return Poll::Ready(received);
                }
            }
        }
    }

    fn poll_send(
        &mut self,
        cx: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        loop {
            let sent = match self {
                Self::Tcp(stream) => stream.try_write_vectored(slices),
                Self::Unix(stream) => stream.try_write_vectored(slices),
            };
            match sent {
                Err(error) if error.kind() == WouldBlock => ready!(match self {
                    Self::Tcp(stream) => stream.poll_write_ready(cx),
                    Self::Unix(stream) => stream.poll_write_ready(cx),
                })?,
                sent => return Poll::Ready(sent),
            }
        }
    }

    fn poll_flush(&mut self, _cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_close(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        AsyncWrite::poll_shutdown(Pin::new(self), cx)
    }
}

impl AsyncRead for Socket {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Tcp(stream) => Pin::new(stream).poll_read(cx, buffer),
            Self::Unix(stream) => Pin::new(stream).poll_read(cx, buffer),
        }
    }
}

impl AsyncWrite for Socket {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Self::Tcp(stream) => Pin::new(stream).poll_write(cx, bytes),
            Self::Unix(stream) => Pin::new(stream).poll_write(cx, bytes),
        }
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Self::Tcp(stream) => Pin::new(stream).poll_write_vectored(cx, slices),
            Self::Unix(stream) => Pin::new(stream).poll_write_vectored(cx, slices),
        }
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, _cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Tcp(stream) => Pin::new(stream).poll_shutdown(cx),
            Self::Unix(stream) => Pin::new(stream).poll_shutdown(cx),
        }
    }
}

impl ByteStream for TlsStream<Socket> {
    fn poll_receive(
        &mut self,
        cx: &mut Context<'_>,
        buffer: &mut Vec<u8>,
        limit: usize,
    ) -> Poll<io::Result<usize>> {
        let mut part = buffer.limit(limit);
        // `read_buf` keeps nothing between polls, so a new one each time loses nothing.
        std::pin::pin!(self.read_buf(&mut part)).poll(cx)
    }

    fn poll_send(
        &mut self,
        cx: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        AsyncWrite::poll_write_vectored(Pin::new(self), cx, slices)
    }

    fn poll_flush(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        AsyncWrite::poll_flush(Pin::new(self), cx)
    }

    fn poll_close(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        AsyncWrite::poll_shutdown(Pin::new(self), cx)
    }
}
