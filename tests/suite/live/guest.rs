//! The shell of a real Linux in a machine. It is that of `tests/setup/guest-init`, and its words are a test's own: nothing
//! here knows what a backup is.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use super::vm::Vm;

pub(crate) struct Guest {
    lines: BufReader<UnixStream>,
}

impl Guest {
    /// Waits until the guest is up.
    pub(crate) fn boot(vm: &Vm) -> Self {
        let stream = UnixStream::connect(vm.path("shell")).unwrap();
        // Seconds without other work, and there may be much of that
        stream.set_read_timeout(Some(Duration::from_secs(180))).unwrap();
        let mut guest = Self { lines: BufReader::new(stream) };
        while guest.line() != "READY" {}
        guest
    }

    /// Runs a script that must succeed, and returns the lines that it prints.
    pub(crate) fn run(&mut self, script: &str) -> Vec<String> {
        let words = format!("sh -e <<'END OF SCRIPT'\n{script}\nEND OF SCRIPT\necho EXIT $?\n");
        self.lines.get_mut().write_all(words.as_bytes()).unwrap();
        let mut printed = Vec::new();
        loop {
            let line = self.line();
            match line.strip_prefix("EXIT ") {
                Some("0") => return printed,
                Some(code) => panic!("exit code {code} of the guest's {script}: {printed:#?}"),
                None => printed.push(line),
            }
        }
    }

    fn line(&mut self) -> String {
        let mut line = String::new();
        let n = self.lines.read_line(&mut line).unwrap();
        assert_ne!(n, 0, "the guest is gone");
        line.trim_end().to_owned()
    }
}

#[test]
fn a_guest_boots_writes_to_its_disk_and_has_an_agent() {
    use super::spec::DiskSpec;

    let mut vm = Vm::builder("7.2").disk(DiskSpec::new("disk.qcow2", 4 << 20)).guest().agent().start();
    let mut guest = Guest::boot(&vm);
    let told = guest
        .run("printf hello | dd of=/dev/vda conv=fsync 2>/dev/null\ndd if=/dev/vda bs=5 count=1 2>/dev/null; echo");
    assert_eq!(told, ["hello"]);
    let panic = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| guest.run("exit 3"))).unwrap_err();
    assert!(panic.downcast_ref::<String>().unwrap().starts_with("exit code 3"));
    let mut agent = UnixStream::connect(vm.path("agent")).unwrap();
    agent.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
    agent.write_all(b"{\"execute\":\"guest-ping\"}\n").unwrap();
    let mut line = String::new();
    BufReader::new(&agent).read_line(&mut line).unwrap();
    assert_eq!(line.trim(), "{\"return\": {}}");
    vm.kill();
}
