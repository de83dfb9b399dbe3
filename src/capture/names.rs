//! The names of what a run leaves for a while in QEMU, and of the bitmaps that stay.
//!
//! Nodes and jobs of all runs have the same names, so that QEMU itself refuses a second run: it adds no node twice. Names
//! of nodes have at most 31 characters.

use crate::chain::ImageId;

/// The node whose file is the lock of the folder that a run writes to: the machine's own lock.
pub(super) const LOCK: &str = "qmpbackup-lock";

/// A node that is there while a run may have stopped the machine.
pub(super) const MOMENT: &str = "qmpbackup-moment";

/// The bitmap that says what an INC copies, on the node of the snapshot.
pub(super) const COPIED: &str = "qmpbackup-copied";

/// What nodes, jobs and bitmaps of this tool begin with.
pub(super) const PREFIX: &str = "qmpbackup-";

/// What jobs of the Python tool begin with.
pub(super) const PYTHON_JOB: &str = "qmpbackup.";

/// A part of the block graph that a run adds for a disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum NodeRole {
    /// The image that is made.
    Target,
    /// Where old data goes before the guest overwrites it.
    Fleece,
    /// The filter that sends it there.
    CopyBeforeWrite,
    /// The disk as it was.
    Snapshot,
}

impl NodeRole {
    const ALL: [Self; 4] = [Self::Target, Self::Fleece, Self::CopyBeforeWrite, Self::Snapshot];

    /// What a node of a run is.
    pub(super) fn of(node: &str) -> Option<Self> {
        let disk = node.strip_prefix(PREFIX)?.split('-').next()?.parse().ok()?;
        Self::ALL.into_iter().find(|role| role.node(disk) == node)
    }

    /// The node of a disk's part.
    pub(super) fn node(self, disk: usize) -> String {
        let part = match self {
            Self::Target => "target",
            Self::Fleece => "fleece",
            Self::CopyBeforeWrite => "cbw",
            Self::Snapshot => "snapshot",
        };
        format!("{PREFIX}{disk}-{part}")
    }
}

/// The job of a disk.
pub(super) fn job(disk: usize) -> String {
    format!("{PREFIX}{disk}")
}

/// The disk whose job this is.
pub(super) fn disk_of(job: &str) -> Option<usize> {
    job.strip_prefix(PREFIX)?.parse().ok()
}

/// Digits of an image's id in the name of a bitmap.
const TAG: usize = 8;

/// The bitmap that records all that is written since the image of this time and id. All disks of a run have the same time,
/// and without the id a disk that has got the name of another would go on with its images.
pub(super) fn epoch(time: i64, image: ImageId, chain: &str) -> String {
    format!("{PREFIX}{time}-{:.TAG$}-{chain}", image.to_string())
}

/// Whether a bitmap is one that goes back to an image of this time.
pub(super) fn is_epoch(bitmap: &str, time: i64) -> bool {
    let name = bitmap.strip_prefix(PREFIX).and_then(|name| name.split_once('-'));
    name.is_some_and(|(digits, _)| digits.parse() == Ok(time))
}

/// What a bitmap of a chain records.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Since {
    /// All that was written since the newest image, as the Python tool names its bitmaps.
    Newest,
    /// All that was written since the image of this time.
    Image(i64),
}

/// What a bitmap records, if it is one of this chain. The Python tool has put the disk's name into it at times.
pub(super) fn since(bitmap: &str, chain: &str, disk: &[String]) -> Option<Since> {
    let name = bitmap.strip_prefix(PREFIX)?;
    if name == chain {
        return Some(Since::Newest);
    }
    let middle = name.strip_suffix(chain)?.strip_suffix('-')?;
    if disk.iter().any(|known| known == middle) {
        return Some(Since::Newest);
    }
    // earlier versions had no tag
    let (time, tag) = middle.split_once('-').unwrap_or((middle, ""));
    let is_tag = tag.len() == TAG && tag.bytes().all(|byte| byte.is_ascii_hexdigit());
    let is_time = time.bytes().all(|byte| byte.is_ascii_digit()) && (is_tag || time == middle);
    time.parse().ok().filter(|_| is_time).map(Since::Image)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bitmap_tells_since_when_it_records() {
        let disk = ["ide0-hd0".to_owned()];
        let since = |bitmap: &str| since(bitmap, "c-1", &disk);
        let id = ImageId::parse("0123456789abcdef0123456789abcdef").unwrap();
        assert_eq!(epoch(1_643_308_898, id, "c-1"), "qmpbackup-1643308898-01234567-c-1");
        assert_eq!(since(&epoch(1_643_308_898, id, "c-1")), Some(Since::Image(1_643_308_898)));
        assert_eq!(since("qmpbackup-1643308898-c-1"), Some(Since::Image(1_643_308_898)));
        for other in
            ["qmpbackup-7-0123456-c-1", "qmpbackup-7-0123456g-c-1", "qmpbackup-7-01234567-8-c-1", "qmpbackup-7--c-1"]
        {
            assert_eq!(since(other), None, "{other}");
        }
        assert_eq!(since("qmpbackup-c-1"), Some(Since::Newest));
        assert_eq!(since("qmpbackup-ide0-hd0-c-1"), Some(Since::Newest));
        for other in ["qmpbackup-5-c-2", "qmpbackup-ide0-hd1-c-1", "qmpbackup-copy-ide0-hd0-c-1", "c-1", "mine-5-c-1"] {
            assert_eq!(since(other), None, "{other}");
        }
        assert_eq!(since("qmpbackup-99999999999999999999-c-1"), None);
    }

    #[test]
    fn the_name_of_a_node_tells_what_it_is() {
        for role in NodeRole::ALL {
            assert_eq!(NodeRole::of(&role.node(17)), Some(role));
        }
        for other in
            [LOCK, "qmpbackup-virtio0-cbw", "qmpbackup-0-fleeced", "qmpbackup-0", "0-target", "qmpbackup-00-cbw"]
        {
            assert_eq!(NodeRole::of(other), None, "{other}");
        }
    }

    #[test]
    fn nodes_of_any_disk_have_names_that_qemu_takes() {
        for part in NodeRole::ALL {
            assert!(part.node(99_999).len() <= 31);
        }
        assert_eq!(disk_of(&job(7)), Some(7));
        assert_eq!(disk_of("qmpbackup-x"), None);
    }
}
