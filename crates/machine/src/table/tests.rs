use std::collections::BTreeMap;
use std::hash::DefaultHasher;
use std::vec::Vec;

use proptest::prelude::*;

use super::*;

fn small() -> Geometry {
    Geometry::new(4, 4).unwrap()
}

fn digest(table: &Table<u64>) -> u64 {
    let mut hasher = DefaultHasher::new();
    table.hash(&mut hasher);
    hasher.finish()
}

#[test]
fn a_table_forgets_how_it_came_about() {
    let mut table = Table::new(small());
    table.insert(3, Level::Size4K, 7).unwrap();
    let before = digest(&table);
    table.insert(9000, Level::Size1G, 8).unwrap();
    table.insert(40, Level::Size4K, 8).unwrap();
    table.drain(4, u64::MAX, |_| ());
    assert_eq!(digest(&table), before);
}

#[test]
fn the_tables_of_a_drained_range_are_given_back() {
    let mut table = Table::new(small());
    for number in 0..16 {
        table.insert(number, Level::Size4K, number).unwrap();
    }
    table.drain(0, 16, |_| ());
    assert!(matches!(table.tops[0][0], Slot::Empty));
}

#[test]
fn a_split_entry_is_its_parts() {
    let mut table = Table::new(small());
    table.insert(16, Level::Size1G, 100).unwrap();
    table.split(21, |entry, offset| entry + offset);
    table.split(21, |entry, offset| entry + offset);
    let found: Vec<_> =
        table.iter().map(|found| (found.start, found.level, *found.entry)).collect();
    let (k4, m2) = (Level::Size4K, Level::Size2M);
    let expected = [
        (16, m2, 100),
        (20, k4, 104),
        (21, k4, 105),
        (22, k4, 106),
        (23, k4, 107),
        (24, m2, 108),
        (28, m2, 112),
    ];
    assert_eq!(found, expected);
}

#[derive(Clone, Debug)]
enum Change {
    Insert(u64, Level),
    Remove(u64),
    Drain(u64, u64),
    Split(u64),
}

fn change() -> impl Strategy<Value = Change> {
    let number = prop_oneof![4 => 0u64..40, 1 => 8180u64..8200];
    prop_oneof![
        3 => (number.clone(), prop::sample::select(&Level::ALL[..]))
            .prop_map(|(number, level)| Change::Insert(number, level)),
        1 => number.clone().prop_map(Change::Remove),
        1 => (number.clone(), 0u64..20).prop_map(|(start, len)| Change::Drain(start, start + len)),
        1 => number.prop_map(Change::Split),
    ]
}

proptest! {
    #[test]
    fn a_table_agrees_with_a_map_of_every_page(
        changes in prop::collection::vec(change(), 0..60),
    ) {
        let mut table = Table::new(small());
        // What covers each page: the start and level of its entry, and a value for the page.
        let mut naive: BTreeMap<u64, (u64, Level)> = BTreeMap::new();
        for change in changes {
            match change {
                Change::Insert(number, level) => {
                    let start = number & !(table.pages(level) - 1);
                    let pages = start..start + table.pages(level);
                    let vacant = naive.range(pages.clone()).next().is_none();
                    prop_assert_eq!(table.insert(number, level, start).is_ok(), vacant);
                    if vacant {
                        naive.extend(pages.map(|page| (page, (start, level))));
                    }
                }
                Change::Remove(number) => {
                    let there = naive.get(&number).copied();
                    let found = table.remove(number).map(|found| (found.start, found.level));
                    prop_assert_eq!(found, there);
                    naive.retain(|_, entry| Some(*entry) != there);
                }
                Change::Drain(start, end) => {
                    let hit: Vec<_> = naive.range(start..end).map(|(_, entry)| *entry).collect();
                    table.drain(start, end, |_| ());
                    naive.retain(|_, entry| !hit.contains(entry));
                }
                Change::Split(number) => {
                    table.split(number, |entry, offset| entry + offset);
                    let Some(&old) = naive.get(&number) else { continue };
                    let Some(below) = old.1.smaller() else { continue };
                    let size = table.pages(below);
                    for (page, entry) in naive.iter_mut().filter(|(_, entry)| **entry == old) {
                        *entry = (page & !(size - 1), below);
                    }
                }
            }
            for page in (0..64).chain(8170..8210) {
                let found = table.get(page).map(|found| (found.start, found.level));
                prop_assert_eq!(found, naive.get(&page).copied());
                let values_right = table.get(page).is_none_or(|found| *found.entry == found.start);
                prop_assert!(values_right);
            }
        }
    }
}
