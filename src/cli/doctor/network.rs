//! Where the node listens, and what carries it there.

use std::path::Path;

use super::facts::Address;
use super::facts::Facts;
use super::facts::ListenFacts;
use super::facts::ListenState;
use super::finding::Finding;
use super::gather::API_SOCKET;
use crate::cli::shell_word;

/// Speed below which the network, not the disks, is what hosts wait for, in Mbit/s.
const SPEED_MIN: u64 = 1000;
/// Smallest MTU that is not a mistake, in bytes: what IPv6 asks for. Clouds have all kinds above.
const MTU_MIN: u64 = 1280;

/// Each address is bound, as a node does, and let go again.
pub(super) fn listen(facts: &Facts) -> Vec<Finding> {
    let judge = |listen: &ListenFacts| judge(facts, listen).on(listen.address.to_string());
    facts.asked.listen.iter().map(judge).collect()
}

fn judge(facts: &Facts, listen: &ListenFacts) -> Finding {
    match &listen.state {
        ListenState::Free => Finding::ok("free"),
        ListenState::Taken if held_by_node(facts, listen) => {
            let pid = facts.asked.node.as_ref().map_or(0, |node| node.pid);
            Finding::ok(format!("held by the node that runs, process {pid}"))
        }
        ListenState::Taken => match &listen.address {
            Address::Tcp(address) => Finding::error(
                "another process listens there",
                format!("ss -ltnp 'sport = :{}', or another {}", address.port(), listen.key),
            ),
            Address::Unix(path) => Finding::error(
                "another process listens there, or it is no socket",
                format!("ss -lxp src {}, or another {}", shell_word(path), listen.key),
            ),
        },
        ListenState::Forbidden => Finding::error(
            "this user may not listen there",
            match &listen.address {
                Address::Tcp(_) => "setcap cap_net_bind_service=+ep \"$(command -v weft)\"".into(),
                Address::Unix(_) => format!("another {}", listen.key),
            },
        ),
        ListenState::Refused(reason) => {
            Finding::error(reason.clone(), format!("ip -brief address, and another {}", listen.key))
        }
    }
}

fn held_by_node(facts: &Facts, listen: &ListenFacts) -> bool {
    let Some(node) = &facts.asked.node else { return false };
    let name = listen.address.to_string();
    // The API's socket is no listener of the list; the node answered there.
    listen.key == API_SOCKET || node.listeners.iter().any(|listener| listener.address == name)
}

/// Interfaces that are up and are more than software: cards, and those of virtual machines.
pub(super) fn interfaces(facts: &Facts) -> Vec<Finding> {
    const PLACE: &str = "/sys/class/net";
    if facts.config().is_none() {
        return Vec::new();
    }
    let of = |name: &str, file: &str| Path::new(PLACE).join(name).join(file);
    let mut names = facts.names(PLACE);
    names.retain(|name| {
        let real = facts.exists(of(name, "device")) || facts.exists(of(name, "bonding"));
        real && facts.text(of(name, "operstate")).as_deref() != Some("down")
    });
    if names.is_empty() {
        return vec![if beyond_loopback(facts) {
            Finding::warn("none is up, and the node listens for other machines", "ip -brief link")
        } else {
            Finding::ok("none is up; the node listens for this machine only")
        }];
    }
    let judge = |name: &String| {
        // Speed is negative, or an error, where nobody knows it.
        let speed = facts
            .number(of(name, "speed"))
            .filter(|speed| (1..u64::from(u32::MAX)).contains(speed));
        let mtu = facts.number(of(name, "mtu"));
        card(facts, name, speed, mtu).on(name)
    };
    names.iter().map(judge).collect()
}

fn card(facts: &Facts, name: &str, speed: Option<u64>, mtu: Option<u64>) -> Finding {
    let fast = match speed {
        Some(speed) => format!("{speed} Mbit/s"),
        None => "speed not known".to_owned(),
    };
    let found = format!("{fast}, MTU {}", mtu.unwrap_or(0));
    // A node for this machine only does not use them.
    if !beyond_loopback(facts) {
        return Finding::ok(format!("{found}; the node listens for this machine only"));
    }
    if speed.is_some_and(|speed| speed < SPEED_MIN) {
        let fix = format!("ethtool {name}, then the cable and the switch");
        return Finding::warn(format!("{found}: slower than any disk"), fix);
    }
    if mtu.is_some_and(|mtu| mtu < MTU_MIN) {
        let fix = format!("ip -details link show {name}, and give it the network's own");
        return Finding::warn(format!("{found}: small frames cost processor time"), fix);
    }
    Finding::ok(found)
}

/// Whether hosts on other machines can reach the node.
fn beyond_loopback(facts: &Facts) -> bool {
    facts.asked.listen.iter().any(|listen| match &listen.address {
        Address::Tcp(address) => !address.ip().is_loopback(),
        Address::Unix(_) => false,
    })
}

/// Cards that could do RDMA; a node does not use them yet.
pub(super) fn rdma(facts: &Facts) -> Vec<Finding> {
    const PLACE: &str = "/sys/class/infiniband";
    let names = facts.names(PLACE);
    if names.is_empty() {
        return vec![Finding::skip("there is none, and none is needed")];
    }
    let judge = |name: &String| {
        // As in "4: ACTIVE".
        let state = facts.text(Path::new(PLACE).join(name).join("ports/1/state"));
        let state = state.as_deref().and_then(|state| state.split(": ").nth(1)).unwrap_or("?");
        Finding::ok(format!("port 1 is {}; not used yet", state.to_lowercase())).on(name)
    };
    names.iter().map(judge).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::doctor::facts::Asked;
    use crate::cli::doctor::facts::fake::System;
    use crate::cli::doctor::facts::fake::configured;
    use crate::cli::doctor::finding::Verdict;

    fn at(address: &str, state: ListenState) -> Asked {
        let address = Address::Tcp(address.parse().expect("an address"));
        Asked { listen: vec![ListenFacts { key: "nbd.listen", address, state }], ..configured("") }
    }

    #[test]
    fn an_address_must_be_free_or_the_nodes_own() {
        let verdict = |state| System::new(&[]).verdict(listen, at("127.0.0.1:10809", state));
        assert_eq!(verdict(ListenState::Free), Verdict::Ok);
        assert_eq!(verdict(ListenState::Taken), Verdict::Error);
        assert_eq!(verdict(ListenState::Forbidden), Verdict::Error);
        assert_eq!(verdict(ListenState::Refused("no such address".into())), Verdict::Error);
    }

    #[test]
    fn an_interface_matters_once_the_node_listens_for_other_machines() {
        let verdict = |speed, mtu, address| {
            let system = System::new(&[
                ("/sys/class/net/eth0/device/uevent", ""),
                ("/sys/class/net/eth0/operstate", "up\n"),
                ("/sys/class/net/eth0/speed", speed),
                ("/sys/class/net/eth0/mtu", mtu),
                ("/sys/class/net/lo/mtu", "65536\n"),
            ]);
            system.verdict(interfaces, at(address, ListenState::Free))
        };
        let (here, anywhere) = ("127.0.0.1:4420", "0.0.0.0:4420");
        assert_eq!(verdict("100\n", "1500\n", here), Verdict::Ok);
        assert_eq!(verdict("100\n", "1500\n", anywhere), Verdict::Warn);
        assert_eq!(verdict("25000\n", "1500\n", anywhere), Verdict::Ok);
        assert_eq!(verdict("-1\n", "1500\n", anywhere), Verdict::Ok);
        assert_eq!(verdict("25000\n", "1460\n", anywhere), Verdict::Ok);
        assert_eq!(verdict("25000\n", "576\n", anywhere), Verdict::Warn);
        let none = |address| System::new(&[]).verdict(interfaces, at(address, ListenState::Free));
        assert_eq!((none(here), none(anywhere)), (Verdict::Ok, Verdict::Warn));
    }

    #[test]
    fn rdma_cards_are_listed() {
        let system = System::new(&[("/sys/class/infiniband/mlx5_0/ports/1/state", "4: ACTIVE\n")]);
        let found = system.says(rdma, Asked::default()).remove(0);
        assert_eq!((found.verdict, found.on.as_slice()), (Verdict::Ok, &["mlx5_0".to_owned()][..]));
        assert_eq!(found.found, "port 1 is active; not used yet");
        assert_eq!(System::new(&[]).verdict(rdma, Asked::default()), Verdict::Skip);
    }
}
