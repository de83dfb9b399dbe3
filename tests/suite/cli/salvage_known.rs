//! `merge --salvage` of images of which checksums tell that a bit is wrong, and where.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::Path;

use qmpbackup::chain::create_checksums;
use qmpbackup::storage::FileStorage;

use crate::support::program::{Backup, Ended, SIZE};

const HALF: usize = SIZE as usize / 2;

fn known() -> Backup {
    let backup = Backup::new();
    backup.does(&["manifest"]).with(0);
    backup
}

fn right(backup: &Backup) -> Vec<u8> {
    backup.merged(["--format=raw", "--out=right"]).with(0);
    fs::read(backup.path("right")).unwrap()
}

fn read<const N: usize>(path: &Path, at: u64) -> [u8; N] {
    let mut bytes = [0; N];
    File::open(path).unwrap().read_exact_at(&mut bytes, at).unwrap();
    bytes
}

fn write(path: &Path, at: u64, bytes: &[u8]) {
    File::options().write(true).open(path).unwrap().write_all_at(bytes, at).unwrap();
}

fn salvaged(backup: &Backup) -> (Ended, Vec<u8>) {
    let ended = backup.merged(["--salvage", "--format=raw", "--out=salvaged", "--force", "--json"]).with(3);
    (ended, fs::read(backup.path("salvaged")).unwrap())
}

/// Magic, version, encryption and features that nobody knows.
#[test]
fn a_header_with_a_wrong_bit_is_that_of_an_image_that_can_be_read() {
    let backup = known();
    let right = right(&backup);
    let bits = |start: u64, end: u64| start * 8..end * 8;
    // without the last ones: version 2 is another format, and features that are known say how to read
    let all = [bits(0, 4), 4 * 8..8 * 8 - 1, bits(32, 36), 72 * 8..80 * 8 - 5];
    for bit in all.into_iter().flatten() {
        let image = &backup.images[usize::from(bit % 3 == 0)];
        let [byte] = read(image, bit / 8);
        write(image, bit / 8, &[byte ^ 0x80 >> (bit % 8)]);
        let (ended, salvaged) = salvaged(&backup);
        assert!(salvaged == right, "bit {bit} of {}: {ended:#?}", image.display());
        write(image, bit / 8, &[byte]);
    }
}

/// Where the header ends is among what is damaged, so that the extensions cannot be found either.
#[test]
fn a_header_may_be_damaged_to_its_end() {
    let backup = known();
    let right = right(&backup);
    write(&backup.images[0], 96, &[0xff; 16]);
    let (ended, salvaged) = salvaged(&backup);
    assert!(salvaged == right, "{ended:#?}");
}

#[test]
fn an_l1_entry_that_leads_where_another_does_costs_what_it_led_to() {
    for with_sums in [true, false] {
        let backup = if with_sums { known() } else { Backup::new() };
        let right = right(&backup);
        let full = &backup.images[0];
        let l1 = u64::from_be_bytes(read(full, 40));
        let entries: [u8; 16] = read(full, l1);
        write(full, l1 + 8, &entries[..8]);
        let (ended, salvaged) = salvaged(&backup);
        assert!(salvaged[..HALF] == right[..HALF], "{ended:#?}");
        let events = ended.events();
        let losses: Vec<_> = events.iter().filter(|event| event["event"] == "loss").collect();
        assert!(losses.iter().all(|loss| loss["kind"] != "lost"), "{ended:#?}");
        let is_listed = |at: u64| {
            let range = |loss: &serde_json::Value| (loss["start"].as_u64().unwrap(), loss["bytes"].as_u64().unwrap());
            losses.iter().map(|loss| range(loss)).any(|(start, bytes)| (start..start + bytes).contains(&at))
        };
        for at in (0..SIZE).step_by(512) {
            let sector = at as usize..at as usize + 512;
            assert!(salvaged[sector.clone()] == right[sector] || is_listed(at), "{at:#x}: {ended:#?}");
        }
    }
}

#[test]
fn a_backing_name_that_may_be_damaged_names_nothing_that_is_missing() {
    let backup = known();
    backup.does(&["rebase"]).with(0);
    let right = right(&backup);
    let image = &backup.images[1];
    let at = u64::from_be_bytes(read(image, 8)) + 10;
    let [byte] = read(image, at);
    write(image, at, &[byte ^ 1]);
    let (ended, salvaged) = salvaged(&backup);
    assert!(salvaged == right);
    assert!(!ended.stdout.contains("missing"), "{ended:#?}");
}

#[test]
fn what_is_cut_off_within_a_sector_is_no_zeroes() {
    for with_sums in [true, false] {
        let backup = Backup::new();
        let full = &backup.images[0];
        // plain data at the end
        let data = fs::metadata(full).unwrap().len().next_multiple_of(1 << 14);
        let l2 = u64::from_be_bytes(read(full, u64::from_be_bytes(read(full, 40)))) & 0x00ff_ffff_ffff_fe00;
        write(full, data, &vec![7; 1 << 14]);
        write(full, l2, &(data | 1 << 63).to_be_bytes());
        if with_sums {
            create_checksums(full, &FileStorage::open(full).unwrap()).unwrap();
        }
        let until = format!("--until={}", backup.name(0));
        backup.merged(["--skip-check", &until, "--format=raw", "--out=whole"]).with(0);
        for cut in [1, 100, 511] {
            File::options().write(true).open(full).unwrap().set_len(data + (1 << 14) - cut).unwrap();
            backup.merged(["--skip-check", &until, "--format=raw", "--out=out"]).with(4);
            let words = ["--salvage", &until, "--format=raw", "--out=salvaged", "--force", "--json"];
            backup.merged(words).with(3).says("loss");
        }
    }
}
