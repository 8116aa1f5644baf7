//! Real files, real rings: each test on a file of its own in the temporary directory.

use super::*;

use std::path::PathBuf;
use std::process;

use crate::device::DeviceRef;

const LEN: u64 = 4 << 20;

/// A file that is removed at the end of the test.
struct Scratch(PathBuf);

impl Scratch {
    fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("weft-device-{}-{name}", process::id()));
        let _ = fs::remove_file(&path);
        Self(path)
    }

    fn create(&self) -> DeviceRef {
        Arc::new(FileDevice::create(&self.0, LEN, 1 << 20).expect("create"))
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.0);
    }
}

fn block_on<T>(work: impl Future<Output = T>) -> T {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    tokio::task::LocalSet::new().block_on(&runtime.expect("runtime"), work)
}

fn block(fill: u8, length: usize) -> Bytes {
    let mut buf = AlignedBuf::zeroed(length);
    buf.fill(fill);
    buf.freeze()
}

async fn read(device: &DeviceRef, offset: u64, length: usize) -> Vec<u8> {
    device.read(offset, AlignedBuf::zeroed(length)).await.expect("read").to_vec()
}

#[test]
fn bytes_read_back_as_written_with_either_durability() {
    let scratch = Scratch::new("roundtrip");
    let device = scratch.create();
    block_on(async {
        for (index, durability) in
            [Durability::Durable, Durability::Volatile].into_iter().enumerate()
        {
            let (offset, fill) = (bytes_u64(index) * 65536, 1 + u8::try_from(index).expect("2"));
            device.write(offset, block(fill, 65536), durability).await.expect("write");
            assert_eq!(read(&device, offset, 65536).await, vec![fill; 65536]);
        }
        device.flush().await.expect("flush");
    });
}

#[test]
fn unaligned_memory_is_copied_not_refused() {
    let scratch = Scratch::new("unaligned");
    let device = scratch.create();
    let data = block(0, 8192).slice(512..4608);
    let data = Bytes::from([&data[..], b"x"].concat()).slice(1..);
    block_on(async {
        device.write(4096, data.clone(), Durability::Durable).await.expect("write");
        assert_eq!(read(&device, 4096, 4096).await, data);
    });
}

#[test]
fn far_more_io_than_the_ring_holds_completes() {
    let scratch = Scratch::new("many");
    let device = scratch.create();
    block_on(async {
        let writes = (0..1000_u64).map(|index| {
            let fill = u8::try_from(index % 251).expect("below 256");
            device.write(index * 4096, block(fill, 4096), Durability::Volatile)
        });
        let results = futures_util::future::join_all(writes).await;
        assert!(results.iter().all(Result::is_ok));
        for index in [0, 255, 256, 257, 999] {
            let fill = u8::try_from(index % 251).expect("below 256");
            assert_eq!(read(&device, index * 4096, 4096).await, vec![fill; 4096]);
        }
    });
}

#[test]
fn dropped_future_frees_nothing_and_the_write_lands() {
    let scratch = Scratch::new("dropped");
    let device = scratch.create();
    block_on(async {
        for round in 0..50 {
            drop(device.read(0, AlignedBuf::zeroed(1 << 20)));
            drop(device.write(round * 4096, block(7, 4096), Durability::Durable));
        }
        device.flush().await.expect("flush");
        tokio::time::sleep(std::time::Duration::from_millis(50)).await;
        assert_eq!(read(&device, 0, 50 * 4096).await, vec![7; 50 * 4096]);
    });
}

#[test]
fn ring_outlives_a_runtime_and_serves_the_next_one() {
    let scratch = Scratch::new("runtimes");
    let device = scratch.create();
    for round in 0..3 {
        // The first runtime of a round ends with the write in flight.
        block_on(async { drop(device.write(0, block(round, 4096), Durability::Durable)) });
        block_on(async {
            device.write(4096, block(round, 4096), Durability::Durable).await.expect("write");
            assert_eq!(read(&device, 4096, 4096).await, vec![round; 4096]);
        });
    }
}

#[test]
fn thread_that_ends_waits_for_its_io() {
    let scratch = Scratch::new("thread");
    let device = scratch.create();
    let issue = || {
        block_on(async { drop(device.write(0, block(9, 1 << 20), Durability::Durable)) });
    };
    // An explicit join: the end of a scope alone does not wait for thread-locals.
    std::thread::scope(|scope| scope.spawn(issue).join().expect("thread"));
    block_on(async { assert_eq!(read(&device, 0, 1 << 20).await, vec![9; 1 << 20]) });
}

#[test]
fn second_opener_is_refused_and_told_who_has_it() {
    let scratch = Scratch::new("lock");
    let device = scratch.create();
    for mode in [OpenMode::ReadWrite, OpenMode::ReadOnly] {
        let error = FileDevice::open(&scratch.0, mode).map(|_| ()).expect_err("locked");
        assert_eq!(error.kind(), ErrorKind::Busy);
        assert!(error.to_string().contains(&process::id().to_string()), "{error}");
    }
    drop(device);
    let _first = FileDevice::open(&scratch.0, OpenMode::ReadOnly).expect("free again");
    let _second = FileDevice::open(&scratch.0, OpenMode::ReadOnly).expect("readers share");
}

#[test]
fn discard_gives_room_back_and_reads_zero() {
    let scratch = Scratch::new("discard");
    let device = scratch.create();
    block_on(async {
        device.write(0, block(5, 1 << 20), Durability::Durable).await.expect("write");
        device.discard(0, 1 << 20).await.expect("discard");
        assert_eq!(read(&device, 0, 1 << 20).await, vec![0; 1 << 20]);
    });
    assert_eq!(fs::metadata(&scratch.0).expect("metadata").len(), LEN);
}

#[test]
fn prefix_is_preallocated_and_the_rest_is_sparse() {
    use std::os::unix::fs::MetadataExt;
    let scratch = Scratch::new("sparse");
    let device = scratch.create();
    let stored = fs::metadata(&scratch.0).expect("metadata").blocks() * 512;
    assert!((1 << 20..2 << 20).contains(&stored), "{stored}");
    assert_eq!(device.len_bytes(), LEN);
}

#[test]
fn past_the_end_and_a_file_cut_short_are_errors() {
    let scratch = Scratch::new("short");
    let device = scratch.create();
    block_on(async {
        let past = device.read(LEN, AlignedBuf::zeroed(4096)).await.map(|_| ());
        assert_eq!(past.map_err(|error| error.kind()), Err(ErrorKind::OutOfRange));
        let file = fs::OpenOptions::new().write(true).open(&scratch.0).expect("open");
        file.set_len(2 * LEN).expect("grow");
        assert_eq!(device.lost(), None);
        file.set_len(8192).expect("cut");
        assert_eq!(device.lost(), Some("the file was truncated"));
        let cut = device.read(4096, AlignedBuf::zeroed(8192)).await.map(|_| ());
        assert_eq!(cut.map_err(|error| error.kind()), Err(ErrorKind::DeviceFailed));
    });
}

#[test]
fn deleted_file_is_noticed_and_wrong_paths_are_explained() {
    let scratch = Scratch::new("deleted");
    let device = FileDevice::create(&scratch.0, LEN, 0).expect("create");
    assert_eq!(device.lost(), None);
    let exists = FileDevice::create(&scratch.0, LEN, 0).map(|_| ()).expect_err("exists");
    assert_eq!(exists.kind(), ErrorKind::Exists);
    assert_eq!(device.lost(), None, "a refused create must not remove what was there");
    fs::remove_file(&scratch.0).expect("remove");
    assert_eq!(device.lost(), Some("the file was deleted"));
    let open = |path: &Path| FileDevice::open(path, OpenMode::ReadWrite).map(|_| ());
    let kind = |path| open(path).expect_err("refused").kind();
    assert_eq!(kind(&scratch.0), ErrorKind::NotFound);
    assert_eq!(kind(Path::new("/dev/null")), ErrorKind::InvalidRequest);
}
