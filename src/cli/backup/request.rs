//! From the words of a command line to what the library is asked for.

use std::time::Duration;

use super::args::{Aio, Backup, Level, Machine};
use crate::capture::{self, Connection, Fleece, Request, RequestedLevel, Selection};
use crate::qmp::Address;

impl Machine {
    /// `None` where the words name no monitor.
    pub(super) fn connection(&self) -> Option<Connection> {
        let monitor: Address = self.socket.clone()?;
        Some(Connection { monitor, agent: self.agent_socket.clone(), timeout: self.timeout })
    }
}

impl Backup {
    pub(super) fn request(&self, connection: Connection, progress_interval: Duration) -> Request {
        Request {
            connection,
            level: self.level.into(),
            target: self.target.clone(),
            monthly: self.monthly,
            selection: Selection {
                include: self.include.as_deref().map(names).filter(|names| !names.is_empty()),
                exclude: names(&self.exclude),
                include_raw: self.include_raw,
            },
            subdir: !self.no_subdir,
            timestamp: !self.no_timestamp,
            symlink: !self.no_symlink,
            uuid: self.uuid.clone(),
            persist: !self.no_persist,
            quiesce: self.quiesce,
            pause: self.pause,
            fleece: self.fleece(),
            cbw_timeout: self.cbw_timeout,
            compress: self.compress,
            speed_limit: self.speed_limit,
            remove_delay: self.remove_delay,
            direct: self.blockdev_disable_cache,
            aio: self.blockdev_aio.into(),
            progress_interval,
        }
    }

    fn fleece(&self) -> Fleece {
        match &self.fleece_dir {
            _ if self.no_fleece => Fleece::Off,
            Some(folder) => Fleece::In(folder.clone()),
            None => Fleece::BesideDisk,
        }
    }
}

/// Names that are none may come of a variable of a shell that is not set.
fn names(given: &[String]) -> Vec<String> {
    given.iter().filter(|name| !name.is_empty()).cloned().collect()
}

impl From<Level> for RequestedLevel {
    fn from(level: Level) -> Self {
        match level {
            Level::Copy => Self::Copy,
            Level::Full => Self::Full,
            Level::Inc => Self::Inc,
            Level::Auto => Self::Auto,
        }
    }
}

impl From<Aio> for capture::Aio {
    fn from(aio: Aio) -> Self {
        match aio {
            Aio::Threads => Self::Threads,
            Aio::IoUring => Self::IoUring,
        }
    }
}
