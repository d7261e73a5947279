//! What a child and a core dump get of the views. In a program of its own: no other thread is amid
//! making a view.

use polder::Memory;
use polder::units::PageCount;
use polder_require::{Facility, require};

#[test]
fn no_view_is_inherited_or_dumped() {
    let memory = Memory::builder(PageCount::from(2)).build();
    let Some(_memory) = require(Facility::Userfault, memory) else { return };
    let smaps = std::fs::read_to_string("/proc/self/smaps").unwrap();
    let views = smaps.split("VmFlags:").zip(smaps.split("VmFlags:").skip(1));
    let flags: Vec<&str> = views
        .filter(|(before, _)| before.lines().any(|line| line.contains("/memfd:polder")))
        .map(|(_, after)| after.lines().next().unwrap_or_default())
        .collect();
    assert!(flags.len() >= 3, "guest, host and trusted view: {flags:?}");
    for view in flags {
        assert!(view.contains(" dc") && view.contains(" dd"), "{view}");
    }
}
