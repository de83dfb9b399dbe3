//! `qmprestore manifest`.

use std::collections::HashSet;
use std::path::Path;

use serde_json::Value;

use super::progress::Reporter;
use super::{args, place};
use crate::chain::{Chain, Disk, State, discover};
use crate::cli::console::Console;
use crate::cli::exit::Exit;
use crate::cli::failure::Failure;
use crate::cli::signals::{self, Patience};
use crate::errors;
use crate::errors::ErrorKind;
use crate::restore::{self, Describe, Described};

pub(super) fn run(arguments: &args::Manifest, console: &Console) -> Result<Exit, Failure> {
    signals::watch(Patience::Two)?;
    let filter = arguments.place.filter.as_deref();
    let mut inventory = discover(&arguments.place.dir)?;
    let _locks = if arguments.dry_run {
        Vec::new()
    } else {
        let chains = inventory.matching(filter)?.into_iter().flat_map(Disk::chains);
        let locks = restore::lock_folders(chains).map_err(Failure::Refused)?;
        // before they were locked, others may have changed them
        inventory = discover(&arguments.place.dir)?;
        locks
    };
    place::warn(&inventory, filter, console)?;
    let mut work = Work { arguments, console, made: 0, damaged: false };
    let reporter = Reporter::new(console, arguments.progress.progress_interval);
    reporter.follow(|| {
        let disks = inventory.matching(filter)?;
        let mut chains = disks.iter().flat_map(|disk| disk.chains().iter().map(move |chain| (*disk, chain)));
        chains.try_for_each(|(disk, chain)| work.chain(disk, chain, &reporter))
    })?;
    let exit = if work.damaged { Exit::Damaged } else { console.exit() };
    Ok(console.done_with(exit, &[]))
}

struct Work<'a> {
    arguments: &'a args::Manifest,
    console: &'a Console,
    /// Images that have got something.
    made: u64,
    /// Whether a chain is broken or damaged.
    damaged: bool,
}

impl Work<'_> {
    fn chain(&mut self, disk: &Disk, chain: &Chain, reporter: &Reporter<'_>) -> Result<(), Failure> {
        if let Some(reason) = self.doubt(disk, chain) {
            self.console.warning(&format!("nothing is made for a chain of {}: {reason}", disk.label()));
            return Ok(());
        }
        match self.describe(chain, reporter) {
            Err(error) if error.kind() == ErrorKind::Damaged => {
                self.damaged = true;
                let reason = errors::line(&error);
                self.console.warning(&format!("nothing is made for a chain of {}: {reason}", disk.label()));
                Ok(())
            }
            result => result.map_err(if self.made == 0 { Failure::Refused } else { Failure::HalfRebased }),
        }
    }

    /// Why it is not certain that the images of a chain belong together.
    fn doubt(&mut self, disk: &Disk, chain: &Chain) -> Option<String> {
        let images: HashSet<&Path> = chain.images().map(|image| image.path.as_path()).collect();
        let points = || disk.points().iter().filter(|point| images.contains(point.image().path.as_path()));
        let broken = points().find_map(|point| match point.state() {
            State::Broken(fault) => Some(format!("{} is broken: {fault}", point.image().display_name())),
            State::Sound | State::Doubtful(_) => None,
        });
        self.damaged |= broken.is_some();
        broken.or_else(|| {
            points().find_map(|point| match point.state() {
                State::Doubtful(doubt) => Some(format!("{} may lack changes: {doubt}", point.image().display_name())),
                State::Sound | State::Broken(_) => None,
            })
        })
    }

    fn describe(&mut self, chain: &Chain, reporter: &Reporter<'_>) -> restore::Result<()> {
        let describe = Describe::plan(chain, self.arguments.threads)?;
        describe.check(reporter)?;
        describe.images().iter().filter(|image| image.is_done()).for_each(|image| self.tell(image));
        if self.arguments.dry_run {
            describe.images().iter().filter(|image| !image.is_done()).for_each(|image| self.tell(image));
            return Ok(());
        }
        if describe.images().iter().all(Described::is_done) {
            return Ok(());
        }
        describe.run(reporter, |image| {
            self.made = self.made.saturating_add(1);
            self.tell(image);
        })
    }

    fn tell(&self, image: &Described) {
        let manifest = image.manifest.is_some().then_some("manifest");
        let made: Vec<&str> = manifest.into_iter().chain(image.checksums.then_some("checksums")).collect();
        let path = image.path.display();
        let verb = if self.arguments.dry_run { "would get" } else { "has got" };
        self.console.info(&match made.join(" and ") {
            made if made.is_empty() => format!("{path}: has both already"),
            made => format!("{path}: {verb} {made}"),
        });
        self.console.event(
            "manifest",
            &[
                ("path", image.path.to_string_lossy().into()),
                ("level", image.level.as_str().into()),
                ("time", image.time.into()),
                ("made", made.into_iter().map(Value::from).collect()),
                ("dry_run", self.arguments.dry_run.into()),
            ],
        );
    }
}
