//! A real guest with an ext4 on each of its disks, which writes to them all the time; and its agent, when nobody else has
//! it.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::clean::Found;
use super::guest::Guest;
use super::proxy::{Action, Hook};
use super::spec::DiskSpec;
use super::tool::Tool;
use super::vm::Vm;
use crate::support::program::Ended;

const SIZE: u64 = 48 << 20;
const SLOTS: u64 = 20;
const PAD: usize = 6000;

pub(crate) struct Quiesced {
    pub(crate) vm: Vm,
    pub(crate) guest: Guest,
    pub(crate) tool: Tool,
    found: Found,
}

impl Quiesced {
    pub(crate) fn boot(release: &'static str, disks: usize) -> Self {
        let spec = |number: usize| DiskSpec::new(&format!("disk{number}.qcow2"), SIZE).ext4();
        let builder = (0..disks).fold(Vm::builder(release), |builder, number| builder.disk(spec(number)));
        let mut vm = builder.guest().agent().start();
        let mut guest = Guest::boot(&vm);
        for (number, letter) in ('a'..).take(disks).enumerate() {
            guest.run(&format!("mkdir -p /disk{number}; mount -t ext4 /dev/vd{letter} /disk{number}"));
        }
        let found = Found::of(&mut vm);
        std::fs::create_dir(vm.path("target")).unwrap();
        Self { vm, guest, tool: Tool::built("qmpbackup"), found }
    }

    /// From now on the guest writes: file after file, each on the next disk in the place of an older one.
    pub(crate) fn write(&mut self) {
        let disks = self.vm.disks.len();
        self.guest.run(&format!(
            "cat >/run/writer <<'END OF WRITER'\n\
             pad=$(printf '%{PAD}s' x)\n\
             i=0\n\
             while :; do\n\
             i=$((i + 1))\n\
             disk=/disk$((i % {disks}))\n\
             echo \"$i$pad\" >$disk/new\n\
             mv $disk/new $disk/slot$((i / {disks} % {SLOTS}))\n\
             echo $i >/run/written\n\
             done\n\
             END OF WRITER\n\
             sh /run/writer </dev/null >/dev/null 2>&1 &"
        ));
        while self.written() < 3 {}
    }

    /// How many files it has written.
    pub(crate) fn written(&mut self) -> u64 {
        let script = "i=; until [ \"$i\" ]; do [ ! -e /run/written ] || read -r i </run/written || :; done; echo $i";
        self.guest.run(script)[0].parse().unwrap()
    }

    /// How many writes a restored set of disks holds. Fails unless it holds these and no other.
    #[track_caller]
    pub(crate) fn moment(&self, disks: &[BTreeMap<String, Vec<u8>>]) -> u64 {
        let count = self.vm.disks.len() as u64;
        let number = |content: &[u8]| -> u64 {
            let text = String::from_utf8_lossy(content);
            text.split(' ').next().unwrap().parse().unwrap_or_else(|error| panic!("{error}: {text:?}"))
        };
        let slots = disks.iter().flatten().filter(|(name, _)| name.starts_with("slot"));
        let last = slots.map(|(_, content)| number(content)).max().unwrap();
        for i in (1..=last).rev().take((count * SLOTS) as usize) {
            let name = format!("slot{}", i / count % SLOTS);
            let content = disks[(i % count) as usize].get(&name).map(|content| String::from_utf8_lossy(content));
            let expected = format!("{i}{:>PAD$}\n", "x");
            let start = |text: &str| text.chars().take(20).collect::<String>();
            let told = content.as_deref().map(start);
            assert!(content.as_deref() == Some(&expected), "write {i} of {last} is not in {name}: {told:?}");
        }
        last
    }

    #[track_caller]
    pub(crate) fn assert_writes_go_on(&mut self) {
        let (before, until) = (self.written(), Instant::now() + Duration::from_secs(60));
        while self.written() < before + 3 {
            assert!(Instant::now() < until, "the guest does not write after write {before}");
        }
    }

    /// Fails if the guest can write.
    #[track_caller]
    pub(crate) fn assert_writes_wait(&mut self) {
        let before = self.written();
        std::thread::sleep(Duration::from_millis(500));
        assert_eq!(self.written(), before);
    }

    /// Fails unless the machine is as it was before the first backup.
    #[track_caller]
    pub(crate) fn assert_clean(&mut self) {
        let target = self.vm.path("target");
        self.found.assert_clean(&mut self.vm, &target);
    }

    /// The words of a backup over this monitor.
    pub(crate) fn words(&self, socket: &str, level: &str) -> Vec<String> {
        let path = |name: &str| self.vm.path(name).to_str().unwrap().to_owned();
        let [socket, agent, target] = [socket, "agent", "target"].map(path);
        ["--socket", &socket, "--agent-socket", &agent, "backup", "--level", level, "--target", &target, "--quiesce"]
            .map(str::to_owned)
            .to_vec()
    }

    /// Runs a backup over this monitor, with more words.
    pub(crate) fn backup(&self, socket: &str, level: &str, more: &[&str]) -> Ended {
        let words = self.words(socket, level);
        self.tool.run(&words.iter().map(String::as_str).chain(more.iter().copied()).collect::<Vec<_>>())
    }

    /// Runs `recover`, which is told nothing of an agent.
    pub(crate) fn recover(&self) -> Ended {
        self.tool.run(&["--socket", self.vm.socket().to_str().unwrap(), "recover"])
    }

    /// What the agent says of the file systems.
    pub(crate) fn agent_status(&self) -> String {
        ask(&self.vm.path("agent"), "guest-fsfreeze-status").as_str().unwrap().to_owned()
    }
}

/// Does this once, with a command of the moment: 0 is the first one when the guest has been frozen.
pub(crate) fn in_moment(nth: usize, action: Action) -> Hook {
    let mut until = None;
    let mut action = Some(action);
    Box::new(move |command, _| {
        let arguments = &command["arguments"];
        // What is marked before: a guest that may be frozen, and, if it is stopped, a machine that stands still
        if arguments["node"] == "qmpbackup-frozen" || arguments["node-name"] == "qmpbackup-moment" {
            until = Some(nth);
        } else if ["query-status", "query-block", "query-jobs"].iter().any(|look| command["execute"] == *look) {
            // between the two marks, and the last look at jobs and disks
        } else if let Some(left) = &mut until {
            if *left == 0 {
                return action.take().unwrap_or(Action::Forward);
            }
            *left -= 1;
        }
        Action::Forward
    })
}

/// Asks a guest agent, over a connection of its own.
fn ask(path: &PathBuf, command: &str) -> Value {
    let mut stream = UnixStream::connect(path).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
    let sync = json!({ "execute": "guest-sync-delimited", "arguments": { "id": std::process::id() } });
    stream.write_all(format!("{sync}\n").as_bytes()).unwrap();
    let mut byte = [0];
    while byte != [0xff] {
        stream.read_exact(&mut byte).unwrap();
    }
    stream.write_all(format!("{}\n", json!({ "execute": command })).as_bytes()).unwrap();
    let mut lines = BufReader::new(stream).lines().map(|line| serde_json::from_str(&line.unwrap()).unwrap());
    let synced: Value = lines.next().unwrap();
    assert_eq!(synced["return"], std::process::id());
    let mut answer: Value = lines.next().unwrap();
    answer["return"].take()
}
