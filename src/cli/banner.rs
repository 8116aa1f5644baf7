//! What a node prints when it serves: where, what, and lines to paste.

use std::net::SocketAddr;
use std::path::Path;

use weft_api::Listener;
use weft_api::NodeStatus;
use weft_api::Volume;
use weft_api::percent_encode;

use super::shell_word;
use crate::units::format_size;

/// The whole text. `tls` tells whether hosts can or must encrypt over TCP.
pub(super) fn text(status: &NodeStatus, volumes: &[Volume], tls: bool) -> String {
    let pod = &status.pod;
    let mut text = format!(
        "Weft {} serves pod {}\n  directory  {}\n  pod        {} data + {} parity on {} devices, \
         {}, may lose {}; {} usable\n",
        status.version,
        pod.uuid,
        status.data_dir,
        pod.data_strips,
        pod.parity_strips,
        pod.device_count,
        pod.health,
        pod.can_lose,
        format_size(pod.capacity_bytes),
    );
    for volume in volumes {
        text.push_str(&format!(
            "  volume     {}  {}\n",
            volume.name,
            format_size(volume.size_bytes)
        ));
    }
    for listener in &status.listeners {
        let protocol = match listener.protocol.as_str() {
            "nvme" => "NVMe",
            "nvme-discovery" => "discovery",
            _ => "NBD",
        };
        text.push_str(&format!("  {protocol:<9}  {} {}\n", listener.transport, listener.address));
    }
    if let Some(volume) = volumes.first() {
        text.push_str("\nTo use it:\n");
        for listener in &status.listeners {
            match listener.protocol.as_str() {
                "nvme" => text.push_str(&nvme_line(listener, &status.subsystem_nqn)),
                "nvme-discovery" => {}
                _ => text.push_str(&lines_to_paste(
                    listener,
                    &volume.name,
                    volume.logical_block_bytes,
                    tls,
                )),
            }
        }
    }
    let data = shell_word(Path::new(&status.data_dir));
    text.push_str(&format!(
        "\n  weft volume create NAME --size 100GiB --data {data}\n  weft status --data {data}\n\n\
         Ctrl-C stops it.\n"
    ));
    text
}

/// The line for an NVMe listener.
fn nvme_line(listener: &Listener, nqn: &str) -> String {
    match listener.address.parse::<SocketAddr>() {
        Ok(address) => {
            let address = connectable(address);
            let (ip, port) = (address.ip(), address.port());
            format!("  sudo nvme connect -t tcp -a {ip} -s {port} -n {nqn}\n")
        }
        Err(_) => String::new(),
    }
}

/// The address a host on this machine connects to.
fn connectable(mut address: SocketAddr) -> SocketAddr {
    if address.ip().is_unspecified() {
        address.set_ip(if address.is_ipv4() {
            std::net::Ipv4Addr::LOCALHOST.into()
        } else {
            std::net::Ipv6Addr::LOCALHOST.into()
        });
    }
    address
}

/// The lines for one NBD listener, as the client on this machine would write them.
fn lines_to_paste(listener: &Listener, name: &str, block_bytes: u32, tls: bool) -> String {
    let secure = if tls { "s" } else { "" };
    let export = percent_encode(name);
    let (uri, client) = match listener.address.parse::<SocketAddr>() {
        Ok(address) => {
            let address = connectable(address);
            let uri = format!("nbd{secure}://{address}/{export}");
            (uri, format!("{} {} /dev/nbd0", address.ip(), address.port()))
        }
        Err(_) => {
            let socket = percent_encode(&listener.address).replace("%2F", "/");
            let uri = format!("'nbd+unix:///{export}?socket={socket}'");
            (uri, format!("-unix {} /dev/nbd0", shell_word(Path::new(&listener.address))))
        }
    };
    format!(
        "  nbdinfo {uri}\n  \
         sudo nbd-client {client} -N {name} -b {block_bytes} -C 4\n  \
         qemu-system-x86_64 -drive file={uri},format=raw,if=virtio\n"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn listener(transport: &str, address: &str) -> Listener {
        let (protocol, transport) = ("nbd".to_owned(), transport.to_owned());
        Listener { protocol, transport, address: address.to_owned() }
    }

    #[test]
    fn the_nvme_line_can_be_pasted() {
        let line = nvme_line(&listener("tcp", "0.0.0.0:4420"), "nqn.x");
        assert_eq!(line, "  sudo nvme connect -t tcp -a 127.0.0.1 -s 4420 -n nqn.x\n");
        let line = nvme_line(&listener("tcp", "[::1]:4421"), "nqn.x");
        assert_eq!(line, "  sudo nvme connect -t tcp -a ::1 -s 4421 -n nqn.x\n");
    }

    #[test]
    fn lines_name_the_export_and_an_address_one_can_connect_to() {
        let text = lines_to_paste(&listener("tcp", "0.0.0.0:10809"), "vol0", 512, false);
        assert!(text.contains("nbdinfo nbd://127.0.0.1:10809/vol0\n"), "{text}");
        assert!(text.contains("nbd-client 127.0.0.1 10809 /dev/nbd0 -N vol0 -b 512"), "{text}");
        let text = lines_to_paste(&listener("tcp", "10.0.0.1:10809"), "vol0", 4096, true);
        assert!(text.contains("nbdinfo nbds://10.0.0.1:10809/vol0\n"), "{text}");
        let text = lines_to_paste(&listener("unix", "/my dir/nbd.sock"), "vol0", 4096, true);
        assert!(text.contains("'nbd+unix:///vol0?socket=/my%20dir/nbd.sock'"), "{text}");
        assert!(text.contains("-unix '/my dir/nbd.sock' /dev/nbd0"), "{text}");
    }
}
