//! The examples do what they say.

use polder_require::{Facility, require};

#[expect(dead_code, reason = "its own `main`, which prints what the test looks at")]
#[path = "../examples/tiny_vmm.rs"]
mod tiny_vmm;

#[test]
fn the_tiny_vmm_prints_what_its_guest_was_told() {
    let console = require(Facility::Kvm, tiny_vmm::run());
    assert!(console.is_none_or(|text| text == "hello to you, too\n"));
}
