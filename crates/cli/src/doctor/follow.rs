//! What follows from what the machine offers: which hosts can be used, and with what.

use std::error::Error;
use std::iter;

use polder::HostKind;
use polder::units::ByteSize;
use polder_vmm::RunError;
use polder_vmm::doctor::Way;
use polder_vmm::guest::Transport;
use polder_vmm::scenario::Conversions;
use serde::Serialize;

use super::facts::{Facts, Mmu};
use super::machine::Pool;
use super::parse::Limit;
use super::ways_out;

/// One thing that a host needs or can use.
#[derive(Serialize, Debug)]
pub(super) struct Finding {
    pub(super) name: String,
    /// Whether it is there; `None` where that could not be found out.
    pub(super) ok: Option<bool>,
    pub(super) what: String,
    /// What brings it.
    #[serde(rename = "try")]
    pub(super) way_out: Option<String>,
}

/// A host, and what this machine has for it.
#[derive(Serialize, Debug)]
pub(super) struct HostFindings {
    pub(super) host: String,
    /// Whether Polder can run on it, here and now.
    pub(super) usable: bool,
    pub(super) why: String,
    /// Without all of these it can't be used.
    pub(super) needs: Vec<Finding>,
    /// It can be used without these.
    pub(super) features: Vec<Finding>,
}

impl Finding {
    fn there(name: &str, what: impl Into<String>) -> Self {
        Self { name: name.into(), ok: Some(true), what: what.into(), way_out: None }
    }

    fn missing(name: &str, what: impl Into<String>, way_out: impl Into<String>) -> Self {
        Self { ok: Some(false), way_out: Some(way_out.into()), ..Self::there(name, what) }
    }

    fn unknown(name: &str, what: impl Into<String>) -> Self {
        Self { ok: None, ..Self::there(name, what) }
    }
}

/// Every host.
pub(super) fn hosts(facts: &Facts) -> [HostFindings; 3] {
    HostKind::ALL.map(|host| match host {
        HostKind::Memfd => memfd(facts),
        HostKind::GuestMemfd => guest_memfd(facts),
        HostKind::Machine => HostFindings {
            host: host.to_string(),
            usable: true,
            why: "simulated: needs nothing of this machine".into(),
            needs: Vec::new(),
            features: Vec::new(),
        },
    })
}

/// An error and its causes, in a line.
pub(super) fn chain(error: &dyn Error) -> String {
    let texts = iter::successors(Some(error), |&error| error.source()).map(ToString::to_string);
    texts.collect::<Vec<_>>().join(": ")
}

fn memfd(facts: &Facts) -> HostFindings {
    let needs = vec![kvm(facts), userfaultfd(facts), userfaultfd_features(facts)];
    let mut features = vec![hypercalls(facts), address_space(facts)];
    features.extend(facts.machine.huge_pages.iter().map(huge_pages));
    features.push(shmem_thp(facts));
    tried(HostKind::Memfd, &facts.memfd, needs, features)
}

/// A host of real memory, from what came of trying it.
fn tried(
    host: HostKind,
    trial: &Result<Conversions, RunError>,
    mut needs: Vec<Finding>,
    features: Vec<Finding>,
) -> HostFindings {
    const TRIAL: &str = "trial";
    if let Err(error) = trial
        && needs.iter().all(|need| need.ok == Some(true))
    {
        let way_out = error.way_out().unwrap_or("report it: this is a bug in Polder");
        needs.push(Finding::missing(TRIAL, chain(error), way_out));
    }
    let lacks = lacking(&needs);
    let why = match trial {
        Ok(Conversions::Refused) => {
            "tried: a VM and memory for it can be made, all of it shared".into()
        }
        Ok(_) => "tried: a VM and memory for it can be made".into(),
        Err(error) if lacks == TRIAL => format!("tried, and failed: {}", chain(error)),
        Err(_) => format!("lacks {lacks}"),
    };
    HostFindings { host: host.to_string(), usable: trial.is_ok(), why, needs, features }
}

/// The names of what is missing.
fn lacking(needs: &[Finding]) -> String {
    let names = needs.iter().filter(|need| need.ok == Some(false)).map(|need| need.name.as_str());
    names.collect::<Vec<_>>().join(", ")
}

fn kvm(facts: &Facts) -> Finding {
    const NAME: &str = "kvm";
    match &facts.kvm {
        Err(RunError::Kvm(error)) => {
            Finding::missing(NAME, error.to_string(), ways_out::open_kvm(error, facts))
        }
        Err(error) => Finding::missing(NAME, chain(error), error.way_out().unwrap_or_default()),
        Ok(kvm) => match kvm.types.first().map(|of| &of.capabilities) {
            Some(Err(error)) => Finding::missing(
                NAME,
                format!("/dev/kvm opens, but no VM can be made: {error}"),
                "stop the hypervisor that holds the CPU, or free memory",
            ),
            _ => Finding::there(NAME, format!("opens, API version {}", kvm.api_version)),
        },
    }
}

fn userfaultfd(facts: &Facts) -> Finding {
    const NAME: &str = "userfaultfd";
    let way = match &facts.userfault {
        Ok(watch) => watch.way.as_ref(),
        Err(error) => Err(error),
    };
    match way {
        Ok(Way::Device) => Finding::there(NAME, "by /dev/userfaultfd"),
        Ok(Way::SystemCall) => Finding::there(NAME, "by the system call"),
        Err(error) => {
            let only =
                if facts.userfault.is_ok() { " (only for a process's own touches)" } else { "" };
            Finding::missing(NAME, format!("{error}{only}"), ways_out::watch(error, facts))
        }
    }
}

fn userfaultfd_features(facts: &Facts) -> Finding {
    const NAME: &str = "userfaultfd features";
    const NEEDED: [&str; 3] = ["MISSING_SHMEM", "MINOR_SHMEM", "POISON"];
    let Ok(watch) = &facts.userfault else {
        return Finding::unknown(NAME, "there is no userfaultfd to ask");
    };
    let (there, missing): (Vec<_>, Vec<_>) =
        NEEDED.into_iter().partition(|feature| watch.features.contains(feature));
    if missing.is_empty() {
        return Finding::there(NAME, there.join(", "));
    }
    let way_out = ways_out::kernel(facts, (6, 6), "CONFIG_USERFAULTFD and CONFIG_SHMEM");
    Finding::missing(NAME, format!("lacks {}", missing.join(", ")), way_out)
}

/// Whether a guest's own hypercall carries its requests.
fn hypercalls(facts: &Facts) -> Finding {
    const NAME: &str = "hypercalls";
    let Ok(kvm) = &facts.kvm else { return Finding::unknown(NAME, "there is no KVM to ask") };
    match &kvm.hypercalls {
        Err(error) => Finding::unknown(NAME, format!("not tried: {}", chain(error))),
        Ok(Transport::Vmcall) => Finding::there(NAME, "by vmcall"),
        Ok(Transport::Vmmcall) => Finding::there(NAME, "by vmmcall"),
        Ok(Transport::Port) if facts.capability("EXIT_HYPERCALL").is_some_and(|bits| bits > 0) => {
            Finding::missing(
                NAME,
                "KVM offers them, and never comes back from one: a port serves instead",
                "use a KVM on VMX or SVM",
            )
        }
        Ok(Transport::Port) => Finding::missing(
            NAME,
            "KVM does not hand them on: a port serves instead",
            ways_out::kernel(facts, (5, 14), "CONFIG_KVM"),
        ),
    }
}

fn address_space(facts: &Facts) -> Finding {
    const NAME: &str = "address space";
    match facts.machine.limits.address_space {
        None => Finding::unknown(NAME, "/proc/self/limits does not tell"),
        Some(Limit::Unlimited) => Finding::there(NAME, "unlimited"),
        Some(Limit::At(bytes)) => {
            let what = format!("{}, and memory is mapped three times", ByteSize::new(bytes));
            Finding::missing(NAME, what, "ulimit -v unlimited")
        }
    }
}

fn huge_pages(pool: &Pool) -> Finding {
    let size = ByteSize::new(pool.bytes);
    let name = format!("{size} pages");
    let (Some(free), Some(total)) = (pool.free, pool.total) else {
        return Finding::unknown(&name, "their number can't be read");
    };
    let reserved = pool.reserved.unwrap_or(0);
    let what = format!("{free} of {total} free, {reserved} reserved");
    if free > reserved {
        return Finding::there(&name, what);
    }
    let folder = format!("/sys/kernel/mm/hugepages/hugepages-{}kB", pool.bytes >> 10);
    // Enough to begin with.
    let more = total.saturating_add(if pool.bytes < 1 << 30 { 64 } else { 1 });
    Finding::missing(&name, what, format!("echo {more} | sudo tee {folder}/nr_hugepages"))
}

/// Whether a memfd may have transparent huge pages, where a view asks for them.
fn shmem_thp(facts: &Facts) -> Finding {
    const NAME: &str = "THP for shmem";
    const HUGE: u64 = 2 << 20;
    const FILE: &str = "/sys/kernel/mm/transparent_hugepage/shmem_enabled";
    const OF_SIZE: &str = "/sys/kernel/mm/transparent_hugepage/hugepages-2048kB/shmem_enabled";
    let machine = &facts.machine;
    let Some(all) = machine.shmem.as_deref() else {
        let way_out = ways_out::kernel(facts, (4, 8), "CONFIG_TRANSPARENT_HUGEPAGE");
        return Finding::missing(NAME, format!("{FILE} can't be read"), way_out);
    };
    let of_size = machine.shmem_sizes.iter().find(|(bytes, _)| *bytes == HUGE);
    let (choice, file) = match of_size.map(|(_, choice)| choice.as_str()) {
        // These two of the file for all sizes overrule the others.
        _ if matches!(all, "deny" | "force") => (all, FILE),
        None | Some("inherit") => (all, FILE),
        Some(choice) => (choice, OF_SIZE),
    };
    let what = format!("{choice} for 2M");
    match choice {
        "never" | "deny" => Finding::missing(NAME, what, format!("echo advise | sudo tee {file}")),
        _ => Finding::there(NAME, what),
    }
}

/// A capability of VMs, and which kernel brings it.
struct Wanted {
    /// What it is for.
    label: &'static str,
    /// Its name after `KVM_CAP_`.
    capability: &'static str,
    /// The bits of its value, one of which has to be there.
    bits: i32,
    since: (u32, u32),
    built: &'static str,
}

impl Wanted {
    const fn new(
        label: &'static str,
        (capability, bits): (&'static str, i32),
        since: (u32, u32),
        built: &'static str,
    ) -> Self {
        Self { label, capability, bits, since, built }
    }

    fn find(&self, facts: &Facts) -> Finding {
        let Self { label, capability, bits, since, built } = *self;
        let Some(types) = facts.types_with(capability, bits) else {
            return Finding::unknown(label, "there is no KVM to ask");
        };
        if !types.is_empty() {
            let what = format!("KVM_CAP_{capability} on VMs of type {}", types.join(", "));
            return Finding::there(label, what);
        }
        let absent = facts.capability(capability) == Some(0);
        let what = if absent { "is not there" } else { "lacks the bit" };
        let way_out = ways_out::kernel(facts, since, built);
        Finding::missing(label, format!("KVM_CAP_{capability} {what}"), way_out)
    }
}

/// Any bit of a capability's value.
const ANY: i32 = -1;

#[rustfmt::skip]
const GUEST_MEMFD_NEEDS: [Wanted; 3] = [
    Wanted::new("guest_memfd", ("GUEST_MEMFD", ANY), (6, 8), "CONFIG_KVM_SW_PROTECTED_VM"),
    Wanted::new("slots of two kinds", ("USER_MEMORY2", ANY), (6, 8), "CONFIG_KVM"),
    Wanted::new("memory faults told", ("MEMORY_FAULT_INFO", ANY), (6, 8), "CONFIG_KVM"),
];

/// The first two need two-stage paging, the others are `GUEST_MEMFD_FLAG_MMAP` and
/// `GUEST_MEMFD_FLAG_INIT_SHARED`.
#[rustfmt::skip]
const GUEST_MEMFD_FEATURES: [Wanted; 4] = [
    Wanted::new("private pages", ("MEMORY_ATTRIBUTES", ANY), (6, 8), "CONFIG_KVM_SW_PROTECTED_VM"),
    Wanted::new("prefault", ("PRE_FAULT_MEMORY", ANY), (6, 11), "CONFIG_KVM"),
    Wanted::new("mapped by the host", ("GUEST_MEMFD_FLAGS", 1), (6, 18), "CONFIG_KVM_GUEST_MEMFD"),
    Wanted::new("shared at first", ("GUEST_MEMFD_FLAGS", 2), (6, 18), "CONFIG_KVM_GUEST_MEMFD"),
];

fn guest_memfd(facts: &Facts) -> HostFindings {
    let found = GUEST_MEMFD_NEEDS.iter().map(|wanted| wanted.find(facts));
    let watched = [userfaultfd(facts), userfaultfd_features(facts)];
    let needs: Vec<_> = iter::once(kvm(facts)).chain(watched).chain(found).collect();
    let mut features = GUEST_MEMFD_FEATURES.map(|wanted| wanted.find(facts));
    // No kernel helps where the machine can't.
    if Mmu::of(facts).0 == Mmu::Shadow {
        for feature in features[..2].iter_mut().filter(|feature| feature.ok == Some(false)) {
            feature.way_out = Some(ways_out::TDP.into());
        }
    }
    tried(HostKind::GuestMemfd, &facts.guest_memfd, needs, features.into())
}

#[cfg(test)]
#[path = "follow_tests.rs"]
mod tests;
