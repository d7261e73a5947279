//! What a random sequence is made of.

use polder_units::Level;
use proptest::prelude::*;

use crate::PAGES;
use crate::naive::geometry;

#[derive(Clone, Debug)]
pub(crate) enum Action {
    Allocate(u64, Level),
    Punch(u64, u64),
    Zero(u64, u64),
    Map(usize, u64, Level),
    MapRange(usize, u64, u64),
    Unmap(usize, u64, u64),
    Zap(u64, u64),
    Poison(usize, u64, u64),
    Write(usize, u64, u64),
    Read(usize, u64),
    Pin(usize, u64),
    GupFast(usize, u64),
    Unpin(usize),
    Dma(usize, u64),
    GuestWrite(u64, u64),
    GuestRead(u64),
    Split(u64),
    Merge(u64, Level),
}

pub(crate) fn action() -> impl Strategy<Value = Action> {
    use Action::*;
    let page = || 0..PAGES;
    let level = || prop::sample::select(&Level::ALL[..]);
    let len = || prop_oneof![2 => 1u64..6, 1 => Just(8u64), 1 => Just(16u64)];
    let process = || 0usize..2;
    prop_oneof![
        3 => (page(), level()).prop_map(|(page, level)| {
            let pages = geometry().pages(level).get();
            Allocate(page / pages * pages, level)
        }),
        1 => (page(), level()).prop_map(|(page, level)| Allocate(page, level)),
        2 => (page(), len()).prop_map(|(page, len)| Punch(page / len * len, len)),
        1 => (page(), len()).prop_map(|(page, len)| Zero(page, len)),
        3 => (process(), page(), level()).prop_map(|(p, page, level)| Map(p, page, level)),
        1 => (process(), page(), len()).prop_map(|(p, page, len)| MapRange(p, page, len)),
        2 => (process(), page(), len()).prop_map(|(p, page, len)| Unmap(p, page, len)),
        1 => (page(), len()).prop_map(|(page, len)| Zap(page, len)),
        2 => (process(), page(), len()).prop_map(|(p, page, len)| Poison(p, page, len)),
        3 => (process(), page(), any::<u64>()).prop_map(|(p, page, value)| Write(p, page, value)),
        2 => (process(), page()).prop_map(|(p, page)| Read(p, page)),
        2 => (process(), page()).prop_map(|(p, page)| Pin(p, page)),
        2 => (process(), page()).prop_map(|(p, page)| GupFast(p, page)),
        2 => (0usize..8).prop_map(Unpin),
        2 => (0usize..8, any::<u64>()).prop_map(|(pin, value)| Dma(pin, value)),
        2 => (page(), any::<u64>()).prop_map(|(page, value)| GuestWrite(page, value)),
        1 => page().prop_map(GuestRead),
        2 => page().prop_map(Split),
        2 => (page(), level()).prop_map(|(page, level)| Merge(page, level)),
    ]
}
