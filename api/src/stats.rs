//! What a node counts. All counts are since the node started and only grow, so that a client gets
//! rates and percentiles of any span from two readings.

use std::fmt;

use serde::Deserialize;
use serde::Serialize;

use crate::Device;
use crate::Histogram;
use crate::Pod;
use crate::ScrubStats;
use crate::Task;

/// Everything a node counts, at one moment.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct Stats {
    /// When it was read, in milliseconds since 1970 by the node's clock.
    pub unix_ms: u64,
    /// The same in milliseconds since the node started; never jumps.
    pub uptime_ms: u64,
    /// The pod.
    pub pod: Pod,
    /// Its devices, in order of index.
    pub devices: Vec<DeviceStats>,
    /// Its volumes, in order of name.
    pub volumes: Vec<VolumeStats>,
    /// Each protocol served.
    pub front_ends: Vec<FrontEndStats>,
    /// Memory for what hosts have in flight; counts recorded before it was counted have none.
    #[serde(default)]
    pub in_flight: InFlightStats,
    /// Long work under way, in order of start.
    #[serde(default)]
    pub tasks: Vec<Task>,
    /// What scrubs found.
    #[serde(default)]
    pub scrub: ScrubStats,
}

/// A device and its latencies.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct DeviceStats {
    /// The device and its counters.
    #[serde(flatten)]
    pub device: Device,
    /// Of reads completed.
    pub read_latency: Histogram,
    /// Of writes completed.
    pub write_latency: Histogram,
}

/// What hosts did with a volume.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct VolumeStats {
    /// Number within the pod.
    pub id: u64,
    /// Its name.
    pub name: String,
    /// Its size.
    pub size_bytes: u64,
    /// What is stored, before compression and parity.
    pub allocated_bytes: u64,
    /// By front end and operation; those that never happened are left out.
    pub operations: Vec<OperationStats>,
}

/// One kind of request on one volume over one front end.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct OperationStats {
    /// The protocol it came by.
    pub front_end: FrontEnd,
    /// What was asked.
    pub operation: Operation,
    /// Requests answered with an error; they are in no histogram.
    pub errors: u64,
    /// Bytes read, written or zeroed.
    pub bytes: u64,
    /// From a request's arrival to its answer in the socket.
    pub latency: Histogram,
    /// Where that time went; stages that took none are left out.
    pub stages: Vec<StageStats>,
}

/// One part of the way of a request.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct StageStats {
    /// Which.
    pub stage: Stage,
    /// Time spent there, of requests that spent any.
    pub latency: Histogram,
}

/// A protocol's connections.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct FrontEndStats {
    /// The protocol.
    pub front_end: FrontEnd,
    /// Connections open now.
    pub connections_open: u64,
    /// Connections accepted.
    pub connections_total: u64,
    /// Connections turned away because a limit was reached.
    pub connections_refused: u64,
    /// Authentications of hosts that failed; counts recorded before there were any have none.
    #[serde(default)]
    pub authentications_failed: u64,
}

/// Memory for what hosts have in flight, beyond the little each connection has of its own.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct InFlightStats {
    /// How much there is.
    pub limit_bytes: u64,
    /// Of it, taken now.
    pub taken_bytes: u64,
    /// Connections that wait for it now.
    pub waiting: u64,
    /// How often one had to wait.
    pub waits: u64,
}

/// A connection of a host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct Connection {
    /// Number, never used again while the node runs.
    pub id: u64,
    /// The protocol.
    pub front_end: FrontEnd,
    /// The other end: `127.0.0.1:50122`, or `unix`.
    pub peer: String,
    /// Whether it is encrypted; older nodes do not say.
    #[serde(default)]
    pub tls: bool,
    /// Name of the NVMe host; null for NBD clients, which have none.
    pub host: Option<String>,
    /// The volume an NBD client has chosen; null for an NVMe queue, which serves many.
    pub volume: Option<String>,
    /// Number of the NVMe controller.
    pub controller: Option<u16>,
    /// Number of the NVMe queue; 0 is the admin queue.
    pub queue: Option<u16>,
    /// Seconds since it was accepted.
    pub open_s: u64,
    /// Requests taken and not yet answered.
    pub in_flight: u64,
    /// Requests taken.
    pub requests: u64,
    /// Of them, answered with an error.
    pub errors: u64,
    /// Bytes returned by reads.
    pub bytes_read: u64,
    /// Bytes of completed writes.
    pub bytes_written: u64,
}

// A name is a token, not a `literal`, which the derive for the OpenAPI document could not read.
macro_rules! names {
    ($(#[$meta:meta])* $type:ident { $($(#[$doc:meta])* $variant:ident = $name:tt,)* }) => {
        $(#[$meta])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
        pub enum $type {
            $($(#[$doc])* #[serde(rename = $name)] $variant,)*
            /// One that a later version knows.
            #[serde(other, rename = "unknown")]
            Unknown,
        }

        impl $type {
            /// Every one this version knows, in order.
            pub const ALL: &'static [Self] = &[$(Self::$variant,)*];

            /// Its name, in the API and in metrics.
            #[must_use]
            pub fn name(self) -> &'static str {
                match self {
                    $(Self::$variant => $name,)*
                    Self::Unknown => "unknown",
                }
            }
        }

        impl fmt::Display for $type {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.pad(self.name())
            }
        }
    };
}

pub(crate) use names;

names! {
    /// A protocol that hosts speak.
    FrontEnd {
        /// Network Block Device.
        Nbd = "nbd",
        /// NVMe over TCP.
        NvmeTcp = "nvme-tcp",
    }
}

names! {
    /// What hosts ask for.
    Operation {
        /// Reads, and NVMe Compare and Verify.
        Read = "read",
        /// Writes, and NVMe's fused Compare and Write.
        Write = "write",
        /// Trims, discards and write-zeroes.
        Zero = "zero",
        /// Flushes.
        Flush = "flush",
        /// All else: block status, cache hints, reservations.
        Other = "other",
    }
}

names! {
    /// The parts of a request's way, in their order.
    Stage {
        /// From its arrival until it is begun; commands wait here when too much is in flight, and
        /// NVMe writes for data that the host was asked for.
        Parse = "parse",
        /// Waiting for requests on the same blocks.
        Lock = "lock",
        /// Compressing.
        Compress = "compress",
        /// Waiting for room: for reclaim, when the pod is nearly full.
        Space = "space",
        /// Until the entry and all before it are durable and visible.
        Journal = "journal",
        /// Bringing nodes of the map into RAM.
        Map = "map",
        /// Answered from RAM: looking it up.
        Cache = "cache",
        /// Waiting for a device.
        Device = "device",
        /// Verifying and decompressing what a device returned.
        Decode = "decode",
        /// From the answer's making until the socket has it.
        Reply = "reply",
        /// The rest: waiting for a processor, mostly.
        Rest = "rest",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_later_versions_are_taken_for_unknown() {
        for stage in Stage::ALL {
            let text = serde_json::to_string(stage).expect("encodes");
            assert_eq!(text, format!("\"{stage}\""));
            assert_eq!(serde_json::from_str::<Stage>(&text).expect("decodes"), *stage);
        }
        assert_eq!(serde_json::from_str::<Stage>("\"qos\"").expect("decodes"), Stage::Unknown);
    }
}
