//! A machine that is talked to: each command is told to the observer, and none is sent when the run shall end.

pub(crate) mod device;
pub(crate) mod devices;
pub(crate) mod file_name;
pub(crate) mod graph;
pub(crate) mod nodes;
pub(crate) mod observe;
pub(crate) mod reply;
pub(crate) mod selection;
pub(crate) mod state;

use std::path::PathBuf;
use std::time::{Duration, Instant};

use serde_json::Value;

use self::observe::{Job, Observed};
use crate::capture::error::Error;
use crate::capture::event::{Event, Observer};
use crate::capture::names;
use crate::capture::order::teardown::{Teardown, delete_node};
use crate::capture::seal::pauses::Pauses;
use crate::qmp::{self, Command, Events, EventsError, Features, Monitor};

/// Time between two looks at whether the run shall end.
const GLANCE: Duration = Duration::from_millis(100);

/// Time between two looks at jobs when no event tells of them.
const LOOK: Duration = Duration::from_secs(1);

/// How long jobs may take to end when they are told to.
const ENDING: Duration = Duration::from_secs(60);

pub(crate) struct Machine<'a> {
    pub(crate) monitor: Monitor,
    pub(crate) observer: &'a dyn Observer,
    pub(crate) features: Features,
}

impl Machine<'_> {
    /// Sends a command, whatever the observer wants.
    pub(crate) async fn send(&self, command: &Command) -> Result<Value, Error> {
        self.observer.event(&Event::Sent(command.clone()));
        Ok(self.monitor.execute(command).await?)
    }

    /// Sends a command unless the run shall end.
    pub(crate) async fn step(&self, command: &Command) -> Result<Value, Error> {
        self.go_on()?;
        self.send(command).await
    }

    pub(crate) fn go_on(&self) -> Result<(), Error> {
        if self.observer.is_cancelled() { Err(Error::Cancelled) } else { Ok(()) }
    }

    /// Waits until the observer wants no more.
    pub(crate) async fn cancelled(&self) -> Error {
        loop {
            if let Err(error) = self.go_on() {
                return error;
            }
            tokio::time::sleep(GLANCE).await;
        }
    }

    pub(crate) fn tell(&self, event: &Event) {
        self.observer.event(event);
    }

    pub(crate) async fn observe(&self) -> Result<Observed, Error> {
        Observed::ask(&self.monitor, &self.features).await
    }

    /// QEMU's working directory, where it can be told.
    pub(crate) fn cwd(&self) -> Option<PathBuf> {
        let pid = self.monitor.peer().and_then(|peer| peer.pid)?;
        std::fs::read_link(format!("/proc/{pid}/cwd")).ok()
    }

    async fn own_jobs(&self) -> Result<Vec<Job>, Error> {
        let mut jobs = observe::jobs(&self.monitor.execute(&Command::new("query-jobs")).await?);
        jobs.retain(|job| names::disk_of(&job.id).is_some());
        // QEMU lists the newest first
        jobs.sort_by_key(|job| names::disk_of(&job.id));
        Ok(jobs)
    }

    /// Begins to watch jobs; before they begin.
    pub(crate) fn watch(&self) -> Watch {
        Watch { events: self.monitor.events(), ended: Vec::new() }
    }

    /// Waits until all jobs have ended, or one has failed, has them pause meanwhile, and tells of them. They come back as
    /// they were then.
    pub(crate) async fn wait(
        &self,
        watch: &mut Watch,
        pauses: &mut Pauses,
        mut tell: impl FnMut(&[Job]),
    ) -> Result<Vec<Job>, Error> {
        loop {
            self.go_on()?;
            let mut jobs = self.own_jobs().await?;
            watch.drain();
            // an event that came after the answer knows more
            jobs.retain(|job| !watch.ended.iter().any(|ended| ended.id == job.id));
            jobs.extend(watch.ended.iter().cloned());
            jobs.sort_by_key(|job| names::disk_of(&job.id));
            tell(&jobs);
            // the others go on until they are told to end, and need not
            if jobs.iter().all(Job::is_concluded) || jobs.iter().any(|job| job.error.is_some()) {
                return Ok(jobs);
            }
            for job in &jobs {
                let Some(command) = pauses.next(job) else { continue };
                if !self.send_unless_ended(&command).await? {
                    pauses.refused(job);
                }
            }
            let until = Instant::now() + LOOK;
            let glance = if pauses.are_none() { GLANCE } else { Pauses::GLANCE };
            while Instant::now() < until && !watch.has_event_within(glance).await && !pauses.are_due() {
                self.go_on()?;
            }
        }
    }

    /// Takes apart what a run has built: the machine is as it was, but for the nodes that go last.
    pub(crate) async fn dismantle(&self) -> Result<(), Error> {
        let teardown = Teardown::new(&self.observe().await?);
        // jobs end also where the machine does not go on
        let resumed = self.send_all(&teardown.resume).await;
        for command in &teardown.cancel {
            self.send_unless_ended(command).await?;
        }
        let until = Instant::now() + ENDING;
        let mut watch = self.watch();
        loop {
            let jobs = self.own_jobs().await?;
            if jobs.iter().all(Job::is_concluded) {
                break;
            }
            if Instant::now() > until {
                return Err(Error::JobsLeft { jobs: jobs.into_iter().map(|job| job.id).collect() });
            }
            watch.has_event_within(GLANCE).await;
        }
        self.send_all(&Teardown::new(&self.observe().await?).bypass).await?;
        while !Teardown::new(&self.observe().await?).bypass.is_empty() && Instant::now() < until {
            watch.has_event_within(GLANCE).await;
        }
        self.send_all(&Teardown::new(&self.observe().await?).dismantle).await?;
        resumed
    }

    /// Sends one after the other, until one is refused.
    async fn send_all(&self, commands: &[Command]) -> Result<(), Error> {
        for command in commands {
            self.send(command).await?;
        }
        Ok(())
    }

    /// Sends a command for a job, which QEMU refuses where the job has ended by itself. Whether it took it comes back.
    async fn send_unless_ended(&self, command: &Command) -> Result<bool, Error> {
        match self.send(command).await {
            Err(Error::Monitor(error)) if error.refused().is_some() => Ok(false),
            result => result.map(|_| true),
        }
    }

    /// Removes a node if it is there.
    pub(crate) async fn remove_node(&self, name: &str) -> Result<(), Error> {
        if self.observe().await?.node(name).is_some() {
            self.send(&delete_node(name)).await?;
        }
        Ok(())
    }
}

/// Sees jobs end, those too that are gone with that.
pub(crate) struct Watch {
    events: Events,
    ended: Vec<Job>,
}

impl Watch {
    /// Whether something happened; a closed connection shows with the next command.
    async fn has_event_within(&mut self, limit: Duration) -> bool {
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
    use crate::qmp::Limits;
    use crate::qmp::fake::Server;

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
            let mut watch = machine.watch();
            let mut looks = 0;
            let mut pauses = Pauses::default();
            let waited = machine.wait(&mut watch, &mut pauses, |_| looks += 1);
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
