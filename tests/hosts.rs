//! What only a pod's volume can show of features for NVMe hosts: Compare and Write is one among
//! many writers, and who is served what outlives the node. On simulated devices.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use weft::device::sim::SimDisk;
use weft::device::sim::SimProfile;
use weft::env::EnvRef;
use weft::env::sim::SimEnv;
use weft::error::ErrorKind;
use weft::secret::DhchapKey;
use weft::secret::HostKeys;
use weft::secret::tls_key::TlsKey;
use weft::volume::Piece;
use weft::volume::VolumeDirectory;
use weft::volume::VolumeRef;
use weft::volume::pod::FormatOptions;
use weft::volume::pod::OpenOptions;
use weft::volume::pod::Pod;
use weft::volume::pod::VolumeSpec;

const SECTOR: usize = 512;

/// Three disks, 1+1, and a volume `v`.
async fn format(env: &EnvRef, disks: &[SimDisk]) {
    let devices: Vec<_> = disks.iter().map(|disk| disk.open(env)).collect();
    let options = FormatOptions { data_strips: 1, parity_strips: 1, journal_bytes: 1 << 20 };
    Pod::format(env, &devices, &options).await.expect("format");
    let spec = VolumeSpec {
        name: "v".into(),
        size_bytes: 1 << 20,
        logical_block_bytes: 512,
        read_only: false,
        write_cache: false,
    };
    open(env, disks).await.create_volume(spec).await.expect("create");
}

async fn open(env: &EnvRef, disks: &[SimDisk]) -> Arc<Pod> {
    let devices = disks.iter().map(|disk| Some(disk.open(env))).collect();
    let options = OpenOptions {
        cache_bytes: 1 << 20,
        map_cache_bytes: 1 << 20,
        force: false,
        replace_missing: false,
    };
    Pod::open(Arc::clone(env), devices, options).await.expect("open")
}

/// Runs one life of the pod, which ends like a killed process.
fn life<T>(world: &Arc<SimEnv>, work: impl AsyncFnOnce(EnvRef) -> T) -> T {
    let process = world.process();
    let env: EnvRef = process.clone();
    let outcome = process.run_for(Duration::from_secs(600), work(env)).expect("no progress");
    process.halt();
    outcome
}

fn disks() -> Vec<SimDisk> {
    let disk = |index| SimDisk::new(format!("disk-{index}"), SimProfile::new(32 << 20));
    (0..3).map(disk).collect()
}

fn tls_key() -> TlsKey {
    TlsKey::from_random(None, &[3; 64]).expect("TLS keys may be unbound")
}

fn keys() -> HostKeys {
    let key = |byte| DhchapKey::from_random(None, &[byte; 64]);
    HostKeys { key: key(1), ctrl_key: Some(key(2)) }
}

async fn sector(volume: &VolumeRef, index: u64) -> Bytes {
    let bytes = u32::try_from(SECTOR).expect("small");
    let pieces = Arc::clone(volume).read(index * SECTOR as u64, bytes).await.expect("read");
    match pieces.as_slice() {
        [Piece::Data(data)] => data.clone(),
        [Piece::Zero(_)] => Bytes::from(vec![0; SECTOR]),
        several => panic!("{several:?}"),
    }
}

/// Adds one to the counter in sector 3; how often it had to try.
async fn increment(volume: &VolumeRef) -> u32 {
    let mut tries = 0;
    loop {
        tries += 1;
        let before = sector(volume, 3).await;
        let count = u64::from_le_bytes(before[..8].try_into().expect("8 bytes"));
        let mut after = before.to_vec();
        after[..8].copy_from_slice(&(count + 1).to_le_bytes());
        let offset = 3 * SECTOR as u64;
        let write = Arc::clone(volume).compare_and_write(offset, before, after.into());
        if write.await.expect("written or not") {
            return tries;
        }
    }
}

#[test]
fn compare_and_write_loses_no_update_among_many_writers() {
    const WRITERS: u64 = 8;
    const TIMES: u64 = 25;
    for seed in 0..8 {
        let world = SimEnv::new(seed);
        let disks = disks();
        let tries = life(&world, async |env| {
            format(&env, &disks).await;
            let volume = open(&env, &disks).await.find("v").expect("created");
            let (done, mut counted) = tokio::sync::mpsc::unbounded_channel();
            for writer in 0..WRITERS {
                let (volume, done) = (Arc::clone(&volume), done.clone());
                env.spawn(Box::pin(async move {
                    for time in 0..TIMES {
                        // Its neighbours in the same block are written meanwhile.
                        let data = Bytes::from(vec![u8::try_from(time).expect("small"); SECTOR]);
                        let beside = (4 + writer % 4) * SECTOR as u64;
                        Arc::clone(&volume).write(beside, data).await.expect("written");
                        let _ = done.send(increment(&volume).await);
                    }
                }));
            }
            drop(done);
            let mut tries = 0;
            while let Some(count) = counted.recv().await {
                tries += count;
            }
            tries
        });
        assert!(u64::from(tries) > WRITERS * TIMES, "seed {seed}: nobody was ever too late");
        let count = life(&world, async |env| {
            let volume = open(&env, &disks).await.find("v").expect("created");
            sector(&volume, 3).await
        });
        assert_eq!(count[..8], (WRITERS * TIMES).to_le_bytes(), "seed {seed}");
    }
}

#[test]
fn who_is_served_what_outlives_the_node() {
    let (world, disks) = (SimEnv::new(1), disks());
    let list =
        |nqns: &[&str]| Some(nqns.iter().map(|nqn| (*nqn).to_owned()).collect::<BTreeSet<_>>());
    life(&world, async |env| {
        format(&env, &disks).await;
        let pod = open(&env, &disks).await;
        let unknown = pod.set_volume_hosts("v", list(&["nqn.a"])).await.expect_err("not added");
        assert_eq!(unknown.kind(), ErrorKind::NotFound);
        for nqn in ["nqn.a", "nqn.b"] {
            pod.add_host(nqn, None, None).await.expect("added");
        }
        assert_eq!(
            pod.add_host("nqn.a", None, None).await.expect_err("twice").kind(),
            ErrorKind::Exists
        );
        let longest: BTreeSet<_> = (0..128).map(|n| format!("nqn.{n:0>219}")).collect();
        for nqn in &longest {
            pod.add_host(nqn, None, None).await.expect("added");
        }
        pod.set_volume_hosts("v", Some(longest.clone())).await.expect("the longest list there is");
        for nqn in &longest {
            pod.remove_host(nqn).await.expect("removed");
        }
        let many: BTreeSet<_> = (0..200).map(|n| format!("nqn.{n}")).collect();
        let too_many = pod.set_volume_hosts("v", Some(many)).await.expect_err("too many");
        assert_eq!(too_many.kind(), ErrorKind::InvalidRequest);
        let wrong = pod.add_host("iqn.a", None, None).await.expect_err("of another protocol");
        assert_eq!(wrong.kind(), ErrorKind::InvalidRequest);
        pod.set_volume_hosts("v", list(&["nqn.a"])).await.expect("set");
        assert_eq!(pod.host_keys("nqn.a"), None);
        let unknown = pod.set_host_keys("nqn.c", None).await.expect_err("not added");
        assert_eq!(unknown.kind(), ErrorKind::NotFound);
        pod.set_host_keys("nqn.a", Some(keys())).await.expect("set");
        let unknown = pod.set_host_tls_key("nqn.c", None).await.expect_err("not added");
        assert_eq!(unknown.kind(), ErrorKind::NotFound);
        pod.set_host_tls_key("nqn.a", Some(tls_key())).await.expect("set");
        pod.add_host("nqn.d", Some(keys()), Some(tls_key())).await.expect("added");
        pod.remove_host("nqn.d").await.expect("removed");
        assert_eq!(pod.host_keys("nqn.d"), None);
    });
    life(&world, async |env| {
        let pod = open(&env, &disks).await;
        assert_eq!(pod.hosts(), ["nqn.a", "nqn.b"]);
        assert_eq!(pod.host_keys("nqn.a"), Some(keys()));
        assert_eq!((pod.host_tls_key("nqn.a"), pod.host_tls_key("nqn.b")), (Some(tls_key()), None));
        assert_eq!(pod.host_keys("nqn.b"), None);
        pod.set_host_keys("nqn.b", Some(keys())).await.expect("set");
        let volume = pod.find("v").expect("created");
        let admitted = [Some("nqn.a"), Some("nqn.b"), None].map(|host| volume.admits(host));
        assert_eq!(admitted, [true, false, false]);
        pod.remove_host("nqn.a").await.expect("removed");
        assert!(!volume.admits(Some("nqn.a")) && !pod.knows_host("nqn.a"));
        pod.close().await.expect("close");
    });
    life(&world, async |env| {
        let pod = open(&env, &disks).await;
        assert_eq!(pod.hosts(), ["nqn.b"]);
        assert_eq!(pod.host_keys("nqn.b"), Some(keys()), "from a checkpoint");
        pod.set_host_keys("nqn.b", None).await.expect("cleared");
        assert_eq!(pod.host_keys("nqn.b"), None);
        let volume = pod.find("v").expect("created");
        let admitted = [Some("nqn.a"), Some("nqn.b"), None].map(|host| volume.admits(host));
        assert_eq!(admitted, [false; 3], "an empty list admits nobody");
        pod.set_volume_hosts("v", None).await.expect("set");
        assert!(volume.admits(Some("nqn.c")) && volume.admits(None));
    });
}
