//! `weft doctor`: is this machine fit for a node, or with `--host` for using volumes?
//!
//! [`NODE_CHECKS`] and [`HOST_CHECKS`] are all there is; `docs/doctor.md` explains them, and a test
//! compares. A check is a function of [`Facts`], which `gather.rs` collects first; so each is tested
//! on made-up systems, good and bad.

use std::path::PathBuf;

use clap::Args;
use serde::Serialize;

use super::OutputArguments;
use super::exit::FAILED;
use super::exit::Failure;
use super::output;
use facts::Facts;
use finding::Finding;
use finding::Verdict;
use finding::merged;

mod attached;
mod clock;
mod device;
mod directory;
mod disk;
mod facts;
mod finding;
mod gather;
mod host;
mod kernel;
mod memory;
mod network;
mod processor;
mod settings;

/// What to look at.
#[derive(Debug, Args)]
pub(super) struct DoctorArguments {
    /// Look at this machine as a host that uses volumes, not as one for a node
    #[arg(long, conflicts_with = "config")]
    host: bool,
    /// The configuration the node is to run on [default: the defaults]
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    #[command(flatten)]
    output: OutputArguments,
}

/// One thing to look at.
pub(super) struct Check {
    /// Stable: scripts may rely on it.
    name: &'static str,
    /// What it looks at, as docs/doctor.md says it.
    about: &'static str,
    /// Nothing found means that it could not look without a valid configuration.
    run: fn(&Facts) -> Vec<Finding>,
}

const fn check(name: &'static str, about: &'static str, run: fn(&Facts) -> Vec<Finding>) -> Check {
    Check { name, about, run }
}

/// What a node needs, in the order it needs it.
const NODE_CHECKS: &[Check] = &[
    check("config", "the configuration is valid", settings::config),
    check("io-uring", "the kernel sets up a ring as a node does", kernel::io_uring),
    check(
        "open-files",
        "the hard limit of open files reaches for all connections",
        kernel::open_files,
    ),
    check(
        "locked-memory",
        "rings fit the limit of locked memory, where they count",
        kernel::locked_memory,
    ),
    check(
        "memory",
        "the caches and what is in flight fit into memory, available memory and control group",
        memory::memory,
    ),
    check("processor", "instructions for erasure code, checksums and TLS", processor::processor),
    check("threads", "no more data-plane threads than processors", processor::threads),
    check("clock", "the wall clock is synchronised", clock::clock),
    check(
        "data-dir",
        "the node's directory is there and writable, or can be made",
        directory::data_dir,
    ),
    check(
        "file-system",
        "the file systems of directory and device files keep what they promise",
        directory::file_system,
    ),
    check("space", "device files, which are sparse, find room when they fill", directory::space),
    check(
        "devices",
        "each device is there, free, large enough and takes O_DIRECT",
        device::devices,
    ),
    check("shared-disks", "no disk has more devices than the pod may lose", disk::shared_disks),
    check("write-cache", "volatile caches of disks, and FUA", disk::write_cache),
    check("rotational", "disks that turn", disk::rotational),
    check("scheduler", "schedulers that cost time", disk::scheduler),
    check(
        "listen",
        "addresses and sockets are free, or held by the node that runs",
        network::listen,
    ),
    check("tls", "certificate and key are readable, and the key is private", settings::tls),
    check("interfaces", "speed and MTU of network interfaces", network::interfaces),
    check("rdma", "RDMA cards; not used yet", network::rdma),
];

/// What a host needs.
const HOST_CHECKS: &[Check] = &[
    check("nbd-module", "the kernel's module nbd", host::nbd_module),
    check("nvme-tcp-module", "the kernel's module nvme-tcp", host::nvme_tcp_module),
    check("nbd-client", "the program nbd-client", host::nbd_client),
    check("nvme-cli", "the program nvme", host::nvme_cli),
    check("nbds-max", "an nbd device is free", host::nbds_max),
    check("multipath", "native NVMe multipath is on", host::multipath),
    check("io-timeout", "NVMe requests are not given up too soon", host::io_timeout),
    check("identity", "the host has a lasting name: /etc/nvme/hostnqn and hostid", host::identity),
    check("queues", "scheduler and request size of attached volumes", attached::queues),
    check(
        "loss-timeout",
        "how long NVMe controllers wait for a node that is away",
        attached::loss_timeout,
    ),
    check("reconnect", "what is listed to be attached at each start is", attached::reconnect),
];

/// The checks of a node's machine, or of a host, each with what it looks at.
pub(super) fn checks(host: bool) -> Vec<(&'static str, &'static str)> {
    let checks = if host { HOST_CHECKS } else { NODE_CHECKS };
    checks.iter().map(|check| (check.name, check.about)).collect()
}

/// All that was found.
#[derive(Debug, Serialize)]
struct Report {
    ok: usize,
    warnings: usize,
    errors: usize,
    skipped: usize,
    findings: Vec<Finding>,
}

impl Report {
    fn new(checks: &[Check], facts: &Facts) -> Self {
        let findings = merged(checks.iter().flat_map(|check| results(check, facts)).collect());
        let count = |verdict| findings.iter().filter(|found| found.verdict == verdict).count();
        Self {
            ok: count(Verdict::Ok),
            warnings: count(Verdict::Warn),
            errors: count(Verdict::Error),
            skipped: count(Verdict::Skip),
            findings,
        }
    }

    /// A line for each finding, below it how to put it right, and a count in the end.
    fn text(&self) -> String {
        let width = self.findings.iter().map(|found| found.check.len()).max().unwrap_or(0);
        let mut text = String::new();
        for found in &self.findings {
            let (verdict, check) = (found.verdict.text(), found.check);
            let on = subjects(&found.on);
            text.push_str(&format!("{verdict:<4}  {check:<width$}  {on}{}\n", found.found));
            if let Some(fix) = &found.fix {
                text.push_str(&format!("{:<4}  {:<width$}  fix: {fix}\n", "", ""));
            }
        }
        let Self { ok, warnings, errors, skipped, .. } = self;
        text + &format!("\n{ok} OK, {warnings} WARN, {errors} ERR, {skipped} SKIP\n")
    }
}

/// Subjects before what was found on them; the middle of many is left out.
fn subjects(on: &[String]) -> String {
    match on {
        [] => String::new(),
        [first, .., last] if on.len() > 3 => format!("{first} ... {last} ({}): ", on.len()),
        on => format!("{}: ", on.join(", ")),
    }
}

fn results(check: &Check, facts: &Facts) -> Vec<Finding> {
    let mut found = (check.run)(facts);
    if found.is_empty() {
        found.push(Finding::skip("needs a valid configuration"));
    }
    for finding in &mut found {
        finding.check = check.name;
    }
    found
}

/// Looks, prints, and fails if anything is an error.
pub(super) fn run(data_dir: Option<PathBuf>, arguments: DoctorArguments) -> Result<(), Failure> {
    let (checks, asked) = match arguments.host {
        true => (HOST_CHECKS, gather::host()),
        false => (NODE_CHECKS, gather::node(data_dir, arguments.config)),
    };
    let report = Report::new(checks, &Facts::new("/", asked));
    output::show(&arguments.output, &report, Report::text)?;
    match report.errors {
        0 => Ok(()),
        1 => Err(Failure { code: FAILED, message: "doctor: 1 error, see above".to_owned() }),
        count => {
            Err(Failure { code: FAILED, message: format!("doctor: {count} errors, see above") })
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::doctor::facts::Asked;
    use crate::cli::doctor::facts::fake::System;

    /// The page that explains the checks.
    const PAGE: &str = include_str!("../../../docs/doctor.md");

    #[test]
    fn the_page_lists_every_check_in_order_and_as_the_code_says_it() {
        let row = |check: &Check| format!("| `{}` | {} |", check.name, check.about);
        let rows: Vec<String> = NODE_CHECKS.iter().chain(HOST_CHECKS).map(row).collect();
        let listed: Vec<&str> = PAGE.lines().filter(|line| line.starts_with("| `")).collect();
        assert_eq!(listed.len(), rows.len(), "{listed:#?}");
        for (listed, row) in listed.iter().zip(&rows) {
            assert!(listed.starts_with(row.as_str()), "{listed}\nis not\n{row}");
        }
    }

    #[test]
    fn without_a_configuration_checks_are_skipped_not_passed() {
        let system = System::new(&[]);
        let asked = Asked { config: Some(Err("no".into())), ..Asked::default() };
        let report = Report::new(NODE_CHECKS, &Facts::new(system.path("/"), asked));
        assert!(report.errors == 1 && report.ok == 0, "{}", report.text());
        assert!(report.text().contains("needs a valid configuration"));
    }

    #[test]
    fn fixes_stand_below_what_they_fix() {
        let warn = |on: &str| Finding { check: "a", ..Finding::warn("bad", "do it") }.on(on);
        let findings = merged(["d0", "d1", "d2", "d3"].map(warn).to_vec());
        let report = Report { ok: 0, warnings: 1, errors: 0, skipped: 0, findings };
        let expected =
            "WARN  a  d0 ... d3 (4): bad\n         fix: do it\n\n0 OK, 1 WARN, 0 ERR, 0 SKIP\n";
        assert_eq!(report.text(), expected);
    }
}
