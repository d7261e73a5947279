//! What programs are made without, because a host does not offer it, or means something else by it.
//!
//! Each row has a scenario that passes on the machine and shows on the other host why the row is
//! there; a test plays them. A row that is not true any more fails, and can go.

use polder::HostKind;

/// Something that scenarios can say.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
#[expect(missing_docs, reason = "the table says what each is")]
pub enum Feature {
    Process,
    Kernel,
    Refer,
    Audit,
    Snp,
    PartOfWord,
    AccessAs,
    Preserve,
    Unspecified,
    Owed,
    SecondVm,
}

/// A row: what is left out where this host is among those that are compared.
#[derive(Clone, Copy, Debug)]
pub struct LeftOut {
    /// What.
    pub feature: Feature,
    /// What that is, in words.
    pub what: &'static str,
    /// The host.
    pub host: HostKind,
    /// Why.
    pub why: &'static str,
    /// A scenario, but for its `hosts`: it passes on the machine.
    pub scenario: &'static str,
    /// What is said of it on the host.
    pub says: &'static str,
}

use HostKind::{GuestMemfd, Memfd};

const OUTSIDE: &str = "it is the kernel's own affair, and can't be done from outside of it";
const ON_KVM: &str = "host memfd can't do this step";

/// Every row. What host `memfd` does not offer, `guest_memfd` does not either.
pub const LEFT_OUT: &[LeftOut] = &[
    LeftOut {
        feature: Feature::Process,
        what: "another process's mapping",
        host: Memfd,
        why: OUTSIDE,
        scenario: "[memory]\npages = 2\n[[step]]\nactor = \"process\"\ndo = \"read\"\npage = 0\n",
        says: ON_KVM,
    },
    LeftOut {
        feature: Feature::Kernel,
        what: "steps of the kernel's",
        host: Memfd,
        why: OUTSIDE,
        scenario: "[memory]\npages = 2\n[[step]]\nactor = \"kernel\"\ndo = \"allocate\"\npage = 0\n\
                   level = \"4K\"\n",
        says: ON_KVM,
    },
    LeftOut {
        feature: Feature::Refer,
        what: "references that Polder is not told of (refer, gup-fast)",
        host: Memfd,
        why: "nobody can see them on a real kernel from outside (docs/memfd.md)",
        scenario: "[memory]\npages = 2\nstarts = \"shared\"\n[[step]]\nactor = \"device\"\n\
                   do = \"refer\"\npage = 0\nexpect = \"not-pinned\"\n",
        says: ON_KVM,
    },
    LeftOut {
        feature: Feature::Audit,
        what: "the machine's audit and page tables",
        host: Memfd,
        why: "nobody can audit a real kernel",
        scenario: "[memory]\npages = 2\n[[step]]\ndo = \"audit\"\n",
        says: ON_KVM,
    },
    LeftOut {
        feature: Feature::Snp,
        what: "SNP guests",
        host: Memfd,
        why: "SEV-SNP is modelled on the machine alone",
        scenario: "[memory]\npages = 2\nplatform = \"snp\"\n[[step]]\nactor = \"vmm\"\n\
                   do = \"convert\"\npage = 0\nto = \"shared\"\n",
        says: "SEV-SNP is offered on the simulated machine only",
    },
    LeftOut {
        feature: Feature::PartOfWord,
        what: "a guest's access to a part of a word",
        host: Memfd,
        why: "on KVM a guest's program accesses whole words",
        scenario: "[memory]\npages = 2\n[[step]]\nactor = \"guest\"\ndo = \"read\"\npage = 0\n\
                   at = 1\n",
        says: "on KVM a guest accesses whole words",
    },
    LeftOut {
        feature: Feature::AccessAs,
        what: "a guest of a software-protected VM that accesses memory",
        host: Memfd,
        why: "memory on a memfd is an ordinary VM's: an access is of no kind, and never the wrong",
        scenario: "[memory]\npages = 2\nplatform = \"sw-protected\"\n[[step]]\nactor = \"guest\"\n\
                   do = \"read\"\npage = 0\nas = \"shared\"\nexpect = \"mismatch\"\n",
        says: "\"mismatch\" was expected",
    },
    LeftOut {
        feature: Feature::Preserve,
        what: "conversions that keep contents",
        host: GuestMemfd,
        why: "two pools: nothing is converted in place",
        scenario: "[memory]\npages = 2\n[[step]]\nactor = \"vmm\"\ndo = \"convert\"\npage = 0\n\
                   to = \"shared\"\ncontents = \"preserve\"\n",
        says: "contents",
    },
    LeftOut {
        feature: Feature::Unspecified,
        what: "conversions with contents unspecified",
        host: GuestMemfd,
        why: "in place they stay, and in two pools they are lost: either is right",
        scenario: "[memory]\npages = 2\nstarts = \"shared\"\n[[step]]\nactor = \"device\"\n\
                   do = \"write\"\npage = 0\nbytes = \"12345678\"\n[[step]]\nactor = \"vmm\"\n\
                   do = \"convert\"\npage = 0\nto = \"private\"\n[[step]]\nactor = \"guest\"\n\
                   do = \"read\"\npage = 0\nexpect = { bytes = \"12345678\" }\n",
        says: "zeros",
    },
    LeftOut {
        feature: Feature::Owed,
        what: "contents that are owed",
        host: GuestMemfd,
        why: "no kernel lets a userfaultfd watch a guest_memfd",
        scenario: "[memory]\npages = 2\nowed = true\n[[step]]\nactor = \"vmm\"\ndo = \"settle\"\n",
        says: "contents can't be owed on host guest_memfd",
    },
    LeftOut {
        feature: Feature::SecondVm,
        what: "a second VM",
        host: GuestMemfd,
        why: "a guest_memfd belongs to one VM",
        scenario: "[memory]\npages = 2\n[[vm]]\nname = \"one\"\n[[vm]]\nname = \"two\"\n[[step]]\n\
                   actor = \"vmm\"\ndo = \"settle\"\n",
        says: "this memory belongs to one VM",
    },
];

/// Whether programs for these hosts are made without something.
pub(crate) fn is_left_out(feature: Feature, hosts: &[HostKind]) -> bool {
    let real = hosts.iter().any(|host| *host != HostKind::Machine);
    LEFT_OUT.iter().filter(|row| row.feature == feature).any(|row| match row.host {
        Memfd => real,
        host => hosts.contains(&host),
    })
}
