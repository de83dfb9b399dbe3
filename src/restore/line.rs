//! What waits between threads that make parts and the one that takes them in order.

use std::collections::BTreeMap;
use std::iter::{Enumerate, Fuse};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

/// Parts that each thread may be ahead of the one that is taken: enough that an uneven one leaves nobody idle.
const AHEAD: usize = 4;

/// The parts that are made and not taken yet.
pub(super) struct Line<I: Iterator, R, E> {
    state: Mutex<State<I, R, E>>,
    moved: Condvar,
    /// The most parts that are made or being made, and not taken.
    longest: usize,
}

struct State<I: Iterator, R, E> {
    items: Enumerate<Fuse<I>>,
    ready: BTreeMap<usize, R>,
    /// The number of the part that is next to be made, and that of the one next to be taken.
    next: usize,
    head: usize,
    /// Whether somebody takes the head now.
    taking: bool,
    /// The error of the first part that has one, by its number.
    failed: Option<(usize, E)>,
    /// A thread is gone.
    lost: bool,
}

/// What a thread does next.
pub(super) enum Step<T, R> {
    Make(usize, T),
    Take(R),
}

impl<I: Iterator, R, E> Line<I, R, E> {
    pub(super) fn new(items: I, threads: usize) -> Self {
        let state = State {
            items: items.fuse().enumerate(),
            ready: BTreeMap::new(),
            next: 0,
            head: 0,
            taking: false,
            failed: None,
            lost: false,
        };
        Self { state: Mutex::new(state), moved: Condvar::new(), longest: threads * AHEAD }
    }

    fn lock(&self) -> MutexGuard<'_, State<I, R, E>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What to do next; none where nothing is left that nobody else does. Waits while the line is too long.
    pub(super) fn step(&self) -> Option<Step<I::Item, R>> {
        let mut state = self.lock();
        loop {
            if state.lost || state.failed.is_some() {
                return None;
            }
            let head = state.head;
            if let Some(part) = (!state.taking).then(|| state.ready.remove(&head)).flatten() {
                state.taking = true;
                return Some(Step::Take(part));
            }
            if state.next < head + self.longest {
                // those who make or take the last ones take what is behind them, too
                let (number, item) = state.items.next()?;
                state.next = number + 1;
                return Some(Step::Make(number, item));
            }
            state = self.moved.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    pub(super) fn made(&self, number: usize, part: Result<R, E>) {
        let mut state = self.lock();
        match part {
            Ok(part) => drop(state.ready.insert(number, part)),
            Err(error) => state.fail(number, error),
        }
        self.moved.notify_all();
    }

    pub(super) fn took(&self, result: Result<(), E>) {
        let mut state = self.lock();
        let head = state.head;
        state.taking = false;
        state.head += 1;
        if let Err(error) = result {
            state.fail(head, error);
        }
        self.moved.notify_all();
    }

    /// How all of it ended.
    pub(super) fn end(self) -> Result<(), E> {
        let state = self.state.into_inner().unwrap_or_else(PoisonError::into_inner);
        state.failed.map_or(Ok(()), |(_, error)| Err(error))
    }
}

impl<I: Iterator, R, E> State<I, R, E> {
    fn fail(&mut self, number: usize, error: E) {
        if self.failed.as_ref().is_none_or(|(first, _)| number < *first) {
            self.failed = Some((number, error));
        }
    }
}

/// Lets the others end when its thread panics: what that thread was to make never comes.
pub(super) struct EndsAtPanic<'a, I: Iterator, R, E>(pub(super) &'a Line<I, R, E>);

impl<I: Iterator, R, E> Drop for EndsAtPanic<'_, I, R, E> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.lock().lost = true;
            self.0.moved.notify_all();
        }
    }
}
