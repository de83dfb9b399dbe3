//! A writer against an array of bytes: images of all kinds, asked for anything, and nothing is wrong with them after it.

use std::sync::Arc;

use qmpbackup::qcow2::Writer;
use qmpbackup::storage::MemoryStorage;

use crate::support::prng::Prng;
use crate::support::seeds::{self, shared_seeds};
use crate::support::writer_base::{Base, assert_same};
use crate::support::writer_ops::{Draw, Op, check, within};

shared_seeds! {
    judge, 48;
    a_writer_does_what_an_array_does_0 = 0,
    a_writer_does_what_an_array_does_1 = 1,
    a_writer_does_what_an_array_does_2 = 2,
    a_writer_does_what_an_array_does_3 = 3,
    a_writer_does_what_an_array_does_4 = 4,
    a_writer_does_what_an_array_does_5 = 5,
    a_writer_does_what_an_array_does_6 = 6,
    a_writer_does_what_an_array_does_7 = 7,
}

fn judge(seed: u64) {
    let base = Base::make(seed, 21, 6 << 20);
    let prng = &mut Prng::stream(seed, 21);
    let (mut disk, cluster) = (base.disk.clone(), base.knobs.cluster_size());
    let storage = Arc::new(MemoryStorage::new(base.image.clone()));
    let unit = *prng.pick(&[1, 1, 512]);
    let draw = Draw { size: disk.len() as u64, cluster, unit, longest: prng.between(1, 1 << 20) };
    let mut asked = Vec::new();
    for _ in 0..prng.between(1, 3) {
        let mut writer = Writer::open(storage.clone()).unwrap();
        for _ in 0..prng.below(120) {
            let op = draw.op(prng);
            asked.push(short(&op));
            let said = || format!("{}\n{}", base.said(), asked.join("\n"));
            let got = op.ask(&mut writer).unwrap_or_else(|error| panic!("{error}: {error:?}\n{}", said()));
            op.apply(&mut disk, cluster);
            if let (Op::Read(range), Some(bytes)) = (&op, got) {
                assert_same(&bytes, &disk[within(range, 0)], &said());
            }
        }
        asked.push("finish".to_owned());
        writer.finish().unwrap();
        let report = check(&storage.to_vec());
        let clean = report.corruptions() == 0 && report.leaks == 0;
        assert!(clean, "{report:?}\n{}\n{}", base.said(), asked.join("\n"));
    }
    if seeds::are_many() || seed % 2 == 0 {
        base.judge(&storage.to_vec(), &disk, false);
    } else {
        assert_same(&crate::support::writer_ops::read(&storage.to_vec()), &disk, base.said());
    }
}

fn short(op: &Op) -> String {
    match op {
        Op::Write(range, _) => format!("write {range:?}"),
        Op::Allocate(range, _) => format!("allocate {range:?}"),
        Op::Compressed(range, _) => format!("compressed {range:?}"),
        Op::Zero(_) | Op::Discard(_) | Op::Read(_) | Op::Flush => format!("{op:?}"),
    }
}
