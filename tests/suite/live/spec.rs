//! What disks a machine is to have: the image files, and the words of QEMU's command line. No process is started here
//! but `qemu-img`.

use std::path::Path;

use crate::support::tools;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Bus {
    VirtioBlk,
    VirtioScsi,
    Ide,
}

/// With what option a disk is given to QEMU: the older one makes up the node names.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Given {
    Drive,
    Blockdev,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Format {
    Raw,
    Qcow2 {
        cluster_size: u64,
    },
    /// `compat=0.10`: no bitmaps in the file, no zero clusters.
    OldQcow2 {
        cluster_size: u64,
    },
}

#[derive(Debug, Clone)]
pub(crate) struct DiskSpec {
    pub(crate) name: String,
    pub(crate) size: u64,
    pub(crate) bus: Bus,
    pub(crate) given: Given,
    pub(crate) format: Format,
    ext4: bool,
}

impl DiskSpec {
    /// A qcow2 image on virtio-blk, given by node name.
    pub(crate) fn new(name: &str, size: u64) -> Self {
        let format = Format::Qcow2 { cluster_size: 64 << 10 };
        Self { name: name.to_owned(), size, bus: Bus::VirtioBlk, given: Given::Blockdev, format, ext4: false }
    }

    pub(crate) fn on(self, bus: Bus) -> Self {
        Self { bus, ..self }
    }

    pub(crate) fn given(self, given: Given) -> Self {
        Self { given, ..self }
    }

    pub(crate) fn format(self, format: Format) -> Self {
        Self { format, ..self }
    }

    /// With an empty file system.
    pub(crate) fn ext4(self) -> Self {
        Self { ext4: true, ..self }
    }

    /// What a discard may be: multiples of this are zeroes afterwards if it is done at all, else it is done in part.
    pub(crate) fn discards(&self) -> u64 {
        match self.format {
            Format::Raw => 4096,
            Format::Qcow2 { cluster_size } | Format::OldQcow2 { cluster_size } => cluster_size,
        }
    }

    pub(super) fn create(&self, folder: &Path) {
        let options = match self.format {
            Format::Raw => None,
            Format::Qcow2 { cluster_size } => Some(format!("cluster_size={cluster_size}")),
            Format::OldQcow2 { cluster_size } => Some(format!("cluster_size={cluster_size},compat=0.10")),
        };
        let mut command = tools::qemu_img();
        command.args(["create", "-q", "-f", self.driver()]);
        if let Some(options) = options {
            command.args(["-o", &options]);
        }
        tools::run(command.arg(folder.join(&self.name)).arg(self.size.to_string()));
        if self.ext4 {
            self.fill(folder);
        }
    }

    fn fill(&self, folder: &Path) {
        let raw = folder.join("ext4");
        std::fs::File::create_new(&raw).unwrap().set_len(self.size).unwrap();
        tools::run(tools::e2fs("mkfs.ext4").arg("-q").arg(&raw));
        let mut copy = tools::qemu_img();
        copy.args(["convert", "-n", "-f", "raw", "-O", self.driver()]).arg(&raw).arg(folder.join(&self.name));
        tools::run(&mut copy);
        std::fs::remove_file(raw).unwrap();
    }

    /// The disk and its device. Discards reach the file, so that what a guest discards is zeroes.
    pub(super) fn arguments(&self, folder: &Path, number: usize) -> [String; 4] {
        let path = folder.join(&self.name).to_str().unwrap().replace(',', ",,");
        let driver = self.driver();
        let id = id(number);
        let disk = match self.given {
            Given::Drive => ["-drive".to_owned(), format!("if=none,id={id},format={driver},discard=unmap,file={path}")],
            Given::Blockdev => {
                let file = format!("file.driver=file,file.discard=unmap,file.filename={path}");
                ["-blockdev".to_owned(), format!("node-name={id},driver={driver},discard=unmap,{file}")]
            }
        };
        let device = match self.bus {
            Bus::VirtioBlk => "virtio-blk-pci".to_owned(),
            Bus::VirtioScsi => "scsi-hd,bus=scsi.0".to_owned(),
            // QEMU itself finds a place for the first two only
            Bus::Ide => format!("ide-hd,bus=ide.{},unit={}", number % 2, number / 2 % 2),
        };
        let [option, value] = disk;
        [option, value, "-device".to_owned(), format!("{device},id={},drive={id}", device_id(number))]
    }

    fn driver(&self) -> &'static str {
        match self.format {
            Format::Raw => "raw",
            Format::Qcow2 { .. } | Format::OldQcow2 { .. } => "qcow2",
        }
    }
}

/// The node name of a disk that is given by one, else the id of its drive.
pub(super) fn id(number: usize) -> String {
    format!("disk{number}")
}

pub(super) fn device_id(number: usize) -> String {
    format!("device{number}")
}
