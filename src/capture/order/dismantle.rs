//! Takes apart what a run has built in a machine.

use std::time::{Duration, Instant};

use crate::capture::error::Error;
use crate::capture::jobs::{Watch, own_jobs};
use crate::capture::machine::observe::Job;
use crate::capture::machine::{GLANCE, Machine};
use crate::capture::order::teardown::Teardown;

/// How long jobs may take to end when they are told to.
const ENDING: Duration = Duration::from_secs(60);

/// The machine is as it was, but for the nodes that go last.
pub(crate) async fn dismantle(machine: &Machine<'_>) -> Result<(), Error> {
    let mut teardown = Teardown::new(&machine.observe().await?);
    // jobs end also where the machine does not go on
    let resumed = machine.send_all(&teardown.resume).await;
    for command in &teardown.cancel {
        machine.send_unless_ended(command).await?;
    }
    let until = Instant::now() + ENDING;
    let mut watch = Watch::new(machine);
    loop {
        let jobs = own_jobs(machine).await?;
        if jobs.iter().all(Job::is_concluded) {
            break;
        }
        if Instant::now() > until {
            return Err(Error::JobsLeft { jobs: jobs.into_iter().map(|job| job.id).collect() });
        }
        watch.has_event_within(GLANCE).await;
    }
    teardown = Teardown::new(&machine.observe().await?);
    machine.send_all(&teardown.bypass).await?;
    while !teardown.bypass.is_empty() && Instant::now() < until {
        watch.has_event_within(GLANCE).await;
        teardown = Teardown::new(&machine.observe().await?);
    }
    machine.send_all(&teardown.dismantle).await?;
    resumed
}
