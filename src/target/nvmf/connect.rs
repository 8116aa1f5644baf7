//! The fabrics Connect command: what the host asks for, and whether it gets it. (NVMe-oF 1.1, 3.3)

use std::fmt;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use crate::observe::event;
use crate::target::nvmf::controller::ADMIN_QUEUE_ENTRIES_MAX;
use crate::target::nvmf::controller::Controller;
use crate::target::nvmf::controller::IO_QUEUE_ENTRIES_MAX;
use crate::target::nvmf::controller::Identity;
use crate::target::nvmf::controller::Kind;
use crate::target::nvmf::controller::QueueRefused;
use crate::target::nvmf::status::Status;
use crate::target::nvmf::subsystem::DISCOVERY_NQN;
use crate::target::nvmf::subsystem::Subsystem;
use crate::target::nvmf::transport::SecureNames;
use crate::target::nvmf::wire::Sqe;

/// Bytes of the command's data.
pub const CONNECT_DATA_BYTES: u32 = 1024;
/// Longest NQN. (NVMe Base 1.4, 7.9)
const NQN_BYTES_MAX: usize = 223;
/// The controller number with which a host asks for a new controller.
const CONTROLLER_ID_ANY: u16 = 0xffff;

/// Offsets of what may be wrong, in the command's data.
const DATA_CONTROLLER_ID: u16 = 16;
const DATA_SUBSYSTEM_NQN: u16 = 256;
const DATA_HOST_NQN: u16 = 512;
/// And in the command itself.
const SQE_QID: u16 = 42;
const SQE_SIZE: u16 = 44;

/// A queue that was admitted.
pub struct Connected {
    /// Its controller.
    pub controller: Arc<Controller>,
    /// Its number; 0 is the admin queue.
    pub qid: u16,
    /// Its entries, counted from 0.
    pub entries: u16,
    /// Whether the host has to authenticate before it is served: it has a key.
    pub authenticate: bool,
}

/// A refusal, and the result that says what was wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Refused {
    /// Why.
    pub status: Status,
    /// Offset of the wrong parameter, and whether it lies in the data.
    pub result: u64,
}

/// What the data of a Connect says.
struct Data<'a> {
    host_id: [u8; 16],
    controller_id: u16,
    subsystem_nqn: &'a str,
    host_nqn: &'a str,
}

/// Admits a queue or refuses it. `from` is where the host is, and `secured` whom its connection is
/// with, if that is encrypted.
pub fn connect(
    subsystem: &Subsystem,
    from: IpAddr,
    secured: Option<&SecureNames>,
    sqe: &Sqe,
    data: &[u8],
) -> Result<Connected, Refused> {
    if sqe.u16(40) != 0 {
        return Err(refused(Status::CONNECT_FORMAT));
    }
    let data = decode(data, from)?;
    let (qid, entries) = (sqe.u16(42), sqe.u16(44));
    let entries_max = if qid == 0 { ADMIN_QUEUE_ENTRIES_MAX } else { IO_QUEUE_ENTRIES_MAX };
    if entries == 0 || entries > entries_max {
        return Err(in_sqe(SQE_SIZE));
    }
    let kind = match data.subsystem_nqn {
        DISCOVERY_NQN => Kind::Discovery,
        nqn if nqn == subsystem.nqn() => Kind::Io,
        _ => return Err(in_data(DATA_SUBSYSTEM_NQN)),
    };
    // The discovery log is for all; it names the subsystem only to hosts that are let in.
    if kind == Kind::Io && !subsystem.admits(data.host_nqn, from) {
        tell_of_stranger(format_args!("{} may not connect from {from}", data.host_nqn));
        let (status, result) = (Status::CONNECT_INVALID_HOST, in_data(DATA_HOST_NQN).result);
        return Err(Refused { status, result });
    }
    check_channel(subsystem, from, secured, &data)?;
    let identity = Identity {
        kind,
        subsystem_nqn: data.subsystem_nqn.to_owned(),
        host_nqn: data.host_nqn.to_owned(),
        host_id: data.host_id,
    };
    let controller = if qid == 0 {
        admin_queue(subsystem, sqe, data.controller_id, identity)?
    } else {
        io_queue(subsystem, qid, data.controller_id, &identity)?
    };
    // Discovery tells nobody more than its name lets it see.
    let authenticate = kind == Kind::Io && subsystem.host_keys(data.host_nqn).is_some();
    Ok(Connected { controller, qid, entries, authenticate })
}

/// Refuses hosts that do not encrypt and have to, and those that have the key of another name.
fn check_channel(
    subsystem: &Subsystem,
    from: IpAddr,
    secured: Option<&SecureNames>,
    data: &Data<'_>,
) -> Result<(), Refused> {
    let refuse = |message: fmt::Arguments<'_>| {
        subsystem.authentication_failed(message);
        let (status, result) = (Status::CONNECT_INVALID_HOST, in_data(DATA_HOST_NQN).result);
        Err(Refused { status, result })
    };
    let nqn = data.host_nqn;
    match secured {
        Some(names) if names.host_nqn != nqn => refuse(format_args!(
            "{from} says that it is {nqn}, by the TLS key of {}",
            names.host_nqn
        )),
        Some(names) if names.subsystem_nqn != data.subsystem_nqn => refuse(format_args!(
            "{nqn} from {from} connects to another subsystem than its TLS key is for"
        )),
        Some(_) => Ok(()),
        None if data.subsystem_nqn != DISCOVERY_NQN && subsystem.host_tls_key(nqn).is_some() => {
            refuse(format_args!("{nqn} from {from} has a TLS key and does not use it"))
        }
        None => Ok(()),
    }
}

fn admin_queue(
    subsystem: &Subsystem,
    sqe: &Sqe,
    controller_id: u16,
    identity: Identity,
) -> Result<Arc<Controller>, Refused> {
    if controller_id != CONTROLLER_ID_ANY {
        return Err(in_data(DATA_CONTROLLER_ID));
    }
    let keep_alive = Duration::from_millis(u64::from(sqe.u32(48)));
    subsystem.create_controller(identity, keep_alive).ok_or(refused(Status::CONNECT_BUSY))
}

fn io_queue(
    subsystem: &Subsystem,
    qid: u16,
    controller_id: u16,
    identity: &Identity,
) -> Result<Arc<Controller>, Refused> {
    let controller = subsystem
        .controller(controller_id)
        .filter(|controller| controller.identity() == identity)
        .ok_or(in_data(DATA_CONTROLLER_ID))?;
    if identity.kind == Kind::Discovery {
        return Err(in_sqe(SQE_QID));
    }
    controller.open_io_queue(qid).map_err(|why| match why {
        QueueRefused::NotGranted => in_sqe(SQE_QID),
        QueueRefused::NotReady | QueueRefused::InUse => refused(Status::SEQUENCE_ERROR),
    })?;
    Ok(controller)
}

fn decode(data: &[u8], from: IpAddr) -> Result<Data<'_>, Refused> {
    let part =
        |from: usize, to: usize| data.get(from..to).ok_or(refused(Status::SGL_LENGTH_INVALID));
    let host_id = part(0, 16)?.try_into().expect("16 bytes");
    let controller_id = u16::from_le_bytes(part(16, 18)?.try_into().expect("2 bytes"));
    let subsystem_nqn = nqn(part(256, 512)?).ok_or(in_data(DATA_SUBSYSTEM_NQN))?;
    let Some(host_nqn) = nqn(part(512, 768)?) else {
        tell_of_stranger(format_args!("a host at {from} gives no valid name: set its host NQN"));
        return Err(in_data(DATA_HOST_NQN));
    };
    Ok(Data { host_id, controller_id, subsystem_nqn, host_nqn })
}

/// Tells the operator of a host that is not let in. One subject, whatever name it gives: a flood of
/// strangers is one event.
fn tell_of_stranger(message: fmt::Arguments<'_>) {
    event::raise(event::HOST_REFUSED, "nvme-tcp", message);
}

/// A name, ended by a zero.
fn nqn(field: &[u8]) -> Option<&str> {
    let length = field.iter().position(|byte| *byte == 0)?;
    let text = std::str::from_utf8(field.get(..length)?).ok()?;
    let plausible = text.starts_with("nqn.") && text.len() <= NQN_BYTES_MAX;
    plausible.then_some(text)
}

fn refused(status: Status) -> Refused {
    Refused { status, result: 0 }
}

fn in_sqe(offset: u16) -> Refused {
    Refused { status: Status::CONNECT_INVALID, result: u64::from(offset) }
}

fn in_data(offset: u16) -> Refused {
    Refused { status: Status::CONNECT_INVALID, result: 1 << 16 | u64::from(offset) }
}

#[cfg(test)]
mod tests {
    use uuid::Uuid;

    use super::*;
    use crate::secret::tls_key::TlsKey;
    use crate::target::nvmf::subsystem::SubsystemOptions;
    use crate::target::nvmf::wire::SQE_BYTES;
    use crate::volume::memory::MemoryDirectory;

    fn subsystem() -> Subsystem {
        let options = SubsystemOptions::new(Uuid::from_u128(7));
        Subsystem::new(Arc::new(MemoryDirectory::default()), options)
    }

    /// From this machine.
    fn connect(subsystem: &Subsystem, sqe: &Sqe, data: &[u8]) -> Result<Connected, Refused> {
        super::connect(subsystem, IpAddr::from([127, 0, 0, 1]), None, sqe, data)
    }

    fn sqe(qid: u16, entries: u16) -> Sqe {
        let mut bytes = [0; SQE_BYTES];
        bytes[42..44].copy_from_slice(&qid.to_le_bytes());
        bytes[44..46].copy_from_slice(&entries.to_le_bytes());
        bytes[48..52].copy_from_slice(&5000_u32.to_le_bytes());
        Sqe::new(bytes)
    }

    fn data(controller_id: u16, subsystem_nqn: &str, host_nqn: &str) -> Vec<u8> {
        let mut data = vec![0; 1024];
        data[0] = 9;
        data[16..18].copy_from_slice(&controller_id.to_le_bytes());
        data[256..256 + subsystem_nqn.len()].copy_from_slice(subsystem_nqn.as_bytes());
        data[512..512 + host_nqn.len()].copy_from_slice(host_nqn.as_bytes());
        data
    }

    #[test]
    fn each_admin_connect_makes_a_controller_and_io_queues_join_it() {
        let subsystem = subsystem();
        let nqn = subsystem.nqn().to_owned();
        let admin = |host| connect(&subsystem, &sqe(0, 31), &data(0xffff, &nqn, host)).ok();
        let first = admin("nqn.h").expect("admitted");
        let second = admin("nqn.h").expect("admitted");
        assert_ne!(first.controller.id(), second.controller.id());
        first.controller.set_property(0x14, false, 0x0046_0001).expect("enabled");

        let id = first.controller.id();
        let io = |qid, id, host| connect(&subsystem, &sqe(qid, 127), &data(id, &nqn, host));
        assert_eq!(io(1, id, "nqn.h").expect("admitted").entries, 127);
        let refusal = |result: Result<Connected, Refused>| result.err().expect("refused");
        assert_eq!(refusal(io(1, id, "nqn.h")).status, Status::SEQUENCE_ERROR);
        assert_eq!(refusal(io(1, second.controller.id(), "nqn.h")).status, Status::SEQUENCE_ERROR);
        assert_eq!(refusal(io(2, id, "nqn.other")), in_data(DATA_CONTROLLER_ID));
        assert_eq!(refusal(io(2, 999, "nqn.h")), in_data(DATA_CONTROLLER_ID));
        assert_eq!(refusal(io(200, id, "nqn.h")), in_sqe(SQE_QID));

        subsystem.remove_controller(&first.controller);
        assert!(first.controller.life().borrow().ended);
        assert_eq!(refusal(io(3, id, "nqn.h")), in_data(DATA_CONTROLLER_ID));
        assert_eq!(subsystem.controller_count(), 1);
    }

    #[test]
    fn a_host_with_a_tls_key_connects_by_it_and_as_itself() {
        let directory = MemoryDirectory::default();
        directory.set_host_tls_key("nqn.k", TlsKey::from_random(None, &[7; 64]).expect("good"));
        let options = SubsystemOptions::new(Uuid::from_u128(7));
        let subsystem = Subsystem::new(Arc::new(directory), options);
        let nqn = subsystem.nqn().to_owned();
        let names = |host: &str, subsystem: &str| {
            Some(SecureNames { host_nqn: host.into(), subsystem_nqn: subsystem.into() })
        };
        let here = IpAddr::from([127, 0, 0, 1]);
        for (secured, to, host, admitted) in [
            (None, &*nqn, "nqn.h", true),
            (None, &nqn, "nqn.k", false),
            (None, DISCOVERY_NQN, "nqn.k", true),
            (names("nqn.k", &nqn), &nqn, "nqn.k", true),
            (names("nqn.k", &nqn), &nqn, "nqn.h", false),
            (names("nqn.k", &nqn), DISCOVERY_NQN, "nqn.k", false),
            (names("nqn.k", DISCOVERY_NQN), &nqn, "nqn.k", false),
            (names("nqn.k", DISCOVERY_NQN), DISCOVERY_NQN, "nqn.k", true),
        ] {
            let data = data(0xffff, to, host);
            let made = super::connect(&subsystem, here, secured.as_ref(), &sqe(0, 31), &data);
            assert_eq!(made.is_ok(), admitted, "{host} to {to}, secured {secured:?}");
            if let Err(refused) = made {
                assert_eq!(refused.status, Status::CONNECT_INVALID_HOST);
            }
        }
    }

    #[test]
    fn the_operator_hears_of_a_host_without_a_valid_name() {
        let subsystem = subsystem();
        for name in ["", "host"] {
            let data = data(0xffff, subsystem.nqn(), name);
            // Of this event the last message is kept, and other tests raise it as well.
            let heard = (0..100).any(|_| {
                assert!(connect(&subsystem, &sqe(0, 31), &data).is_err());
                let mut events = event::after(0).into_iter();
                events.any(|event| {
                    event.kind == event::HOST_REFUSED.name && event.message.contains("valid name")
                })
            });
            assert!(heard, "{name:?}");
        }
    }

    #[test]
    fn wrong_parameters_are_named() {
        let subsystem = subsystem();
        let nqn = subsystem.nqn().to_owned();
        let refusal =
            |sqe: &Sqe, data: &[u8]| connect(&subsystem, sqe, data).err().expect("refused");
        let good = data(0xffff, &nqn, "nqn.h");
        assert_eq!(refusal(&sqe(0, 0), &good), in_sqe(SQE_SIZE));
        assert_eq!(refusal(&sqe(0, 256), &good), in_sqe(SQE_SIZE));
        assert_eq!(refusal(&sqe(1, 1024), &good), in_sqe(SQE_SIZE));
        assert_eq!(refusal(&sqe(0, 31), &data(1, &nqn, "nqn.h")), in_data(DATA_CONTROLLER_ID));
        assert_eq!(refusal(&sqe(0, 31), &data(0xffff, "nqn.x", "nqn.h")), in_data(256));
        assert_eq!(refusal(&sqe(0, 31), &data(0xffff, &nqn, "")), in_data(512));
        let mut endless = good.clone();
        endless[512..768].fill(b'n');
        assert_eq!(refusal(&sqe(0, 31), &endless), in_data(512));
        assert_eq!(refusal(&sqe(0, 31), &good[..600]).status, Status::SGL_LENGTH_INVALID);
        let mut other_format = *sqe(0, 31).bytes();
        other_format[40] = 1;
        assert_eq!(refusal(&Sqe::new(other_format), &good).status, Status::CONNECT_FORMAT);
        let remote = IpAddr::from([192, 0, 2, 1]);
        let refused = super::connect(&subsystem, remote, None, &sqe(0, 31), &good).err();
        assert_eq!(refused.map(|refused| refused.status), Some(Status::CONNECT_INVALID_HOST));
        // An I/O queue is judged by where it comes from itself, not by its controller's admission.
        let local = connect(&subsystem, &sqe(0, 31), &good).expect("admitted");
        local.controller.set_property(0x14, false, 0x0046_0001).expect("enabled");
        let queue = data(local.controller.id(), &nqn, "nqn.h");
        let refused = super::connect(&subsystem, remote, None, &sqe(1, 31), &queue).err();
        assert_eq!(refused.map(|refused| refused.status), Some(Status::CONNECT_INVALID_HOST));
        assert!(connect(&subsystem, &sqe(1, 31), &queue).is_ok());
        // Discovery controllers have no I/O queues.
        let made = connect(&subsystem, &sqe(0, 31), &data(0xffff, DISCOVERY_NQN, "nqn.h"));
        let Ok(made) = made else { panic!("not admitted") };
        let id = made.controller.id();
        assert_eq!(refusal(&sqe(1, 31), &data(id, DISCOVERY_NQN, "nqn.h")), in_sqe(SQE_QID));
    }
}
