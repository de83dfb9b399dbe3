//! What programs may ask of the library, however little sense it makes.

use std::fs;
use std::io;
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use qmpbackup::capture::{self, Connection, Request, RequestedLevel};
use qmpbackup::chain::{self, Checksums};
use qmpbackup::qcow2::{CompressionType, Deflater, GuestOffset, Image, Reader};
use qmpbackup::storage::{FileStorage, MemoryStorage, Storage, WritableStorage};

use crate::support::tools;

/// That the futures of backups can be spawned, or this does not compile.
#[expect(dead_code, reason = "it is for the compiler")]
fn backups_can_be_spawned(request: &Request, observer: &dyn capture::Observer) -> impl Send {
    let connection = &request.connection;
    (
        (capture::backup(request, observer), capture::dry_run(request, observer)),
        (capture::recover(connection, None, observer), capture::disks(connection, observer)),
        capture::remove_bitmaps(connection, None, observer),
    )
}

#[tokio::test]
async fn the_id_of_a_chain_that_no_bitmap_can_have_is_refused_before_anything_is_done() {
    struct Deaf;
    impl capture::Observer for Deaf {
        fn event(&self, _: &capture::Event) {}
    }
    let folder = tempfile::tempdir().unwrap();
    let target = folder.path().join("target");
    let connection = Connection {
        monitor: folder.path().join("none").to_str().unwrap().parse().unwrap(),
        agent: None,
        timeout: Duration::from_secs(1),
    };
    for id in ["", "a b", "\u{e9}", "\n", &"x".repeat(201)] {
        let request = Request {
            uuid: Some(id.to_owned()),
            ..Request::new(connection.clone(), RequestedLevel::Full, target.clone())
        };
        let refused = [
            capture::backup(&request, &Deaf).await.map(drop).unwrap_err(),
            capture::dry_run(&request, &Deaf).await.map(drop).unwrap_err(),
        ];
        for error in refused {
            assert!(matches!(&error, capture::Error::ChainId { id: told } if told == id), "{error}");
        }
        assert!(!target.exists());
    }
}

/// Says of data where all of it is, also what lies before the offset that was asked for.
struct WholeExtents(Arc<FileStorage>);

impl Storage for WholeExtents {
    fn length(&self) -> u64 {
        self.0.length()
    }

    fn read_exact_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        self.0.read_exact_at(buffer, offset)
    }

    fn next_data(&self, offset: u64) -> io::Result<Option<Range<u64>>> {
        let data = self.0.next_data(offset)?;
        Ok(data.map(|data| if data.start == offset { 0..data.end } else { data }))
    }
}

#[test]
fn arguments_beyond_all_bounds_get_answers() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("disk");
    tools::run(tools::qemu_img().args(["create", "-q", "-f", "qcow2", "-o", "cluster_size=4k"]).arg(&path).arg("1M"));
    tools::run(tools::qemu_io().args(["-f", "qcow2", "-c", "write -P 3 0 64k"]).arg(&path));
    let image = Arc::new(FileStorage::open(&path).unwrap());
    let blocks = image.length().div_ceil(chain::BLOCK);
    let all = chain::block_sums(&*image, 0..u64::MAX).unwrap();
    assert_eq!(all, chain::block_sums(&*image, 0..blocks).unwrap());
    assert!(chain::block_sums(&*image, u64::MAX - 1..u64::MAX).unwrap().is_empty());
    chain::create_checksums(&path, &*image).unwrap();
    let sums = Checksums::open(&path).unwrap().unwrap();
    assert_eq!(sums.read(0..u64::MAX).unwrap(), all);
    assert!(sums.read(u64::MAX - 1..u64::MAX).unwrap().is_empty());
    let mut deflater = Deflater::new(CompressionType::Deflate, u64::MAX);
    assert!(deflater.deflate(&[0; 4096]).is_some());
    let length = image.length();
    for offset in [0, 77, u64::MAX] {
        image.write_all_at(&[], offset).unwrap();
        assert_eq!([image.length(), fs::metadata(&path).unwrap().len()], [length; 2], "{offset}");
        let memory = MemoryStorage::new(vec![1; 5]);
        memory.write_all_at(&[], offset).unwrap();
        assert_eq!(memory.length(), 5, "{offset}");
    }
    let image = Image::open(Arc::new(WholeExtents(image))).unwrap();
    let mut bytes = vec![0; 64 << 10];
    Reader::new(&image).read(&mut bytes, GuestOffset(0)).unwrap();
    assert_eq!(bytes, vec![3; 64 << 10]);
}
