//! File systems that a run has frozen are thawed, whatever becomes of it. The agent here has no guest: it only remembers
//! whether it was told to freeze.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use rustix::process::Signal;
use serde_json::{Value, json};

use super::faults_hooks::changing;
use super::faults_scene::{Scene, Way};
use super::proxy::Action;

const OLD: (&str, Way) = ("5.2", Way::Plain);
const NEW: (&str, Way) = ("10.0", Way::Fleece);

#[derive(Default)]
struct State {
    frozen: AtomicBool,
    /// How often it was frozen.
    freezes: AtomicUsize,
    /// So many thaws have no effect and no answer.
    deaf: AtomicUsize,
    ended: AtomicBool,
    client: Mutex<Option<UnixStream>>,
}

struct Agent {
    path: PathBuf,
    state: Arc<State>,
}

impl Agent {
    fn listen(path: &Path) -> Self {
        let listener = UnixListener::bind(path).unwrap();
        let state = Arc::new(State::default());
        let served = Arc::clone(&state);
        std::thread::spawn(move || {
            while let Ok((client, _)) = listener.accept() {
                if served.ended.load(Ordering::Relaxed) {
                    break;
                }
                *served.client.lock().unwrap() = Some(client.try_clone().unwrap());
                serve(&client, &served);
            }
        });
        Self { path: path.to_owned(), state }
    }

    fn is_frozen(&self) -> bool {
        self.state.frozen.load(Ordering::Relaxed)
    }

    fn freezes(&self) -> usize {
        self.state.freezes.load(Ordering::Relaxed)
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        self.state.ended.store(true, Ordering::Relaxed);
        if let Ok(Some(client)) = self.state.client.lock().as_deref() {
            let _ = client.shutdown(std::net::Shutdown::Both);
        }
        let _ = UnixStream::connect(&self.path);
    }
}

fn serve(mut client: &UnixStream, state: &State) {
    for line in BufReader::new(client).split(b'\n').map_while(Result::ok) {
        let line: Vec<u8> = line.into_iter().filter(|byte| *byte != 0xff).collect();
        let command: Value = serde_json::from_slice(&line).unwrap();
        let mut before: &[u8] = b"";
        let answer = match command["execute"].as_str().unwrap() {
            "guest-sync-delimited" => {
                before = b"\xff";
                command["arguments"]["id"].clone()
            }
            "guest-info" => {
                let named = |name: &str| json!({ "name": format!("guest-fsfreeze-{name}"), "enabled": true });
                let all: Vec<Value> = ["status", "freeze", "thaw"].map(named).into();
                json!({ "supported_commands": all })
            }
            "guest-fsfreeze-status" => (if state.frozen.load(Ordering::Relaxed) { "frozen" } else { "thawed" }).into(),
            "guest-fsfreeze-freeze" => {
                assert!(!state.frozen.swap(true, Ordering::Relaxed), "it is frozen already");
                state.freezes.fetch_add(1, Ordering::Relaxed);
                2.into()
            }
            "guest-fsfreeze-thaw" => {
                if state.deaf.load(Ordering::Relaxed) > 0 {
                    state.deaf.fetch_sub(1, Ordering::Relaxed);
                    continue;
                }
                state.frozen.store(false, Ordering::Relaxed);
                2.into()
            }
            other => panic!("{other}"),
        };
        let _ = client.write_all(&[before, format!("{}\n", json!({ "return": answer })).as_bytes()].concat());
    }
}

/// Does something at each command that changes something, of a backup that freezes. Puts in order what is left then, if
/// the action leaves something.
fn frozen_at_each_command(places: &[(&'static str, Way)], action: &Action, leaves: bool) {
    for &(release, way) in places {
        let mut scene = Scene::new(release, way);
        let agent = Agent::listen(&scene.vm.path("fake-agent"));
        let socket = agent.path.to_str().unwrap().to_owned();
        let quiesce = ["--quiesce", "--agent-socket", &socket];
        let mut found_frozen = 0;
        for number in 0.. {
            let fault = scene.fault(&[&["--level", "inc"], &quiesce[..]].concat(), changing, number, action);
            if fault.at.is_none() {
                fault.ended.with(0);
                break;
            }
            scene.write();
            found_frozen += usize::from(agent.is_frozen());
            // Where the agent is, the journal says, too
            match number % 3 {
                _ if !leaves && !fault.copying => {}
                0 => drop(scene.recover(&[]).with(0)),
                1 => drop(scene.recover(&quiesce[1..]).with(0)),
                _ => drop(scene.run(&["--level", "inc"]).with(0)),
            }
            assert!(!agent.is_frozen(), "{release}, {number}: {:?}", fault.at);
            scene.assert_clean();
            scene.assert_continues(if number % 2 == 0 { &quiesce } else { &[] });
            assert!(!agent.is_frozen());
        }
        assert!(agent.freezes() > 5);
        assert_eq!(found_frozen > 0, leaves, "{release}: it was frozen {found_frozen} times");
    }
}

#[test]
fn what_was_frozen_when_it_was_killed_is_thawed() {
    frozen_at_each_command(&[OLD, NEW], &Action::KillBefore(Signal::KILL), true);
}

#[test]
fn what_was_frozen_when_it_was_told_to_end_is_thawed() {
    frozen_at_each_command(&[NEW], &Action::KillBefore(Signal::INT), false);
}

#[test]
fn what_was_frozen_when_qemu_refused_a_command_is_thawed() {
    frozen_at_each_command(&[OLD], &Action::Fail("no".to_owned()), false);
}

#[test]
fn an_agent_that_does_not_thaw_at_first_is_told_again() {
    let mut scene = Scene::new("10.0", Way::Fleece);
    let agent = Agent::listen(&scene.vm.path("fake-agent"));
    agent.state.deaf.store(1, Ordering::Relaxed);
    scene.write();
    let words = ["--level", "inc", "--quiesce", "--agent-socket", agent.path.to_str().unwrap()];
    scene.run(&words).with(3).says("the guest is perhaps not thawed");
    assert!(!agent.is_frozen());
    assert_eq!(agent.freezes(), 1);
    scene.assert_clean();
    scene.assert_continues(&[]);
}
