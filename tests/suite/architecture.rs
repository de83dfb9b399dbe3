//! The layers of the crate: which folder of `src` may use which.

use std::fs;
use std::path::{Path, PathBuf};

/// Each layer and what it may use, from the top to the ground.
const ALLOWED: [(&str, &[&str]); 12] = [
    ("bin", &["cli"]),
    ("cli", &["capture", "restore", "chain", "qcow2", "storage", "qmp", "errors"]),
    ("capture", &["qmp", "agent", "chain", "qcow2", "storage", "json", "errors"]),
    ("agent", &["qmp"]),
    ("qmp", &["json"]),
    ("restore", &["chain", "qcow2", "storage", "json", "errors", "threads"]),
    ("chain", &["qcow2", "storage", "json", "errors", "threads"]),
    ("qcow2", &["storage"]),
    ("storage", &[]),
    ("json", &[]),
    ("errors", &[]),
    ("threads", &[]),
];

fn sources(folder: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    entries.flat_map(|path| if path.is_dir() { sources(&path) } else { vec![path] }).collect()
}

/// A text without its comments, in one line.
fn bare(text: &str) -> String {
    let lines: Vec<&str> = text.lines().map(|line| line.split("//").next().unwrap().trim()).collect();
    lines.join(" ")
}

/// The layers that code without comments names.
fn used(code: &str) -> Vec<&str> {
    let paths = ["crate::", "qmpbackup::"].iter().flat_map(|start| code.split(start).skip(1));
    paths
        .flat_map(|path| match path.strip_prefix('{') {
            Some(several) => several.split(['}', ';']).next().unwrap().split(',').map(str::trim).collect(),
            None => vec![path],
        })
        .map(|path| path.split(|c: char| !c.is_alphanumeric() && c != '_').next().unwrap())
        .filter(|name| !name.is_empty())
        .collect()
}

#[test]
fn a_layer_uses_only_those_below_it() {
    let src = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut seen = 0;
    for (layer, allowed) in ALLOWED {
        for path in sources(&src.join(layer)) {
            seen += 1;
            for name in used(&bare(&fs::read_to_string(&path).unwrap())) {
                let known = ALLOWED.iter().any(|(other, _)| *other == name);
                let place = format!("{}: {name}", path.display());
                assert!(name == layer || allowed.contains(&name), "{place} is above {layer}, or no layer");
                assert!(known, "{place} is no layer");
            }
        }
    }
    assert_eq!(seen + 1, sources(&src).len(), "a file is in no layer");
}

/// The code of a file without its tests, which stand at the end.
fn code(text: &str) -> &str {
    text.split("#[cfg(test)]\nmod tests {").next().unwrap()
}

/// The parts of code that name something of a module called `process`.
fn of_process(code: &str) -> impl Iterator<Item = &str> {
    code.split("process::").skip(1).map(|path| path.split([';', '(']).next().unwrap())
}

#[test]
fn what_a_file_uses_is_found_however_it_is_written() {
    let code = bare("use crate::{\n    chain::X, // crate::cli\n    qcow2,\n};\nuse std::process::{\n    Command,\n};");
    assert_eq!(used(&code), ["chain", "qcow2"]);
    assert!(of_process(&code).any(|path| path.contains("Command")));
}

#[test]
fn no_other_program_is_started_and_so_no_shell() {
    let src = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    for path in sources(&src).iter().filter(|path| !path.components().any(|part| part.as_os_str() == "tests")) {
        let text = fs::read_to_string(path).unwrap();
        let code = bare(code(&text));
        assert!(of_process(&code).all(|path| !path.contains("Command")), "{} starts programs", path.display());
        for word in ["Command::new(\"sh\"", "libc::system", "libc::exec", "libc::popen", "libc::posix_spawn"] {
            assert!(!code.contains(word), "{} has {word}", path.display());
        }
    }
}

#[test]
fn only_the_layer_for_people_prints() {
    let src = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    for path in ["capture", "agent", "qmp", "restore", "chain", "qcow2", "storage", "json", "errors", "threads"]
        .iter()
        .flat_map(|layer| sources(&src.join(layer)))
    {
        let text = fs::read_to_string(&path).unwrap();
        for word in ["println!", "print!(", "dbg!(", "std::io::stdout", "std::io::stderr"] {
            assert!(!text.contains(word), "{} has {word}", path.display());
        }
    }
}

/// A file that is mapped and becomes shorter, or whose disk breaks, ends the program by SIGBUS.
#[test]
fn no_file_is_mapped() {
    let src = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut anonymous = 0;
    for path in sources(&src) {
        let text = fs::read_to_string(&path).unwrap();
        for line in text.lines().map(|line| line.split("//").next().unwrap()) {
            let maps = ["Mmap::", "MmapMut::", "MmapRaw::", "MmapOptions", "mmap(", ".map_mut("];
            let calls = maps.iter().filter(|map| line.contains(**map)).count();
            let of_no_file = line.matches("MmapMut::map_anon(").count();
            assert_eq!(calls, of_no_file, "{}: {line}", path.display());
            anonymous += of_no_file;
        }
    }
    assert_eq!(anonymous, 1, "where are the maps?");
}
