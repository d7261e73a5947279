//! Faults and their answers.
//!
//! An answer is claimed: the engine gives it, the driver carries it out by one system call, the
//! engine takes it back. An operation waits for the answers in flight on its pages and no new ones
//! are given there, so no answer that was right when it was given takes effect when it is wrong.

use core::fmt;

use polder_units::{Gfn, GfnRange, Level, PageIndex, PageRange};

use crate::plant::Bug;
use crate::{Blocked, Engine, Limit, Operation, PageFacts, Population, Undoing, Visibility, VmId};

/// An answer or copy that was given and not taken back yet.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
#[cfg_attr(not(feature = "explore"), expect(unreachable_pub, reason = "the search's alone"))]
pub struct InFlight {
    id: u64,
    range: PageRange,
}

impl InFlight {
    pub(crate) fn range(&self) -> PageRange {
        self.range
    }

    #[cfg(feature = "explore")]
    pub(crate) fn id(self) -> u64 {
        self.id
    }
}

/// What to do about a fault.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Response {
    /// Map the pages.
    Map,
    /// Poison the page: the toucher gets a SIGBUS.
    Poison,
}

/// An answer to carry out on its pages. It is to be given back by [`Engine::answered`].
#[must_use = "operations wait until it is given back"]
#[derive(PartialEq, Eq, Debug)]
#[cfg_attr(feature = "explore", derive(Clone, Copy))]
pub struct Answer {
    view: View,
    pub(crate) in_flight: InFlight,
    response: Response,
}

impl Answer {
    /// The pages.
    pub fn range(&self) -> PageRange {
        self.in_flight.range
    }

    /// Where to do it.
    pub fn view(&self) -> View {
        self.view
    }

    /// What to do on them.
    pub fn response(&self) -> Response {
        self.response
    }
}

/// Through which mapping of the object a touch came.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum View {
    /// What device models have pointers into.
    Host,
    /// What a VM's slots show. Touches of it are told to the driver only while something is
    /// owed, or where a page is in quarantine.
    Guest,
}

/// How a touch of a view is answered.
#[derive(Debug)]
pub enum TouchAnswer {
    /// So.
    Now(Answer),
    /// Not yet: ask again when an operation has ended.
    Wait,
    /// Not yet: the page's contents are owed. Have them brought, if there is a source, and ask
    /// again when an operation has ended.
    Owed,
    /// Not yet: undo this operation, then ask again.
    Undo(Operation<Undoing>),
}

/// A guest's access, as far as its answer depends on it.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct GuestAccess {
    /// The frame accessed.
    pub gfn: Gfn,
    /// Whether as private or as shared memory. Of no meaning where the platform doesn't tell
    /// them apart.
    pub visibility: Visibility,
}

/// Why a guest's access ends in the VMM (`KVM_EXIT_MEMORY_FAULT`).
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum MemoryFault {
    /// No binding covers the frame.
    Unbound(GfnRange),
    /// The access was of one kind, what is granted is the other.
    Mismatch {
        /// The frame.
        gfns: GfnRange,
        /// What the access was.
        wanted: Visibility,
    },
    /// The page is in quarantine.
    Quarantined(GfnRange),
    /// The page's contents were to come, and did not.
    SourceFailed(GfnRange),
}

impl fmt::Display for MemoryFault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unbound(gfns) => write!(f, "guest frames {gfns} are not bound to memory"),
            Self::Mismatch { gfns, wanted } => {
                write!(f, "guest frames {gfns} are {}, not {wanted}", wanted.other())
            }
            Self::Quarantined(gfns) => write!(f, "guest frames {gfns} are in quarantine"),
            Self::SourceFailed(gfns) => {
                write!(f, "the contents of guest frames {gfns} could not be brought")
            }
        }
    }
}

/// How a guest's fault is answered.
#[derive(Debug)]
pub enum GuestAnswer {
    /// Carry this out. Of a fault of stage 2: map the page around it, or as large a part of it as
    /// folio and RMP allow.
    Now(Answer),
    /// Exit to the VMM.
    Exit(MemoryFault),
    /// Not yet: ask again when an operation has ended.
    Wait,
    /// Not yet: the contents of this page are owed. Have them brought, if there is a source, and
    /// ask again when an operation has ended.
    Owed(PageIndex),
    /// Not yet: undo this operation, then ask again.
    Undo(Operation<Undoing>),
}

impl Engine {
    /// Answers a touch of `page`, which must lie in the object, through one of its mappings.
    pub fn touch(&mut self, view: View, page: PageIndex) -> TouchAnswer {
        // Its granule is mapped, poisoned and waited for as a whole.
        let around = self.granules(PageRange::one(page));
        match self.check_claims(around) {
            Ok(()) => {}
            Err(Blocked::Abandoned(operation)) => return TouchAnswer::Undo(operation),
            Err(_) if view == View::Host && self.plants.has(Bug::DeniedWhileClaimed) => {
                let page = PageRange::one(page);
                return TouchAnswer::Now(self.answer(view, page, Response::Poison));
            }
            Err(_) if self.plants.has(Bug::OneTableUnclaimed) => {}
            Err(_) => return TouchAnswer::Wait,
        }
        let private = |facts: PageFacts| facts.visibility == Visibility::Private;
        let is_private = view == View::Host && self.first_page(around, private).is_some();
        if is_private
            || self.quarantine.first_in(around).is_some()
            || self.failed.first_in(around).is_some()
        {
            return TouchAnswer::Now(self.answer(view, around, Response::Poison));
        }
        let owed = |facts: PageFacts| facts.population == Population::Owed;
        if self.first_page(around, owed).is_some() && !self.plants.has(Bug::OwedShown) {
            return TouchAnswer::Owed;
        }
        match view {
            View::Host => TouchAnswer::Now(self.map_around(view, page, Level::Size1G)),
            // A view of 4K pages is watched page by page.
            View::Guest => TouchAnswer::Now(self.answer(view, around, Response::Map)),
        }
    }

    /// Whether a touch of the host view would be let through as things are, or would wait.
    pub fn is_shown(&self, page: PageIndex) -> bool {
        if self.check_bounds(PageRange::one(page)).is_err() {
            return false;
        }
        let around = self.granules(PageRange::one(page));
        let private = |facts: PageFacts| facts.visibility == Visibility::Private;
        self.first_page(around, private).is_none()
            && self.quarantine.first_in(around).is_none()
            && self.failed.first_in(around).is_none()
    }

    /// Answers an access of a guest that its stage-2 tables don't let through.
    pub fn guest_fault(&mut self, vm: VmId, access: GuestAccess) -> GuestAnswer {
        let gfns = GfnRange::one(access.gfn);
        let Some((page, mut bound)) = self.bindings.page_of(vm, access.gfn, self.config.geometry)
        else {
            return GuestAnswer::Exit(MemoryFault::Unbound(gfns));
        };
        match self.check_claims(PageRange::one(page)) {
            Ok(()) => {}
            Err(Blocked::Abandoned(operation)) => return GuestAnswer::Undo(operation),
            Err(_) if self.plants.has(Bug::OneTableUnclaimed) => {}
            Err(_) => return GuestAnswer::Wait,
        }
        if self.quarantine.contains(page) {
            return GuestAnswer::Exit(MemoryFault::Quarantined(gfns));
        }
        let facts = self.pages.get(page);
        let wanted = access.visibility;
        if self.config.platform.tells_accesses_apart() && facts.visibility != wanted {
            return GuestAnswer::Exit(MemoryFault::Mismatch { gfns, wanted });
        }
        if self.failed.contains(page) {
            return GuestAnswer::Exit(MemoryFault::SourceFailed(gfns));
        }
        if facts.population == Population::Owed {
            return GuestAnswer::Owed(page);
        }
        if self.plants.has(Bug::NoFit) {
            bound = Level::Size1G;
        }
        GuestAnswer::Now(self.map_around(View::Guest, page, bound))
    }

    /// Takes an answer back. `done` is what was done in fact: nothing, and then the fault comes
    /// again; or poison where mapping failed for want of memory, as the kernel does it itself.
    pub fn answered(&mut self, answer: Answer, done: Option<Response>) {
        self.land(&answer.in_flight);
        if done == Some(Response::Poison) {
            self.markers[answer.view as usize].insert(answer.range());
        }
    }

    /// Maps as much around `page` as can be, at `bound` at most (INV-5). What the hardware has of
    /// it the host looks up.
    fn map_around(&mut self, view: View, page: PageIndex, bound: Level) -> Answer {
        let limits = self.limits_within(view, page, bound);
        let level = match self.plants.has(Bug::StaleLevel) {
            true => limits.of(Limit::Folio).min(limits.of(Limit::Binding)),
            false => limits.level(),
        };
        let range = PageRange::enclosing(page, level, self.config.geometry);
        self.answer(view, range, Response::Map)
    }

    /// Whether the host view holds a marker in place of a page of `range`, or is about to.
    pub(crate) fn may_have_markers(&self, range: PageRange) -> bool {
        if self.plants.has(Bug::MarkersForgotten) {
            return false;
        }
        self.markers[View::Host as usize].first_in(range).is_some()
            || self.in_flight.iter().any(|one| one.range.overlaps(range))
    }

    pub(crate) fn answer(&mut self, view: View, range: PageRange, response: Response) -> Answer {
        Answer { view, in_flight: self.take_off(range), response }
    }

    pub(crate) fn take_off(&mut self, range: PageRange) -> InFlight {
        let in_flight = InFlight { id: self.next_id(), range };
        self.in_flight.push(in_flight);
        in_flight
    }

    pub(crate) fn land(&mut self, in_flight: &InFlight) {
        let at = self.in_flight.iter().position(|other| other.id == in_flight.id);
        self.in_flight.swap_remove(at.expect("it is given back once"));
    }
}
