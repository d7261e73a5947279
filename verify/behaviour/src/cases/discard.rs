//! Dropping contents.

use polder::units::{PAGE_SIZE, PageRange};
use polder::{Error, Holder, OnBusy, PinKind, Refusal, Visibility};
use polder_vmm::scenario::{HostAccess, Visibility as Side};

use crate::Section::Discard;
use crate::world::{
    PASSED, World, all, byte, bytes, check, convert, facts, fill, gfns, meanwhile, pages, probe,
    put, share_all, to, zero,
};
use crate::{Case, Ran};

pub(super) const CASES: &[Case] = &[
    Case::new(Discard, "a range that is unaligned, empty or past the end is refused", no_range),
    Case::new(Discard, "contents become zeros in every view, and memory is freed", zeros),
    Case::new(Discard, "visibility stays as it was", visibility_kept),
    Case::new(
        Discard,
        "pages that nobody touched can be discarded, as often as one likes",
        nothing,
    ),
    Case::new(Discard, "a pinned page refuses the whole range, named, and nothing is lost", pinned),
    Case::new(Discard, "a denial before it does not deny the page once it is shared", denial),
    Case::new(Discard, "a reader meanwhile sees each word as it was, or zero", readers),
];

fn no_range(w: &World<'_>) -> Ran {
    let memory = w.memory(8)?;
    share_all(&memory);
    let end = memory.pages().get();
    put(&memory, end - 1, 1);
    // What is unaligned or empty is no range of pages.
    assert!(PageRange::from_bytes(PAGE_SIZE / 2, PAGE_SIZE).is_err());
    assert!(PageRange::from_bytes(PAGE_SIZE, PAGE_SIZE + 1).is_err());
    assert_eq!(PageRange::between(3, 3), None);
    for range in [pages(end - 1, end + 1), pages(end, end + 1), pages(0, 1 << 52)] {
        let beyond = Refusal::Beyond { range, pages: memory.pages() };
        assert_eq!(memory.discard(range, OnBusy::Wait), Err(beyond.into()));
    }
    assert_eq!(byte(&memory, end - 1), Some(1));
    PASSED
}

fn zeros(w: &World<'_>) -> Ran {
    let bound = w.bound(w.memory(16)?)?;
    let memory = &bound.memory;
    w.existing_is_told(memory)?;
    // Half of it private, half shared, all of it mapped by whoever may.
    bound.passes([fill(gfns(all(memory)), 1)]);
    bound.passes(bound.converted(gfns(pages(8, 16)), Side::Shared, 1));
    bytes_are_there(memory, pages(8, 16));
    assert_eq!(memory.existing(), Ok(vec![pages(0, 16)]));
    assert_eq!(memory.discard(pages(4, 12), OnBusy::Wait), Ok(()));
    assert_eq!(memory.existing(), Ok(vec![pages(0, 4), pages(12, 16)]));
    bound.passes([
        zero(gfns(pages(4, 12))),
        check(gfns(pages(0, 4)), 1),
        check(gfns(pages(12, 16)), 1),
    ]);
    assert_eq!(bytes(memory, pages(8, 12)), [Some(0); 4]);
    // The other way: the host first, the guest after.
    memory.discard(pages(12, 16), OnBusy::Wait).expect("no pins");
    assert_eq!(bytes(memory, pages(12, 16)), [Some(0); 4]);
    bound.passes([zero(gfns(pages(12, 16))), fill(gfns(pages(4, 16)), 2)]);
    bound.passes([check(gfns(pages(4, 16)), 2)]);
    PASSED
}

fn bytes_are_there(memory: &polder::Memory, range: PageRange) {
    for page in range.frames() {
        assert!(crate::world::touch(memory, page.get()).is_ok());
    }
}

fn visibility_kept(w: &World<'_>) -> Ran {
    let bound = w.bound(w.memory(8)?)?;
    let memory = &bound.memory;
    bound.passes([fill(gfns(all(memory)), 1), convert(gfns(pages(2, 6)), Side::Shared)]);
    let before = facts(memory, all(memory));
    memory.discard(all(memory), OnBusy::Wait).expect("no pins");
    assert_eq!(facts(memory, all(memory)), before);
    bound.passes([
        probe(gfns(pages(0, 2)), HostAccess::Denied),
        probe(gfns(pages(2, 6)), HostAccess::Readable),
        probe(gfns(pages(6, 8)), HostAccess::Denied),
        zero(gfns(all(memory))),
    ]);
    PASSED
}

fn nothing(w: &World<'_>) -> Ran {
    let bound = w.bound(w.memory(8)?)?;
    let memory = &bound.memory;
    for _ in 0..3 {
        assert_eq!(memory.discard(all(memory), OnBusy::Wait), Ok(()));
        assert_eq!(memory.existing(), Ok(vec![]));
    }
    bound.passes([zero(gfns(all(memory)))]);
    PASSED
}

fn pinned(w: &World<'_>) -> Ran {
    let memory = w.memory(8)?;
    share_all(&memory);
    (0..8).for_each(|page| put(&memory, page, 3));
    let holder = Holder::new("vhost-net");
    let pin = memory.pin(pages(5, 7), PinKind::LongTerm, holder.clone()).expect("shared pages");
    let kind = PinKind::LongTerm;
    let named = Error::Refused(Refusal::Pinned { page: 5u32.into(), kind, holder });
    assert_eq!(memory.discard(pages(0, 8), OnBusy::Wait), Err(named));
    assert_eq!(bytes(&memory, pages(0, 8)), [Some(3); 8]);
    assert_eq!(memory.discard(pages(0, 5), OnBusy::Wait), Ok(()));
    drop(pin);
    assert_eq!(memory.discard(pages(0, 7), OnBusy::Wait), Ok(()));
    assert_eq!([0, 6, 7].map(|page| byte(&memory, page)), [Some(0), Some(0), Some(3)]);
    PASSED
}

fn denial(w: &World<'_>) -> Ran {
    let memory = w.memory(4)?;
    assert_eq!(bytes(&memory, pages(0, 4)), [None; 4]);
    memory.discard(pages(1, 3), OnBusy::Wait).expect("no pins");
    assert_eq!(byte(&memory, 1), None, "it is private as before");
    memory.discard(pages(1, 2), OnBusy::Wait).expect("no pins");
    // One by one: a conversion of more lifts what it knows of any of them from all.
    for at in 0..4 {
        to(&memory, pages(at, at + 1), Visibility::Shared).expect("no pins");
    }
    assert_eq!(bytes(&memory, pages(0, 4)), [Some(0); 4]);
    PASSED
}

fn readers(w: &World<'_>) -> Ran {
    let memory = w.memory(64)?;
    share_all(&memory);
    for _ in 0..20 {
        (0..64).for_each(|page| put(&memory, page, 0xee));
        let read = || {
            let mut words = Vec::new();
            for page in (0..64).rev() {
                let mut word = [0; 8];
                let touched = memory.host_view().touch_read(page * PAGE_SIZE + 8, &mut word);
                assert_eq!(touched, Ok(()), "page {page} is shared all the while");
                words.push(word);
            }
            words
        };
        let (words, ()) = meanwhile(read, || {
            memory.discard(pages(0, 64), OnBusy::Wait).expect("no pins");
        });
        assert!(words.iter().all(|word| *word == [0xee; 8] || *word == [0; 8]), "{words:x?}");
        assert_eq!(bytes(&memory, pages(0, 64)), [Some(0); 64]);
    }
    PASSED
}
