//! The local syslog: a line is one datagram. Nothing waits long for it, and what it does not take is lost.

use std::io;
use std::os::unix::net::UnixDatagram;
use std::path::Path;
use std::time::Duration;

use super::console::Level;

/// Where the local syslog listens.
pub(super) const SOCKET: &str = "/dev/log";

/// Facility "user".
const FACILITY: u8 = 1;

/// A syslog that has no room yet may find some.
const PATIENCE: Duration = Duration::from_millis(100);

#[derive(Debug)]
pub(super) struct Syslog {
    socket: UnixDatagram,
    program: &'static str,
}

impl Syslog {
    /// # Errors
    /// Nothing listens there.
    pub(super) fn open(path: &Path, program: &'static str) -> io::Result<Self> {
        let socket = UnixDatagram::unbound()?;
        socket.connect(path)?;
        socket.set_write_timeout(Some(PATIENCE))?;
        Ok(Self { socket, program })
    }

    pub(super) fn log(&self, level: Level, message: &str) {
        let severity = match level {
            Level::Error => 3,
            Level::Warning => 4,
            Level::Notice => 5,
            Level::Info => 6,
            Level::Debug => 7,
        };
        let priority = FACILITY * 8 + severity;
        let line = format!("<{priority}>{}[{}]: {message}", self.program, std::process::id());
        // the log on stderr has it anyway
        let _ = self.socket.send(line.as_bytes());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_is_a_datagram_with_priority_and_process() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("log");
        assert!(Syslog::open(&path, "qmpbackup").is_err());
        let listener = UnixDatagram::bind(&path).unwrap();
        let syslog = Syslog::open(&path, "qmpbackup").unwrap();
        let id = std::process::id();
        for (level, priority) in
            [(Level::Error, 11), (Level::Warning, 12), (Level::Notice, 13), (Level::Info, 14), (Level::Debug, 15)]
        {
            syslog.log(level, "größe");
            let mut bytes = [0; 200];
            let length = listener.recv(&mut bytes).unwrap();
            assert_eq!(String::from_utf8_lossy(&bytes[..length]), format!("<{priority}>qmpbackup[{id}]: größe"));
        }
    }

    #[test]
    fn a_syslog_that_takes_nothing_is_not_waited_for() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("log");
        let listener = UnixDatagram::bind(&path).unwrap();
        let syslog = Syslog::open(&path, "qmpbackup").unwrap();
        syslog.socket.set_write_timeout(Some(Duration::from_millis(1))).unwrap();
        let begun = std::time::Instant::now();
        (0..2000).for_each(|_| syslog.log(Level::Info, "x"));
        assert!(begun.elapsed() < Duration::from_secs(60));
        drop(listener);
        syslog.log(Level::Info, "nobody is there");
    }
}
