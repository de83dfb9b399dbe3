//! The kinds of output, each from a plan to bytes.

mod arrangement;
mod compressed;
mod passthrough;
mod qcow2;
mod raw;
mod stream;

pub(super) use compressed::write_compressed;
pub(super) use qcow2::write_qcow2;
pub(super) use raw::{write_device, write_raw};
pub(super) use stream::write_stream;

use crate::qcow2::MapBuffer;
use crate::restore::error::Result;
use crate::restore::plan::{Plan, PlannedSlice};
use crate::restore::pool;

/// Bytes of the disk that an output which is written in order takes at once.
const PART: u64 = 1 << 20;

/// Does the slices of a plan in parallel, each thread with scratch of its own.
fn for_each_slice<S>(
    plan: &Plan,
    scratch: impl Fn() -> S + Sync,
    work: impl Fn(&mut S, &mut MapBuffer, &PlannedSlice) -> Result<()> + Sync,
) -> Result<()> {
    let both = || (scratch(), MapBuffer::default());
    pool::for_each(plan.slices.iter(), both, |(scratch, buffer), slice| work(scratch, buffer, slice))
}
