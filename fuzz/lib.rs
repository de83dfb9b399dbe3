//! What the fuzz targets do with their bytes. The tests replay each target's corpus with the same bodies.

mod bodies;

// the model of the tests, whose way to draw operations is not used here
#[allow(dead_code)]
#[path = "."]
mod support {
    #[path = "../tests/suite/support/prng.rs"]
    pub(crate) mod prng;
    #[path = "../tests/suite/support/writer_ops.rs"]
    pub(crate) mod writer_ops;
}

/// Runs the body of a target.
pub fn run(target: &str, bytes: &[u8]) {
    let (_, body) = bodies::TARGETS.iter().find(|(name, _)| *name == target).expect("a name in bodies/mod.rs");
    body(bytes);
}
