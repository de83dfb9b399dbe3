//! What a QEMU can be trusted with.

use crate::qmp::Features;

/// Whether QEMU is one of those whose backup jobs have a filter of their own kind, 5.0 to 6.0: copy-before-write came in
/// its place. Such a QEMU ends with SIGSEGV when it lists its nodes while a backup job has concluded and was not dismissed:
/// the filter of that job has lost its child. So jobs there are dismissed as they end.
pub(crate) fn is_fragile(features: &Features) -> bool {
    !features.copy_before_write
}

/// Whether QEMU can keep the moment of a disk in a fleece image, and shows it as it was.
///
/// QEMU 7.2 has the nodes for that, but tells which parts of the snapshot are zero by the disk as it is now: what the guest
/// has zeroed or discarded since the moment is not copied from the fleece image, but taken for zeroes. 10.0 does not. The
/// schemas of those that were not tried tell them apart by what came with 9.1.
pub(crate) fn can_fleece(features: &Features) -> bool {
    features.copy_before_write && features.snapshot_access && features.on_cbw_error && features.discard_source
}

/// Whether QEMU can be told to write all of an image: a reopen for reading only does that.
pub(crate) fn can_flush(features: &Features) -> bool {
    features.has_command("blockdev-reopen")
}
