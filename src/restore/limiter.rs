//! A limit of bytes per second, shared by all threads.

use std::num::NonZeroU64;
use std::sync::Mutex;
use std::time::{Duration, Instant};

/// Lets bytes pass no faster than its rate, after a first moment's worth.
#[derive(Debug)]
pub(crate) struct Limiter {
    rate: NonZeroU64,
    /// When the bytes that passed so far are paid for.
    paid: Mutex<Instant>,
}

impl Limiter {
    pub(crate) fn new(rate: NonZeroU64) -> Self {
        Self { rate, paid: Mutex::new(Instant::now()) }
    }

    /// Bytes to move at once, so that the flow is steady.
    pub(crate) fn step(&self) -> u64 {
        (self.rate.get() / 10).clamp(4096, u64::MAX)
    }

    /// How long to wait before so many bytes may move.
    pub(crate) fn reserve(&self, bytes: u64) -> Duration {
        let now = Instant::now();
        let nanoseconds = u128::from(bytes) * 1_000_000_000 / u128::from(self.rate.get());
        let cost = Duration::from_nanos(u64::try_from(nanoseconds).unwrap_or(u64::MAX));
        let mut paid = self.paid.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let start = (*paid).max(now);
        *paid = start.checked_add(cost).unwrap_or(start);
        start - now
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_passes_is_paid_for_by_those_who_come_after() {
        let limiter = Limiter::new(NonZeroU64::new(1000).unwrap());
        assert_eq!(limiter.reserve(500), Duration::ZERO);
        let wait = limiter.reserve(1);
        assert!(wait > Duration::from_millis(400) && wait <= Duration::from_millis(500), "{wait:?}");
    }
}
