//! What a conversion does to contents, by platform.

use polder::{Contents, Error, OnBusy, Platform, Refusal, Visibility};

use crate::Section::Conversion;
use crate::world::{
    PASSED, World, all, byte, bytes, check, facts, fill, gfns, page, pages, put, share_all, to,
    zero,
};
use crate::{Case, Ran};

pub(crate) const PRESERVED: &str = "contents preserved, of a plain VM";
pub(crate) const PRESERVED_PROTECTED: &str = "contents preserved, of a software-protected VM";
pub(crate) const ZEROED: &str = "contents zeroed, of a plain VM";
pub(crate) const ZEROED_PROTECTED: &str = "contents zeroed, of a software-protected VM";
pub(crate) const UNSPECIFIED: &str = "contents unspecified, of a plain VM";
pub(crate) const UNSPECIFIED_PROTECTED: &str = "contents unspecified, of a software-protected VM";
pub(crate) const LOST: &str = "contents that can't be kept: refused, and nothing has changed";

const PLAIN: Platform = Platform::Plain;
const PROTECTED: Platform = Platform::SwProtected;

pub(super) const CASES: &[Case] = &[
    Case::new(Conversion, PRESERVED, |w| contents(w, PLAIN, Contents::Preserve)),
    Case::new(Conversion, PRESERVED_PROTECTED, |w| contents(w, PROTECTED, Contents::Preserve)),
    Case::new(Conversion, ZEROED, |w| contents(w, PLAIN, Contents::Zero)),
    Case::new(Conversion, ZEROED_PROTECTED, |w| contents(w, PROTECTED, Contents::Zero)),
    Case::new(Conversion, UNSPECIFIED, |w| contents(w, PLAIN, Contents::Unspecified)),
    Case::new(Conversion, UNSPECIFIED_PROTECTED, |w| contents(w, PROTECTED, Contents::Unspecified)),
    Case::new(Conversion, "contents zeroed are zeros for the guest, too", zeros_for_the_guest),
    Case::new(Conversion, "contents of pages that are so already are not zeroed", already_so),
    Case::new(Conversion, LOST, lost),
];

fn contents(w: &World<'_>, platform: Platform, contents: Contents) -> Ran {
    let memory = w.memory_for(platform, 8)?;
    let convert = |range, visibility, contents| {
        memory.convert(range, visibility, contents, OnBusy::Wait).expect("nothing is in the way")
    };
    share_all(&memory);
    // The treatment is asked for on the way there, and on the way back.
    let [to_private, to_shared] =
        [Visibility::Private, Visibility::Shared].map(|to| memory.keeps_most(to));
    for (there, back) in [(contents, to_shared), (to_private, contents)] {
        (0..8).for_each(|page| put(&memory, page, 5));
        convert(pages(2, 6), Visibility::Private, there);
        assert_eq!(bytes(&memory, pages(2, 6)), [None; 4]);
        convert(pages(2, 6), Visibility::Shared, back);
        for at in 2..6 {
            match contents {
                Contents::Preserve => assert_eq!(byte(&memory, at), Some(5)),
                Contents::Zero => assert_eq!(byte(&memory, at), Some(0)),
                Contents::Unspecified => assert!(matches!(byte(&memory, at), Some(0 | 5))),
            }
        }
        assert_eq!([0, 1, 6, 7].map(|page| byte(&memory, page)), [Some(5); 4], "neighbours");
    }
    PASSED
}

fn zeros_for_the_guest(w: &World<'_>) -> Ran {
    let bound = w.bound(w.memory(8)?)?;
    let memory = &bound.memory;
    w.existing_is_told(memory)?;
    for visibility in [Visibility::Shared, Visibility::Private] {
        bound.passes([fill(gfns(pages(0, 8)), 1)]);
        let convert = |range| memory.convert(range, visibility, Contents::Zero, OnBusy::Wait);
        assert!(convert(pages(2, 6)).is_ok());
        // Of a huge page zeros are written.
        if w.folios().is_small() {
            let existing = memory.existing().expect("it can be asked");
            assert_eq!(existing, [pages(0, 2), pages(6, 8)], "what is zero takes up no memory");
        }
        bound.passes([
            check(gfns(pages(0, 2)), 1),
            zero(gfns(pages(2, 6))),
            check(gfns(pages(6, 8)), 1),
        ]);
    }
    PASSED
}

fn already_so(w: &World<'_>) -> Ran {
    let memory = w.memory(8)?;
    to(&memory, pages(0, 4), Visibility::Shared).expect("no pins");
    (0..4).for_each(|page| put(&memory, page, 5));
    let zeroed = memory.convert(pages(0, 8), Visibility::Shared, Contents::Zero, OnBusy::Wait);
    assert_eq!(zeroed.map(polder::units::PageCount::get), Ok(4));
    let expected = [5, 5, 5, 5, 0, 0, 0, 0].map(Some);
    assert_eq!(bytes(&memory, pages(0, 8)), expected);
    PASSED
}

fn lost(w: &World<'_>) -> Ran {
    let memory = w.memory(4)?;
    let before = facts(&memory, all(&memory));
    let kept = Contents::Preserve;
    let refused = memory.convert(page(1), Visibility::Shared, kept, OnBusy::Wait);
    assert!(matches!(refused, Err(Error::Refused(Refusal::Contents { .. }))), "{refused:?}");
    assert_eq!(facts(&memory, all(&memory)), before);
    PASSED
}
