//! Machines that do not run, and monitors on TCP.

use std::net::TcpListener;

use serde_json::json;

use super::field::Field;
use super::field_setup::{Setup, releases};

fn both(field: &mut Field) {
    for (level, made) in [("full", "FULL"), ("inc", "INC")] {
        field.scribble("disk0");
        field.makes(&format!("--level {level}"), 0, &format!("disk0 {made}"));
    }
    field.verify();
}

#[test]
fn a_machine_that_waits_for_its_start_is_backed_up_and_waits_on() {
    for release in releases(&["5.2", "10.0"]) {
        let mut field = Setup::of(release).disk("disk0").prelaunch().start();
        both(&mut field);
        assert_eq!(field.execute("query-status", &json!({}))["status"], "prelaunch");
    }
}

#[test]
fn a_paused_machine_stays_paused() {
    for release in releases(&["7.2", "10.0"]) {
        let mut field = Setup::of(release).disk("disk0").start();
        field.execute("stop", &json!({}));
        field.stays();
        both(&mut field);
        field.backup("--level inc --pause", 0);
        assert_eq!(field.execute("query-status", &json!({}))["status"], "paused");
    }
}

#[test]
fn a_running_machine_runs_on() {
    for release in releases(&["10.0"]) {
        let mut field = Setup::of(release).disk("disk0").start();
        both(&mut field);
        field.backup("--level inc --pause", 0);
        assert_eq!(field.execute("query-status", &json!({}))["status"], "running");
    }
}

#[test]
fn a_monitor_may_be_on_tcp() {
    for release in releases(&["5.2", "10.0"]) {
        let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let words = format!("-qmp tcp:127.0.0.1:{port},server=on,wait=off");
        let mut field = Setup::of(release).disk("disk0").words(&words).start();
        for (level, made) in [("full", "FULL"), ("inc", "INC")] {
            field.scribble("disk0");
            // The last word of a kind counts
            field.makes(&format!("--level {level} --socket tcp:127.0.0.1:{port}"), 0, &format!("disk0 {made}"));
        }
        field.verify();
    }
}
