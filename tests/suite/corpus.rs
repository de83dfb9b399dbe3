//! What fuzzing has found worth keeping, read again.

use std::fs;
use std::path::Path;

#[path = "../../fuzz/bodies/read_image.rs"]
mod read_image;

#[test]
fn every_image_of_the_corpus_is_read_or_refused() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus/read_image");
    let files: Vec<_> = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    assert!(files.len() > 10, "the corpus is gone");
    for path in files {
        read_image::read_image(&fs::read(path).unwrap());
    }
}
