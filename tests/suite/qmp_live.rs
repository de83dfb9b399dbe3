//! The monitor against QEMU of each release.

use std::path::{Path, PathBuf};
use std::process::{Child, Command as Process, Stdio};
use std::time::{Duration, Instant};

use qmpbackup::qmp::{Address, Command, Error, EventsError, Features, Limits, Monitor};
use tempfile::TempDir;

use crate::support::tools;

const LIMITS: Limits = Limits { connect: Duration::from_secs(20), command: Duration::from_secs(20) };

/// A machine without anything, which never runs.
struct Machine {
    qemu: Child,
    socket: PathBuf,
    _folder: TempDir,
}

impl Machine {
    fn new(release: &str) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let socket = folder.path().join("qmp");
        let mut command = tools::qemu_system_of(release);
        command.args(["-nodefaults", "-display", "none", "-accel", "tcg", "-S", "-qmp"]);
        command.arg(format!("unix:{},server=on,wait=off", socket.display()));
        let qemu = command.stdin(Stdio::null()).spawn();
        let qemu = qemu.unwrap_or_else(|error| panic!("{}: {error}", tools::line(&command)));
        let mut machine = Self { qemu, socket, _folder: folder };
        machine.wait_for_socket(&command);
        machine
    }

    fn wait_for_socket(&mut self, command: &Process) {
        let begun = Instant::now();
        while !listens(&self.socket) {
            let ended = self.qemu.try_wait().unwrap();
            assert!(ended.is_none(), "{}: {ended:?}", tools::line(command));
            assert!(begun.elapsed() < LIMITS.connect, "{}: no socket", tools::line(command));
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    fn address(&self) -> Address {
        Address::Unix(self.socket.clone())
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        let _ = self.qemu.kill();
        let _ = self.qemu.wait();
    }
}

/// A socket has its name before it listens, and a connection would be the one client: the kernel's list tells.
fn listens(socket: &Path) -> bool {
    const LISTENING: &str = "00010000";
    let list = std::fs::read_to_string("/proc/net/unix").unwrap();
    let path = socket.to_str().unwrap();
    list.lines().any(|line| line.ends_with(path) && line.split_whitespace().nth(3) == Some(LISTENING))
}

fn block_on<T>(future: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(future)
}

async fn ask(monitor: &Monitor, name: &str) -> serde_json::Value {
    monitor.execute(&Command::new(name)).await.unwrap()
}

/// What holds for each release; returns what it can do.
fn features(release: &str, version: &str) -> Features {
    let machine = Machine::new(release);
    block_on(async {
        let monitor = Monitor::connect(&machine.address(), LIMITS).await.unwrap();
        assert!(monitor.version().to_string().starts_with(version), "{:?}", monitor.version());
        assert_eq!(monitor.peer().unwrap().pid, i32::try_from(machine.qemu.id()).ok());
        assert_eq!(ask(&monitor, "query-status").await["running"], false);

        let refused = monitor.execute(&Command::new("no-such-command")).await.unwrap_err();
        let told = ("CommandNotFound", "The command no-such-command has not been found");
        assert_eq!(refused.refused(), Some(told), "{refused:?}");
        let refused = monitor.execute(&Command::new("blockdev-del").with("node-name", "a")).await.unwrap_err();
        assert_eq!(refused.refused().unwrap().0, "GenericError", "{refused:?}");

        Features::parse(&ask(&monitor, "query-qmp-schema").await)
    })
}

#[test]
fn qemu_5_2_can_do_what_an_old_one_can() {
    let features = features("5.2", "5.2.");
    assert!(features.has_command("block-dirty-bitmap-merge"));
    assert!(!features.copy_before_write && !features.snapshot_access);
    assert!(!features.discard_source && !features.has_command("blockdev-reopen"));
}

#[test]
fn qemu_7_2_can_insert_the_filter() {
    let features = features("7.2", "7.2.");
    assert!(features.copy_before_write && features.snapshot_access);
    assert!(features.on_cbw_error);
    assert!(features.has_command("blockdev-reopen") && features.has_command("qom-set"));
    assert!(!features.discard_source && !features.backup_on_cbw_error);
}

#[test]
fn qemu_10_can_discard_what_it_has_copied() {
    let features = features("10.0", "10.0.");
    assert!(features.copy_before_write && features.on_cbw_error);
    assert!(features.discard_source && !features.backup_on_cbw_error);
}

#[test]
fn qemu_11_can_do_all_that_is_known() {
    let features = features("11", "11.");
    assert!(features.copy_before_write && features.snapshot_access);
    assert!(features.on_cbw_error);
    assert!(features.discard_source && features.backup_on_cbw_error);
    assert!(features.has_command("block-export-add"));
}

/// In each release: the second client, and several more than QEMU lets wait.
#[test]
fn only_one_client_is_served_at_a_time() {
    for release in ["5.2", "7.2", "10.0", "11"] {
        let machine = Machine::new(release);
        block_on(async {
            let first = Monitor::connect(&machine.address(), LIMITS).await.unwrap();
            let limits = Limits { connect: Duration::from_millis(500), ..LIMITS };
            let address = machine.address();
            let attempt = || Monitor::connect(&address, limits);
            let (a, b, c, d) = tokio::join!(attempt(), attempt(), attempt(), attempt());
            for other in [a, b, c, d] {
                assert!(matches!(other, Err(Error::NoGreeting { .. })), "{release}: {other:?}");
            }
            ask(&first, "query-status").await;
            drop(first);
            let next = Monitor::connect(&address, LIMITS).await.unwrap();
            ask(&next, "query-status").await;
        });
    }
}

#[test]
fn a_qemu_that_ends_says_so_and_is_lost() {
    for release in ["5.2", "7.2", "10.0", "11"] {
        let machine = Machine::new(release);
        block_on(async {
            let monitor = Monitor::connect(&machine.address(), LIMITS).await.unwrap();
            let mut events = monitor.events();
            ask(&monitor, "quit").await;
            let mut names = Vec::new();
            let end = loop {
                match tokio::time::timeout(LIMITS.command, events.next()).await.expect("an event or the end") {
                    Ok(event) => names.push(event.name),
                    Err(end) => break end,
                }
            };
            assert_eq!(end, EventsError::Closed);
            assert_eq!(names, ["SHUTDOWN"], "{release}");
            let lost = monitor.execute(&Command::new("query-status")).await.unwrap_err();
            assert!(matches!(lost, Error::Lost { .. }), "{release}: {lost:?}");
        });
    }
}
