//! An agent that is not there, does not answer or refuses costs a warning and no backup.

use std::os::unix::net::UnixListener;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::process::{Signal, kill_process};
use serde_json::json;

use super::clean::Found;
use super::fake_agent::{FakeAgent, Mood, Say, refusal};
use super::monitor::Monitor;
use super::spec::DiskSpec;
use super::tool::Tool;
use super::vm::Vm;
use crate::support::program::{Ended, event};

const SIZE: u64 = 8 << 20;
/// What the program asks before the moment and in it.
const USUAL: [&str; 3] = ["guest-info", "guest-fsfreeze-freeze", "guest-fsfreeze-thaw"];

struct Machine {
    vm: Vm,
    found: Found,
}

impl Machine {
    fn start(release: &'static str) -> Self {
        let mut vm = Vm::builder(release).disk(DiskSpec::new("disk.qcow2", SIZE)).start();
        std::fs::create_dir(vm.path("target")).unwrap();
        let found = Found::of(&mut vm);
        Self { vm, found }
    }

    fn backup(&self, more: &[&str]) -> Ended {
        self.run(&Tool::built("qmpbackup"), more)
    }

    fn run(&self, tool: &Tool, more: &[&str]) -> Ended {
        let path = |name: &str| self.vm.path(name).to_str().unwrap().to_owned();
        let (socket, target) = (path("qmp"), path("target"));
        let words = ["--socket", &socket, "backup", "--level", "auto", "--target", &target, "--quiesce"];
        tool.run(&[&words, more].concat())
    }

    fn with_agent(&self, agent: &Path, more: &[&str]) -> Ended {
        self.backup(&[&["--agent-socket", agent.to_str().unwrap()], more].concat())
    }

    fn recover(&self, more: &[&str]) -> Ended {
        let qmp = self.vm.socket();
        Tool::built("qmpbackup").run(&[&["--socket", qmp.to_str().unwrap(), "recover"], more].concat())
    }

    fn fake(&self, mood: Mood) -> FakeAgent {
        FakeAgent::start(&self.vm.path("fake"), mood)
    }

    fn status(&mut self) -> String {
        self.vm.monitor.execute("query-status", &json!({})).unwrap()["status"].as_str().unwrap().to_owned()
    }

    #[track_caller]
    fn assert_clean(&mut self) {
        let target = self.vm.path("target");
        self.found.assert_clean(&mut self.vm, &target);
    }
}

fn usual() -> Mood {
    Box::new(|_| Say::Usual)
}

/// Does something else with one command, the first so many times.
fn with(command: &'static str, mut times: usize, say: Say) -> Mood {
    Box::new(move |name| {
        if name != command || times == 0 {
            return Say::Usual;
        }
        times -= 1;
        say.clone()
    })
}

#[test]
fn without_an_agent_s_socket_there_is_a_warning() {
    for release in ["5.2", "10.0"] {
        let mut machine = Machine::start(release);
        machine.backup(&[]).with(3).says("file systems are not frozen").says("--quiesce needs --agent-socket");
        machine.assert_clean();
    }
}

#[test]
fn where_nobody_listens_there_is_a_warning() {
    let mut machine = Machine::start("10.0");
    let path = machine.vm.path("fake");
    for what in ["nothing", "a socket of nobody", "a file"] {
        machine.with_agent(&path, &[]).with(3).says("file systems are not frozen").says("cannot connect");
        machine.assert_clean();
        if what == "nothing" {
            drop(UnixListener::bind(&path).unwrap());
        } else {
            std::fs::remove_file(&path).unwrap();
            std::fs::write(&path, "").unwrap();
        }
    }
}

#[test]
fn an_agent_that_is_silent_is_waited_for_ten_seconds() {
    for release in ["5.2", "10.0"] {
        let mut machine = Machine::start(release);
        let agent = machine.fake(Box::new(|_| Say::Nothing));
        let started = Instant::now();
        let ended = machine.with_agent(&machine.vm.path("fake"), &["--json"]).with(3);
        let elapsed = started.elapsed();
        assert!(elapsed >= Duration::from_secs(10) && elapsed < Duration::from_secs(18), "{elapsed:?}");
        let events = ended.events();
        assert_eq!(event(&events, "moment")["file_systems"], json!(null));
        assert_eq!(agent.heard(), [""; 0]);
        ended.says("has not answered within 10s");
        machine.assert_clean();
    }
}

#[test]
fn a_queue_before_an_agent_s_socket_is_as_good_as_silence() {
    let mut machine = Machine::start("10.0");
    let listener = UnixListener::bind(machine.vm.path("fake")).unwrap();
    machine.with_agent(&machine.vm.path("fake"), &[]).with(3).says("another client is connected to its socket");
    drop(listener);
    machine.assert_clean();
}

#[test]
fn an_agent_that_refuses_to_freeze_is_quoted_and_told_to_thaw() {
    let mut machine = Machine::start("10.0");
    let agent = machine.fake(with("guest-fsfreeze-freeze", 1, refusal("a snapshot is no reason")));
    let ended = machine.with_agent(&machine.vm.path("fake"), &[]).with(3);
    ended.says("file systems are not frozen").says("a snapshot is no reason");
    assert_eq!(agent.heard(), USUAL);
    machine.assert_clean();
}

#[test]
fn an_agent_that_cannot_freeze_is_not_asked_to() {
    let mut machine = Machine::start("10.0");
    let commands =
        json!([{ "name": "guest-ping", "enabled": true }, { "name": "guest-fsfreeze-freeze", "enabled": false }]);
    let info = json!({ "return": { "version": "5.2.0", "supported_commands": commands } });
    let agent = machine.fake(with("guest-info", 1, Say::Other(info)));
    machine.with_agent(&machine.vm.path("fake"), &[]).with(3).says("the guest agent cannot freeze file systems");
    assert_eq!(agent.heard(), ["guest-info"]);
    machine.assert_clean();
}

#[test]
fn an_agent_that_freezes_and_does_not_say_so_is_told_to_thaw() {
    let mut machine = Machine::start("10.0");
    let agent = machine.fake(with("guest-fsfreeze-freeze", 1, Say::Nothing));
    machine
        .with_agent(&machine.vm.path("fake"), &["--timeout", "3"])
        .with(3)
        .says("freeze: the guest agent has not answered within 3s");
    assert_eq!((agent.heard().as_slice(), agent.is_frozen()), (&USUAL.map(str::to_owned)[..], false));
    machine.assert_clean();
}

#[test]
fn a_guest_may_take_longer_to_freeze_than_for_other_answers() {
    let mut machine = Machine::start("10.0");
    let agent = machine.fake(Box::new(|name| {
        if name == "guest-fsfreeze-freeze" {
            std::thread::sleep(Duration::from_secs(11));
        }
        Say::Usual
    }));
    machine.with_agent(&machine.vm.path("fake"), &[]).with(0).says("2 file systems were frozen for ");
    assert!(!agent.is_frozen());
    machine.assert_clean();
}

#[test]
fn nobody_waits_for_a_freeze_that_is_not_wanted_any_more() {
    let mut machine = Machine::start("10.0");
    let tool = Tool::built("qmpbackup");
    let victim = Arc::clone(&tool.victim);
    let agent = machine.fake(Box::new(move |name| {
        if name != "guest-fsfreeze-freeze" {
            return Say::Usual;
        }
        kill_process(victim.lock().unwrap().unwrap(), Signal::TERM).unwrap();
        Say::Nothing
    }));
    let started = Instant::now();
    let fake = machine.vm.path("fake");
    machine.run(&tool, &["--agent-socket", fake.to_str().unwrap()]).with(143).says("no image was made");
    assert!(started.elapsed() < Duration::from_secs(10), "{:?}", started.elapsed());
    assert!(agent.heard().starts_with(&USUAL.map(str::to_owned)) && !agent.is_frozen(), "{:?}", agent.heard());
    machine.assert_clean();
}

#[test]
fn a_guest_that_freezes_when_nobody_waits_for_it_any_more_is_thawed() {
    let machine = Machine::start("10.0");
    let tool = Tool::built("qmpbackup");
    let victim = Arc::clone(&tool.victim);
    let agent = machine.fake(Box::new(move |name| {
        if name == "guest-fsfreeze-freeze" {
            kill_process(victim.lock().unwrap().unwrap(), Signal::TERM).unwrap();
            std::thread::sleep(Duration::from_secs(24));
        }
        Say::Usual
    }));
    let fake = machine.vm.path("fake");
    machine.run(&tool, &["--agent-socket", fake.to_str().unwrap()]).with(143).says("the guest is perhaps not thawed");
    assert!(!agent.heard().contains(&"guest-fsfreeze-thaw".to_owned()), "it was faster");
    let until = Instant::now() + Duration::from_secs(20);
    while !agent.heard().contains(&"guest-fsfreeze-thaw".to_owned()) {
        assert!(Instant::now() < until, "{:?}", agent.heard());
        std::thread::sleep(Duration::from_millis(20));
    }
    std::thread::sleep(Duration::from_millis(200));
    assert!(!agent.is_frozen());
}

#[test]
fn what_stands_in_the_socket_from_before_changes_nothing() {
    let mut machine = Machine::start("10.0");
    let noise = b"{\"return\": \"frozen\"}\n\xff{\"return\": 7}\n{\"error\": {\"desc\": \"x\"}}\n\x1b[2Jlogin: {\"half";
    let agent = FakeAgent::start_noisy(&machine.vm.path("fake"), noise, usual());
    machine.with_agent(&machine.vm.path("fake"), &[]).with(0).says("2 file systems were frozen for ");
    assert_eq!((agent.heard().as_slice(), agent.is_frozen()), (&USUAL.map(str::to_owned)[..], false));
    machine.assert_clean();
}

#[test]
fn a_machine_that_stands_still_is_not_frozen() {
    let mut machine = Machine::start("10.0");
    machine.vm.monitor.execute("stop", &json!({})).unwrap();
    machine.found = Found::of(&mut machine.vm);
    let agent = machine.fake(usual());
    let ended = machine.with_agent(&machine.vm.path("fake"), &[]).with(3);
    ended.says("file systems are not frozen: the machine does not run");
    assert_eq!(agent.heard(), [""; 0]);
    machine.assert_clean();
}

#[test]
fn a_guest_that_is_not_thawed_at_first_is_thawed_while_its_disks_are_copied() {
    for say in [refusal("not yet"), Say::HangUp] {
        let mut machine = Machine::start("10.0");
        let device = machine.vm.device(0)["qdev"].as_str().unwrap().to_owned();
        assert_eq!(machine.vm.monitor.hmp(&format!("qemu-io -d {device} \"write -P 1 0 {SIZE}\"")), "");
        let agent = machine.fake(with("guest-fsfreeze-thaw", 2, say));
        let ended = machine.with_agent(&machine.vm.path("fake"), &["--speed-limit", "1M"]).with(3);
        let left = agent.last("guest-fsfreeze-thaw").elapsed();
        ended.says("the guest is perhaps not thawed");
        assert!(!agent.is_frozen() && left > Duration::from_secs(2), "{left:?} before the end");
        machine.assert_clean();
    }
}

#[test]
fn a_guest_that_cannot_be_thawed_has_its_backup_and_the_next_run_tries_again() {
    let mut machine = Machine::start("10.0");
    let path = machine.vm.path("fake");
    let agent = machine.fake(with("guest-fsfreeze-thaw", usize::MAX, refusal("stuck")));
    machine.with_agent(&path, &[]).with(3).says("the guest is perhaps frozen").says("stuck").says("the backup is done");
    // Frozen, an agent tells of no command that it could do
    machine.with_agent(&path, &[]).with(3).says("the guest is perhaps frozen").says("the backup is done");
    assert!(agent.is_frozen());
    let named = ["--agent-socket", path.to_str().unwrap()];
    machine.recover(&named).with(1).says("stuck");
    agent.set_mood(usual());
    machine.recover(&named).with(0).says("were frozen, and are thawed");
    assert!(!agent.is_frozen());
    machine.assert_clean();
    machine.with_agent(&path, &[]).with(0).says_not("put in order");
}

#[test]
fn where_the_agent_of_a_frozen_guest_is_stays_known_until_it_is_thawed() {
    for release in ["5.2", "10.0"] {
        let mut machine = Machine::start(release);
        let path = machine.vm.path("fake");
        let agent = machine.fake(with("guest-fsfreeze-thaw", usize::MAX, refusal("stuck")));
        machine.with_agent(&path, &[]).with(3).says("the guest is perhaps frozen").says("--agent-socket");
        let failed = machine.recover(&[]).with(1).says("the guest is perhaps frozen").says("stuck");
        failed.says("--agent-socket").says_not("all is in order");
        machine.backup(&[]).with(3).says("the guest is perhaps frozen").says("stuck").says("the backup is done");
        agent.set_mood(usual());
        machine.recover(&[]).with(0).says("were frozen, and are thawed").says("all is in order");
        assert!(!agent.is_frozen());
        machine.assert_clean();
    }
}

#[test]
fn an_agent_that_has_moved_is_found_where_the_command_line_says() {
    let mut machine = Machine::start("10.0");
    let (path, other) = (machine.vm.path("fake"), machine.vm.path("other"));
    let agent = machine.fake(with("guest-fsfreeze-thaw", usize::MAX, refusal("stuck")));
    machine.with_agent(&path, &[]).with(3);
    drop(agent);
    machine.recover(&[]).with(1).says("cannot connect").says(path.to_str().unwrap()).says("--agent-socket");
    let named = ["--agent-socket", other.to_str().unwrap()];
    machine.recover(&named).with(1).says(path.to_str().unwrap()).says(other.to_str().unwrap());
    let _agent = FakeAgent::start(&other, usual());
    machine.recover(&named).with(0).says("all is in order");
    machine.assert_clean();
}

#[test]
fn a_guest_that_is_not_thawed_while_its_disks_are_copied_is_thawed_before_the_run_ends() {
    let mut machine = Machine::start("10.0");
    let agent = machine.fake(with("guest-fsfreeze-thaw", 2, refusal("not yet")));
    let ended = machine.with_agent(&machine.vm.path("fake"), &["--remove-delay", "3"]).with(3);
    let left = agent.last("guest-fsfreeze-thaw").elapsed();
    ended.says("the guest is perhaps not thawed").says("were frozen, and are thawed");
    assert!(!agent.is_frozen() && left > Duration::from_secs(1), "{left:?} before the end");
    machine.assert_clean();
}

#[test]
fn a_machine_that_somebody_stops_stays_so_while_its_guest_may_be_frozen() {
    for release in ["5.2", "10.0"] {
        let mut machine = Machine::start(release);
        let device = machine.vm.device(0)["qdev"].as_str().unwrap().to_owned();
        assert_eq!(machine.vm.monitor.hmp(&format!("qemu-io -d {device} \"write -P 1 0 3M\"")), "");
        let mut other = Monitor::connect(&machine.vm.path("qmp2"));
        let mut thaws = 0;
        // Stopped while the run goes on that has let it go on itself
        let agent = machine.fake(Box::new(move |name| {
            if name != "guest-fsfreeze-thaw" {
                return Say::Usual;
            }
            thaws += 1;
            if thaws == 2 {
                other.execute("stop", &json!({})).unwrap();
            }
            refusal("stuck")
        }));
        let path = machine.vm.path("fake");
        let words = ["--pause", "--speed-limit", "1M"];
        machine.with_agent(&path, &words).with(3).says("the guest is perhaps frozen");
        assert_eq!(machine.status(), "paused", "{release}");
        machine.with_agent(&path, &words).with(3).says("the guest is perhaps frozen");
        assert_eq!(machine.status(), "paused", "{release}");
        machine.recover(&[]).with(1);
        assert_eq!(machine.status(), "paused", "{release}");
        agent.set_mood(usual());
        machine.recover(&[]).with(0);
        assert_eq!(machine.status(), "paused", "{release}");
        machine.vm.monitor.execute("cont", &json!({})).unwrap();
        machine.assert_clean();
    }
}
