//! Jobs pause now and then, so that the checksums of what they have written can be computed while it is in memory still.
//!
//! QEMU calls a job paused when none of its writes is on its way any more. One that reads from a snapshot is the only one
//! that writes to its image. Any other shares it with the writes of the guest, before which QEMU copies what they replace;
//! a transaction without actions waits for those: QEMU drains all requests before it does anything. Either way each cluster
//! of the disk is written once: so what the image held when the job was asked to pause, but for its tables, is what it will
//! hold. That is so where it does not compress: QEMU fills a cluster with compressed ones for as long as they fit, and
//! incompressible ones may have come between, any number of them. The guest notices nothing, and the job loses no time: it
//! is paused when the last of many writes is done, and goes on at once.

use std::fs::File;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use serde_json::Value;

use super::names;
use super::observe::Job;
use crate::qmp::Command;

/// Bytes that an image grows by before its job pauses.
const STEP: u64 = 64 << 20;

/// The jobs that pause, in the order of their disks.
#[derive(Debug, Default)]
pub(super) struct Pauses(Vec<Pausing>);

/// An image that a job writes.
#[derive(Debug, Clone)]
pub(super) struct Growing {
    pub(super) image: Arc<File>,
    pub(super) settled: Settled,
    /// Whether writes of the guest have something written to it, too.
    pub(super) shared: bool,
}

#[derive(Debug)]
struct Pausing {
    growing: Growing,
    /// The length of the image when its job was asked to pause last: what is added later may be on its way when the job
    /// pauses, if somebody else has it go on.
    length: u64,
    state: State,
}

#[derive(Debug, PartialEq, Eq)]
enum State {
    Running,
    /// It was asked to pause.
    Asked,
    /// It is paused, and the writes of the guest are waited for.
    Draining,
    /// It is paused, and what was to be waited for is done.
    Settled,
    /// It was asked to go on, and was not seen to run since.
    Resumed,
    /// It has ended and may wait for others, or somebody else has paused it.
    Still,
}

/// How many bytes of an image nobody writes to any more, but for its tables.
#[derive(Debug, Clone, Default)]
pub(super) struct Settled(Arc<AtomicU64>);

impl Settled {
    pub(super) fn bytes(&self) -> u64 {
        self.0.load(Ordering::Acquire)
    }
}

impl Pauses {
    /// Has jobs pause that write these images, in the order of their disks.
    pub(super) fn new(images: Vec<Growing>) -> Self {
        Self(images.into_iter().map(|growing| Pausing { growing, length: 0, state: State::Running }).collect())
    }

    /// Time between two looks at whether jobs should pause.
    pub(super) const GLANCE: Duration = Duration::from_millis(20);

    /// Whether no job ever pauses.
    pub(super) fn are_none(&self) -> bool {
        self.0.is_empty()
    }

    /// Whether a job should pause.
    pub(super) fn are_due(&self) -> bool {
        self.0.iter().any(|pausing| pausing.due().is_some())
    }

    /// What to send to QEMU next, seeing a job; see [`answered`](Self::answered).
    pub(super) fn next(&mut self, job: &Job) -> Option<Command> {
        let pausing = self.of(job)?;
        let command = |name| Command::new(name).with("id", job.id.clone());
        let (state, command) = match (job.status.as_str(), &pausing.state) {
            ("running", State::Asked) | ("paused", State::Resumed) => return None,
            ("running", State::Running) => {
                pausing.length = pausing.due()?;
                (State::Asked, command("job-pause"))
            }
            ("running", _) => {
                pausing.state = State::Running;
                return None;
            }
            ("paused", State::Asked) if pausing.growing.shared => {
                (State::Draining, Command::new("transaction").with("actions", Value::Array(Vec::new())))
            }
            ("paused", State::Asked) => {
                pausing.settle();
                (State::Resumed, command("job-resume"))
            }
            ("paused", State::Settled) => (State::Resumed, command("job-resume")),
            _ => {
                pausing.state = State::Still;
                return None;
            }
        };
        pausing.state = state;
        Some(command)
    }

    /// Whether QEMU took what was to be sent. A job that it does not find has ended; one that it does not pause, or have go
    /// on, is paused by somebody else, who lets it go on.
    pub(super) fn answered(&mut self, job: &Job, taken: bool) {
        let Some(pausing) = self.of(job) else { return };
        if pausing.state == State::Draining {
            pausing.state = State::Settled;
            if taken {
                pausing.settle();
            }
        } else if !taken {
            pausing.state = State::Still;
        }
    }

    fn of(&mut self, job: &Job) -> Option<&mut Pausing> {
        names::disk_of(&job.id).and_then(|number| self.0.get_mut(number))
    }
}

impl Pausing {
    /// The length of the image, where its job should pause; where it cannot be told, no more settles.
    fn due(&self) -> Option<u64> {
        let length = self.growing.image.metadata().ok()?.len();
        (self.state == State::Running && length >= self.length + STEP).then_some(length)
    }

    fn settle(&self) {
        self.growing.settled.0.store(self.length, Ordering::Release);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn job(id: &str, status: &str) -> Job {
        Job { id: id.to_owned(), kind: "backup".to_owned(), status: status.to_owned(), error: None, done: 0, total: 0 }
    }

    /// The pauses of two disks, with the images of both.
    fn two(shared: bool) -> (Pauses, [Growing; 2]) {
        let growing = [(); 2].map(|()| Growing {
            image: Arc::new(tempfile::tempfile().unwrap()),
            settled: Settled::default(),
            shared,
        });
        (Pauses::new(growing.to_vec()), growing)
    }

    /// What is sent, seeing the second job, and is taken or not.
    fn looked(pauses: &mut Pauses, status: &str, taken: bool) -> Vec<String> {
        let job = job(&names::job(1), status);
        let mut told = Vec::new();
        while let Some(command) = pauses.next(&job) {
            pauses.answered(&job, taken);
            told.push(command.name().to_owned());
        }
        told
    }

    #[test]
    fn a_job_pauses_when_its_image_has_grown_and_what_that_held_is_settled() {
        let (mut pauses, growing) = two(false);
        let grow = |length| growing[1].image.set_len(length).unwrap();
        let settled = || growing.each_ref().map(|growing| growing.settled.bytes());
        grow(STEP - 1);
        assert_eq!(looked(&mut pauses, "running", true), [""; 0]);
        // somebody else has paused it
        assert_eq!(looked(&mut pauses, "paused", true), [""; 0]);
        assert_eq!(looked(&mut pauses, "running", true), [""; 0]);
        grow(STEP);
        assert_eq!(looked(&mut pauses, "running", true), ["job-pause"]);
        assert_eq!(looked(&mut pauses, "running", true), [""; 0]);
        // if somebody else has the job go on meanwhile, what comes now is on its way
        grow(2 * STEP - 1);
        assert_eq!(settled(), [0, 0]);
        assert_eq!(looked(&mut pauses, "paused", true), ["job-resume"]);
        assert_eq!(settled(), [0, STEP]);
        assert_eq!(looked(&mut pauses, "paused", true), [""; 0]);
        for _ in 0..2 {
            assert_eq!(looked(&mut pauses, "running", true), [""; 0]);
        }
        grow(2 * STEP);
        // somebody else was faster, and it is theirs to have the job go on
        assert_eq!(looked(&mut pauses, "running", false), ["job-pause"]);
        assert_eq!(looked(&mut pauses, "paused", true), [""; 0]);
        assert_eq!(looked(&mut pauses, "running", true), [""; 0]);
        grow(3 * STEP);
        assert!(pauses.are_due());
        assert_eq!(looked(&mut pauses, "running", true), ["job-pause"]);
        assert_eq!(looked(&mut pauses, "paused", true), ["job-resume"]);
        assert_eq!(looked(&mut pauses, "running", true), [""; 0]);
        grow(4 * STEP);
        assert!(pauses.are_due());
        assert_eq!(looked(&mut pauses, "waiting", true), [""; 0]);
        assert!(!pauses.are_due());
        assert!(Pauses::default().next(&job(&names::job(1), "running")).is_none());
    }

    #[test]
    fn where_the_guest_has_something_written_to_the_image_those_writes_are_waited_for() {
        let (mut pauses, growing) = two(true);
        let grow = |length| growing[1].image.set_len(length).unwrap();
        grow(STEP);
        assert_eq!(looked(&mut pauses, "running", true), ["job-pause"]);
        let seen = job(&names::job(1), "paused");
        assert_eq!(pauses.next(&seen).unwrap().name(), "transaction");
        grow(2 * STEP);
        pauses.answered(&seen, true);
        assert_eq!(growing[1].settled.bytes(), STEP);
        assert_eq!(looked(&mut pauses, "paused", true), ["job-resume"]);
        assert_eq!(looked(&mut pauses, "running", true), [""; 0]);
        assert_eq!(looked(&mut pauses, "running", true), ["job-pause"]);
        // where they were not waited for, nothing more has settled; the job goes on all the same
        assert_eq!(pauses.next(&seen).unwrap().name(), "transaction");
        pauses.answered(&seen, false);
        assert_eq!(looked(&mut pauses, "paused", true), ["job-resume"]);
        assert_eq!(growing[1].settled.bytes(), STEP);
    }
}
