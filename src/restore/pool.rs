//! Independent items on the threads of a pool, taken in order, so that neighbours in a file are read together.

use std::num::NonZeroUsize;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};

use rayon::prelude::*;

use super::error::{Error, Result as RestoreResult};
use super::line::{EndsAtPanic, Line, Step};
use crate::threads;

/// More threads do not make anything faster; tens of thousands make the machine stand still.
const THREADS_MAX: usize = 256;

/// A pool of so many threads, or of as many as the machine runs at once.
pub(super) fn start(threads: Option<NonZeroUsize>) -> RestoreResult<rayon::ThreadPool> {
    let threads = threads.map_or(0, |threads| threads.get().min(THREADS_MAX));
    let builder = rayon::ThreadPoolBuilder::new().num_threads(threads);
    builder.thread_name(|index| format!("worker-{index}")).build().map_err(|source| Error::Threads { source })
}

/// Does `work` for each item, with scratch of each thread's own.
///
/// After an error no further item is begun; of several errors, that of the first item is returned.
pub(super) fn for_each<T, S, E>(
    items: impl Iterator<Item = T> + Send,
    scratch: impl Fn() -> S + Sync,
    work: impl Fn(&mut S, T) -> Result<(), E> + Sync,
) -> Result<(), E>
where
    T: Send,
    E: Send,
{
    filter_map(items, scratch, |scratch, item| work(scratch, item).map(|()| None::<()>)).map(drop)
}

/// As [`for_each`], for the results, which come in the order of the items.
pub(super) fn map<T, S, R, E>(
    items: impl Iterator<Item = T> + Send,
    scratch: impl Fn() -> S + Sync,
    work: impl Fn(&mut S, T) -> Result<R, E> + Sync,
) -> Result<Vec<R>, E>
where
    T: Send,
    R: Send,
    E: Send,
{
    filter_map(items, scratch, |scratch, item| work(scratch, item).map(Some))
}

/// As [`map`], for many items of which few have a result: the others take no memory.
pub(super) fn filter_map<T, S, R, E>(
    items: impl Iterator<Item = T> + Send,
    scratch: impl Fn() -> S + Sync,
    work: impl Fn(&mut S, T) -> Result<Option<R>, E> + Sync,
) -> Result<Vec<R>, E>
where
    T: Send,
    R: Send,
    E: Send,
{
    let items = Mutex::new(items.enumerate());
    let failed = AtomicBool::new(false);
    let next = || items.lock().unwrap_or_else(PoisonError::into_inner).next();
    let part = |_| {
        let mut scratch = scratch();
        let mut done = Vec::new();
        while !failed.load(Ordering::Relaxed) {
            let Some((index, item)) = next() else { break };
            let result = work(&mut scratch, item);
            failed.fetch_or(result.is_err(), Ordering::Relaxed);
            done.extend(result.transpose().map(|result| (index, result)));
        }
        done
    };
    let parts: Vec<_> = if threads::are_there() {
        (0..rayon::current_num_threads()).into_par_iter().with_max_len(1).map(part).collect()
    } else {
        vec![part(0)]
    };
    let mut all: Vec<_> = parts.into_iter().flatten().collect();
    all.sort_unstable_by_key(|(index, _)| *index);
    all.into_iter().map(|(_, result)| result).collect()
}

/// Makes parts on all threads and takes them in order, one at a time: whoever has made the next one takes it, and those
/// behind it that are ready, while the others go on.
pub(super) fn in_order<T, S, R, E>(
    items: impl Iterator<Item = T> + Send,
    scratch: impl Fn() -> S + Sync,
    make: impl Fn(&mut S, T) -> Result<R, E> + Sync,
    take: impl FnMut(R) -> Result<(), E> + Send,
) -> Result<(), E>
where
    T: Send,
    R: Send,
    E: Send,
{
    let threads = rayon::current_num_threads();
    let line = Line::new(items, threads);
    // whoever takes a part has this alone
    let take = Mutex::new(take);
    (0..threads).into_par_iter().with_max_len(1).for_each(|_| {
        let mut scratch = scratch();
        let _end = EndsAtPanic(&line);
        while let Some(step) = line.step() {
            match step {
                Step::Make(number, item) => line.made(number, make(&mut scratch, item)),
                Step::Take(part) => {
                    let mut take = take.lock().unwrap_or_else(PoisonError::into_inner);
                    line.took((*take)(part));
                }
            }
        }
    });
    line.end()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn results_come_in_the_order_of_the_items_and_the_first_error_wins() {
        let all = map(0..1000, || (), |(), item| Ok::<_, u32>(item * 2)).unwrap();
        assert_eq!(all, (0..1000).map(|item| item * 2).collect::<Vec<_>>());
        let error = for_each(0..1000, || (), |(), item| if item % 7 == 6 { Err(item) } else { Ok(()) });
        assert_eq!(error, Err(6));
    }

    #[test]
    fn items_without_a_result_leave_none() {
        let some = filter_map(0..1000, || (), |(), item| Ok::<_, ()>((item % 10 == 3).then_some(item))).unwrap();
        assert_eq!(some, (0..1000).filter(|item| item % 10 == 3).collect::<Vec<_>>());
    }

    #[test]
    fn parts_are_taken_in_order() {
        let mut taken = Vec::new();
        in_order(
            0..100,
            || (),
            |(), item| Ok::<_, ()>(item),
            |item| {
                taken.push(item);
                Ok(())
            },
        )
        .unwrap();
        assert_eq!(taken, (0..100).collect::<Vec<_>>());
    }
}
