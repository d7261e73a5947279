//! Of the simulated machine's: splits and merges, and memory that runs out on the way.

use polder::units::{Level, PageCount, PageRange};
use polder::{
    Error, Holder, HostKind, Memory, OnBusy, PageSize, PinKind, Platform, Refusal, Visibility,
};

use super::{first_byte, pages, simulated, to};

#[test]
fn the_machine_splits_a_1g_page_along_the_path_and_merges_it_again() {
    let memory = simulated(PageSize::Huge1G, 1, Platform::Plain);
    let levels = |memory: &Memory| {
        let levels = memory.levels();
        (levels.size_1g, levels.size_2m, levels.size_4k)
    };
    to(&memory, pages(1000, 1001), Visibility::Shared).unwrap();
    assert_eq!(levels(&memory), (0, 511, 512));
    assert_eq!(memory.existing().unwrap(), [], "nothing was there, and nothing is");
    memory.host_view().touch_write(1000 * 4096, &[7]).unwrap();
    let machine = |memory: &Memory| {
        memory
            .simulated(|machine, object, _| {
                let folios = machine.folios(object, pages(0, 1 << 18)).unwrap().count();
                machine.audit().expect("it adds up");
                folios
            })
            .unwrap()
    };
    assert_eq!(machine(&memory), 511 + 512);
    assert_eq!(first_byte(&memory, 1000), Ok(7));
    assert!(first_byte(&memory, 1001).is_err());
    to(&memory, pages(2048, 2560), Visibility::Shared).unwrap();
    assert_eq!(first_byte(&memory, 2100), Ok(0));
    assert_eq!(memory.reshape_counts().splits, 2, "a whole 2M page is not split");
    to(&memory, pages(2048, 2560), Visibility::Private).unwrap();
    to(&memory, pages(1000, 1001), Visibility::Private).unwrap();
    assert_eq!((levels(&memory), machine(&memory)), ((1, 0, 0), 1));
    assert_eq!((memory.reshape_counts().splits, memory.reshape_counts().merges), (2, 2));
}

#[test]
fn a_pinned_neighbour_is_named_where_its_folio_would_have_to_be_split() {
    let builder = Memory::builder(PageCount::from(512)).host(HostKind::Machine).shared();
    let memory = builder.page_size(PageSize::Huge2M).build().unwrap();
    let pin = memory.pin(pages(9, 10), PinKind::LongTerm, Holder::new("virtio-blk")).unwrap();
    let refused = to(&memory, pages(3, 4), Visibility::Private).unwrap_err();
    let named = |error: &Error| matches!(error, Error::Refused(Refusal::Pinned { page, .. }) if page.get() == 9);
    assert!(named(&refused), "{refused:?}");
    drop(pin);
    to(&memory, pages(3, 4), Visibility::Private).unwrap();
}

/// What of memory on the machine an operation that is refused leaves as it was.
fn state(memory: &Memory) -> impl PartialEq + std::fmt::Debug + use<> {
    let all = pages(0, memory.pages().get());
    let inside = memory.simulated(|machine, object, _| {
        machine.audit().expect("it adds up");
        let folios = machine.folios(object, all).expect("the memory's");
        let levels: Vec<Level> = folios.map(|(_, folio)| folio.level).collect();
        (machine.free_frames(), levels)
    });
    let facts = memory.facts(all).expect("all of it");
    (
        inside.expect("it is the machine"),
        memory.levels(),
        memory.reshape_counts(),
        memory.pool(),
        facts,
    )
}

/// Has the first allocation that an operation makes fail, then the second, and so on, until it is
/// done without one. How many there were.
fn every_allocation_fails(memory: &Memory, operation: impl Fn() -> Result<(), Error>) -> u64 {
    for nth in 0.. {
        let fail = |nth| {
            let set = memory.simulated(|machine, _, _| machine.fail_allocation(nth));
            set.expect("it is the machine");
        };
        let before = state(memory);
        fail(Some(nth));
        let done = operation();
        fail(None);
        match done {
            Ok(()) => return nth,
            Err(error) => assert_eq!(error.errno(), polder::Errno::ENOMEM, "{error:?}"),
        }
        assert_eq!(state(memory), before, "allocation {nth}");
        assert!(memory.quarantined().is_empty());
    }
    unreachable!("there are as many numbers as there are")
}

#[test]
fn no_memory_at_any_point_of_a_split_merge_or_discard_changes_nothing() {
    let memory = simulated(PageSize::Huge1G, 1, Platform::Plain);
    let convert = |range: PageRange, kind| {
        every_allocation_fails(&memory, || to(&memory, range, kind).map(drop))
    };
    let touch = |page: u64| memory.host_view().touch_write(page * 4096, &[7]);
    // What is not there yet: the tables are had for it, and then its touch takes one page of 1G.
    assert_eq!(convert(pages(1000, 1001), Visibility::Shared), 511 + 7);
    touch(1000).unwrap();
    assert_eq!(convert(pages(5000, 5001), Visibility::Shared), 7);
    assert_eq!(convert(pages(2048, 2560), Visibility::Shared), 0, "a whole 2M page");
    // Merges: nothing is needed, and nothing given back before all is done.
    assert_eq!(convert(pages(2048, 2560), Visibility::Private), 0);
    assert_eq!(convert(pages(1000, 1001), Visibility::Private), 0);
    assert_eq!(convert(pages(5000, 5001), Visibility::Private), 0);
    assert_eq!(memory.levels().size_1g, 1);
    // Of what is there, from 1G on.
    assert_eq!(convert(pages(1000, 1001), Visibility::Shared), 511 + 7);
    let discard = || memory.discard(pages(0, 512 * 512), OnBusy::Wait);
    assert_eq!(every_allocation_fails(&memory, discard), 0, "its tables are kept for it");
    assert_eq!(first_byte(&memory, 1000), Ok(0));
}
