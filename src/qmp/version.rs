//! Which QEMU it is.

use std::fmt;

use serde_json::Value;

/// A version of QEMU. It is printed as `10.0.2`, without the package.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Version {
    /// The first number.
    pub major: u64,
    /// The second number.
    pub minor: u64,
    /// The third number.
    pub micro: u64,
    /// What a distribution calls its build; empty where nobody set it.
    pub package: String,
}

impl Version {
    /// Reads `{"qemu": {"major": …, "minor": …, "micro": …}, "package": …}`.
    pub(super) fn parse(value: &Value) -> Option<Self> {
        let number = |name: &str| value.get("qemu")?.get(name)?.as_u64();
        let package = value.get("package").and_then(Value::as_str).unwrap_or_default().trim().to_owned();
        Some(Self { major: number("major")?, minor: number("minor")?, micro: number("micro")?, package })
    }
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}.{}", self.major, self.minor, self.micro)
    }
}
