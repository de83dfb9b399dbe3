//! What a damaged place in a file means for the disk: nothing changes but where `locate` says.

use qmpbackup::qcow2::{GuestOffset, Image, ImageRegion, Reader, locate};

use crate::support::edited::{Bench, memory};
use crate::support::prng::Prng;

/// Each 512 bytes of the disk as they are read, or not.
fn sectors(image: &[u8]) -> Option<Vec<Option<Vec<u8>>>> {
    let image = Image::open(memory(image)).ok()?;
    let mut reader = Reader::new(&image);
    let sector = |start: u64| {
        let mut bytes = vec![0; usize::try_from(512.min(image.size() - start)).unwrap()];
        reader.read(&mut bytes, GuestOffset(start)).is_ok().then_some(bytes)
    };
    Some((0..image.size()).step_by(512).map(sector).collect())
}

#[test]
fn nothing_of_the_disk_changes_but_where_it_is_said() {
    let scene = Bench::new();
    for (name, options, writes) in [
        ("plain", "cluster_size=4k", &["write -P 1 0 200k", "write -z 64k 8k", "write -P 2 700k 9k"][..]),
        ("extended", "cluster_size=16k,extended_l2=on", &["write -P 1 3k 100k", "write -P 2 900k 700"]),
        ("zlib", "cluster_size=8k", &["write -c -P 3 0 64k", "write -P 4 128k 64k"]),
        ("old", "compat=0.10,cluster_size=512", &["write -P 5 0 30k", "write -P 6 1000k 1k"]),
    ] {
        scene.create(name, options, (1 << 20) + 512).io(name, writes);
        let sound = scene.load(name);
        let disk = sectors(&sound).unwrap();
        let image = Image::open(memory(&sound)).unwrap();
        let mut prng = Prng::stream(7, 1);
        let mut parts = Vec::new();
        let mut said = 0;
        for start in (0..sound.len()).step_by(512) {
            let range = start as u64..(start + 512).min(sound.len()) as u64;
            let meaning = locate(&image, std::slice::from_ref(&range)).unwrap().remove(0);
            assert!(meaning.guest.windows(2).all(|pair| pair[0].end < pair[1].start), "{name} {start}");
            let other = meaning.guest.iter().filter(|_| !meaning.parts.contains(&ImageRegion::Header));
            said += other.map(|guest| guest.end - guest.start).sum::<u64>();
            for _ in 0..3 {
                let mut damaged = sound.clone();
                let at = start + usize::try_from(prng.below(range.end - range.start)).unwrap();
                damaged[at] ^= 1 << prng.below(8);
                let Some(now) = sectors(&damaged) else {
                    let whole = 0..image.size();
                    let metadata =
                        [ImageRegion::Header, ImageRegion::L1Table].iter().any(|part| meaning.parts.contains(part));
                    assert!(metadata || meaning.guest == [whole], "{name}: {at} makes it unreadable, {meaning:?}");
                    continue;
                };
                for (number, _) in now.iter().zip(&disk).enumerate().filter(|(_, (now, before))| now != before) {
                    let changed = number as u64 * 512;
                    let is_said = meaning.guest.iter().any(|guest| guest.contains(&changed));
                    assert!(is_said, "{name}: byte {at} of the file changes byte {changed} of the disk, {meaning:?}");
                }
            }
            parts.extend(meaning.parts);
        }
        for part in [ImageRegion::Header, ImageRegion::L1Table, ImageRegion::L2Table, ImageRegion::Data] {
            assert!(parts.contains(&part), "{name} has no {part:?}");
        }
        assert_eq!(parts.contains(&ImageRegion::Compressed), name == "zlib");
        let whole = locate(&image, std::slice::from_ref(&(0..sound.len() as u64))).unwrap().remove(0);
        assert_eq!(whole.guest, std::slice::from_ref(&(0..image.size())), "{name}");
        assert!(said < image.size() * 30, "{name}: it is said of much too much");
    }
}

#[test]
fn what_is_behind_the_header_in_its_cluster_is_nothing() {
    let scene = Bench::new();
    scene.create("image", "cluster_size=2M", 8 << 20).io("image", &["write -P 1 0 1M"]);
    // a name behind the extensions
    scene.img(&["rebase", "-u", "-F", "qcow2", "-b", &"b".repeat(1000), scene.path("image").to_str().unwrap()]);
    let image = Image::open(memory(&scene.load("image"))).unwrap();
    let end = image.header().end.0;
    assert!((1100..3000).contains(&end), "{end}");
    let found = locate(&image, &[0..1, end - 1..end, end..65_536, 65_536..2 << 20]).unwrap();
    let parts: Vec<_> = found.iter().map(|meaning| &meaning.parts[..]).collect();
    assert_eq!(parts, [&[ImageRegion::Header][..], &[ImageRegion::Header], &[], &[]]);
}

#[test]
fn several_places_are_found_at_once() {
    let scene = Bench::new();
    scene.create("image", "compat=1.1", 8 << 20).io("image", &["write -P 1 0 1M", "write -P 2 4M 64k"]);
    let image = Image::open(memory(&scene.load("image"))).unwrap();
    let blocks: Vec<_> = (0..image.storage().length() / 65_536).map(|block| block << 16..(block + 1) << 16).collect();
    let together = locate(&image, &blocks).unwrap();
    let data: Vec<_> = together.iter().filter(|meaning| meaning.parts == [ImageRegion::Data]).collect();
    assert_eq!(data.len(), 17);
    assert_eq!(data[16].guest, std::slice::from_ref(&(4 << 20..(4 << 20) + 65_536)));
    for (block, meaning) in blocks.iter().zip(&together) {
        assert_eq!(locate(&image, std::slice::from_ref(block)).unwrap(), std::slice::from_ref(meaning));
    }
}
