//! Numbers that another client of the same socket has hardly used.

use std::hash::{BuildHasher, RandomState};

/// A number below 2^52: it survives readers that know only doubles.
pub(crate) fn nonce() -> u64 {
    // the keys of the hash are random in each process, and differ with each state
    RandomState::new().hash_one(std::process::id()) >> 12
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_nonces_differ() {
        assert_ne!(nonce(), nonce());
        assert!(nonce() < 1 << 52);
    }
}
