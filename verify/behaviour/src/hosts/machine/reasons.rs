//! Which cases are not applicable to the simulated machine, by kind of VM.

use std::sync::LazyLock;

use polder::{PageSize, Platform};

use crate::cases;
use crate::hosts::{BROUGHT, HUGE, Reason, no_dirty_log};

/// The cases that are not applicable to such a VM's memory.
pub(super) fn reasons(platform: Platform, size: PageSize) -> &'static [Reason] {
    static PLAIN: LazyLock<Vec<Reason>> = LazyLock::new(|| [EVERY, ALIKE].concat());
    static PROTECTED: LazyLock<Vec<Reason>> = LazyLock::new(|| [EVERY, ALIKE, OF_PLAIN].concat());
    static OF_SNP: LazyLock<Vec<Reason>> =
        LazyLock::new(|| unlogged([EVERY, OF_PLAIN, OF_PROTECTED, SNP].concat()));
    static OF_PKVM: LazyLock<Vec<Reason>> =
        LazyLock::new(|| unlogged([EVERY, ALIKE, OF_PLAIN, OF_PROTECTED, PKVM].concat()));
    static OF_HUGE: LazyLock<Vec<Reason>> = LazyLock::new(|| [EVERY, ALIKE, HUGE].concat());
    static OF_GIGANTIC: LazyLock<Vec<Reason>> =
        LazyLock::new(|| [EVERY, ALIKE, HUGE, GIGANTIC].concat());
    match platform {
        Platform::Plain if size == PageSize::Huge1G => &OF_GIGANTIC,
        Platform::Plain if size != PageSize::Small => &OF_HUGE,
        Platform::Plain => &PLAIN,
        Platform::SwProtected => &PROTECTED,
        Platform::Snp => &OF_SNP,
        Platform::Pkvm => &OF_PKVM,
    }
}

/// These, and what holds where there is no dirty log.
fn unlogged(reasons: Vec<Reason>) -> Vec<Reason> {
    reasons.into_iter().chain(no_dirty_log()).collect()
}

const OWN: &str = "each memory is on a machine of its own: a VM has no other memory to run on";
const NEVER_FAILS: &str = "the simulated kernel unmaps and frees without fail; the driver's own \
    tests (`polder/src/driver/tests.rs`) have every step fail on it";
const EITHER: &str = "without hardware that tells them apart (SNP), stage 2 lets either kind of \
    access through once a page is mapped";
const SIMULATED: &str =
    "simulated memory is data of this process, and no mapping or descriptor of it";
const OTHER_MAPS: &str = "another process's own mapping is the kernel's to fill: the machine lets \
    it map what it likes, and hardware (SNP) refuses writes only";
const IN_PLACE: &str = "memory is converted in place: every treatment of contents is on offer";
const ANOTHER: &str = "this row is about another platform";

/// What holds on the machine for every kind of VM.
const EVERY: &[Reason] = &[
    (cases::NO_MOVE, "the simulated kernel moves pages when asked"),
    (cases::NO_PRELOAD, "the host writes private pages, until they are their guest's"),
    (cases::MEM_HOST_VIEW, SIMULATED),
    (cases::MEM_OTHER_VIEWS, SIMULATED),
    (cases::DESCRIPTOR, SIMULATED),
    (cases::TRACED_HOST_VIEW, SIMULATED),
    (cases::TRACED_OTHER_VIEWS, SIMULATED),
    (cases::STEP_FAILS, NEVER_FAILS),
    (cases::QUARANTINE, NEVER_FAILS),
    (cases::QUARANTINE_EXIT, NEVER_FAILS),
    (cases::DENIED_WHILE_FAILING, NEVER_FAILS),
    (cases::CONTINUE_FAILS, NEVER_FAILS),
    (cases::FAILED, "the machine does not model memory that fails"),
    (cases::OTHER, OTHER_MAPS),
    (cases::ANOTHER, OWN),
    (cases::DROPPED, OWN),
    (
        cases::PLAIN_FAULTS,
        "on the machine Polder is the hypervisor: every stage-2 fault comes to it",
    ),
    (cases::SLOTS, "the machine has as many slots as there are numbers for them"),
];

/// What holds where hardware does not tell a private access from a shared one.
const ALIKE: &[Reason] = &[
    (cases::UNMOVABLE, ANOTHER),
    (cases::LOST, IN_PLACE),
    (cases::IMPLICIT, EITHER),
    (cases::MISMATCH, EITHER),
];

/// Rows about plain VMs.
const OF_PLAIN: &[Reason] = &[
    (cases::PLAIN_VM, ANOTHER),
    (cases::PRESERVED, ANOTHER),
    (cases::ZEROED, ANOTHER),
    (cases::UNSPECIFIED, ANOTHER),
];

/// Rows about software-protected VMs.
const OF_PROTECTED: &[Reason] = &[
    (cases::PRESERVED_PROTECTED, ANOTHER),
    (cases::ZEROED_PROTECTED, ANOTHER),
    (cases::UNSPECIFIED_PROTECTED, ANOTHER),
];

const NO_OTHER: &str = "a page of 1G is moved to another that is free: the memory's own are all that \
    the pool has";

/// What does not hold of pages of 1G.
const GIGANTIC: &[Reason] = &[
    (cases::MOVES, NO_OTHER),
    (cases::MOVES_BUSY, NO_OTHER),
    ("a page that a source can't read is denied to all, and no other", BROUGHT),
    ("a source that panics, ends or lies fails in the same way", BROUGHT),
    ("pages that are discarded are not read any more", BROUGHT),
    ("all is brought by and by, if asked for, and nothing is owed then", BROUGHT),
];

const ONE_VM: &str = "the RMP has one guest for a page: a second VM's bind is refused";
const LOSES: &str = "a conversion of an SNP guest's memory loses contents, and this case is about \
    contents kept";
const NO_ZEROS: &str = "what is zero to an SNP guest is what it has cleared itself: zeros can't be \
    asked for to private";
const GUEST_FILLS: &str = "the host can't write an SNP guest's private pages: they are populated \
    shared, or by the guest";
const VALIDATES: &str = "a page that shows at another guest frame has to be validated anew there";
const READS: &str = "once a page is mapped, a read as the other kind finds ciphertext or garbage, \
    and only a write exits: that is a row of the RMP";

const DROPPED_FIRST: &str = "contents of a page that an SNP guest shares are dropped before a device is \
    told: that it fails then leaves the page in quarantine";
const UNMOVABLE: &str = "nobody here moves an SNP guest's private pages";
/// What holds for an SNP guest's memory.
const SNP: &[Reason] = &[
    (cases::FAILS, DROPPED_FIRST),
    (cases::MOVES, UNMOVABLE),
    (cases::MOVES_BUSY, UNMOVABLE),
    (cases::DISAGREE, ONE_VM),
    ("an overlap in guest frames is refused, in another VM it is not", ONE_VM),
    ("an overlap in pages is refused, in another VM it is not", ONE_VM),
    ("two VMs see one object, and a conversion holds for both", ONE_VM),
    ("a slot in use is refused; a slot unbound can be bound anew", VALIDATES),
    (cases::MOVED, VALIDATES),
    ("shared first: what the host wrote stays when it becomes private", LOSES),
    ("a guest at work on the pages loses none of its words", LOSES),
    ("contents zeroed are zeros for the guest, too", NO_ZEROS),
    ("a zeroing conversion of owed pages makes them whole, and zeros", NO_ZEROS),
    ("a guest's access to an owed page waits, and sees it whole", GUEST_FILLS),
    ("private pages are populated for the guest alone", GUEST_FILLS),
    ("a conversion of owed pages leaves them owed", GUEST_FILLS),
    (cases::MISMATCH, READS),
];

pub(super) const GUEST_FREES: &str = "only the guest gives its pages back: a discard by the VMM is refused, which \
    is a row of pkvm";
const KEEPS_SLOT: &str = "a slot in which a protected guest has pages stays: that is a row of pkvm";
const GUEST_CONVERTS: &str = "this row has the VMM convert, or hold what the guest asks for, and under \
    pKVM the guest alone does it";
const ITS_OWN: &str = "contents are the guest's own: they are kept, and zeros are its to write";
const HAS: &str = "what a protected guest shares it has: sharing gives it the page first";
pub(super) const SHARES_WHOLE: &str = "a protected guest shares what it has, and pages whose contents are owed it \
    waits for: the row shares them first";
pub(super) const NO_SELFTESTS: &str = "the kernel's selftests have the VMM convert, or begin with shared memory, \
    and a protected VM's memory is its own";
const ONE_OWNER: &str =
    "pKVM's hypervisor gives a page to one guest: a second VM's bind is refused";
/// What holds for a protected VM's memory under pKVM.
const PKVM: &[Reason] = &[
    ("the fault for an access of the other kind says what was wanted", EITHER),
    ("several objects are independent of each other", GUEST_FREES),
    ("an overlap in guest frames is refused, in another VM it is not", ONE_OWNER),
    ("an overlap in pages is refused, in another VM it is not", ONE_OWNER),
    ("two VMs see one object, and a conversion holds for both", ONE_OWNER),
    (cases::DISAGREE, ONE_OWNER),
    ("a slot in use is refused; a slot unbound can be bound anew", KEEPS_SLOT),
    (cases::MOVED, KEEPS_SLOT),
    ("unbinding frees no page and changes none", KEEPS_SLOT),
    ("a guest's access to a slot that is gone comes to the VMM, unbound", KEEPS_SLOT),
    ("neighbouring slots are done in one go, a gap between them ends it", KEEPS_SLOT),
    ("a slot deleted meanwhile ends it early, or in an error; none hangs", KEEPS_SLOT),
    ("touches of the same pages by many threads are all answered", GUEST_FREES),
    (cases::AUDIT, GUEST_FREES),
    ("what becomes of other pages meanwhile leaves none of it undone", GUEST_FREES),
    (
        "while a guest runs and converts, it sees no wrong byte and the host no page late",
        GUEST_FREES,
    ),
    (cases::FAILED_STOPS, GUEST_FREES),
    ("what a device has mapped is not discarded, and the device is named", GUEST_FREES),
    ("before allocation: it is recorded, and nothing is allocated", HAS),
    ("the other pages convert singly, and all after the unpin", GUEST_CONVERTS),
    ("a request across two slots is all or nothing", GUEST_CONVERTS),
    ("a range that is busy is refused, where the caller won't wait", GUEST_CONVERTS),
    ("touches meanwhile see right bytes or are denied; none maps late", GUEST_CONVERTS),
    ("contents zeroed are zeros for the guest, too", ITS_OWN),
    ("contents of pages that are so already are not zeroed", ITS_OWN),
    ("discards meanwhile leave zeros", GUEST_FREES),
    ("discards meanwhile leave zeros, also while others are owed", GUEST_FREES),
    (
        "while others are owed, a guest's first touches of what was prefaulted come to nobody",
        GUEST_FREES,
    ),
];
