//! Damaged images and a writer: it refuses, or it writes, but guest data never lands where tables are.

use std::ops::Range;
use std::sync::Arc;

use qmpbackup::qcow2::{Error, Header, Writer};
use qmpbackup::storage::MemoryStorage;

use crate::support::prng::Prng;
use crate::support::recorder::{Recorder, Step};
use crate::support::seeds;
use crate::support::writer_base::Base;
use crate::support::writer_ops::{Draw, Op};

/// What the guest writes, and nobody else.
const MARK: u8 = 0xa7;

#[test]
fn damage_does_not_lead_guest_data_to_the_tables() {
    let (bases, pokes) = if seeds::are_many() { (64, 4000) } else { (6, 400) };
    let (mut opened, mut refused) = (0, 0);
    for seed in 2000..2000 + bases {
        let base = Base::make(seed, 14, 64 << 10);
        let prng = &mut Prng::stream(seed, 24);
        for _ in 0..pokes {
            match attack(&base, prng) {
                Ok(()) => opened += 1,
                Err(_) => refused += 1,
            }
        }
    }
    assert!(opened > 100 && refused > 100, "{opened} were opened, {refused} refused");
}

fn attack(base: &Base, prng: &mut Prng) -> Result<(), Error> {
    let mut image = base.image.clone();
    for _ in 0..prng.between(1, 3) {
        poke(&mut image, prng);
    }
    let storage = Arc::new(Recorder::new(image));
    let mut writer = Writer::open(storage.clone())?;
    let header = writer.header().clone();
    if header.size == 0 {
        return writer.finish();
    }
    let cluster = header.geometry.cluster_size();
    let draw = Draw { size: header.size.min(1 << 20), cluster, unit: 512, longest: 4 * cluster };
    for _ in 0..12 {
        let mut op = draw.op(prng);
        if let Op::Write(_, bytes) | Op::Allocate(_, bytes) = &mut op {
            bytes.fill(MARK);
        }
        // any error is right
        let _ = op.ask(&mut writer);
    }
    let _ = writer.finish();
    let moved = Header::read(&MemoryStorage::new(storage.now())).unwrap().refcount_table != header.refcount_table;
    let table = |offset: u64, length: u64| offset..(offset + length).next_multiple_of(cluster);
    let mut forbidden = vec![0..cluster, table(header.l1_table.offset.0, header.l1_table.bytes())];
    if !moved {
        forbidden.push(table(header.refcount_table.offset.0, header.refcount_table.bytes()));
    }
    for step in storage.steps() {
        if let Step::Write { offset, bytes } = step {
            let range = offset..offset + bytes.len() as u64;
            let hit = |forbidden: &Range<u64>| range.start < forbidden.end && forbidden.start < range.end;
            let is_guests = bytes.len() >= 512 && bytes[bytes.len() - 512..].iter().all(|byte| *byte == MARK);
            assert!(!is_guests || !forbidden.iter().any(hit), "{range:x?} of {forbidden:x?}\n{}", base.said());
        }
    }
    Ok(())
}

/// Damages the header, or an entry of a table.
fn poke(image: &mut [u8], prng: &mut Prng) {
    let header = Header::read(&MemoryStorage::new(image.to_vec()));
    let Ok(header) = header else { return };
    let cluster = header.geometry.cluster_size();
    let number = |offset: u64| {
        let start = usize::try_from(offset).ok()?;
        Some(u64::from_be_bytes(image.get(start..start.checked_add(8)?)?.try_into().unwrap()) & 0x00ff_ffff_ffff_fe00)
    };
    let (l1, table) = (header.l1_table.offset.0, header.refcount_table.offset.0);
    let l2 = number(l1 + prng.below(header.l1_table.entries.max(1)) * 8);
    let place = match prng.below(10) {
        0 => Some(prng.below(14) * 8),
        1 => Some(table + prng.below(8) * 8),
        2..=3 => number(table).map(|block| block + prng.below(128) / 8 * 8),
        4 => Some(l1 + prng.below(header.l1_table.entries.max(1)) * 8),
        _ => l2.map(|l2| l2 + prng.below(cluster / 8) * 8),
    };
    let value = match prng.below(6) {
        0 => prng.next(),
        1 => 0,
        2 => prng.below(1 << 20),
        _ => {
            let target = [0, l1, table, prng.below(image.len() as u64) / cluster * cluster, l2.unwrap_or_default()];
            *prng.pick(&target) | *prng.pick(&[0, 1, 1 << 62, 1 << 63, 1 << 63])
        }
    };
    if let Some(part) =
        place.and_then(|place| usize::try_from(place).ok()).and_then(|place| image.get_mut(place..place + 8))
    {
        part.copy_from_slice(&value.to_be_bytes());
    }
}
