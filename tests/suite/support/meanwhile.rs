//! An observer that interferes with what it watches.

use std::sync::Mutex;

use qmpbackup::restore::{Observer, Phase, Warning};

/// Does something when the work gets to a phase, and hears warnings.
pub(crate) struct Meanwhile<F> {
    act: F,
    pub(crate) warnings: Mutex<Vec<Warning>>,
}

impl<F: Fn(Phase) + Sync> Meanwhile<F> {
    pub(crate) fn new(act: F) -> Self {
        Self { act, warnings: Mutex::default() }
    }
}

impl<F: Fn(Phase) + Sync> Observer for Meanwhile<F> {
    fn phase(&self, phase: Phase) {
        (self.act)(phase);
    }

    fn warning(&self, warning: Warning) {
        self.warnings.lock().unwrap().push(warning);
    }
}
