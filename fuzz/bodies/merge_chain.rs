//! A chain of two to four images against arrays of bytes: what is merged is what the arrays say. Then bytes of the images
//! are overwritten, and the chain is merged or refused.

use std::fs;
use std::io::{self, Write};
use std::num::NonZeroUsize;
use std::ops::{ControlFlow, Range};
use std::path::Path;
use std::sync::{Arc, Mutex};

use qmpbackup::qcow2::{CompressionType, Writer, check};
use qmpbackup::restore::{Format, Layers, Merge, MergeOptions, Merged, Output, OutputFormat, Result, Silent, Source};
use qmpbackup::storage::{FileStorage, MemoryStorage};

use super::empty::Empty;
use super::input::Input;
use crate::support::writer_ops::{self, Op, within};

/// What is not looked into any more, since damage can make a disk as large as it likes.
const LONG: u64 = 16 << 20;

pub(super) fn merge_chain(bytes: &[u8]) {
    let mut input = Input::new(bytes);
    let folder = super::folder();
    let (mut sources, mut disk) = (Vec::new(), Vec::new());
    for number in 0..2 + input.below(3) {
        let layer = Layer::draw(&mut input, number == 0);
        layer.show(&mut disk);
        let path = folder.path().join(number.to_string());
        fs::write(&path, &layer.image).unwrap();
        sources.push(Source { format: layer.format.into(), ..Source::new(path) });
    }
    let wanted = Wanted::draw(&mut input);
    let merged = wanted.merge(&sources, folder.path()).unwrap();
    assert_eq!(merged.size, disk.len() as u64);
    let bytes = wanted.read(folder.path());
    assert!(bytes == disk, "{wanted:?}: {} bytes, another disk of {} comes out", disk.len(), bytes.len());
    if !input.is_empty() {
        attack(&mut input, &sources, folder.path());
    }
}

/// An image, and what it says of its disk.
struct Layer {
    format: Format,
    image: Vec<u8>,
    disk: Vec<u8>,
    /// Where it says anything.
    said: Vec<bool>,
}

impl Layer {
    fn draw(input: &mut Input<'_>, full: bool) -> Self {
        let empty = Empty::draw(input);
        let length = usize::try_from(empty.size).unwrap_or_default();
        let storage = Arc::new(MemoryStorage::new(empty.image()));
        let mut layer =
            Self { format: Format::Qcow2, image: Vec::new(), disk: vec![0; length], said: vec![false; length] };
        let mut writer = Writer::open(storage.clone()).unwrap();
        for _ in 0..input.below(10) {
            let (op, said) = draw(input, &empty);
            op.ask(&mut writer).unwrap();
            op.apply(&mut layer.disk, empty.cluster_size());
            if let Some((range, _)) = op.changes(empty.size, empty.cluster_size()) {
                layer.said[within(&range, 0)].fill(said);
            }
        }
        writer.finish().unwrap();
        layer.image = storage.to_vec();
        // of a raw FULL, all is said
        if full && input.below(8) == 7 {
            layer.format = Format::Raw;
            layer.image.clone_from(&layer.disk);
        }
        layer
    }

    /// What lies above a disk.
    fn show(&self, below: &mut Vec<u8>) {
        below.resize(self.disk.len(), 0);
        for (at, _) in self.said.iter().enumerate().filter(|(_, said)| **said) {
            below[at] = self.disk[at];
        }
    }
}

/// What is asked of whole units of a layer, and whether it hides what is below.
fn draw(input: &mut Input<'_>, empty: &Empty) -> (Op, bool) {
    let cluster = empty.cluster_size();
    let unit = if empty.extended_l2 { cluster / 32 } else { cluster };
    let kind = input.below(8);
    let unit = if matches!(kind, 0..=2 | 6) { unit } else { cluster };
    let start = input.below(empty.size.div_ceil(unit)) * unit;
    let units = if matches!(kind, 3 | 4) { 1 } else { 1 + input.below(4) };
    let range = start..(start + units * unit).min(empty.size);
    let content = |input: &mut Input<'_>, range: &Range<u64>| {
        let length = usize::try_from(range.end - range.start).unwrap_or_default();
        let pattern = input.below(16) as usize;
        let pattern = Some(input.take(pattern)).filter(|pattern| !pattern.is_empty()).unwrap_or(&[0]);
        pattern.iter().copied().cycle().take(length).collect::<Vec<u8>>()
    };
    match kind {
        0 | 1 => (Op::Write(range.clone(), content(input, &range)), true),
        2 => (Op::Allocate(range.clone(), content(input, &range)), true),
        3 | 4 => (Op::Compressed(range.clone(), content(input, &range)), true),
        5 => (Op::Discard(range), false),
        // version 2 has no zeroes but those that are written
        _ if empty.version == 2 => (Op::Write(range.clone(), vec![0; within(&range, range.start).end]), true),
        _ => (Op::Zero(range), true),
    }
}

/// What is made of a chain.
#[derive(Debug)]
struct Wanted {
    format: OutputFormat,
    threads: usize,
    stream: bool,
}

/// A stream that is kept.
#[derive(Clone, Default)]
struct Kept(Arc<Mutex<Vec<u8>>>);

impl Write for Kept {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let mut kept = self.0.lock().unwrap();
        if kept.len() as u64 > LONG {
            return Err(io::ErrorKind::StorageFull.into());
        }
        kept.extend(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Wanted {
    fn draw(input: &mut Input<'_>) -> Self {
        let cluster_size = match input.below(12) {
            bits @ 0..=7 => Some(1 << (9 + bits)),
            _ => None,
        };
        let compression = input.pick(&[None, Some(CompressionType::Deflate), Some(CompressionType::Zstd)]);
        let kind = input.below(4);
        let format = if kind < 2 { OutputFormat::Qcow2 { cluster_size, compression } } else { OutputFormat::Raw };
        Self { format, threads: 1 + input.below(3) as usize, stream: kind == 3 }
    }

    fn merge(&self, sources: &[Source], folder: &Path) -> Result<Merged> {
        let kept = Kept::default();
        let output =
            if self.stream { Output::Stream(Box::new(kept.clone())) } else { Output::File(folder.join("out")) };
        let threads = NonZeroUsize::new(self.threads);
        let options = MergeOptions { threads, replace: true, ..MergeOptions::new(output, self.format) };
        let merge = Merge::plan(Layers::open(sources)?, options, &Silent)?;
        merge.check(&Silent)?;
        let length = merge.length()?;
        let merged = merge.run(&Silent)?;
        assert!(merged.length <= length, "{} bytes, {length} were planned", merged.length);
        if self.stream {
            let kept = kept.0.lock().unwrap();
            assert_eq!(kept.len() as u64, merged.length);
            fs::write(folder.join("out"), &**kept).unwrap();
        }
        assert_eq!(fs::metadata(folder.join("out")).unwrap().len(), merged.length);
        Ok(merged)
    }

    /// The disk that was made.
    fn read(&self, folder: &Path) -> Vec<u8> {
        let out = fs::read(folder.join("out")).unwrap();
        if self.format == OutputFormat::Raw {
            return out;
        }
        let report = writer_ops::check(&out);
        assert!(report.corruptions() == 0 && report.leaks == 0, "{report:?}");
        writer_ops::read(&out)
    }
}

/// Damages the images, and merges them again.
fn attack(input: &mut Input<'_>, sources: &[Source], folder: &Path) {
    let wanted = Wanted::draw(input);
    for _ in 0..=input.below(8) {
        let path = &sources[input.below(sources.len() as u64) as usize].path;
        let mut image = fs::read(path).unwrap();
        let place = (if input.flag() { input.below(112) } else { input.below(image.len() as u64 + 1) }) as usize;
        let value = input.take(8);
        image.resize(image.len().max(place + value.len()), 0);
        image[place..place + value.len()].copy_from_slice(value);
        fs::write(path, image).unwrap();
    }
    let Ok(merged) = wanted.merge(sources, folder) else { return };
    // whatever came in, what comes out is sound
    if wanted.format != OutputFormat::Raw && merged.length < LONG {
        let out = FileStorage::open(&folder.join("out")).unwrap();
        let report = check(&out, &mut |_| ControlFlow::Continue(())).unwrap();
        assert!(report.corruptions() == 0 && report.leaks == 0, "{report:?}");
    }
}
