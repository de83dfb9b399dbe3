//! Merge: one flattened image of a restore point, beside the chain and without changing it.

mod output;
mod read_back;
mod sink;

use std::fmt;
use std::io::{self, Write};
use std::num::{NonZeroU64, NonZeroUsize};
use std::path::{Path, PathBuf};

use self::output::{Destination, Target};
use crate::qcow2::{CompressionType, Geometry, Layout};
use crate::restore::check;
use crate::restore::copier::{Holes, Transfer};
use crate::restore::error::{Error, Result};
use crate::restore::layers::Layers;
use crate::restore::limiter::Limiter;
use crate::restore::observer::{Observer, Phase, Warning};
use crate::restore::plan::Plan;
use crate::restore::pool;
use crate::restore::salvage::{self, Losses};

/// How often a salvage begins anew where tables could be read when it was planned, and then not.
const ATTEMPTS: usize = 8;

/// What QEMU counts disks in.
const SECTOR: u64 = 512;

/// What to make of a restore point.
#[derive(Debug)]
#[expect(clippy::struct_excessive_bools, reason = "they are switches, independent of each other")]
pub struct MergeOptions {
    /// Where it goes.
    pub output: Output,
    /// What it is.
    pub format: OutputFormat,
    /// Threads, at most 256; all that the machine has by default. The output is the same for any number.
    pub threads: Option<NonZeroUsize>,
    /// Bytes of guest data in a second.
    pub rate_limit: Option<NonZeroU64>,
    /// Whether an existing output is replaced. Images that are merged never are; that it is no other file of a backup is
    /// for the caller to see to.
    pub replace: bool,
    /// Whether [`run`](Merge::run) and [`salvage`](Merge::salvage) read the output again and compare it with the images before
    /// it gets its name. What goes to a stream cannot be read again, which is a [warning](Warning::NotReadBack).
    pub read_back: bool,
    /// Whether compressed clusters that are [passed through](OutputFormat::Qcow2) are neither held against the image's
    /// checksums nor inflated to see whether they can be. Damage in their streams is then in the output, too.
    pub trust_streams: bool,
    /// Whether blocks of zeroes that the images hold as data become holes of a new file. All data is read then, also where the
    /// system could share it. Compressed images have such clusters as zeroes in any case, and devices get them written.
    pub detect_zeroes: bool,
}

impl MergeOptions {
    /// A new output, made on all processors, with none of the switches.
    #[must_use]
    pub fn new(output: Output, format: OutputFormat) -> Self {
        Self {
            output,
            format,
            threads: None,
            rate_limit: None,
            replace: false,
            read_back: false,
            trust_streams: false,
            detect_zeroes: false,
        }
    }
}

/// Where the output goes.
pub enum Output {
    /// A file that appears when it is whole, or a block device.
    File(PathBuf),
    /// Bytes in order: [`OutputFormat::Raw`] only.
    Stream(Box<dyn Write + Send>),
}

impl Output {
    /// What messages call it.
    fn name(&self) -> &Path {
        match self {
            Self::File(path) => path,
            Self::Stream(_) => Path::new("the output stream"),
        }
    }
}

impl fmt::Debug for Output {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::File(path) => f.debug_tuple("File").field(path).finish(),
            Self::Stream(_) => f.write_str("Stream"),
        }
    }
}

/// What the output is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OutputFormat {
    /// A qcow2 image, version 3.
    Qcow2 {
        /// Bytes in a cluster; as many as in one of the FULL by default.
        cluster_size: Option<u64>,
        /// Compressed with this codec, or plain. Clusters that are compressed with it already, and of that size, are
        /// passed through as they are.
        compression: Option<CompressionType>,
    },
    /// The disk's bytes.
    Raw,
}

/// A merge that is decided: what it reads, what it writes, how much.
#[derive(Debug)]
pub struct Merge {
    layers: Layers,
    options: MergeOptions,
    geometry: Geometry,
    plan: Plan,
    pool: rayon::ThreadPool,
}

/// What a merge has made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Merged {
    /// Bytes of the virtual disk. A qcow2 image of a raw one has the last sector of 512 bytes whole.
    pub size: u64,
    /// Guest bytes that were moved.
    pub bytes: u64,
    /// Bytes of the output: of a file its length.
    pub length: u64,
}

impl Merge {
    /// Reads the tables of all layers and decides everything. Nothing is written yet.
    ///
    /// # Errors
    /// What is wrong with the output or with the tables.
    pub fn plan(layers: Layers, options: MergeOptions, observer: &dyn Observer) -> Result<Self> {
        match &options.output {
            Output::File(path) => output::check(path, options.format, options.replace, &layers)?,
            Output::Stream(_) if options.format == OutputFormat::Raw => {}
            Output::Stream(_) => {
                let reason = "can take raw bytes only: a qcow2 image needs a file";
                return Err(Error::OutputKind { path: options.output.name().to_owned(), reason });
            }
        }
        let cluster_size = match options.format {
            OutputFormat::Qcow2 { cluster_size: Some(size), .. } => size,
            _ => layers.cluster_size(),
        };
        let geometry = Layers::geometry(cluster_size)?;
        let pool = pool::start(options.threads)?;
        layers.warnings().for_each(|warning| observer.warning(warning));
        observer.phase(Phase::Planning);
        let plan = pool.install(|| Plan::new(&layers, geometry, observer))?;
        let merge = Self { layers, options, geometry, plan, pool };
        merge.layout()?;
        if i64::try_from(merge.plan.size).is_err() {
            let path = merge.options.output.name().to_owned();
            return Err(Error::Write { path, source: io::ErrorKind::FileTooLarge.into() });
        }
        Ok(merge)
    }

    /// What will be moved.
    #[must_use]
    pub fn summary(&self) -> &Plan {
        &self.plan
    }

    /// Checks the tables of all images as `qemu-img check` does, in parallel. Lost space is no reason to stop, nor are
    /// refcounts of an image that says by its dirty bit that they may be wrong.
    ///
    /// # Errors
    /// [`Error::Damaged`], or what makes an image unreadable.
    pub fn check(&self, observer: &dyn Observer) -> Result<()> {
        let layers = self.layers.as_slice();
        self.pool.install(|| check::check_layers(layers, observer))
    }

    /// The images that will be read, oldest first.
    #[must_use]
    pub fn layers(&self) -> &Layers {
        &self.layers
    }

    /// Bytes in a cluster of the new image.
    #[must_use]
    pub fn cluster_size(&self) -> u64 {
        self.geometry.cluster_size()
    }

    /// The bytes that the output will have, or at most have where it is compressed.
    ///
    /// # Errors
    /// Where there can be no such image.
    pub fn length(&self) -> Result<u64> {
        Ok(self.layout()?.map_or(self.plan.size, |layout| layout.length()))
    }

    /// Makes the output. It is there when this returns, on stable storage, or it is not there at all.
    ///
    /// # Errors
    /// [`Error::ForSalvage`]; [`Error::Overwritten`]; what is wrong with an image, what the system says of the output, or
    /// [`Error::Cancelled`].
    pub fn run(self, observer: &dyn Observer) -> Result<Merged> {
        if self.layers.are_tolerant() {
            return Err(Error::ForSalvage);
        }
        self.execute(observer, |_, _| Ok(())).map(|(merged, ())| merged)
    }

    /// Makes the output, as far as images that were [opened for it](Layers::open_salvage) still hold it, and tells what they
    /// do not.
    ///
    /// # Errors
    /// [`Error::NotForSalvage`]; what the system says of the output, or [`Error::Cancelled`].
    pub fn salvage(self, observer: &dyn Observer) -> Result<(Merged, Losses)> {
        if !self.layers.are_tolerant() {
            return Err(Error::NotForSalvage);
        }
        self.execute(observer, salvage::list)
    }

    /// What is known to be lost before data was read: missing images, and what their tables do not tell.
    ///
    /// # Errors
    /// [`Error::Cancelled`].
    pub fn losses(&self, observer: &dyn Observer) -> Result<Losses> {
        let layers = &self.layers;
        self.pool.install(|| salvage::list(layers, observer))
    }

    /// Makes the output, and asks `last` before it gets its name.
    fn execute<T: Send>(
        self,
        observer: &dyn Observer,
        last: impl Fn(&Layers, &dyn Observer) -> Result<T> + Sync,
    ) -> Result<(Merged, T)> {
        let mut layout = self.layout()?;
        let Self { layers, options, geometry, mut plan, pool } = self;
        let MergeOptions { output, format, rate_limit, replace, read_back, trust_streams, detect_zeroes, .. } = options;
        let limiter = rate_limit.map(Limiter::new);
        let limiter = limiter.as_ref();
        let holes = if detect_zeroes { Holes::Made } else { Holes::Kept };
        let work = Transfer { layers: layers.as_slice(), limiter, observer, holes };
        observer.phase(Phase::Copying { bytes: plan.bytes });
        let copied = |error| layers.explained(error);
        let name = output.name().to_owned();
        let (length, last) = match output {
            Output::Stream(mut stream) => {
                if read_back {
                    observer.warning(Warning::NotReadBack);
                }
                let length = pool.install(|| sink::write_stream(&work, &plan, &name, &mut *stream));
                let length = length.map_err(copied)?;
                let last = pool.install(|| last(&layers, observer)).map_err(copied)?;
                layers.check_unchanged(observer)?;
                (length, last)
            }
            Output::File(path) => {
                let destination = output::open(&path, replace, &layers)?;
                let target = destination.target(&path);
                let mut attempts = 1;
                let length = loop {
                    let write =
                        || write_file(&work, &plan, layout.as_ref(), format, trust_streams, &destination, target);
                    match pool.install(write) {
                        // a table could not be read any more, which is remembered
                        Err(Error::Changed) if layers.are_tolerant() && attempts < ATTEMPTS => attempts += 1,
                        length => break length.map_err(copied)?,
                    }
                    destination.empty(target)?;
                    plan = pool.install(|| Plan::new(&layers, geometry, observer)).map_err(copied)?;
                    layout = lay_out(format, geometry, &layers, &plan)?;
                    observer.phase(Phase::Copying { bytes: plan.bytes });
                };
                observer.phase(Phase::Syncing);
                let compare = || read_back::check(&work, &plan, target, destination.format(format));
                let compared = if read_back { pool.install(compare) } else { Ok(()) };
                let last = compared.and_then(|()| pool.install(|| last(&layers, observer)));
                // before anything blames the disk of the output
                layers.check_unchanged(observer)?;
                let last = last?;
                output::finish(&path, destination, replace)?;
                (length, last)
            }
        };
        Ok((Merged { size: plan.size, bytes: plan.bytes, length }, last))
    }

    fn layout(&self) -> Result<Option<Layout>> {
        lay_out(self.options.format, self.geometry, &self.layers, &self.plan)
    }
}

/// The layout of a qcow2 image.
fn lay_out(format: OutputFormat, geometry: Geometry, layers: &Layers, plan: &Plan) -> Result<Option<Layout>> {
    let OutputFormat::Qcow2 { compression, .. } = format else { return Ok(None) };
    let codec = compression.unwrap_or(CompressionType::Deflate);
    // QEMU has the last sector of a raw disk whole, and of a qcow2 image leaves out what is less than a sector
    let size =
        if layers.is_raw() { plan.size.checked_next_multiple_of(SECTOR).unwrap_or(plan.size) } else { plan.size };
    Ok(Some(Layout::new(geometry, size, codec, plan.l2_tables, plan.clusters)?))
}

fn write_file(
    work: &Transfer<'_>,
    plan: &Plan,
    layout: Option<&Layout>,
    format: OutputFormat,
    trust_streams: bool,
    destination: &Destination,
    target: Target<'_>,
) -> Result<u64> {
    let whole = &Transfer { holes: Holes::None, ..*work };
    match (destination, layout, format) {
        (Destination::Device(_), _, _) => sink::write_device(whole, plan, target),
        (Destination::File(_), None, _) => sink::write_raw(work, plan, target),
        (Destination::File(_), Some(layout), OutputFormat::Qcow2 { compression: Some(_), .. }) => {
            sink::write_compressed(whole, plan, layout, trust_streams, target)
        }
        (Destination::File(_), Some(layout), _) => sink::write_qcow2(work, plan, layout, target),
    }
}
