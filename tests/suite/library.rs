//! The library by itself: what the programs do not offer, or cannot be made to meet.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use qmpbackup::chain::FormatHint;
use qmpbackup::qcow2::{Error, Gate, GuestOffset, Image, Reader};
use qmpbackup::restore::{
    self, Layers, Merge, MergeOptions, Output, OutputFormat, Phase, Silent, Slot, Source, Warning,
};
use qmpbackup::storage::{FileStorage, Storage};

use crate::support::meanwhile::Meanwhile;
use crate::support::oracle::convert;
use crate::support::tools;

/// Opens data files of one folder.
struct Folder(PathBuf);

impl Gate for Folder {
    fn open_data_file(&self, name: &str) -> Result<Arc<dyn Storage>, String> {
        let path = self.0.join(Path::new(name).file_name().ok_or("no file name")?);
        FileStorage::open(&path).map(|storage| Arc::new(storage) as Arc<dyn Storage>).map_err(|error| error.to_string())
    }
}

fn create(path: &Path, options: &str, size: u64) {
    tools::run(tools::qemu_img().args(["create", "-q", "-f", "qcow2", "-o", options]).arg(path).arg(size.to_string()));
}

fn write(path: &Path, commands: &[&str]) {
    let commands = commands.iter().flat_map(|command| ["-c", command]);
    tools::run(tools::qemu_io().args(["-f", "qcow2"]).args(commands).arg(path));
}

fn open(path: &Path) -> Arc<FileStorage> {
    Arc::new(FileStorage::open(path).unwrap())
}

fn options(out: &Path) -> MergeOptions {
    let format = OutputFormat::Qcow2 { cluster_size: None, compression: None };
    MergeOptions::new(Output::File(out.to_owned()), format)
}

fn sources(paths: &[PathBuf]) -> Vec<Source> {
    paths.iter().map(|path| Source::new(path.clone())).collect()
}

#[test]
fn what_was_opened_for_a_salvage_is_merged_by_one_and_nothing_else_is() {
    let backup = crate::support::program::Backup::new();
    let sources = sources(&backup.images);
    let slots: Vec<Slot> = sources.iter().cloned().map(Slot::Image).collect();
    let out = backup.path("out");
    let plan = |layers| Merge::plan(layers, options(&out), &Silent).unwrap();
    let refused = plan(Layers::open_salvage(&slots, false).unwrap()).run(&Silent).unwrap_err();
    assert!(matches!(refused, restore::Error::ForSalvage), "{refused}");
    let refused = plan(Layers::open(&sources).unwrap()).salvage(&Silent).unwrap_err();
    assert!(matches!(refused, restore::Error::NotForSalvage), "{refused}");
    assert!(!out.exists());
    plan(Layers::open_salvage(&slots, false).unwrap()).salvage(&Silent).unwrap();
}

#[test]
fn an_external_data_file_is_opened_through_a_gate_or_not_at_all() {
    for raw in ["on", "off"] {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("disk");
        let data = folder.path().join("data");
        create(&path, &format!("data_file={},data_file_raw={raw}", data.display()), 1 << 20);
        write(&path, &["write -P 3 0 64k", "write -P 4 200k 100k", "write -z 600k 64k"]);
        let image = Image::open_with(open(&path), &Folder(folder.path().to_owned())).unwrap();
        let mut disk = vec![0xaa; 1 << 20];
        Reader::new(&image).read(&mut disk, GuestOffset(0)).unwrap();
        let expected = folder.path().join("raw");
        convert(&path, &expected);
        assert_eq!(fs::read(expected).unwrap(), disk);
        assert!(
            matches!(Image::open(open(&path)), Err(Error::DataFile { name, .. }) if name == data.to_str().unwrap())
        );
    }
}

#[test]
fn sizes_that_are_no_multiple_of_a_sector_keep_their_exact_bytes() {
    let folder = tempfile::tempdir().unwrap();
    let (full, inc) = (folder.path().join("FULL-1-disk"), folder.path().join("INC-2-disk"));
    for path in [&full, &inc] {
        create(path, "cluster_size=4096", 20 << 10);
    }
    write(&full, &["write -P 1 0 20k"]);
    write(&inc, &["write -P 2 8k 4k"]);
    // the FULL ends in the middle of a sector, the INC in that of another cluster
    for (path, size) in [(&full, 10_001u64), (&inc, 13_005)] {
        File::options().write(true).open(path).unwrap().write_all_at(&size.to_be_bytes(), 24).unwrap();
    }
    let out = folder.path().join("out");
    let merge = Merge::plan(Layers::open(&sources(&[full, inc])).unwrap(), options(&out), &Silent).unwrap();
    assert_eq!(merge.run(&Silent).unwrap().size, 13_005);
    let image = Image::open(open(&out)).unwrap();
    let mut disk = vec![0xaa; 13_005];
    Reader::new(&image).read(&mut disk, GuestOffset(0)).unwrap();
    let expected = |at: usize| match at {
        0..8192 => 1,
        8192..12_288 => 2,
        _ => 0,
    };
    assert!(disk.iter().enumerate().all(|(at, byte)| *byte == expected(at)));
}

#[test]
fn an_image_above_4_tib_is_read_and_merged_at_both_ends() {
    let folder = tempfile::tempdir().unwrap();
    let (full, inc) = (folder.path().join("FULL-1-disk"), folder.path().join("INC-2-disk"));
    create(&full, "cluster_size=65536", 20 << 40);
    create(&inc, "cluster_size=65536", 20 << 40);
    write(&full, &["write -P 1 0 64k", "write -P 2 10T 64k", "write -P 3 21990232489984 64k"]);
    write(&inc, &["write -P 4 10995116343296 64k"]);
    let out = folder.path().join("out");
    let merge = Merge::plan(Layers::open(&sources(&[full, inc])).unwrap(), options(&out), &Silent).unwrap();
    assert_eq!((merge.summary().clusters, merge.summary().l2_tables), (4, 3));
    merge.run(&Silent).unwrap();
    tools::run(tools::qemu_img().args(["check", "-q"]).arg(&out));
    let patterns =
        ["read -P 1 0 64k", "read -P 2 10T 64k", "read -P 4 10995116343296 64k", "read -P 3 21990232489984 64k"];
    write(&out, &patterns);
}

#[test]
fn a_table_that_changes_between_plan_and_copy_is_noticed_and_nothing_is_left() {
    for compression in [None, Some(qmpbackup::qcow2::CompressionType::Zstd)] {
        let folder = tempfile::tempdir().unwrap();
        let full = folder.path().join("FULL-1-disk");
        create(&full, "cluster_size=65536", 1 << 20);
        write(&full, &["write -P 1 0 128k"]);
        let out = folder.path().join("out");
        let format = OutputFormat::Qcow2 { cluster_size: None, compression };
        let layers = Layers::open(&sources(std::slice::from_ref(&full))).unwrap();
        let merge = Merge::plan(layers, MergeOptions { format, ..options(&out) }, &Silent).unwrap();
        // somebody who does not care for locks
        let image = format!("driver=qcow2,file.locking=off,file.filename={}", full.display());
        tools::run(tools::qemu_io().args(["--image-opts", "-c", "discard 64k 64k", &image]));
        let error = merge.run(&Silent).unwrap_err();
        assert!(matches!(&error, restore::Error::Overwritten { path } if *path == full), "{error:?}");
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
    }
}

#[test]
fn an_image_that_somebody_overwrites_while_it_is_merged_is_noticed() {
    for read_back in [false, true] {
        let folder = tempfile::tempdir().unwrap();
        let [full, inc, out] = ["FULL-1-disk", "INC-2-disk", "out"].map(|name| folder.path().join(name));
        for image in [&full, &inc] {
            create(image, "cluster_size=65536", 1 << 20);
            write(image, &["write -P 1 0 128k"]);
        }
        let long_ago = std::time::SystemTime::now() - std::time::Duration::from_secs(3600);
        File::options().write(true).open(&inc).unwrap().set_modified(long_ago).unwrap();
        let plan = || {
            let layers = Layers::open(&sources(&[full.clone(), inc.clone()])).unwrap();
            Merge::plan(layers, MergeOptions { read_back, ..options(&out) }, &Silent).unwrap()
        };
        let overwrite = |phase| {
            if phase == Phase::Syncing {
                File::options().write(true).open(&inc).unwrap().write_all_at(&[2; 16], 5 << 16).unwrap();
            }
        };
        let cut_short = |phase| {
            if matches!(phase, Phase::Copying { .. }) {
                File::options().write(true).open(&inc).unwrap().set_len(5 << 16).unwrap();
            }
        };
        let whole = fs::read(&inc).unwrap();
        let error = plan().run(&Meanwhile::new(cut_short)).unwrap_err();
        assert!(matches!(&error, restore::Error::Overwritten { path } if *path == inc), "{error:?}");
        fs::write(&inc, whole).unwrap();
        File::options().write(true).open(&inc).unwrap().set_modified(long_ago).unwrap();
        let overwritten = Meanwhile::new(overwrite);
        let error = plan().run(&overwritten).unwrap_err();
        assert!(matches!(&error, restore::Error::Overwritten { path } if *path == inc), "{error:?}");
        assert!(!out.exists());
        plan().run(&Silent).unwrap();
        // the last resort takes what it gets
        fs::remove_file(&out).unwrap();
        File::options().write(true).open(&inc).unwrap().set_modified(long_ago).unwrap();
        let slots: Vec<_> = sources(&[full.clone(), inc.clone()]).into_iter().map(Slot::Image).collect();
        let layers = Layers::open_salvage(&slots, false).unwrap();
        Merge::plan(layers, options(&out), &Silent).unwrap().salvage(&overwritten).unwrap();
        assert_eq!(*overwritten.warnings.lock().unwrap(), [Warning::Overwritten { path: inc.clone() }]);
    }
}

#[test]
fn a_raw_image_that_somebody_cuts_short_while_it_is_merged_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let [full, out] = ["FULL-1-disk", "out"].map(|name| folder.path().join(name));
    fs::write(&full, vec![7; 1 << 20]).unwrap();
    let source = Source { format: FormatHint::Raw, ..Source::new(full.clone()) };
    let cut_short = |phase| {
        if matches!(phase, Phase::Copying { .. }) {
            File::options().write(true).open(&full).unwrap().set_len(1 << 16).unwrap();
        }
    };
    let plan = Merge::plan(Layers::open(&[source]).unwrap(), options(&out), &Silent).unwrap();
    let error = plan.run(&Meanwhile::new(cut_short)).unwrap_err();
    assert!(matches!(&error, restore::Error::Overwritten { path } if *path == full), "{error:?}");
    assert!(!out.exists());
}
