//! A protected VM's memory under pKVM, on the simulated machine: the guest decides, donations are
//! whole, devices come and go with what is shared, pages move, and bytes are there before the
//! guest.

#![expect(clippy::unwrap_used, reason = "a test")]

use std::sync::{Arc, Mutex};

use polder::machine::{Component, GupFast, GupStep, PageState, PinKind as GupKind, PkvmFail};
use polder::units::{Gfn, GfnRange, PageCount, PageIndex, PageRange};
use polder::{
    Contents, Dma, Error, GuestExit, Holder, HostKind, MachineVcpu, Memory, OnBusy, PinKind,
    Platform, Refusal, Slot, Visibility, VmId,
};

const PAGES: u32 = 16;

struct Rig {
    memory: Memory,
    vm: VmId,
    vcpu: MachineVcpu,
}

fn rig_for(platform: Platform) -> Rig {
    let builder = Memory::builder(PAGES.into()).host(HostKind::Machine).platform(platform);
    let memory = builder.build().unwrap();
    let vm = memory.attach(polder::Vm::Machine).unwrap();
    memory.bind(vm, Slot(0), Gfn::from(0), range(0, PAGES.into())).unwrap();
    let vcpu = memory.machine_vcpu(vm).unwrap();
    Rig { memory, vm, vcpu }
}

fn rig() -> Rig {
    rig_for(Platform::Pkvm)
}

fn range(start: u64, end: u64) -> PageRange {
    PageRange::between(start, end).unwrap()
}

fn gfns(start: u64, end: u64) -> GfnRange {
    GfnRange::between(start, end).unwrap()
}

fn page(at: u32) -> PageIndex {
    PageIndex::from(at)
}

impl Rig {
    fn guest_write(&self, at: u32, byte: u8) {
        let gpa = Gfn::from(at).gpa();
        self.vcpu.write(gpa, Visibility::Private, &[byte; 8]).unwrap();
    }

    fn guest_read(&self, at: u32) -> u8 {
        let mut bytes = [0; 8];
        self.vcpu.read(Gfn::from(at).gpa(), Visibility::Private, &mut bytes).unwrap();
        bytes[7]
    }

    fn share(&self, start: u64, end: u64) {
        self.vcpu.convert(gfns(start, end), Visibility::Shared).unwrap();
    }

    fn host_read(&self, at: u32) -> Result<u8, Error> {
        let mut byte = [0];
        self.memory.read(self.vm, Gfn::from(at).gpa(), &mut byte)?;
        Ok(byte[0])
    }

    /// What the host's table says of a page.
    fn host_state(&self, at: u32) -> PageState {
        let state = self.memory.simulated(|machine, object, _| {
            let pfn = machine.backing(object, page(at)).unwrap().unwrap().pfn;
            machine.page_state(Component::Host, pfn).unwrap().0
        });
        state.unwrap()
    }

    fn audit(&self) {
        assert_eq!(self.memory.simulated(|machine, _, _| machine.audit()).unwrap(), Ok(()));
    }
}

#[test]
fn a_page_is_the_hosts_until_the_guest_touches_it_and_the_guests_from_then_on() {
    let rig = rig();
    rig.guest_write(3, 7);
    assert_eq!(rig.host_state(3), PageState::NoPage);
    assert!(matches!(rig.host_read(3), Err(Error::Refused(Refusal::Private { .. }))));
    rig.share(3, 4);
    assert_eq!((rig.host_state(3), rig.host_read(3)), (PageState::SharedBorrowed, Ok(7)));
    rig.memory.write(rig.vm, Gfn::from(3).gpa(), &[8; 8]).unwrap();
    assert_eq!(rig.guest_read(3), 8);
    rig.vcpu.convert(gfns(3, 4), Visibility::Private).unwrap();
    assert_eq!(rig.host_state(3), PageState::NoPage);
    assert_eq!(rig.guest_read(3), 8);
    rig.audit();
}

#[test]
fn what_the_vmm_wishes_changes_nothing_and_is_noted() {
    let rig = rig();
    rig.guest_write(3, 7);
    for refused in [
        rig.memory
            .convert(range(3, 4), Visibility::Shared, Contents::Preserve, OnBusy::Wait)
            .unwrap_err(),
        rig.memory
            .convert_gfns(rig.vm, gfns(3, 4), Visibility::Shared, Contents::Preserve, OnBusy::Wait)
            .unwrap_err(),
        rig.memory.discard(range(3, 4), OnBusy::Wait).unwrap_err(),
    ] {
        let Error::Refused(Refusal::GuestDecides { page: at, .. }) = refused else {
            panic!("{refused}")
        };
        assert_eq!((at, refused.errno()), (page(3), polder::Errno::EPERM));
    }
    rig.memory.want(rig.vm, gfns(3, 4), Visibility::Shared).unwrap();
    assert_eq!(rig.memory.unmet().len(), 1);
    assert!(rig.host_read(3).is_err());
    rig.share(3, 4);
    assert_eq!(rig.memory.unmet().len(), 0);
    rig.audit();
}

#[test]
fn memory_that_the_guest_has_not_shared_can_not_be_made_shared() {
    let shared = Memory::builder(PAGES.into()).host(HostKind::Machine).platform(Platform::Pkvm);
    assert!(matches!(shared.shared().build(), Err(Error::NotOffered { .. })));
    for host in [HostKind::Memfd, HostKind::GuestMemfd] {
        let elsewhere = Memory::builder(PAGES.into()).host(host).platform(Platform::Pkvm);
        assert!(matches!(elsewhere.build(), Err(Error::NotOffered { .. })));
    }
}

#[test]
fn a_second_vm_has_no_part_in_it() {
    let rig = rig();
    let other = rig.memory.attach(polder::Vm::Machine).unwrap();
    let bound = rig.memory.bind(other, Slot(0), Gfn::from(0), range(0, 4));
    assert!(matches!(bound, Err(Error::OneVm { .. })), "{bound:?}");
}

#[test]
fn a_donation_is_refused_while_somebody_holds_a_pin_that_polder_does_not_know() {
    let rig = rig();
    // The kernel pins a page of the file, plainly, while it is still the host's.
    let pin = rig.memory.simulated(|machine, object, process| {
        machine.pin_object_pages(process, object, range(3, 4), GupKind::Short)
    });
    let pin = pin.unwrap().unwrap();
    let refused = rig.vcpu.write(Gfn::from(3).gpa(), Visibility::Private, &[1]).unwrap_err();
    let GuestExit::Failed(Error::Refused(Refusal::Referenced { page: at, .. })) = refused else {
        panic!("{refused}")
    };
    assert_eq!(at, page(3));
    rig.memory.simulated(|machine, _, _| machine.unpin(pin)).unwrap().unwrap();
    rig.guest_write(3, 1);
    rig.audit();
}

#[test]
fn an_unshare_is_refused_while_a_pin_is_held_and_done_after() {
    let rig = rig();
    rig.share(2, 6);
    let pin = rig.memory.pin(range(4, 5), PinKind::Short, Holder::new("disk")).unwrap();
    let refused = rig.vcpu.convert(gfns(2, 6), Visibility::Private).unwrap_err();
    assert!(
        matches!(&refused, GuestExit::Failed(Error::Refused(Refusal::Pinned { page: at, holder, .. }))
            if *at == page(4) && *holder == Holder::new("disk")),
        "{refused}"
    );
    assert_eq!(rig.host_read(2), Ok(0), "all or nothing");
    drop(pin);
    rig.vcpu.convert(gfns(2, 6), Visibility::Private).unwrap();
    rig.audit();
}

#[test]
fn a_conversion_that_the_hypervisor_has_no_memory_for_is_taken_back_page_by_page() {
    for nth in 0..12 {
        let rig = rig();
        (0..4).for_each(|at| rig.guest_write(at, 9));
        rig.memory.simulated(|machine, _, _| machine.fail_hypervisor(Some(nth))).unwrap();
        let refused = rig.vcpu.convert(gfns(0, 4), Visibility::Shared).unwrap_err();
        assert!(
            matches!(refused, GuestExit::Failed(Error::Pkvm { fail: PkvmFail::NoMemory, .. })),
            "{refused}"
        );
        for at in 0..4 {
            assert_eq!(rig.host_state(at), PageState::NoPage, "page {at} after failure {nth}");
            assert!(rig.host_read(at).is_err());
        }
        assert_eq!(rig.memory.quarantined(), []);
        rig.audit();
        rig.share(0, 4);
        assert_eq!(rig.host_read(3), Ok(9));
    }
}

#[test]
fn a_donation_that_the_hypervisor_has_no_memory_for_is_none() {
    for nth in 0..3 {
        let rig = rig();
        rig.memory.simulated(|machine, _, _| machine.fail_hypervisor(Some(nth))).unwrap();
        let refused = rig.vcpu.write(Gfn::from(0).gpa(), Visibility::Private, &[1]).unwrap_err();
        assert!(matches!(refused, GuestExit::Failed(Error::Pkvm { .. })), "{refused}");
        assert_eq!(rig.host_state(0), PageState::Owned);
        rig.audit();
        rig.guest_write(0, 1);
    }
}

#[test]
fn what_the_guest_relinquishes_takes_up_no_memory_and_is_zeros_for_its_next_owner() {
    let rig = rig();
    (0..4).for_each(|at| rig.guest_write(at, 9));
    rig.vcpu.relinquish(gfns(1, 3)).unwrap();
    assert_eq!(rig.memory.existing().unwrap(), [range(0, 1), range(3, 4)]);
    assert_eq!((rig.guest_read(1), rig.guest_read(0)), (0, 9));
    rig.vcpu.relinquish(gfns(8, 12)).unwrap();
    rig.audit();
}

#[test]
fn a_slot_in_which_the_guest_has_pages_stays() {
    let rig = rig();
    rig.guest_write(0, 9);
    let refused = rig.memory.unbind(rig.vm, Slot(0));
    assert!(matches!(refused, Err(Error::NotOffered { .. })), "{refused:?}");
    assert_eq!(rig.guest_read(0), 9);
    rig.vcpu.relinquish(gfns(0, 1)).unwrap();
    rig.memory.unbind(rig.vm, Slot(0)).unwrap();
}

#[test]
fn a_device_reaches_what_the_guest_shares_and_stands_in_no_conversions_way() {
    let rig = rig();
    rig.share(2, 4);
    let device = rig.memory.simulated_device(Holder::new("nic")).unwrap();
    let mut seen = [0; 8];
    device.write(2 * 4096, &[5; 8]).unwrap();
    assert_eq!(rig.guest_read(2), 5);
    assert!(device.read(8 * 4096, &mut seen).is_err(), "private");
    rig.share(8, 9);
    device.read(8 * 4096, &mut seen).unwrap();
    rig.vcpu.convert(gfns(2, 4), Visibility::Private).unwrap();
    assert!(device.write(2 * 4096, &[6; 8]).is_err(), "its IOTLB, too");
    assert_eq!(rig.guest_read(2), 5);
    rig.audit();
    let moved = rig.memory.move_pages(range(8, 9), OnBusy::Wait);
    assert!(matches!(moved, Err(Error::Refused(Refusal::Pinned { .. }))), "{moved:?}");
    device.detach().unwrap();
    rig.memory.move_pages(range(8, 9), OnBusy::Wait).unwrap();
    rig.audit();
}

/// A device that fails as told.
#[derive(Default)]
struct Failing {
    told: Mutex<Vec<(bool, PageRange)>>,
    fail: Mutex<Option<usize>>,
}

impl Failing {
    fn tell(&self, map: bool, pages: PageRange) -> Result<(), Error> {
        let mut fail = self.fail.lock().unwrap();
        if *fail == Some(0) {
            *fail = None;
            return Err(Error::Interrupted);
        }
        *fail = fail.map(|left| left - 1);
        self.told.lock().unwrap().push((map, pages));
        Ok(())
    }
}

impl Dma for Failing {
    fn map(&self, pages: PageRange) -> Result<(), Error> {
        self.tell(true, pages)
    }

    fn unmap(&self, pages: PageRange) -> Result<(), Error> {
        self.tell(false, pages)
    }
}

#[test]
fn a_device_that_fails_fails_the_conversion_by_name_and_ends_as_it_began() {
    let rig = rig_for(Platform::Plain);
    let told = Arc::new(Failing::default());
    let convert = |to| rig.memory.convert(range(0, 4), to, Contents::Preserve, OnBusy::Wait);
    let nic = rig.memory.attach_dma(Holder::new("nic"), PageCount::ONE, told.clone()).unwrap();
    for nth in 0..4 {
        *told.fail.lock().unwrap() = Some(nth);
        let Err(Error::Device { holder, pages, .. }) = convert(Visibility::Shared) else {
            panic!("it failed at {nth}")
        };
        assert_eq!((holder, pages.start().get()), (Holder::new("nic"), nth as u64));
        let undone = told.told.lock().unwrap().split_off(0);
        assert_eq!(undone.len(), 2 * nth, "each mapped is unmapped, and no other");
        assert!(rig.host_read(0).is_err());
    }
    convert(Visibility::Shared).unwrap();
    for nth in 0..4 {
        *told.fail.lock().unwrap() = Some(nth);
        convert(Visibility::Private).unwrap_err();
        assert_eq!(rig.host_read(0), Ok(0));
    }
    told.told.lock().unwrap().clear();
    convert(Visibility::Private).unwrap();
    assert_eq!(told.told.lock().unwrap().len(), 4);
    nic.detach().unwrap();
    assert_eq!(told.told.lock().unwrap().len(), 4, "it has nothing to let go of");
}

#[test]
fn pages_move_under_guest_and_host_and_keep_their_bytes() {
    for platform in [Platform::Plain, Platform::SwProtected, Platform::Pkvm] {
        let rig = rig_for(platform);
        rig.guest_write(0, 5);
        rig.share(1, 2);
        rig.memory.write(rig.vm, Gfn::from(1).gpa(), &[6; 8]).unwrap();
        let frames = || {
            let all = rig.memory.simulated(|machine, object, _| {
                machine
                    .folios(object, range(0, 2))
                    .unwrap()
                    .map(|(_, it)| it.pfn)
                    .collect::<Vec<_>>()
            });
            all.unwrap()
        };
        let before = frames();
        rig.memory.move_pages(range(0, PAGES.into()), OnBusy::Wait).unwrap();
        assert!(frames().iter().zip(&before).all(|(now, before)| now != before), "{platform}");
        assert_eq!((rig.guest_read(0), rig.host_read(1)), (5, Ok(6)), "{platform}");
        rig.audit();
    }
}

#[test]
fn an_snp_guests_private_page_does_not_move_and_is_named() {
    let rig = rig_for(Platform::Snp);
    let refused = rig.memory.move_pages(range(0, 4), OnBusy::Wait).unwrap_err();
    assert!(matches!(refused, Error::Refused(Refusal::Unmovable { .. })), "{refused}");
}

#[test]
fn what_is_pinned_does_not_move_by_whichever_pin() {
    let rig = rig();
    rig.share(1, 3);
    let pin = rig.memory.pin(range(1, 2), PinKind::LongTerm, Holder::new("disk")).unwrap();
    let moved = rig.memory.move_pages(range(0, 4), OnBusy::Wait);
    assert!(
        matches!(moved, Err(Error::Refused(Refusal::Pinned { page: at, .. })) if at == page(1))
    );
    drop(pin);
    rig.memory.host_view().touch_read(2 * 4096, &mut [0]).unwrap();
    let pin = rig.memory.simulated(|machine, _, process| {
        let vpn = polder::machine::Vpn::new((1 << 18) + 2).unwrap();
        let fast = GupFast::new(process, vpn, true, GupKind::Short);
        let mut step = fast.step(machine).unwrap();
        while let GupStep::Again(next) = step {
            step = next.step(machine).unwrap();
        }
        step
    });
    let GupStep::Pinned(pin) = pin.unwrap() else { panic!() };
    let moved = rig.memory.move_pages(range(0, 4), OnBusy::Wait);
    assert!(
        matches!(moved, Err(Error::Refused(Refusal::Referenced { page: at, .. })) if at == page(2)),
        "{moved:?}"
    );
    rig.memory.simulated(|machine, _, _| machine.unpin(pin)).unwrap().unwrap();
    rig.memory.move_pages(range(0, 4), OnBusy::Wait).unwrap();
    rig.audit();
}

#[test]
fn bytes_are_there_before_the_guest_and_after_it_has_begun_are_refused() {
    for platform in [Platform::Plain, Platform::SwProtected, Platform::Snp, Platform::Pkvm] {
        let rig = rig_for(platform);
        rig.memory.preload(range(2, 4), &[7; 5000]).unwrap();
        assert!(rig.host_read(2).is_err(), "it is the guest's: {platform}");
        assert_eq!(rig.guest_read(2), 7, "{platform}");
        let late = rig.memory.preload(range(2, 4), b"late").unwrap_err();
        assert!(matches!(late, Error::Refused(Refusal::Launched { .. })), "{platform}: {late}");
        assert_eq!(rig.guest_read(2), 7);
        rig.audit();
    }
}

#[test]
fn what_is_preloaded_is_checked_as_everything_else() {
    let rig = rig_for(Platform::Plain);
    let shared =
        rig.memory.convert(range(1, 2), Visibility::Shared, Contents::Preserve, OnBusy::Wait);
    shared.unwrap();
    for (pages, bytes, is) in [
        (range(0, 2), 1, Refusal::NotPrivate { page: page(1) }),
        (range(0, 99), 1, Refusal::Beyond { range: range(0, 99), pages: PAGES.into() }),
    ] {
        assert_eq!(rig.memory.preload(pages, &vec![1; bytes]), Err(Error::Refused(is)));
    }
    let many = rig.memory.preload(range(0, 1), &[1; 4097]);
    assert!(matches!(many, Err(Error::TooManyBytes { .. })));
    rig.memory.launch();
    let late = rig.memory.preload(range(0, 1), b"late").unwrap_err();
    assert_eq!(late.errno(), polder::Errno::EPERM);
    // An SNP guest has to see the pages: they are encrypted for where it does.
    let builder = Memory::builder(PAGES.into()).host(HostKind::Machine).platform(Platform::Snp);
    let unseen = builder.build().unwrap().preload(range(0, 1), b"x").unwrap_err();
    assert!(matches!(unseen, Error::NotOffered { .. }), "{unseen}");
}

#[test]
fn two_vcpus_that_share_and_take_back_the_same_pages_agree_in_the_end() {
    let rig = rig();
    (0..4).for_each(|at| rig.guest_write(at, 3));
    let other = rig.memory.machine_vcpu(rig.vm).unwrap();
    std::thread::scope(|scope| {
        for vcpu in [&rig.vcpu, &other] {
            scope.spawn(move || {
                for round in 0..60u32 {
                    let to = if round % 2 == 0 { Visibility::Shared } else { Visibility::Private };
                    vcpu.convert(gfns(0, 4), to).unwrap();
                }
            });
        }
    });
    rig.share(0, 4);
    assert_eq!(rig.host_read(3), Ok(3));
    assert_eq!(rig.memory.quarantined(), []);
    rig.audit();
}
