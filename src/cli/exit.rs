//! How the programs end.

use std::fmt::Write;
use std::process::ExitCode;

/// What the exit code of a program says. The codes are the same in all programs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Exit {
    /// Done.
    Success,
    /// Failed for a reason that has no code of its own.
    Error,
    /// The arguments are invalid, or nothing matches them.
    Usage,
    /// Done, but there were warnings.
    Warnings,
    /// A chain is broken or an image is damaged.
    Damaged,
    /// The virtual machine cannot be reached.
    Unreachable,
    /// Somebody else uses it.
    Locked,
    /// The target is full.
    Full,
    /// Ended by SIGHUP: the terminal is gone.
    HungUp,
    /// Ended by SIGINT.
    Interrupted,
    /// Ended by SIGTERM.
    Terminated,
}

impl Exit {
    const ALL: [Self; 11] = [
        Self::Success,
        Self::Error,
        Self::Usage,
        Self::Warnings,
        Self::Damaged,
        Self::Unreachable,
        Self::Locked,
        Self::Full,
        Self::HungUp,
        Self::Interrupted,
        Self::Terminated,
    ];

    /// The number.
    #[must_use]
    pub const fn code(self) -> u8 {
        match self {
            Self::Success => 0,
            Self::Error => 1,
            Self::Usage => 2,
            Self::Warnings => 3,
            Self::Damaged => 4,
            Self::Unreachable => 5,
            Self::Locked => 6,
            Self::Full => 7,
            Self::HungUp => 129,
            Self::Interrupted => 130,
            Self::Terminated => 143,
        }
    }

    /// The one to tell where there are two: the worse.
    #[must_use]
    pub(super) fn worse(self, other: Self) -> Self {
        let rank = |exit: Self| match exit {
            Self::Success => 0,
            Self::Warnings => 1,
            Self::Locked => 3,
            Self::Damaged => 4,
            _ => 2,
        };
        if rank(other) > rank(self) { other } else { self }
    }

    const fn meaning(self) -> &'static str {
        match self {
            Self::Success => "done",
            Self::Error => "failed",
            Self::Usage => "invalid arguments, or nothing matches them",
            Self::Warnings => "done, but there were warnings; a listing or check found something",
            Self::Damaged => "the chain is broken or an image is damaged",
            Self::Unreachable => "the virtual machine cannot be reached",
            Self::Locked => "in use by another process",
            Self::Full => "the target is full",
            Self::HungUp => "ended by SIGHUP",
            Self::Interrupted => "ended by SIGINT",
            Self::Terminated => "ended by SIGTERM",
        }
    }

    /// All codes and what they mean, for the help text.
    pub(super) fn table() -> String {
        let mut table = String::from("Exit codes:");
        for exit in Self::ALL {
            let _ = write!(table, "\n  {:>3}  {}", exit.code(), exit.meaning());
        }
        table
    }
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> Self {
        exit.code().into()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_two_the_worse_is_told_whichever_comes_first() {
        let order = [Exit::Success, Exit::Warnings, Exit::Error, Exit::Locked, Exit::Damaged];
        for (at, better) in order.iter().enumerate() {
            for worse in order.iter().skip(at) {
                assert_eq!((better.worse(*worse), worse.worse(*better)), (*worse, *worse));
            }
        }
    }
}
