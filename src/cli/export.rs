//! How hosts get at a volume: lines to paste, for now and for every start of a host.
//!
//! Addresses are those the node listens on; a wildcard becomes this machine's loopback, and a host
//! elsewhere has to put the node's address in its place.

use std::net::Ipv4Addr;
use std::net::Ipv6Addr;
use std::net::SocketAddr;
use std::path::Path;

use serde::Serialize;
use weft_api::Host;
use weft_api::Listener;
use weft_api::NodeStatus;
use weft_api::Volume;
use weft_api::percent_encode;

use super::shell_word;
use crate::units::format_size;

/// Connections of a kernel client, as `scripts/attach` makes them.
const NBD_CONNECTIONS: u32 = 4;
/// What stands for the name of a host that is not known here, and for its identifier, which never
/// is. nvme-cli takes an entry without the identifier for another host.
const SOME_HOST: &str = "HOSTNQN";
const SOME_HOST_ID: &str = "HOSTID";

/// A volume as hosts get at it.
#[derive(Debug, Serialize)]
pub(super) struct Export {
    volume: String,
    size_bytes: u64,
    logical_block_bytes: u32,
    /// One for each address; none if the volume is for some NVMe hosts only.
    pub(super) nbd: Vec<NbdExport>,
    /// One for each address.
    pub(super) nvme: Vec<NvmeExport>,
}

/// Over NBD.
#[derive(Debug, Serialize)]
pub(super) struct NbdExport {
    address: String,
    tls: bool,
    pub(super) uri: String,
    /// Attaches it now.
    pub(super) client: String,
    /// A line of /etc/nbdtab.
    nbdtab: String,
    /// A line of /etc/fstab.
    fstab: String,
    /// Starts a guest with it.
    pub(super) qemu: String,
}

/// Over NVMe/TCP.
#[derive(Debug, Serialize)]
pub(super) struct NvmeExport {
    address: String,
    subsystem_nqn: String,
    /// Connects now.
    pub(super) connect: String,
    /// What a host that authenticates adds to that; left out if none does.
    #[serde(skip_serializing_if = "Option::is_none")]
    connect_keys: Option<String>,
    /// What a host that encrypts does instead; left out if none does.
    #[serde(skip_serializing_if = "Option::is_none")]
    connect_tls: Option<String>,
    /// A line of /etc/nvme/discovery.conf.
    discovery_conf: String,
    /// /etc/nvme/config.json.
    config_json: serde_json::Value,
    /// A line of /etc/fstab.
    fstab: String,
}

impl Export {
    pub(super) fn new(status: &NodeStatus, volume: &Volume, hosts: &[Host]) -> Self {
        let over = |protocol: &'static str| {
            status.listeners.iter().filter(move |listener| listener.protocol == protocol)
        };
        let nbd = match volume.hosts {
            None => over("nbd").map(|listener| nbd(listener, volume)).collect(),
            Some(_) => Vec::new(),
        };
        let nqn = &status.subsystem_nqn;
        let keys = connect_keys(volume, hosts);
        let mut nvme: Vec<_> =
            over("nvme").filter_map(|listener| nvme(listener, nqn, volume, keys)).collect();
        if encrypted(volume, hosts) {
            nvme.iter_mut().for_each(NvmeExport::offer_tls);
        }
        Self {
            volume: volume.name.clone(),
            size_bytes: volume.size_bytes,
            logical_block_bytes: volume.logical_block_bytes,
            nbd,
            nvme,
        }
    }

    /// Sections for people: comments, and lines to paste.
    pub(super) fn text(&self) -> String {
        let (size, block) = (format_size(self.size_bytes), self.logical_block_bytes);
        let mut text = format!("# volume {}, {size}, blocks of {block} bytes\n", self.volume);
        for nvme in &self.nvme {
            let keys = match &nvme.connect_keys {
                Some(keys) => format!("# a host that has a key (weft host list) adds: {keys}\n"),
                None => String::new(),
            };
            let tls = match &nvme.connect_tls {
                Some(connect) => format!(
                    "# a host that has a TLS key: Linux 6.7 or later, with tlshd (ktls-utils) \
                     running\n{connect}\n"
                ),
                None => String::new(),
            };
            text.push_str(&format!(
                "\n# NVMe/TCP at {}: now\n{}\n{keys}{tls}\
                 # at every start, a line of /etc/nvme/discovery.conf; then:\n\
                 #   systemctl enable nvmf-autoconnect\n{}\n\
                 # or /etc/nvme/config.json of nvme-cli 2, with what is in the host's \
                 /etc/nvme/hostnqn and hostid\n{}\n# /etc/fstab\n{}\n",
                nvme.address, nvme.connect, nvme.discovery_conf, nvme.config_json, nvme.fstab,
            ));
        }
        for nbd in &self.nbd {
            let tls = if nbd.tls {
                "# with TLS by certificates: add certfile=, keyfile= and cacertfile= to the options\n\
                 # with TLS by keys, which nbd-client does not have: NAME@ before the address, and \
                 ?tls-psk-file=FILE behind the URI\n"
            } else {
                ""
            };
            text.push_str(&format!(
                "\n# NBD at {}: now\nnbdinfo {}\n{}\n\
                 # at every start, a line of /etc/nbdtab; then: systemctl enable nbd@nbd0\n\
                 {tls}{}\n# /etc/fstab\n{}\n# a virtual machine\n{}\n",
                nbd.address, nbd.uri, nbd.client, nbd.nbdtab, nbd.fstab, nbd.qemu,
            ));
        }
        if self.nbd.is_empty() {
            text.push_str("\n# not served over NBD\n");
        }
        text
    }
}

impl NvmeExport {
    /// Says how hosts that encrypt connect.
    fn offer_tls(&mut self) {
        let (nqn, connect) = (&self.subsystem_nqn, &self.connect);
        self.connect_tls = Some(format!(
            "sudo nvme check-tls-key --insert --subsysnqn {nqn} --keydata \"$(cat TLS_KEY_FILE)\"\n\
             {connect} --tls"
        ));
    }
}

/// What nvme-cli is to be told by hosts that find the volume and have to authenticate. The key is
/// in a file of the host's.
fn connect_keys(volume: &Volume, hosts: &[Host]) -> Option<&'static str> {
    let finds = |host: &&Host| volume.hosts.as_ref().is_none_or(|only| only.contains(&host.nqn));
    let keys: Vec<_> = hosts.iter().filter(finds).filter_map(|host| host.dhchap.as_ref()).collect();
    let both = keys.iter().any(|keys| keys.ctrl_key_hash.is_some());
    let line = match both {
        true => "--dhchap-secret \"$(cat KEY_FILE)\" --dhchap-ctrl-secret \"$(cat CTRL_KEY_FILE)\"",
        false => "--dhchap-secret \"$(cat KEY_FILE)\"",
    };
    (!keys.is_empty()).then_some(line)
}

/// Whether a host that finds the volume encrypts.
fn encrypted(volume: &Volume, hosts: &[Host]) -> bool {
    let finds = |host: &&Host| volume.hosts.as_ref().is_none_or(|only| only.contains(&host.nqn));
    hosts.iter().filter(finds).any(|host| host.tls.is_some())
}

fn nvme(listener: &Listener, nqn: &str, volume: &Volume, keys: Option<&str>) -> Option<NvmeExport> {
    let address = connectable(listener.address.parse().ok()?);
    let (ip, port) = (address.ip().to_string(), address.port().to_string());
    let mut hosts = volume.hosts.iter().flatten();
    let host = match (hosts.next(), hosts.next()) {
        (Some(only), None) => only,
        _ => SOME_HOST,
    };
    Some(NvmeExport {
        address: listener.address.clone(),
        subsystem_nqn: nqn.to_owned(),
        connect: format!("sudo nvme connect -t tcp -a {ip} -s {port} -n {nqn}"),
        connect_keys: keys.map(str::to_owned),
        connect_tls: None,
        discovery_conf: format!("--transport=tcp --traddr={ip} --trsvcid={port}"),
        config_json: serde_json::json!([{
            "hostnqn": host,
            "hostid": SOME_HOST_ID,
            "subsystems": [{
                "nqn": nqn,
                "ports": [{ "transport": "tcp", "traddr": ip, "trsvcid": port }],
            }],
        }]),
        fstab: format!("/dev/disk/by-id/nvme-uuid.{} /mnt auto _netdev,nofail 0 2", volume.uuid),
    })
}

fn nbd(listener: &Listener, volume: &Volume) -> NbdExport {
    let (name, block) = (&volume.name, volume.logical_block_bytes);
    let export = percent_encode(name);
    let options = format!("bs={block},conns={NBD_CONNECTIONS}");
    let (uri, place, nbdtab) = match listener.address.parse::<SocketAddr>() {
        Ok(address) => {
            let address = connectable(address);
            let (ip, port) = (address.ip(), address.port());
            let secure = if listener.tls { "s" } else { "" };
            (
                format!("nbd{secure}://{address}/{export}"),
                format!("{ip} {port} /dev/nbd0"),
                format!("nbd0 {ip} {name} port={port},{options}"),
            )
        }
        Err(_) => {
            let path = &listener.address;
            let socket = percent_encode(path).replace("%2F", "/");
            (
                format!("'nbd+unix:///{export}?socket={socket}'"),
                format!("-unix {} /dev/nbd0", shell_word(Path::new(path))),
                format!("nbd0 {path} {name} unix,{options}"),
            )
        }
    };
    NbdExport {
        address: listener.address.clone(),
        tls: listener.tls,
        client: format!("sudo nbd-client {place} -N {name} -b {block} -C {NBD_CONNECTIONS}"),
        nbdtab,
        fstab: "/dev/nbd0 /mnt auto _netdev,nofail,x-systemd.requires=nbd@nbd0.service 0 2".into(),
        qemu: format!("qemu-system-x86_64 -drive file={uri},format=raw,if=virtio"),
        uri,
    }
}

/// The address a host on this machine connects to.
fn connectable(mut address: SocketAddr) -> SocketAddr {
    if address.ip().is_unspecified() {
        address.set_ip(match address {
            SocketAddr::V4(_) => Ipv4Addr::LOCALHOST.into(),
            SocketAddr::V6(_) => Ipv6Addr::LOCALHOST.into(),
        });
    }
    address
}

#[cfg(test)]
mod tests {
    use weft_api::Dhchap;

    use super::*;

    fn listener(protocol: &str, transport: &str, address: &str) -> Listener {
        let [protocol, transport, address] = [protocol, transport, address].map(str::to_owned);
        Listener { protocol, transport, address, tls: false }
    }

    fn volume() -> Volume {
        Volume {
            id: 1,
            name: "vol0".into(),
            uuid: "6a3f6f0c-1d2e-4c57-9f0a-0e5a5d0e2f6b".into(),
            size_bytes: 8 << 30,
            logical_block_bytes: 512,
            read_only: false,
            allocated_bytes: 0,
            hosts: None,
            reservations: None,
        }
    }

    #[test]
    fn nvme_lines_name_an_address_one_can_connect_to() {
        let export = |address| {
            nvme(&listener("nvme", "tcp", address), "nqn.x", &volume(), None).expect("an address")
        };
        let line = "sudo nvme connect -t tcp -a 127.0.0.1 -s 4420 -n nqn.x";
        assert_eq!(export("0.0.0.0:4420").connect, line);
        let line = "sudo nvme connect -t tcp -a ::1 -s 4421 -n nqn.x";
        assert_eq!(export("[::1]:4421").connect, line);
        let line = "--transport=tcp --traddr=192.0.2.1 --trsvcid=4420";
        assert_eq!(export("192.0.2.1:4420").discovery_conf, line);
        assert!(export("192.0.2.1:4420").fstab.contains(&volume().uuid));
        assert_eq!(export("192.0.2.1:4420").config_json[0]["hostnqn"], SOME_HOST);
    }

    #[test]
    fn hosts_that_have_to_authenticate_are_told_how() {
        let host = |nqn: &str, ctrl: Option<&str>| Host {
            nqn: nqn.into(),
            tls: None,
            dhchap: Some(Dhchap {
                key_hash: "none".into(),
                ctrl_key_hash: ctrl.map(str::to_owned),
            }),
        };
        let hosts = [
            Host { nqn: "nqn.a".into(), dhchap: None, tls: None },
            host("nqn.b", None),
            host("nqn.c", Some("sha256")),
        ];
        let keys = |only: &[&str]| {
            let hosts_of = Some(only.iter().map(|nqn| (*nqn).to_owned()).collect());
            connect_keys(&Volume { hosts: hosts_of, ..volume() }, &hosts)
        };
        assert_eq!(keys(&["nqn.a"]), None);
        assert!(keys(&["nqn.a", "nqn.b"]).is_some_and(|line| !line.contains("ctrl")));
        assert!(keys(&["nqn.c"]).is_some_and(|line| line.contains("--dhchap-ctrl-secret")));
        assert!(connect_keys(&volume(), &hosts).is_some(), "it is for all");
        assert_eq!(connect_keys(&volume(), &[]), None);
    }

    #[test]
    fn nbd_lines_name_the_export_and_its_block_size() {
        let mut listener = listener("nbd", "tcp", "0.0.0.0:10809");
        let plain = nbd(&listener, &volume());
        assert_eq!(plain.uri, "nbd://127.0.0.1:10809/vol0");
        let line = "sudo nbd-client 127.0.0.1 10809 /dev/nbd0 -N vol0 -b 512 -C 4";
        assert_eq!(plain.client, line);
        assert_eq!(plain.nbdtab, "nbd0 127.0.0.1 vol0 port=10809,bs=512,conns=4");
        listener.tls = true;
        assert_eq!(nbd(&listener, &volume()).uri, "nbds://127.0.0.1:10809/vol0");
        listener.address = "/my dir/nbd.sock".into();
        listener.tls = false;
        let unix = nbd(&listener, &volume());
        assert_eq!(unix.uri, "'nbd+unix:///vol0?socket=/my%20dir/nbd.sock'");
        assert!(unix.client.contains("-unix '/my dir/nbd.sock' /dev/nbd0"), "{}", unix.client);
    }
}
