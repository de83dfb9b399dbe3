//! The moment of the snapshot: frozen file systems, a machine that stands still, and both again as they were.

use std::convert::Infallible;
use std::time::{Duration, Instant};

use super::error::Error;
use super::event::Event;
use super::machine::Machine;
use super::names;
use super::observe;
use super::order::{self, AGENT_LIMIT};
use super::plan::{Plan, mark_moment};
use super::request::Request;
use crate::agent::Agent;
use crate::causes;
use crate::qmp::{Address, Command};

/// How long a monitor that has failed may take to let the machine go on.
const LAST: Duration = Duration::from_secs(5);

/// Time between two attempts to thaw a guest.
const PAUSE: Duration = Duration::from_secs(1);

/// The agent, if it is there and can freeze.
pub(super) async fn find_agent(machine: &Machine<'_>, request: &Request, running: bool) -> Option<Agent> {
    let found = async {
        if !running {
            return Err("the machine does not run".to_owned());
        }
        let Some(address) = &request.connection.agent else {
            return Err("--quiesce needs --agent-socket".to_owned());
        };
        let mut agent = Agent::connect(address, AGENT_LIMIT).await.map_err(|error| causes::line(&error))?;
        match agent.supports_freeze().await {
            Ok(true) => Ok(agent),
            Ok(false) => Err("the guest agent cannot freeze file systems".to_owned()),
            Err(error) => Err(causes::line(&error)),
        }
    };
    match found.await {
        Ok(agent) => Some(agent),
        Err(reason) => {
            machine.tell(&Event::NotFrozen { reason });
            None
        }
    }
}

/// Takes the moment. Whatever happens in it, the machine goes on and the guest is thawed afterwards; says whether the guest
/// is known to be.
pub(super) async fn take(
    machine: &Machine<'_>,
    plan: &Plan,
    running: bool,
    mut agent: Option<Agent>,
) -> Result<bool, Error> {
    let stops = plan.moment.iter().any(|command| command.name() == "stop");
    same_state(machine, running).await?;
    let marked = stops || agent.is_some();
    let mut thawed = !marked || mark(machine).await? || agent.is_some();
    // what is to be told waits until the guest goes on: nobody may read it
    let mut events = Vec::new();
    let mut frozen = None;
    if let Some(agent) = &mut agent {
        match agent.freeze().await {
            Ok(count) => frozen = Some((Instant::now(), count)),
            Err(error) => events.push(Event::NotFrozen { reason: causes::line(&error) }),
        }
    }
    let (result, stopped) = send(machine, plan, &mut events).await;
    if let Some(agent) = &mut agent {
        // a freeze that was given up may have come to pass
        if let Err(error) = agent.thaw().await {
            thawed = false;
            events.push(Event::Trouble { what: format!("the guest is perhaps not thawed: {}", causes::line(&error)) });
        }
    }
    let frozen = frozen.map(|(since, count)| (since.elapsed(), count));
    for event in &events {
        machine.tell(event);
    }
    result?;
    if !running {
        same_state(machine, running).await?;
    }
    if marked && thawed {
        machine.remove_node(names::MOMENT).await?;
    }
    machine.tell(&Event::Moment { stopped, frozen });
    Ok(thawed)
}

/// Sends the commands of the moment; after one that fails, only what lets the machine go on. Says how long it was stopped.
async fn send(machine: &Machine<'_>, plan: &Plan, events: &mut Vec<Event>) -> (Result<(), Error>, Option<Duration>) {
    let mut stopped = None;
    let mut since = None;
    let mut result = Ok(());
    for command in &plan.moment {
        let ends = command.name() == "cont";
        if result.is_err() && !ends {
            continue;
        }
        if command.name() == "stop" {
            since = Some(Instant::now());
        }
        // frozen file systems do not wait for a monitor that has not answered already
        let sent = match result {
            Ok(()) => machine.monitor.execute(command).await,
            Err(_) => machine.monitor.execute_within(command, LAST).await,
        };
        if ends {
            stopped = since.map(|since: Instant| since.elapsed());
        }
        events.push(Event::Sent(command.clone()));
        result = result.and(sent.map(drop).map_err(Error::from));
    }
    (result, stopped)
}

/// Marks the machine as one that may stand still, unless it is marked: then an earlier run could not thaw the guest.
async fn mark(machine: &Machine<'_>) -> Result<bool, Error> {
    match machine.send(&mark_moment()).await {
        Err(error) if error.is_duplicate() => Ok(false),
        sent => sent.map(|_| true),
    }
}

/// Makes sure that nobody has stopped the machine, or let it go on, since the plan was made.
async fn same_state(machine: &Machine<'_>, running: bool) -> Result<(), Error> {
    let status = observe::status(&machine.monitor.execute(&Command::new("query-status")).await?);
    if (status == "running") == running { Ok(()) } else { Err(Error::Changed { status }) }
}

/// Thaws a guest as soon as its agent answers; copying may take hours.
pub(super) async fn keep_thawing(machine: &Machine<'_>, agent: Option<&Address>, mut thawed: bool) -> Infallible {
    while !thawed {
        tokio::time::sleep(PAUSE).await;
        // what fails here is told at the end of the run
        thawed = order::thaw(machine, agent).await.is_ok() && machine.remove_node(names::MOMENT).await.is_ok();
    }
    std::future::pending().await
}
