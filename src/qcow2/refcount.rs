//! A refcount in the bytes of a refcount block: 1 to 64 bits wide; those below a byte count from the lowest bit.

use byteorder::{BigEndian, ByteOrder};

/// The highest count that fits.
pub(super) fn most(order: u32) -> u64 {
    u64::MAX >> (64 - (1 << order))
}

/// The refcount with this index; zero behind the end of the block.
pub(super) fn get(block: &[u8], index: usize, order: u32) -> u64 {
    match order {
        0..=2 => {
            let bit = index << order;
            let byte = block.get(bit / 8).copied().unwrap_or_default();
            u64::from(byte >> (bit % 8)) & most(order)
        }
        order => {
            let bytes = block.get(range(index, order)).unwrap_or_default();
            if bytes.is_empty() { 0 } else { BigEndian::read_uint(bytes, bytes.len()) }
        }
    }
}

/// The first index from `from` on whose refcount is zero.
pub(super) fn find_free(block: &[u8], from: usize, order: u32) -> Option<usize> {
    match order {
        0..=2 => {
            let fields = 8 >> order;
            let first = from / fields;
            let bytes = (first..).zip(block.get(first..)?).filter(|(_, byte)| **byte != u8::MAX);
            let mut indices = bytes.flat_map(|(at, _)| at * fields..(at + 1) * fields);
            indices.find(|index| *index >= from && get(block, *index, order) == 0)
        }
        // the usual width, in a loop that knows it
        4 => block.get(2 * from..)?.chunks_exact(2).position(|count| count == [0, 0]).map(|found| from + found),
        order => (from..block.len() >> (order - 3)).find(|index| get(block, *index, order) == 0),
    }
}

/// Sets the refcount with this index to a count that fits.
pub(super) fn set(block: &mut [u8], index: usize, order: u32, count: u64) {
    match order {
        0..=2 => {
            let bit = index << order;
            if let Some(byte) = block.get_mut(bit / 8) {
                let [.., count] = count.to_be_bytes();
                let [.., mask] = most(order).to_be_bytes();
                *byte = *byte & !(mask << (bit % 8)) | count << (bit % 8);
            }
        }
        order => {
            if let Some(bytes) = block.get_mut(range(index, order)) {
                let length = bytes.len();
                BigEndian::write_uint(bytes, count, length);
            }
        }
    }
}

fn range(index: usize, order: u32) -> std::ops::Range<usize> {
    let size = 1 << (order - 3);
    index * size..(index + 1) * size
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn refcounts_of_all_widths() {
        let block = [0b1110_0100, 0x12, 0x34, 0x56, 0x78, 0x9a, 0xbc, 0xde];
        let first = |order, count| (0..count).map(|index| get(&block, index, order)).collect::<Vec<_>>();
        assert_eq!(first(0, 8), [0, 0, 1, 0, 0, 1, 1, 1]);
        assert_eq!(first(1, 4), [0, 1, 2, 3]);
        assert_eq!(first(2, 4), [4, 14, 2, 1]);
        assert_eq!(first(3, 3), [0xe4, 0x12, 0x34]);
        assert_eq!(first(4, 2), [0xe412, 0x3456]);
        assert_eq!(first(5, 2), [0xe412_3456, 0x789a_bcde]);
        assert_eq!(first(6, 2), [0xe412_3456_789a_bcde, 0]);
    }

    proptest! {
        #[test]
        fn what_is_set_is_got_and_nothing_else_changes(order in 0u32..=6, writes in prop::collection::vec((0usize..64, any::<u64>()), 0..50)) {
            let mut block = vec![0; 512];
            let mut model = [0; 64];
            for (index, count) in writes {
                let count = count & most(order);
                set(&mut block, index, order, count);
                model[index] = count;
            }
            for (index, count) in model.into_iter().enumerate() {
                prop_assert_eq!(get(&block, index, order), count);
                let free = model[index..].iter().position(|count| *count == 0).map(|found| index + found);
                if free.is_some() {
                    prop_assert_eq!(find_free(&block, index, order), free);
                }
            }
            prop_assert_eq!(find_free(&[0xff; 512], 3, order), None);
            prop_assert_eq!(find_free(&block, 4096 >> order, order), None);
        }
    }
}
