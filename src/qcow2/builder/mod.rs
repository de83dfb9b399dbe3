//! New images: every offset is known before a byte moves.
//!
//! ```text
//! header │ refcount table │ refcount blocks │ L1 table │ L2 tables │ data
//! ```
//!
//! Images are version 3 with 16-bit refcounts and standard L2 entries, what every QEMU from 1.1 on opens; with
//! zstd, one from 5.1 on. The builder decides places and makes the bytes of the metadata; writing them is its caller's part.

mod layout;
mod packer;
mod refcounts;

pub use layout::{Layout, LayoutError};
pub(crate) use packer::Packer;
pub use refcounts::RefcountWriter;
