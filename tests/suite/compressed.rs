//! Compressed outputs that random chains do not make.

use std::fs::File;
use std::path::Path;
use std::sync::Arc;

use qmpbackup::qcow2::{GuestOffset, Writer};
use qmpbackup::storage::MemoryStorage;

use crate::support::merge::Wanted;
use crate::support::oracle::convert;
use crate::support::prng::Prng;
use crate::support::program::{Ended, qmprestore};
use crate::support::{sparse, tools};

/// A FULL with compressed clusters of noise, `noise` bytes of it in each, comes out whole.
fn hardly_compressible(cluster_size: usize, noise: usize, codec: &'static str) {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path().join("disk0");
    std::fs::create_dir(&dir).unwrap();
    let prng = &mut Prng::stream(0, 3);
    let cluster = |_| {
        let mut cluster = prng.bytes(noise);
        cluster.resize(cluster_size, 0);
        cluster
    };
    let disk: Vec<u8> = (0..(4 << 20) / cluster_size).flat_map(cluster).collect();
    let raw = folder.path().join("raw");
    std::fs::write(&raw, disk).unwrap();
    let codec_option = if codec == "--compress=zstd" { ",compression_type=zstd" } else { "" };
    let options = format!("cluster_size={cluster_size}{codec_option}");
    let full = dir.join("FULL-1600000000-disk");
    tools::run(tools::qemu_img().args(["convert", "-c", "-O", "qcow2", "-o", &options]).args([&raw, &full]));

    let wanted = Wanted { compress: Some(codec), ..Wanted::default() };
    let out = wanted.merge(&dir, "latest", folder.path(), "out", 2);
    tools::run(tools::qemu_img().args(["check", "-q", "-f", "qcow2"]).arg(&out));
    assert_as_raw(&out, &raw, &format!("{noise} of {cluster_size} bytes, {codec}"));
}

fn assert_as_raw(qcow2: &Path, expected: &Path, what: &str) {
    let raw = qcow2.with_extension("raw");
    convert(qcow2, &raw);
    sparse::assert_same(&raw, expected, what);
}

#[test]
fn clusters_that_hardly_shrink_keep_to_the_room_they_have() {
    for codec in ["--compress=zlib", "--compress=zstd"] {
        hardly_compressible(512, 400, codec);
        hardly_compressible(1024, 900, codec);
    }
}

/// Clusters that are passed through are inflated all the same, or held against checksums, unless nobody wants that.
#[test]
fn a_damaged_stream_is_not_passed_through_but_where_checks_are_skipped() {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path().join("disk0");
    std::fs::create_dir(&dir).unwrap();
    let full = dir.join("FULL-1600000000-disk");
    tools::run(tools::qemu_img().args(["create", "-q", "-f", "qcow2"]).arg(&full).arg("1M"));
    let writes = ["-c", "write -c -P 1 0 64k", "-c", "write -c -P 2 64k 64k"];
    tools::run(tools::qemu_io().args(["-f", "qcow2"]).args(writes).arg(&full));
    let merge = |out: &Path, more: &[&str]| {
        let mut command = qmprestore(["merge", "--compress", "--dir"]);
        Ended::of(command.arg(&dir).arg("--out").arg(out).args(more))
    };
    let out = folder.path().join("out");
    merge(&out, &[]).with(0);
    let sound = std::fs::read(&out).unwrap();
    std::fs::remove_file(&out).unwrap();
    merge(&out, &["--skip-check"]).with(0);
    assert!(std::fs::read(&out).unwrap() == sound, "another image");
    std::fs::remove_file(&out).unwrap();

    let summed = folder.path().join("summed");
    std::fs::create_dir(&summed).unwrap();
    std::fs::copy(&full, summed.join("FULL-1600000000-disk")).unwrap();
    let make_manifest = |dir: &Path| Ended::of(qmprestore(["manifest", "--dir"]).arg(dir));
    make_manifest(&summed).with(0);
    let merge_summed = |more: &[&str]| {
        let mut command = qmprestore(["merge", "--compress", "--dir"]);
        Ended::of(command.arg(&summed).arg("--out").arg(&out).args(more))
    };
    merge_summed(&[]).with(0);
    assert!(std::fs::read(&out).unwrap() == sound, "another image");
    std::fs::remove_file(&out).unwrap();

    let mut bytes = std::fs::read(&full).unwrap();
    // the L2 table is the fifth cluster of such an image, and the first stream is where its first entry says
    let entry = u64::from_be_bytes(bytes[0x4_0000..0x4_0008].try_into().unwrap());
    let stream = usize::try_from(entry & ((1 << 54) - 1)).unwrap();
    bytes[stream..stream + 8].fill(0xff);
    std::fs::write(&full, &bytes).unwrap();
    let refused = merge(&out, &[]).with(4);
    assert!(refused.stderr.contains("is damaged: not a deflate stream"), "{}", refused.stderr);
    assert!(!out.exists());
    merge(&out, &["--skip-check"]).with(0);
    let passed = std::fs::read(&out).unwrap();
    assert!(passed != sound && passed.len() == sound.len(), "not passed through");
    std::fs::remove_file(&out).unwrap();

    // nobody vouches for what is damaged already
    let refused = make_manifest(&dir).with(4);
    assert!(refused.stderr.contains("is damaged: not a deflate stream"), "{}", refused.stderr);
    // a bit that inflating need not notice
    let full = summed.join("FULL-1600000000-disk");
    let mut bytes = std::fs::read(&full).unwrap();
    bytes[stream + 2] ^= 0x10;
    std::fs::write(&full, &bytes).unwrap();
    let refused = merge_summed(&[]).with(4);
    assert!(refused.stderr.contains("does not fit its checksum"), "{}", refused.stderr);
    assert!(!out.exists());
}

/// Zeroes behind the end of the file are no part of a stream, even where it could be inflated with them.
#[test]
fn a_stream_that_the_file_does_not_hold_to_its_end_is_refused() {
    for codec in ["zlib", "zstd"] {
        let folder = tempfile::tempdir().unwrap();
        let (raw, full) = (folder.path().join("raw"), folder.path().join("FULL-1600000000-disk"));
        let mut disk = vec![b'Z'; 2 << 20];
        disk[1 << 20..].copy_from_slice(&Prng::stream(0, 5).bytes(1 << 20));
        std::fs::write(&raw, disk).unwrap();
        let options = format!("cluster_size=2M,compression_type={codec}");
        tools::run(tools::qemu_img().args(["convert", "-c", "-O", "qcow2", "-o", &options]).args([&raw, &full]));
        let bytes = std::fs::read(&full).unwrap();
        let word = |at: u64| {
            let at = usize::try_from(at).unwrap();
            u64::from_be_bytes(bytes[at..at + 8].try_into().unwrap())
        };
        let l2 = word(word(40)) & 0x00ff_ffff_ffff_fe00;
        // at this cluster size, 13 bits of a descriptor count sectors
        let (host, more) = (word(l2) & ((1 << 49) - 1), word(l2) >> 49 & 0x1fff);
        let end = host / 512 * 512 + (more + 1) * 512;
        let merge = |more: &[&str]| {
            let mut command = qmprestore(["merge", "--force", "--dir"]);
            Ended::of(command.arg(folder.path()).arg("--out").arg(folder.path().join("out")).args(more))
        };
        std::fs::write(&full, &bytes).unwrap();
        merge(&["--format=raw"]).with(0);
        std::fs::remove_file(folder.path().join("out")).unwrap();
        for cut in [512, 1024, 4096] {
            File::options().write(true).open(&full).unwrap().set_len(end - cut).unwrap();
            merge(&["--format=raw", "--skip-check"]).with(4).says("the file ends there");
            assert!(!folder.path().join("out").exists());
            merge(&[]).with(4).says("a compressed cluster");
            let check = Ended::of(qmprestore(["check"]).arg(&full));
            check.with(4).says(&format!("a compressed cluster at offset {host:#x}"));
            let cut = Arc::new(MemoryStorage::new(std::fs::read(&full).unwrap()));
            let mut writer = Writer::open(cut).unwrap();
            let error = writer.read(&mut [0; 512], GuestOffset(0)).unwrap_err();
            assert!(error.to_string().contains("the file ends there"), "{error}");
            merge(&["--format=raw", "--salvage"]).with(3).says("lost");
            std::fs::remove_file(folder.path().join("out")).unwrap();
        }
    }
}
