//! What `polder run` says of a run.

use std::process::ExitCode;

use polder::{HostKind, PageSize, Platform};
use polder_vmm::{Accelerator, Conversion, End, Failure, Report, VirtqueueStatistics};
use serde_json::json;

use crate::picture;
use crate::run::{Arguments, Guest, MEMORY};
use crate::trouble::Trouble;

pub(crate) fn status(end: End) -> ExitCode {
    match end {
        End::Ok => ExitCode::SUCCESS,
        End::Failed(_) | End::TimedOut => ExitCode::FAILURE,
        End::Interrupted => ExitCode::from(130),
    }
}

/// How a run ended, in a word.
pub(crate) fn exit(end: End) -> &'static str {
    match end {
        End::Ok => "ok",
        End::Failed(Failure::Check { .. }) => "check-failed",
        End::Failed(Failure::Exception { .. }) => "exception",
        End::Failed(Failure::TripleFault { .. }) => "triple-fault",
        End::Failed(Failure::MemoryFailure { .. }) => "memory-failure",
        End::Failed(Failure::MachineCheckLost { .. }) => "machine-check-lost",
        End::Failed(Failure::MemoryFault { .. }) => "memory-fault",
        End::Failed(Failure::TooFewChecks { .. }) => "too-few-checks",
        End::Failed(Failure::Intrusion { .. }) => "intrusion",
        End::Failed(Failure::Exit { .. }) => "unexpected-exit",
        End::TimedOut => "timeout",
        End::Interrupted => "interrupted",
    }
}

/// Why a run did not end well, and what to do about it.
pub(crate) fn why(seed: u64, end: End) -> Option<(&'static str, String)> {
    let again = || format!("run it again with --seed {seed}");
    let report = || format!("{}; where it fails again, it is a bug: report it", again());
    let (why, way_out) = match end {
        End::Ok => return None,
        End::TimedOut => {
            ("it was still running", "give it more time: --timeout SECONDS".to_owned())
        }
        End::Interrupted => ("Ctrl-C, or SIGTERM", again()),
        End::Failed(failure) => {
            let why = match failure {
                Failure::Check { .. } => "memory or an answer was not what it has to be",
                Failure::Exception { .. } => "the guest handles no exception but its own requests",
                Failure::TripleFault { .. } => {
                    "an exception came that the guest could not take, so the CPU shut down"
                }
                Failure::MemoryFailure { .. } => {
                    "the page is in quarantine, or the machine's memory is broken there"
                }
                Failure::MachineCheckLost { .. } => "KVM took it, and the guest never had it",
                Failure::MemoryFault { .. } => "the guest's memory is not what it takes it for",
                Failure::TooFewChecks { .. } => "a part of its program was not run",
                Failure::Intrusion { .. } => "a private page has to be out of the host's reach",
                Failure::Exit { .. } => "nothing that the guest does causes such an exit",
            };
            (why, report())
        }
    };
    Some((why, way_out))
}

/// The same for a run of which the user chose the guest.
fn why_of(arguments: &Arguments, end: End) -> Option<(&'static str, String)> {
    let (why, way_out) = why(arguments.seed, end)?;
    Some(match arguments.guest {
        Guest::SelfTest => (why, way_out),
        Guest::TripleFault | Guest::Spin | Guest::Flood => {
            (why, "leave --guest out: this one is to misbehave".to_owned())
        }
    })
}

/// The first word of a report.
pub(crate) fn verdict(end: End) -> &'static str {
    match end {
        End::Ok => "ok",
        End::Failed(_) | End::TimedOut => "FAILED",
        End::Interrupted => "STOPPED",
    }
}

/// So many vCPUs.
pub(crate) fn vcpus(count: u32) -> String {
    format!("{count} {}", if count == 1 { "vCPU" } else { "vCPUs" })
}

/// Whether what was told is of a simulated machine.
pub(crate) fn simulated(accelerator: Accelerator) -> &'static str {
    match accelerator {
        Accelerator::Kvm => "",
        Accelerator::Machine => " (simulated)",
    }
}

/// How a run ended, in a sentence.
pub(crate) fn ended(timeout: u64, end: End) -> String {
    match end {
        End::Ok => "every check passed".into(),
        End::Failed(failure) => failure.to_string(),
        End::TimedOut => {
            format!("the guest did not end within {timeout} s (--timeout)")
        }
        End::Interrupted => "interrupted".into(),
    }
}

/// One object: every key is there in every run, null where it does not apply.
pub(crate) fn to_json(
    arguments: &Arguments,
    (host, instead): (HostKind, Option<&Trouble>),
    report: &Report,
    seconds: f64,
) -> serde_json::Value {
    let memory = report.memory;
    let why = why_of(arguments, report.end);
    let (private, shared) = picture::touched_bytes(&report.facts, &report.touched);
    json!({
        "host": host.to_string(),
        "accelerator": report.accelerator.to_string(),
        "conversion_by": report.conversion_by.to_string(),
        "platform": arguments.platform.platform().to_string(),
        "private_memory": report.private_memory,
        "vcpus": arguments.vcpus,
        "memory_bytes": arguments.memory.unwrap_or(MEMORY).get(),
        "page_size": report.page_size.to_string(),
        "levels": {
            "4k": report.levels.size_4k,
            "2m": report.levels.size_2m,
            "1g": report.levels.size_1g,
        },
        "splits": report.reshaped.splits,
        "merges": report.reshaped.merges,
        "pool": report.pool.map(|pool| json!({
            "total": pool.total,
            "free": pool.free,
            "reserved": pool.reserved,
            "pending": pool.pending,
        })),
        "guest": {
            "exit": exit(report.end),
            "checks_passed": report.checks_passed,
            "checks_failed": report.checks_failed,
            "what": why.as_ref().map(|_| ended(arguments.timeout, report.end)),
            "why": why.as_ref().map(|(why, _)| why),
            "try": why.as_ref().map(|(_, way_out)| way_out),
        },
        "touched": { "private_bytes": private, "shared_bytes": shared },
        "conversions": {
            "to_private": memory.to_private,
            "to_shared": memory.to_shared,
            "pages": memory.converted_pages,
            "refused": memory.refused,
        },
        "faults": {
            "guest": memory.guest_faults,
            "host": memory.host_faults,
            "denied": memory.denied,
        },
        "virtqueue": report.virtqueue.map(|VirtqueueStatistics { chains, bytes, refused }| {
            json!({ "chains": chains, "bytes": bytes, "refused": refused })
        }),
        "prefault": report.ahead.map(|ahead| {
            json!({ "pages": ahead.done, "skipped": ahead.skipped })
        }),
        "simulated_because": instead,
        "seconds": seconds,
    })
}

pub(crate) fn to_text(
    arguments: &Arguments,
    host: HostKind,
    report: &Report,
    seconds: f64,
) -> String {
    let memory = report.memory;
    let why = why_of(arguments, report.end);
    let why = why.map_or_else(String::new, |(why, way_out)| {
        format!("\x20 why: {why}\n\x20 try: {way_out}\n")
    });
    let conversion_by = match report.conversion_by {
        Conversion::Hypercall => "hypercall",
        Conversion::Port => "port (this KVM does not complete hypercalls)",
    };
    let platform = match arguments.platform.platform() {
        Platform::Plain => String::new(),
        other => format!(", platform {other}"),
    };
    let all_shared = match report.private_memory {
        true => "",
        false => {
            "\x20 private      none: this KVM can't keep memory private; all of it is shared\n"
        }
    };
    let virtqueue = report.virtqueue.map_or(String::new(), |done| {
        let VirtqueueStatistics { chains, bytes, refused } = done;
        format!("\x20 virtqueue    {chains} chains, {bytes} bytes written; {refused} refused\n")
    });
    let memory_size = arguments.memory.unwrap_or(MEMORY);
    let pages = memory_size.pages().unwrap_or_default();
    let ahead = report.ahead.map_or_else(String::new, |ahead| {
        format!("\x20 prefault     {} of {} pages\n", ahead.done, ahead.of)
    });
    format!(
        "{verdict}: {ended}; {passed} checks passed, {failed} failed in {seconds:.1} s\n{why}\
         \n\
         \x20 VM           {vcpus}, {size} on host {host}, \
         accelerator {accelerator}{simulated}{platform}\n\
         {all_shared}\
         \x20 requests     by {conversion_by}\n\
         \x20 conversions  {to_shared} to shared, {to_private} to private, {converted} pages in all; \
         {refused} refused\n\
         {virtqueue}\
         \x20 guest        {guest} faults\n\
         \x20 host         {mapped} touches of shared pages mapped, {denied} of private pages denied\n\
         {ahead}\
         {levels}\
         \n{picture}",
        ended = ended(arguments.timeout, report.end),
        passed = report.checks_passed,
        failed = report.checks_failed,
        verdict = verdict(report.end),
        vcpus = vcpus(arguments.vcpus),
        simulated = simulated(report.accelerator),
        size = memory_size,
        accelerator = report.accelerator,
        to_shared = memory.to_shared,
        to_private = memory.to_private,
        converted = memory.converted_pages,
        refused = memory.refused,
        ahead = ahead,
        guest = memory.guest_faults,
        mapped = memory.host_faults,
        denied = memory.denied,
        levels = levels(arguments, report),
        picture = picture::draw(pages, &report.facts, &report.touched, &report.folios),
    )
}

/// What the memory was made of, and what became of its huge pages.
fn levels(arguments: &Arguments, report: &Report) -> String {
    if arguments.page_size == PageSize::Small {
        return String::new();
    }
    let (levels, reshaped) = (report.levels, report.reshaped);
    let mut text = match report.page_size {
        PageSize::Small => "\x20 pages        4k: this machine gives shared memory no transparent \
            huge pages; `polder doctor` says how\n"
            .to_owned(),
        size => format!(
            "\x20 pages        {size}: {} of 1G, {} of 2M, {} of 4K; {} splits, {} merges\n",
            levels.size_1g, levels.size_2m, levels.size_4k, reshaped.splits, reshaped.merges,
        ),
    };
    if let Some(pool) = report.pool {
        text.push_str(&format!(
            "\x20 pool         {} huge pages, {} free, {} reserved, {} pending\n",
            pool.total, pool.free, pool.reserved, pool.pending,
        ));
    }
    text
}
