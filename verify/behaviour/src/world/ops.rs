//! What a guest does, op by op.

use polder::Visibility;
use polder::units::{GfnRange, PAGE_SIZE};
use polder_vmm::scenario::{HostAccess, Op, Outcome, Pattern};

/// The op that fills frames with a seeded pattern.
pub(crate) fn fill(gfns: GfnRange, seed: u64) -> Op {
    let (gpa, len) = (gfns.start().gpa(), gfns.count().get() * PAGE_SIZE);
    Op::Fill { gpa, len, pattern: Pattern::Seeded { seed } }
}

/// The op that checks for it.
pub(crate) fn check(gfns: GfnRange, seed: u64) -> Op {
    let (gpa, len) = (gfns.start().gpa(), gfns.count().get() * PAGE_SIZE);
    Op::Check { gpa, len, pattern: Pattern::Seeded { seed } }
}

/// The op that checks for zeros.
pub(crate) fn zero(gfns: GfnRange) -> Op {
    let (gpa, len) = (gfns.start().gpa(), gfns.count().get() * PAGE_SIZE);
    Op::Check { gpa, len, pattern: Pattern::Zero }
}

/// The op that asks for a conversion, which is done.
pub(crate) fn convert(gfns: GfnRange, to: Visibility) -> Op {
    let (gpa, pages) = (gfns.start().gpa(), gfns.count().get());
    Op::Convert { gpa, pages, to, expect: Outcome::Done }
}

/// The op that has the host try frames, by the API and by a raw touch.
pub(crate) fn probe(gfns: GfnRange, expect: HostAccess) -> Op {
    Op::Probe { gpa: gfns.start().gpa(), pages: gfns.count().get(), expect }
}
