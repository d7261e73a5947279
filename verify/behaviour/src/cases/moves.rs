//! Bytes that are there before the guest, and pages that move.

use polder::{Errno, Error, Holder, OnBusy, PinKind, Refusal, Visibility};
use polder_vmm::scenario::Visibility as Side;

use crate::Section::Move;
use crate::world::{PASSED, World, all, byte, check, fill, gfns, meanwhile, page, pages, put, to};
use crate::{Case, Ran};

pub(crate) const PRELOADED: &str = "a guest begins with the bytes that were put onto its pages";
pub(crate) const LAUNCHED: &str =
    "once the guest has begun, bytes for its private pages are refused, and none is changed";
pub(crate) const NOT_PRELOADED: &str =
    "a preload of shared pages, of too many bytes or past the end is refused";
pub(crate) const NO_PRELOAD: &str =
    "where private pages can't be written by the host, a preload says what to do instead";
pub(crate) const MOVES: &str = "pages that move keep their bytes, for guest and host";
pub(crate) const MOVES_PINNED: &str = "a pinned page is not moved, and its holder is named";
pub(crate) const MOVES_UNTOLD: &str =
    "a reference that Polder was not told of keeps a page from moving, and is named";
pub(crate) const MOVES_BUSY: &str = "a guest at work on pages that move loses none of its words";
pub(crate) const NO_MOVE: &str = "where the kernel alone moves pages, a move says so";
pub(crate) const UNMOVABLE: &str =
    "an SNP guest's private pages are not moved, and the first named";

pub(super) const CASES: &[Case] = &[
    Case::new(Move, PRELOADED, preloaded),
    Case::new(Move, LAUNCHED, launched),
    Case::new(Move, NOT_PRELOADED, no_preload),
    Case::new(Move, NO_PRELOAD, preload_not_offered),
    Case::new(Move, MOVES, moves),
    Case::new(Move, MOVES_PINNED, pinned),
    Case::new(Move, MOVES_UNTOLD, untold),
    Case::new(Move, MOVES_BUSY, at_work),
    Case::new(Move, NO_MOVE, move_not_offered),
    Case::new(Move, UNMOVABLE, unmovable),
];

fn preloaded(w: &World<'_>) -> Ran {
    let bound = w.bound(w.memory(8)?)?;
    let (memory, vm) = (&bound.memory, bound.vm);
    let word = 0x0706_0504_0302_0100_u64;
    let bytes = word.to_le_bytes().repeat(2 * 512);
    assert_eq!(memory.preload(pages(2, 4), &bytes), Ok(()));
    // They are the guest's alone: what is refused is refused with them there, too.
    let private = Refusal::Private { page: page(2).start() };
    let gpa = gfns(page(2)).start().gpa();
    assert_eq!(memory.read(vm, gpa, &mut [0]), Err(private.into()));
    memory.launch();
    for at in [2, 3] {
        let gpa = gfns(page(at)).start().gpa();
        let seen = bound.guest.access((memory, vm), gpa, Visibility::Private, None);
        assert_eq!(seen, Ok(word), "page {at}");
    }
    PASSED
}

fn launched(w: &World<'_>) -> Ran {
    let bound = w.bound(w.memory(8)?)?;
    let (memory, vm) = (&bound.memory, bound.vm);
    assert_eq!(memory.preload(page(2), &[1; 8]), Ok(()));
    memory.launch();
    let launched = Refusal::Launched { page: page(2).start() };
    assert_eq!(memory.preload(page(2), &[2; 8]), Err(Error::Refused(launched.clone())));
    assert_eq!(launched.errno(), Errno::EPERM);
    let gpa = gfns(page(2)).start().gpa();
    let seen = bound.guest.access((memory, vm), gpa, Visibility::Private, None);
    assert_eq!(seen, Ok(u64::from_le_bytes([1; 8])));
    PASSED
}

fn no_preload(w: &World<'_>) -> Ran {
    let bound = w.bound(w.memory(8)?)?;
    let memory = &bound.memory;
    let many = memory.preload(page(0), &vec![1; 4097]);
    assert!(matches!(many, Err(Error::TooManyBytes { bytes: 4097, .. })), "{many:?}");
    let end = memory.pages().get();
    let beyond = pages(end - 1, end + 1);
    let refused = Refusal::Beyond { range: beyond, pages: memory.pages() };
    assert_eq!(memory.preload(beyond, b"x"), Err(refused.into()));
    to(memory, page(3), Visibility::Shared).expect("nothing is in the way");
    put(memory, 3, 4);
    let shared = Refusal::NotPrivate { page: page(3).start() };
    assert_eq!(memory.preload(pages(2, 5), &[9; 8]), Err(shared.into()));
    assert_eq!(byte(memory, 3), Some(4));
    PASSED
}

fn preload_not_offered(w: &World<'_>) -> Ran {
    let memory = w.memory(8)?;
    let refused = memory.preload(page(0), b"x").expect_err("it can't be offered");
    assert_eq!(refused.errno(), Errno::EOPNOTSUPP);
    assert!(refused.way_out().is_some(), "{refused}");
    PASSED
}

fn moves(w: &World<'_>) -> Ran {
    let bound = w.bound(w.memory(16)?)?;
    let memory = &bound.memory;
    let (private, shared) = (gfns(pages(0, 8)), gfns(pages(8, 16)));
    bound.passes([fill(private, 1), fill(shared, 2)]);
    bound.passes(bound.converted(shared, Side::Shared, 2));
    let before = w.inside().frames(memory, all(memory));
    assert_eq!(memory.move_pages(all(memory), OnBusy::Wait), Ok(()));
    let after = w.inside().frames(memory, all(memory));
    assert!(before.iter().zip(&after).all(|(before, after)| before != after), "{after:?}");
    assert_eq!(w.mapped(memory, all(memory)), [], "nobody has the old ones");
    bound.passes([check(private, 1), check(shared, 2)]);
    assert!(crate::world::holds(memory, pages(8, 16), 2));
    assert_eq!(w.inside().audit(memory), Ok(()));
    PASSED
}

fn pinned(w: &World<'_>) -> Ran {
    let bound = w.bound(w.memory(8)?)?;
    let memory = &bound.memory;
    to(memory, pages(0, 4), Visibility::Shared).expect("nothing is in the way");
    let holder = Holder::new("the disk");
    let pin = memory.pin(page(2), PinKind::LongTerm, holder.clone()).expect("a shared page");
    let refused = memory.move_pages(pages(0, 4), OnBusy::Wait);
    let pinned = Refusal::Pinned { page: page(2).start(), kind: PinKind::LongTerm, holder };
    assert_eq!(refused, Err(pinned.into()));
    assert_eq!(memory.move_pages(pages(0, 2), OnBusy::Wait), Ok(()), "its neighbours do");
    drop(pin);
    assert_eq!(memory.move_pages(pages(0, 4), OnBusy::Wait), Ok(()));
    PASSED
}

fn untold(w: &World<'_>) -> Ran {
    let bound = w.bound(w.memory(8)?)?;
    let memory = &bound.memory;
    to(memory, pages(0, 4), Visibility::Shared).expect("nothing is in the way");
    put(memory, 2, 7);
    let reference = w.inside().refer(memory, page(2).start());
    let refused = memory.move_pages(pages(0, 4), OnBusy::Wait);
    assert!(
        matches!(&refused, Err(Error::Refused(Refusal::Referenced { page: at, .. }))
            if *at == page(2).start()),
        "{refused:?}"
    );
    assert_eq!(byte(memory, 2), Some(7));
    drop(reference);
    assert_eq!(memory.move_pages(pages(0, 4), OnBusy::Wait), Ok(()));
    assert_eq!(byte(memory, 2), Some(7));
    PASSED
}

fn at_work(w: &World<'_>) -> Ran {
    let bound = w.bound(w.memory(16)?)?;
    let memory = &bound.memory;
    let frames = gfns(pages(0, 16));
    let work = || {
        for seed in 0..8 {
            bound.passes([fill(frames, seed), check(frames, seed)]);
        }
    };
    let (moved, ()) = meanwhile(
        || {
            let rounds = (0..40).map(|_| memory.move_pages(all(memory), OnBusy::Wait));
            rounds.filter(|moved| moved.is_ok()).count()
        },
        work,
    );
    assert_eq!(moved, 40, "nobody pins anything");
    assert_eq!(w.inside().audit(memory), Ok(()));
    PASSED
}

fn move_not_offered(w: &World<'_>) -> Ran {
    let memory = w.memory(8)?;
    let refused = memory.move_pages(page(0), OnBusy::Wait).expect_err("it can't be offered");
    assert_eq!(refused.errno(), Errno::EOPNOTSUPP);
    assert!(refused.way_out().is_some(), "{refused}");
    PASSED
}

fn unmovable(w: &World<'_>) -> Ran {
    let bound = w.bound(w.memory(8)?)?;
    let memory = &bound.memory;
    to(memory, pages(0, 2), Visibility::Shared).expect("nothing is in the way");
    put(memory, 1, 5);
    let platform = memory.platform();
    let unmovable = Refusal::Unmovable { page: page(2).start(), platform };
    assert_eq!(memory.move_pages(pages(0, 4), OnBusy::Wait), Err(unmovable.into()));
    assert_eq!(memory.move_pages(pages(0, 2), OnBusy::Wait), Ok(()), "what is shared does");
    assert_eq!(byte(memory, 1), Some(5));
    PASSED
}
