//! PDUs waiting to be sent; see [`Gather`] for how they wait. Payload is not copied.
//!
//! Data of a successful command ends with the SUCCESS flag, which saves the completion. Strictly
//! that is for queues without flow control (NVMe/TCP 1.0, 3.3.1.2); every host takes it, and other
//! targets send it to all.

use crate::target::gather::Gather;
use crate::target::nvmf::tcp::framing::H2C_BYTES_MAX;
use crate::target::nvmf::tcp::wire;
use crate::target::nvmf::tcp::wire::Agreed;
use crate::target::nvmf::tcp::wire::Fatal;
use crate::target::nvmf::transport::Responder;
use crate::target::nvmf::wire::Cqe;
use crate::volume::Piece;

/// What digests of zero pieces are computed over.
static ZEROES: [u8; 4096] = [0; 4096];

/// The answers of one connection.
#[derive(Default)]
pub struct Outbox {
    /// Whole messages.
    pub gather: Gather,
    agreed: Agreed,
    /// Commands answered since [`Outbox::take_answered`].
    answered: usize,
}

impl Outbox {
    /// How many commands are no longer outstanding since the last call.
    pub fn take_answered(&mut self) -> usize {
        std::mem::take(&mut self.answered)
    }

    /// Begins the connection.
    pub fn begin(&mut self, agreed: Agreed) {
        self.agreed = agreed;
        self.gather.head(|heads| wire::put_ic_resp(heads, agreed, H2C_BYTES_MAX));
    }

    /// Asks for all data of a command.
    pub fn ready_to_transfer(&mut self, cid: u16, tag: u16, length: u32) {
        let agreed = self.agreed;
        self.gather.head(|heads| wire::put_r2t(heads, agreed, cid, tag, length));
    }

    /// Ends the connection.
    pub fn terminate(&mut self, fatal: &Fatal) {
        self.gather.head(|heads| wire::put_term_req(heads, fatal));
    }
}

impl Responder for Outbox {
    fn complete(&mut self, cqe: Cqe) {
        let agreed = self.agreed;
        self.answered += 1;
        self.gather.head(|heads| wire::put_capsule_resp(heads, agreed, &cqe));
    }

    fn data(&mut self, cqe: Cqe, pieces: &mut Vec<Piece>) {
        let agreed = self.agreed;
        let bytes = pieces.iter().map(Piece::len).sum::<usize>();
        let length = u32::try_from(bytes).expect("bounded by MDTS");
        let success = cqe.status.is_success() && cqe.result == 0;
        self.gather.head(|heads| wire::put_c2h_data(heads, agreed, cqe.cid, length, success));
        let digest = agreed.data_digest.then(|| wire::digest_of(pieces.iter().flat_map(runs)));
        for piece in pieces.drain(..) {
            self.gather.piece(piece);
        }
        if let Some(digest) = digest {
            self.gather.head(|heads| heads.extend_from_slice(&digest));
        }
        if success {
            self.answered += 1;
        } else {
            self.complete(cqe);
        }
    }

    fn forget(&mut self, commands: usize) {
        self.answered += commands;
    }
}

/// The bytes of a piece, in runs.
fn runs(piece: &Piece) -> Vec<&[u8]> {
    match piece {
        Piece::Data(bytes) => vec![bytes],
        Piece::Zero(bytes) => {
            let whole = std::iter::repeat_n(&ZEROES[..], bytes / ZEROES.len());
            whole.chain([&ZEROES[..bytes % ZEROES.len()]]).collect()
        }
    }
}
