//! Where a monitor or a guest agent listens.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

/// A socket of QEMU's.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Address {
    /// A path, of a UNIX socket.
    Unix(PathBuf),
    /// `tcp:HOST:PORT`; a host with colons in it stands in brackets.
    Tcp {
        /// A name or an address, without brackets.
        host: String,
        /// The port.
        port: u16,
    },
}

/// Text that is no [`Address`].
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum AddressError {
    /// There is no port.
    #[error("{0} names no port: tcp:HOST:PORT is wanted")]
    NoPort(String),
    /// The port is no number from 1 to 65535.
    #[error("{0} is not a port (1 to 65535)")]
    Port(String),
    /// The host has brackets in it.
    #[error("{0:?} is not a host")]
    Host(String),
    /// There is nothing where a path or a host should be.
    #[error("an empty path or host")]
    Empty,
}

impl FromStr for Address {
    type Err = AddressError;

    /// Reads `tcp:HOST:PORT`, `unix:PATH`, or a path.
    fn from_str(text: &str) -> Result<Self, AddressError> {
        let Some(tcp) = text.strip_prefix("tcp:") else {
            let path = text.strip_prefix("unix:").unwrap_or(text);
            return if path.is_empty() { Err(AddressError::Empty) } else { Ok(Self::Unix(path.into())) };
        };
        let (host, port) = tcp.rsplit_once(':').ok_or_else(|| AddressError::NoPort(text.to_owned()))?;
        let host = host.strip_prefix('[').and_then(|host| host.strip_suffix(']')).unwrap_or(host);
        if host.is_empty() {
            return Err(AddressError::Empty);
        }
        if host.contains(['[', ']']) {
            return Err(AddressError::Host(host.to_owned()));
        }
        match port.parse() {
            Ok(number) if number > 0 => Ok(Self::Tcp { host: host.to_owned(), port: number }),
            _ => Err(AddressError::Port(port.to_owned())),
        }
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unix(path) => write!(f, "{}", path.display()),
            Self::Tcp { host, port } if host.contains(':') => write!(f, "tcp:[{host}]:{port}"),
            Self::Tcp { host, port } => write!(f, "tcp:{host}:{port}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_paths_or_hosts_with_ports() {
        let tcp = |host: &str, port| Ok(Address::Tcp { host: host.to_owned(), port });
        assert_eq!("/run/vm.qmp".parse(), Ok(Address::Unix("/run/vm.qmp".into())));
        assert_eq!("unix:vm.qmp".parse(), Ok(Address::Unix("vm.qmp".into())));
        assert_eq!("tcp:localhost:4444".parse(), tcp("localhost", 4444));
        assert_eq!("tcp:[::1]:4444".parse(), tcp("::1", 4444));
        assert_eq!("tcp:[::1]:4444".parse::<Address>().map(|address| address.to_string()), Ok("tcp:[::1]:4444".into()));
        for text in
            ["", "unix:", "tcp:", "tcp:host", "tcp::1", "tcp:host:", "tcp:host:0", "tcp:host:65536", "tcp:host:x"]
                .into_iter()
                .chain(["tcp:[[x]]:4", "tcp:[::1:4", "tcp:::1]:4"])
        {
            assert!(text.parse::<Address>().is_err(), "{text}");
        }
    }
}
