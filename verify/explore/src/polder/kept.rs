//! Engine and machine of a state, shared by all states that they are the same in.
//!
//! Most steps change one of the two. The other is neither copied nor hashed again: both come with
//! what was worked out about them.

use std::cell::Cell;
use std::hash::Hasher;
use std::rc::Rc;

use polder_explored_engine::{Engine, Population, Visibility};
use polder_machine::{
    Asid, Component, Discrepancy, DomainId, HostPte, Machine, ObjectId, PageState, ProcessId, Side,
    Thread, VcpuId, VmId, Vpn, VpnRange,
};
use polder_units::{Gfn, PageIndex, PageRange, Pfn, PfnRange};

use super::setup::Setup;
use crate::fold::Fold;

/// A set of pages: a bit for each.
pub(super) type Pages = u8;

/// The pages whose bit is set if `is` says so of their number.
fn pages(count: u8, is: impl Fn(u8) -> bool) -> Pages {
    (0..count).filter(|&page| is(page)).fold(0, |set, page| set | 1 << page)
}

pub(super) fn range(start: u8, end: u8) -> PageRange {
    PageRange::between(start.into(), end.into()).expect("a task is about pages")
}

pub(super) fn one(page: u8) -> PageRange {
    range(page, page + 1)
}

/// The pages of a range as a set.
pub(super) fn set(range: PageRange) -> Pages {
    range.frames().fold(0, |set, page| set | 1 << page.get())
}

pub(super) struct KeptEngine {
    pub(super) engine: Engine,
    pub(super) hash: u64,
    pub(super) private: Pages,
    pub(super) owed: Pages,
    pub(super) failed: Pages,
    pub(super) quarantine: Pages,
    /// Claimed by an operation that somebody drives.
    pub(super) busy: Pages,
    /// Claimed.
    pub(super) held: Pages,
    /// Closed by somebody who waits for pins.
    pub(super) awaited: Pages,
    pub(super) idle: bool,
}

impl Clone for KeptEngine {
    fn clone(&self) -> Self {
        Self { engine: self.engine.fork(), ..*self }
    }
}

impl KeptEngine {
    pub(super) fn new(engine: Engine, setup: &Setup) -> Rc<Self> {
        let mut kept = Self {
            engine,
            hash: 0,
            private: 0,
            owed: 0,
            failed: 0,
            quarantine: 0,
            busy: 0,
            held: 0,
            awaited: 0,
            idle: true,
        };
        kept.refresh(setup.pages);
        Rc::new(kept)
    }

    pub(super) fn refresh(&mut self, count: u8) {
        let engine = &self.engine;
        let mut state = Fold::new();
        engine.fingerprint(&mut state);
        self.hash = state.finish();
        let facts = |page: u8| engine.pages().get(PageIndex::from(u32::from(page)));
        self.private = pages(count, |page| facts(page).visibility == Visibility::Private);
        self.owed = pages(count, |page| facts(page).population == Population::Owed);
        self.failed = engine.failed().runs().fold(0, |all, run| all | set(run));
        self.quarantine = engine.quarantine().runs().fold(0, |all, run| all | set(run));
        self.idle = engine.is_idle();
        self.awaited = pages(count, |page| engine.is_awaited(one(page)));
        (self.busy, self.held) = (0, 0);
        if !self.idle {
            self.busy = pages(count, |page| engine.is_busy(one(page)));
            self.held = pages(count, |page| engine.is_held(one(page)));
        }
    }
}

/// Tokens from this one on are written as private alone, and nobody else may read them.
pub(super) const SECRETS: u8 = 80;

/// The ASID of an SNP guest.
pub(super) const ASID: Asid = match Asid::new(1) {
    Some(asid) => asid,
    None => unreachable!(),
};

/// What of the machine has a number, once and for all.
#[derive(Clone, Copy)]
pub(super) struct Parts {
    pub(super) object: ObjectId,
    pub(super) process: ProcessId,
    pub(super) vm: VmId,
    /// Another process that has the object mapped, where the first one has it.
    pub(super) other: Option<ProcessId>,
    /// Who has the same pages, copied at the first write.
    pub(super) copied: Option<ObjectId>,
    /// A device's domain, and the process that pins for it.
    pub(super) device: Option<(DomainId, ProcessId)>,
    pub(super) threads: u16,
    pub(super) vcpus: u16,
    /// Where the object is in the host view.
    pub(super) host_view: u64,
}

impl Parts {
    /// Where pages are in the host view.
    pub(super) fn vpns(&self, pages: PageRange) -> VpnRange {
        let (start, end) = (self.host_view + pages.start().get(), self.host_view + pages.end());
        VpnRange::between(start, end).expect("a small range")
    }

    pub(super) fn vpn(&self, page: u8) -> Vpn {
        Vpn::new(self.host_view + u64::from(page)).expect("a small number")
    }

    pub(super) const fn thread(&self, index: u16) -> Thread {
        Thread { process: self.process, index }
    }

    pub(super) const fn vcpu(&self, index: u16) -> VcpuId {
        VcpuId { vm: self.vm, index }
    }
}

/// Who can reach which page of the object as it is now.
#[derive(Clone, Copy, Default)]
pub(super) struct Reach {
    /// By a host page table or a thread's TLB.
    pub(super) host: Pages,
    /// By stage 2 or a vCPU's TLB.
    pub(super) guest: Pages,
    /// By a pin of the kernel's, other than one that GUP-fast is about to look at again.
    pub(super) pinned: Pages,
    /// By the device's domain or IOTLB.
    pub(super) device: Pages,
    /// pKVM: a guest has it, and the host's stage 2 has no page there.
    pub(super) donated: Pages,
    /// pKVM: a guest has it, and the host's stage 2 has it too.
    pub(super) lent: Pages,
    /// Some frame of the host's has bytes that only a guest was to read.
    pub(super) told: bool,
    /// A marker denies it in the host view.
    pub(super) poisoned: Pages,
    /// It has memory.
    pub(super) backed: Pages,
    /// Stage 2 calls it accessed.
    pub(super) accessed: Pages,
    /// It has other memory than whoever had the same pages.
    pub(super) apart: Pages,
    /// The RMP has its memory assigned.
    pub(super) assigned: Pages,
    /// To the guest, at the guest frame that shows it.
    pub(super) given: Pages,
    /// And the guest has validated it.
    pub(super) validated: Pages,
}

/// TLBs that a fingerprint can tell apart.
pub(super) const MOST_CPUS: usize = 3;

/// Where that of another process has its place among the threads'.
pub(super) const OTHER: usize = MOST_CPUS - 1;

pub(super) struct KeptMachine {
    pub(super) machine: Machine,
    /// Its number among those that are kept.
    pub(super) number: Option<usize>,
    /// Of everything but TLBs.
    pub(super) hash: u64,
    pub(super) thread_hashes: [u64; MOST_CPUS],
    pub(super) vcpu_hashes: [u64; MOST_CPUS],
    /// Who can reach what, once somebody has asked.
    reached: Cell<Option<Reach>>,
    /// What an audit says, once somebody has asked.
    audited: Cell<Option<Result<(), Discrepancy>>>,
}

impl KeptMachine {
    pub(super) fn new(machine: Machine, parts: &Parts) -> Self {
        let (mut thread_hashes, mut vcpu_hashes) = ([0; MOST_CPUS], [0; MOST_CPUS]);
        for (index, hash) in (0..parts.threads).zip(&mut thread_hashes) {
            let mut state = Fold::new();
            machine.hash_tlb(parts.thread(index), &mut state);
            *hash = state.finish();
        }
        if let Some(process) = parts.other {
            let mut state = Fold::new();
            machine.hash_tlb(Thread { process, index: 0 }, &mut state);
            thread_hashes[OTHER] = state.finish();
        }
        for (index, hash) in (0..parts.vcpus).zip(&mut vcpu_hashes) {
            let mut state = Fold::new();
            machine.hash_guest_tlb(parts.vcpu(index), &mut state);
            *hash = state.finish();
        }
        let mut state = Fold::new();
        machine.hash_without_tlbs(&mut state);
        Self {
            machine,
            number: None,
            hash: state.finish(),
            thread_hashes,
            vcpu_hashes,
            reached: Cell::new(None),
            audited: Cell::new(None),
        }
    }

    /// Who can reach which page.
    pub(super) fn reach(&self, parts: &Parts, setup: &Setup) -> Reach {
        self.reached.get().unwrap_or_else(|| {
            let mut reach = Reach::default();
            (0..setup.pages).for_each(|page| self.look_at(&mut reach, page, parts, setup));
            if setup.is_pkvm() {
                let frames = u32::try_from(self.machine.config().frames.get()).unwrap_or(0);
                reach.told = (0..frames).map(Pfn::from).any(|pfn| self.tells(pfn));
            }
            self.reached.set(Some(reach));
            reach
        })
    }

    fn look_at(&self, reach: &mut Reach, page: u8, parts: &Parts, setup: &Setup) {
        let (machine, bit, vpn) = (&self.machine, 1 << page, parts.vpn(page));
        let mut host = false;
        match machine.host_pte(parts.process, vpn) {
            Ok(HostPte::Mapped { .. }) => host = true,
            Ok(HostPte::Poison) => reach.poisoned |= bit,
            _ => {}
        }
        let threads = &mut (0..parts.threads);
        host |= threads.any(|index| machine.remembered(parts.thread(index), vpn).is_some());
        if host {
            reach.host |= bit;
        }
        let gfn = setup.gfn(page);
        let spte = machine.spte(parts.vm, gfn).ok().flatten();
        let remembers = |index| {
            [Side::Shared, Side::Private]
                .into_iter()
                .any(|side| machine.remembered_by_guest(parts.vcpu(index), gfn, side).is_some())
        };
        if spte.is_some() || (0..parts.vcpus).any(remembers) {
            reach.guest |= bit;
        }
        if spte.is_some_and(|spte| spte.accessed) {
            reach.accessed |= bit;
        }
        if let Some(copied) = parts.copied {
            let page = PageIndex::from(u32::from(page));
            if machine.backing(copied, page) != machine.backing(parts.object, page) {
                reach.apart |= bit;
            }
        }
        if let Some((domain, _)) = parts.device {
            let at = Gfn::from(u32::from(page));
            let mapped = machine.iommu_entry(domain, at).is_ok_and(|entry| entry.is_some());
            if mapped || machine.remembered_by_device(domain, at).is_some() {
                reach.device |= bit;
            }
        }
        let backing = machine.backing(parts.object, PageIndex::from(u32::from(page)));
        if let Ok(Some(backing)) = backing {
            reach.backed |= bit;
            self.look_at_frame(reach, bit, (backing.pfn, gfn), parts);
        }
    }

    /// Who has the frame that is behind a page.
    fn look_at_frame(&self, reach: &mut Reach, bit: Pages, (pfn, gfn): (Pfn, Gfn), parts: &Parts) {
        let machine = &self.machine;
        if let Ok((PageState::Owned | PageState::SharedOwned, _)) =
            machine.page_state(Component::Guest(parts.vm), pfn)
        {
            match machine.page_state(Component::Host, pfn) {
                Ok((PageState::NoPage, _)) => reach.donated |= bit,
                _ => reach.lent |= bit,
            }
        }
        // What the device has is told apart from what others pin.
        let device = parts.device.map(|(_, process)| process);
        let mut holders = machine.holders_of(PfnRange::one(pfn));
        if holders.any(|holder| !holder.speculative && Some(holder.process) != device) {
            reach.pinned |= bit;
        }
        let entry = machine.rmp_entry(pfn).filter(|entry| entry.assigned);
        let Some(entry) = entry else { return };
        reach.assigned |= bit;
        if entry.asid == Some(ASID) && entry.gfn == gfn {
            reach.given |= bit;
        }
        if entry.validated {
            reach.validated |= bit;
        }
    }

    /// Whether the host reaches a frame with what was written as a guest's own in it.
    fn tells(&self, pfn: Pfn) -> bool {
        let reached =
            !matches!(self.machine.page_state(Component::Host, pfn), Ok((PageState::NoPage, _)));
        let bytes = self.machine.word_of(pfn).to_le_bytes();
        reached && bytes[0] >= SECRETS
    }

    /// Whether everything on the machine adds up.
    pub(super) fn audit(&self) -> Result<(), Discrepancy> {
        let found = self.audited.get().unwrap_or_else(|| self.machine.audit());
        self.audited.set(Some(found));
        found
    }
}

impl Setup {
    /// The guest frame that shows a page.
    pub(super) fn gfn(&self, page: u8) -> Gfn {
        let gfn = u32::from(page) + u32::from(self.first_gfn) - u32::from(self.first_page);
        Gfn::from(gfn)
    }
}
