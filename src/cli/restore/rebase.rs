//! `qmprestore rebase`.

use serde_json::{Value, json};

use super::progress::Reporter;
use super::{args, by_hand, place};
use crate::chain::{ChecksumsError, Clock, RestorePoint, discover};
use crate::cli::console::Console;
use crate::cli::exit::Exit;
use crate::cli::failure::Failure;
use crate::cli::signals::{self, Patience};
use crate::cli::text::file_name;
use crate::restore::{self, Based, Layers, Rebase};

pub(super) fn run(arguments: &args::Rebase, console: &Console) -> Result<Exit, Failure> {
    signals::watch(Patience::Two)?;
    let inventory = discover(&arguments.place.dir)?;
    place::warn(&inventory, arguments.place.filter.as_deref(), console)?;
    let disk = inventory.disk_by_whole_name(arguments.place.filter.as_deref())?;
    let selected = disk.select_of_chain(&arguments.until, &Clock::system(), arguments.allow_partial);
    let point = selected.map_err(place::not_selected)?;
    if let Some(doubt) = &point.doubt {
        console.warning(&format!("{} may lack changes: {doubt}", point.name()));
    }
    if arguments.rate_limit > 0 {
        console.debug("--rate-limit has no effect: no data moves");
    }
    let reporter = Reporter::new(console, arguments.progress.progress_interval);
    reporter.follow(|| {
        let layers = Layers::open_point(&point, None, false).map_err(Failure::Refused)?;
        let rebase = Rebase::plan(layers, &reporter).map_err(Failure::Refused)?;
        let commands = by_hand::rebase(&rebase, &arguments.place);
        planned(arguments, &point, &rebase, &commands, console);
        if !arguments.skip_check {
            rebase.check(&reporter).map_err(Failure::Refused)?;
        }
        if arguments.dry_run {
            return if console.is_json() { Ok(()) } else { print(&point, &rebase, commands, console) };
        }
        change(rebase, &reporter, console)
    })?;
    Ok(console.done(&[]))
}

fn change(rebase: Rebase, reporter: &Reporter<'_>, console: &Console) -> Result<(), Failure> {
    let link = rebase.link().clone();
    let (link_path, target) = (link.path.display().to_string(), link.target.display().to_string());
    if rebase.is_done() {
        rebase.sync().map_err(Failure::HalfRebased)?;
        console.info(&format!("done already: {link_path} leads to {target}, and each INC names the image before it"));
        return Ok(());
    }
    for image in rebase.images().iter().filter(|image| image.done) {
        console.debug(&format!("{}: names {} already", image.path.display(), image.backing));
    }
    let mut changed = 0_u64;
    let result = rebase.run(reporter, |image| {
        changed = changed.saturating_add(1);
        console.info(&format!("{} is based on {}", file_name(&image.path), image.backing));
        console.event(
            "rebased",
            &[("path", image.path.to_string_lossy().into()), ("backing", image.backing.clone().into())],
        );
    });
    result.map_err(|error| match error {
        // a change that fails may be there all the same
        restore::Error::Image { .. }
        | restore::Error::Write { .. }
        | restore::Error::Read { .. }
        | restore::Error::Checksums(ChecksumsError::Io { .. }) => Failure::HalfRebased(error),
        error if changed > 0 => Failure::HalfRebased(error),
        error => Failure::Refused(error),
    })?;
    if !link.done {
        console.event("link", &[("path", link_path.clone().into()), ("target", target.clone().into())]);
    }
    console.info(&format!("{link_path} leads to {target}"));
    Ok(())
}

fn planned(arguments: &args::Rebase, point: &RestorePoint, rebase: &Rebase, commands: &[String], console: &Console) {
    let image =
        |image: &Based| json!({ "path": image.path.to_string_lossy(), "backing": image.backing, "done": image.done });
    let images: Value = rebase.images().iter().map(image).collect();
    let link = rebase.link();
    console.event(
        "plan",
        &[
            ("disk", point.disk.clone().into()),
            ("restore_point", point.name().into()),
            ("time", point.time.into()),
            ("images", images),
            (
                "link",
                json!({
                    "path": link.path.to_string_lossy(),
                    "target": link.target.to_string_lossy(),
                    "done": link.done,
                }),
            ),
            ("dry_run", arguments.dry_run.into()),
            ("commands", commands.into()),
        ],
    );
}

fn print(point: &RestorePoint, rebase: &Rebase, commands: Vec<String>, console: &Console) -> Result<(), Failure> {
    let mut lines = vec![
        format!("disk           {}", point.disk),
        format!("restore point  {}, {}", point.name(), place::local_time(point.time)),
    ];
    let done = |done| if done { ", as it is already" } else { "" };
    for image in rebase.images() {
        lines.push(format!(
            "image          {} is based on {}{}",
            file_name(&image.path),
            image.backing,
            done(image.done)
        ));
    }
    let link = rebase.link();
    lines.push(format!("link           {} leads to {}{}", link.path.display(), link.target.display(), done(link.done)));
    if !commands.is_empty() {
        lines.push("the same by hand".to_owned());
    }
    lines.extend(commands.into_iter().map(|command| format!("  {command}")));
    console.result(&lines)
}
