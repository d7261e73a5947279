//! A vCPU's thread: run, answer, run on.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use kvm_ioctls::VcpuFd;
use polder::units::{GfnRange, Gpa, PageIndex};
use polder::{Memory, MemoryFault, Visibility, VmId};
use polder_linux::{Exit, FailedAt, Kicker, Vcpu};

use crate::RunError;
use crate::error::os;
use crate::guest::Request;
use crate::machine_check::gpa_of;
use crate::report::Failure;
use crate::requests::{Next, Requests};

/// What a vCPU's run came to.
#[derive(Debug)]
pub(crate) struct Ran {
    pub(crate) checks_passed: u64,
    /// Why it ended before its program did.
    pub(crate) failure: Option<Failure>,
    /// The first accesses that memory did not let through, [`FAULTS_KEPT`] at most.
    pub(crate) faults: Vec<MemoryFault>,
}

/// `KVM_MEMORY_EXIT_FLAG_PRIVATE`, as the exit has it.
const PRIVATE: u64 = kvm_bindings::KVM_MEMORY_EXIT_FLAG_PRIVATE as u64;

/// How many faults are remembered: a guest makes as many as it likes.
pub(crate) const FAULTS_KEPT: usize = 64;

/// Runs a vCPU until its program ends, it fails, or `stop` is set (and it is kicked).
pub(crate) fn run(
    (index, fd): (u32, VcpuFd),
    kicker: &Kicker,
    requests: &Requests<'_>,
    handled: &AtomicU64,
    stop: &AtomicBool,
) -> Result<Ran, RunError> {
    let mut vcpu = Vcpu::new(fd, kicker);
    let mut faults = Vec::new();
    // The last access that the kernel refused for nothing.
    let mut refused = None;
    while !stop.load(Ordering::Acquire) {
        let exit = vcpu.run().map_err(|source| RunError::Vcpu { vcpu: index, source })?;
        let next = match exit {
            Exit::PortIn { port, bytes } => ask(index, &vcpu, requests, (true, port, bytes))?,
            Exit::PortOut { port, bytes } => ask(index, &vcpu, requests, (false, port, bytes))?,
            Exit::Hypercall { number, arguments } => {
                requests.answer(index, Request::from_hypercall(number, arguments))
            }
            Exit::MmioRead { gpa, .. } | Exit::MmioWrite { gpa, .. } => {
                let fault = no_memory(index, requests, gpa);
                faults.extend(fault.as_ref().ok().filter(|_| faults.len() < FAULTS_KEPT));
                fault.map_or_else(failed, |_| Next::Answer(-1))
            }
            Exit::MemoryFault { gpa, flags, .. } => {
                match memory_fault(index, requests, (gpa, flags), exit) {
                    // It was amid a conversion, which is over: the same access goes through.
                    Ok(()) => {
                        if refused.replace(gpa) == Some(gpa) {
                            map_by_ourselves(&vcpu, requests, gpa);
                        }
                        continue;
                    }
                    Err(failure) => failed(failure),
                }
            }
            Exit::Interrupted => continue,
            Exit::MemoryFailure(at) => {
                let page = page_of_failure(requests, at);
                if machine_check(index, &vcpu, requests, page)? {
                    handled.fetch_add(1, Ordering::Relaxed);
                    continue;
                }
                failed(Failure::MemoryFailure { vcpu: index, page })
            }
            Exit::Shutdown => failed(Failure::TripleFault { vcpu: index, changed: None }),
            other => failed(Failure::Exit { vcpu: index, exit: other }),
        };
        handled.fetch_add(1, Ordering::Relaxed);
        match next {
            Next::Answer(value) => vcpu.answer(value.cast_unsigned()),
            Next::Done { checks_passed } => {
                return Ok(Ran { checks_passed, failure: None, faults });
            }
            Next::Failed { failure, checks_passed } => {
                return Ok(Ran { checks_passed, failure: Some(failure), faults });
            }
        }
    }
    Ok(Ran { checks_passed: 0, failure: None, faults })
}

/// The guest tried a frame before anything was bound there, and KVM (Linux 7.3) takes it for a
/// device's ever since: to map it ourselves undoes that.
fn map_by_ourselves(vcpu: &Vcpu, requests: &Requests<'_>, gpa: Gpa) {
    let (memory, vm) = requests.memory();
    // Where this fails, the access tells why when it is made again.
    let _ = memory.prefault(vm, vcpu.fd(), GfnRange::one(gpa.gfn()));
}

fn failed(failure: Failure) -> Next {
    Next::Failed { failure, checks_passed: 0 }
}

/// A request by port: its arguments are in the registers.
fn ask(
    index: u32,
    vcpu: &Vcpu,
    requests: &Requests<'_>,
    (read, port, bytes): (bool, u16, usize),
) -> Result<Next, RunError> {
    let registers = vcpu
        .fd()
        .get_regs()
        .map_err(|error| RunError::Vm { call: "KVM_GET_REGS", source: os(error) })?;
    Ok(requests.answer(index, Request::from_port((read, port, bytes), &registers)))
}

/// An access that the kernel refused as one of the wrong kind (`KVM_EXIT_MEMORY_FAULT`); `Ok` if
/// it is to be tried again. A flag that is not known is a failure: it may change what is meant.
fn memory_fault(
    vcpu: u32,
    requests: &Requests<'_>,
    (gpa, flags): (Gpa, u64),
    exit: Exit,
) -> Result<(), Failure> {
    let visibility = wanted(flags).ok_or(Failure::Exit { vcpu, exit })?;
    let (memory, vm) = requests.memory();
    match memory.guest_fault(vm, gpa, visibility) {
        Ok(None) => Ok(()),
        Ok(Some(fault)) => Err(Failure::MemoryFault { vcpu, fault }),
        Err(_) => Err(Failure::MemoryFailure { vcpu, page: None }),
    }
}

/// What an access was of, by the flags of `KVM_EXIT_MEMORY_FAULT`, if all of them are known.
const fn wanted(flags: u64) -> Option<Visibility> {
    match flags {
        0 => Some(Visibility::Shared),
        PRIVATE => Some(Visibility::Private),
        _ => None,
    }
}

/// The page that has failed, if KVM says which and it is one of this memory.
fn page_of_failure(requests: &Requests<'_>, at: FailedAt) -> Option<PageIndex> {
    let (memory, vm) = requests.memory();
    match at {
        FailedAt::Address(address) => memory.page_of_failure(address),
        FailedAt::Gpa(gpa) => page_at(memory, vm, gpa),
        FailedAt::Untold => None,
    }
}

/// Gives the guest a machine check for a page that has failed, if that is wished. Not for one that
/// an instruction met which KVM emulates: by the time we are told, the instruction counts as done.
fn machine_check(
    index: u32,
    vcpu: &Vcpu,
    requests: &Requests<'_>,
    page: Option<PageIndex>,
) -> Result<bool, RunError> {
    let (memory, vm) = requests.memory();
    let there = page.and_then(|page| Some((page, gpa_of(memory, vm, page)?)));
    let (Some(checks), Some((page, gpa))) = (requests.machine_checks(), there) else {
        return Ok(false);
    };
    polder_linux::inject_machine_check(vcpu.fd(), gpa)
        .map_err(|source| RunError::Vcpu { vcpu: index, source })?;
    checks.give(index, page, gpa);
    Ok(true)
}

pub(crate) fn page_at(memory: &Memory, vm: VmId, gpa: Gpa) -> Option<PageIndex> {
    let pages = memory.pages_of(vm, GfnRange::one(gpa.gfn())).unwrap_or_default();
    pages.first().map(|run| run.start())
}

/// An access that KVM found no memory for. Where the VM has none, a PC's bus has an answer: loads
/// give all ones, stores are dropped. Where it has some, that memory has failed: an instruction
/// that KVM emulates meets a poisoned page in this way.
fn no_memory(vcpu: u32, requests: &Requests<'_>, gpa: Gpa) -> Result<MemoryFault, Failure> {
    let (memory, vm) = requests.memory();
    // The exit does not say which kind the access was of: it is none of the other kind.
    let pages = memory.pages_of(vm, GfnRange::one(gpa.gfn())).unwrap_or_default();
    let facts = pages.first().and_then(|&page| memory.facts(page).ok()).unwrap_or_default();
    let granted = facts.first().map_or(Visibility::Private, |(_, facts)| facts.visibility);
    match memory.guest_fault(vm, gpa, granted) {
        Ok(Some(fault @ MemoryFault::Unbound(_))) => Ok(fault),
        Ok(Some(fault)) => Err(Failure::MemoryFault { vcpu, fault }),
        Ok(None) | Err(_) => Err(Failure::MemoryFailure { vcpu, page: page_at(memory, vm, gpa) }),
    }
}

#[cfg(test)]
mod tests {
    use polder::units::{PageCount, PageRange};
    use polder::{Contents, HostKind, OnBusy, Platform, Slot};

    use super::*;

    #[test]
    fn an_exit_for_want_of_memory_that_is_there_by_now_names_the_page_of_either_kind() {
        let builder = Memory::builder(PageCount::from(2)).host(HostKind::Machine);
        let memory = builder.platform(Platform::SwProtected).build().unwrap();
        let vm = memory.attach(polder::Vm::Machine).unwrap();
        let requests = Requests::new(&memory, vm).unwrap();
        let gfns = [0u32, 1].map(polder::units::Gfn::from);
        for gfn in gfns {
            let unbound = MemoryFault::Unbound(GfnRange::one(gfn));
            assert_eq!(no_memory(0, &requests, gfn.gpa()), Ok(unbound));
        }
        memory.bind(vm, Slot(0), gfns[0], PageRange::between(0, 2).unwrap()).unwrap();
        let (second, contents) = (PageRange::between(1, 2).unwrap(), Contents::Preserve);
        memory.convert(second, Visibility::Shared, contents, OnBusy::Wait).unwrap();
        for (gfn, page) in gfns.into_iter().zip([0u32, 1]) {
            let named = Failure::MemoryFailure { vcpu: 0, page: Some(page.into()) };
            assert_eq!(no_memory(0, &requests, gfn.gpa()), Err(named));
        }
    }

    #[test]
    fn a_memory_fault_with_a_flag_that_is_not_known_means_nothing_to_us() {
        assert_eq!(wanted(0), Some(Visibility::Shared));
        assert_eq!(wanted(PRIVATE), Some(Visibility::Private));
        for bit in (0..64).filter(|bit| 1 << bit != PRIVATE) {
            assert_eq!((wanted(1 << bit), wanted(1 << bit | PRIVATE)), (None, None), "bit {bit}");
        }
    }
}
