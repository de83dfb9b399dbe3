//! Any bytes are opened as an image, and all that it holds is read. The tests replay the corpus with the same body.

use std::ops::ControlFlow;
use std::sync::Arc;

use qmpbackup::qcow2::{Content, GuestOffset, Image, MapBuffer, Reader, check};
use qmpbackup::storage::MemoryStorage;

pub(super) fn read_image(bytes: &[u8]) {
    let storage = Arc::new(MemoryStorage::new(bytes.to_vec()));
    // damage becomes a report or an error, and nothing else
    let _ = check(&*storage, &mut |_| ControlFlow::Continue(()));
    let Ok(image) = Image::open(storage) else { return };
    let _ = image.snapshots();
    let _ = image.bitmaps();
    let mut buffer = MapBuffer::default();
    let mut reader = Reader::new(&image);
    for range in image.occupied() {
        let mut extents = Vec::new();
        let mut end = range.start;
        let mapped = image.map(range.clone(), &mut buffer, |extent| {
            assert_eq!(extent.guest.start, end, "extents have a gap");
            end = extent.guest.end;
            extents.push(extent);
        });
        if mapped.is_err() {
            continue;
        }
        assert_eq!(end, range.end, "extents end early");
        for extent in extents {
            let zero = matches!(extent.content, Content::Unallocated | Content::Zero);
            let length = (extent.guest.end - extent.guest.start).min(1 << 21);
            let mut part = vec![0xaa; usize::try_from(length).unwrap_or_default()];
            let read = reader.read(&mut part, GuestOffset(extent.guest.start));
            assert!(read.is_err() || !zero || part.iter().all(|byte| *byte == 0), "zeroes do not read as zeroes");
        }
    }
}
