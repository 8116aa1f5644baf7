//! A host's side: what it needs to use volumes over NBD and NVMe/TCP.

use super::facts::Facts;
use super::finding::Finding;

/// How a module of the kernel is there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Module {
    Loaded,
    BuiltIn,
    /// Not loaded, but `modprobe` finds it.
    Present,
    Missing,
    /// Neither loaded nor is there a list to look in.
    Unknown,
}

/// Looks for a module, spelled with underscores.
fn module(facts: &Facts, name: &str) -> Module {
    let loaded = facts.text("/proc/modules").unwrap_or_default();
    if loaded.lines().any(|line| line.split(' ').next() == Some(name)) {
        return Module::Loaded;
    }
    let Some(release) = facts.kernel() else { return Module::Unknown };
    let list = |file: &str| facts.text(format!("/lib/modules/{release}/{file}"));
    // Files of modules are spelled either way, and compressed in several.
    let named = |path: &str| {
        let file = path.rsplit('/').next().unwrap_or(path);
        file.split(".ko").next().unwrap_or(file).replace('-', "_") == name
    };
    if list("modules.builtin").is_some_and(|text| text.lines().any(named)) {
        return Module::BuiltIn;
    }
    let path = |line: &str| line.split(':').next().unwrap_or_default().to_owned();
    match list("modules.dep") {
        Some(text) if text.lines().any(|line| named(&path(line))) => Module::Present,
        // Built in without a list: some of it shows in /sys as soon as it runs.
        _ if facts.exists(format!("/sys/module/{name}")) => Module::BuiltIn,
        Some(_) => Module::Missing,
        None => Module::Unknown,
    }
}

/// The kernel's client of NBD.
pub(super) fn nbd_module(facts: &Facts) -> Vec<Finding> {
    vec![judge_module(facts, ("nbd", "nbd", "NBD"), "nvme_tcp")]
}

/// The kernel's client of NVMe/TCP.
pub(super) fn nvme_tcp_module(facts: &Facts) -> Vec<Finding> {
    vec![judge_module(facts, ("nvme_tcp", "nvme-tcp", "NVMe/TCP"), "nbd")]
}

/// A host can do without one of the two, not without both.
fn judge_module(
    facts: &Facts,
    (module_name, file, protocol): (&str, &str, &str),
    other: &str,
) -> Finding {
    let found = match module(facts, module_name) {
        Module::Loaded => return Finding::ok("loaded"),
        Module::BuiltIn => return Finding::ok("built into the kernel"),
        Module::Present => {
            return Finding::warn(
                "there, but not loaded",
                format!("modprobe {file} && echo {file} >/etc/modules-load.d/{file}.conf"),
            );
        }
        Module::Missing => format!("this kernel has none: no volumes over {protocol}"),
        Module::Unknown => {
            let release = facts.kernel().unwrap_or_default();
            format!("not loaded, and there is no /lib/modules/{release} to look for it in")
        }
    };
    let fix = facts.install_modules();
    match module(facts, other) {
        Module::Missing | Module::Unknown => Finding::error(found, fix),
        Module::Loaded | Module::BuiltIn | Module::Present => Finding::warn(found, fix),
    }
}

/// Devices that nbd-client can attach.
pub(super) fn nbds_max(facts: &Facts) -> Vec<Finding> {
    let Some(most) = facts.number("/sys/module/nbd/parameters/nbds_max") else {
        return vec![Finding::skip("the module nbd is not loaded")];
    };
    let devices = facts.names("/sys/block").into_iter().filter(|name| name.starts_with("nbd"));
    let (used, free): (Vec<_>, Vec<_>) =
        devices.partition(|name| facts.exists(format!("/sys/block/{name}/pid")));
    let found = format!("nbds_max is {most}, {} attached", used.len());
    vec![if free.is_empty() {
        Finding::warn(
            format!("{found}, none is free"),
            "echo options nbd nbds_max=64 >/etc/modprobe.d/nbd.conf; \
             with all detached: modprobe -r nbd && modprobe nbd",
        )
    } else {
        Finding::ok(found)
    }]
}

pub(super) fn nbd_client(facts: &Facts) -> Vec<Finding> {
    program(facts, "nbd-client", ("nbd-client", "nbd"))
}

pub(super) fn nvme_cli(facts: &Facts) -> Vec<Finding> {
    program(facts, "nvme", ("nvme-cli", "nvme-cli"))
}

/// A program, and what it says of its version; its package as Debian calls it, and as others do.
fn program(facts: &Facts, name: &'static str, packages: (&str, &str)) -> Vec<Finding> {
    vec![match facts.program(name) {
        None => Finding::warn("not installed", facts.install(packages)),
        Some(path) => {
            let answer = facts.asked.answers.get(name).map(String::as_str).unwrap_or_default();
            let digit = |word: &&str| word.starts_with(|c: char| c.is_ascii_digit());
            let version = answer.split_whitespace().find(digit).unwrap_or("of unknown version");
            Finding::ok(format!("{}, {version}", path.display()))
        }
    }]
}

/// Two paths to a volume are one disk with native multipath, and two disks without.
pub(super) fn multipath(facts: &Facts) -> Vec<Finding> {
    vec![match facts.text("/sys/module/nvme_core/parameters/multipath").as_deref() {
        Some("Y") => Finding::ok("native multipath is on"),
        Some(_) => Finding::warn(
            "native multipath is off: each path to a volume is a disk of its own",
            "echo options nvme_core multipath=Y >/etc/modprobe.d/nvme-core.conf, and reboot",
        ),
        None if facts.exists("/sys/module/nvme_core") => Finding::warn(
            "this kernel has no native multipath: each path to a volume is a disk of its own",
            "boot a kernel with CONFIG_NVME_MULTIPATH",
        ),
        None => Finding::skip("the module nvme_core is not loaded"),
    }]
}

/// How long the kernel waits for an answer before it gives the connection up.
pub(super) fn io_timeout(facts: &Facts) -> Vec<Finding> {
    /// Seconds in which a node that was killed is back and has replayed its journal.
    const SHORT: u64 = 10;
    vec![match facts.number("/sys/module/nvme_core/parameters/io_timeout") {
        Some(seconds) if seconds < SHORT => Finding::warn(
            format!("{seconds} s: connections are reset while a node is merely busy"),
            "echo 30 >/sys/module/nvme_core/parameters/io_timeout && \
             echo options nvme_core io_timeout=30 >/etc/modprobe.d/nvme-core.conf",
        ),
        Some(seconds) => Finding::ok(format!("{seconds} s")),
        None => Finding::skip("the module nvme_core is not loaded"),
    }]
}

/// Who this host is: names that must not change from one start to the next, nor be another's.
pub(super) fn identity(facts: &Facts) -> Vec<Finding> {
    const NEW_NQN: &str = "mkdir -p /etc/nvme && nvme gen-hostnqn >/etc/nvme/hostnqn";
    const NEW_ID: &str = "sed 's/.*uuid://' /etc/nvme/hostnqn >/etc/nvme/hostid";
    let nqn = facts.text("/etc/nvme/hostnqn").unwrap_or_default();
    let id = facts.text("/etc/nvme/hostid").unwrap_or_default();
    let name = match weft_api::check_nqn(&nqn) {
        _ if nqn.is_empty() => {
            Finding::warn("is missing: the host has another name at each start", NEW_NQN)
        }
        Err(reason) => Finding::error(format!("'{nqn}' {reason}"), NEW_NQN),
        Ok(()) => Finding::ok(nqn.as_str()),
    };
    // It need not be the UUID in the name: Debian makes up two.
    let number = match uuid::Uuid::parse_str(&id) {
        _ if id.is_empty() => Finding::warn("is missing", NEW_ID),
        Err(_) => Finding::error(format!("'{id}' is no UUID"), NEW_ID),
        Ok(_) => Finding::ok(id.as_str()),
    };
    vec![name.on("/etc/nvme/hostnqn"), number.on("/etc/nvme/hostid")]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::doctor::facts::Asked;
    use crate::cli::doctor::facts::fake::System;
    use crate::cli::doctor::finding::Verdict;

    const RELEASE: (&str, &str) = ("/proc/sys/kernel/osrelease", "6.1.0\n");
    const DEPENDENCIES: &str = "/lib/modules/6.1.0/modules.dep";
    const BUILT_IN: &str = "/lib/modules/6.1.0/modules.builtin";

    #[test]
    fn a_module_is_found_loaded_built_in_or_on_the_disk() {
        let verdict = |files: &[(&str, &str)]| {
            let system = System::new(&[files, &[RELEASE]].concat());
            system.verdict(nvme_tcp_module, Asked::default())
        };
        let nbd = ("/proc/modules", "nbd 65536 0 - Live 0x0\n");
        let both = ("/proc/modules", "nvme_tcp 53248 0 - Live 0x0\nnbd 65536 0 - Live 0x0\n");
        assert_eq!(verdict(&[both]), Verdict::Ok);
        let built_in = (BUILT_IN, "kernel/drivers/nvme/host/nvme-tcp.ko\n");
        assert_eq!(verdict(&[built_in]), Verdict::Ok);
        assert_eq!(verdict(&[("/sys/module/nvme_tcp/uevent", "")]), Verdict::Ok);
        let there = (DEPENDENCIES, "kernel/drivers/nvme/host/nvme-tcp.ko.xz: kernel/a.ko.xz\n");
        assert_eq!(verdict(&[there]), Verdict::Warn);
        let others = (DEPENDENCIES, "kernel/drivers/nvme/host/nvme-rdma.ko: kernel/nvme-tcp.ko\n");
        assert_eq!(verdict(&[others, nbd]), Verdict::Warn);
        assert_eq!(verdict(&[others]), Verdict::Error, "neither protocol");
        assert_eq!(System::new(&[RELEASE, nbd]).verdict(nbd_module, Asked::default()), Verdict::Ok);
        assert_eq!(System::new(&[]).verdict(nbd_module, Asked::default()), Verdict::Error);
    }

    #[test]
    fn the_last_free_nbd_device_is_missed() {
        let most = ("/sys/module/nbd/parameters/nbds_max", "1\n");
        let (device, pid) = (("/sys/block/nbd0/size", "0"), ("/sys/block/nbd0/pid", "7\n"));
        let verdict = |files: &[_]| System::new(files).verdict(nbds_max, Asked::default());
        assert_eq!(verdict(&[most, device]), Verdict::Ok);
        assert_eq!(verdict(&[most, pid]), Verdict::Warn);
        assert_eq!(verdict(&[]), Verdict::Skip);
    }

    #[test]
    fn programs_are_found_with_their_versions() {
        let mut asked = Asked::default();
        asked.answers.insert("nvme", "nvme version 2.3 (git 2.3)\n".to_owned());
        let found = System::new(&[("/usr/sbin/nvme", "")]).says(nvme_cli, asked).remove(0);
        assert_eq!(found, Finding::ok("/usr/sbin/nvme, 2.3"));
        assert_eq!(System::new(&[]).verdict(nvme_cli, Asked::default()), Verdict::Warn);
        assert_eq!(System::new(&[]).verdict(nbd_client, Asked::default()), Verdict::Warn);
        let here = System::new(&[("/usr/sbin/nbd-client", "")]);
        assert_eq!(here.verdict(nbd_client, Asked::default()), Verdict::Ok);
    }

    #[test]
    fn settings_of_the_nvme_host_are_judged() {
        let parameter = |name: &str, value, check| {
            let path = format!("/sys/module/nvme_core/parameters/{name}");
            System::new(&[(&path, value)]).verdict(check, Asked::default())
        };
        assert_eq!(parameter("multipath", "Y\n", multipath), Verdict::Ok);
        assert_eq!(parameter("multipath", "N\n", multipath), Verdict::Warn);
        assert_eq!(parameter("other", "1\n", multipath), Verdict::Warn);
        assert_eq!(System::new(&[]).verdict(multipath, Asked::default()), Verdict::Skip);
        assert_eq!(parameter("io_timeout", "30\n", io_timeout), Verdict::Ok);
        assert_eq!(parameter("io_timeout", "1\n", io_timeout), Verdict::Warn);
        assert_eq!(System::new(&[]).verdict(io_timeout, Asked::default()), Verdict::Skip);
    }

    #[test]
    fn a_host_must_have_a_name_of_its_own() {
        let id = "6a3f6f0c-1d2e-4c57-9f0a-0e5a5d0e2f6b";
        let nqn = format!("nqn.2014-08.org.nvmexpress:uuid:{id}");
        let verdicts = |nqn: &str, id: &str| {
            let files = [("/etc/nvme/hostnqn", nqn), ("/etc/nvme/hostid", id)];
            let found = System::new(&files).says(identity, Asked::default());
            (found[0].verdict, found[1].verdict)
        };
        assert_eq!(verdicts(&nqn, id), (Verdict::Ok, Verdict::Ok));
        assert_eq!(verdicts("", ""), (Verdict::Warn, Verdict::Warn));
        assert_eq!(verdicts("me", "me"), (Verdict::Error, Verdict::Error));
        let other = "7a3f6f0c-1d2e-4c57-9f0a-0e5a5d0e2f6b";
        assert_eq!(verdicts(&nqn, other), (Verdict::Ok, Verdict::Ok));
    }
}
