//! What becomes of a guest that touches a page which has failed: its machine checks.

use std::sync::{Mutex, PoisonError};

use polder::units::{GfnRange, Gpa, PageIndex};
use polder::{Memory, VmId};

/// What becomes of a guest that touches a page which has failed.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Default, Debug)]
pub enum OnFailedPage {
    /// It is stopped, and the page named.
    #[default]
    Stop,
    /// It takes a machine check that names the address, and does what it will: the test's guest
    /// leaves what it was at, and goes on.
    MachineCheck,
}

/// A machine check that a guest was given.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct MachineCheck {
    /// Which vCPU.
    pub vcpu: u32,
    /// The page that has failed.
    pub page: PageIndex,
    /// Where the guest has it.
    pub gpa: Gpa,
    /// Whether the guest has said that it took it, and that the bank had this address.
    pub taken: bool,
}

/// Those of one guest, in the order in which they were given.
#[derive(Default, Debug)]
pub(crate) struct MachineChecks(Mutex<Vec<MachineCheck>>);

impl MachineChecks {
    /// Notes one that a vCPU is given.
    pub(crate) fn give(&self, vcpu: u32, page: PageIndex, gpa: Gpa) {
        let given = MachineCheck { vcpu, page, gpa, taken: false };
        self.0.lock().unwrap_or_else(PoisonError::into_inner).push(given);
    }

    /// A vCPU says that it took one. Whether it was given it, and had not said so.
    pub(crate) fn take(&self, vcpu: u32, gpa: Gpa) -> bool {
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let given = |it: &&mut MachineCheck| !it.taken && (it.vcpu, it.gpa) == (vcpu, gpa);
        let found = all.iter_mut().find(given);
        found.map(|it| it.taken = true).is_some()
    }

    pub(crate) fn all(&self) -> Vec<MachineCheck> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

/// Where a VM has a page.
pub(crate) fn gpa_of(memory: &Memory, vm: VmId, page: PageIndex) -> Option<Gpa> {
    memory.bindings().into_iter().filter(|(of, ..)| *of == vm).find_map(|(_, _, binding)| {
        let pages = binding.pages();
        let at = pages.contains(page).then(|| page.get() - pages.start().get())?;
        let gfns: GfnRange = binding.gfns();
        gfns.frames().nth(usize::try_from(at).ok()?).map(polder::units::Gfn::gpa)
    })
}

#[cfg(test)]
mod tests {
    use polder::units::PageRange;
    use polder::{HostKind, Slot};

    use super::*;

    #[test]
    fn a_guest_can_say_once_that_it_took_what_it_was_given_and_nothing_else() {
        let checks = MachineChecks::default();
        let (gpa, page) = (Gpa::new(0x5000), PageIndex::from(3));
        assert!(!checks.take(0, gpa), "it was given none");
        checks.give(0, page, gpa);
        assert!(!checks.take(1, gpa) && !checks.take(0, Gpa::new(0x6000)));
        assert!(checks.take(0, gpa) && !checks.take(0, gpa));
        assert_eq!(checks.all(), [MachineCheck { vcpu: 0, page, gpa, taken: true }]);
    }

    #[test]
    fn a_page_is_where_a_slot_of_the_vm_shows_it() {
        let all = PageRange::between(0, 8).unwrap();
        let memory = Memory::builder(all.count()).host(HostKind::Machine).build().unwrap();
        let vm = memory.attach(polder::Vm::Machine).unwrap();
        let part = PageRange::between(2, 6).unwrap();
        memory.bind(vm, Slot(0), polder::units::Gfn::from(0x100), part).unwrap();
        assert_eq!(gpa_of(&memory, vm, PageIndex::from(5)), Some(Gpa::new(0x10_3000)));
        assert_eq!(gpa_of(&memory, vm, PageIndex::from(6)), None);
    }
}
