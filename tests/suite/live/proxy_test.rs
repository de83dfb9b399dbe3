//! The man in the middle does what hooks tell him, and nothing else.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use rustix::process::Signal;
use serde_json::{Value, json};

use super::monitor::Monitor;
use super::proxy::{Action, Proxy, Victim};
use super::tool::Tool;
use super::transcript::Entry;
use super::vm::{RELEASES, Vm};

const SHORT: Duration = Duration::from_millis(300);

fn proxy(vm: &Vm, victim: &Victim, at: &'static str, action: Action) -> Proxy {
    let hook = move |command: &Value, _| if command["execute"] == at { action.clone() } else { Action::Forward };
    Proxy::start(&vm.path("proxy"), &vm.socket(), victim, Box::new(hook))
}

fn status(vm: &mut Vm) -> String {
    let status = vm.monitor.execute("query-status", &json!({})).unwrap();
    status["status"].as_str().unwrap().to_owned()
}

/// Waits until the machine is paused or running.
fn becomes(vm: &mut Vm, wanted: &str) {
    for _ in 0..1000 {
        if status(vm) == wanted {
            return;
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    panic!("it does not become {wanted}");
}

#[test]
fn one_client_after_the_other_gets_its_answers_and_events() {
    for release in RELEASES {
        let mut vm = Vm::builder(release).start();
        let proxy = proxy(&vm, &Victim::default(), "none", Action::Forward);
        for run in 1..=3 {
            let mut client = Monitor::connect(proxy.path());
            client.execute("stop", &json!({})).unwrap();
            becomes(&mut vm, "paused");
            client.execute("cont", &json!({})).unwrap();
            let error = client.execute("no-such-command", &json!({})).unwrap_err();
            assert_eq!(error["class"], "CommandNotFound");
            let events: Vec<&Value> = client.events.iter().map(|event| &event["event"]).collect();
            assert_eq!(events, ["STOP", "RESUME"]);
            let transcript = proxy.transcript();
            assert_eq!(transcript.commands(), ["qmp_capabilities", "stop", "cont", "no-such-command"]);
            let count = |what: fn(&Entry) -> bool| transcript.0.iter().filter(|entry| what(entry)).count();
            assert_eq!(count(|entry| *entry == Entry::Connected), run);
            assert_eq!(count(|entry| matches!(entry, Entry::Reply(_))), 4 * run);
            assert_eq!(count(|entry| matches!(entry, Entry::Event(_))), 2 * run);
        }
        proxy.end();
    }
}

#[test]
fn a_hook_sees_each_command_and_its_number_before_qemu_does() {
    let mut vm = Vm::builder("10.0").start();
    let (sender, seen) = std::sync::mpsc::channel();
    let mut look = Monitor::connect(&vm.path("hand"));
    let hook = move |command: &Value, number| {
        let status = look.execute("query-status", &json!({})).unwrap()["running"].take();
        sender.send((number, command["execute"].as_str().unwrap().to_owned(), status)).unwrap();
        Action::Forward
    };
    let proxy = Proxy::start(&vm.path("proxy"), &vm.socket(), &Victim::default(), Box::new(hook));
    let mut client = Monitor::connect(proxy.path());
    client.execute("stop", &json!({})).unwrap();
    client.execute("cont", &json!({})).unwrap();
    becomes(&mut vm, "running");
    let expected = [(0, "qmp_capabilities", true), (1, "stop", true), (2, "cont", false)];
    assert_eq!(seen.try_iter().collect::<Vec<_>>(), expected.map(|(n, name, runs)| (n, name.to_owned(), runs.into())));
}

#[test]
fn a_command_can_fail_and_qemu_knows_nothing_of_it() {
    let mut vm = Vm::builder("10.0").start();
    let proxy = proxy(&vm, &Victim::default(), "stop", Action::Fail("no way".to_owned()));
    let mut client = Monitor::connect(proxy.path());
    let error = client.execute("stop", &json!({})).unwrap_err();
    assert_eq!(error, json!({ "class": "GenericError", "desc": "no way" }));
    assert_eq!(status(&mut vm), "running");
}

#[test]
fn a_command_can_get_no_answer_before_or_after_qemu_does_it() {
    for (action, then) in [(Action::Stall, "running"), (Action::LoseReply, "paused")] {
        let mut vm = Vm::builder("10.0").start();
        let proxy = proxy(&vm, &Victim::default(), "stop", action);
        let mut client = Monitor::connect(proxy.path());
        let number = client.send("stop", &json!({}));
        assert_eq!(client.reply(number, SHORT), None);
        // The connection is as good as before
        let now = client.execute("query-status", &json!({})).unwrap();
        assert_eq!((now["status"].as_str().unwrap(), status(&mut vm).as_str()), (then, then));
    }
}

#[test]
fn a_connection_can_end_at_a_command_and_the_next_is_a_new_one() {
    let mut vm = Vm::builder("5.2").start();
    let proxy = proxy(&vm, &Victim::default(), "stop", Action::Close);
    for _ in 0..2 {
        let mut client = Monitor::connect(proxy.path());
        let number = client.send("stop", &json!({}));
        let waits = std::panic::AssertUnwindSafe(|| client.reply(number, SHORT));
        assert!(std::panic::catch_unwind(waits).is_err(), "the connection did not end");
        assert_eq!(status(&mut vm), "running");
    }
}

#[test]
fn a_process_gets_its_signal_before_or_after_the_command() {
    for (action, then) in [
        (Action::KillBefore(Signal::KILL), "running"),
        (Action::KillBefore(Signal::TERM), "paused"),
        (Action::KillAfter(Signal::INT), "paused"),
    ] {
        let mut vm = Vm::builder("10.0").start();
        let tool = Tool::of(Path::new("sleep"));
        let victim = Arc::clone(&tool.victim);
        let proxy = proxy(&vm, &victim, "stop", action.clone());
        let mut client = Monitor::connect(proxy.path());
        std::thread::scope(|scope| {
            let runs = scope.spawn(|| tool.run(&["100"]));
            while victim.lock().unwrap().is_none() {
                std::thread::sleep(Duration::from_millis(1));
            }
            client.send("stop", &json!({}));
            assert_eq!(runs.join().unwrap().code, None, "{action:?}");
        });
        becomes(&mut vm, then);
    }
}

#[test]
#[should_panic(expected = "the hook has seen enough")]
fn a_hook_that_fails_fails_the_test() {
    let vm = Vm::builder("10.0").start();
    let hook = |_: &Value, number| {
        assert!(number == 0, "the hook has seen enough");
        Action::Forward
    };
    let proxy = Proxy::start(&vm.path("proxy"), &vm.socket(), &Victim::default(), Box::new(hook));
    let mut client = Monitor::connect(proxy.path());
    client.send("stop", &json!({}));
    while proxy.transcript().commands().len() < 2 {
        std::thread::sleep(Duration::from_millis(1));
    }
    proxy.end();
}
