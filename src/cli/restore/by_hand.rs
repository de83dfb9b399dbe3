//! The `qemu-img` commands that do what a command here does, for any qemu-img from 5.2 on.
//!
//! All are lines for one shell: a command that fails ends them, whether the shell would go on or not.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};

use serde_json::{Map, Value, json};

use super::args::Place;
use crate::chain::{Checksums, Manifest, RestorePoint, Unfinished};
use crate::cli::text::{self, shell_word};
use crate::qcow2::CompressionType;
use crate::restore::{CommitSummary, Format, OutputFormat, Rebase};

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
    /// The commands, none of which changes a backup. There are none where holes of raw INCs show what is below: qemu-img
    /// cannot do that.
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
            let from = word(path);
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
        lines(commands)
    }

    fn convert(&self, source: &str) -> String {
        let output = match self.output {
            Some(path) => word(path),
            None => "./disk.raw".to_owned(),
        };
        let options = match self.format {
            OutputFormat::Raw if self.output.is_some_and(is_block_device) => "-n -O raw".to_owned(),
            OutputFormat::Raw => "-O raw".to_owned(),
            OutputFormat::Qcow2 { compression, .. } => {
                let codec = match compression {
                    None => "",
                    Some(CompressionType::Deflate) => " -c",
                    Some(CompressionType::Zstd) => ",compression_type=zstd -c",
                };
                format!("-O qcow2 -o cluster_size={}{codec}", self.cluster_size)
            }
        };
        format!("qemu-img convert {options} {source} {output}")
    }
}

/// The commands that commit INCs into their FULL, a line for each INC. Manifests and checksums that do not fit any more go,
/// and are made anew.
pub(super) fn commit(summary: &CommitSummary, point: &RestorePoint, place: &Place) -> Vec<String> {
    let full = word(&summary.full);
    let snapshot = |name: &str| format!("qemu-img snapshot -c {} {full}", shell_word(OsStr::new(name)));
    let backing = in_folder(Path::new(summary.full.file_name().unwrap_or_default()));
    let based = |path: &Path| based(&backing, path);
    let removed = |path: &PathBuf| remove(std::iter::once(path.clone()).chain(books(path)));
    let mut commands: Vec<String> = summary.rest.iter().map(removed).collect();
    commands.extend(summary.full_snapshot.as_deref().map(snapshot));
    for (at, path) in summary.incs.iter().enumerate() {
        let name = summary.snapshots.get(at);
        let mut steps = Vec::new();
        // an earlier run may have made the snapshot, and then the FULL holds the INC
        if name != Some(&None) {
            let committed = format!("qemu-img commit -d -f qcow2 {}", word(path));
            steps.push(based(path));
            match summary.shrinks.get(at).copied().flatten() {
                // `commit` does not make the FULL smaller, and what lies behind the end would be there again in a larger disk:
                // so the INC grows before, with zeroes, and both shrink after. An image of version 2 cannot grow over another
                // one, and sizes are those that QEMU sees, in whole sectors
                Some((before, size)) => steps.extend([
                    format!("qemu-img amend -f qcow2 -o compat=1.1 {}", word(path)),
                    format!("qemu-img resize -q -f qcow2 {} {}", word(path), before / 512 * 512),
                    committed,
                    format!("qemu-img resize -q -f qcow2 --shrink {full} {}", size / 512 * 512),
                ]),
                None => steps.push(committed),
            }
        }
        steps.extend(name.iter().filter_map(|name| name.as_deref()).map(snapshot));
        steps.push(removed(path));
        commands.push(steps.join(" && "));
    }
    let mut stale: Vec<PathBuf> =
        Some(Unfinished::path(&summary.full)).into_iter().filter(|path| path.exists()).collect();
    if !summary.incs.is_empty() {
        let next = summary.next.as_deref().filter(|next| next.exists());
        stale.extend(books(&summary.full));
        // it tells what it builds on; and its new checksums have another id, which the one after it tells
        stale.extend(next.map(Manifest::path));
        if let Some(next) = next.filter(|_| summary.next_is_based) {
            commands.push(based(next));
            let after = point.later.iter().map(|image| image.path.as_path()).skip_while(|path| *path != next).nth(1);
            stale.extend([Checksums::path(next)].into_iter().chain(after.map(Manifest::path)));
        }
    }
    stale.retain(|path| path.exists());
    if !stale.is_empty() {
        commands.extend([remove(stale), manifest(place)]);
    }
    lines(commands)
}

/// The commands that do what of a rebase is not done yet, a line for each INC. Checksums that do not fit any more go, and
/// are made anew.
pub(super) fn rebase(rebase: &Rebase, place: &Place) -> Vec<String> {
    let mut commands = Vec::new();
    let mut stale = false;
    for image in rebase.images().iter().filter(|image| !image.done) {
        let sums = Some(Checksums::path(&image.path)).filter(|path| path.exists());
        stale |= sums.is_some();
        let steps = [based(OsStr::new(&image.backing), &image.path)].into_iter().chain(sums.map(|sums| remove([sums])));
        commands.push(steps.collect::<Vec<_>>().join(" && "));
    }
    let link = rebase.link();
    if !link.done {
        commands.push(format!("ln -sfn -- {} {}", shell_word(link.target.as_os_str()), word(&link.path)));
    }
    commands.extend(stale.then(|| manifest(place)));
    lines(commands)
}

/// Each command only where all before it did what they should.
fn lines(mut commands: Vec<String>) -> Vec<String> {
    let last = commands.pop();
    for command in &mut commands {
        command.push_str(" &&");
    }
    commands.extend(last);
    commands
}

/// An image that names another in its folder as its backing file.
fn based(backing: &OsStr, path: &Path) -> String {
    format!("qemu-img rebase -u -f qcow2 -F qcow2 -b {} {}", shell_word(backing), word(path))
}

/// What is known of an image beside it.
fn books(image: &Path) -> impl Iterator<Item = PathBuf> {
    [Manifest::path(image), Checksums::path(image)].into_iter().filter(|path| path.exists())
}

fn remove(paths: impl IntoIterator<Item = PathBuf>) -> String {
    paths.into_iter().fold("rm -f".to_owned(), |command, path| command + " " + &word(&path))
}

fn manifest(place: &Place) -> String {
    let filter =
        place.filter.as_ref().map(|filter| format!(" {}", shell_word(OsStr::new(&format!("--filter={filter}")))));
    format!("qmprestore manifest --dir {}{}", word(&place.dir), filter.unwrap_or_default())
}

fn word(path: &Path) -> String {
    shell_word(&in_folder(path))
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
fn in_folder(path: &Path) -> std::ffi::OsString {
    if path.is_absolute() { path.as_os_str().to_owned() } else { PathBuf::from(".").join(path).into_os_string() }
}
