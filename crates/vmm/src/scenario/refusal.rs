//! Requests that must be refused, and change nothing.

use polder_units::{GfnRange, Gpa, PAGE_SIZE};

use super::layout::{Layout, MMIO_END, MMIO_START};
use super::op::{Op, Outcome, Visibility};

/// Requests to convert what is no range of memory: all are [`Outcome::Invalid`]. Where a request
/// names memory at all, it is a part of `area`, of the boot structures or of memory's last page.
pub(super) fn refused(ops: &mut Vec<Op>, layout: &Layout, area: GfnRange) {
    let start = area.start().gpa().get();
    let end = layout.end().get();
    let last_page = 0u64.wrapping_sub(PAGE_SIZE);
    let mut requests = vec![
        // Unaligned.
        (start + 8, 1),
        (start + PAGE_SIZE - 1, 1),
        // Empty.
        (start, 0),
        // Beyond memory, and across its end.
        (end, 1),
        (end - PAGE_SIZE, 2),
        (1 << 50, 1),
        // In the hole, and across its end.
        (MMIO_START + (1 << 28), 1),
        (MMIO_END - PAGE_SIZE, 2),
        // From memory across everything.
        (start, 1 << 40),
        (start, 1 << 52),
        (start, u64::MAX),
        (0, u64::MAX),
        // Past the end of the address space.
        (last_page, 1),
        (last_page, 2),
        (last_page, u64::MAX),
    ];
    if layout.high_area.is_some() {
        // Both ends are memory, what lies between is not.
        requests.push((MMIO_START - PAGE_SIZE, (MMIO_END - MMIO_START) / PAGE_SIZE + 2));
    }
    for (gpa, pages) in requests {
        for to in [Visibility::Shared, Visibility::Private] {
            ops.push(Op::Convert { gpa: Gpa::new(gpa), pages, to, expect: Outcome::Invalid });
        }
    }
}

/// Loads and stores beyond memory, and in the hole.
pub(super) fn beyond_memory(ops: &mut Vec<Op>, layout: &Layout) {
    let hole = Gpa::new(MMIO_START + (1 << 28));
    let last_of_hole = Gpa::new(MMIO_START + (1 << 28) + PAGE_SIZE - 8);
    for gpa in [hole, last_of_hole, layout.end()] {
        ops.push(Op::Load { gpa, expect: u64::MAX });
        ops.push(Op::Store { gpa, value: 0x5a5a });
        ops.push(Op::Load { gpa, expect: u64::MAX });
    }
}
