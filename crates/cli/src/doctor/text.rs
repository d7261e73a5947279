//! The findings as a person reads them: what can be run, then the hosts, then what they rest on.

use std::fmt::Write;

use polder::units::ByteSize;
use polder_vmm::doctor::{KvmOffer, Way};
use polder_vmm::guest::Transport;

use super::facts::{Facts, Mmu};
use super::follow::{self, Finding, HostFindings};
use super::machine::Machine;
use super::parse::Limit;

/// The longest line, where words allow.
const WIDTH: usize = 100;

pub(super) fn of(facts: &Facts, hosts: &[HostFindings]) -> String {
    let mut text = headline(hosts);
    text.push_str("\nhosts\n");
    for host in hosts {
        line(&mut text, mark(Some(host.usable)), &host.host, &host.why);
    }
    for host in hosts.iter().filter(|host| !host.needs.is_empty()) {
        findings(&mut text, &format!("{} needs", host.host), &host.needs);
        findings(&mut text, &format!("{} can use", host.host), &host.features);
    }
    kvm(&mut text, facts);
    userfaultfd(&mut text, facts);
    machine(&mut text, &facts.machine);
    text
}

fn headline(hosts: &[HostFindings]) -> String {
    match hosts.iter().find(|host| host.usable) {
        Some(host) if host.host == "memfd" => "Polder can run: host memfd on KVM\n".into(),
        Some(host) => {
            let others = hosts.iter().take_while(|other| other.host != host.host);
            let others = others.map(|other| format!("; host {}: {}", other.host, other.why));
            let others: String = others.collect();
            format!("Polder can run: host {}, simulated{others}\n", host.host)
        }
        None => "Polder can't run here\n".into(),
    }
}

fn mark(ok: Option<bool>) -> &'static str {
    match ok {
        Some(true) => "ok",
        Some(false) => "missing",
        None => "unknown",
    }
}

fn findings(text: &mut String, title: &str, findings: &[Finding]) {
    let _ = writeln!(text, "\n{title}");
    for finding in findings {
        line(text, mark(finding.ok), &finding.name, &finding.what);
        if let Some(way_out) = &finding.way_out {
            line(text, "", "", &format!("try: {way_out}"));
        }
    }
}

/// Mark, name and what is found.
fn line(text: &mut String, mark: &str, name: &str, what: &str) {
    row(text, &format!("  {mark:7}  {name:20}  "), what);
}

/// A fact: no mark.
fn fact(text: &mut String, name: &str, value: &str) {
    row(text, &format!("  {name:29}  "), value);
}

/// What is found, beside its name, wrapped at [`WIDTH`]; but a command is for copying, and whole.
fn row(text: &mut String, name: &str, what: &str) {
    let mut row = name.to_owned();
    for (index, word) in what.split(' ').enumerate() {
        let full = row.len() + 1 + word.len() > WIDTH && !what.starts_with("try: ");
        if index > 0 && full {
            let _ = writeln!(text, "{row}");
            row = " ".repeat(name.len());
        } else if index > 0 {
            row.push(' ');
        }
        row.push_str(word);
    }
    let _ = writeln!(text, "{}", row.trim_end());
}

fn kvm(text: &mut String, facts: &Facts) {
    text.push_str("\nKVM\n");
    let (mmu, because) = Mmu::of(facts);
    let kvm = match &facts.kvm {
        Ok(kvm) => kvm,
        Err(error) => {
            fact(text, "/dev/kvm", &follow::chain(error));
            return fact(text, "MMU", &format!("{}: {because}", mmu.name()));
        }
    };
    fact(text, "API version", &kvm.api_version.to_string());
    fact(text, "MMU", &format!("{}: {because}", mmu.name()));
    fact(
        text,
        "hypercalls complete",
        &match &kvm.hypercalls {
            Ok(Transport::Port) => "no".to_owned(),
            Ok(Transport::Vmcall) => "by vmcall".to_owned(),
            Ok(Transport::Vmmcall) => "by vmmcall".to_owned(),
            Err(_) => "unknown".to_owned(),
        },
    );
    for of in &kvm.types {
        if let Err(error) = &of.capabilities {
            fact(text, "VM type that can't be made", &format!("{}: {error}", of.name()));
        }
    }
    capabilities(text, kvm);
}

/// A table: a row for each capability, a column for each type of VM that can be made.
fn capabilities(text: &mut String, kvm: &KvmOffer) {
    let made: Vec<_> = kvm.types.iter().filter(|of| of.capabilities.is_ok()).collect();
    let names: Vec<String> = made.iter().map(|of| of.name()).collect();
    let mut row = |name: &str, cells: &[String]| {
        let cells = cells.iter().zip(&names).map(|(cell, head)| {
            let width = head.len().max(8);
            format!("{cell:width$}")
        });
        fact(text, name, cells.collect::<Vec<_>>().join("  ").trim_end());
    };
    row("VM type", &names);
    for (name, _) in polder_vmm::doctor::CAPABILITIES {
        let cells: Vec<_> = made.iter().map(|of| value(name, of.value(name))).collect();
        row(&format!("KVM_CAP_{name}"), &cells);
    }
}

/// Bits in hexadecimal, numbers as they are.
fn value(name: &str, value: i32) -> String {
    let number = name.starts_with("NR_") || name.starts_with("MAX_") || name == "DIRTY_LOG_RING";
    if number || value < 2 { value.to_string() } else { format!("{value:#x}") }
}

fn userfaultfd(text: &mut String, facts: &Facts) {
    text.push_str("\nuserfaultfd\n");
    let watch = match &facts.userfault {
        Ok(watch) => watch,
        Err(error) => return fact(text, "none", &error.to_string()),
    };
    match &watch.way {
        Ok(Way::Device) => fact(text, "permitted", "by /dev/userfaultfd"),
        Ok(Way::SystemCall) => fact(text, "permitted", "by the system call"),
        Err(error) => fact(text, "not permitted", &error.to_string()),
    }
    let mut features: Vec<String> = watch.features.iter().map(|&name| name.into()).collect();
    if watch.nameless != 0 {
        features.push(format!("without a name: {:#x}", watch.nameless));
    }
    fact(text, "features", &features.join(" "));
}

fn machine(text: &mut String, machine: &Machine) {
    let unknown = || "unknown".to_owned();
    let limits = &machine.limits;
    text.push_str("\nmachine\n");
    fact(text, "kernel", machine.kernel.as_deref().unwrap_or("unknown"));
    fact(text, "CPU", machine.cpu.as_deref().unwrap_or("unknown"));
    let size = |bytes: Option<u64>| bytes.map_or_else(unknown, mebibytes);
    let memory = format!(
        "{} of {} available, {} free",
        size(limits.memory_available),
        size(limits.memory_total),
        size(limits.memory_free),
    );
    fact(text, "memory", &memory);
    for pool in &machine.huge_pages {
        let count = |number: Option<u64>| number.map_or_else(unknown, |number| number.to_string());
        let (free, total) = (count(pool.free), count(pool.total));
        let what = format!("{free} free of {total}, {} reserved", count(pool.reserved));
        fact(text, &format!("huge pages of {}", ByteSize::new(pool.bytes)), &what);
    }
    fact(text, "THP for shmem", machine.shmem.as_deref().unwrap_or("unknown"));
    let sizes = machine.shmem_sizes.iter().filter(|(_, choice)| choice != "never");
    let sizes = sizes.map(|(bytes, choice)| format!("{} {choice}", ByteSize::new(*bytes)));
    let sizes = sizes.collect::<Vec<_>>().join(", ");
    if !machine.shmem_sizes.is_empty() {
        fact(text, "THP for shmem by size", if sizes.is_empty() { "never" } else { &sizes });
    }
    fact(text, "RLIMIT_AS", &bytes(limits.address_space));
    fact(text, "RLIMIT_MEMLOCK", &bytes(limits.locked_memory));
    let files = match limits.open_files {
        Some(Limit::At(files)) => files.to_string(),
        other => bytes(other),
    };
    fact(text, "RLIMIT_NOFILE", &files);
    let maps = limits.max_map_count;
    fact(text, "vm.max_map_count", &maps.map_or_else(unknown, |count| count.to_string()));
    for unread in &machine.unread {
        fact(text, "can't be read", unread);
    }
}

fn bytes(limit: Option<Limit>) -> String {
    match limit {
        None => "unknown".into(),
        Some(Limit::Unlimited) => "unlimited".into(),
        Some(Limit::At(bytes)) => ByteSize::new(bytes).to_string(),
    }
}

/// A size that need not be exact.
fn mebibytes(bytes: u64) -> String {
    format!("{}M", bytes >> 20)
}

#[cfg(test)]
mod tests {
    use polder::HostKind;

    use super::super::facts::tests::{bare, made_up};
    use super::super::machine::Parameters;
    use super::*;

    #[test]
    fn every_host_is_named_whatever_there_is() {
        for facts in [bare(), made_up("6.18.1", &[("GUEST_MEMFD", 1)], Parameters::default())] {
            let text = of(&facts, &follow::hosts(&facts));
            for host in HostKind::ALL {
                assert!(text.contains(&format!("  {host:20}")), "{host}: {text}");
            }
            assert!(text.starts_with("Polder can run: host "), "{text}");
            assert!(text.contains("guest_memfd needs"), "{text}");
        }
    }

    #[test]
    fn long_findings_are_wrapped_and_commands_are_not() {
        let (mut text, words) = (String::new(), ["word"; 30].join(" "));
        line(&mut text, "ok", "name", &words);
        line(&mut text, "", "", &format!("try: {words}"));
        let lengths: Vec<usize> = text.lines().map(|line| line.len()).collect();
        assert!(lengths[..2].iter().all(|&length| length <= WIDTH), "{text}");
        assert_eq!(text.lines().nth(1).and_then(|line| line.find("word")), Some(33), "{text}");
        assert_eq!(lengths.len(), 4, "{text}");
    }

    #[test]
    fn bits_are_shown_as_bits() {
        assert_eq!(value("EXIT_HYPERCALL", 1 << 12), "0x1000");
        assert_eq!(
            (value("NR_MEMSLOTS", 32764), value("USER_MEMORY2", 1)),
            ("32764".into(), "1".into())
        );
    }
}
