//! The moment of the snapshot: frozen file systems, a machine that stands still, and both again as they were.

use std::convert::Infallible;
use std::time::{Duration, Instant};

use crate::agent::{self, Agent};
use crate::capture::error::Error;
use crate::capture::event::Event;
use crate::capture::machine::Machine;
use crate::capture::machine::abilities::is_fragile;
use crate::capture::machine::nodes::delete_node;
use crate::capture::machine::observe;
use crate::capture::names;
use crate::capture::order::frozen;
use crate::capture::plan::{self, Plan};
use crate::capture::prepare::Prepared;
use crate::capture::request::Request;
use crate::errors;
use crate::qmp::{self, Address, Command, Events, EventsError};

/// How long a monitor that has failed may take to let the machine go on.
const LAST: Duration = Duration::from_secs(5);

/// How many times the timeout QEMU may take to answer while the machine stands still. It writes its disks back then.
const ANSWERS: u32 = 10;

/// Time between two attempts to thaw a guest.
const PAUSE: Duration = Duration::from_secs(1);

/// The agent, if it is there and can freeze, and where it is.
pub(super) async fn find_agent<'a>(
    machine: &Machine<'_>,
    request: &'a Request,
    running: bool,
) -> Option<(&'a Address, Agent)> {
    let found = async {
        if !running {
            return Err("the machine does not run".to_owned());
        }
        let Some(address) = &request.connection.agent else {
            return Err("--quiesce needs --agent-socket".to_owned());
        };
        let mut agent = Agent::connect(address, frozen::LIMIT).await.map_err(|error| errors::line(&error))?;
        match agent.supports_freeze().await {
            Ok(true) => Ok((address, agent)),
            Ok(false) => Err("the guest agent cannot freeze file systems".to_owned()),
            Err(error) => Err(errors::line(&error)),
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
    request: &Request,
    prepared: &Prepared,
    plan: &Plan,
    agent: Option<(&Address, Agent)>,
) -> Result<bool, Error> {
    let running = prepared.running;
    let stops = plan.moment.iter().any(|command| command.name() == "stop");
    let observed = machine.observe().await?;
    // by an earlier run
    let may_be_frozen = observed.node(frozen::NODE).is_some();
    if let Some((address, _)) = agent {
        frozen::mark(machine, &observed, address).await?;
    }
    let mut agent = agent.map(|(_, agent)| agent);
    // who stops it after that is taken for us
    same_state(machine, running).await?;
    if stops {
        machine.send(&plan::mark(names::MOMENT)).await?;
    }
    // what is to be told waits until the guest goes on: nobody may read it
    let mut events = Vec::new();
    let mut frozen = None;
    let mut cancelled: Result<(), Error> = Ok(());
    if let Some(agent) = &mut agent {
        tokio::select! {
            froze = agent.freeze(request.connection.timeout) => match froze {
                Ok(count) => frozen = Some((Instant::now(), count)),
                Err(error) => events.push(Event::NotFrozen { reason: errors::line(&error) }),
            },
            error = machine.cancelled() => cancelled = Err(error),
        }
    }
    // somebody may have stopped it while the guest took its time
    let ready = match cancelled {
        Ok(()) => same_state(machine, running).await,
        cancelled => cancelled,
    };
    let untouched = ready.is_err();
    let (result, stopped) = match ready {
        Ok(()) => send(machine, prepared, plan, &mut events).await,
        unready => (unready, None),
    };
    let thaw = async {
        // a freeze that was given up may have come to pass
        if let Some(agent) = &mut agent {
            agent.thaw().await?;
        }
        Ok::<(), agent::Error>(())
    };
    // who stops the machine from now on means it, and an agent may take its time
    let (unmarked, thaw) = tokio::join!(unmark(machine, stopped.is_some() || (stops && untouched), &mut events), thaw);
    if let Err(error) = &thaw {
        events.push(Event::Trouble { what: format!("the guest is perhaps not thawed: {}", errors::line(error)) });
    }
    let thawed = if agent.is_some() { thaw.is_ok() } else { !may_be_frozen };
    let frozen = frozen.map(|(since, count)| (since.elapsed(), count));
    for event in &events {
        machine.tell(event);
    }
    result?;
    unmarked?;
    if !running {
        same_state(machine, running).await?;
    }
    // a snapshot that came between the look and the moment
    if !is_fragile(&machine.features) {
        prepared.same_format_nodes(machine).await?;
    }
    if agent.is_some() && thawed {
        machine.remove_node(frozen::NODE).await?;
    }
    machine.tell(&Event::Moment { stopped, frozen });
    Ok(thawed)
}

/// Sends the commands of the moment; after one that fails, only what lets the machine go on. Says how long it was stopped.
async fn send(
    machine: &Machine<'_>,
    prepared: &Prepared,
    plan: &Plan,
    events: &mut Vec<Event>,
) -> (Result<(), Error>, Option<Duration>) {
    let mut stopped = None;
    let mut since = None;
    let mut result = Ok(());
    let begins = plan.moment.iter().position(|command| command.name() != "stop");
    let mut seen = machine.monitor.events();
    for (at, command) in plan.moment.iter().enumerate() {
        if result.is_ok() && Some(at) == begins {
            // as late as can be: a guest may take its time to freeze, and somebody a snapshot meanwhile
            result = prepared.same_nodes(machine).await;
        }
        let ends = command.name() == "cont";
        if ends {
            result = result.and_then(|()| stood_still(plan, &mut seen));
        }
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
        if ends && sent.is_ok() {
            stopped = since.map(|since: Instant| since.elapsed());
        }
        events.push(Event::Sent(command.clone()));
        result = match (result, sent) {
            // whatever was wrong before
            (_, Err(source @ qmp::Error::Timeout { .. })) if ends && since.is_some() => Err(Error::Standing { source }),
            (result, sent) => result.and(sent.map(drop).map_err(Error::from)),
        };
    }
    if since.is_none() {
        result = result.and_then(|()| stood_still(plan, &mut seen));
    }
    (result, stopped)
}

/// Makes sure that nobody else has let the machine go on between the commands for its disks. A single command is one moment in
/// any case.
fn stood_still(plan: &Plan, events: &mut Events) -> Result<(), Error> {
    let commands = plan.moment.iter().filter(|command| !matches!(command.name(), "stop" | "cont"));
    // of events that were missed nobody knows
    let mut seen = std::iter::from_fn(|| match events.try_next() {
        Ok(event) => event.map(|event| event.name == "RESUME"),
        Err(EventsError::Lagged(_)) => Some(true),
        Err(EventsError::Closed) => None,
    });
    if commands.count() > 1 && seen.any(|resumed| resumed) {
        return Err(Error::Changed { status: "running".to_owned() });
    }
    Ok(())
}

/// Waits for a QEMU that was told to stop the machine and does not answer: it carries out what it was sent, `cont` among it,
/// when it answers again, and forgets that when the connection ends.
pub(super) async fn outlast(machine: &Machine<'_>, request: &Request) {
    let limit = request.connection.timeout.saturating_mul(ANSWERS);
    let what =
        format!("the machine perhaps stands still, since QEMU does not answer: waiting for it, {limit:?} at most");
    machine.tell(&Event::Trouble { what });
    // what it says is asked again
    machine.monitor.execute_within(&Command::new("query-status"), limit).await.ok();
}

/// Takes the mark from a machine that goes on.
async fn unmark(machine: &Machine<'_>, goes_on: bool, events: &mut Vec<Event>) -> Result<(), Error> {
    if goes_on {
        let command = delete_node(names::MOMENT);
        events.push(Event::Sent(command.clone()));
        machine.monitor.execute(&command).await?;
    }
    Ok(())
}

/// Makes sure that nobody has stopped the machine, or let it go on, since the plan was made.
async fn same_state(machine: &Machine<'_>, running: bool) -> Result<(), Error> {
    let status = observe::status(&machine.monitor.execute(&Command::new("query-status")).await?);
    if (status == "running") == running { Ok(()) } else { Err(Error::Changed { status }) }
}

/// Thaws a guest as soon as an agent of it answers; copying may take hours.
pub(super) async fn keep_thawing(machine: &Machine<'_>, named: Option<&Address>, mut thawed: bool) -> Infallible {
    while !thawed {
        // what fails here is told at the end of the run
        if let Ok(observed) = machine.observe().await {
            thawed = frozen::thaw(machine, &observed, named).await.is_ok();
        }
        tokio::time::sleep(PAUSE).await;
    }
    std::future::pending().await
}
