//! The `qemu-img` commands that do what a command here does, for any qemu-img from 5.2 on.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};

use serde_json::{Map, Value, json};

use crate::cli::text::{self, shell_word};
use crate::qcow2::Codec;
use crate::restore::{CommitSummary, Format, OutputFormat};

/// Longer words are refused by Linux (128 KiB).
const WORD_MAX: usize = 120_000;
/// qemu-img reads JSON of at most 1024 levels.
const MEMBERS_MAX: usize = 1000;

/// What is to be merged, oldest first, into what.
pub(super) struct ByHand<'a> {
    pub(super) members: Vec<(&'a Path, Format)>,
    /// `None` for a stream.
    pub(super) output: Option<&'a Path>,
    pub(super) format: OutputFormat,
    pub(super) cluster_size: u64,
}

impl ByHand<'_> {
    /// The commands, one after the other for one shell. None of them changes a backup. There are none where holes of
    /// raw INCs show what is below: qemu-img cannot do that.
    pub(super) fn commands(&self) -> Vec<String> {
        if self.members.iter().skip(1).any(|(_, format)| *format == Format::Raw) {
            return Vec::new();
        }
        match self.nested() {
            Some(source) => vec![self.convert(&source)],
            None => self.copies(),
        }
    }

    /// The chain as one word, where each image is told what it is based on. Names in it must be UTF-8.
    fn nested(&self) -> Option<String> {
        if self.members.len() > MEMBERS_MAX {
            return None;
        }
        let mut chain = Value::Null;
        for (path, format) in &self.members {
            let file = json!({ "driver": "file", "filename": path.to_str()? });
            let mut image = Map::from_iter([("driver".into(), name(*format).into()), ("file".into(), file)]);
            if *format == Format::Qcow2 {
                // moved: a copy for each image of all that is below it takes seconds where there are a thousand
                image.insert("backing".into(), chain);
            }
            chain = image.into();
        }
        let word = shell_word(OsStr::new(&format!("json:{}", text::json(&chain))));
        (word.len() < WORD_MAX).then_some(word)
    }

    /// Copies of the images, each based on the one before it.
    fn copies(&self) -> Vec<String> {
        let mut commands = vec!["scratch=$(mktemp -d ./by-hand.XXXXXX)".to_owned()];
        let mut below = "raw";
        for (number, (path, format)) in self.members.iter().enumerate() {
            let from = shell_word(&in_folder(path));
            commands.push(format!("cp --sparse=always {from} \"$scratch/{number}\""));
            if number > 0 {
                let base = number - 1;
                commands.push(format!("qemu-img rebase -u -f qcow2 -F {below} -b {base} \"$scratch/{number}\""));
            }
            below = name(*format);
        }
        let last = self.members.len().saturating_sub(1);
        commands.push(self.convert(&format!("-f {below} \"$scratch/{last}\"")));
        commands.push("rm -r \"$scratch\"".to_owned());
        commands
    }

    fn convert(&self, source: &str) -> String {
        let output = match self.output {
            Some(path) => shell_word(&in_folder(path)),
            None => "./disk.raw".to_owned(),
        };
        let options = match self.format {
            OutputFormat::Raw if self.output.is_some_and(is_block_device) => "-n -O raw".to_owned(),
            OutputFormat::Raw => "-O raw".to_owned(),
            OutputFormat::Qcow2 { compression, .. } => {
                let codec = match compression {
                    None => "",
                    Some(Codec::Deflate) => " -c",
                    Some(Codec::Zstd) => ",compression_type=zstd -c",
                };
                format!("-O qcow2 -o cluster_size={}{codec}", self.cluster_size)
            }
        };
        format!("qemu-img convert {options} {source} {output}")
    }
}

/// The commands that commit INCs into their FULL, one after the other for one shell.
pub(super) fn commit(summary: &CommitSummary) -> Vec<String> {
    let quoted = |path: &Path| shell_word(&in_folder(path));
    let full = quoted(&summary.full);
    let snapshot = |name: &str| format!("qemu-img snapshot -c {} {full}", shell_word(OsStr::new(name)));
    let mut commands: Vec<String> = summary.rest.iter().map(|path| format!("rm {}", quoted(path))).collect();
    if let Some(name) = &summary.full_snapshot {
        commands.push(snapshot(name));
    }
    let base = shell_word(&in_folder(Path::new(summary.full.file_name().unwrap_or_default())));
    for (at, path) in summary.incs.iter().enumerate() {
        let inc = quoted(path);
        let name = summary.snapshots.get(at);
        // an earlier run may have made the snapshot, and then the FULL holds the INC
        if name != Some(&None) {
            commands.push(format!("qemu-img rebase -u -f qcow2 -F qcow2 -b {base} {inc}"));
            commands.push(format!("qemu-img commit -d -f qcow2 {inc}"));
        }
        commands.extend(name.iter().filter_map(|name| name.as_deref()).map(snapshot));
        commands.push(format!("rm {inc}"));
    }
    commands
}

fn name(format: Format) -> &'static str {
    match format {
        Format::Qcow2 => "qcow2",
        Format::Raw => "raw",
    }
}

pub(super) fn is_block_device(path: &Path) -> bool {
    use std::os::unix::fs::FileTypeExt;
    path.metadata().is_ok_and(|there| there.file_type().is_block_device())
}

/// A path that no program takes for an option or a protocol.
pub(super) fn in_folder(path: &Path) -> std::ffi::OsString {
    if path.is_absolute() { path.as_os_str().to_owned() } else { PathBuf::from(".").join(path).into_os_string() }
}
