//! Refcounts against a model.

use super::*;
use crate::qcow2::{CompressionType, Layout, RefcountWriter};
use crate::storage::MemoryStorage;
use proptest::prelude::*;

#[derive(Debug, Clone)]
enum Op {
    Take,
    Run(u64),
    Share(usize),
    Release(usize),
    Flush,
    Reopen,
}

fn ops() -> impl Strategy<Value = Vec<Op>> {
    let op = prop_oneof![
        6 => Just(Op::Take),
        1 => (1u64..40).prop_map(Op::Run),
        1 => (300u64..700).prop_map(Op::Run),
        2 => any::<usize>().prop_map(Op::Share),
        4 => any::<usize>().prop_map(Op::Release),
        2 => Just(Op::Flush),
        1 => Just(Op::Reopen),
    ];
    prop::collection::vec(op, 0..120)
}

/// An image without clusters for data, with refcounts of this width.
fn empty(order: u32) -> MemoryStorage {
    let storage = MemoryStorage::default();
    let layout = Layout::new(Geometry::new(9, false).unwrap(), 4096, CompressionType::Deflate, 0, 0).unwrap();
    let mut put = |host: HostOffset, bytes: &[u8]| storage.write_all_at(bytes, host.0);
    put(HostOffset(0), &layout.header()).unwrap();
    RefcountWriter::new(&layout, &mut put).unwrap().finish(&mut put).unwrap();
    storage.set_length(layout.length()).unwrap();
    let header = Header::read(&storage).unwrap();
    // the same counts, in a block of the other width
    let mut entry = [0; 8];
    storage.read_exact_at(&mut entry, header.refcount_table.offset.0).unwrap();
    let mut block = vec![0; 512];
    (0..to_usize(layout.length() / 512)).for_each(|cluster| refcount::set(&mut block, cluster, order, 1));
    storage.write_all_at(&block, u64::from_be_bytes(entry)).unwrap();
    storage.write_all_at(&order.to_be_bytes(), 96).unwrap();
    storage
}

/// What [`Writer::flush`](crate::qcow2::Writer::flush) does, without tables.
fn flush(refcounts: &mut Refcounts, storage: &MemoryStorage, head: &mut Head) {
    refcounts.write_blocks(storage).unwrap();
    refcounts.write_table(storage, head).unwrap();
    refcounts.settle(storage).unwrap();
}

proptest! {
    #[test]
    fn each_cluster_is_counted_as_often_as_it_was_taken(order in 0u32..=6, ops in ops()) {
        let storage = empty(order);
        let before = storage.length() / 512;
        let mut head = Head::read(&storage).unwrap();
        let mut refcounts = Refcounts::read(&storage, head.header()).unwrap();
        let mut model: BTreeMap<u64, u64> = BTreeMap::new();
        let mut pending: Vec<u64> = Vec::new();
        for op in ops.into_iter().chain([Op::Flush, Op::Reopen]) {
            let picked = |at: usize| model.keys().copied().nth(at % model.len().max(1));
            match op {
                Op::Take | Op::Run(_) => {
                    let count = if let Op::Run(count) = op { count } else { 1 };
                    let first = refcounts.take_run(&storage, count).unwrap();
                    for cluster in first..first + count {
                        prop_assert!(cluster > 0 && model.insert(cluster, 1).is_none(), "{cluster} was taken twice");
                        prop_assert!(!pending.contains(&cluster));
                    }
                }
                Op::Share(at) => if let Some(cluster) = picked(at) {
                    let full = refcounts.is_full(&storage, cluster).unwrap();
                    prop_assert_eq!(refcounts.share(&storage, cluster).is_err(), full);
                    *model.get_mut(&cluster).unwrap() += u64::from(!full);
                },
                Op::Release(at) => if let Some(cluster) = picked(at) {
                    // one that is released as often as it was taken must not be shared any more
                    if model[&cluster] == 1 {
                        model.remove(&cluster);
                    } else if let Some(count) = model.get_mut(&cluster) {
                        *count -= 1;
                    }
                    pending.push(cluster);
                    refcounts.release(cluster);
                },
                Op::Flush => {
                    flush(&mut refcounts, &storage, &mut head);
                    pending.clear();
                    prop_assert_eq!(refcounts.pending(), 0);
                }
                Op::Reopen => {
                    flush(&mut refcounts, &storage, &mut head);
                    pending.clear();
                    head = Head::read(&storage).unwrap();
                    refcounts = Refcounts::read(&storage, head.header()).unwrap();
                }
            }
        }
        // all that has a refcount is in the model, is a table, or was there at first
        let table = refcounts.table();
        let blocks = refcounts.table.iter().filter(|entry| **entry != 0).map(|entry| entry / 512);
        let own: BTreeSet<u64> = clusters_of(table, refcounts.geometry).chain(blocks).collect();
        for cluster in 0..storage.length() / 512 + 100 {
            let count = refcounts.get(&storage, cluster).unwrap();
            let expected = model.get(&cluster).copied().unwrap_or_default() + u64::from(own.contains(&cluster));
            if cluster >= before || expected > 0 {
                prop_assert_eq!(count, expected, "cluster {}", cluster);
            }
        }
    }
}

/// Refcounts of a file that is 25 GiB long, nearly all of it a hole, and of which the table can lead to 32 GiB.
#[test]
fn a_table_becomes_no_longer_than_it_may_while_that_is_enough() {
    let memory = empty(6);
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("image");
    std::fs::write(&path, memory.to_vec()).unwrap();
    let file = std::fs::File::options().read(true).write(true).open(&path).unwrap();
    let storage = crate::storage::FileStorage::new(file).unwrap();
    storage.set_length(25 << 30).unwrap();
    let header = Header::read(&storage).unwrap();
    assert_eq!(header.most_counted(), 32 << 30);
    let mut refcounts = Refcounts::read(&storage, &header).unwrap();
    assert_eq!(refcounts.take_run(&storage, 2).unwrap(), (25 << 30) / 512);
    assert_eq!(refcounts.table().bytes(), REFCOUNT_TABLE_BYTES_MAX);
    storage.set_length(header.most_counted()).unwrap();
    let error = Refcounts::read(&storage, &header).unwrap().take_run(&storage, 2).unwrap_err();
    assert!(matches!(error, Error::TableTooLarge { .. }), "{error}");
}
