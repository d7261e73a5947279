//! `polder bench faults`: what it costs a guest to touch a page that Polder maps, next to a bare
//! loop that does so by the same system calls.
//!
//! A guest of KVM reads the first word of page after page, in ring 3, and notes by its TSC how long
//! each read took. The pages exist, are not mapped in the guest view, and that view is watched:
//! each read is a fault of KVM's, a userfault, an answer, and the way back. VM, guest and log are
//! the same for both; what differs is who answers. The system calls are `poll`, `read` and
//! `UFFDIO_CONTINUE` on either side; Polder asks its engine in between, and gives the answer back.
//! A turn's figure is the median of its touches: what a busy machine's scheduler takes is in the
//! note's quantiles.

use polder::units::{Gpa, PAGE_SIZE, PageCount, PageRange};
use polder::{Memory, OnBusy};

use crate::bare::Bare;
use crate::guest::{BARE, Guest, POLDER};
use crate::turns::{alternate, median_of, quantiles};
use crate::{Bench, BenchError, Measured, Progress, Row};

pub(crate) const BENCH: Bench = Bench {
    name: "faults",
    about: "a guest's touches of pages that Polder maps, next to a bare userfaultfd loop",
    run: |progress| run(1024, progress),
};

const BARE_LOOP: &str = "bare loop";
const CASES: [(&str, u32); 2] = [("guest fault 1 vcpu", 1), ("guest fault 2 vcpus", 2)];

/// With `pages` pages that the guest touches in each turn.
fn run(pages: u32, progress: &mut dyn FnMut(Progress)) -> Measured {
    let touched = PageRange::between(0, pages.into()).expect("some pages");
    let guest = Guest::new()?;
    // One page more, whose contents stay owed, so that the guest view stays watched.
    let memory = Memory::builder(PageCount::from(pages + 1)).shared().owed().build()?;
    let id = guest.bind(&memory)?;
    memory.populate(touched, &[])?;
    let bare = Bare::new(pages, true)?;
    let _slot = guest.bind_bare(&bare, touched)?;

    let mut rows = Vec::new();
    for (done, (case, vcpus)) in CASES.into_iter().enumerate() {
        progress(Progress { done, of: CASES.len(), doing: case.to_owned() });
        let (mut of_bare, mut of_polder) = (Vec::new(), Vec::new());
        let costs = alternate(
            || {
                bare.free(touched)?;
                bare.populate(touched)?;
                let times = guest.time(BARE, pages, vcpus)?;
                of_bare.extend_from_slice(&times);
                Ok::<f64, BenchError>(median_of(&times))
            },
            || {
                memory.discard(touched, OnBusy::Wait)?;
                for page in 0..u64::from(pages) {
                    memory.write(id, Gpa::new(POLDER.get() + page * PAGE_SIZE), &[0])?;
                }
                let times = guest.time(POLDER, pages, vcpus)?;
                of_polder.extend_from_slice(&times);
                Ok(median_of(&times))
            },
        )?;
        let mut row = Row::of_costs(case.to_owned(), BARE_LOOP, "us", costs);
        row.note = format!("{}; its {}", quantiles(of_polder), quantiles(of_bare));
        rows.push(row);
    }
    Ok(rows)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tests::{Facility, found};

    #[test]
    fn a_guest_s_faults_are_timed_on_either_side() {
        let Some(rows) = found(Facility::Kvm, run(64, &mut |_| ())) else { return };
        assert_eq!(rows.len(), CASES.len());
        for row in rows {
            // Less than this is no fault.
            assert!(row.polder_value > 1.0 && row.baseline_value > 1.0, "{row:?}");
            assert!(row.note.contains("p99"), "{row:?}");
        }
    }
}
