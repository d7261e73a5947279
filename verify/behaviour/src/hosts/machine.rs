//! Host `machine`: the simulated one, with its kernel and hardware within reach.

use std::collections::BTreeSet;

use polder::machine::{
    Component, GupFast, GupStep, HostExit, HostPte, Hva, LockOwner, PinId, PinKind, Plant,
    RmpEntry, RmpSize, Thread, Vpn, VpnRange,
};
use polder::units::{GfnRange, Gpa, Level, PAGE_SIZE, PageIndex, PageRange};
use polder::{
    Bug, Error, GuestExit, HostKind, Memory, MemoryFault, Platform, Prefaulted, Visibility, VmId,
};
use polder_vmm::scenario::Op;
use polder_vmm::{Accepting, Accesses, Ended, GuestRoot, IdleVcpu, Progress, Supervision, Vm};

use super::LOOKS;
use crate::host::{Guest, Host, Inside, Trouble, Way};
use crate::{Section, Skipped, cases};

/// The simulated machine, for a kind of VM, with a bug planted or without.
pub(super) struct Machine {
    pub(super) platform: Platform,
    pub(super) root: GuestRoot,
    pub(super) plant: Option<Plant>,
    pub(super) bug: Option<Bug>,
}

impl Machine {
    pub(super) const fn new(platform: Platform) -> Self {
        Self { platform, root: GuestRoot::Tdp, plant: None, bug: None }
    }

    /// A plain VM whose guests run on `root`.
    pub(super) const fn on(root: GuestRoot) -> Self {
        Self { root, ..Self::new(Platform::Plain) }
    }
}

/// Another processor, or the kernel on it.
const OTHER: LockOwner = LockOwner(7);

/// Where the object's page 0 is in the host view: the 1 GiB page after the first.
const HOST_VIEW: u64 = 1 << 18;

fn vpn(page: PageIndex) -> Vpn {
    Vpn::new(HOST_VIEW + page.get()).expect("a page of a small object")
}

const OWN: &str = "each memory is on a machine of its own: a VM has no other memory to run on";
const NEVER_FAILS: &str = "the simulated kernel unmaps and frees without fail; the driver's own \
    tests (`polder/src/driver/tests.rs`) have every step fail on it";
const EITHER: &str = "without hardware that tells them apart (SNP), stage 2 lets either kind of \
    access through once a page is mapped";
const SIMULATED: &str =
    "simulated memory is data of this process, and no mapping or descriptor of it";
const OTHER_MAPS: &str = "another process's own mapping is the kernel's to fill: the machine lets \
    it map what it likes, and hardware (SNP) refuses writes only";
const IN_PLACE: &str = "memory is converted in place: every treatment of contents is on offer";
const ROOT: &str = "which addresses a root translates is no affair of this section: see machine";
const ANOTHER: &str = "this row is about another platform";

/// A row and why it is not applicable.
type Reason = (&'static str, &'static str);

/// What holds on the machine for every kind of VM.
const EVERY: [Reason; 18] = [
    (cases::NO_MOVE, "the simulated kernel moves pages when asked"),
    (cases::NO_PRELOAD, "the host writes private pages, until they are their guest's"),
    (cases::MEM_HOST_VIEW, SIMULATED),
    (cases::MEM_OTHER_VIEWS, SIMULATED),
    (cases::DESCRIPTOR, SIMULATED),
    (cases::TRACED_HOST_VIEW, SIMULATED),
    (cases::TRACED_OTHER_VIEWS, SIMULATED),
    (cases::STEP_FAILS, NEVER_FAILS),
    (cases::QUARANTINE, NEVER_FAILS),
    (cases::QUARANTINE_EXIT, NEVER_FAILS),
    (cases::DENIED_WHILE_FAILING, NEVER_FAILS),
    (cases::CONTINUE_FAILS, NEVER_FAILS),
    (cases::FAILED, "the machine does not model memory that fails"),
    (cases::OTHER, OTHER_MAPS),
    (cases::ANOTHER, OWN),
    (cases::DROPPED, OWN),
    (
        cases::PLAIN_FAULTS,
        "on the machine Polder is the hypervisor: every stage-2 fault comes to it",
    ),
    (cases::SLOTS, "the machine has as many slots as there are numbers for them"),
];

/// The reasons that hold for every kind of VM, and more.
const fn reasons<const MORE: usize, const ALL: usize>(more: [Reason; MORE]) -> [Reason; ALL] {
    assert!(ALL == EVERY.len() + MORE, "all of them, and no more");
    let mut all = [("", ""); ALL];
    let mut at = 0;
    while at < ALL {
        all[at] = if at < EVERY.len() { EVERY[at] } else { more[at - EVERY.len()] };
        at += 1;
    }
    all
}

const PLAIN: &[Reason] = &reasons::<4, 22>([
    (cases::UNMOVABLE, ANOTHER),
    (cases::LOST, IN_PLACE),
    (cases::IMPLICIT, EITHER),
    (cases::MISMATCH, EITHER),
]);

const PROTECTED: &[Reason] = &reasons::<8, 26>([
    (cases::UNMOVABLE, ANOTHER),
    (cases::LOST, IN_PLACE),
    (cases::IMPLICIT, EITHER),
    (cases::MISMATCH, EITHER),
    (cases::PRESERVED, ANOTHER),
    (cases::ZEROED, ANOTHER),
    (cases::UNSPECIFIED, ANOTHER),
    (cases::PLAIN_VM, ANOTHER),
]);

const ONE_VM: &str = "the RMP has one guest for a page: a second VM's bind is refused";
const LOSES: &str = "a conversion of an SNP guest's memory loses contents, and this case is about \
    contents kept";
const NO_ZEROS: &str = "what is zero to an SNP guest is what it has cleared itself: zeros can't be \
    asked for to private";
const GUEST_FILLS: &str = "the host can't write an SNP guest's private pages: they are populated \
    shared, or by the guest";
const VALIDATES: &str = "a page that shows at another guest frame has to be validated anew there";
const READS: &str = "once a page is mapped, a read as the other kind finds ciphertext or garbage, \
    and only a write exits: that is a row of the RMP";

const DROPPED_FIRST: &str = "contents of a page that an SNP guest shares are dropped before a device is \
    told: that it fails then leaves the page in quarantine";
const UNMOVABLE: &str = "nobody here moves an SNP guest's private pages";

const SNP: &[Reason] = &reasons::<24, 42>([
    (cases::FAILS, DROPPED_FIRST),
    (cases::MOVES, UNMOVABLE),
    (cases::MOVES_BUSY, UNMOVABLE),
    (cases::DISAGREE, ONE_VM),
    ("an overlap in guest frames is refused, in another VM it is not", ONE_VM),
    ("an overlap in pages is refused, in another VM it is not", ONE_VM),
    ("two VMs see one object, and a conversion holds for both", ONE_VM),
    ("a slot in use is refused; a slot unbound can be bound anew", VALIDATES),
    (cases::MOVED, VALIDATES),
    ("shared first: what the host wrote stays when it becomes private", LOSES),
    ("a guest at work on the pages loses none of its words", LOSES),
    ("contents zeroed are zeros for the guest, too", NO_ZEROS),
    ("a zeroing conversion of owed pages makes them whole, and zeros", NO_ZEROS),
    ("a guest's access to an owed page waits, and sees it whole", GUEST_FILLS),
    ("private pages are populated for the guest alone", GUEST_FILLS),
    ("a conversion of owed pages leaves them owed", GUEST_FILLS),
    (cases::MISMATCH, READS),
    (cases::PLAIN_VM, ANOTHER),
    (cases::PRESERVED, ANOTHER),
    (cases::ZEROED, ANOTHER),
    (cases::UNSPECIFIED, ANOTHER),
    (cases::PRESERVED_PROTECTED, ANOTHER),
    (cases::ZEROED_PROTECTED, ANOTHER),
    (cases::UNSPECIFIED_PROTECTED, ANOTHER),
]);

const GUEST_FREES: &str = "only the guest gives its pages back: a discard by the VMM is refused, which \
    is a row of pkvm";
const KEEPS_SLOT: &str = "a slot in which a protected guest has pages stays: that is a row of pkvm";
const GUEST_CONVERTS: &str = "this row has the VMM convert, or hold what the guest asks for, and under \
    pKVM the guest alone does it";
const ITS_OWN: &str = "contents are the guest's own: they are kept, and zeros are its to write";
const HAS: &str = "what a protected guest shares it has: sharing gives it the page first";
const SHARES_WHOLE: &str = "a protected guest shares what it has, and pages whose contents are owed it \
    waits for: the row shares them first";
const NO_SELFTESTS: &str = "the kernel's selftests have the VMM convert, or begin with shared memory, \
    and a protected VM's memory is its own";
const ONE_OWNER: &str =
    "pKVM's hypervisor gives a page to one guest: a second VM's bind is refused";

/// What holds for a protected VM's memory under pKVM.
const PKVM: &[Reason] = &reasons::<39, 57>([
    ("the fault for an access of the other kind says what was wanted", EITHER),
    (cases::LOST, IN_PLACE),
    (cases::IMPLICIT, EITHER),
    (cases::MISMATCH, EITHER),
    (cases::PLAIN_VM, ANOTHER),
    (cases::UNMOVABLE, ANOTHER),
    (cases::PRESERVED, ANOTHER),
    (cases::ZEROED, ANOTHER),
    (cases::UNSPECIFIED, ANOTHER),
    (cases::PRESERVED_PROTECTED, ANOTHER),
    (cases::ZEROED_PROTECTED, ANOTHER),
    (cases::UNSPECIFIED_PROTECTED, ANOTHER),
    ("several objects are independent of each other", GUEST_FREES),
    ("an overlap in guest frames is refused, in another VM it is not", ONE_OWNER),
    ("an overlap in pages is refused, in another VM it is not", ONE_OWNER),
    ("two VMs see one object, and a conversion holds for both", ONE_OWNER),
    (cases::DISAGREE, ONE_OWNER),
    ("a slot in use is refused; a slot unbound can be bound anew", KEEPS_SLOT),
    (cases::MOVED, KEEPS_SLOT),
    ("unbinding frees no page and changes none", KEEPS_SLOT),
    ("a guest's access to a slot that is gone comes to the VMM, unbound", KEEPS_SLOT),
    ("neighbouring slots are done in one go, a gap between them ends it", KEEPS_SLOT),
    ("a slot deleted meanwhile ends it early, or in an error; none hangs", KEEPS_SLOT),
    ("touches of the same pages by many threads are all answered", GUEST_FREES),
    (cases::AUDIT, GUEST_FREES),
    ("what becomes of other pages meanwhile leaves none of it undone", GUEST_FREES),
    (
        "while a guest runs and converts, it sees no wrong byte and the host no page late",
        GUEST_FREES,
    ),
    (cases::FAILED_STOPS, GUEST_FREES),
    ("what a device has mapped is not discarded, and the device is named", GUEST_FREES),
    ("before allocation: it is recorded, and nothing is allocated", HAS),
    ("the other pages convert singly, and all after the unpin", GUEST_CONVERTS),
    ("a request across two slots is all or nothing", GUEST_CONVERTS),
    ("a range that is busy is refused, where the caller won't wait", GUEST_CONVERTS),
    ("touches meanwhile see right bytes or are denied; none maps late", GUEST_CONVERTS),
    ("contents zeroed are zeros for the guest, too", ITS_OWN),
    ("contents of pages that are so already are not zeroed", ITS_OWN),
    ("discards meanwhile leave zeros", GUEST_FREES),
    ("discards meanwhile leave zeros, also while others are owed", GUEST_FREES),
    (
        "while others are owed, a guest's first touches of what was prefaulted come to nobody",
        GUEST_FREES,
    ),
]);

impl Host for Machine {
    fn kind(&self) -> HostKind {
        HostKind::Machine
    }

    fn platform(&self) -> Platform {
        self.platform
    }

    fn name(&self) -> String {
        match (self.root, self.platform) {
            (GuestRoot::Shadow, _) => "machine shadow".to_owned(),
            (GuestRoot::Nested, _) => "machine nested".to_owned(),
            (GuestRoot::Tdp, Platform::Plain) => "machine".to_owned(),
            (GuestRoot::Tdp, platform) => format!("machine {platform}"),
        }
    }

    fn lacks(&self, section: Section) -> Option<&'static str> {
        if self.root != GuestRoot::Tdp && section != Section::Prefault {
            return Some(ROOT);
        }
        match (section, self.platform) {
            (Section::Selftests, Platform::Pkvm) => Some(NO_SELFTESTS),
            (Section::Population | Section::Userfault, Platform::Pkvm) => Some(SHARES_WHOLE),
            (Section::Discard, Platform::Pkvm) => Some(GUEST_FREES),
            (Section::Rmp, Platform::Snp) | (Section::Pkvm, Platform::Pkvm) => None,
            (Section::Rmp, _) => Some("only memory of an SNP guest has an RMP"),
            (Section::Pkvm, _) => {
                Some("only memory of a protected VM under pKVM is the guest's to share")
            }
            (Section::HugePages, Platform::Snp) => {
                Some("its contents are not preserved; its large entries are in section rmp")
            }
            (Section::HugePages, Platform::Pkvm) => {
                Some("pKVM's tables have entries of 4K only here, and such memory is refused")
            }
            (Section::KernelAccess, _) => {
                Some("these accesses are KVM's, and here KVM is simulated")
            }
            _ => None,
        }
    }

    fn not_applicable(&self) -> &'static [(&'static str, &'static str)] {
        match self.platform {
            Platform::Plain => PLAIN,
            Platform::SwProtected => PROTECTED,
            Platform::Snp => SNP,
            Platform::Pkvm => PKVM,
        }
    }

    fn missing(&self, _: &polder::Error) -> Option<Skipped> {
        None
    }

    fn prepare(&self, memory: &Memory) {
        if let Some(plant) = self.plant {
            let planted = memory.simulated(|machine, _, _| machine.plant(plant, true));
            planted.expect("memory of this host");
        }
        if let Some(bug) = self.bug {
            memory.plant(bug);
        }
    }

    fn guest(&self) -> Result<Box<dyn Guest>, Skipped> {
        Ok(Box::new(MachineGuest(Vm::on(self.root), self.root)))
    }

    fn in_trouble(&self, trouble: Trouble, _: &mut (dyn FnMut() + Send)) -> Result<(), Skipped> {
        panic!("{trouble:?} is not applicable to the machine, and declared so");
    }

    fn mapped(&self, memory: &Memory, range: PageRange) -> Vec<PageIndex> {
        let mapped = memory.simulated(|machine, _, process| {
            let is_mapped = |&page: &PageIndex| {
                matches!(machine.host_pte(process, vpn(page)), Ok(HostPte::Mapped { .. }))
            };
            range.frames().filter(is_mapped).collect()
        });
        mapped.expect("memory of this host")
    }

    fn inherited(&self, memory: &Memory) -> Vec<String> {
        let inherited = memory.simulated(|machine, object, process| {
            let child = machine.fork(process).expect("a process");
            let all = PageRange::between(0, 1).expect("a page");
            let views: BTreeSet<_> = machine.views_of(object, all).map(|(id, _)| id).collect();
            machine.exit_process(child).expect("the child");
            views.contains(&child).then(|| "the host view".to_owned())
        });
        Vec::from_iter(inherited.expect("memory of this host"))
    }

    fn reaches(&self, _: Way) -> bool {
        false
    }

    fn inside(&self) -> Option<&dyn Inside> {
        Some(self)
    }
}

/// A guest whose accesses the cases make one by one, as private or as shared.
struct MachineGuest(Vm, GuestRoot);

impl Guest for MachineGuest {
    fn attach(&self, memory: &Memory) -> VmId {
        self.0.attach(memory).expect("memory of this host")
    }

    fn fd(&self) -> polder::Vm {
        self.0.fd()
    }

    fn slots(&self) -> u32 {
        self.0.slots()
    }

    fn run(&self, memory: (&Memory, VmId), programs: &[Vec<Op>]) -> Ended {
        let mut looks = 0;
        let supervise = |_: Progress<'_>| {
            looks += 1;
            if looks < LOOKS { Supervision::GoOn } else { Supervision::TimeOut }
        };
        self.0.run(memory, programs, supervise).expect("the machine runs the guest")
    }

    fn vcpu(&self, (memory, vm): (&Memory, VmId)) -> IdleVcpu {
        self.0.idle_vcpu(memory, vm).expect("memory of this host")
    }

    fn prefault(
        &self,
        of: (&Memory, VmId),
        vcpu: &IdleVcpu,
        gfns: GfnRange,
    ) -> Result<Prefaulted, Error> {
        self.1.prefault(of, vcpu, gfns)
    }

    fn access(
        &self,
        (memory, vm): (&Memory, VmId),
        gpa: Gpa,
        visibility: Visibility,
        value: Option<u64>,
    ) -> Result<u64, MemoryFault> {
        let vcpu = memory.machine_vcpu(vm).expect("memory of this host");
        let accepting = Accepting::default();
        let guest = Accesses::new(vcpu, (memory, vm), &accepting);
        let refused = |exit| match exit {
            GuestExit::MemoryFault(fault) => fault,
            other => panic!("{other}"),
        };
        if let Some(value) = value {
            guest.write_as(gpa, visibility, &value.to_le_bytes()).map_err(refused)?;
        }
        let mut word = [0; 8];
        guest.read_as(gpa, visibility, &mut word).map_err(refused)?;
        Ok(u64::from_le_bytes(word))
    }
}

impl Inside for Machine {
    fn refer<'a>(&self, memory: &'a Memory, page: PageIndex) -> Box<dyn Send + 'a> {
        touch(memory, page);
        let pin = memory.simulated(|machine, _, process| {
            machine.pin_user_pages(process, VpnRange::one(vpn(page)), true, PinKind::LongTerm)
        });
        let pin = pin.expect("memory of this host").expect("a page that is mapped");
        Box::new(Reference { memory, pin })
    }

    fn fail(&self, _: &Memory, _: PageIndex) {
        panic!("memory that fails is not applicable to the machine, and declared so");
    }

    fn touch_in_child(&self, memory: &Memory, page: PageIndex) -> Option<u8> {
        let read = memory.simulated(|machine, _, process| {
            let child = machine.fork(process).expect("a process");
            let mut byte = [0];
            let thread = Thread { process: child, index: 0 };
            let read = machine.host_read(thread, hva(page), &mut byte);
            machine.exit_process(child).expect("the child");
            read.is_ok().then_some(byte[0])
        });
        read.expect("memory of this host")
    }

    fn touch_in_other(&self, _: &Memory, _: PageIndex) -> Option<u8> {
        panic!("another process's mapping is not applicable to the machine, and declared so");
    }

    fn stray_touch_ends(&self, memory: &Memory, page: PageIndex) -> bool {
        // The first touch waits for its answer; the pointer meets what that left behind.
        let _ = memory.host_view().touch_read(page.offset(), &mut [0]);
        let exit = memory.simulated(|machine, _, process| {
            let thread = Thread { process, index: 0 };
            machine.host_read(thread, hva(page), &mut [0])
        });
        matches!(exit.expect("memory of this host"), Err(HostExit::Sigbus { .. }))
    }

    fn gup_fast_across(&self, memory: &Memory, page: PageIndex, between: &mut dyn FnMut()) -> bool {
        touch(memory, page);
        let pinned = memory.simulated(|machine, _, process| {
            let begun = GupFast::new(process, vpn(page), true, PinKind::Short);
            match begun.step(machine) {
                Ok(GupStep::Again(begun)) => begun,
                other => panic!("the page is mapped: {other:?}"),
            }
        });
        let mut gup = pinned.expect("memory of this host");
        between();
        loop {
            let step = memory.simulated(|machine, _, _| gup.step(machine));
            match step.expect("memory of this host").expect("nobody else releases its pin") {
                GupStep::Again(next) => gup = next,
                GupStep::Pinned(pin) => {
                    drop(Reference { memory, pin });
                    return true;
                }
                GupStep::Fallback => return false,
            }
        }
    }

    fn rmp(&self, memory: &Memory, page: PageIndex) -> (bool, bool) {
        let entry = memory.simulated(|machine, object, _| {
            let backing = machine.backing(object, page).expect("the object")?;
            machine.rmp_entry(backing.pfn)
        });
        let entry = entry.expect("memory of this host");
        let is_large = |entry: RmpEntry| entry.size == RmpSize::Size2M;
        entry.map_or((false, false), |entry| (entry.assigned, is_large(entry)))
    }

    fn mapped_at(&self, memory: &Memory, page: PageIndex) -> Option<Level> {
        let level = memory.simulated(|machine, object, _| {
            let (vm, gfns) = machine.gfns_of(object, PageRange::one(page)).next()?;
            machine.spte(vm, gfns.start()).expect("its VM").map(|spte| spte.level)
        });
        level.expect("memory of this host")
    }

    fn huge_folio(&self, memory: &Memory, page: PageIndex) {
        let made =
            memory.simulated(|machine, object, _| machine.allocate(object, page, Level::Size2M));
        made.expect("memory of this host").expect("a free block of 2M");
    }

    fn gigabyte_folio(&self, memory: &Memory) {
        let first = PageIndex::from(0);
        let made =
            memory.simulated(|machine, object, _| machine.allocate(object, first, Level::Size1G));
        made.expect("memory of this host").expect("a free block of 1G");
    }

    fn split(&self, memory: &Memory, page: PageIndex) {
        let split = memory.simulated(|machine, object, _| {
            let backing = machine.backing(object, page)?.expect("a page with memory");
            machine.lock_folio(backing.pfn, OTHER)?;
            let gfns: Vec<_> = machine.gfns_of(object, PageRange::one(page)).collect();
            gfns.into_iter().try_for_each(|(vm, gfns)| machine.tdp_zap(vm, gfns).map(|_| ()))?;
            machine.split_folio(object, page, OTHER)?;
            machine.unlock_folio(backing.pfn, OTHER)
        });
        split.expect("memory of this host").expect("nobody refers to it");
    }

    fn collapse(&self, memory: &Memory, page: PageIndex) {
        let collapsed = memory.simulated(|machine, object, _| {
            let range = PageRange::enclosing(page, Level::Size2M, machine.geometry());
            let gfns: Vec<_> = machine.gfns_of(object, range).collect();
            gfns.into_iter().try_for_each(|(vm, gfns)| machine.tdp_zap(vm, gfns).map(|_| ()))?;
            machine.merge_folios(object, page, Level::Size2M, OTHER)
        });
        collapsed.expect("memory of this host").expect("one block of frames");
    }

    fn while_in_use(&self, memory: &Memory, page: PageIndex, run: &mut dyn FnMut()) {
        let at = |machine: &polder::machine::Machine, object| {
            machine.backing(object, page).expect("the object").expect("a page with memory").pfn
        };
        let held = memory.simulated(|machine, object, _| {
            machine.rmp_hold(at(machine, object), RmpSize::Size4K, OTHER)
        });
        held.expect("memory of this host").expect("nobody else has it in use");
        run();
        let released =
            memory.simulated(|machine, object, _| machine.rmp_release(at(machine, object), OTHER));
        released.expect("memory of this host").expect("it is held");
    }

    fn while_locked(&self, memory: &Memory, page: PageIndex, run: &mut dyn FnMut()) {
        let locked = memory.simulated(|machine, object, _| {
            let backing = machine.backing(object, page).expect("the object");
            let pfn = backing.expect("a page with memory").pfn;
            machine.lock_folio(pfn, OTHER).map(|()| pfn)
        });
        let pfn = locked.expect("memory of this host").expect("nobody else has it locked");
        run();
        let unlocked = memory.simulated(|machine, _, _| machine.unlock_folio(pfn, OTHER));
        unlocked.expect("memory of this host").expect("it is locked");
    }

    fn frames(&self, memory: &Memory, range: PageRange) -> Vec<u64> {
        let frames = memory.simulated(|machine, object, _| {
            let folios = machine.folios(object, range).expect("the object");
            folios.map(|(_, backing)| backing.pfn.get()).collect()
        });
        frames.expect("memory of this host")
    }

    fn is_donated(&self, memory: &Memory, page: PageIndex) -> Option<bool> {
        let donated = memory.simulated(|machine, object, _| {
            let backing = machine.backing(object, page).expect("the object")?;
            let owner = machine.owner_of(backing.pfn).expect("a machine with pKVM");
            Some(matches!(owner, Component::Guest(_)))
        });
        donated.expect("memory of this host")
    }

    fn fail_hypervisor(&self, memory: &Memory, nth: u64) {
        let failing = memory.simulated(|machine, _, _| machine.fail_hypervisor(Some(nth)));
        failing.expect("memory of this host");
    }

    fn refer_to_file<'a>(&self, memory: &'a Memory, page: PageIndex) -> Box<dyn Send + 'a> {
        let pin = memory.simulated(|machine, object, process| {
            let kind = PinKind::LongTerm;
            machine.pin_object_pages(process, object, PageRange::one(page), kind)
        });
        let pin = pin.expect("memory of this host").expect("a page of the object");
        Box::new(Reference { memory, pin })
    }

    fn off_direct_map(&self, memory: &Memory, range: PageRange) -> Vec<u64> {
        let off = memory.simulated(|machine, object, _| {
            let is_off = |page: &PageIndex| {
                let backing = machine.backing(object, *page).expect("the object");
                backing.is_some_and(|backing| !machine.is_in_direct_map(backing.pfn))
            };
            range.frames().filter(is_off).map(PageIndex::get).collect()
        });
        off.expect("memory of this host")
    }

    fn audit(&self, memory: &Memory) -> Result<(), String> {
        let audit = memory.simulated(|machine, _, _| machine.audit());
        audit.expect("memory of this host").map_err(|wrong| wrong.to_string())
    }
}

/// Has a shared page mapped in the host view.
fn touch(memory: &Memory, page: PageIndex) {
    memory.host_view().touch_read(page.offset(), &mut [0]).expect("a shared page");
}

fn hva(page: PageIndex) -> Hva {
    Hva::new(HOST_VIEW * PAGE_SIZE + page.offset())
}

/// A pin that Polder knows nothing of.
struct Reference<'a> {
    memory: &'a Memory,
    pin: PinId,
}

impl Drop for Reference<'_> {
    fn drop(&mut self) {
        let unpinned = self.memory.simulated(|machine, _, _| machine.unpin(self.pin));
        assert!(matches!(unpinned, Ok(Ok(()))), "a pin is released once: {unpinned:?}");
    }
}
