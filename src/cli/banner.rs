//! What a node prints when it serves: where, what, and lines to paste.

use std::path::Path;

use weft_api::NodeStatus;
use weft_api::Volume;

use super::export::Export;
use super::shell_word;
use crate::units::format_size;

/// The whole text.
pub(super) fn text(status: &NodeStatus, volumes: &[Volume]) -> String {
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
            "metrics" => "metrics",
            "api" => "API",
            _ => "NBD",
        };
        text.push_str(&format!("  {protocol:<9}  {} {}\n", listener.transport, listener.address));
    }
    if let Some(volume) = volumes.first() {
        text.push_str("\nTo use it:\n");
        let export = Export::new(status, volume, &[]);
        for nbd in &export.nbd {
            text.push_str(&format!("  {}\n  {}\n  {}\n", nbd.info, nbd.client, nbd.qemu));
        }
        for nvme in &export.nvme {
            text.push_str(&format!("  {}\n", nvme.connect));
        }
    }
    let data = shell_word(Path::new(&status.data_dir));
    text.push_str(&format!(
        "\n  weft volume create NAME --size 100GiB --data {data}\n  weft export show NAME --data {data}\n  \
         weft status --data {data}\n\n\
         Ctrl-C stops it.\n"
    ));
    text
}
