//! A guest that a run may have frozen, until it is known to be thawed.
//!
//! A node says so, which ends with QEMU, as its guest does. On it is a bitmap for each agent, whose name is the address of
//! that agent: so whoever comes next can thaw the guest, from any folder, however long the run is over.

use std::time::Duration;

use crate::agent::{self, Agent, FsStatus};
use crate::capture::error::Error;
use crate::capture::event::Event;
use crate::capture::machine::Machine;
use crate::capture::machine::observe::Observed;
use crate::capture::plan;
use crate::errors;
use crate::qmp::{Address, Command};

/// The node.
pub(crate) const NODE: &str = "qmpbackup-frozen";

/// How long the agent may take for an answer.
pub(crate) const LIMIT: Duration = Duration::from_secs(10);

/// Marks a guest that its agent is about to freeze.
pub(crate) async fn mark(machine: &Machine<'_>, observed: &Observed, agent: &Address) -> Result<(), Error> {
    let name = absolute(agent).to_string();
    let node = observed.node(NODE);
    if node.is_none() {
        machine.send(&plan::mark(NODE)).await?;
    }
    if node.is_none_or(|node| node.bitmaps.iter().all(|bitmap| bitmap.name != name)) {
        machine.send(&Command::new("block-dirty-bitmap-add").with("node", NODE).with("name", name)).await?;
    }
    Ok(())
}

/// Thaws a guest that is marked, by the first agent that can, and takes the mark away. `named` is an agent of it, too.
///
/// # Errors
/// [`Error::Frozen`] where no agent can: the mark stays.
pub(crate) async fn thaw(machine: &Machine<'_>, observed: &Observed, named: Option<&Address>) -> Result<(), Error> {
    if observed.node(NODE).is_none() {
        return Ok(());
    }
    let agents = agents(observed, named);
    let mut reasons = Vec::new();
    for agent in &agents {
        let Err(error) = ask(machine, agent).await else {
            reasons.clear();
            break;
        };
        reasons.push(errors::line(&error));
    }
    // none, too, where a run has ended before it could freeze anything
    if reasons.is_empty() {
        return machine.remove_node(NODE).await;
    }
    let agents: Vec<String> = agents.iter().map(ToString::to_string).collect();
    Err(Error::Frozen { agents: agents.join(" or "), reason: reasons.join("; ") })
}

/// The agents of a guest that may be frozen.
fn agents(observed: &Observed, named: Option<&Address>) -> Vec<Address> {
    let bitmaps = observed.node(NODE).into_iter().flat_map(|node| &node.bitmaps);
    let mut agents: Vec<Address> = bitmaps.filter_map(|bitmap| bitmap.name.parse().ok()).collect();
    let named = named.map(absolute).filter(|named| !agents.is_empty() && !agents.contains(named));
    agents.extend(named);
    agents
}

async fn ask(machine: &Machine<'_>, address: &Address) -> Result<(), agent::Error> {
    let mut agent = Agent::connect(address, LIMIT).await?;
    if agent.status().await? == FsStatus::Frozen {
        agent.thaw().await?;
        machine.tell(&Event::Recovered { what: "the guest's file systems were frozen, and are thawed".to_owned() });
    }
    Ok(())
}

/// The address as it is from any working directory.
fn absolute(address: &Address) -> Address {
    match address {
        Address::Unix(path) => Address::Unix(std::path::absolute(path).unwrap_or_else(|_| path.clone())),
        Address::Tcp { .. } => address.clone(),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::capture::machine::nodes::nodes;

    /// A machine whose guest is marked with these agents.
    fn marked(agents: &[&str]) -> Observed {
        let bitmap = |name: &&str| json!({"name": name, "count": 0, "granularity": 65536});
        let bitmaps: Vec<_> = agents.iter().map(bitmap).collect();
        let reply =
            json!([{"node-name": NODE, "drv": "null-co", "file": "null-co://", "ro": false, "dirty-bitmaps": bitmaps}]);
        Observed { nodes: nodes(&reply).unwrap(), ..Observed::default() }
    }

    #[test]
    fn a_guest_is_thawed_by_the_agent_that_froze_it_or_one_that_is_named() {
        let agents = |marked: &Observed, named: Option<&str>| -> Vec<String> {
            let named = named.map(|named| named.parse().unwrap());
            agents(marked, named.as_ref()).iter().map(ToString::to_string).collect()
        };
        let two = marked(&["/run/a", "tcp:[::1]:5"]);
        assert_eq!(agents(&two, None), ["/run/a", "tcp:[::1]:5"]);
        assert_eq!(agents(&two, Some("/run/b")), ["/run/a", "tcp:[::1]:5", "/run/b"]);
        assert_eq!(agents(&two, Some("unix:/run/a")), ["/run/a", "tcp:[::1]:5"]);
        // nothing is frozen yet, or any more
        for none in [marked(&[]), Observed::default()] {
            assert_eq!(agents(&none, Some("/run/b")), [""; 0]);
        }
    }

    #[test]
    fn an_address_is_the_same_from_any_folder() {
        let here = std::env::current_dir().unwrap().join("run/a");
        assert_eq!(absolute(&"run/a".parse().unwrap()), Address::Unix(here));
        let tcp: Address = "tcp:host:5".parse().unwrap();
        assert_eq!(absolute(&tcp), tcp);
    }
}
