//! Restores disk images from backup folders.
fn main() {}
