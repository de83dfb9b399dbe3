//! The program is told to end, and QEMU refuses what it is asked for: it puts all in order itself, and says so.

use rustix::process::Signal;

use super::faults_hooks::{all, changing, while_copying};
use super::faults_scene::{Scene, Way};
use super::proxy::Action;
use crate::support::program::ending_signals;

const WHERE: [(&str, Way); 3] = [("10.0", Way::Fleece), ("10.0", Way::Plain), ("5.2", Way::Plain)];

/// A signal at each command that changes something. From the moment on that all is copied, the backup may be made.
fn signalled(signal: Signal, code: i32, step: usize) {
    for (release, way) in WHERE {
        let mut scene = Scene::new(release, way);
        for number in (0..).step_by(step) {
            let level = if number % 2 == 0 { "inc" } else { "full" };
            let told = scene.fault(&["--level", level], changing, number, &Action::KillBefore(signal));
            if told.at.is_none() {
                told.ended.with(0);
                assert!(number > 5);
                break;
            }
            if !told.copying || told.ended.code != Some(0) {
                told.ended.with(code).says("cancelled");
            }
            scene.assert_clean();
            scene.assert_continues(&[]);
        }
    }
}

#[test]
fn interrupted_at_any_command_it_leaves_all_in_order() {
    signalled(Signal::INT, 130, 1);
}

#[test]
fn terminated_at_any_command_it_leaves_all_in_order() {
    signalled(Signal::TERM, 143, 3);
}

#[test]
fn told_to_end_while_it_copies_it_does_not_copy_all() {
    for (release, way) in WHERE {
        let mut scene = Scene::new(release, way);
        for (signal, code) in ending_signals() {
            let hook = while_copying(move || Action::KillBefore(signal));
            // Ten minutes for the larger disk
            scene.run_with(&["--level", "full", "--speed-limit", "3K"], hook).with(code).says("cancelled");
            scene.assert_clean();
            scene.assert_continues(&[]);
        }
    }
}

/// QEMU refuses a command. When the images have their names already, or it is what brings order, the next run does the rest.
fn refused(release: &'static str, way: Way) {
    let mut scene = Scene::new(release, way);
    for number in 0.. {
        let level = if number % 2 == 0 { "inc" } else { "full" };
        let fail = Action::Fail("somebody is in the way".to_owned());
        let refused = scene.fault(&["--level", level], all, number, &fail);
        let Some(at) = refused.at else {
            refused.ended.with(0);
            assert!(number > 15, "{number} commands are no backup");
            return;
        };
        eprintln!("{release}, {way:?}, {number}: {at}");
        if at == "qom-get" {
            // what a device does not tell is not needed
            refused.ended.with(0);
        } else {
            refused.ended.fails(1).says("somebody is in the way");
        }
        if refused.copying {
            scene.recover(&[]).with(0);
        }
        scene.assert_clean();
        scene.assert_continues(&[]);
    }
}

#[test]
fn refused_any_command_it_fails_and_leaves_all_in_order_with_fleecing() {
    refused("10.0", Way::Fleece);
}

#[test]
fn refused_any_command_it_fails_and_leaves_all_in_order_without_fleecing() {
    refused("10.0", Way::Plain);
}

#[test]
fn refused_any_command_it_fails_and_leaves_all_in_order_with_an_old_qemu() {
    refused("5.2", Way::Plain);
}
