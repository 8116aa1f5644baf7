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
const NBD_FSTAB: &str =
    "/dev/nbd0 /mnt auto _netdev,nofail,x-systemd.requires=nbd@nbd0.service 0 2";
/// Where a host is taken to have its certificates, under the names that QEMU and libnbd look for.
const CERTIFICATES: &str = "/etc/pki/weft";
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
    uri: String,
    /// Shows it.
    pub(super) info: String,
    /// Attaches it now.
    pub(super) client: String,
    /// A line of /etc/nbdtab; none if it cannot hold the socket's path.
    nbdtab: Option<String>,
    /// A line of /etc/fstab.
    fstab: &'static str,
    /// Shows it to QEMU.
    image: String,
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
            text.push_str(&nbd.text());
        }
        if self.nbd.is_empty() {
            text.push_str("\n# not served over NBD\n");
        }
        text
    }
}

impl NbdExport {
    fn text(&self) -> String {
        let tls = match self.tls {
            true => format!(
                "# TLS by certificates: {CERTIFICATES} holds ca-cert.pem, and client-cert.pem and \
                 client-key.pem\n\
                 # if the node asks hosts for them (else leave the two out); the node's certificate \
                 must be for the address\n\
                 # TLS by keys, which nbd-client does not have: NAME@ before the address and \
                 ?tls-psk-file=FILE behind the URI,\n\
                 # and for QEMU tls-creds-psk,id=tls0,dir=DIR,username=NAME,endpoint=client, with \
                 DIR/keys.psk\n"
            ),
            false => String::new(),
        };
        let table = match &self.nbdtab {
            Some(line) => format!(
                "# at every start, a line of /etc/nbdtab; then: systemctl enable nbd@nbd0\n{line}\n\
                 # /etc/fstab\n{}\n",
                self.fstab
            ),
            None => {
                "# /etc/nbdtab cannot hold this path: choose an nbd.unix_socket without spaces\n"
                    .to_owned()
            }
        };
        format!(
            "\n# NBD at {}: now\n{tls}{}\n{}\n{table}# a virtual machine\n{}\n{}\n",
            self.address, self.info, self.client, self.image, self.qemu,
        )
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
    match listener.address.parse::<SocketAddr>() {
        Ok(address) if listener.tls => nbd_tls(listener, connectable(address), volume),
        Ok(address) => nbd_tcp(listener, connectable(address), volume),
        Err(_) => nbd_unix(listener, volume),
    }
}

fn nbd_tcp(listener: &Listener, address: SocketAddr, volume: &Volume) -> NbdExport {
    let (ip, port, name) = (address.ip(), address.port(), &volume.name);
    let place = format!("{ip} {port}");
    let nbdtab = format!("nbd0 {ip} {name} port={port},{}", nbdtab_options(volume));
    plain(
        listener,
        volume,
        format!("nbd://{address}/{}", percent_encode(name)),
        &place,
        Some(nbdtab),
    )
}

fn nbd_unix(listener: &Listener, volume: &Volume) -> NbdExport {
    let (path, name) = (&listener.address, &volume.name);
    let socket = percent_encode(path).replace("%2F", "/");
    let uri = format!("nbd+unix:///{}?socket={socket}", percent_encode(name));
    let place = format!("-unix {}", shell_word(Path::new(path)));
    // Fields end at white space there, comments begin at '#', and nothing escapes either.
    let plain_path = !path.contains(|c: char| c.is_whitespace() || c == '#');
    let nbdtab = format!("nbd0 {path} {name} unix,{}", nbdtab_options(volume));
    plain(listener, volume, uri, &place, plain_path.then_some(nbdtab))
}

/// Without TLS. `place` is the node as nbd-client is told.
fn plain(
    listener: &Listener,
    volume: &Volume,
    uri: String,
    place: &str,
    nbdtab: Option<String>,
) -> NbdExport {
    let word = shell_word(Path::new(&uri));
    NbdExport {
        address: listener.address.clone(),
        tls: false,
        info: format!("nbdinfo {word}"),
        client: nbd_client(place, volume),
        nbdtab,
        fstab: NBD_FSTAB,
        image: format!("qemu-img info -f raw {word}"),
        qemu: format!("qemu-system-x86_64 -drive file={word},format=raw,if=virtio"),
        uri,
    }
}

/// With TLS by certificates. QEMU's `nbds://` is none, so it is told part by part.
fn nbd_tls(listener: &Listener, address: SocketAddr, volume: &Volume) -> NbdExport {
    let (ip, port, name) = (address.ip(), address.port(), &volume.name);
    let uri = format!("nbds://{address}/{}", percent_encode(name));
    let info = format!("{uri}?tls-certificates={CERTIFICATES}");
    let client = nbd_client(&format!("{ip} {port}"), volume);
    let files = [("certfile", "client-cert"), ("keyfile", "client-key"), ("cacertfile", "ca-cert")];
    let files = files.map(|(option, file)| (option, format!("{CERTIFICATES}/{file}.pem")));
    let arguments: String = files.iter().map(|(name, file)| format!(" -{name} {file}")).collect();
    let options: String = files.iter().map(|(name, file)| format!(",{name}={file}")).collect();
    let credentials = format!("tls-creds-x509,id=tls0,dir={CERTIFICATES},endpoint=client");
    let parts = |prefix: &str| {
        [
            "driver=nbd".to_owned(),
            "server.type=inet".to_owned(),
            format!("server.host={ip}"),
            format!("server.port={port}"),
            format!("export={name}"),
            "tls-creds=tls0".to_owned(),
        ]
        .map(|part| format!("{prefix}{part}"))
        .join(",")
    };
    NbdExport {
        address: listener.address.clone(),
        tls: true,
        info: format!("nbdinfo {}", shell_word(Path::new(&info))),
        client: client + &arguments,
        nbdtab: Some(format!("nbd0 {ip} {name} port={port},{}{options}", nbdtab_options(volume))),
        fstab: NBD_FSTAB,
        image: format!("qemu-img info --object {credentials} --image-opts {}", parts("")),
        qemu: format!(
            "qemu-system-x86_64 -object {credentials} -drive format=raw,if=virtio,{}",
            parts("file.")
        ),
        uri,
    }
}

fn nbd_client(place: &str, volume: &Volume) -> String {
    let (name, block) = (&volume.name, volume.logical_block_bytes);
    format!("sudo nbd-client {place} /dev/nbd0 -N {name} -b {block} -C {NBD_CONNECTIONS}")
}

fn nbdtab_options(volume: &Volume) -> String {
    format!("bs={},conns={NBD_CONNECTIONS}", volume.logical_block_bytes)
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
            write_cache: false,
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
        let line = "nbd0 127.0.0.1 vol0 port=10809,bs=512,conns=4";
        assert_eq!(plain.nbdtab.as_deref(), Some(line));
        assert_eq!(plain.image, "qemu-img info -f raw nbd://127.0.0.1:10809/vol0");
        listener.tls = true;
        let secured = nbd(&listener, &volume());
        assert_eq!(secured.uri, "nbds://127.0.0.1:10809/vol0");
        let uri = "'nbds://127.0.0.1:10809/vol0?tls-certificates=/etc/pki/weft'";
        assert_eq!(secured.info, format!("nbdinfo {uri}"));
        let files = "-certfile /etc/pki/weft/client-cert.pem -keyfile \
                     /etc/pki/weft/client-key.pem -cacertfile /etc/pki/weft/ca-cert.pem";
        assert!(secured.client.ends_with(files), "{}", secured.client);
        assert!(secured.nbdtab.is_some_and(|line| line.contains(",cacertfile=/etc/pki/weft/")));
        for line in [&secured.image, &secured.qemu] {
            assert!(!line.contains("nbds:") && line.contains("tls-creds=tls0"), "{line}");
        }
        listener.address = "/my dir/nbd.sock".into();
        listener.tls = false;
        let unix = nbd(&listener, &volume());
        assert_eq!(unix.uri, "nbd+unix:///vol0?socket=/my%20dir/nbd.sock");
        assert_eq!(unix.info, "nbdinfo 'nbd+unix:///vol0?socket=/my%20dir/nbd.sock'");
        assert_eq!(unix.nbdtab, None, "its fields end at spaces");
        assert!(unix.text().contains("/etc/nbdtab cannot hold this path"));
        assert!(unix.client.contains("-unix '/my dir/nbd.sock' /dev/nbd0"), "{}", unix.client);
    }
}
