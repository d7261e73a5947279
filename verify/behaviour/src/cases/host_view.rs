//! What device models see of memory.

use std::fs::File;

use polder::units::{Gpa, PAGE_BYTES, PAGE_SIZE};
use polder::{Error, Refusal, Visibility};
use polder_vmm::scenario::{HostAccess, Visibility as Side};

use crate::Section::HostView;
use crate::world::{
    BASE, PASSED, World, all, byte, bytes, check, facts, fill, gfn, gfns, holds, page, pages,
    probe, put, seeded, share_all, to, touch,
};
use crate::{Case, Ran};

pub(crate) const CHILD: &str = "a child process has no host view";
pub(crate) const OTHER: &str = "another process's mapping of the object is cut off as well";
pub(crate) const STRAY: &str = "a stray touch of a private page ends the process by SIGBUS";

pub(super) const CASES: &[Case] = &[
    Case::new(HostView, "a page that a thread has used is denied to it once it is private", used),
    Case::new(HostView, "guest, API and raw touches see the same bytes of a page", same_bytes),
    Case::new(
        HostView,
        "past the end there is nothing, by the API or by a raw touch",
        past_the_end,
    ),
    Case::new(
        HostView,
        "a private page is denied to a raw touch, and the process lives",
        raw_touch,
    ),
    Case::new(HostView, "a private page is refused by the API, named, and nothing is copied", api),
    Case::new(
        HostView,
        "a system call on a private page fails, and the process lives",
        system_call,
    ),
    Case::new(HostView, "a touch that runs into a private page ends at its first byte", runs_into),
    Case::new(HostView, "a denial is forgotten when the page becomes shared", forgotten),
    Case::new(HostView, "touches of the same pages by many threads are all answered", many_threads),
    Case::new(HostView, "no view is inherited by a child, or dumped with a core", inherited),
    Case::new(HostView, CHILD, child),
    Case::new(HostView, OTHER, other),
    Case::new(HostView, STRAY, stray),
];

fn same_bytes(w: &World<'_>) -> Ran {
    let bound = w.bound(w.memory(8)?)?;
    let (memory, vm) = (&bound.memory, bound.vm);
    share_all(memory);
    // Guest to host.
    bound.passes([fill(gfns(pages(0, 8)), 1)]);
    assert!(holds(memory, pages(0, 8), 1));
    let mut read = vec![0; 8 * PAGE_BYTES];
    assert_eq!(memory.read(vm, gfn(BASE).gpa(), &mut read), Ok(()));
    assert!(read.chunks(PAGE_BYTES).zip(BASE..).all(|(page, at)| page == seeded(gfn(at), 1)));
    // The API to guest and raw touch, across pages.
    let start = BASE * PAGE_SIZE;
    let written: Vec<u8> = (BASE..BASE + 8).flat_map(|at| seeded(gfn(at), 2)).collect();
    let (first, rest) = written.split_at(3 * PAGE_BYTES + 72);
    assert_eq!(memory.write(vm, Gpa::new(start), first), Ok(()));
    assert_eq!(memory.write(vm, Gpa::new(start + first.len() as u64), rest), Ok(()));
    bound.passes([check(gfns(pages(0, 8)), 2)]);
    assert!(holds(memory, pages(0, 8), 2));
    // A raw touch to guest and API.
    let written: Vec<u8> = (BASE..BASE + 8).flat_map(|at| seeded(gfn(at), 3)).collect();
    assert_eq!(memory.host_view().touch_write(0, &written), Ok(()));
    bound.passes([check(gfns(pages(0, 8)), 3)]);
    assert_eq!(memory.read(vm, gfn(BASE).gpa(), &mut read), Ok(()));
    assert!(read == written, "the API reads other bytes");
    PASSED
}

fn past_the_end(w: &World<'_>) -> Ran {
    let bound = w.bound(w.memory(4)?)?;
    let memory = &bound.memory;
    let (count, end) = (memory.pages().get(), memory.pages().get() * PAGE_SIZE);
    share_all(memory);
    let mut some = [0; 16];
    for offset in [end, end - 15, u64::MAX - 3, 1 << 40] {
        let denied = memory.host_view().touch_read(offset, &mut some);
        assert!(matches!(denied, Err(Error::Copy(_))), "at {offset:#x}: {denied:?}");
        assert!(memory.host_view().touch_write(offset, &[1; 16]).is_err());
    }
    assert_eq!(memory.host_view().touch_read(end - 16, &mut some), Ok(()));
    assert_eq!(memory.host_view().length(), end);
    let past = (BASE + count) * PAGE_SIZE;
    for gpa in [past, past - 8, u64::MAX - 3, 0x10_0000_0000] {
        let refused = memory.read(bound.vm, Gpa::new(gpa), &mut some);
        assert_eq!(refused.map_err(|error| error.errno() as i32), Err(22), "at {gpa:#x}");
        assert!(memory.write(bound.vm, Gpa::new(gpa), &[1; 16]).is_err());
    }
    let ends = [0, count - 1].map(|at| byte(memory, at));
    assert_eq!(ends, [Some(0); 2], "nothing was written");
    PASSED
}

fn raw_touch(w: &World<'_>) -> Ran {
    let bound = w.bound(w.memory(4)?)?;
    let memory = &bound.memory;
    bound.passes([fill(gfns(all(memory)), 1)]);
    to(memory, page(1), Visibility::Shared).expect("no pins");
    bound.refill(page(1), 1);
    for private in [0, 2, 3] {
        assert!(matches!(touch(memory, private), Err(Error::Copy(_))), "page {private}");
        let wrote = memory.host_view().touch_write(private * PAGE_SIZE + 8, &[0xa5; 8]);
        assert!(matches!(wrote, Err(Error::Copy(_))), "page {private}");
    }
    assert!(holds(memory, page(1), 1));
    // What denies one page of a hugetlb page denies all of it.
    let told = if w.granules().is_small() { 3 } else { 1 };
    assert!(memory.statistics().denied >= told);
    bound.passes([check(gfns(all(memory)), 1)]);
    PASSED
}

fn api(w: &World<'_>) -> Ran {
    let bound = w.bound(w.memory(4)?)?;
    let (memory, vm) = (&bound.memory, bound.vm);
    bound.passes([fill(gfns(all(memory)), 1)]);
    bound.passes(bound.converted(gfns(pages(0, 2)), Side::Shared, 1));
    let start = gfn(BASE).gpa();
    let named = Error::Refused(Refusal::Private { page: 2u32.into() });
    let mut read = vec![7; 4 * PAGE_BYTES];
    assert_eq!(memory.read(vm, start, &mut read), Err(named.clone()));
    assert!(read.iter().all(|byte| *byte == 7), "it was refused before anything was read");
    assert_eq!(memory.write(vm, start, &[9; 4 * PAGE_BYTES]), Err(named));
    assert!(holds(memory, pages(0, 2), 1), "it was refused before anything was written");
    assert_eq!(memory.read(vm, start, &mut read[..2 * PAGE_BYTES]), Ok(()));
    PASSED
}

fn system_call(w: &World<'_>) -> Ran {
    let shown = w.granules();
    let memory = w.memory(shown.count(4))?;
    to(&memory, shown.page(1), Visibility::Shared).expect("no pins");
    let (first, last) = (shown.first(1), shown.first(2) - 1);
    [first, last].into_iter().for_each(|at| put(&memory, at, 5));
    let zeros = File::open("/dev/zero").expect("every Linux has it");
    let denied = memory.host_view().read_from(&zeros, 0, PAGE_BYTES);
    assert!(matches!(denied, Err(Error::Host(_))), "{denied:?}");
    let read = |at, count| memory.host_view().read_from(&zeros, at * PAGE_SIZE, count);
    assert_eq!(read(first, PAGE_BYTES), Ok(PAGE_BYTES));
    assert_eq!(read(last, 2 * PAGE_BYTES), Ok(PAGE_BYTES));
    assert_eq!([first, last].map(|at| byte(&memory, at)), [Some(0); 2]);
    PASSED
}

fn runs_into(w: &World<'_>) -> Ran {
    let shown = w.granules();
    let memory = w.memory(shown.count(4))?;
    to(&memory, shown.pages(0, 2), Visibility::Shared).expect("no pins");
    let end = shown.first(2);
    put(&memory, end - 2, 1);
    put(&memory, end - 1, 2);
    let mut read = vec![7; 3 * PAGE_BYTES];
    match memory.host_view().touch_read((end - 2) * PAGE_SIZE + 100, &mut read) {
        Err(Error::Copy(touched)) => assert_eq!(touched.offset, end * PAGE_SIZE),
        other => panic!("{other:?}"),
    }
    let [first, second, last] = [0, PAGE_BYTES, 2 * PAGE_BYTES - 100].map(|at| read[at]);
    assert_eq!((first, second, last), (1, 2, 7), "what came before was read, nothing after");
    PASSED
}

fn forgotten(w: &World<'_>) -> Ran {
    let bound = w.bound(w.memory(4)?)?;
    let memory = &bound.memory;
    bound.passes([fill(gfns(all(memory)), 1)]);
    for _ in 0..2 {
        assert_eq!(bytes(memory, pages(0, 4)), [None; 4]);
        bound.passes(bound.converted(gfns(pages(1, 3)), Side::Shared, 1));
        bound.passes([
            probe(gfns(pages(1, 3)), HostAccess::Readable),
            probe(gfns(page(0)), HostAccess::Denied),
            probe(gfns(page(3)), HostAccess::Denied),
        ]);
        assert!(holds(memory, pages(1, 3), 1));
        bound.passes(bound.converted(gfns(pages(1, 3)), Side::Private, 1));
    }
    PASSED
}

fn many_threads(w: &World<'_>) -> Ran {
    let memory = w.memory(64)?;
    to(&memory, pages(0, 48), Visibility::Shared).expect("no pins");
    let before = facts(&memory, all(&memory));
    let expected: Vec<_> = (0..64).map(|page| (page < 48).then_some(0)).collect();
    for _ in 0..4 {
        std::thread::scope(|scope| {
            let threads = [(); 6].map(|()| scope.spawn(|| bytes(&memory, pages(0, 64))));
            for thread in threads {
                assert_eq!(thread.join().expect("it only touches"), expected);
            }
        });
        // So that all of it is to be answered again.
        memory.discard(pages(0, 64), polder::OnBusy::Wait).expect("no pins");
    }
    assert_eq!(facts(&memory, all(&memory)), before);
    PASSED
}

fn inherited(w: &World<'_>) -> Ran {
    let memory = w.memory(4)?;
    share_all(&memory);
    assert_eq!(w.inherited(&memory), [""; 0]);
    PASSED
}

fn child(w: &World<'_>) -> Ran {
    let memory = w.memory(4)?;
    share_all(&memory);
    put(&memory, 1, 5);
    assert_eq!(w.inside().touch_in_child(&memory, 1u32.into()), None);
    assert_eq!(byte(&memory, 1), Some(5));
    PASSED
}

fn other(w: &World<'_>) -> Ran {
    let memory = w.memory(4)?;
    share_all(&memory);
    put(&memory, 1, 5);
    assert_eq!(w.inside().touch_in_other(&memory, 1u32.into()), Some(5));
    to(&memory, page(1), Visibility::Private).expect("no pins");
    assert_eq!(w.inside().touch_in_other(&memory, 1u32.into()), None);
    PASSED
}

fn stray(w: &World<'_>) -> Ran {
    let memory = w.memory(4)?;
    to(&memory, page(1), Visibility::Shared).expect("no pins");
    assert!(w.inside().stray_touch_ends(&memory, 0u32.into()));
    assert!(!w.inside().stray_touch_ends(&memory, 1u32.into()));
    PASSED
}

fn used(w: &World<'_>) -> Ran {
    let memory = w.memory(4)?;
    share_all(&memory);
    put(&memory, 1, 5);
    assert_eq!(byte(&memory, 1), Some(5));
    to(&memory, page(1), Visibility::Private).expect("no pins");
    assert_eq!(byte(&memory, 1), None);
    let offset = page(1).start().offset();
    assert!(memory.host_view().touch_write(offset, &[6]).is_err());
    to(&memory, page(1), Visibility::Shared).expect("no pins");
    let left = if crate::world::keeps(&memory) { 5 } else { 0 };
    assert_eq!(byte(&memory, 1), Some(left), "nothing was written");
    PASSED
}
