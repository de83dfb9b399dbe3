//! The jobs of a run: who waits for them sees each of them end.

use std::time::{Duration, Instant};

use serde_json::Value;

use crate::capture::error::Error;
use crate::capture::machine::observe::{self, Job};
use crate::capture::machine::{GLANCE, Machine};
use crate::capture::names;
use crate::capture::seal::pauses::Pauses;
use crate::qmp::{self, Command, Events, EventsError};

/// Time between two looks at jobs when no event tells of them.
const LOOK: Duration = Duration::from_secs(1);

/// The jobs of runs, in the order of their disks.
pub(crate) async fn own_jobs(machine: &Machine<'_>) -> Result<Vec<Job>, Error> {
    let mut jobs = observe::jobs(&machine.monitor.execute(&Command::new("query-jobs")).await?);
    jobs.retain(|job| names::disk_of(&job.id).is_some());
    // QEMU lists the newest first
    jobs.sort_by_key(|job| names::disk_of(&job.id));
    Ok(jobs)
}

/// Sees jobs end, those too that are gone with that.
pub(crate) struct Watch {
    events: Events,
    ended: Vec<Job>,
}

impl Watch {
    /// Begins; before the jobs do.
    pub(crate) fn new(machine: &Machine<'_>) -> Self {
        Self { events: machine.monitor.events(), ended: Vec::new() }
    }

    /// Waits until all jobs have ended, or one has failed, has them pause meanwhile, and tells of them. They come back as
    /// they were then.
    pub(crate) async fn wait(
        &mut self,
        machine: &Machine<'_>,
        pauses: &mut Pauses,
        mut tell: impl FnMut(&[Job]),
    ) -> Result<Vec<Job>, Error> {
        loop {
            machine.go_on()?;
            let mut jobs = own_jobs(machine).await?;
            self.drain();
            // an event that came after the answer knows more
            jobs.retain(|job| !self.ended.iter().any(|ended| ended.id == job.id));
            jobs.extend(self.ended.iter().cloned());
            jobs.sort_by_key(|job| names::disk_of(&job.id));
            tell(&jobs);
            // the others go on until they are told to end, and need not
            if jobs.iter().all(Job::is_concluded) || jobs.iter().any(|job| job.error.is_some()) {
                return Ok(jobs);
            }
            for job in &jobs {
                let Some(command) = pauses.next(job) else { continue };
                if !machine.send_unless_ended(&command).await? {
                    pauses.refused(job);
                }
            }
            let until = Instant::now() + LOOK;
            let glance = if pauses.are_none() { GLANCE } else { Pauses::GLANCE };
            while Instant::now() < until && !self.has_event_within(glance).await && !pauses.are_due() {
                machine.go_on()?;
            }
        }
    }

    /// Whether something happened; a closed connection shows with the next command.
    pub(crate) async fn has_event_within(&mut self, limit: Duration) -> bool {
        match tokio::time::timeout(limit, self.events.next()).await {
            Ok(Ok(event)) => {
                self.keep(&event);
                true
            }
            // some were missed: time to look
            Ok(Err(EventsError::Lagged(_))) => true,
            Ok(Err(EventsError::Closed)) => {
                tokio::time::sleep(limit).await;
                true
            }
            Err(_) => false,
        }
    }

    /// Takes in all that has happened by now.
    fn drain(&mut self) {
        loop {
            match self.events.try_next() {
                Ok(Some(event)) => self.keep(&event),
                Err(EventsError::Lagged(_)) => {}
                Ok(None) | Err(EventsError::Closed) => return,
            }
        }
    }

    /// Of each job, what was said last.
    fn keep(&mut self, event: &qmp::Event) {
        if let Some(job) = ended(event) {
            self.ended.retain(|known| known.id != job.id);
            self.ended.push(job);
        }
    }
}

/// The job that an event says to have ended.
fn ended(event: &qmp::Event) -> Option<Job> {
    let cancelled = event.name == "BLOCK_JOB_CANCELLED";
    (cancelled || event.name == "BLOCK_JOB_COMPLETED").then_some(())?;
    let number = |key| event.data.get(key).and_then(Value::as_u64).unwrap_or_default();
    let error = event.data.get("error").and_then(Value::as_str).map(str::to_owned);
    Some(Job {
        id: event.data.get("device")?.as_str().filter(|id| names::disk_of(id).is_some())?.to_owned(),
        kind: "backup".to_owned(),
        status: "concluded".to_owned(),
        error: error.or_else(|| cancelled.then(|| "it was cancelled".to_owned())),
        done: number("offset"),
        total: number("len"),
    })
}

#[cfg(test)]
mod tests {
    use serde_json::json;
    use tokio::io::{AsyncBufReadExt, AsyncWriteExt};

    use super::*;
    use crate::capture::event::{Event, Observer};
    use crate::qmp::fake::Server;
    use crate::qmp::{Features, Limits, Monitor};

    /// Wants no more from a moment on.
    struct Until(Instant);

    impl Observer for Until {
        fn event(&self, _: &Event) {}

        fn is_cancelled(&self) -> bool {
            Instant::now() >= self.0
        }
    }

    /// Says that a job goes on, and between the answers an event each millisecond.
    async fn flood(server: &Server) {
        let mut client = server.accept().await;
        client.greet().await;
        let mut line = String::new();
        loop {
            tokio::select! {
                read = client.stream.read_line(&mut line) => {
                    read.unwrap();
                    let command: Value = serde_json::from_str(&line).unwrap();
                    line.clear();
                    client.answer(&command, json!([{"id": names::job(0), "type": "backup", "status": "running"}])).await;
                }
                () = tokio::time::sleep(Duration::from_millis(1)) => {
                    client.stream.write_all(b"{\"event\": \"JOB_STATUS_CHANGE\"}\r\n").await.unwrap();
                }
            }
        }
    }

    #[tokio::test]
    async fn a_flood_of_events_does_not_hide_that_the_run_shall_end() {
        let server = Server::new();
        let waits = async {
            let limits = Limits { connect: Duration::from_secs(10), command: Duration::from_secs(10) };
            let monitor = Monitor::connect(&server.address, limits).await.unwrap();
            let observer = Until(Instant::now() + Duration::from_millis(300));
            let machine = Machine { monitor, observer: &observer, features: Features::default() };
            let mut watch = Watch::new(&machine);
            let mut looks = 0;
            let mut pauses = Pauses::default();
            let waited = watch.wait(&machine, &mut pauses, |_| looks += 1);
            let waited = tokio::time::timeout(Duration::from_secs(5), waited).await;
            assert!(matches!(waited, Ok(Err(Error::Cancelled))), "{waited:?}");
            // it was one
            assert!(looks > 10, "{looks}");
        };
        tokio::select! {
            () = flood(&server) => {}
            () = waits => {}
        }
    }
}
