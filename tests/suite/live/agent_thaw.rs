//! The guest is thawed, whatever happens while it is frozen.

use std::sync::Arc;

use rustix::process::Signal;

use super::proxy::{Action, Proxy};
use super::quiesced::{Quiesced, in_moment};

fn proxy(machine: &Quiesced, nth: usize, action: Action) -> Proxy {
    let victim = Arc::clone(&machine.tool.victim);
    Proxy::start(&machine.vm.path("proxy"), &machine.vm.socket(), &victim, in_moment(nth, action))
}

fn assert_thawed(machine: &mut Quiesced) {
    assert_eq!(machine.agent_status(), "thawed");
    machine.assert_writes_go_on();
    machine.assert_clean();
}

/// The program is killed before each of so many commands of the moment.
fn thawed_after_kill(release: &'static str, commands: usize) {
    let mut machine = Quiesced::boot(release, 1);
    machine.write();
    for nth in 0..commands {
        for recovers in [true, false] {
            let proxy = proxy(&machine, nth, Action::KillBefore(Signal::KILL));
            let killed = machine.backup("proxy", "auto", &[]);
            assert_eq!(killed.code, None, "{killed:#?}");
            proxy.end();
            // A machine that stands still has no agent that answers
            if nth == 0 {
                assert_eq!(machine.agent_status(), "frozen");
                machine.assert_writes_wait();
            }
            let next = if recovers { machine.recover() } else { machine.backup("qmp", "auto", &[]) };
            next.with(0).says("the guest's file systems were frozen, and are thawed");
            assert_thawed(&mut machine);
        }
    }
    machine.backup("qmp", "inc", &[]).with(0).says_not("put in order");
}

#[test]
fn a_killed_run_of_qemu_5_2_leaves_a_guest_that_the_next_one_thaws() {
    thawed_after_kill("5.2", 1);
}

#[test]
fn a_killed_run_of_qemu_10_0_leaves_a_guest_that_the_next_one_thaws() {
    thawed_after_kill("10.0", 3);
}

#[test]
fn a_command_that_fails_in_the_moment_leaves_no_guest_frozen() {
    let mut machine = Quiesced::boot("10.0", 1);
    machine.write();
    machine.backup("qmp", "full", &[]).with(0);
    for (nth, what) in ["stop", "qom-set", "cont"].into_iter().enumerate() {
        let proxy = proxy(&machine, nth, Action::Fail("not today".to_owned()));
        machine.backup("proxy", "inc", &[]).with(1).says(what).says("not today").says_not("image is in");
        assert_thawed(&mut machine);
        proxy.end();
        machine.backup("qmp", "inc", &[]).with(0).says_not("put in order");
    }
}

#[test]
fn a_monitor_that_stalls_in_the_moment_leaves_no_guest_frozen() {
    let mut machine = Quiesced::boot("10.0", 1);
    machine.write();
    machine.backup("qmp", "full", &[]).with(0);
    for (nth, action) in [(0, Action::Stall), (0, Action::LoseReply), (1, Action::LoseReply), (2, Action::Stall)] {
        let proxy = proxy(&machine, nth, action);
        machine.backup("proxy", "inc", &["--timeout", "2"]).with(5).says("2s");
        assert_thawed(&mut machine);
        proxy.end();
    }
    machine.backup("qmp", "inc", &[]).with(0).says_not("put in order");
}

#[test]
fn a_monitor_that_hangs_up_in_the_moment_leaves_the_rest_to_the_next_run() {
    let mut machine = Quiesced::boot("10.0", 1);
    machine.write();
    for nth in [0, 1] {
        let proxy = proxy(&machine, nth, Action::Close);
        machine.backup("proxy", "auto", &[]).with(5);
        proxy.end();
        machine.recover().with(0);
        assert_thawed(&mut machine);
    }
}

#[test]
fn a_guest_whose_agent_has_ended_is_backed_up_with_a_warning() {
    let mut machine = Quiesced::boot("10.0", 1);
    machine.write();
    machine.guest.run("kill $(cat /run/qemu-ga.pid)");
    let started = std::time::Instant::now();
    let warned = machine.backup("qmp", "full", &[]).with(3);
    warned.says("the guest's file systems are not frozen").says("has not answered within 10s");
    assert!(started.elapsed().as_secs() < 30, "{:?}", started.elapsed());
    machine.assert_writes_go_on();
    machine.assert_clean();
}
