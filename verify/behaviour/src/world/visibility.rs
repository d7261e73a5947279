//! What pages are, and conversions: by the VMM, or by the guest where it alone decides.

use polder::units::{GfnRange, PageCount, PageRange};
use polder::{
    Contents, Error, GuestExit, Memory, OnBusy, PageFacts, Population, Refusal, Slot, Visibility,
};

use super::{BASE, all, gfn};

/// What `range` is now.
pub(crate) fn facts(memory: &Memory, range: PageRange) -> Vec<(PageRange, PageFacts)> {
    memory.facts(range).expect("pages of the object")
}

/// Converts, contents kept where the host can; waits for others.
pub(crate) fn to(memory: &Memory, range: PageRange, to: Visibility) -> Result<u64, Error> {
    let owed = |run: &(PageRange, PageFacts)| run.1.population == Population::Owed;
    let contents = match memory.keeps_most(to) {
        // Zeros would be contents: nothing would be owed any more.
        Contents::Zero if memory.facts(range).is_ok_and(|runs| runs.iter().any(owed)) => {
            Contents::Unspecified
        }
        contents => contents,
    };
    if memory.platform().guest_decides() {
        return by_guest(memory, range, to);
    }
    memory.convert(range, to, contents, OnBusy::Wait).map(PageCount::get)
}

/// Has the guest convert pages by hypercalls of its own; what nobody sees yet is bound for that.
fn by_guest(memory: &Memory, range: PageRange, to: Visibility) -> Result<u64, Error> {
    if memory.bindings().is_empty() {
        let vm = memory.attach(polder::Vm::Machine)?;
        memory.bind(vm, Slot(0), gfn(BASE), all(memory))?;
    }
    let mut bindings = memory.bindings().into_iter();
    let found = bindings.find_map(|(vm, _, binding)| {
        let into = range.start().get().checked_sub(binding.pages().start().get())?;
        let first = binding.gfns().start().get() + into;
        let gfns = GfnRange::between(first, first + range.count().get())?;
        binding.pages().contains_range(range).then_some((vm, gfns))
    });
    // Pages past the end nobody sees.
    let beyond = || Error::Refused(Refusal::Beyond { range, pages: memory.pages() });
    let (vm, gfns) = found.ok_or_else(beyond)?;
    match memory.machine_vcpu(vm)?.convert(gfns, to) {
        Ok(pages) => Ok(pages.get()),
        Err(GuestExit::Failed(error)) => Err(error),
        Err(other) => panic!("the guest's own request: {other}"),
    }
}

/// Whether conversions can keep what is in the pages, both ways.
pub(crate) fn keeps(memory: &Memory) -> bool {
    let kept = |to| memory.keeps_most(to) == Contents::Preserve;
    kept(Visibility::Private) && kept(Visibility::Shared)
}

/// Makes all of an object shared.
pub(crate) fn share_all(memory: &Memory) {
    to(memory, all(memory), Visibility::Shared).expect("nothing stands in the way");
}
