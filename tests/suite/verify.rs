//! Damage of every kind is found and named, and nothing that is right is.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::Write;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use qmpbackup::chain::{self, BLOCK, Checksums, Clock, Disk, FormatHint, ImageName, Manifest, When, discover};
use qmpbackup::qcow2::{Image, ImageRegion};
use qmpbackup::restore::{
    self, Flaw, FlawSeverity, Flawed, Layers, Merge, MergeOptions, Observer, Output, OutputFormat, Silent, Source,
    Verified, VerifyOptions, VerifyTarget, verify,
};
use qmpbackup::storage::{Access, FileStorage};
use serde_json::Value;

use crate::cli::salvage::{build, measured};
use crate::support::prng::Prng;
use crate::support::program::{Backup, Ended, event, qmprestore};
use crate::support::random_chain::Chain;
use crate::support::seeds::{Told, shared_seeds};
use crate::support::sums::unsettle;
use crate::support::{sparse, tools};

/// Gives images of a chain, the FULL first, what the run that made them would.
pub(crate) fn keep_books(images: &[PathBuf]) {
    let mut parent: Option<String> = None;
    for path in images {
        let name = path.file_name().unwrap().to_str().unwrap().to_owned();
        let parsed = ImageName::parse(name.as_ref()).unwrap();
        let storage = FileStorage::open(path).unwrap();
        let virtual_size = Image::open(Arc::new(FileStorage::open(path).unwrap())).unwrap().size();
        let full = parsed.level == chain::Level::Full;
        let manifest = Manifest {
            image: name.clone(),
            level: parsed.level,
            time: Some(parsed.time),
            chain: Some("c".to_owned()),
            parent: parent.filter(|_| !full),
            id: None,
            parent_id: None,
            bitmap: None,
            format: FormatHint::Qcow2,
            virtual_size,
            qemu: String::new(),
        };
        manifest.write(path).unwrap();
        chain::create_checksums(path, &storage).unwrap();
        parent = Some(name);
    }
}

/// The recorded chain with manifests and checksums.
pub(crate) fn kept() -> Backup {
    let backup = Backup::new();
    keep_books(&backup.images);
    backup
}

pub(crate) fn verified(dir: &Path) -> Verified {
    verified_with(dir, &VerifyOptions::default())
}

pub(crate) fn verified_with(dir: &Path, options: &VerifyOptions) -> Verified {
    let inventory = discover(dir).unwrap();
    let targets: Vec<VerifyTarget<'_>> = inventory.disks.iter().map(VerifyTarget::Disk).collect();
    verify(&targets, options, &Silent).unwrap()
}

fn name(path: &Path) -> String {
    path.file_name().unwrap().to_string_lossy().into_owned()
}

/// File, kind and restore points of all that was found.
fn told(verified: &Verified) -> Vec<(String, &'static str, Vec<String>)> {
    let one = |flawed: &Flawed| {
        let points = flawed.points.iter().map(|image| image.display_name()).collect();
        (name(&flawed.path), flawed.flaw.kind(), points)
    };
    verified.flaws.iter().map(one).collect()
}

fn names(images: &[PathBuf]) -> Vec<String> {
    images.iter().map(|path| name(path)).collect()
}

fn cli(backup: &Backup, more: &[&str]) -> Ended {
    Ended::run(["verify", "--dir", backup.dir.to_str().unwrap()].iter().chain(more))
}

#[derive(Clone, Default)]
struct Memory(Arc<Mutex<Vec<u8>>>);

impl Write for Memory {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap().write(bytes)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// The disk as these images make it; `None` where they make none.
fn merged(images: &[PathBuf]) -> Option<Vec<u8>> {
    let sources: Vec<Source> =
        images.iter().map(|path| Source { format: FormatHint::Qcow2, ..Source::new(path.clone()) }).collect();
    let memory = Memory::default();
    let options = MergeOptions::new(Output::Stream(Box::new(memory.clone())), OutputFormat::Raw);
    Merge::plan(Layers::open(&sources).ok()?, options, &Silent).ok()?.run(&Silent).ok()?;
    Some(std::mem::take(&mut *memory.0.lock().unwrap()))
}

/// A finding about blocks.
struct Blocks<'a> {
    flawed: &'a Flawed,
    file: Range<u64>,
    guest: Option<&'a [Range<u64>]>,
    parts: &'a [ImageRegion],
}

/// The one finding about blocks.
fn blocks(verified: &Verified) -> Blocks<'_> {
    let found: Vec<_> = verified.flaws.iter().filter(|flawed| flawed.flaw.kind() == "blocks").collect();
    let [flawed] = found[..] else { panic!("{found:#?}") };
    match &flawed.flaw {
        Flaw::Blocks { file, guest, parts, .. } => {
            Blocks { flawed, file: file.clone(), guest: guest.as_deref(), parts }
        }
        other => panic!("{other}"),
    }
}

/// Changes a block of an image, verifies, compares what is said with what merges say, and changes it back.
fn damage(
    dir: &Path,
    images: &[PathBuf],
    before: &[Option<Vec<u8>>],
    number: usize,
    block: u64,
    change: &dyn Fn(&mut [u8]),
) {
    let path = &images[number];
    let right = fs::read(path).unwrap();
    let start = (block * BLOCK) as usize;
    let end = right.len().min(start + BLOCK as usize);
    let mut wrong = right.clone();
    change(&mut wrong[start..end]);
    assert_ne!(right, wrong);
    fs::write(path, &wrong).unwrap();
    let said = format!("block {block} of {}", path.display());

    let verified = verified(dir);
    assert_eq!(verified.worst(), Some(FlawSeverity::Damage), "{said}");
    let Blocks { flawed, file, guest, parts } = blocks(&verified);
    assert_eq!((&flawed.path, file), (path, start as u64..end as u64), "{said}");
    let others = verified.flaws.iter().filter(|flawed| flawed.flaw.severity() == FlawSeverity::Damage);
    let others: Vec<&Flawed> = others.collect();
    assert!(others.iter().all(|flawed| flawed.path == *path), "{said}: {others:#?}");

    for last in number..images.len() {
        let now = merged(&images[..=last]);
        let changed = now != before[last];
        let listed = |flawed: &Flawed| flawed.points.iter().any(|image| image.path == images[last]);
        assert!(
            !changed || others.iter().any(|flawed| listed(flawed)),
            "{said}: {} changed\n{verified:#?}",
            images[last].display()
        );
        // what is said of bytes as they are is exact, if all of them are others
        let all = right[start..end].iter().zip(&wrong[start..end]).all(|(right, wrong)| right != wrong);
        if all && parts == [ImageRegion::Data] && others.len() == 1 {
            assert_eq!(listed(flawed), changed, "{said}: {}\n{verified:#?}", images[last].display());
        }
        // and nothing else is another
        if let (Some(now), Some(before), Some(guest), 1) = (&now, &before[last], guest, others.len()) {
            let mut masked = now.clone();
            for range in guest {
                let range = range.start as usize..(range.end as usize).min(masked.len()).min(before.len());
                if !range.is_empty() {
                    masked[range.clone()].copy_from_slice(&before[range]);
                }
            }
            assert!(masked == *before, "{said}: more than {guest:x?} changed in {}", images[last].display());
        }
    }
    fs::write(path, &right).unwrap();
}

/// A flipped bit, and an inverted block, in each of some blocks of some images.
fn damage_all(dir: &Path, images: &[PathBuf], prng: &mut Prng, one_in: u64) {
    let before: Vec<Option<Vec<u8>>> = (0..images.len()).map(|last| merged(&images[..=last])).collect();
    for (number, path) in images.iter().enumerate() {
        let length = path.metadata().unwrap().len();
        for block in 0..length.div_ceil(BLOCK) {
            let bytes = BLOCK.min(length - block * BLOCK);
            let bit = prng.below(bytes * 8);
            if prng.one_in(one_in) {
                let flip = |block: &mut [u8]| block[(bit / 8) as usize] ^= 1 << (bit % 8);
                damage(dir, images, &before, number, block, &flip);
            }
            if block > 0 && prng.one_in(2 * one_in) {
                let invert = |block: &mut [u8]| block.iter_mut().for_each(|byte| *byte = !*byte);
                damage(dir, images, &before, number, block, &invert);
            }
        }
    }
}

#[test]
fn a_flipped_bit_in_any_block_is_found_and_what_it_harms() {
    let backup = kept();
    let right = verified(&backup.dir);
    assert!(right.flaws.is_empty(), "{right:#?}");
    let read = |image: &restore::VerifiedImage| image.structure && image.compared == image.length && image.length > 0;
    assert!(right.images.len() == 4 && right.images.iter().all(read), "{right:#?}");
    damage_all(&backup.dir, &backup.images, &mut Prng::stream(1, 170), 1);
}

/// The same in chains of every kind.
fn seed(seed: u64) {
    let chain = Chain::generate(seed);
    let told = Told(&chain);
    let images: Vec<PathBuf> = chain.layers.iter().map(|layer| chain.dir.join(&layer.name)).collect();
    let long = images.iter().any(|path| path.metadata().unwrap().len() > 3 << 20);
    let disks = chain.layers.iter().map(|layer| layer.alone.size()).max().unwrap();
    if long || disks > 16 << 20 || chain.layers.iter().skip(1).any(|layer| layer.full) {
        return;
    }
    keep_books(&images);
    let worst = verified(&chain.dir).flaws.into_iter().map(|flawed| flawed.flaw.severity()).max();
    assert!(worst <= Some(FlawSeverity::InPart));
    damage_all(
        &chain.dir,
        &images,
        &mut Prng::stream(seed, 171),
        if crate::support::seeds::are_many() { 1 } else { 3 },
    );
    drop(told);
}

shared_seeds! {
    seed, 40;
    damage_in_random_chains_0 = 0,
    damage_in_random_chains_1 = 1,
    damage_in_random_chains_2 = 2,
    damage_in_random_chains_3 = 3,
    damage_in_random_chains_4 = 4,
    damage_in_random_chains_5 = 5,
    damage_in_random_chains_6 = 6,
    damage_in_random_chains_7 = 7,
}

#[test]
fn a_later_image_that_overwrote_all_of_the_damage_heals_it() {
    use crate::support::tools::{qemu_img, qemu_io, run};
    let backup = Backup::new();
    let dir = backup.path("other");
    fs::create_dir(&dir).unwrap();
    let images: Vec<PathBuf> =
        ["FULL-100-d", "INC-200-d", "INC-300-d", "INC-400-d"].iter().map(|name| dir.join(name)).collect();
    for (image, writes) in images.iter().zip([
        &["write -P 1 0 4M"][..],
        &["write -P 2 1M 64k"],
        // one half of the cluster that the FULL has its tenth block in is not enough
        &["write -P 3 1M 1M", "write -P 3 2M 64k"],
        &["write -z 2M 2M", "write -P 4 512k 4k"],
    ]) {
        run(qemu_img().args(["create", "-q", "-f", "qcow2", image.to_str().unwrap(), "4M"]));
        let commands = writes.iter().flat_map(|write| ["-c", *write]);
        run(qemu_io().args(["-f", "qcow2"]).args(commands).arg(image));
    }
    keep_books(&images);
    let all = names(&images);
    // QEMU's clusters are of 64 KiB, and the data of the FULL begins at 5 of them
    for (image, guest, suffer) in
        [(0, 0, 0..4), (0, 1 << 20, 0..1), (0, 2 << 20, 0..2), (0, 3 << 20, 0..3), (1, 1 << 20, 1..2)]
    {
        let right = fs::read(&images[image]).unwrap();
        let opened = Image::open(Arc::new(FileStorage::open(&images[image]).unwrap())).unwrap();
        let mut host = None;
        opened
            .map(guest..guest + 1, &mut qmpbackup::qcow2::MapBuffer::default(), |extent| {
                if let qmpbackup::qcow2::Content::Data(offset) = extent.content {
                    host = Some(offset.0);
                }
            })
            .unwrap();
        let mut wrong = right.clone();
        wrong[host.unwrap() as usize + 77] ^= 4;
        fs::write(&images[image], wrong).unwrap();
        let verified = verified(&dir);
        assert_eq!(told(&verified), [(all[image].clone(), "blocks", all[suffer].to_vec())]);
        assert_eq!(blocks(&verified).guest, Some(std::slice::from_ref(&(guest..guest + BLOCK))));
        fs::write(&images[image], right).unwrap();
    }
}

#[test]
fn damage_is_named_for_people_and_for_programs() {
    let backup = kept();
    let before = sparse::fingerprints(backup.root.path());
    cli(&backup, &[]).with(0).says("4 images").says("all that was checked is right");
    assert_eq!(sparse::fingerprints(backup.root.path()), before, "something was written");
    let length = backup.images[2].metadata().unwrap().len();
    backup.patch(2, length - 100, |bytes| bytes[3] ^= 64);
    let start = length / BLOCK * BLOCK;
    cli(&backup, &[])
        .with(4)
        .says(&format!(
            "INC-1793761200-disk.qcow2: DAMAGED: bytes {start:#x} to {length:#x} do not fit their checksums: "
        ))
        .says("restore points that suffer: INC-1793761200-disk.qcow2");
    let ended = cli(&backup, &["--json"]).with(4);
    let events = ended.events();
    let finding = event(&events, "finding");
    assert_eq!((&finding["kind"], &finding["severity"]), (&"blocks".into(), &"damage".into()));
    assert_eq!((&finding["file"]["start"], &finding["file"]["end"]), (&start.into(), &length.into()));
    assert_eq!(finding["points"][0], backup.images[2].to_str().unwrap());
    assert!(finding["guest"].as_array().is_some_and(|guest| !guest.is_empty()), "{finding}");
    let images: Vec<&Value> = events.iter().filter(|event| event["event"] == "verified").collect();
    let verdicts: Vec<&str> = images.iter().map(|image| image["verdict"].as_str().unwrap()).collect();
    assert_eq!(verdicts, ["right", "right", "damage", "right"]);
    let done = event(&events, "done");
    assert_eq!((&done["exit_code"], &done["images"], &done["bytes"]), (&4.into(), &4.into(), &done["total"]));
    // the restore points before are as they were
    cli(&backup, &["--until", "INC-1793674800"]).with(0).says("2 images");
    cli(&backup, &["--until", "2026-11-04 12:00"]).with(4).says("3 images");
}

#[test]
fn a_file_that_is_too_short_or_too_long_is_damaged() {
    let backup = kept();
    let all = names(&backup.images);
    let right = fs::read(&backup.images[1]).unwrap();
    for length in [0, 1, 65_536, right.len() - 1] {
        fs::write(&backup.images[1], &right[..length]).unwrap();
        let verified = verified(&backup.dir);
        let found = told(&verified);
        assert!(found.contains(&(all[1].clone(), "length", all[1..].to_vec())), "{length}: {found:#?}");
        assert!(found.iter().all(|(file, ..)| *file == all[1]), "{length}: {found:#?}");
        cli(&backup, &[])
            .with(4)
            .says(&format!("has {length} bytes and should have {}: it was cut short", right.len()));
    }
    fs::write(&backup.images[1], [&right[..], b"x"].concat()).unwrap();
    assert_eq!(told(&verified(&backup.dir)), [(all[1].clone(), "length", all[1..].to_vec())]);
    cli(&backup, &[]).with(4).says("something was appended");
}

#[test]
fn an_image_that_fits_another_one_only_where_it_is_damaged_does_not_hold_that() {
    let root = tempfile::Builder::new().prefix("qmpbackup-suite-").tempdir().unwrap();
    let folder = root.path().join("disk0");
    fs::create_dir(&folder).unwrap();
    let block = |byte: u8| vec![byte; 1 << 16];
    let image = |name: &str, blocks: &[u8]| {
        let path = folder.join(name);
        fs::write(&path, blocks.iter().flat_map(|byte| block(*byte)).collect::<Vec<u8>>()).unwrap();
        path
    };
    // alike for longer than is looked at to find one
    let alike: Vec<u8> = (1..=250).chain(1..=50).collect();
    let first = image("FULL-1793588400-disk.raw", &[&alike[..], &[8, 9]].concat());
    image("FULL-1793674800-disk.raw", &[&alike[..], &[0, 7]].concat());
    Ended::run([Path::new("manifest"), Path::new("--dir"), root.path()]).with(0);
    image("FULL-1793588400-disk.raw", &[&alike[..], &[0, 9]].concat());
    let found = told(&verified(root.path()));
    assert_eq!(found, [(name(&first), "blocks", vec![name(&first)])]);
    image("FULL-1793588400-disk.raw", &[&alike[..], &[0, 7]].concat());
    assert_eq!(told(&verified(root.path())), [(name(&first), "content", vec![name(&first)])]);
}

#[test]
fn images_that_were_swapped_are_told_from_damaged_ones() {
    let backup = kept();
    let all = names(&backup.images);
    let aside = backup.path("aside");
    fs::rename(&backup.images[1], &aside).unwrap();
    fs::rename(&backup.images[2], &backup.images[1]).unwrap();
    fs::rename(&aside, &backup.images[2]).unwrap();
    let expected = [(all[1].clone(), "content", all[1..].to_vec()), (all[2].clone(), "content", all[2..].to_vec())];
    assert_eq!(told(&verified(&backup.dir)), expected);
    cli(&backup, &[])
        .with(4)
        .says("INC-1793674800-disk.qcow2: DAMAGED: holds the content of INC-1793761200-disk.qcow2")
        .says("INC-1793761200-disk.qcow2: DAMAGED: holds the content of INC-1793674800-disk.qcow2");
    // one of another chain is nobody's
    fs::write(&backup.images[1], vec![7; backup.images[1].metadata().unwrap().len() as usize]).unwrap();
    let found = told(&verified(&backup.dir));
    assert!(found.contains(&(all[1].clone(), "blocks", all[1..].to_vec())), "{found:#?}");
}

/// Each image is looked at a few times, however many of them are damaged, and whether their damage is hidden or not.
#[test]
fn the_damage_of_many_images_costs_a_few_reads_of_each() {
    const IMAGES: u64 = 200;
    let folder = tempfile::tempdir().unwrap();
    let path = |number: u64| {
        let level = if number == 0 { "FULL" } else { "INC" };
        folder.path().join(format!("{level}-{}-disk", 1_700_000_000 + number))
    };
    let images: Vec<PathBuf> = (0..IMAGES).map(path).collect();
    for hides in [false, true] {
        for (number, image) in (0..).zip(&images) {
            let entry = |cluster: u64, data| if hides || cluster == number { 1 << 63 | data } else { 0 };
            build(image, (16, IMAGES << 16), entry, &vec![1; 65_536]);
        }
        keep_books(&images);
        for (number, image) in (0..).zip(&images) {
            let mut bytes = fs::read(image).unwrap();
            let at = bytes.len() - 1000 - number;
            bytes[at] ^= 1;
            fs::write(image, bytes).unwrap();
        }
        let cost = measured(qmprestore([OsStr::new("verify"), OsStr::new("--dir"), folder.path().as_os_str()]));
        assert_eq!(cost.code, Some(4));
        assert!(cost.reads < 200 * IMAGES, "{hides}: {cost:?}");
        let verified = verified(folder.path());
        let blocks = verified.flaws.iter().filter(|flawed| flawed.flaw.kind() == "blocks");
        let suffering: Vec<u64> = blocks.map(|flawed| flawed.points.len() as u64).collect();
        let expected: Vec<u64> = (0..IMAGES).map(|number| if hides { 1 } else { IMAGES - number }).collect();
        assert_eq!(suffering, expected, "{hides}");
    }
}

#[test]
fn what_manifests_tell_of_a_chain_is_found_once_with_all_that_suffer() {
    let all = names(&kept().images);
    let found = |change: &dyn Fn(&Backup)| {
        let backup = kept();
        change(&backup);
        cli(&backup, &[]).with(4);
        let verified = verified(&backup.dir);
        assert_eq!(verified.worst(), Some(FlawSeverity::Damage));
        told(&verified)
    };
    let remanifest = |backup: &Backup, number: usize, change: &dyn Fn(&mut Manifest)| {
        let mut manifest = Manifest::read(&backup.images[number]).unwrap().unwrap();
        change(&mut manifest);
        manifest.write(&backup.images[number]).unwrap();
    };
    let from = |first: usize| vec![(all[first].clone(), "chain", all[first..].to_vec())];
    assert_eq!(found(&|backup| fs::remove_file(&backup.images[2]).unwrap()), from(2));
    assert_eq!(found(&|backup| remanifest(backup, 1, &|made| made.image = "INC-1-x".to_owned())), from(1));
    assert_eq!(found(&|backup| remanifest(backup, 2, &|made| made.chain = Some("other".to_owned()))), from(2));
    assert_eq!(found(&|backup| remanifest(backup, 3, &|made| made.parent = Some("INC-1-x".to_owned()))), from(3));
    // without the FULL all that is left belongs to nothing
    let orphans = found(&|backup| {
        fs::remove_file(&backup.images[0]).unwrap();
        fs::remove_file(Manifest::path(&backup.images[0])).unwrap();
    });
    assert_eq!(orphans, from(1));
    let backup = kept();
    fs::remove_file(&backup.images[2]).unwrap();
    cli(&backup, &[]).with(4).says("is missing, only its manifest is there").says("INC-1793847600-disk.qcow2");
}

#[test]
fn without_books_only_a_part_can_be_checked() {
    let backup = Backup::new();
    let verified = verified(&backup.dir);
    assert_eq!(verified.worst(), Some(FlawSeverity::InPart));
    assert!(verified.images.iter().all(|image| image.structure && image.compared == 0));
    cli(&backup, &[]).with(3).says("has no manifest").says("has no checksums");
    // tables are checked all the same
    backup.set_header_refcount(1, 7);
    cli(&backup, &[]).with(3).says("note: space is lost");
    backup.set_header_refcount(1, 0);
    cli(&backup, &[]).with(4).says("INC-1793674800-disk.qcow2: DAMAGED: its tables are damaged");
}

#[test]
fn damaged_books_are_not_blamed_on_the_image() {
    let backup = kept();
    for (path, kind) in
        [(Manifest::path(&backup.images[1]), "manifest"), (Checksums::path(&backup.images[1]), "checksums")]
    {
        let right = fs::read(&path).unwrap();
        let mut prng = Prng::stream(3, 172);
        let mut cases: Vec<Vec<u8>> = vec![Vec::new(), right[..right.len() - 1].to_vec(), right[..10].to_vec()];
        cases.extend((0..40).map(|_| {
            let mut wrong = right.clone();
            let bit = prng.below(right.len() as u64 * 8) as usize;
            wrong[bit / 8] ^= 1 << (bit % 8);
            wrong
        }));
        for wrong in cases {
            fs::write(&path, &wrong).unwrap();
            let verified = verified(&backup.dir);
            // a blank more or less is no damage
            if verified.flaws.is_empty() && kind == "manifest" {
                assert_eq!(Manifest::read(&backup.images[1]).unwrap().unwrap().image, name(&backup.images[1]));
                continue;
            }
            assert_eq!(told(&verified), [(name(&path), kind, vec![])], "{wrong:?}");
            assert_eq!(verified.worst(), Some(FlawSeverity::Damage));
            assert_eq!(verified.images[1].worst, Some(FlawSeverity::InPart));
        }
        cli(&backup, &[]).with(4).says(&name(&path));
        fs::write(&path, right).unwrap();
    }
}

#[test]
fn without_checksums_a_disk_of_another_size_than_the_manifest_says_is_found() {
    let backup = kept();
    backup.images.iter().for_each(|path| fs::remove_file(Checksums::path(path)).unwrap());
    cli(&backup, &[]).with(3);
    tools::run(tools::qemu_img().args(["resize", "-q", "-f", "qcow2"]).arg(&backup.images[1]).arg("65M"));
    let verified = verified(&backup.dir);
    let found = verified.flaws.iter().find(|flawed| flawed.flaw.severity() == FlawSeverity::Damage).unwrap();
    assert_eq!((name(&found.path), found.flaw.kind()), (name(&backup.images[1]), "unreadable"));
    let points: Vec<String> = found.points.iter().map(|image| image.display_name()).collect();
    assert_eq!(points, names(&backup.images[1..]));
    cli(&backup, &[]).with(4).says("its manifest says 67108864");

    // a raw image that was cut short is one, too
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("FULL-1-x");
    fs::write(&path, vec![1; 1 << 20]).unwrap();
    fs::write(folder.path().join("x.config"), r#"{"format": "raw"}"#).unwrap();
    let does = |words: &[&str]| Ended::of(qmprestore(words).arg("--dir").arg(folder.path()));
    does(&["manifest"]).with(0);
    fs::remove_file(Checksums::path(&path)).unwrap();
    File::options().write(true).open(&path).unwrap().set_len(1 << 19).unwrap();
    does(&["verify"]).with(4).says("its manifest says 1048576");
}

#[test]
fn what_was_interrupted_or_is_newer_is_no_damage() {
    let backup = kept();
    let image = &backup.images[1];
    unsettle(image, 1..2);
    backup.patch(1, BLOCK + 8, |bytes| bytes[0] ^= 1);
    let verified_now = verified(&backup.dir);
    assert!(
        verified_now
            .flaws
            .iter()
            .any(|flawed| matches!(&flawed.flaw, Flaw::Unsettled(range) if *range == (BLOCK..2 * BLOCK)))
    );
    assert!(verified_now.flaws.iter().all(|flawed| flawed.flaw.kind() != "blocks"), "{verified_now:#?}");
    backup.patch(1, BLOCK + 8, |bytes| bytes[0] ^= 1);
    cli(&backup, &[]).with(3).says("run that command again");
    // it may become longer meanwhile
    let length = fs::metadata(image).unwrap().len();
    File::options().write(true).open(image).unwrap().set_len(length + BLOCK).unwrap();
    cli(&backup, &[]).with(3).says("run that command again").says_not("appended");
    File::options().write(true).open(image).unwrap().set_len(length - 1).unwrap();
    cli(&backup, &[]).with(4).says("it was cut short");
    File::options().write(true).open(image).unwrap().set_len(length).unwrap();
    // the others are compared
    backup.patch(1, 3 * BLOCK + 8, |bytes| bytes[0] ^= 1);
    assert_eq!(blocks(&verified(&backup.dir)).file.start, 3 * BLOCK);

    let backup = kept();
    let path = Manifest::path(&backup.images[2]);
    fs::write(&path, "{\"version\": 99}").unwrap();
    cli(&backup, &[]).with(3).says("is of version 99");

    let backup = kept();
    let (work, stage) = (chain::Work::Commit, chain::Stage::Writing);
    let incs = names(&backup.images[1..]);
    chain::Unfinished { work, stage, full: name(&backup.images[0]), incs, full_id: None }
        .write(&backup.images[0])
        .unwrap();
    cli(&backup, &[]).with(3).says("was begun and not finished").says_not("DAMAGED");
    // it may have resized the FULL already, and not written that down
    fs::remove_file(Checksums::path(&backup.images[0])).unwrap();
    tools::run(tools::qemu_img().args(["resize", "-q", "-f", "qcow2"]).arg(&backup.images[0]).arg("65M"));
    cli(&backup, &[]).with(3).says("was begun and not finished").says_not("DAMAGED");
    backup.merged(["--out", "out"]).with(4);
}

#[test]
fn what_somebody_writes_to_is_locked() {
    let backup = kept();
    let writer = FileStorage::open_writable(&backup.images[2]).unwrap();
    writer.lock(Access::Write).unwrap();
    cli(&backup, &[]).with(6).says("INC-1793761200-disk.qcow2: FAILED: another process has the image open for writing");
    cli(&backup, &["--until", "INC-1793674800"]).with(0);
    // what is damaged counts more
    backup.patch(1, BLOCK, |bytes| bytes[0] ^= 1);
    cli(&backup, &[]).with(4);
}

#[test]
fn it_stops_when_it_is_told_to() {
    struct Impatient;
    impl Observer for Impatient {
        fn is_cancelled(&self) -> bool {
            true
        }
    }
    let backup = kept();
    let inventory = discover(&backup.dir).unwrap();
    let error = verify(&[VerifyTarget::Disk(&inventory.disks[0])], &VerifyOptions::default(), &Impatient).unwrap_err();
    assert!(matches!(error, restore::Error::Cancelled));
}

#[test]
fn words_that_make_no_sense_are_usage_errors() {
    let backup = kept();
    for words in
        [&["--sample", "0%"][..], &["--sample", "101%"], &["--max-age", "30"], &["--until", ""], &["--filter", "no"]]
    {
        cli(&backup, words).with(2);
    }
    Ended::run(["verify"]).with(2);
    Ended::run(["verify", "--dir", "/nowhere/at all"]).with(1);
}

#[test]
fn a_restore_point_is_verified_by_itself() {
    let backup = kept();
    let inventory = discover(&backup.dir).unwrap();
    let disk: &Disk = &inventory.disks[0];
    let point = disk.select(&"INC-1793761200".parse::<When>().unwrap(), &Clock::system(), false).unwrap();
    backup.patch(3, BLOCK, |bytes| bytes[0] ^= 1);
    backup.patch(0, 0, |bytes| bytes[5] ^= 1);
    let verified = verify(&[VerifyTarget::Point(disk, &point)], &VerifyOptions::default(), &Silent).unwrap();
    assert_eq!(verified.images.len(), 3);
    assert!(verified.flaws.iter().all(|flawed| flawed.path == backup.images[0]), "{verified:#?}");
    // the header is all of the disk, and of all that builds on it
    let Blocks { flawed, file, guest, parts } = blocks(&verified);
    assert_eq!((file.start, guest), (0, Some(std::slice::from_ref(&(0..crate::support::program::SIZE)))));
    assert!(parts.contains(&ImageRegion::Header));
    assert_eq!(flawed.points.len(), 4);
}
