//! The words of a scenario: who acts, what he does, what comes of it.

use std::fmt;

use Kind::{Device, Guest, Kernel, Process, Vmm};

/// What an actor is.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Kind {
    /// A vCPU of a guest: its accesses, and what it asks the VMM for.
    Guest,
    /// A thread of the VMM, by Polder's API.
    Vmm,
    /// A device model, by the host view; or the kernel on its behalf.
    Device,
    /// Another process, by a mapping of its own of the same memory.
    Process,
    /// The kernel that is the hypervisor, by the machine's own steps and instructions.
    Kernel,
}

impl Kind {
    /// Every kind.
    pub const ALL: [Self; 5] = [Guest, Vmm, Device, Process, Kernel];

    /// Its name, which is also that of an actor who need not be declared.
    pub const fn name(self) -> &'static str {
        match self {
            Guest => "guest",
            Vmm => "vmm",
            Device => "device",
            Process => "process",
            Kernel => "kernel",
        }
    }

    /// Whether only the simulated machine has it.
    pub const fn is_simulated(self) -> bool {
        matches!(self, Process | Kernel)
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

macro_rules! outcomes {
    ($($variant:ident $name:literal $what:literal,)*) => {
        /// What a step comes to, in a word.
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
        pub enum Is { $(#[doc = $what] $variant,)* }

        impl Is {
            /// Every word, with what it says.
            pub const ALL: &'static [(Self, &'static str, &'static str)] =
                &[$((Self::$variant, $name, $what),)*];
        }
    };
}

outcomes! {
    Ok "ok" "It is done.",
    Held "held" "It has stopped where it was to be held.",
    Waits "waits" "It waits for what somebody else holds.",
    Denied "denied" "A touch of the host view met SIGBUS.",
    Range "range" "Refused: no range at all.",
    Beyond "beyond" "Refused: past the end of the memory.",
    Unbound "unbound" "Refused, or the guest's exit: no slot has the guest frame.",
    Busy "busy" "Refused: an operation holds a page.",
    Pinned "pinned" "Refused: somebody pinned a page.",
    Referenced "referenced" "Refused: somebody unknown to Polder refers to a page.",
    Private "private" "Refused: a page is the guest's alone.",
    Owed "owed" "Refused: a page's contents have not arrived.",
    SourceFailed "source-failed" "Refused, or the guest's exit: a page's contents did not come.",
    Whole "whole" "Refused: nothing is owed there.",
    Quarantined "quarantined" "Refused, or the guest's exit: the page is in quarantine.",
    Contents "contents" "Refused: the contents can't be treated so.",
    SlotTaken "slot-taken" "Refused: the slot is in use.",
    GfnsTaken "gfns-taken" "Refused: another slot has the guest frames.",
    PagesTaken "pages-taken" "Refused: another slot of the VM has the pages.",
    NoSuchSlot "no-such-slot" "Refused: there is no such slot.",
    NotOffered "not-offered" "The host can't do this.",
    Mismatch "mismatch" "The guest's exit: the page is of the other kind than the access.",
    Kicked "kicked" "The vCPU was told to stop.",
    NotPinned "not-pinned" "GUP got nothing: the page is not mapped, or no longer.",
    Stage2Fault "stage2-fault" "The access of a VM that the story looks after is not mapped.",
    RmpInUse "rmp-in-use" "The RMP refused: the entry is in use.",
    HypervisorOwned "hypervisor-owned" "The RMP refused: something of the page is assigned.",
    GuestOwned "guest-owned" "The RMP refused: the page is not this guest's.",
    ReverseMap "reverse-map" "The RMP refused: the page is the guest's at another gfn.",
    Immutable "immutable" "The RMP refused: the firmware has the page.",
    PageFault "page-fault" "The guest's own tables do not let the access through.",
    PageSize "page-size" "The RMP refused: stage 2 maps it at another size.",
    InstructionSize "instruction-size" "The RMP refused: 4K of what is a 2M entry.",
    NotValidated "not-validated" "The RMP refused: the guest has not validated the page.",
    FailInput "FAIL_INPUT" "An RMP instruction: an operand that can't be.",
    FailPermission "FAIL_PERMISSION" "An RMP instruction: the entry is immutable.",
    FailInUse "FAIL_INUSE" "An RMP instruction: another processor is at work on the entry.",
    FailOverlap "FAIL_OVERLAP" "An RMP instruction: 4K and 2M entries would overlap.",
    FailSizeMismatch "FAIL_SIZEMISMATCH" "An RMP instruction: 2M of what are 4K entries.",
    FailBadAddress "FAIL_BADADDR" "PSMASH: there is no 2M entry to smash.",
    Undefined "undefined" "An RMP instruction: SNP is not enabled here.",
    Firmware "firmware" "The firmware refused the command.",
    HostAbort "host-abort" "pKVM: the host's stage 2 has no such page; a process has SIGSEGV.",
    Iommu "iommu" "The IOMMU does not let the device through.",
    NoDirectMap "no-direct-map" "The kernel's direct map lacks the page.",
    NotAsked "not-asked" "pKVM: only the guest's own request changes that.",
    Launched "launched" "Refused: the guest has begun.",
    Unmovable "unmovable" "Refused: nobody can move a private page of this platform.",
    Eperm "EPERM" "A hypercall of pKVM's: the page is in another state.",
    Enoent "ENOENT" "A hypercall of pKVM's: the guest has no page there.",
    Ebusy "EBUSY" "A hypercall of pKVM's: the IOMMU maps the page for a device.",
    Enomem "ENOMEM" "A hypercall of pKVM's: the hypervisor has no memory for a table.",
    Locked "locked" "Somebody has the folio locked.",
    NotLocked "not-locked" "The folio is not locked by this actor.",
    Mapped "mapped" "A page is mapped, and may not be for this.",
    Hole "hole" "There is no memory behind the page.",
    Exists "exists" "It is there already.",
    Misaligned "misaligned" "The page is at no multiple of the level.",
    Scattered "scattered" "The frames are not one block.",
    TooLarge "too-large" "The level is above what folio, slot and alignment allow.",
    Stale "stale" "What was looked up has been taken away since.",
    NoMemory "no-memory" "There is no memory for it.",
    Discrepancy "discrepancy" "The machine's audit found what does not add up.",
    Differs "differs" "The pages are not as they are said to be.",
    Failed "failed" "It failed in another way, which the text tells.",
}

impl Is {
    /// Its name.
    pub fn name(self) -> &'static str {
        Self::ALL.iter().find(|(is, ..)| *is == self).map_or("", |(_, name, _)| name)
    }

    /// The one with this name.
    pub fn named(name: &str) -> Option<Self> {
        Self::ALL.iter().find(|(_, known, _)| *known == name).map(|(is, ..)| *is)
    }
}

impl fmt::Display for Is {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// A verb, as the documentation and the parser know it.
#[derive(Clone, Copy, Debug)]
pub struct VerbEntry {
    /// Its name.
    pub name: &'static str,
    /// Who can do it; nobody in particular if empty.
    pub who: &'static [Kind],
    /// The keys that it has to have. `page` stands for `page`, `pages` or `gpa` with `count`.
    pub needs: &'static [&'static str],
    /// The keys that it may have.
    pub may_have: &'static [&'static str],
    /// What it is.
    pub what: &'static str,
}

const fn verb(
    name: &'static str,
    who: &'static [Kind],
    needs: &'static [&'static str],
    may_have: &'static [&'static str],
    what: &'static str,
) -> VerbEntry {
    VerbEntry { name, who, needs, may_have, what }
}

/// Keys that every step may have.
pub(crate) const STEP_KEYS: [&str; 3] = ["actor", "do", "expect"];
/// Keys that name pages.
pub(crate) const PLACE_KEYS: [&str; 4] = ["page", "pages", "gpa", "count"];
/// What is said of pages.
pub(crate) const LOOK_KEYS: [&str; 10] = [
    "vm",
    "visibility",
    "population",
    "wanted",
    "host-view",
    "stage2",
    "accessed",
    "folio",
    "rmp",
    "validated",
];

/// Every verb.
pub const VERBS: &[VerbEntry] = &[
    verb(
        "convert",
        &[Vmm, Guest],
        &["page", "to"],
        &["contents", "wait", "hold"],
        "make pages private or shared; a guest asks the VMM, which does it",
    ),
    verb(
        "want",
        &[Vmm],
        &["page", "to"],
        &["vm"],
        "note what a VM wishes pages to be: nothing changes by it",
    ),
    verb("discard", &[Vmm], &["page"], &["hold"], "drop contents: zeros from now on"),
    verb("move", &[Vmm], &["page"], &["hold"], "put pages into other memory"),
    verb("preload", &[Vmm], &["page", "bytes"], &[], "bytes that the guest begins with"),
    verb("relinquish", &[Guest], &["page"], &[], "give pages back, as a balloon does"),
    verb("populate", &[Vmm], &["page", "bytes"], &["hold"], "bring contents that are owed"),
    verb("fail", &[Vmm], &["page"], &[], "say that owed contents will not come"),
    verb("settle", &[Vmm], &[], &[], "say that nothing more will come"),
    verb(
        "create",
        &[Vmm],
        &["huge-pages"],
        &["name"],
        "make another memory, of so many huge pages of the same pool",
    ),
    verb("drop", &[Vmm], &[], &["name"], "let go of such a memory"),
    verb("bind", &[Vmm], &["slot", "pages", "gpa"], &["vm"], "show pages to a VM, by a slot"),
    verb("unbind", &[Vmm], &["slot"], &["vm"], "take a slot away"),
    verb(
        "prefault",
        &[Vmm],
        &["page"],
        &["vm", "by"],
        "map pages for a vCPU before its guest touches them",
    ),
    verb(
        "pte",
        &[Guest],
        &["page"],
        &["present", "used"],
        "write the entries of its page tables for pages, and flush them: on the machine",
    ),
    verb(
        "read",
        &[Guest, Vmm, Device, Process],
        &["page"],
        &["at", "length", "as"],
        "guest: an access; vmm: a copy by the API; device: a touch of the host view; process: a \
         touch of its own mapping",
    ),
    verb(
        "write",
        &[Guest, Vmm, Device, Process],
        &["page", "bytes"],
        &["at", "as"],
        "the same, writing",
    ),
    verb(
        "pin",
        &[Vmm, Device],
        &["page"],
        &["name", "kind"],
        "pin pages by the API: they stay shared",
    ),
    verb("unpin", &[Vmm, Device], &[], &["name"], "give a pin back"),
    verb(
        "refer",
        &[Device, Process],
        &["page"],
        &["name", "kind", "of"],
        "have the kernel pin mapped pages, and Polder not know of it (vmsplice, direct I/O)",
    ),
    verb("release", &[Device, Process], &[], &["name"], "let go of what refer or gup-fast took"),
    verb(
        "gup-fast",
        &[Device, Process],
        &["page"],
        &["name"],
        "the next step of GUP-fast: read the entry, take a reference, look again",
    ),
    verb("pvalidate", &[Guest], &["page"], &["size", "validate"], "accept a page, or no longer"),
    verb("allocate", &[Kernel], &["page", "level"], &[], "put a folio behind pages"),
    verb("no-memory", &[Kernel], &[], &["after"], "have the next allocation of frames fail"),
    verb("lock", &[Kernel], &["page"], &[], "lock the folio of a page"),
    verb("unlock", &[Kernel], &["page"], &[], "unlock it"),
    verb(
        "split",
        &[Kernel],
        &["page"],
        &[],
        "split a folio that is locked into the next smaller ones",
    ),
    verb("merge", &[Kernel], &["page", "level"], &[], "merge folios into one (a collapse)"),
    verb("map", &[Kernel], &["page"], &["vm", "level"], "answer a stage-2 fault: map a page"),
    verb("zap", &[Kernel], &["page"], &["vm"], "take pages out of stage 2, and flush"),
    verb(
        "rmpupdate",
        &[Kernel],
        &["page", "assign"],
        &["vm", "size", "immutable"],
        "RMPUPDATE: give a page's frame to a guest, or take it back",
    ),
    verb("psmash", &[Kernel], &["page"], &[], "PSMASH: make 4K entries of a 2M entry"),
    verb("unsmash", &[Kernel], &["page"], &[], "the firmware's PAGE_UNSMASH"),
    verb("reclaim", &[Kernel], &["page"], &["size"], "the firmware's PAGE_RECLAIM"),
    verb(
        "rmp-hold",
        &[Kernel],
        &["page"],
        &["size"],
        "have an RMP entry in use, as another CPU has",
    ),
    verb("rmp-release", &[Kernel], &["page"], &[], "use it no longer"),
    verb(
        "resume",
        &Kind::ALL,
        &[],
        &["hold"],
        "go on with what the actor was held in, or waited in",
    ),
    verb("look", &[], &["page"], &LOOK_KEYS, "check what is so of pages"),
    verb(
        "explain",
        &[],
        &["page"],
        &[],
        "tell all that is known of the first page, and why it is so, as `polder explain` does",
    ),
    verb("pool", &[], &[], &[], "tell what the pool of huge pages has"),
    verb("audit", &[], &[], &[], "check that everything on the machine adds up"),
];

/// The name of `known` that somebody may have meant by `text`.
pub(crate) fn nearest<'a>(text: &str, known: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    let text: Vec<char> = text.chars().take(64).flat_map(char::to_lowercase).collect();
    let far = |name: &str| distance(&text, &name.to_lowercase().chars().collect::<Vec<_>>());
    let near = known.into_iter().map(|name| (far(name), name)).min()?;
    (near.0 <= 1 + text.len() / 4).then_some(near.1)
}

/// How many letters are to be put in, taken out or changed.
fn distance(from: &[char], to: &[char]) -> usize {
    let mut row: Vec<usize> = (0..=to.len()).collect();
    for (i, a) in from.iter().enumerate() {
        let mut corner = i;
        row[0] = i + 1;
        for (j, b) in to.iter().enumerate() {
            let changed = corner + usize::from(a != b);
            corner = row[j + 1];
            row[j + 1] = changed.min(row[j] + 1).min(corner + 1);
        }
    }
    row[to.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_meant_is_what_is_nearest() {
        let verbs = || VERBS.iter().map(|verb| verb.name);
        assert_eq!(nearest("conver", verbs()), Some("convert"));
        assert_eq!(nearest("Pin", verbs()), Some("pin"));
        assert_eq!(nearest("rmp_update", verbs()), Some("rmpupdate"));
        assert_eq!(nearest("hovercraft", verbs()), None);
    }

    #[test]
    fn no_two_words_are_the_same() {
        let mut names: Vec<_> = Is::ALL.iter().map(|(_, name, _)| *name).collect();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), Is::ALL.len());
    }
}
