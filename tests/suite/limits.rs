//! Memory and open files stay within bounds that do not depend on the disk.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use crate::support::{sparse, tools};

/// Runs the program, and returns the most memory that it used, in bytes.
fn memory(arguments: &[&std::ffi::OsStr]) -> u64 {
    let script = "import resource, subprocess, sys\n\
        subprocess.run(sys.argv[1:], check=True)\n\
        print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)";
    let mut command = Command::new("python3");
    command.args(["-c", script, env!("CARGO_BIN_EXE_qmprestore")]).args(arguments);
    // behind what the program itself says
    tools::run(&mut command).lines().last().unwrap().parse::<u64>().unwrap() * 1024
}

fn create(path: &Path, size: &str, writes: &[String]) {
    tools::run(tools::qemu_img().args(["create", "-q", "-f", "qcow2"]).arg(path).arg(size));
    let writes = writes.iter().flat_map(|write| ["-c", write]);
    tools::run(tools::qemu_io().args(["-f", "qcow2", "-t", "unsafe"]).args(writes).arg(path));
}

#[test]
fn a_disk_of_16_tib_needs_less_than_100_mb() {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path().join("disk0");
    std::fs::create_dir(&dir).unwrap();
    for layer in 0..4u64 {
        let level = if layer == 0 { "FULL" } else { "INC" };
        // every 20 GiB, and never the same place twice
        let place = |number: u64| ((number * 20) << 30) + (layer << 20);
        let writes: Vec<_> =
            (0..800).map(|number| format!("write -q -P {} {} 64k", layer + 1, place(number))).collect();
        create(&dir.join(format!("{level}-{}-disk", 1_600_000_000 + layer)), "16T", &writes);
    }
    let out = folder.path().join("out");
    let bytes = memory(&["merge".as_ref(), "--dir".as_ref(), dir.as_ref(), "--out".as_ref(), out.as_ref()]);
    assert!(bytes < 100_000_000, "{bytes} bytes");
    tools::run(tools::qemu_img().args(["check", "-q"]).arg(&out));
    let reads = (0..4u64).map(|layer| format!("read -P {} {} 64k", layer + 1, ((799 * 20) << 30) + (layer << 20)));
    for read in reads {
        let told = tools::run(tools::qemu_io().args(["-f", "qcow2", "-c", &read]).arg(&out));
        assert!(!told.contains("Pattern verification failed"), "{told}");
    }
}

/// An image of 4 GiB of holes that claims a disk of 1000 TiB: 2000 L2 tables in which nothing is.
fn claim_much(path: &Path) {
    const CLUSTER: u64 = 2 << 20;
    const TABLES: u64 = 2000;
    let size = (TABLES * CLUSTER / 8 * CLUSTER).to_string();
    tools::run(tools::qemu_img().args(["create", "-q", "-f", "qcow2", "-o", "cluster_size=2M"]).arg(path).arg(size));
    let file = File::options().read(true).write(true).open(path).unwrap();
    let mut l1 = [0; 8];
    file.read_exact_at(&mut l1, 40).unwrap();
    let first = file.metadata().unwrap().len().next_multiple_of(CLUSTER);
    file.set_len(first + TABLES * CLUSTER).unwrap();
    let entries = (0..TABLES).flat_map(|table| ((first + table * CLUSTER) | 1 << 63).to_be_bytes());
    file.write_all_at(&entries.collect::<Vec<u8>>(), u64::from_be_bytes(l1)).unwrap();
}

#[test]
fn empty_tables_of_a_huge_disk_need_less_than_100_mb() {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path().join("disk0");
    std::fs::create_dir(&dir).unwrap();
    claim_much(&dir.join("FULL-1600000000-disk"));
    let out = folder.path().join("out");
    let arguments = ["merge".as_ref(), "--skip-check".as_ref(), "--dir".as_ref(), dir.as_ref()];
    let bytes = memory(&[&arguments[..], &["--out".as_ref(), out.as_ref()]].concat());
    assert!(bytes < 100_000_000, "{bytes} bytes");
}

/// An image of 2 GiB of holes that has every other 512 bytes of the first 2 GiB of a disk of 2 TiB.
fn claim_many_pieces(path: &Path) {
    const CLUSTER: u64 = 16 << 10;
    let options = "extended_l2=on,cluster_size=16k,preallocation=metadata";
    tools::run(tools::qemu_img().args(["create", "-q", "-f", "qcow2", "-o", options]).arg(path).arg("2G"));
    tools::run(tools::qemu_img().args(["resize", "-q", "-f", "qcow2"]).arg(path).arg("2T"));
    let file = File::options().read(true).write(true).open(path).unwrap();
    let number = |offset| {
        let mut bytes = [0; 8];
        file.read_exact_at(&mut bytes, offset).unwrap();
        u64::from_be_bytes(bytes)
    };
    let tables = (2 << 30) / (CLUSTER / 16 * CLUSTER);
    for table in (0..tables).map(|index| number(number(40) + index * 8) & 0x00ff_ffff_ffff_fe00) {
        let mut entries = vec![0; usize::try_from(CLUSTER).unwrap()];
        file.read_exact_at(&mut entries, table).unwrap();
        entries.chunks_mut(16).for_each(|entry| entry[8..].copy_from_slice(&0x5555_5555_u64.to_be_bytes()));
        file.write_all_at(&entries, table).unwrap();
    }
}

#[test]
fn a_commit_of_two_million_pieces_needs_less_than_128_mb() {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path().join("disk0");
    std::fs::create_dir(&dir).unwrap();
    create(&dir.join("FULL-1600000000-disk"), "2T", &[]);
    claim_many_pieces(&dir.join("INC-1600000001-disk"));
    let bytes = memory(&["commit".as_ref(), "--dir".as_ref(), dir.as_ref()]);
    assert!(bytes < 128_000_000, "{bytes} bytes");
}

/// A FULL with data, an INC that makes the disk smaller, and one that makes it huge.
fn shrunk_and_grown(dir: &Path, size: &str) {
    std::fs::create_dir(dir).unwrap();
    let image = |name: &str, options: &str, size: &str, writes: &[&str]| {
        let path = dir.join(name);
        tools::run(tools::qemu_img().args(["create", "-q", "-f", "qcow2", "-o", options]).arg(&path).arg(size));
        let writes = writes.iter().flat_map(|write| ["-c", write]);
        tools::run(tools::qemu_io().args(["-f", "qcow2"]).args(writes).arg(&path));
    };
    // the last of this is in the second L2 table
    let writes = ["write -q -P 1 0 2M", "write -q -P 1 50M 1M", "write -q -P 1 700G 1M"];
    image("FULL-1600000000-disk", "cluster_size=2M", "1T", &writes);
    image("INC-1600000001-disk", "cluster_size=512", "1M", &["write -q -P 2 0 512"]);
    image("INC-1600000002-disk", "cluster_size=2M", size, &["write -q -P 3 900G 64k"]);
}

#[test]
fn a_disk_that_grows_to_petabytes_takes_a_second_and_little_memory() {
    for size in ["4P", "1024P"] {
        for command in ["commit", "snapshotrebase"] {
            let folder = tempfile::tempdir().unwrap();
            let dir = folder.path().join("disk0");
            shrunk_and_grown(&dir, size);
            let words = [command.as_ref(), "--dir".as_ref(), dir.as_os_str()];
            let start = Instant::now();
            let bytes = memory(&[&words[..], &["--dry-run".as_ref()]].concat());
            assert!(start.elapsed() < Duration::from_secs(5), "{:?}", start.elapsed());
            assert!(bytes < 64 << 20, "{bytes} bytes");
            tools::run(Command::new(env!("CARGO_BIN_EXE_qmprestore")).args(words));
            let reads =
                ["-P 2 0 512", "-P 1 512 523776", "-P 0 1M 64M", "-P 0 700G 1M", "-P 3 900G 64k", "-P 0 4095T 1M"];
            let reads = reads.iter().flat_map(|read| ["-c".to_owned(), format!("read {read}")]);
            let full = dir.join("FULL-1600000000-disk");
            let told = tools::run(tools::qemu_io().args(["-f", "qcow2"]).args(reads).arg(&full));
            assert!(!told.contains("Pattern verification failed"), "{told}");
            tools::run(tools::qemu_img().args(["check", "-q"]).arg(&full));
        }
    }
}

#[test]
fn a_compressed_cluster_in_pieces_is_inflated_once() {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path().join("disk0");
    std::fs::create_dir(&dir).unwrap();
    let raw = folder.path().join("raw");
    let digits: Vec<u8> = (0..400_000_u64).flat_map(|number| format!("{:010}", number.pow(2)).into_bytes()).collect();
    std::fs::write(&raw, &digits[..2 << 20]).unwrap();
    let full = dir.join("FULL-1600000000-disk");
    let compressed = ["convert", "-c", "-O", "qcow2", "-o", "cluster_size=2M"];
    tools::run(tools::qemu_img().args(compressed).args([&raw, &full]));
    let inc = dir.join("INC-1600000001-disk");
    tools::run(tools::qemu_img().args(["create", "-q", "-f", "qcow2", "-o", "cluster_size=512"]).arg(&inc).arg("2M"));
    let writes = (0..2048_u64).flat_map(|pair| ["-c".to_owned(), format!("write -q -c -P 7 {} 512", pair * 1024)]);
    tools::run(tools::qemu_io().args(["-f", "qcow2", "-t", "unsafe"]).args(writes).arg(&inc));

    // 2048 times would be 4 GiB
    let out = folder.path().join("out");
    let mut command = Command::new("sh");
    command.args(["-c", "ulimit -t 2 && exec \"$@\"", "sh", env!("CARGO_BIN_EXE_qmprestore"), "merge", "--dir"]);
    tools::run(command.arg(&dir).args(["--format", "raw", "--out"]).arg(&out));
    let mut expected = digits;
    expected.truncate(2 << 20);
    expected.chunks_mut(1024).for_each(|pair| pair[..512].fill(7));
    assert_eq!(sparse::difference(&std::fs::read(&out).unwrap(), &expected), None);
}

#[test]
fn a_chain_of_300_incs_needs_no_more_than_1024_open_files() {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path().join("disk0");
    std::fs::create_dir(&dir).unwrap();
    let image = folder.path().join("image");
    for layer in 0..=300u64 {
        let level = if layer == 0 { "FULL" } else { "INC" };
        if layer < 2 {
            let writes = [format!("write -q -P {} {}k 64k", 1 + layer % 250, layer * 64)];
            create(&image, "64M", &writes);
        }
        std::fs::copy(&image, dir.join(format!("{level}-{}-disk", 1_600_000_000 + layer))).unwrap();
    }
    let out = folder.path().join("out");
    let mut command = Command::new("sh");
    command.args(["-c", "ulimit -n 1024 && exec \"$@\"", "sh", env!("CARGO_BIN_EXE_qmprestore"), "merge", "--dir"]);
    tools::run(command.arg(&dir).arg("--out").arg(&out));
    tools::run(tools::qemu_io().args(["-f", "qcow2", "-c", "read -P 1 0 64k", "-c", "read -P 2 64k 64k"]).arg(&out));
}
