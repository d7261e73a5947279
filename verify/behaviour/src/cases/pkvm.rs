//! A protected VM under pKVM: the guest decides, and donations are whole.

use polder::{Contents, Errno, Error, GuestExit, OnBusy, Platform, Refusal, Slot, Visibility};

use crate::Section::Pkvm;
use crate::world::{PASSED, World, byte, check, facts, fill, gfn, gfns, page, pages, put, to};
use crate::{Case, Ran};

pub(super) const CASES: &[Case] = &[
    Case::new(
        Pkvm,
        "the guest alone shares its pages, and takes them back with what is in them",
        shares,
    ),
    Case::new(
        Pkvm,
        "what the VMM asks for changes nothing, and a wish is noted until the guest asks",
        wishes,
    ),
    Case::new(
        Pkvm,
        "a page is the host's until the guest first touches it, and no longer",
        donated,
    ),
    Case::new(
        Pkvm,
        "a page that somebody refers to is not donated, and the guest may try again",
        referred,
    ),
    Case::new(Pkvm, "a hypercall that the hypervisor has no memory for changes nothing", no_memory),
    Case::new(
        Pkvm,
        "what the guest relinquishes takes up no memory, and is zeros for whoever has it next",
        relinquished,
    ),
    Case::new(Pkvm, "a slot in which the guest has pages stays until it has given them back", slot),
    Case::new(Pkvm, "memory that is shared at first, or not on the machine, is refused", refused),
];

fn shares(w: &World<'_>) -> Ran {
    let bound = w.bound(w.memory(8)?)?;
    let memory = &bound.memory;
    bound.passes([fill(gfns(pages(0, 8)), 1)]);
    assert_eq!(to(memory, pages(2, 4), Visibility::Shared), Ok(2));
    assert!(crate::world::holds(memory, pages(2, 4), 1));
    put(memory, 3, 0);
    bound.passes([fill(gfns(page(3)), 5), check(gfns(page(2)), 1)]);
    assert_eq!(to(memory, pages(2, 4), Visibility::Private), Ok(2));
    assert_eq!(byte(memory, 2), None);
    bound.passes([check(gfns(page(3)), 5), check(gfns(page(2)), 1)]);
    assert_eq!(w.inside().audit(memory), Ok(()));
    PASSED
}

fn wishes(w: &World<'_>) -> Ran {
    let bound = w.bound(w.memory(8)?)?;
    let (memory, vm) = (&bound.memory, bound.vm);
    let how = (Visibility::Shared, Contents::Preserve);
    let decides = Refusal::GuestDecides { page: page(2).start(), platform: Platform::Pkvm };
    let by_vmm = memory.convert(pages(2, 4), how.0, how.1, OnBusy::Wait);
    assert_eq!(by_vmm, Err(Error::Refused(decides.clone())));
    let for_vm = memory.convert_gfns(vm, gfns(pages(2, 4)), how.0, how.1, OnBusy::Wait);
    assert_eq!(for_vm, Err(Error::Refused(decides.clone())));
    assert_eq!(memory.discard(pages(2, 4), OnBusy::Wait), Err(Error::Refused(decides.clone())));
    assert_eq!(decides.errno(), Errno::EPERM);
    memory.want(vm, gfns(pages(2, 4)), Visibility::Shared).expect("frames that are bound");
    assert_eq!(memory.unmet().len(), 1);
    assert_eq!(facts(memory, pages(0, 8)).len(), 1, "all is as it was");
    assert_eq!(byte(memory, 2), None);
    to(memory, pages(2, 4), Visibility::Shared).expect("the guest asks");
    assert_eq!(memory.unmet().len(), 0);
    assert_eq!(byte(memory, 2), Some(0));
    PASSED
}

fn donated(w: &World<'_>) -> Ran {
    let bound = w.bound(w.memory(8)?)?;
    let memory = &bound.memory;
    memory.preload(pages(0, 2), &[3; 5000]).expect("the guest has not begun");
    let inside = w.inside();
    assert_eq!(inside.is_donated(memory, page(0).start()), Some(false));
    bound.passes([fill(gfns(page(0)), 1)]);
    assert_eq!(inside.is_donated(memory, page(0).start()), Some(true));
    assert_eq!(inside.is_donated(memory, page(1).start()), Some(false));
    assert_eq!(inside.is_donated(memory, page(2).start()), None, "no memory is taken for it");
    assert_eq!(inside.audit(memory), Ok(()));
    PASSED
}

fn referred(w: &World<'_>) -> Ran {
    let bound = w.bound(w.memory(8)?)?;
    let (memory, vm) = (&bound.memory, bound.vm);
    memory.preload(page(0), &[3; 8]).expect("the guest has not begun");
    let reference = w.inside().refer_to_file(memory, page(0).start());
    let vcpu = memory.machine_vcpu(vm).expect("memory of this host");
    let gpa = gfns(page(0)).start().gpa();
    let refused = vcpu.read(gpa, Visibility::Private, &mut [0]).expect_err("it is referred to");
    assert!(
        matches!(&refused, GuestExit::Failed(Error::Refused(Refusal::Referenced { page: at, .. }))
            if *at == page(0).start()),
        "{refused}"
    );
    assert_eq!(w.inside().is_donated(memory, page(0).start()), Some(false));
    drop(reference);
    let mut seen = [0];
    vcpu.read(gpa, Visibility::Private, &mut seen).expect("nobody refers to it");
    assert_eq!(seen, [3]);
    PASSED
}

fn no_memory(w: &World<'_>) -> Ran {
    for nth in 0..3 {
        let bound = w.bound(w.memory(8)?)?;
        let memory = &bound.memory;
        w.inside().fail_hypervisor(memory, nth);
        let vcpu = memory.machine_vcpu(bound.vm).expect("memory of this host");
        let gpa = gfns(page(0)).start().gpa();
        let refused = vcpu.write(gpa, Visibility::Private, &[7; 8]).expect_err("no memory");
        assert!(matches!(&refused, GuestExit::Failed(error) if error.errno() == Errno::ENOMEM));
        assert_eq!(w.inside().is_donated(memory, page(0).start()), Some(false));
        assert_eq!(w.inside().audit(memory), Ok(()));
        vcpu.write(gpa, Visibility::Private, &[7; 8]).expect("there is memory again");
        w.inside().fail_hypervisor(memory, nth);
        let refused = to(memory, page(0), Visibility::Shared).expect_err("no memory");
        assert_eq!(refused.errno(), Errno::ENOMEM);
        assert_eq!(byte(memory, 0), None);
        assert_eq!(w.inside().audit(memory), Ok(()));
        assert_eq!(to(memory, page(0), Visibility::Shared), Ok(1));
        assert_eq!(memory.quarantined(), []);
    }
    PASSED
}

fn relinquished(w: &World<'_>) -> Ran {
    let bound = w.bound(w.memory(8)?)?;
    let memory = &bound.memory;
    bound.passes([fill(gfns(pages(0, 4)), 1)]);
    let vcpu = memory.machine_vcpu(bound.vm).expect("memory of this host");
    vcpu.relinquish(gfns(pages(1, 3))).expect("they are its own");
    assert_eq!(memory.existing(), Ok(vec![page(0), page(3)]));
    bound.passes([crate::world::zero(gfns(pages(1, 3))), check(gfns(page(0)), 1)]);
    assert_eq!(w.inside().audit(memory), Ok(()));
    PASSED
}

fn slot(w: &World<'_>) -> Ran {
    let bound = w.bound(w.memory(8)?)?;
    let memory = &bound.memory;
    bound.passes([fill(gfns(page(0)), 1)]);
    let refused = memory.unbind(bound.vm, Slot(0)).expect_err("the guest has a page there");
    assert!(refused.way_out().is_some(), "{refused}");
    bound.passes([check(gfns(page(0)), 1)]);
    let vcpu = memory.machine_vcpu(bound.vm).expect("memory of this host");
    vcpu.relinquish(gfns(pages(0, 8))).expect("they are its own, or nobody's");
    assert_eq!(memory.unbind(bound.vm, Slot(0)), Ok(()));
    assert_eq!(memory.bind(bound.vm, Slot(1), gfn(0x2000), pages(0, 8)), Ok(()));
    PASSED
}

fn refused(_: &World<'_>) -> Ran {
    let builder = || polder::Memory::builder(crate::world::count(8)).platform(Platform::Pkvm);
    let shared = builder().host(polder::HostKind::Machine).shared().build();
    assert!(matches!(shared, Err(Error::NotOffered { .. })), "{shared:?}");
    for host in [polder::HostKind::Memfd, polder::HostKind::GuestMemfd] {
        let elsewhere = builder().host(host).build();
        assert!(matches!(elsewhere, Err(Error::NotOffered { .. })), "{host}: {elsewhere:?}");
    }
    PASSED
}
