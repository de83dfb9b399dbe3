//! What `qmpbackup` says and with which exit code it ends, with no machine there or one that does not talk.

use std::ffi::OsStr;
use std::io::{Read, Write};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use rustix::process::{Pid, kill_process};
use serde_json::Value;

use crate::support::program::{Ended, ending_signals, event, program, rude_name};

fn run<I: AsRef<OsStr>>(arguments: impl IntoIterator<Item = I>) -> Ended {
    Ended::of(&mut program(env!("CARGO_BIN_EXE_qmpbackup"), arguments))
}

/// A folder with room for a socket and a backup.
struct Room(tempfile::TempDir);

impl Room {
    fn new() -> Self {
        Self(tempfile::Builder::new().prefix("qmpbackup-suite-").tempdir().unwrap())
    }

    fn socket(&self) -> PathBuf {
        self.0.path().join("qmp")
    }

    /// `--socket SOCKET` and more, as words.
    fn words(&self, arguments: &[&str]) -> Vec<String> {
        let socket = self.socket().to_str().unwrap().to_owned();
        let first = ["--socket".to_owned(), socket];
        first.into_iter().chain(arguments.iter().map(|word| (*word).to_owned())).collect()
    }

    fn run(&self, arguments: &[&str]) -> Ended {
        run(self.words(arguments))
    }
}

#[test]
fn help_names_all_options_and_exit_codes() {
    let common = ["--socket", "--agent-socket", "--timeout", "--debug", "--quiet", "--logfile", "--json", "--syslog"];
    let own: [(&str, &[&str]); 5] = [
        ("", &["Examples:", "backup", "cleanup", "info", "recover"]),
        (
            "backup",
            &[
                "-l, --level",
                "-t, --target",
                "-e, --exclude",
                "-i, --include",
                "--include-raw",
                "--monthly",
                "--no-subdir",
                "--no-timestamp",
                "--no-symlink",
                "--uuid",
                "--no-persist",
                "--quiesce",
                "--pause",
                "--fleece-dir",
                "--no-fleece",
                "--cbw-timeout",
                "--compress",
                "--speed-limit",
                "--blockdev-aio",
                "--blockdev-disable-cache",
                "--remove-delay",
                "--progress-interval",
                "--dry-run",
                "[default: 45]",
                "io_uring",
            ],
        ),
        ("cleanup", &["[OPTIONS] --remove-bitmap\n", "[alias: --remove-bitmaps]", "--uuid"]),
        ("info", &["--show", "blockdev", "bitmaps"]),
        ("recover", &["-t, --target"]),
    ];
    for (command, words) in own {
        for help in ["-h", "--help"] {
            let mut ended = run([command, help].into_iter().filter(|word| !word.is_empty())).with(0);
            assert_eq!(ended.stderr, "");
            for word in common.iter().chain(words) {
                ended = ended.says(word);
            }
            let ended = ended.says("Usage: qmpbackup --socket").says("  0  done").says("130  ended by SIGINT");
            ended.says("  5  the virtual machine cannot be reached");
        }
    }
    let version = concat!("qmpbackup ", env!("CARGO_PKG_VERSION"), "\n");
    assert_eq!(run(["-V"]).with(0).stdout, version);
}

#[test]
fn arguments_that_make_no_sense_end_with_2_and_name_what_is_wrong() {
    for (words, wrong) in [
        ("backup -l full -t x", "--socket"),
        ("--agent-socket y info --show bitmaps", "--socket"),
        ("--socket s", "Usage"),
        ("--socket s backup -l full", "--target"),
        ("--socket s backup -t x", "--level"),
        ("--socket s backup -l bad -t x", "[possible values: copy, full, inc, auto]"),
        ("--socket s backup -l full -t x -i a -e b", "cannot be used with"),
        ("--socket s backup -l full -t x --include a,b --exclude c", "cannot be used with"),
        ("--socket s backup -l full -t x --fleece-dir y --no-fleece", "cannot be used with"),
        ("--socket s backup -l full -t x --uuid a\u{e4}", "1 to 200 printable"),
        ("--socket s backup -l full -t x --uuid=", "1 to 200 printable"),
        ("--socket s backup -l full -t x --speed-limit 5X", "is not a size"),
        ("--socket s backup -l full -t x --remove-delay=-1", "is not a number of seconds"),
        ("--socket s backup -l full -t x --blockdev-aio native", "[possible values: threads, io_uring]"),
        ("--socket s --timeout 0 info --show bitmaps", "is not a number of seconds"),
        ("--socket tcp:host info --show bitmaps", "names no port"),
        ("--socket tcp:host:99999 info --show bitmaps", "99999 is not a port"),
        ("--socket= info --show bitmaps", "an empty path or host"),
        ("info --show bitmaps --socket s --agent-socket tcp:x", "names no port"),
        ("--socket s info --show nodes", "[possible values: blockdev, bitmaps]"),
        ("--socket s info", "--show"),
        ("--socket s cleanup", "--remove-bitmap"),
        ("--socket s cleanup --remove-bitmap --uuid=", "1 to 200 printable"),
    ] {
        let ended = run(words.split(' ')).with(2).says(wrong);
        assert_eq!(ended.stdout, "", "{words}");
    }
    let error = event(&run(["--json", "info", "--show", "bitmaps"]).with(2).events(), "error").clone();
    let message = "the following required arguments were not provided: --socket <PATH|tcp:HOST:PORT>";
    assert_eq!((&error["exit_code"], &error["message"]), (&2.into(), &message.into()));
}

#[test]
fn options_of_the_python_tool_are_understood_before_and_after_the_command() {
    let room = Room::new();
    let target = room.0.path().join("backup").to_str().unwrap().to_owned();
    let backup = format!(
        "backup --level=copy --target={target} --exclude=a,b --no-subdir --no-timestamp --no-symlink --quisce --pause \
         --speed-limit=50M --compress --include-raw --uuid=a-b --remove-delay=0 --blockdev-disable-cache \
         --blockdev-aio=io_uring --monthly --debug"
    );
    room.run(&backup.split(' ').collect::<Vec<_>>()).with(5).says("qmp: cannot connect to the monitor");
    // cut short, given twice, and names that are none
    let short =
        format!("backup --lev full --level copy --targ {target} --comp --compress --no-persist --refresh-rate 5");
    room.run(&short.split(' ').collect::<Vec<_>>()).with(5).says("qmp: cannot connect to the monitor");
    room.run(&["backup", "-lcopy", "-t", &target, "--exclude", ""]).with(5);
    room.run(&["backup", "--no", "--level", "copy", "--target", &target]).with(2);
    for cleanup in ["--remove-bitmap", "--remove-bitmaps"] {
        room.run(&["cleanup", cleanup]).with(5);
    }
    let socket = room.socket();
    run([OsStr::new("info"), "--show=blockdev".as_ref(), "--socket".as_ref(), socket.as_os_str()]).with(5);
}

#[test]
fn a_machine_that_is_not_there_is_named_with_what_to_do() {
    let room = Room::new();
    let target = room.0.path().join("backup").to_str().unwrap().to_owned();
    let log = room.0.path().join("log");
    let socket = room.socket().to_str().unwrap().to_owned();
    let logged = ["--logfile", log.to_str().unwrap()];
    let commands: [&[&str]; 5] = [
        &["backup", "-l", "full", "-t", &target],
        &["backup", "-l", "full", "-t", &target, "--dry-run"],
        &["info", "--show", "bitmaps"],
        &["cleanup", "--remove-bitmap"],
        &["recover"],
    ];
    for command in commands {
        let ended = room.run(&[&logged, command].concat()).with(5);
        let ended = ended.says(&format!("{socket}: cannot connect to the monitor: No such file"));
        let ended = ended.says("the machine was not touched; does it run").says("INFO  qmpbackup 0.");
        assert_eq!(ended.stdout, "");
        let ended = room.run(&[&["--json", "--quiet"], command].concat()).with(5);
        let events = ended.events();
        assert_eq!((events.len(), &event(&events, "error")["exit_code"]), (1, &5.into()));
        assert!(event(&events, "error")["message"].as_str().unwrap().contains(&socket));
    }
    assert_eq!(std::fs::read_to_string(log).unwrap().matches("ERROR").count(), commands.len());

    // a socket that nobody serves any more, and one where something else is
    drop(UnixListener::bind(room.socket()).unwrap());
    room.run(&["recover"]).with(5).says("Connection refused");
    run(["--socket", "tcp:127.0.0.1:1", "recover"]).with(5).says("tcp:127.0.0.1:1: cannot connect");
}

#[test]
fn a_monitor_that_says_nothing_is_not_waited_for_longer_than_asked() {
    let room = Room::new();
    let _listener = UnixListener::bind(room.socket()).unwrap();
    let begun = Instant::now();
    let ended = room.run(&["--json", "--timeout", "0.5", "info", "--show", "bitmaps"]).with(5);
    assert!(begun.elapsed() < Duration::from_secs(5), "{:?}", begun.elapsed());
    let error = event(&ended.events(), "error").clone();
    assert!(error["message"].as_str().unwrap().contains("no greeting within 500ms"), "{error}");
    assert_eq!(error["advice"], "the machine was not touched");
}

#[test]
fn what_is_no_monitor_is_called_so() {
    let room = Room::new();
    let listener = UnixListener::bind(room.socket()).unwrap();
    std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        stream.write_all(b"220 mail.example ESMTP \x1b[2J\r\n").unwrap();
        let _ = stream.read(&mut [0; 100]);
    });
    let ended = room.run(&["recover"]).with(5).says("this is no QMP monitor").says("the machine was not touched");
    assert!(!ended.stderr.contains('\x1b'), "{ended:?}");
}

#[test]
fn a_signal_ends_the_wait_for_a_monitor() {
    let room = Room::new();
    let _listener = UnixListener::bind(room.socket()).unwrap();
    for (signal, code) in ending_signals() {
        let mut command =
            program(env!("CARGO_BIN_EXE_qmpbackup"), room.words(&["--json", "info", "--show", "bitmaps"]));
        let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        // the first line of the log; signals are watched soon after it
        let mut first = [0];
        child.stderr.as_mut().unwrap().read_exact(&mut first).unwrap();
        std::thread::sleep(Duration::from_millis(300));
        let sent = Instant::now();
        kill_process(Pid::from_child(&child), signal).unwrap();
        let ended = Ended::new(child.wait_with_output().unwrap()).with(code);
        assert!(sent.elapsed() < Duration::from_secs(5), "{:?}", sent.elapsed());
        let error: Value = event(&ended.events(), "error").clone();
        assert_eq!((&error["exit_code"], &error["message"]), (&code.into(), &"cancelled".into()));
    }
}

#[test]
fn names_of_sockets_and_folders_cannot_do_anything_to_a_terminal() {
    let room = Room::new();
    let rude = rude_name();
    let target = room.0.path().join(&rude);
    let socket = room.0.path().join("no").join(&rude);
    let commands: [&[&OsStr]; 3] = [
        &["--socket".as_ref(), socket.as_ref(), "recover".as_ref()],
        &["--socket".as_ref(), "s".as_ref(), "recover".as_ref(), rude.as_ref()],
        &["--socket=/s".as_ref(), "backup".as_ref(), "-lfull".as_ref(), "-t".as_ref(), target.as_ref()],
    ];
    for command in commands {
        let ended = run(command);
        let bad = |letter: char| (letter.is_control() && letter != '\n') || letter == '\u{202e}';
        assert!(!ended.stderr.contains(bad) && !ended.stderr.is_empty(), "{ended:#?}");
        assert!(ended.code.is_some_and(|code| code != 0 && code != 101), "{ended:#?}");
    }
    assert!(!Path::new("s").exists());
}
