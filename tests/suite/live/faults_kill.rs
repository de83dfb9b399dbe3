//! The program is killed at each of its commands, before QEMU gets it and after QEMU has done it.
//!
//! The usual run takes one release for each way; `QMPBACKUP_LONG=1` takes all of them and kills after questions, too.

use rustix::process::Signal;

use super::faults_hooks::{all, changing};
use super::faults_scene::{Scene, Way};
use super::proxy::Action;
use super::vm::{RELEASES, fleeces};

const BEFORE: Action = Action::KillBefore(Signal::KILL);
const AFTER: Action = Action::KillAfter(Signal::KILL);

fn is_long() -> bool {
    std::env::var_os("QMPBACKUP_LONG").is_some_and(|long| long != "0")
}

/// The usual release, or all that can do it.
fn releases(usual: &'static str, way: Way) -> Vec<&'static str> {
    let all = RELEASES.into_iter().filter(|release| way == Way::Plain || fleeces(release));
    if is_long() { all.collect() } else { vec![usual] }
}

/// Kills it at each command, puts in order what it has left in one of three ways, and backs up what is missing.
fn at_each_command(release: &'static str, way: Way, level: &str, action: &Action) {
    let mut scene = Scene::new(release, way);
    // A question changes nothing: whether it was answered makes no difference
    let counts = if *action == BEFORE || is_long() { all } else { changing };
    for number in 0.. {
        let killed = scene.fault(&["--level", level], counts, number, action);
        if killed.at.is_none() {
            killed.ended.with(0);
            assert!(number > 8, "{number} commands are no backup");
            return;
        }
        let context = format!("{release}, {way:?}, {level}, {action:?}, {number}: {:?}", killed.at);
        assert_eq!(killed.ended.code, None, "{context}: {:#?}", killed.ended);
        scene.write();
        let _told = Told(&context);
        let target = scene.target.to_str().unwrap().to_owned();
        match (number + level.len()) % 3 {
            0 => drop(scene.recover(&[]).with(0)),
            1 => drop(scene.recover(&["--target", &target]).with(0)),
            // The next run does it
            _ => {
                scene.assert_continues(&[]);
                continue;
            }
        }
        scene.assert_clean();
        scene.assert_continues(&[]);
    }
}

/// Tells where the fault was if the test fails.
struct Told<'a>(&'a str);

impl Drop for Told<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("{}", self.0);
        }
    }
}

fn at_each_command_of_all(usual: &'static str, way: Way, level: &str, action: &Action) {
    for release in releases(usual, way) {
        at_each_command(release, way, level, action);
    }
}

#[test]
fn killed_before_each_command_of_a_full_with_fleecing() {
    at_each_command_of_all("10.0", Way::Fleece, "full", &BEFORE);
}

#[test]
fn killed_after_each_command_of_a_full_with_fleecing() {
    at_each_command_of_all("10.0", Way::Fleece, "full", &AFTER);
}

#[test]
fn killed_before_each_command_of_an_inc_with_fleecing() {
    at_each_command_of_all("10.0", Way::Fleece, "inc", &BEFORE);
}

#[test]
fn killed_after_each_command_of_an_inc_with_fleecing() {
    at_each_command_of_all("10.0", Way::Fleece, "inc", &AFTER);
}

#[test]
fn killed_before_each_command_of_a_full_without_fleecing() {
    at_each_command_of_all("10.0", Way::Plain, "full", &BEFORE);
}

#[test]
fn killed_after_each_command_of_a_full_without_fleecing() {
    at_each_command_of_all("10.0", Way::Plain, "full", &AFTER);
}

#[test]
fn killed_before_each_command_of_an_inc_without_fleecing() {
    at_each_command_of_all("10.0", Way::Plain, "inc", &BEFORE);
}

#[test]
fn killed_after_each_command_of_an_inc_without_fleecing() {
    at_each_command_of_all("10.0", Way::Plain, "inc", &AFTER);
}

#[test]
fn killed_before_each_command_of_a_full_of_an_old_qemu() {
    at_each_command("5.2", Way::Plain, "full", &BEFORE);
}

#[test]
fn killed_after_each_command_of_a_full_of_an_old_qemu() {
    at_each_command("5.2", Way::Plain, "full", &AFTER);
}

#[test]
fn killed_before_each_command_of_an_inc_of_an_old_qemu() {
    at_each_command("5.2", Way::Plain, "inc", &BEFORE);
}

#[test]
fn killed_after_each_command_of_an_inc_of_an_old_qemu() {
    at_each_command("5.2", Way::Plain, "inc", &AFTER);
}
