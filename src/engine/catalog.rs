//! Names and settings: volumes, layers and members, as JSON in the log.
//!
//! Changes travel through the journal like writes (records of kind `CatalogChange`); a checkpoint
//! stores the whole catalog. `applied` is the LSN of the last change in it, so that replaying the
//! journal applies each change once.

use std::collections::BTreeMap;
use std::collections::BTreeSet;

use serde::Deserialize;
use serde::Serialize;
use uuid::Uuid;

use super::trim::Trim;
use crate::error::Error;
use crate::error::ErrorKind;
use crate::error::Result;
use crate::secret::HostKeys;
use crate::secret::tls_key::TlsKey;

/// Version of the JSON; readers refuse others.
pub const CATALOG_VERSION: u32 = 1;

/// A volume.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VolumeRecord {
    /// Never reused.
    pub id: u64,
    /// Unique name; the export name.
    pub name: String,
    /// Identity towards hosts.
    pub uuid: Uuid,
    /// Size in bytes, a multiple of 4096.
    pub size_bytes: u64,
    /// 512 or 4096.
    pub logical_block_bytes: u32,
    /// Whether targets refuse writes.
    pub read_only: bool,
    /// Its line of writing.
    pub branch: u64,
    /// The layer it writes to.
    pub head: u64,
    /// The only hosts it is served to, by NQN; `None`: all.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hosts: Option<BTreeSet<String>>,
    /// How hosts share it; catalogs older than the field have none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reservations: Option<Reservations>,
    /// Writes are acknowledged from memory and durable once flushed; not in catalogs older than the
    /// field.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub write_cache: bool,
}

/// A host that may connect from anywhere.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HostRecord {
    /// Its qualified name, by which it is known.
    pub nqn: String,
    /// What it authenticates by; catalogs older than the field have none. Stored as they are: who
    /// reads the devices has them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub dhchap: Option<HostKeys>,
    /// What it encrypts by; catalogs older than the field have none. Stored as it is, too.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tls: Option<TlsKey>,
}

/// Which hosts have registered with a volume, and whether one of them holds it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Reservations {
    /// Counts changes of registrations, and wraps.
    pub generation: u32,
    /// Whether all this outlives a restart. If not, the next open forgets it.
    pub persistent: bool,
    /// Key by host.
    pub registrants: BTreeMap<Uuid, u64>,
    /// Who holds the volume, if anyone. Holders are registrants.
    pub held: Option<Hold>,
}

/// A reservation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Hold {
    /// What others may not do.
    pub kind: HoldKind,
    /// The holder; `None` if all registrants are, as the last two kinds want it.
    pub host: Option<Uuid>,
}

/// What hosts other than the holder, or other than registrants, may not do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum HoldKind {
    /// Only the holder writes.
    WriteExclusive,
    /// Only the holder reads or writes.
    ExclusiveAccess,
    /// Only registrants write.
    WriteExclusiveRegistrants,
    /// Only registrants read or write.
    ExclusiveAccessRegistrants,
    /// Only registrants write, and all of them hold it.
    WriteExclusiveAll,
    /// Only registrants read or write, and all of them hold it.
    ExclusiveAccessAll,
}

/// A layer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LayerRecord {
    /// Never reused.
    pub id: u64,
    /// The branch whose records it owns.
    pub branch: u64,
    /// First LSN it owns of that branch.
    pub from_lsn: u64,
    /// The layer to ask for blocks this one does not hold.
    pub parent: Option<u64>,
    /// Where its map's highest node is stored.
    pub root: u64,
    /// Blocks whose map entry is stored.
    pub mapped_blocks: u64,
    /// Deleted; its map is being cleared.
    pub dropping: bool,
    /// Large trims whose leaves are being cleared.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub trims: Vec<Trim>,
}

/// A device of the pod.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MemberRecord {
    /// Index in the pod.
    pub index: usize,
    /// The device's UUID.
    pub uuid: Uuid,
}

/// Everything with a name.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Catalog {
    /// [`CATALOG_VERSION`].
    pub version: u32,
    /// LSN of the last change applied.
    pub applied: u64,
    /// The next id for a volume, branch or layer.
    pub next_id: u64,
    /// By id.
    pub volumes: BTreeMap<u64, VolumeRecord>,
    /// By id.
    pub layers: BTreeMap<u64, LayerRecord>,
    /// By index.
    pub members: Vec<MemberRecord>,
    /// By NQN.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub hosts: BTreeMap<String, HostRecord>,
}

/// One change, as the journal carries it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "snake_case")]
pub enum CatalogChange {
    /// A new volume on a new, empty layer.
    CreateVolume(VolumeRecord),
    /// A new size.
    ResizeVolume {
        /// Which.
        id: u64,
        /// The new size in bytes.
        size_bytes: u64,
    },
    /// The volume is gone; its layer is dropped.
    DeleteVolume {
        /// Which.
        id: u64,
    },
    /// Says which hosts a volume is served to.
    SetVolumeHosts {
        /// Which.
        id: u64,
        /// See [`VolumeRecord::hosts`].
        hosts: Option<BTreeSet<String>>,
    },
    /// Turns a volume's volatile write cache on or off.
    SetWriteCache {
        /// Which.
        id: u64,
        /// See [`VolumeRecord::write_cache`].
        write_cache: bool,
    },
    /// A host may connect.
    AddHost(HostRecord),
    /// A host has other keys than before, or none.
    SetHostKeys {
        /// Which.
        nqn: String,
        /// In place of those before.
        dhchap: Option<HostKeys>,
    },
    /// A host encrypts by another key than before, or by none.
    SetHostTlsKey {
        /// Which.
        nqn: String,
        /// In place of the one before.
        tls: Option<TlsKey>,
    },
    /// It may not any more, and is on no volume's list.
    RemoveHost {
        /// Which.
        nqn: String,
    },
    /// Other registrations or another holder.
    SetReservations {
        /// Which volume's.
        id: u64,
        /// All of them, in place of those before.
        reservations: Reservations,
    },
}

impl Catalog {
    /// A catalog without volumes.
    #[must_use]
    pub fn new(members: Vec<MemberRecord>) -> Self {
        Self {
            version: CATALOG_VERSION,
            applied: 0,
            next_id: 1,
            volumes: BTreeMap::new(),
            layers: BTreeMap::new(),
            members,
            hosts: BTreeMap::new(),
        }
    }

    /// The volume of that name.
    #[must_use]
    pub fn volume_named(&self, name: &str) -> Option<&VolumeRecord> {
        self.volumes.values().find(|volume| volume.name == name)
    }

    /// Applies a change stamped `lsn`; does nothing if it is in the catalog already.
    pub fn apply(&mut self, lsn: u64, change: &CatalogChange) {
        if lsn <= self.applied {
            return;
        }
        self.applied = lsn;
        match change {
            CatalogChange::CreateVolume(volume) => {
                let layer = LayerRecord {
                    id: volume.head,
                    branch: volume.branch,
                    from_lsn: lsn,
                    parent: None,
                    root: 0,
                    mapped_blocks: 0,
                    dropping: false,
                    trims: Vec::new(),
                };
                self.next_id = self.next_id.max(volume.id.max(volume.head).max(volume.branch) + 1);
                self.layers.insert(layer.id, layer);
                self.volumes.insert(volume.id, volume.clone());
            }
            CatalogChange::ResizeVolume { id, size_bytes } => {
                if let Some(volume) = self.volumes.get_mut(id) {
                    volume.size_bytes = *size_bytes;
                }
            }
            CatalogChange::DeleteVolume { id } => {
                if let Some(volume) = self.volumes.remove(id)
                    && let Some(layer) = self.layers.get_mut(&volume.head)
                {
                    layer.dropping = true;
                }
            }
            CatalogChange::SetReservations { id, reservations } => {
                if let Some(volume) = self.volumes.get_mut(id) {
                    volume.reservations = Some(reservations.clone());
                }
            }
            CatalogChange::SetVolumeHosts { id, hosts } => {
                if let Some(volume) = self.volumes.get_mut(id) {
                    volume.hosts.clone_from(hosts);
                }
            }
            CatalogChange::SetWriteCache { id, write_cache } => {
                if let Some(volume) = self.volumes.get_mut(id) {
                    volume.write_cache = *write_cache;
                }
            }
            CatalogChange::AddHost(host) => {
                self.hosts.insert(host.nqn.clone(), host.clone());
            }
            CatalogChange::SetHostKeys { nqn, dhchap } => {
                if let Some(host) = self.hosts.get_mut(nqn) {
                    host.dhchap.clone_from(dhchap);
                }
            }
            CatalogChange::SetHostTlsKey { nqn, tls } => {
                if let Some(host) = self.hosts.get_mut(nqn) {
                    host.tls.clone_from(tls);
                }
            }
            CatalogChange::RemoveHost { nqn } => {
                self.hosts.remove(nqn);
                for volume in self.volumes.values_mut() {
                    // A list that becomes empty admits nobody, not everybody.
                    volume.hosts.as_mut().map(|hosts| hosts.remove(nqn));
                }
            }
        }
    }

    /// The catalog as JSON.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        serde_json::to_vec(self).expect("plain data always serialises")
    }

    /// Reads a catalog back.
    ///
    /// # Errors
    /// `Corrupt` if it is not one, `Unsupported` for another version.
    pub fn decode(json: &[u8]) -> Result<Self> {
        let catalog: Self = serde_json::from_slice(json)
            .map_err(|error| Error::new(ErrorKind::Corrupt, "decode catalog").source(error))?;
        if catalog.version != CATALOG_VERSION {
            return Err(Error::new(ErrorKind::Unsupported, "decode catalog")
                .context(format_args!("version {} is not known to this build", catalog.version)));
        }
        Ok(catalog)
    }
}

impl CatalogChange {
    /// Whether the catalog is longer after it.
    #[must_use]
    pub fn grows(&self) -> bool {
        match self {
            Self::CreateVolume(_)
            | Self::SetVolumeHosts { .. }
            | Self::SetReservations { .. }
            | Self::AddHost(_)
            | Self::SetHostKeys { .. }
            | Self::SetHostTlsKey { .. } => true,
            Self::SetWriteCache { write_cache, .. } => *write_cache,
            Self::ResizeVolume { .. } | Self::DeleteVolume { .. } | Self::RemoveHost { .. } => {
                false
            }
        }
    }

    /// The change as JSON.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        serde_json::to_vec(self).expect("plain data always serialises")
    }

    /// Reads a change back, whose record's checksum is right.
    ///
    /// # Errors
    /// `Unsupported` if it is not one that this build knows.
    pub fn decode(json: &[u8]) -> Result<Self> {
        serde_json::from_slice(json).map_err(|error| {
            Error::new(ErrorKind::Unsupported, "decode catalog change")
                .context("the journal holds a change that this build does not know; start the build that wrote it")
                .source(error)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::secret::DhchapKey;

    fn host(dhchap: Option<HostKeys>) -> HostRecord {
        HostRecord { nqn: "nqn.h".into(), dhchap, tls: None }
    }

    fn volume(id: u64, name: &str) -> VolumeRecord {
        VolumeRecord {
            id,
            name: name.into(),
            uuid: Uuid::nil(),
            size_bytes: 4096,
            logical_block_bytes: 512,
            read_only: false,
            branch: id + 1,
            head: id + 2,
            hosts: None,
            reservations: None,
            write_cache: false,
        }
    }

    #[test]
    fn reservations_round_trip_and_catalogs_without_them_open() {
        let mut catalog = Catalog::new(Vec::new());
        catalog.apply(1, &CatalogChange::CreateVolume(volume(1, "db")));
        let before = String::from_utf8(catalog.encode()).expect("JSON");
        assert!(!before.contains("reservations"), "older builds read it: {before}");
        assert_eq!(Catalog::decode(before.as_bytes()).expect("as before the field"), catalog);

        let kind = HoldKind::WriteExclusiveRegistrants;
        let host = Uuid::from_bytes([0xff; 16]);
        let reservations = Reservations {
            generation: u32::MAX,
            persistent: true,
            registrants: BTreeMap::from([(Uuid::nil(), u64::MAX), (host, 1)]),
            held: Some(Hold { kind, host: Some(host) }),
        };
        let change = CatalogChange::SetReservations { id: 1, reservations: reservations.clone() };
        assert_eq!(CatalogChange::decode(&change.encode()).expect("own JSON"), change);
        catalog.apply(2, &change);
        catalog.apply(
            3,
            &CatalogChange::SetReservations { id: 9, reservations: reservations.clone() },
        );
        assert_eq!(catalog.volumes[&1].reservations, Some(reservations));
        assert_eq!(Catalog::decode(&catalog.encode()).expect("own JSON"), catalog);
    }

    #[test]
    fn write_caches_round_trip_and_catalogs_without_them_open() {
        let mut catalog = Catalog::new(Vec::new());
        catalog.apply(1, &CatalogChange::CreateVolume(volume(1, "db")));
        let before = String::from_utf8(catalog.encode()).expect("JSON");
        assert!(!before.contains("write_cache"), "older builds read it: {before}");
        assert_eq!(Catalog::decode(before.as_bytes()).expect("as before the field"), catalog);
        let [on, off, nowhere] = [(1, true), (1, false), (9, true)]
            .map(|(id, write_cache)| CatalogChange::SetWriteCache { id, write_cache });
        assert_eq!(CatalogChange::decode(&on.encode()).expect("own JSON"), on);
        catalog.apply(2, &on);
        catalog.apply(3, &nowhere);
        assert!(catalog.volumes[&1].write_cache);
        assert_eq!(Catalog::decode(&catalog.encode()).expect("own JSON"), catalog);
        catalog.apply(4, &off);
        assert!(!catalog.volumes[&1].write_cache);
        assert_eq!((on.grows(), off.grows()), (true, false), "turned off in a full catalog too");
    }

    #[test]
    fn trims_round_trip_and_catalogs_without_them_open() {
        let mut catalog = Catalog::new(Vec::new());
        catalog.apply(1, &CatalogChange::CreateVolume(volume(1, "db")));
        let before = String::from_utf8(catalog.encode()).expect("JSON");
        assert!(!before.contains("trims"), "older builds read it: {before}");
        assert_eq!(Catalog::decode(before.as_bytes()).expect("as before the field"), catalog);
        let layer = catalog.layers.get_mut(&3).expect("the volume's");
        layer.trims.push(Trim { first_block: 7, end_block: u64::MAX, lsn: 2 });
        assert_eq!(Catalog::decode(&catalog.encode()).expect("own JSON"), catalog);
    }

    #[test]
    fn each_change_is_applied_once_and_survives_the_round_trip() {
        let mut catalog = Catalog::new(Vec::new());
        let create = CatalogChange::CreateVolume(volume(1, "db"));
        let delete = CatalogChange::DeleteVolume { id: 1 };
        catalog.apply(5, &create);
        catalog.apply(6, &CatalogChange::ResizeVolume { id: 1, size_bytes: 8192 });
        assert_eq!(catalog.volume_named("db").map(|v| v.size_bytes), Some(8192));
        assert_eq!(Catalog::decode(&catalog.encode()).expect("own JSON"), catalog);
        catalog.apply(7, &delete);
        catalog.apply(5, &create);
        assert!(catalog.volumes.is_empty() && catalog.layers[&3].dropping);
        assert_eq!(catalog.next_id, 4);
        assert_eq!(CatalogChange::decode(&create.encode()).expect("own JSON"), create);
        assert!(
            !String::from_utf8(catalog.encode()).expect("JSON").contains("hosts"),
            "as it was before there were any"
        );
        let newer = CatalogChange::decode(br#"{"SplitVolume":{"id":1}}"#).expect_err("not known");
        assert_eq!(newer.kind(), ErrorKind::Unsupported);
    }

    #[test]
    fn keys_of_hosts_round_trip_and_catalogs_without_them_open() {
        let mut catalog = Catalog::new(Vec::new());
        catalog.apply(1, &CatalogChange::AddHost(host(None)));
        let before = String::from_utf8(catalog.encode()).expect("JSON");
        assert!(!before.contains("dhchap"), "older builds read it: {before}");
        assert_eq!(Catalog::decode(before.as_bytes()).expect("as before the field"), catalog);

        let key = |byte| DhchapKey::from_random(None, &[byte; 64]);
        let keys = Some(HostKeys { key: key(1), ctrl_key: Some(key(2)) });
        let change = CatalogChange::SetHostKeys { nqn: "nqn.h".into(), dhchap: keys.clone() };
        assert_eq!(CatalogChange::decode(&change.encode()).expect("own JSON"), change);
        assert!(!format!("{change:?}").contains("DHHC"), "{change:?}");
        catalog.apply(2, &change);
        assert_eq!(catalog.hosts["nqn.h"].dhchap, keys);
        assert_eq!(Catalog::decode(&catalog.encode()).expect("own JSON"), catalog);
        let added = CatalogChange::AddHost(host(keys.clone()));
        assert_eq!(CatalogChange::decode(&added.encode()).expect("own JSON"), added);
        let tls = TlsKey::from_random(None, &[3; 64]);
        let change = CatalogChange::SetHostTlsKey { nqn: "nqn.h".into(), tls: tls.clone() };
        assert_eq!(CatalogChange::decode(&change.encode()).expect("own JSON"), change);
        catalog.apply(3, &change);
        assert_eq!((&catalog.hosts["nqn.h"].dhchap, &catalog.hosts["nqn.h"].tls), (&keys, &tls));
        assert_eq!(Catalog::decode(&catalog.encode()).expect("own JSON"), catalog);
        catalog.apply(4, &CatalogChange::SetHostTlsKey { nqn: "nqn.h".into(), tls: None });
        let nobody = CatalogChange::SetHostKeys { nqn: "nqn.i".into(), dhchap: None };
        catalog.apply(5, &nobody);
        catalog.apply(6, &CatalogChange::SetHostKeys { nqn: "nqn.h".into(), dhchap: None });
        assert_eq!(catalog.hosts["nqn.h"], host(None));
    }

    #[test]
    fn a_host_that_is_removed_leaves_every_list_and_opens_none() {
        let mut catalog = Catalog::new(Vec::new());
        catalog.apply(1, &CatalogChange::CreateVolume(volume(1, "db")));
        catalog.apply(2, &CatalogChange::AddHost(host(None)));
        let hosts = Some(BTreeSet::from(["nqn.h".to_owned()]));
        catalog.apply(3, &CatalogChange::SetVolumeHosts { id: 1, hosts: hosts.clone() });
        assert_eq!(Catalog::decode(&catalog.encode()).expect("own JSON"), catalog);
        assert_eq!(catalog.volumes[&1].hosts, hosts);
        catalog.apply(4, &CatalogChange::RemoveHost { nqn: "nqn.h".into() });
        assert!(catalog.hosts.is_empty());
        assert_eq!(catalog.volumes[&1].hosts, Some(BTreeSet::new()));
    }
}
