//! The monitor serves somebody else, or does not answer any more.

use std::time::{Duration, Instant};

use rustix::process::Signal;
use serde_json::{Value, json};

use super::faults_hooks::{changing, while_copying};
use super::faults_scene::{Scene, Way};
use super::monitor::Monitor;
use super::proxy::{Action, Hook};

const WHERE: [(&str, Way); 3] = [("5.2", Way::Plain), ("10.0", Way::Fleece), ("11", Way::Fleece)];
/// A few commands may be waited for: the one that has no answer, and those that would bring order.
const AT_MOST: Duration = Duration::from_secs(15);

#[test]
fn a_monitor_that_serves_somebody_else_is_not_waited_for() {
    for (release, way) in WHERE {
        let mut scene = Scene::new(release, way);
        let busy = Monitor::connect(&scene.vm.socket());
        let started = Instant::now();
        let words = ["--level", "inc", "--timeout", "0.5"];
        scene.run(&words).with(5).says("somebody else is probably connected").says("the machine was not touched");
        scene.recover(&["--timeout", "0.5"]).with(5);
        assert!(started.elapsed() < AT_MOST);
        drop(busy);
        scene.assert_clean();
        scene.assert_continues(&[]);
    }
}

/// From a command on, of those that change something, nothing has an answer, done or not.
fn silent_from(number: usize, silence: Action) -> Hook {
    let mut count = 0;
    Box::new(move |command: &Value, _| {
        let is_change = changing(command["execute"].as_str().unwrap());
        let silent = count > number || (count == number && is_change);
        count += usize::from(is_change);
        if silent { silence.clone() } else { Action::Forward }
    })
}

fn falls_silent(release: &'static str, way: Way, silence: &Action) {
    let mut scene = Scene::new(release, way);
    for number in 0.. {
        let level = if number % 2 == 0 { "inc" } else { "full" };
        let started = Instant::now();
        let words = ["--level", level, "--timeout", "0.3"];
        let ended = scene.run_with(&words, silent_from(number, silence.clone()));
        assert!(started.elapsed() < AT_MOST, "{:?}: {ended:#?}", started.elapsed());
        if ended.code == Some(0) {
            assert!(number > 5);
            return;
        }
        ended.fails(5).says("has not answered within 300ms").says("the next run or `qmpbackup recover`");
        // The monitor itself is as good as ever
        if number % 3 == 0 {
            scene.recover(&[]).with(0);
            scene.assert_clean();
        }
        scene.assert_continues(&[]);
    }
}

#[test]
fn a_monitor_that_falls_silent_with_fleecing_is_given_up_in_time() {
    falls_silent("10.0", Way::Fleece, &Action::Stall);
}

#[test]
fn a_monitor_that_falls_silent_with_an_old_qemu_is_given_up_in_time() {
    falls_silent("5.2", Way::Plain, &Action::Stall);
}

#[test]
fn a_monitor_whose_answers_are_lost_with_fleecing_is_given_up_in_time() {
    falls_silent("11", Way::Fleece, &Action::LoseReply);
}

#[test]
fn a_monitor_whose_answers_are_lost_without_fleecing_is_given_up_in_time() {
    falls_silent("7.2", Way::Plain, &Action::LoseReply);
}

#[test]
fn a_connection_that_ends_costs_one_run() {
    for (release, way) in WHERE {
        let mut scene = Scene::new(release, way);
        for number in (0..).step_by(2) {
            let closed = scene.fault(&["--level", "inc"], changing, number, &Action::Close);
            if closed.at.is_none() {
                closed.ended.with(0);
                break;
            }
            // it connects once more, and puts in order what it can
            let is_done = closed.ended.stderr.contains("the backup is done");
            let ended = closed.ended.with(if is_done { 0 } else { 5 });
            if !is_done {
                ended.says("the next run or `qmpbackup recover`");
            }
            scene.assert_clean();
            scene.assert_continues(&[]);
        }
        // Not even a signal is too early for the next run
        scene.run_with(&["--level", "inc"], while_copying(|| Action::KillAfter(Signal::KILL)));
        scene.assert_continues(&[]);
    }
}

/// QEMU writes its disks back before it says that the machine is stopped, and `cont` is lost with the connection.
#[test]
fn a_machine_that_is_slow_to_stop_is_waited_for_until_it_goes_on() {
    let mut scene = Scene::new("10.0", Way::Fleece);
    let slow = Box::new(|command: &Value, _| {
        if command["execute"] == "stop" {
            std::thread::sleep(Duration::from_secs(9));
        }
        Action::Forward
    });
    let ended = scene.run_with(&["--level", "inc", "--timeout", "1"], slow);
    ended.fails(5).says("waiting for it, 10s at most").says("cont: QEMU has not answered").says("the next run or");
    scene.assert_clean();
    scene.assert_continues(&[]);
}

#[test]
fn a_machine_that_somebody_lets_go_on_within_the_moment_gets_no_torn_restore_point() {
    for (release, is_paused) in [("10.0", false), ("11", false), ("11", true)] {
        let mut scene = Scene::new(release, Way::Fleece);
        let mut other = Monitor::connect(&scene.vm.path("qmp2"));
        if is_paused {
            other.execute("stop", &json!({})).unwrap();
        }
        let mut count = 0;
        let hook: Hook = Box::new(move |command: &Value, _| {
            count += usize::from(command["execute"] == "qom-set");
            if command["execute"] == "qom-set" && count == 2 {
                other.execute("cont", &json!({})).unwrap();
                if is_paused {
                    other.execute("stop", &json!({})).unwrap();
                }
            }
            Action::Forward
        });
        scene.run_between(&["--level", "inc"], hook).with(1).says("the machine has come into state running just now");
        if is_paused {
            scene.vm.monitor.execute("cont", &json!({})).unwrap();
        }
        scene.assert_clean();
        scene.assert_continues(&[]);
    }
}
