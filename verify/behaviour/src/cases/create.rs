//! Making memory.

use polder::units::{ByteSize, PageCount, RangeError};
use polder::{Error, Memory, PageFacts, Population, Refusal, Visibility};

use crate::Section::Create;
use crate::world::{PASSED, World, all, byte, bytes, facts, page, pages, put, share_all, to};
use crate::{Case, Ran};

pub(super) const CASES: &[Case] = &[
    Case::new(Create, "a size of no page, or of a part of a page, is refused", no_size),
    Case::new(Create, "more pages than there are addresses for are refused", too_large),
    Case::new(Create, "new memory is private, whole and zero, and takes up none", new_memory),
    Case::new(Create, "several objects are independent of each other", independent),
];

fn no_size(w: &World<'_>) -> Ran {
    let empty = w.try_build(Memory::builder(PageCount::ZERO))?;
    let refused = Err(Error::Refused(Refusal::Range(RangeError::Empty)));
    assert_eq!(empty.map(|memory| memory.pages()), refused);
    // A size that is no number of pages doesn't get as far as the builder.
    assert_eq!(ByteSize::new(4097).pages(), Err(RangeError::Unaligned { value: 4097 }));
    assert!("-4096".parse::<ByteSize>().is_err());
    PASSED
}

fn too_large(w: &World<'_>) -> Ran {
    for shift in [51, 52] {
        let size = PageCount::new(1 << shift).expect("2^52 pages are a count");
        let built = w.try_build(Memory::builder(size))?;
        assert!(matches!(built, Err(Error::Host(_) | Error::Refused(_))), "{built:?}");
    }
    assert_eq!(PageCount::new((1 << 52) + 1), None);
    PASSED
}

fn new_memory(w: &World<'_>) -> Ran {
    let memory = w.memory(64)?;
    let new = PageFacts { visibility: Visibility::Private, population: Population::Whole };
    let end = memory.pages().get();
    assert_eq!(facts(&memory, all(&memory)), [(pages(0, end), new)]);
    assert_eq!(memory.existing(), Ok(vec![]));
    assert_eq!(
        memory.facts(pages(end - 4, end + 1)).map_err(|error| error.errno() as i32),
        Err(22)
    );
    share_all(&memory);
    assert_eq!(bytes(&memory, pages(0, 64)), [Some(0); 64]);
    PASSED
}

fn independent(w: &World<'_>) -> Ran {
    let (one, other) = (w.memory(8)?, w.memory(8)?);
    share_all(&one);
    (0..8).for_each(|page| put(&one, page, 1));
    assert_eq!(byte(&other, 3), None, "it is private still");
    share_all(&other);
    assert_eq!(byte(&other, 3), Some(0));
    (0..8).for_each(|page| put(&other, page, 2));

    to(&one, page(3), Visibility::Private).expect("no pins");
    one.discard(page(5), polder::OnBusy::Wait).expect("no pins");
    assert_eq!(bytes(&other, pages(0, 8)), [Some(2); 8]);
    assert_eq!([3, 4, 5].map(|page| byte(&one, page)), [None, Some(1), Some(0)]);
    drop(one);
    assert_eq!(bytes(&other, pages(0, 8)), [Some(2); 8]);
    to(&other, pages(0, 8), Visibility::Private).expect("its threads live");
    assert_eq!(byte(&other, 0), None);
    PASSED
}
