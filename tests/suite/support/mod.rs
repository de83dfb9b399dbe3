//! What tests are made of: chains, images, models, judges, and runs of the programs.

pub(crate) mod disk;
pub(crate) mod edited;
pub(crate) mod in_place;
pub(crate) mod layer;
pub(crate) mod meanwhile;
pub(crate) mod merge;
pub(crate) mod oracle;
pub(crate) mod prng;
pub(crate) mod program;
pub(crate) mod random_chain;
pub(crate) mod recorder;
pub(crate) mod salvage_damage;
pub(crate) mod sealed;
pub(crate) mod seeds;
pub(crate) mod small_disk;
pub(crate) mod sparse;
pub(crate) mod sums;
pub(crate) mod tools;
pub(crate) mod world;
pub(crate) mod writer_base;
pub(crate) mod writer_ops;
