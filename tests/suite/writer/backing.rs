//! A writer on an image with a backing file, which it never sees.

use std::sync::Arc;

use qmpbackup::qcow2::{Error, GuestOffset, Writer};
use qmpbackup::storage::MemoryStorage;

use crate::support::tools;
use crate::support::writer_base::assert_same;
use crate::support::writer_ops::check;

const CLUSTER: usize = 1 << 16;
/// The last cluster ends behind the disk.
const SIZE: usize = 5 * CLUSTER + 1536;

#[test]
fn what_is_in_a_backing_file_stays_there_and_no_write_needs_it_that_covers_all_of_a_cluster() {
    for options in ["compat=0.10", "compat=1.1", "extended_l2=on"] {
        let folder = tempfile::tempdir().unwrap();
        let mut disk: Vec<u8> = (0..SIZE).map(|at| (at % 251) as u8 + 1).collect();
        std::fs::write(folder.path().join("below"), &disk).unwrap();
        let mut create = tools::qemu_img();
        create.args(["create", "-q", "-f", "qcow2", "-b", "below", "-F", "raw", "-o", options, "image"]);
        tools::run(create.current_dir(folder.path()));
        let storage = Arc::new(MemoryStorage::new(std::fs::read(folder.path().join("image")).unwrap()));
        let mut writer = Writer::open(storage.clone()).unwrap();
        let mut write = |writer: &mut Writer, at: usize, length: usize| {
            let result = writer.write(&vec![0xee; length], GuestOffset(at as u64));
            if result.is_ok() {
                disk[at..at + length].fill(0xee);
            }
            result
        };
        write(&mut writer, CLUSTER, CLUSTER).unwrap();
        // to the end of the disk, but not of its cluster
        write(&mut writer, 5 * CLUSTER, 1536).unwrap();
        for (at, length) in [(0, 512), (100, CLUSTER), (3 * CLUSTER, CLUSTER + 1), (2 * CLUSTER - 1, 2)] {
            let refused = write(&mut writer, at, length);
            assert!(matches!(&refused, Err(Error::NeedsBacking { name, .. }) if name == "below"), "{refused:?}");
        }
        // neither the whole clusters nor the subclusters between the ends are zeroes then
        for (at, end) in [(3 * CLUSTER, 4 * CLUSTER + 512), (2 * CLUSTER + 512, 4 * CLUSTER), (100, CLUSTER - 100)] {
            let refused = writer.write_zeroes(at as u64..end as u64);
            assert!(matches!(&refused, Err(Error::NeedsBacking { .. })), "{refused:?}");
        }
        let mut byte = [0];
        assert!(matches!(writer.read(&mut byte, GuestOffset(0)), Err(Error::NeedsBacking { .. })));
        writer.discard(CLUSTER as u64..2 * CLUSTER as u64).unwrap();
        if options != "compat=0.10" {
            disk[CLUSTER..2 * CLUSTER].fill(0);
        }
        // nothing where nothing is asked for
        writer.discard(77..77).unwrap();
        writer.write_zeroes(77..77).unwrap();
        writer.write(&[], GuestOffset(77)).unwrap();
        writer.write_compressed(&[], GuestOffset(SIZE as u64)).unwrap();
        writer.finish().unwrap();
        let report = check(&storage.to_vec());
        assert_eq!((report.corruptions(), report.leaks), (0, 0), "{report:?}");
        std::fs::write(folder.path().join("image"), storage.to_vec()).unwrap();
        let mut convert = tools::qemu_img();
        tools::run(convert.args(["convert", "-O", "raw", "image", "raw"]).current_dir(folder.path()));
        assert_same(&std::fs::read(folder.path().join("raw")).unwrap(), &disk, options);
    }
}
