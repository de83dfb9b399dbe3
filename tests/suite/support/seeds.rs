//! Which seeds run, and what is printed when one of them fails.

use crate::support::random_chain::Chain;

/// The tests that share the seeds among them: each is a process of its own under nextest.
pub(crate) const SHARES: u64 = 8;

/// The seeds of one share: `usual` many over all shares, or what the environment asks for.
pub(crate) fn share(index: u64, usual: u64) -> Vec<u64> {
    let asked = match std::env::var("QMPBACKUP_SEEDS") {
        Ok(range) => {
            let (from, to) = range.split_once("..").unwrap_or_else(|| panic!("QMPBACKUP_SEEDS is {range}, not A..B"));
            from.parse().unwrap()..to.parse().unwrap()
        }
        Err(_) if are_many() => 0..usual * 25,
        Err(_) => 0..usual,
    };
    asked.filter(|seed| seed % SHARES == index).collect()
}

/// Whether the environment asks for more than the usual.
pub(crate) fn are_many() -> bool {
    std::env::var_os("QMPBACKUP_LONG").is_some_and(|long| long != "0")
}

/// Tells how a chain was made if the test that holds this fails.
pub(crate) struct Told<'a>(pub(crate) &'a Chain);

impl Drop for Told<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let Chain { seed, commands, .. } = self.0;
            eprintln!("\nseed {seed} failed; see it again with QMPBACKUP_SEEDS={seed}..{}", seed + 1);
            eprintln!("The chain was made by:\n{}\n", commands.join("\n"));
        }
    }
}

/// `#[test]` functions that share the seeds, each calling `$judge(seed)` for its part of them.
macro_rules! shared_seeds {
    ($judge:path, $usual:expr; $($name:ident = $index:literal),+ $(,)?) => {
        $(
            #[test]
            fn $name() {
                for seed in $crate::support::seeds::share($index, $usual) {
                    $judge(seed);
                }
            }
        )+

        const _: () = assert!([$($index),+].len() as u64 == $crate::support::seeds::SHARES, "a share of the seeds has no test");
    };
}
pub(crate) use shared_seeds;
