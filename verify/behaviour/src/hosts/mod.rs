//! The hosts: what each gives to the cases, and which cases are not applicable to it.

mod guest_memfd;
mod machine;
mod memfd;

use polder::{Memory, PageSize, Platform};
use polder_vmm::GuestRoot;

use crate::cases::STARTED;
use crate::{Host, Section, cases};

/// A row and why it is not applicable.
type Reason = (&'static str, &'static str);

const KERNEL_MOVES: &str = "where pages lie is the kernel's affair on this host";
const NO_DEVICE: &str =
    "no device with an IOMMU is to be had here: what a domain is told is another row";
const EVERY_SIZE: &str =
    "rows about huge pages run on every page size: see the host's first column";
const NO_FLAG: &str =
    "the kernel's interface has no flag for huge pages: see the host's first column";
const WRITES_ZEROS: &str =
    "what is discarded of a huge page is written with zeros: that frees none";
const BY_HUGE_PAGE: &str = "a source brings all of the huge page that a touch lies in";
const BROUGHT: &str = "what is owed of a huge page is brought with all of it, and a row would bring 1G: \
    `polder run --from` into a page of 1G does, in the lab; see the column of 2M";

/// What holds of huge pages, transparent or reserved.
const HUGE: &[Reason] = &[
    ("contents become zeros in every view, and memory is freed", WRITES_ZEROS),
    ("a touch by any view brings its page, whole", BY_HUGE_PAGE),
    ("guest and host that touch one page have it read once", BY_HUGE_PAGE),
    ("with read-ahead off, what nobody touches is not read", BY_HUGE_PAGE),
    ("while a source does not answer, other faults are", BY_HUGE_PAGE),
    ("a touch in a huge page brings all of it, whole, by any view", EVERY_SIZE),
    ("a huge page with a page that can't be read is denied, or that page", EVERY_SIZE),
    ("a huge page that is discarded, or a part of it, is not read", EVERY_SIZE),
    ("a huge page that is being read can be discarded, and is zeros", EVERY_SIZE),
    ("nobody sees a torn huge page while a source fills it", EVERY_SIZE),
];

/// Why the dirty log's rows do not run on pages of 1G.
const LOGGED_BY_4K: &str = "the log is of 4K pages, whatever memory is of: see the columns of 2M";

/// The rows about the dirty log, of memory that has none: all but that it is refused.
fn no_dirty_log() -> impl Iterator<Item = Reason> {
    const NONE: &str = "there is no dirty log of such memory: see the section's first row";
    let rows = cases().filter(|case| case.section == Section::DirtyLog);
    rows.filter(|case| case.name != STARTED).map(|case| (case.name, NONE))
}

/// How often a run is looked at before it counts as hung; some twenty times a second.
const LOOKS: u32 = 20 * 30;

const MEMFD: &dyn Host = &memfd::Memfd { size: PageSize::Small };

/// The columns of the table, in order.
pub fn hosts() -> &'static [&'static dyn Host] {
    const PLAIN: &dyn Host = &machine::Machine::new(Platform::Plain);
    const PROTECTED: &dyn Host = &machine::Machine::new(Platform::SwProtected);
    const SNP: &dyn Host = &machine::Machine::new(Platform::Snp);
    const PKVM: &dyn Host = &machine::Machine::new(Platform::Pkvm);
    const SHADOW: &dyn Host = &machine::Machine::on(GuestRoot::Shadow);
    const NESTED: &dyn Host = &machine::Machine::on(GuestRoot::Nested);
    const THP: &dyn Host = &memfd::Memfd { size: PageSize::Thp };
    const HUGETLB: &dyn Host = &memfd::Memfd { size: PageSize::Huge2M };
    const GIGANTIC: &dyn Host = &memfd::Memfd { size: PageSize::Huge1G };
    const MACHINE_2M: &dyn Host = &machine::Machine::of(PageSize::Huge2M);
    const MACHINE_1G: &dyn Host = &machine::Machine::of(PageSize::Huge1G);
    &[
        MEMFD,
        THP,
        HUGETLB,
        GIGANTIC,
        &guest_memfd::GuestMemfd,
        PLAIN,
        MACHINE_2M,
        MACHINE_1G,
        PROTECTED,
        SNP,
        PKVM,
        SHADOW,
        NESTED,
    ]
}

/// The simulated machine with memory that `plant` plants a bug into as soon as it is made: no
/// column of the table, but what its rows are tried on.
pub fn planted(platform: Platform, plant: impl Fn(&Memory) + Sync + 'static) -> &'static dyn Host {
    let plant: &'static _ = Box::leak(Box::new(plant));
    Box::leak(Box::new(machine::Machine { plant: Some(plant), ..machine::Machine::new(platform) }))
}
