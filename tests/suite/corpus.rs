//! What fuzzing has found worth keeping, read again by all of its targets.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

#[path = "../../fuzz/bodies/mod.rs"]
mod bodies;

#[test]
fn every_file_of_each_corpus_is_understood_or_refused() {
    for (target, body) in bodies::TARGETS {
        let files = files(&fuzz().join("corpus").join(target));
        assert!(files.len() > 3, "the corpus of {target} is gone");
        for path in files {
            let bytes = fs::read(&path).unwrap();
            let told = Told(&path);
            body(&bytes);
            drop(told);
        }
    }
}

#[test]
fn every_target_of_the_fuzzer_has_a_body_and_a_corpus_that_is_replayed() {
    let replayed: BTreeSet<String> = bodies::TARGETS.iter().map(|(target, _)| (*target).to_owned()).collect();
    let names = |folder: &str| -> BTreeSet<String> {
        let files = files(&fuzz().join(folder));
        files.iter().map(|path| path.file_stem().unwrap().to_str().unwrap().to_owned()).collect()
    };
    assert_eq!(names("fuzz_targets"), replayed);
    assert_eq!(names("corpus"), replayed);
    let manifest = fs::read_to_string(fuzz().join("Cargo.toml")).unwrap();
    for target in &replayed {
        let source = fs::read_to_string(fuzz().join(format!("fuzz_targets/{target}.rs"))).unwrap();
        assert!(source.contains(&format!("run(\"{target}\", bytes)")), "{target} runs something else");
        assert!(manifest.contains(&format!("name = \"{target}\"\npath = \"fuzz_targets/{target}.rs\"")), "{target}");
    }
    assert!(names("dictionaries").is_subset(&replayed));
}

fn fuzz() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz")
}

fn files(folder: &Path) -> Vec<PathBuf> {
    fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect()
}

/// Says which file it was if the test fails.
struct Told<'a>(&'a Path);

impl Drop for Told<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("\n{} failed", self.0.display());
        }
    }
}
