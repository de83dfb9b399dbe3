//! The monitor says what QEMU never says: lines without end, no JSON, answers with anything in any place. The run ends in
//! time with a code that the help text explains, in little memory, and makes no file but in its target.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsString;
use std::path::Path;

use serde_json::{Value, json};

use super::proxy::{Action, Proxy};
use super::spec::DiskSpec;
use super::tool::Tool;
use super::vm::Vm;
use crate::support::prng::Prng;
use crate::support::program::Ended;
use crate::support::seeds;

/// What a backup asks for, and with what arguments.
fn questions() -> [(&'static str, Value); 7] {
    [
        ("query-block", json!({})),
        ("query-named-block-nodes", json!({ "flat": true })),
        ("x-debug-query-block-graph", json!({})),
        ("query-jobs", json!({})),
        ("query-status", json!({})),
        ("query-version", json!({})),
        ("query-qmp-schema", json!({})),
    ]
}

/// What nobody else calls a file.
fn evil() -> String {
    format!("evil-{}", std::process::id())
}

/// Names that lead elsewhere, and what is no name at all.
fn odd(prng: &mut Prng) -> Value {
    let deep = (0..100).fold(json!(1), |inner, _| json!([inner]));
    let values = [
        json!(null),
        json!(true),
        json!(-1),
        json!(u64::MAX),
        json!(1.5),
        json!(""),
        json!(".."),
        json!(format!("../../{}", evil())),
        json!(format!("/tmp/{}", evil())),
        json!(format!("a/../../../{}", evil())),
        json!("\u{0}\n\u{1b}[2J"),
        json!("x".repeat(5000)),
        json!("json:{\"driver\":\"file\",\"filename\":\"../../evil\"}"),
        json!("nbd://evil/../../x"),
        json!([]),
        json!({}),
        json!([null]),
        deep,
    ];
    prng.pick(&values).clone()
}

/// Puts something odd in a place of an answer.
fn change(value: &mut Value, prng: &mut Prng) {
    let stays = !prng.one_in(6);
    match value {
        Value::Array(list) if stays && !list.is_empty() => {
            let at = prng.below(list.len() as u64) as usize;
            if prng.one_in(10) {
                list.remove(at);
            } else {
                change(&mut list[at], prng);
            }
        }
        Value::Object(object) if stays && !object.is_empty() => {
            let keys: Vec<String> = object.keys().cloned().collect();
            let key = prng.pick(&keys);
            if prng.one_in(10) {
                object.remove(key);
            } else {
                change(&mut object[key], prng);
            }
        }
        _ => *value = odd(prng),
    }
}

/// A machine and what lies in its folder.
struct Machine {
    vm: Vm,
    beside: BTreeSet<OsString>,
}

fn names(folder: &Path) -> BTreeSet<OsString> {
    std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name()).collect()
}

impl Machine {
    fn start() -> Self {
        let vm = Vm::builder("10.0").disk(DiskSpec::new("disk0.qcow2", 1 << 20)).start();
        let mut beside = names(&vm.path(""));
        beside.extend(["proxy".into(), "target".into(), "fleece".into()]);
        std::fs::create_dir(vm.path("fleece")).unwrap();
        Self { vm, beside }
    }

    /// A backup in which the answers to some commands are others, each time or from the second time on.
    fn run(&self, actions: &[(&str, Action)], again: bool, what: &str) -> Ended {
        let tool = Tool::of(Path::new("prlimit"));
        let actions: BTreeMap<String, Action> =
            actions.iter().map(|(at, action)| ((*at).to_owned(), action.clone())).collect();
        let mut asked = BTreeSet::new();
        let hook = move |command: &Value, _| {
            let name = command["execute"].as_str().unwrap();
            let is_first = asked.insert(name.to_owned());
            actions.get(name).filter(|_| !(again && is_first)).cloned().unwrap_or(Action::Forward)
        };
        let proxy = Proxy::start(&self.vm.path("proxy"), &self.vm.socket(), &tool.victim, Box::new(hook));
        let program = Path::new(env!("CARGO_BIN_EXE_qmprestore")).with_file_name("qmpbackup");
        let [socket, target, fleece] = ["proxy", "target", "fleece"].map(|name| self.vm.path(name));
        let ended = tool.run(&[
            "--as=1073741824",
            program.to_str().unwrap(),
            "--socket",
            socket.to_str().unwrap(),
            "backup",
            "--target",
            target.to_str().unwrap(),
            "--fleece-dir",
            fleece.to_str().unwrap(),
            "--level=full",
            "--timeout=0.5",
        ]);
        proxy.end();
        assert!(matches!(ended.code, Some(0..=7)), "{what}: {ended:#?}");
        assert!(!ended.stderr.contains("panicked"), "{what}: {ended:#?}");
        assert!(ended.code == Some(0) || !ended.stderr.is_empty(), "{what}: {ended:#?}");
        let beside = names(&self.vm.path(""));
        assert!(beside.is_subset(&self.beside), "{what}: {beside:?}: {ended:#?}");
        let above = names(&self.vm.path(".."));
        assert!(!above.iter().any(|name| name.to_string_lossy().contains(&evil())), "{what}: {ended:#?}");
        self.put_in_order();
        assert!(names(&self.vm.path("fleece")).is_empty(), "{what}: {ended:#?}");
        ended
    }

    fn put_in_order(&self) {
        let socket = self.vm.socket();
        let words = ["--socket", socket.to_str().unwrap()];
        Tool::built("qmpbackup").run(&[&words[..], &["recover"]].concat());
        Tool::built("qmpbackup").run(&[&words[..], &["cleanup", "--remove-bitmap"]].concat());
        let _ = std::fs::remove_dir_all(self.vm.path("target"));
    }
}

#[test]
fn what_is_no_answer_ends_the_run() {
    let machine = Machine::start();
    let cases = [
        ("a flood", Action::Flood),
        ("a deep one", Action::Say([b"{\"return\": ".to_vec(), b"[".repeat(1 << 20), b"\r\n".to_vec()].concat())),
        ("no UTF-8", Action::Say(b"{\"return\": \"\xff\xfe\"}\r\n".to_vec())),
        ("a list", Action::Say(b"[]\r\n".to_vec())),
        ("a huge event", Action::Say(format!("{{\"event\": {:?}}}\r\n", "x".repeat(1 << 20)).into_bytes())),
        ("half a line", Action::Say(b"{\"return\": {".to_vec())),
    ];
    for (what, action) in cases {
        for at in ["qmp_capabilities", "query-block", "transaction"] {
            machine.run(&[(at, action.clone())], false, &format!("{what} at {at}")).with(5);
        }
    }
}

#[test]
fn answers_with_something_odd_in_them_lead_nowhere_else() {
    let mut machine = Machine::start();
    let answers = questions().map(|(name, arguments)| (name, machine.vm.monitor.execute(name, &arguments).unwrap()));
    let (mut done, mut failed) = (0, 0);
    for seed in 0..if seeds::are_many() { 2000 } else { 20 } {
        let prng = &mut Prng::stream(seed, 41);
        // most of what a backup believes is in the first three
        let (name, answer) = if prng.one_in(3) { prng.pick(&answers) } else { prng.pick(&answers[..3]) };
        let mut changed = answer.clone();
        for _ in 0..prng.between(1, 3) {
            change(&mut changed, prng);
        }
        let again = prng.one_in(3);
        let ended = machine.run(&[(name, Action::Answer(changed))], again, &format!("seed {seed}, {name}"));
        if ended.code == Some(0) { done += 1 } else { failed += 1 }
    }
    assert!(done > 0 && failed > 0, "{done} are done, {failed} failed");
}

#[test]
fn a_disk_whose_names_lead_elsewhere_is_backed_up_nowhere_else() {
    let mut machine = Machine::start();
    let answers = questions().map(|(name, arguments)| (name, machine.vm.monitor.execute(name, &arguments).unwrap()));
    let file = machine.vm.path("disk0.qcow2");
    let node = answers[0].1[0]["inserted"]["node-name"].as_str().unwrap().to_owned();
    for form in ["../../EVIL", "/tmp/EVIL", "../EVIL/..", "..", "a/../../../EVIL"] {
        let evil = form.replace("EVIL", &evil());
        for what in [&[node.as_str()][..], &[file.to_str().unwrap()], &[node.as_str(), file.to_str().unwrap()]] {
            let renamed = answers.each_ref().map(|(name, answer)| {
                let text = what
                    .iter()
                    .fold(answer.to_string(), |text, what| text.replace(&format!("{:?}", *what), &format!("{evil:?}")));
                (*name, Action::Answer(serde_json::from_str(&text).unwrap()))
            });
            assert!(renamed[..2].iter().all(|(_, action)| format!("{action:?}").contains(&evil)), "{what:?}");
            // with the schema and the rest as they are
            machine.run(&renamed[..3], false, &format!("{what:?} is {evil}"));
        }
    }
}
