//! The pod's own types as the API shows them.

use weft_api::DeviceStats;
use weft_api::Histogram;

use crate::secret::DhchapKey;
use crate::secret::Hash;
use crate::secret::HostKeys;
use crate::secret::tls_key::TlsKey;
use crate::volume::pod::DeviceStatus;
use crate::volume::pod::PodStatus;
use crate::volume::pod::VolumeInfo;
use crate::volume::reservation::HoldKind;
use crate::volume::reservation::Reservations;

pub(super) fn pod(status: &PodStatus) -> weft_api::Pod {
    let in_service = status.devices.iter().filter(|device| device.state == "in service");
    weft_api::Pod {
        uuid: status.uuid.to_string(),
        epoch: status.epoch,
        data_strips: status.data_strips,
        parity_strips: status.parity_strips,
        health: status.health.clone(),
        can_lose: status.can_lose,
        segments: status.segments,
        segments_degraded: status.segments_degraded,
        device_count: status.devices.len(),
        devices_in_service: in_service.count(),
        capacity_bytes: status.capacity_bytes,
        used_bytes: status.used_bytes,
        logical_bytes: status.logical_bytes,
        physical_bytes: status.physical_bytes,
        journal_bytes: status.journal_bytes,
        journal_used_bytes: status.journal_used_bytes,
        buffered_bytes: status.buffered_bytes,
        cache_bytes: status.cache_bytes,
        cache_hits: status.cache_hits,
        cache_misses: status.cache_misses,
        checkpoints: status.checkpoints,
    }
}

/// What is told of a host's keys: that they are set, and how they are bound.
pub(super) fn host(nqn: String, keys: Option<&HostKeys>, tls: Option<&TlsKey>) -> weft_api::Host {
    let named = |hash: Option<Hash>| hash.map_or("none", Hash::name).to_owned();
    let hash = |key: &DhchapKey| named(key.hash());
    let dhchap = keys.map(|keys| weft_api::Dhchap {
        key_hash: hash(&keys.key),
        ctrl_key_hash: keys.ctrl_key.as_ref().map(hash),
    });
    let tls = tls.map(|key| weft_api::HostTls { key_hash: named(key.bound_by()) });
    weft_api::Host { nqn, dhchap, tls }
}

pub(super) fn device(status: &DeviceStatus) -> weft_api::Device {
    weft_api::Device {
        index: status.index,
        uuid: status.uuid.to_string(),
        name: status.name.clone(),
        size_bytes: status.size_bytes,
        state: status.state.clone(),
        reason: status.reason.clone(),
        reads: status.reads,
        writes: status.writes,
        read_errors: status.read_errors,
        write_errors: status.write_errors,
        checksum_errors: status.checksum_errors,
        healed: status.healed,
    }
}

pub(super) fn device_stats(
    status: &DeviceStatus,
    (read_latency, write_latency): (Histogram, Histogram),
) -> DeviceStats {
    DeviceStats { device: device(status), read_latency, write_latency }
}

pub(super) fn volume(info: &VolumeInfo) -> weft_api::Volume {
    weft_api::Volume {
        id: info.id,
        name: info.name.clone(),
        uuid: info.uuid.to_string(),
        size_bytes: info.size_bytes,
        logical_block_bytes: info.logical_block_bytes,
        read_only: info.read_only,
        allocated_bytes: info.allocated_bytes,
        hosts: info.hosts.clone(),
        reservations: reservations(&info.reservations),
        write_cache: info.write_cache,
    }
}

/// Nothing, if no host has registered.
fn reservations(all: &Reservations) -> Option<weft_api::Reservations> {
    let kind = |kind| match kind {
        HoldKind::WriteExclusive => "write exclusive",
        HoldKind::ExclusiveAccess => "exclusive access",
        HoldKind::WriteExclusiveRegistrants => "write exclusive, registrants only",
        HoldKind::ExclusiveAccessRegistrants => "exclusive access, registrants only",
        HoldKind::WriteExclusiveAll => "write exclusive, all registrants",
        HoldKind::ExclusiveAccessAll => "exclusive access, all registrants",
    };
    (!all.registrants.is_empty()).then(|| weft_api::Reservations {
        held: all.held.map(|held| kind(held.kind).to_owned()),
        holder: all.held.and_then(|held| held.host).map(|host| host.to_string()),
        registrants: all.registrants.keys().map(ToString::to_string).collect(),
        persistent: all.persistent,
    })
}
