//! Any system call may fail, once: the program ends, says so, and keeps its promises; or it did not matter, and all is right.
//!
//! [`ptrace`] has each system call of a small run stopped that is about something in the backup folder or at the place of
//! the output. Runs are counted first; then one call in each further run fails, or moves less than was asked. By default
//! the first and the last call of each kind are taken for each fault that matters most, one of them for the others, and of
//! what changes images each read, with `QMPBACKUP_LONG=1` all.
//!
//! Memory is no part of this: no file is mapped, which [`architecture`](crate::architecture) watches over, so that a file
//! that becomes shorter or a disk that breaks is an error of `pread` and never a SIGBUS.
//!
//! Only for x86-64: of other machines the registers have other names.

mod call;
mod ptrace;
mod scene;
mod traced;

use std::collections::BTreeMap;

use self::call::{Call, Fault};
use self::scene::{Scene, Tree};
use self::traced::{Plan, Position, run};
use crate::support::program::Ended;
use crate::support::seeds::are_many;

/// What a command does to the folder.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Does {
    /// It leaves it alone, and has only something to say.
    Looks,
    /// It makes what was not there, or replaces it, whole or not at all.
    Makes,
    /// It makes that of what can be read, and lists what cannot.
    Salvages,
    /// It changes images, and ends right when it is done again.
    Changes,
}

/// A command, and how it was disturbed.
struct Case<'a> {
    does: Does,
    scene: &'a Scene,
    position: &'a Position,
    fault: Fault,
}

/// How it ended, in a word.
type Class = &'static str;

impl Case<'_> {
    fn is(&self, call: Call) -> bool {
        self.position.call == call
    }

    fn judge(&self, ended: &Ended) -> Class {
        match ended.code {
            Some(0 | 3) => {
                let must_fail = self.position.call.is_essential() && !self.fault.is_harmless();
                assert!(!must_fail, "success, though it failed");
                self.judge_success(ended);
                let is_image = self.position.about.iter().any(|path| path.starts_with("backup/"));
                let is_unlocked = self.is(Call::Lock) && self.fault == Fault::Fails(libc::ENOLCK) && is_image;
                let is_told = ended.code == Some(3) && ended.stderr.contains("is not locked");
                let opens_layers = matches!(self.does, Does::Makes | Does::Salvages);
                assert!(!is_unlocked || !opens_layers || is_told, "nobody is told that there is no lock");
                if ended.code == Some(0) { "harmless" } else { "warned" }
            }
            Some(1 | 2 | 4 | 6 | 7) => {
                let said = ended.stdout.to_lowercase();
                let unreadable = ["unreadable", "failed"].iter().any(|word| said.contains(word));
                assert!(unreadable || ended.stderr.contains("ERROR"), "no error is told");
                let folder = self.scene.folder();
                let names = [folder.to_str().unwrap(), "made: ", "old: ", "new: ", "new/folder: "];
                assert!(unreadable || names.iter().any(|name| ended.stderr.contains(name)), "no file is named");
                let is_misread = self.is(Call::Read)
                    && ended.stderr.contains("cannot be written")
                    && !["cannot be read", "cannot read"].iter().any(|said| ended.stderr.contains(said));
                assert!(!is_misread, "what cannot be read is told as what cannot be written");
                let undurable = [&ended.stderr, &ended.stdout].iter().any(|said| said.contains("a power cut may undo"));
                let moves = matches!(self.position.call, Call::Write | Call::CopyRange | Call::Truncate | Call::Sync);
                assert!(!(moves && self.fault.is_full()) || undurable || ended.code == Some(7), "not told as full");
                assert!(!(moves && self.fault.is_harmless()), "no reason to fail");
                match self.does {
                    Does::Makes if undurable => {
                        assert!(self.is(Call::Sync) || self.is(Call::Open), "nothing was made");
                        self.judge_success(ended);
                        "done, with an error"
                    }
                    Does::Looks | Does::Makes | Does::Salvages => self.judge_failure(),
                    Does::Changes => self.judge_stop(ended),
                }
            }
            _ => panic!("no code that is known"),
        }
    }

    fn judge_success(&self, ended: &Ended) {
        match self.does {
            Does::Looks => {
                assert!(self.scene.tree() == self.scene.before, "something was changed");
                assert!(ended.code == Some(3) || ended.stdout == self.scene.said, "something else was said");
            }
            Does::Salvages if ended.code == Some(3) && !self.fault.is_harmless() => {
                let kinds = ["lost", "stale", "damaged", "manifest", "checksums", "is not locked", " is ignored"];
                let said = format!("{}{}", ended.stdout, ended.stderr);
                assert!(kinds.iter().any(|kind| said.contains(kind)), "no loss is told");
                let (is, after) = (self.scene.tree(), &self.scene.after);
                assert!(is.keys().eq(after.keys()), "{:?}", is.keys());
            }
            Does::Makes | Does::Salvages => {
                assert!(self.scene.tree() == self.scene.after, "what was made is not right");
            }
            Does::Changes => self.scene.assert_done(!self.fault.is_harmless()),
        }
    }

    /// Nothing is there that was not there before.
    fn judge_failure(&self) -> Class {
        let tree = self.scene.tree();
        if tree == self.scene.before {
            return "failed";
        }
        let left: Vec<_> = tree.keys().filter(|path| !self.scene.before.contains_key(*path)).collect();
        // whoever cannot remove anything leaves it
        assert!(self.is(Call::Unlink) || self.is(Call::RemoveFolder), "something is left: {left:?}");
        "failed to tidy up"
    }

    /// The work was not begun, or it can be ended, or is.
    fn judge_stop(&self, ended: &Ended) -> Class {
        self.scene.assert_images(true);
        let images = |mut tree: Tree| {
            tree.retain(|path, _| !path.iter().any(|name| name == ".qmpbackup"));
            tree
        };
        let untouched = images(self.scene.before.clone()) == images(self.scene.tree());
        let says_so = ended.stderr.contains("nothing was changed");
        assert!(untouched || !says_so, "something was changed");
        let again = Ended::of(&mut self.scene.command());
        let was_done = again.code == Some(2) && ended.stderr.contains("the work is done");
        assert!(was_done || matches!(again.code, Some(0 | 3)), "not again: {again:#?}");
        self.scene.assert_done(false);
        match (untouched, was_done) {
            (true, _) => "refused",
            (false, false) => "stopped and ended later",
            (false, true) => "done, with an error",
        }
    }
}

/// Which calls fail, and how.
fn chosen(does: Does, positions: &[Position]) -> Vec<(usize, Fault)> {
    let mut all: BTreeMap<(Call, Fault), Vec<usize>> = BTreeMap::new();
    for (number, position) in positions.iter().enumerate() {
        for fault in position.call.faults() {
            all.entry((position.call, fault)).or_default().push(number);
        }
    }
    let some = |call: Call, fault: Fault, numbers: Vec<usize>| match numbers.as_slice() {
        _ if are_many() => numbers,
        // of what is changed, some reads say what it was before
        _ if does == Does::Changes && (call, fault) == (Call::Read, Fault::Fails(libc::EIO)) => numbers,
        // what changes images takes longest to judge
        [.., last] if fault.is_harmless() || (does == Does::Changes && !call.is_essential()) => vec![*last],
        [first, .., last] => vec![*first, *last],
        _ => numbers,
    };
    let each = |((call, fault), numbers)| some(call, fault, numbers).into_iter().map(move |at| (at, fault));
    all.into_iter().flat_map(each).collect()
}

/// Does the command again and again, disturbed each time in another way.
fn disturb(does: Does, system: Plan, earlier: &[&[&str]], words: &[&str]) {
    let scene = Scene::new(earlier, words);
    let once = |fault| {
        scene.reset();
        run(&mut scene.command(), &scene.folder(), Plan { fault, ..system })
    };
    let counted = once(None);
    assert_eq!(counted.output.status.code(), Some(0));
    let positions = counted.positions;
    assert!(once(None).positions == positions, "each run is another one");
    assert!(positions.len() > 40, "only {} calls: {positions:#?}", positions.len());
    let mut classes: BTreeMap<Class, usize> = BTreeMap::new();
    let mut wrong = Vec::new();
    for (at, fault) in chosen(does, &positions) {
        let traced = once(Some((at, fault)));
        let position = traced.positions.last().unwrap();
        assert!(traced.positions == positions[..=at], "each run is another one");
        let ended = Ended::new(traced.output);
        let case = Case { does, scene: &scene, position, fault };
        let judged = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| case.judge(&ended)));
        *classes.entry(*judged.as_ref().unwrap_or(&"WRONG")).or_default() += 1;
        if judged.is_err() {
            let said = format!("{fault:?} at {at} of {}: {position:?}\n{ended:#?}", positions.len());
            eprintln!("that was {said}\n");
            wrong.push(said);
        }
    }
    let offloads = positions.iter().any(|position| position.call == Call::CopyRange);
    assert!(offloads || !system.shares_blocks, "nothing is left to the kernel");
    println!("{words:?}: {} calls, {classes:?}", positions.len());
    assert!(wrong.is_empty(), "{} are wrong, see above: {classes:?}", wrong.len());
    assert!(classes.len() > 1, "{classes:?}");
}

/// Of an image or folder whose sync fails nobody knows what has come to pass of it: the same command again syncs it once
/// more, also where it finds that nothing is left to write.
fn sync_again(earlier: &[&[&str]], words: &[&str], synced: &[&str]) {
    let scene = Scene::new(earlier, words);
    let once = |fault| run(&mut scene.command(), &scene.folder(), Plan { fault, ..USUAL });
    scene.reset();
    let positions = once(None).positions;
    let is_sync = |position: &Position| {
        let name = position.about.first().and_then(|path| path.rsplit('/').next()).unwrap_or_default();
        position.call == Call::Sync && (name.ends_with("-disk") || synced.contains(&name))
    };
    let syncs: Vec<_> = positions.iter().enumerate().filter(|(_, position)| is_sync(position)).collect();
    assert!(!syncs.is_empty(), "{positions:#?}");
    for (at, position) in syncs {
        scene.reset();
        let failed = once(Some((at, Fault::Fails(libc::EIO)))).output;
        assert_ne!(failed.status.code(), Some(0), "{words:?}, {at}: {position:?}, {failed:?}");
        let again = once(None);
        assert_eq!(again.output.status.code(), Some(0), "{at}: {position:?}");
        assert!(again.positions.contains(position), "{at}: {position:?}");
    }
}

#[test]
fn what_could_not_be_synced_is_synced_when_it_is_done_again() {
    let commit: &[&str] = &["commit", "--until", "INC-1700000100"];
    let folders = ["disk0", ".qmpbackup"];
    sync_again(&[&["rebase"]], commit, &[]);
    sync_again(&[&["rebase"], &["manifest"]], commit, &[]);
    sync_again(&[&["rebase"]], &["snapshotrebase", "--until", "INC-1700000100"], &[]);
    sync_again(&[], &["rebase"], &folders);
    sync_again(&[&["manifest"]], &["rebase"], &folders);
    sync_again(&[], &["check", "--repair", "all"], &folders);
    sync_again(&[&["manifest"]], &["check", "--repair", "all"], &folders);
}

const USUAL: Plan = Plan { fault: None, all_are_named: false, shares_blocks: false };
const NAMED: Plan = Plan { all_are_named: true, ..USUAL };
const SHARING: Plan = Plan { shares_blocks: true, ..USUAL };

/// The table: a test, what the command does, where, what comes before it, and the command.
macro_rules! disturbed {
    ($($name:ident: $does:ident, $system:expr, [$($earlier:expr),*], $words:expr;)+) => {
        $(
            #[test]
            fn $name() {
                disturb(Does::$does, $system, &[$(&$earlier),*], &$words);
            }
        )+
    };
}

disturbed! {
    a_merge_to_qcow2: Makes, USUAL, [], ["merge", "--out", "new/folder/made"];
    a_merge_to_qcow2_where_all_files_have_names: Makes, NAMED, [], ["merge", "--out", "new/folder/made"];
    a_merge_to_qcow2_where_blocks_can_be_shared: Makes, SHARING, [], ["merge", "--out", "new/folder/made"];
    a_merge_to_raw: Makes, USUAL, [], ["merge", "--format", "raw", "--out", "made"];
    a_compressed_merge: Makes, USUAL, [], ["merge", "--compress", "--out", "new/made"];
    a_merge_over_an_output: Makes, USUAL, [], ["merge", "--force", "--out", "old"];
    a_merge_over_an_output_where_all_files_have_names: Makes, NAMED, [], ["merge", "--force", "--out", "old"];
    a_commit: Changes, USUAL, [], ["commit"];
    a_commit_where_all_files_have_names: Changes, NAMED, [], ["commit"];
    a_commit_where_blocks_can_be_shared: Changes, SHARING, [], ["commit"];
    a_commit_of_a_part_of_a_rebased_chain: Changes, USUAL, [["rebase"]], ["commit", "--until", "INC-1700000100"];
    a_rebase: Changes, USUAL, [], ["rebase"];
    a_snapshotrebase: Changes, USUAL, [], ["snapshotrebase"];
    a_snapshotrebase_of_a_rebased_chain: Changes, USUAL, [["rebase"]], ["snapshotrebase"];
    a_merge_that_verifies: Makes, USUAL, [], ["merge", "--verify", "--out", "new/made"];
    a_merge_to_a_stream: Looks, USUAL, [], ["merge", "--format", "raw", "--out", "-"];
    a_salvage: Salvages, USUAL, [], ["merge", "--salvage", "--out", "new/made"];
    a_repair: Changes, USUAL, [], ["check", "--repair", "all"];
    a_manifest: Changes, USUAL, [], ["manifest"];
    a_verify: Looks, USUAL, [], ["verify"];
    a_check: Looks, USUAL, [], ["check"];
    a_check_in_json: Looks, USUAL, [], ["check", "--json"];
    a_list: Looks, USUAL, [], ["list"];
}
