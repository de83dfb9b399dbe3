//! [`qmpbackup::qcow2::Writer`], against models of bytes and `qemu-img`.

pub(crate) mod backing;
pub(crate) mod crash;
pub(crate) mod hostile;
pub(crate) mod random;
pub(crate) mod whole;
