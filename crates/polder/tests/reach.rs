//! Who reaches a private page, and who does not: what `docs/security.md` names and the behaviour
//! table does not have.

use polder::machine::{Hva, Thread, View, VpnRange};
use polder::units::{PageCount, PageIndex, PageRange};
use polder::{Contents, HostKind, Memory, OnBusy, Visibility};
use polder_require::{Facility, require};

/// Another process's mapping of the object is the kernel's to fill, and a plain VM's memory is
/// guarded by no hardware: so `docs/security.md` says that it can.
#[test]
fn another_process_of_the_machine_maps_a_private_page_of_a_plain_vm() {
    let memory = Memory::builder(PageCount::from(2u32)).host(HostKind::Machine).build().unwrap();
    let first = PageRange::between(0, 1).unwrap();
    let to = |to| memory.convert(first, to, Contents::Preserve, OnBusy::Wait).unwrap();
    to(Visibility::Shared);
    memory.host_view().touch_write(0, &[0x5a]).unwrap();
    to(Visibility::Private);
    assert!(memory.host_view().touch_read(0, &mut [0]).is_err(), "private");
    let mut byte = [0];
    memory
        .simulated(|machine, object, _| {
            let process = machine.create_process().unwrap();
            let at = VpnRange::between(16, 17).unwrap();
            machine.mmap(process, at, object, PageIndex::from(0u32), View::PLAIN).unwrap();
            let thread = Thread { process, index: 0 };
            machine.host_read(thread, Hva::new(16 * 4096), &mut byte).unwrap();
            machine.host_write(thread, Hva::new(16 * 4096), &[1]).unwrap();
        })
        .unwrap();
    assert_eq!(byte, [0x5a]);
}

#[test]
fn no_descriptor_of_the_memory_is_inherited_by_a_program() {
    let memory = Memory::builder(PageCount::from(2)).build();
    let Some(_memory) = require(Facility::Userfault, memory) else { return };
    let links = |folder: &str| {
        let listed = std::process::Command::new("ls").args(["-l", folder]).output();
        String::from_utf8(listed.expect("ls starts").stdout).unwrap()
    };
    let own = links(&format!("/proc/{}/fd", std::process::id()));
    let inherited = links("/proc/self/fd");
    for name in ["memfd:polder", "userfaultfd"] {
        assert!(own.contains(name) && !inherited.contains(name), "{name}:\n{own}\n{inherited}");
    }
}
