//! Host guest_memfd on a KVM without private memory, whose guest_memfds can be shared as a whole.

use std::sync::Arc;

use polder::units::{Gfn, Gpa, PageCount, PageRange};
use polder::{Contents, Error, HostKind, Memory, OnBusy, Slot, Visibility};
use polder_linux::PrivateMemory;
use polder_require::{Facility, require};

fn pages(start: u64, end: u64) -> PageRange {
    PageRange::between(start, end).expect("a range in the test")
}

fn vm() -> Option<Arc<kvm_ioctls::VmFd>> {
    let kvm = require(Facility::Kvm, kvm_ioctls::Kvm::new())?;
    let vm = kvm.create_vm().expect("a VM of the default type");
    let offered = PrivateMemory::of(&vm);
    let shared = offered.can_be_shared().then_some(vm);
    require(Facility::SharedGuestMemfd, shared.ok_or("no guest_memfd that the host can map"))
        .map(Arc::new)
}

fn memory(count: u32) -> Memory {
    let memory = Memory::builder(PageCount::from(count)).host(HostKind::GuestMemfd);
    memory.shared().build().expect("userfaultfd can be used, too")
}

#[test]
fn what_is_written_by_one_way_is_read_by_the_others() {
    let Some(vm) = vm() else { return };
    let memory = memory(16);
    let view = memory.host_view().as_ptr();
    let id = memory.attach(vm).unwrap();
    assert_eq!(memory.host_view().as_ptr(), view, "pointers stay good");
    memory.bind(id, Slot(0), Gfn::from(0x100), pages(0, 16)).unwrap();
    memory.write(id, Gpa::new(0x103_ff8), &[7; 16]).unwrap();
    let mut bytes = [0; 16];
    memory.host_view().touch_read(0x3ff8, &mut bytes).unwrap();
    assert_eq!(bytes, [7; 16]);
    memory.host_view().touch_write(0x5000, &[9]).unwrap();
    memory.read(id, Gpa::new(0x105_000), &mut bytes[..1]).unwrap();
    assert_eq!(bytes[0], 9);
    assert_eq!(memory.existing(), Ok(vec![pages(3, 6)]));

    memory.discard(pages(4, 6), OnBusy::Wait).unwrap();
    memory.host_view().touch_read(0x5000, &mut bytes[..1]).unwrap();
    assert_eq!((bytes[0], memory.existing()), (0, Ok(vec![pages(3, 4), pages(5, 6)])));
}

#[test]
fn no_page_can_become_private_and_a_refusal_changes_nothing() {
    let Some(vm) = vm() else { return };
    let memory = memory(8);
    let id = memory.attach(vm).unwrap();
    memory.bind(id, Slot(0), Gfn::from(0), pages(0, 8)).unwrap();
    memory.host_view().touch_write(0x2000, &[5]).unwrap();
    let refused = memory.convert(pages(2, 4), Visibility::Private, Contents::Zero, OnBusy::Wait);
    let error = refused.unwrap_err();
    assert!(matches!(error, Error::NotOffered { .. }), "{error}");
    assert_eq!(error.errno() as i32, 95, "EOPNOTSUPP");
    let facts = memory.facts(pages(0, 8)).unwrap();
    assert!(facts.len() == 1 && facts[0].1.visibility == Visibility::Shared);
    let mut byte = [0];
    memory.host_view().touch_read(0x2000, &mut byte).unwrap();
    assert_eq!((byte, memory.quarantined()), ([5], vec![]));
}

#[test]
fn it_belongs_to_the_first_vm() {
    let (Some(first), Some(second)) = (vm(), vm()) else { return };
    let memory = memory(8);
    let [first, second] = [first, second].map(|vm| memory.attach(vm).unwrap());
    memory.bind(first, Slot(0), Gfn::from(0), pages(0, 4)).unwrap();
    let refused = memory.bind(second, Slot(0), Gfn::from(0), pages(4, 8));
    assert_eq!(refused, Err(Error::OneVm { owner: first, vm: second }));
    assert_eq!(memory.bindings().len(), 1);
}

#[test]
fn memory_that_is_private_or_written_already_is_refused_to_such_a_vm() {
    let Some(vm) = vm() else { return };
    let private = Memory::builder(PageCount::ONE).host(HostKind::GuestMemfd).build().unwrap();
    let refused = private.attach(Arc::clone(&vm)).unwrap_err();
    assert!(refused.to_string().contains("no private memory"), "{refused}");

    let written = memory(2);
    written.host_view().touch_write(0, &[3]).unwrap();
    let refused = written.attach(vm).unwrap_err();
    assert!(refused.way_out().is_some_and(|way| way.contains("attach the VM first")), "{refused}");
    let mut byte = [0];
    written.host_view().touch_read(0, &mut byte).unwrap();
    assert_eq!(byte, [3], "nothing is lost");
}
