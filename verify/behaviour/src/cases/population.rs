//! Contents that are owed, and arrive.

use std::fs::File;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use polder::units::{Gpa, PAGE_BYTES, PAGE_SIZE, PageRange};
use polder::{
    Contents, Error, HostKind, Memory, MemoryFault, OnBusy, Population as Facts, Refusal,
    Visibility,
};
use polder_require::patience;
use polder_vmm::scenario::{HostAccess, Op};
use polder_vmm::{End, Failure};

use crate::Section::Population;
use crate::world::{
    BASE, Bound, PASSED, World, all, all_are, byte, bytes, check, count, facts, fill, gfn, gfns,
    holds, meanwhile, page, pages, probe, put, seeded, share_all, to, zero,
};
use crate::{Case, Ran, Trouble};

pub(crate) const CONTINUE_FAILS: &str =
    "a population that can't be shown at once is true, and seen by who touches it";

pub(crate) const PLAIN_FAULTS: &str =
    "once settled, a guest's first touches no longer come to Polder";

pub(super) const CASES: &[Case] = &[
    Case::new(Population, "a raw touch of an owed page waits, and sees it whole", raw_touch),
    Case::new(Population, "a guest's access to an owed page waits, and sees it whole", guest),
    Case::new(Population, "guest and host that wait for one page see the same", both),
    Case::new(Population, "a write to an owed page waits, and lands on what arrived", write),
    Case::new(Population, "a system call on an owed page waits, too", system_call),
    Case::new(Population, "the API refuses an owed page, named, rather than wait", api),
    Case::new(Population, "private pages are populated for the guest alone", private),
    Case::new(
        Population,
        "bytes that are too few are followed by zeros, too many refused",
        lengths,
    ),
    Case::new(Population, "a page that is whole is not populated again", whole),
    Case::new(Population, "of two populations of one range, one is done and one refused", race),
    Case::new(Population, "nobody sees a torn page, by raw touch, by the API or as a guest", torn),
    Case::new(Population, "a conversion of owed pages leaves them owed", conversion),
    Case::new(
        Population,
        "a zeroing conversion of owed pages makes them whole, and zeros",
        zeroing,
    ),
    Case::new(Population, "a discard of owed pages makes them whole, and zeros", discard),
    Case::new(Population, "a discard against a population: zeros, whoever was first", discard_race),
    Case::new(Population, "once settled, what was owed is zeros and nobody waits", settled),
    Case::new(Population, "a source that fails denies its pages to all, and no others", fails),
    Case::new(Population, "who waits for a source that fails is denied at once", waiter_denied),
    Case::new(
        Population,
        "failed pages stay so when nothing more will come, until discarded",
        stays,
    ),
    Case::new(
        Population,
        "no page that is seen is in the kernel's direct map, if so asked",
        hidden,
    ),
    Case::new(Population, PLAIN_FAULTS, plain),
    Case::new(Population, CONTINUE_FAILS, failed),
];

/// Long enough for a thread to reach what it waits for, and to get through if nothing held it. Too
/// short a time lets a broken host pass now and then; it never fails a sound one.
pub(super) const A_WHILE: Duration = Duration::from_millis(40);

/// Populates pages with the pattern that a guest bound from [`BASE`] on would write.
pub(super) fn populate(memory: &Memory, range: PageRange, seed: u64) -> Result<(), Error> {
    let bytes: Vec<_> = gfns(range).frames().map(|at| seeded(at, seed)).collect();
    memory.populate(range, &bytes.concat())
}

/// Does `one`, which has to wait until `then` was done.
pub(super) fn waits<T: Send>(one: impl FnOnce() -> T + Send, then: impl FnOnce()) -> T {
    let done = AtomicBool::new(false);
    let one = || {
        let one = one();
        done.store(true, Ordering::Release);
        one
    };
    let (one, waited) = meanwhile(one, || {
        std::thread::sleep(patience(A_WHILE));
        let waited = !done.load(Ordering::Acquire);
        then();
        waited
    });
    assert!(waited, "it did not wait");
    one
}

fn raw_touch(w: &World<'_>) -> Ran {
    let shown = w.granules();
    let memory = w.owed(shown.count(8))?;
    share_all(&memory);
    // Its neighbours exist, and are whole: that is nobody's word for it.
    populate(&memory, shown.page(1), 1).expect("it is owed");
    populate(&memory, shown.page(3), 1).expect("it is owed");
    let wanted = shown.page(2);
    let seen =
        waits(|| holds(&memory, wanted, 2), || populate(&memory, wanted, 2).expect("it is owed"));
    assert!(seen);
    assert!(holds(&memory, shown.page(1), 1) && holds(&memory, shown.page(3), 1));
    PASSED
}

fn guest(w: &World<'_>) -> Ran {
    let shown = w.granules();
    let bound = w.bound(w.owed(shown.count(8))?)?;
    let memory = &bound.memory;
    for (at, visibility) in [(2, Visibility::Private), (5, Visibility::Shared)] {
        let page = shown.page(at);
        to(memory, page, visibility).expect("no pins");
        waits(
            || bound.passes([check(gfns(page), 2)]),
            || populate(memory, page, 2).expect("it is owed"),
        );
    }
    let whole: Vec<_> = facts(memory, all(memory)).into_iter().map(|(_, facts)| facts).collect();
    assert_eq!(whole.iter().filter(|facts| facts.population == Facts::Whole).count(), 2);
    PASSED
}

fn both(w: &World<'_>) -> Ran {
    let wanted = w.granules().page(1);
    let bound = w.bound(w.owed(w.granules().count(4))?)?;
    let memory = &bound.memory;
    share_all(memory);
    let together = || {
        let ((), host) =
            meanwhile(|| bound.passes([check(gfns(wanted), 3)]), || holds(memory, wanted, 3));
        host
    };
    assert!(waits(together, || populate(memory, wanted, 3).expect("it is owed")));
    PASSED
}

fn write(w: &World<'_>) -> Ran {
    let shown = w.granules();
    let bound = w.bound(w.owed(shown.count(4))?)?;
    let memory = &bound.memory;
    share_all(memory);
    let wrote = waits(
        || memory.host_view().touch_write(shown.first(1) * PAGE_SIZE + 8, &[0; 8]),
        || memory.populate(shown.page(1), &[7; PAGE_BYTES]).expect("it is owed"),
    );
    assert_eq!(wrote, Ok(()));
    waits(
        || {
            let gpa = gfn(BASE + shown.first(2)).gpa();
            bound.passes([polder_vmm::scenario::Op::Store { gpa, value: 0 }]);
        },
        || memory.populate(shown.page(2), &[7; PAGE_BYTES]).expect("it is owed"),
    );
    let mut expected = vec![7; PAGE_BYTES];
    expected[8..16].fill(0);
    assert!(crate::world::touch(memory, shown.first(1)) == Ok(expected));
    let mut expected = vec![7; PAGE_BYTES];
    expected[..8].fill(0);
    assert!(crate::world::touch(memory, shown.first(2)) == Ok(expected));
    PASSED
}

fn system_call(w: &World<'_>) -> Ran {
    let shown = w.granules();
    let memory = w.owed(shown.count(4))?;
    share_all(&memory);
    let zeros = File::open("/dev/zero").expect("every Linux has it");
    let came = waits(
        || memory.host_view().read_from(&zeros, shown.first(1) * PAGE_SIZE, 16),
        || memory.populate(shown.page(1), &[7; PAGE_BYTES]).expect("it is owed"),
    );
    assert_eq!(came, Ok(16));
    let mut expected = vec![7; PAGE_BYTES];
    expected[..16].fill(0);
    assert!(crate::world::touch(&memory, shown.first(1)) == Ok(expected));
    PASSED
}

fn api(w: &World<'_>) -> Ran {
    let bound = w.bound(w.owed(4)?)?;
    let memory = &bound.memory;
    share_all(memory);
    populate(memory, page(0), 1).expect("it is owed");
    let named = Error::Refused(Refusal::Owed { page: 1u32.into() });
    assert_eq!(named.errno() as i32, 11, "EAGAIN");
    let mut read = vec![9; 2 * PAGE_BYTES];
    assert_eq!(memory.read(bound.vm, gfn(BASE).gpa(), &mut read), Err(named.clone()));
    assert!(read.iter().all(|byte| *byte == 9), "it was refused before anything was read");
    assert_eq!(memory.write(bound.vm, gfn(BASE).gpa(), &read), Err(named));
    populate(memory, page(1), 1).expect("it is owed still");
    assert_eq!(memory.read(bound.vm, gfn(BASE).gpa(), &mut read), Ok(()));
    assert!(read[PAGE_BYTES..] == seeded(gfn(BASE + 1), 1));
    PASSED
}

fn private(w: &World<'_>) -> Ran {
    let shown = w.granules();
    let bound = w.bound(w.owed(shown.count(6))?)?;
    let memory = &bound.memory;
    let come = shown.pages(2, 4);
    populate(memory, come, 1).expect("it is owed");
    let some = gfns(come);
    bound.passes([check(some, 1), probe(some, HostAccess::Denied), fill(some, 2), check(some, 2)]);
    assert!(all_are(memory, all(memory), None), "whole or owed, it is private");
    to(memory, come, Visibility::Shared).expect("no pins");
    assert!(holds(memory, come, 2));
    PASSED
}

fn lengths(w: &World<'_>) -> Ran {
    let memory = w.owed(8)?;
    share_all(&memory);
    let range = pages(2, 4);
    let long = memory.populate(range, &vec![1; 2 * PAGE_BYTES + 1]);
    assert_eq!(long, Err(Error::TooManyBytes { range, bytes: 2 * PAGE_BYTES + 1 }));
    let end = memory.pages().get();
    let beyond = memory.populate(pages(end - 1, end + 1), &[]);
    assert!(matches!(beyond, Err(Error::Refused(Refusal::Beyond { .. }))), "{beyond:?}");
    assert_eq!(memory.populate(range, &[1; PAGE_BYTES + 100]), Ok(()));
    assert_eq!(byte(&memory, 2), Some(1));
    let last = crate::world::touch(&memory, 3).expect("it is whole");
    assert!(last[..100] == [1; 100] && last[100..].iter().all(|byte| *byte == 0));
    assert_eq!(memory.populate(pages(4, 8), &[]), Ok(()));
    assert_eq!(bytes(&memory, pages(4, 8)), [Some(0); 4]);
    PASSED
}

fn whole(w: &World<'_>) -> Ran {
    let memory = w.owed(8)?;
    share_all(&memory);
    populate(&memory, pages(2, 4), 1).expect("it is owed");
    let whole = |page: u32| Error::Refused(Refusal::Whole { page: page.into() });
    assert_eq!(whole(2).errno() as i32, 17, "EEXIST");
    assert_eq!(populate(&memory, pages(0, 8), 2), Err(whole(2)));
    assert_eq!(populate(&memory, page(3), 2), Err(whole(3)));
    assert!(holds(&memory, pages(2, 4), 1));
    // What was refused is owed as before.
    assert_eq!(populate(&memory, pages(0, 2), 2), Ok(()));
    let never = w.memory(4)?;
    share_all(&never);
    assert_eq!(populate(&never, page(1), 2), Err(whole(1)), "nothing was ever owed");
    PASSED
}

fn race(w: &World<'_>) -> Ran {
    for _ in 0..20 {
        let memory = w.owed(256)?;
        share_all(&memory);
        let put = |seed| populate(&memory, pages(0, 256), seed);
        let (one, other) = meanwhile(|| put(1), || put(2));
        let exists = Err(Error::Refused(Refusal::Whole { page: 0u32.into() }));
        let seed = if one.is_ok() { 1 } else { 2 };
        let refused = if one.is_ok() { &other } else { &one };
        assert!(one.is_ok() || other.is_ok(), "{one:?}, {other:?}");
        assert_eq!(*refused, exists);
        assert!(holds(&memory, pages(0, 256), seed), "all of it is the first one's");
    }
    PASSED
}

/// Reads a page by the API until it is no longer owed.
fn read_by_api(bound: &Bound, gpa: Gpa, into: &mut [u8]) {
    loop {
        match bound.memory.read(bound.vm, gpa, into) {
            Ok(()) => return,
            Err(Error::Refused(Refusal::Owed { .. })) => std::thread::yield_now(),
            Err(error) => panic!("{error}"),
        }
    }
}

fn torn(w: &World<'_>) -> Ran {
    const PAGES: u64 = 2048;
    for round in 0..3 {
        let bound = w.bound(w.owed(PAGES)?)?;
        let memory = &bound.memory;
        share_all(memory);
        let all = gfns(pages(0, PAGES));
        std::thread::scope(|scope| {
            scope.spawn(|| bound.passes([check(all, round)]));
            // Close behind the front, where it is torn if anywhere, from the end of a chunk on.
            scope.spawn(|| {
                for at in (0..PAGES).map(|at| at ^ 255) {
                    assert!(holds(memory, page(at), round), "page {at:#x} by a raw touch");
                }
            });
            scope.spawn(|| {
                let mut read = vec![0; PAGE_BYTES];
                for at in (0..PAGES).map(|at| at ^ 127) {
                    read_by_api(&bound, gfn(BASE + at).gpa(), &mut read);
                    assert!(read == seeded(gfn(BASE + at), round), "page {at:#x} by the API");
                }
            });
            for chunk in (0..PAGES).step_by(256) {
                populate(memory, pages(chunk, chunk + 256), round).expect("it is owed");
            }
        });
    }
    PASSED
}

fn conversion(w: &World<'_>) -> Ran {
    let shown = w.granules();
    let bound = w.bound(w.owed(shown.count(5))?)?;
    let memory = &bound.memory;
    assert_eq!(to(memory, shown.pages(0, 4), Visibility::Shared), Ok(shown.count(4)));
    assert_eq!(to(memory, shown.page(2), Visibility::Private), Ok(shown.count(1)));
    assert!(facts(memory, all(memory)).iter().all(|(_, facts)| facts.population == Facts::Owed));
    assert_eq!(memory.existing(), Ok(vec![]));
    // Who waits for a page that becomes private while it waits is denied.
    let touched = waits(
        || byte(memory, shown.first(1)),
        || {
            to(memory, shown.page(1), Visibility::Private).expect("no pins");
        },
    );
    assert_eq!(touched, None);
    let come = shown.pages(0, 5);
    populate(memory, come, 4).expect("it is owed");
    assert!(holds(memory, shown.page(0), 4) && holds(memory, shown.page(3), 4));
    let private = gfns(shown.pages(1, 3));
    bound.passes([check(gfns(come), 4), probe(private, HostAccess::Denied)]);
    PASSED
}

fn zeroing(w: &World<'_>) -> Ran {
    let shown = w.granules();
    let middle = shown.pages(2, 4);
    let bound = w.bound(w.owed(shown.count(6))?)?;
    let memory = &bound.memory;
    let convert = |to| memory.convert(middle, to, Contents::Zero, OnBusy::Wait);
    assert!(convert(Visibility::Shared).is_ok());
    assert!(all_are(memory, middle, Some(0)));
    let whole = Error::Refused(Refusal::Whole { page: middle.start() });
    assert_eq!(memory.populate(all(memory), &[1]), Err(whole.clone()));
    assert!(convert(Visibility::Private).is_ok());
    bound.passes([zero(gfns(middle))]);
    assert_eq!(memory.populate(shown.page(2), &[1]), Err(whole));
    populate(memory, shown.pages(4, 6), 1).expect("it is owed");
    bound.passes([check(gfns(shown.pages(4, 6)), 1)]);
    PASSED
}

fn discard(w: &World<'_>) -> Ran {
    let shown = w.granules();
    let middle = shown.pages(2, 6);
    let bound = w.bound(w.owed(shown.count(8))?)?;
    let memory = &bound.memory;
    to(memory, shown.pages(0, 4), Visibility::Shared).expect("no pins");
    let drop_them = || memory.discard(middle, OnBusy::Wait).expect("no pins");
    let host = waits(|| byte(memory, shown.first(3)), drop_them);
    assert_eq!(host, Some(0), "who waited sees zeros");
    let whole = Error::Refused(Refusal::Whole { page: middle.start() });
    assert_eq!(memory.populate(all(memory), &[1]), Err(whole));
    bound.passes([zero(gfns(middle))]);
    waits(
        || bound.passes([zero(gfns(shown.page(7)))]),
        || memory.discard(shown.page(7), OnBusy::Wait).expect("no pins"),
    );
    populate(memory, shown.pages(0, 2), 1).expect("it is owed");
    assert!(holds(memory, shown.pages(0, 2), 1));
    PASSED
}

fn discard_race(w: &World<'_>) -> Ran {
    for _ in 0..40 {
        let memory = w.owed(128)?;
        share_all(&memory);
        let range = pages(0, 128);
        let (populated, discarded) =
            meanwhile(|| populate(&memory, range, 1), || memory.discard(range, OnBusy::Wait));
        assert_eq!(discarded, Ok(()));
        let whole = Error::Refused(Refusal::Whole { page: 0u32.into() });
        assert!(populated == Ok(()) || populated == Err(whole), "{populated:?}");
        assert_eq!(bytes(&memory, range), [Some(0); 128]);
    }
    PASSED
}

fn settled(w: &World<'_>) -> Ran {
    let shown = w.granules();
    let bound = w.bound(w.owed(shown.count(8))?)?;
    let memory = &bound.memory;
    to(memory, shown.pages(0, 4), Visibility::Shared).expect("no pins");
    populate(memory, shown.pages(0, 2), 1).expect("it is owed");
    let together = || {
        let ((), host) = meanwhile(
            || bound.passes([zero(gfns(shown.page(6)))]),
            || byte(memory, shown.first(3)),
        );
        host
    };
    let host = waits(together, || memory.settle().expect("nothing is in the way"));
    assert_eq!(host, Some(0));
    let whole = Error::Refused(Refusal::Whole { page: shown.page(5).start() });
    assert_eq!(memory.populate(shown.page(5), &[1]), Err(whole));
    bound.passes([check(gfns(shown.pages(0, 2)), 1), zero(gfns(shown.pages(2, 8)))]);
    assert_eq!(memory.settle(), Ok(()), "as often as one likes");
    put(memory, shown.first(2), 1);
    to(memory, all(memory), Visibility::Private).expect("no pins");
    assert!(all_are(memory, all(memory), None), "the host is watched for good");
    PASSED
}

fn plain(w: &World<'_>) -> Ran {
    let bound = w.bound(w.owed(16)?)?;
    let memory = &bound.memory;
    populate(memory, pages(0, 4), 1).expect("it is owed");
    memory.settle().expect("nothing is in the way");
    let before = memory.statistics().guest_faults;
    bound.passes([check(gfns(pages(0, 4)), 1), zero(gfns(pages(4, 16)))]);
    assert_eq!(memory.statistics().guest_faults, before);
    PASSED
}

fn failed(w: &World<'_>) -> Ran {
    let shown = w.granules();
    let come = shown.pages(2, 4);
    let bound = w.bound(w.owed(shown.count(8))?)?;
    let memory = &bound.memory;
    share_all(memory);
    let populated = w.in_trouble(Trouble::Continue, || populate(memory, come, 1))?;
    assert_eq!(populated, Ok(()));
    assert!(holds(memory, come, 1));
    bound.passes([check(gfns(come), 1)]);
    PASSED
}

fn fails(w: &World<'_>) -> Ran {
    let shown = w.granules();
    let (out, rest) = (shown.pages(2, 4), shown.pages(4, 6));
    let bound = w.bound(w.owed(shown.count(6))?)?;
    let memory = &bound.memory;
    share_all(memory);
    memory.fail(out).expect("it is owed");
    populate(memory, rest, 3).expect("it is owed");
    assert_eq!([2, 3].map(|at| byte(memory, shown.first(at))), [None, None]);
    assert!(holds(memory, rest, 3));
    let refused = Error::Refused(Refusal::SourceFailed { page: out.start() });
    let first = PageRange::one(out.start());
    let gpa = gfns(first).start().gpa();
    assert_eq!(memory.read(bound.vm, gpa, &mut [0]), Err(refused.clone()));
    assert_eq!(memory.populate(shown.page(2), &[1]), Err(refused));
    let whole = Error::Refused(Refusal::Whole { page: rest.start() });
    assert_eq!(memory.fail(shown.page(4)), Err(whole));
    bound.passes([check(gfns(rest), 3)]);
    let ended = bound.run([Op::Load { gpa, expect: 0 }]);
    let fault = MemoryFault::SourceFailed(gfns(first));
    let failures = [
        Failure::MemoryFailure { vcpu: 0, page: Some(out.start()) },
        Failure::MemoryFault { vcpu: 0, fault },
    ];
    assert!(failures.map(End::Failed).contains(&ended.end), "{:?}", ended.end);
    PASSED
}

fn waiter_denied(w: &World<'_>) -> Ran {
    let memory = w.owed(4)?;
    share_all(&memory);
    let denied =
        waits(|| byte(&memory, 1).is_none(), || memory.fail(pages(1, 2)).expect("it is owed"));
    assert!(denied);
    PASSED
}

fn stays(w: &World<'_>) -> Ran {
    let bound = w.bound(w.owed(8)?)?;
    let memory = &bound.memory;
    share_all(memory);
    memory.fail(pages(2, 4)).expect("it is owed");
    memory.settle().expect("nothing is in the way");
    assert_eq!([1, 2, 3, 4].map(|at| byte(memory, at)), [Some(0), None, None, Some(0)]);
    memory.discard(pages(2, 4), polder::OnBusy::Wait).expect("no pins");
    assert_eq!([2, 3].map(|at| byte(memory, at)), [Some(0), Some(0)]);
    bound.passes([zero(gfns(all(memory)))]);
    PASSED
}

fn hidden(w: &World<'_>) -> Ran {
    let built = w.try_build(Memory::builder(count(8)).owed().shared().off_direct_map())?;
    if w.kind() != HostKind::Machine || w.memory(1)?.platform().has_rmp() {
        assert!(matches!(built, Err(Error::NotOffered { .. })), "{built:?}");
        return PASSED;
    }
    let inside = w.inside();
    let bound = w.bound(built.expect("memory of a sensible size"))?;
    let memory = &bound.memory;
    let hidden = |range| inside.off_direct_map(memory, range);
    populate(memory, pages(0, 3), 1).expect("it is owed");
    assert_eq!(hidden(all(memory)), [0, 1, 2], "published, and seen by nobody yet");
    memory.settle().expect("nothing is in the way");
    // What nobody has populated is published when it is first touched.
    bound.passes([check(gfns(pages(0, 3)), 1), zero(gfns(page(4)))]);
    assert_eq!(byte(memory, 6), Some(0));
    assert_eq!(hidden(all(memory)), [0, 1, 2, 4, 6]);
    let mut read = vec![0; PAGE_BYTES];
    memory.read(bound.vm, gfn(BASE + 1).gpa(), &mut read).expect("by a mapping of our own");
    assert!(read == seeded(gfn(BASE + 1), 1));
    memory.write(bound.vm, gfn(BASE + 4).gpa(), &[3]).expect("the same");
    to(memory, pages(0, 2), Visibility::Private).expect("no pins");
    to(memory, pages(0, 1), Visibility::Shared).expect("no pins");
    assert_eq!(hidden(all(memory)), [0, 1, 2, 4, 6]);
    memory.discard(pages(1, 5), OnBusy::Wait).expect("no pins");
    assert_eq!(
        hidden(all(memory)),
        [0, 6],
        "the next owner of what is free has it zeroed that way"
    );
    assert_eq!(inside.audit(memory), Ok(()));
    bound.passes([zero(gfns(pages(1, 5))), check(gfns(page(0)), 1)]);
    PASSED
}
