//! One small image of every kind, as QEMU makes them.

use crate::support::edited::Bench;

/// The name under which the image lies in its folder.
pub(super) const NAME: &str = "FULL-1600000000-disk";
/// What lies below an image that has a backing file.
pub(super) const BELOW: &str = "FULL-1500000000-disk";

/// An image, and the folder that it lies in.
pub(super) struct Kind {
    pub(super) bench: Bench,
    pub(super) image: Vec<u8>,
    pub(super) has_backing: bool,
}

const MIB: u64 = 1 << 20;

/// What a guest does in an image of clusters of 64 KiB: data, zeroes, holes, compressed data.
const WRITES: [&str; 5] = [
    "write -q -P 1 0 64k",
    "write -q -P 2 70k 1k",
    "write -q -z 128k 64k",
    "write -q -P 3 2M 130k",
    "discard -q 2M 64k",
];
const COMPRESSED: [&str; 2] = ["write -q -c -P 4 1M 64k", "write -q -c -P 5 1088k 64k"];

impl Kind {
    fn new(options: &str, size: u64, writes: &[&str]) -> Self {
        let bench = Bench::new();
        bench.create(NAME, options, size).io(NAME, writes);
        Self { bench, image: Vec::new(), has_backing: false }
    }

    fn with_snapshots(self) -> Self {
        self.bench.img(&["snapshot", "-c", "first", NAME]).io(NAME, &["write -q -P 6 0 512"]);
        self.bench.img(&["snapshot", "-c", "second one", NAME]).io(NAME, &["write -q -P 7 512 512"]);
        self
    }

    fn with_bitmaps(self) -> Self {
        self.bench.img(&["bitmap", "--add", "-g", "64k", NAME, "marks"]).io(NAME, &["write -q -P 8 0 512"]);
        self.bench.img(&["bitmap", "--add", "--disable", NAME, "idle"]);
        self
    }

    fn done(mut self) -> Self {
        self.image = self.bench.load(NAME);
        self
    }
}

pub(super) fn version_3() -> Kind {
    let writes = [&WRITES[..], &COMPRESSED[..]].concat();
    Kind::new("compat=1.1", 4 * MIB, &writes).with_snapshots().with_bitmaps().done()
}

pub(super) fn version_2() -> Kind {
    let writes: Vec<_> = WRITES.into_iter().filter(|write| !write.contains("-z")).chain(COMPRESSED).collect();
    Kind::new("compat=0.10", 4 * MIB, &writes).with_snapshots().done()
}

pub(super) fn small_clusters() -> Kind {
    let writes = ["write -q -P 1 0 3k", "write -q -c -P 2 32k 512", "write -q -P 3 100k 512", "write -q -z 64k 1k"];
    Kind::new("cluster_size=512", MIB, &writes).with_snapshots().with_bitmaps().done()
}

pub(super) fn large_clusters() -> Kind {
    Kind::new("cluster_size=2M", 4 * MIB, &["write -q -P 1 0 4k", "write -q -c -P 2 2M 2M"]).done()
}

pub(super) fn subclusters() -> Kind {
    let writes = [
        "write -q -P 1 0 64k",
        "write -q -P 2 68k 6k",
        "write -q -z 80k 2k",
        "write -q -z 192k 64k",
        "write -q -P 3 1M 2k",
        "write -q -c -P 4 2M 64k",
    ];
    Kind::new("extended_l2=on", 4 * MIB, &writes).with_snapshots().with_bitmaps().done()
}

pub(super) fn small_subclusters() -> Kind {
    let writes = ["write -q -P 1 0 16k", "write -q -P 2 17k 1k", "write -q -z 20k 512"];
    Kind::new("extended_l2=on,cluster_size=16k", MIB, &writes).done()
}

pub(super) fn zstd() -> Kind {
    let writes = [&WRITES[..1], &COMPRESSED[..]].concat();
    Kind::new("compression_type=zstd", 2 * MIB, &writes).done()
}

pub(super) fn refcounts_of_1_bit() -> Kind {
    Kind::new("refcount_bits=1", 4 * MIB, &WRITES).with_bitmaps().done()
}

pub(super) fn refcounts_of_64_bits() -> Kind {
    let writes = [&WRITES[..], &COMPRESSED[..]].concat();
    Kind::new("refcount_bits=64", 4 * MIB, &writes).with_snapshots().done()
}

/// With lazy refcounts, and not closed.
pub(super) fn dirty() -> Kind {
    let mut kind = Kind::new("lazy_refcounts=on", 4 * MIB, &WRITES).done();
    kind.image[79] |= 1;
    kind
}

/// An INC that names its FULL.
pub(super) fn on_a_full() -> Kind {
    let bench = Bench::new();
    let below = ["write -q -P 11 0 1M", "write -q -P 12 2M 300k"];
    bench.create(BELOW, "compat=1.1", 4 * MIB).io(BELOW, &below);
    bench.img(&["create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", BELOW, NAME]).io(NAME, &WRITES);
    Kind { bench, image: Vec::new(), has_backing: true }.done()
}

/// An image whose data lies in another file.
pub(super) fn data_file() -> Kind {
    Kind::new("data_file=data", 2 * MIB, &WRITES[..3]).done()
}

/// An image that is encrypted as LUKS does it.
pub(super) fn luks() -> Kind {
    let bench = Bench::new();
    let options = "encrypt.format=luks,encrypt.key-secret=key,encrypt.iter-time=10";
    let secret = "secret,id=key,data=password";
    bench.img(&["create", "-q", "-f", "qcow2", "--object", secret, "-o", options, NAME, "1M"]);
    Kind { bench, image: Vec::new(), has_backing: false }.done()
}
