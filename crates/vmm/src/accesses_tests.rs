//! What a guest does about pages that it has not accepted, and about those that it gets back.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use polder::machine::{Asid, LockOwner, RmpSize, RmpUpdate};
use polder::units::{PAGE_SIZE, PageIndex, PageRange, Pfn};
use polder::{Contents, Error, HostKind, Moment, OnBusy, Platform, Reached, Slot, Watch};

use super::*;

const PAGES: u32 = 512;
const OTHER: LockOwner = LockOwner(7);
const PRIVATE: Visibility = Visibility::Private;
const SHARED: Visibility = Visibility::Shared;

/// An SNP guest's memory, seen from frame 0 on.
struct Rig {
    memory: Memory,
    vm: VmId,
    accepting: Accepting,
}

impl Rig {
    fn new(owed: bool) -> Self {
        let builder = Memory::builder(PageCount::from(PAGES)).host(HostKind::Machine).shared();
        let builder = builder.platform(Platform::Snp);
        let memory = if owed { builder.owed() } else { builder }.build().unwrap();
        let vm = memory.attach(polder::Vm::Machine).unwrap();
        memory.bind(vm, Slot(0), Gfn::from(0), pages(0, PAGES.into())).unwrap();
        Self { memory, vm, accepting: Accepting::default() }
    }

    /// With one 2M folio whose bytes are 5 as long as it is shared, and which the guest has now.
    fn with_folio() -> Self {
        let rig = Self::new(false);
        rig.memory
            .simulated(|machine, object, _| machine.allocate(object, 0u32.into(), Level::Size2M))
            .unwrap()
            .unwrap();
        for page in 0..u64::from(PAGES) {
            rig.memory.host_view().touch_write(page * PAGE_SIZE, &[5; PAGE_BYTES]).unwrap();
        }
        rig.to(pages(0, PAGES.into()), PRIVATE).unwrap();
        rig
    }

    fn to(&self, range: PageRange, to: Visibility) -> Result<PageCount, Error> {
        self.memory.convert(range, to, Contents::Unspecified, OnBusy::Wait)
    }

    fn vcpu(&self) -> Accesses<'_> {
        let vcpu = self.memory.machine_vcpu(self.vm).unwrap();
        Accesses::new(vcpu, (&self.memory, self.vm), &self.accepting)
    }

    fn frame(&self, page: u32) -> Pfn {
        let backing = self
            .memory
            .simulated(|machine, object, _| machine.backing(object, PageIndex::from(page)));
        backing.unwrap().unwrap().unwrap().pfn
    }

    fn hold(&self, pfn: Pfn) {
        let held =
            self.memory.simulated(|machine, _, _| machine.rmp_hold(pfn, RmpSize::Size4K, OTHER));
        held.unwrap().unwrap();
    }

    fn release(&self, pfn: Pfn) {
        self.memory.simulated(|machine, _, _| machine.rmp_release(pfn, OTHER)).unwrap().unwrap();
    }
}

fn pages(start: u64, end: u64) -> PageRange {
    PageRange::between(start, end).unwrap()
}

fn gpa(page: u32) -> Gpa {
    Gfn::from(page).gpa()
}

fn word(guest: &Accesses<'_>, page: u32) -> Result<u64, GuestExit> {
    let mut word = [0; 8];
    guest.read_as(gpa(page), PRIVATE, &mut word).map(|()| u64::from_le_bytes(word))
}

#[test]
fn a_page_that_is_not_had_again_is_no_longer_what_it_was() {
    let rig = Rig::with_folio();
    let guest = rig.vcpu();
    guest.write(gpa(2), &[1; 64]).unwrap();
    let rescinded = guest.rescind(GfnRange::between(2, 3).unwrap()).unwrap();
    rig.to(pages(2, 3), SHARED).unwrap();
    let changed = guest.keep(&rescinded).unwrap().expect("it is the host's");
    assert_eq!((changed.gpa, changed.found), (gpa(2), None));
}

#[test]
fn a_page_that_comes_back_after_a_refusal_is_kept_only_if_it_holds_what_it_held() {
    for tampered in [false, true] {
        let rig = Rig::with_folio();
        let guest = rig.vcpu();
        for page in [2, 3, 4] {
            guest.write(gpa(page), &[page.to_le_bytes()[0]; 64]).unwrap();
        }
        let rescinded = guest.rescind(GfnRange::between(2, 6).unwrap()).unwrap();
        assert_eq!(rescinded.held.len(), 4, "all 2M were accepted at once");
        let busy = rig.frame(4);
        rig.hold(busy);
        let refused = rig.to(pages(2, 6), SHARED);
        rig.release(busy);
        assert!(matches!(refused, Err(Error::Rmp { .. })), "{refused:?}");
        if tampered {
            // It has the page for a moment, and gives it back with bytes of its own.
            let pfn = rig.frame(3);
            let swapped = rig.memory.simulated(|machine, object, _| {
                let asid = Asid::new(1).unwrap();
                machine.rmpupdate(pfn, RmpUpdate::shared(RmpSize::Size4K)).unwrap();
                machine.object_write(object, 3 * PAGE_SIZE, &[9; 16]).unwrap();
                machine.rmpupdate(pfn, RmpUpdate::private(asid, Gfn::from(3), RmpSize::Size4K))
            });
            swapped.unwrap().unwrap();
        }
        let changed = guest.keep(&rescinded).unwrap();
        assert_eq!(changed.map(|changed| changed.gpa), tampered.then_some(gpa(3)));
        if !tampered {
            let words = [2, 3, 4, 5].map(|page| word(&guest, page));
            assert_eq!(words, [2, 3, 4, 0].map(|byte: u64| Ok(byte * 0x0101_0101_0101_0101)));
        }
    }
}

#[test]
fn a_page_that_was_accepted_and_not_cleared_is_cleared_by_who_uses_it_next() {
    let rig = Rig::with_folio();
    let (first, second) = (rig.vcpu(), rig.vcpu());
    let whole = first.validate(Gfn::from(7)).unwrap().expect("nobody was faster");
    assert_eq!(whole.count(), PageCount::from(PAGES), "by one large entry");
    rig.accepting.write().extend(whole.frames());
    // Clearing meets an entry in use, and the vCPU is kicked there.
    let head = rig.frame(0);
    rig.hold(head);
    first.vcpu.kicker().store(true, Ordering::Release);
    let cleared = first.clear(&mut rig.accepting.write(), whole);
    assert_eq!(cleared, Err(GuestExit::Kicked));
    rig.release(head);
    assert_eq!(word(&second, 9), Ok(0), "and not what the host left there");
    first.vcpu.kicker().store(false, Ordering::Release);
    assert_eq!([0, 7, 511].map(|page| word(&first, page)), [Ok(0), Ok(0), Ok(0)]);
    assert!(!rig.accepting.read().contains(&Gfn::from(9)));
}

/// Holds a population once its bytes are written, for ten seconds at most.
struct HeldWritten(Mutex<Receiver<()>>);

impl Watch for HeldWritten {
    fn at(&self, moment: Moment) {
        if moment == Moment::Reached(Reached::Written) {
            let _ = self.0.lock().unwrap().recv_timeout(Duration::from_secs(10));
        }
    }
}

#[test]
fn a_page_is_accepted_whatever_the_first_of_its_2m_is() {
    let rig = Rig::new(true);
    rig.to(pages(5, 8), PRIVATE).unwrap();
    let guest = rig.vcpu();
    let accepts = |page: u32| {
        guest.write_as(gpa(page), PRIVATE, &[1; 8]).unwrap();
        assert_eq!(word(&guest, page), Ok(0x0101_0101_0101_0101));
    };
    accepts(5);
    let (let_go, go_on) = channel();
    assert!(rig.memory.watch(Arc::new(HeldWritten(Mutex::new(go_on)))));
    let populated = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            rig.memory.populate(pages(0, 1), &[7]).unwrap();
            populated.store(true, Ordering::Release);
        });
        while rig.memory.existing().unwrap().first().is_none_or(|run| run.start().get() > 0) {
            std::thread::yield_now();
        }
        accepts(6);
        assert!(!populated.load(Ordering::Acquire), "it waited for the first page");
        let_go.send(()).unwrap();
    });
    rig.memory.fail(pages(1, 2)).unwrap();
    accepts(7);
}

#[test]
fn who_waits_for_a_shared_page_keeps_nobody_from_accepting_private_ones() {
    let rig = Rig::new(true);
    rig.to(pages(5, 8), PRIVATE).unwrap();
    let (one, other) = (rig.vcpu(), rig.vcpu());
    std::thread::scope(|scope| {
        let waits = scope.spawn(|| one.read_as(gpa(2), SHARED, &mut [0; 8]));
        while rig.memory.statistics().guest_faults == 0 {
            std::thread::yield_now();
        }
        // What it waits for comes only after this.
        assert_eq!(word(&other, 5), Ok(0));
        assert!(!waits.is_finished());
        rig.memory.populate(pages(2, 3), &[7]).unwrap();
        assert_eq!(waits.join().unwrap(), Ok(()));
    });
}
