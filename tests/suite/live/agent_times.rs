//! How long a guest stands still. The limits are those of a machine that does much else; the medians are printed.

use std::time::Instant;

use super::quiesced::Quiesced;
use crate::support::program::event;
use crate::support::seeds;

const FROZEN_MS: f64 = 200.0;
const STOPPED_MS: f64 = 100.0;

fn median(mut numbers: Vec<f64>) -> f64 {
    numbers.sort_by(f64::total_cmp);
    numbers[numbers.len() / 2]
}

#[test]
fn a_guest_with_two_disks_stands_still_for_a_moment_only() {
    let machine = Quiesced::boot("10.0", 2);
    let (mut frozen, mut stopped, mut seconds) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..if seeds::are_many() { 20 } else { 5 } {
        let started = Instant::now();
        let events = machine.backup("qmp", "full", &["--json"]).with(0).events();
        seconds.push(started.elapsed().as_secs_f64());
        let moment = event(&events, "moment");
        frozen.push(moment["frozen_ms"].as_f64().unwrap());
        stopped.push(moment["stopped_ms"].as_f64().unwrap());
    }
    let (frozen, stopped, seconds) = (median(frozen), median(stopped), median(seconds));
    println!("medians: frozen for {frozen:.1} ms, stopped for {stopped:.1} ms, a FULL in {seconds:.2} s");
    assert!(frozen < FROZEN_MS && stopped < STOPPED_MS && stopped < frozen);
}
