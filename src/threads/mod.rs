//! Work on all threads, also where the system gives none.

use std::error::Error as _;
use std::sync::LazyLock;

use rayon::prelude::*;

/// Whether there are threads to work on: those of the pool that this one is of, or those of the process, which start when they
/// are first asked for. Where they cannot, as many as there may be are there already, `rayon` panics when it is used.
pub(crate) fn are_there() -> bool {
    static OF_PROCESS: LazyLock<bool> = LazyLock::new(|| match rayon::ThreadPoolBuilder::new().build_global() {
        Ok(()) => true,
        // who uses this library may have started them
        Err(error) => error.source().is_none(),
    });
    rayon::current_thread_index().is_some() || *OF_PROCESS
}

/// What `work` makes of all items, in their order.
pub(crate) fn map<T: Send, R: Send>(items: Vec<T>, work: impl Fn(T) -> R + Sync + Send) -> Vec<R> {
    if are_there() { items.into_par_iter().map(work).collect() } else { items.into_iter().map(work).collect() }
}

/// As [`map`], with scratch of each thread's own; of several errors one is returned, and no more is begun after it.
pub(crate) fn try_map<I, S, R: Send, E: Send>(
    items: I,
    scratch: impl Fn() -> S + Sync + Send,
    work: impl Fn(&mut S, <I as IntoIterator>::Item) -> Result<R, E> + Sync + Send,
) -> Result<Vec<R>, E>
where
    I: IntoIterator + IntoParallelIterator<Item = <I as IntoIterator>::Item>,
{
    if are_there() {
        return items.into_par_iter().map_init(scratch, work).collect();
    }
    let mut scratch = scratch();
    items.into_iter().map(|item| work(&mut scratch, item)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn results_come_in_the_order_of_the_items() {
        let all: Vec<u32> = (0..1000).collect();
        assert_eq!(map(all.clone(), |item| item), all);
        assert_eq!(try_map(0..1000_u32, || (), |(), item| Ok::<_, ()>(item)), Ok(all));
        assert_eq!(try_map(0..1000_u32, || (), |(), item| if item == 7 { Err(item) } else { Ok(()) }), Err(7));
    }
}
