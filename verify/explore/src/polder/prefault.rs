//! Prefault: `Memory::prefault` (`polder/src/prefault.rs`), `Driver::prefault_frames`,
//! `MachineHost::show_all`.
//!
//! A call goes hold by hold: it takes the lock of the slots, claims the pages from the first that
//! is left as far as they are alike, maps each of them, gives the claim back. What it says of how
//! far it came is compared with what stage 2 was seen to have (INV-11).

use polder_explored_engine::{Answer, Blocked, Refusal, Response, Visibility};
use polder_machine::{Error, Resolved, Touch};
use polder_units::{GfnRange, Level, PageRange};

use super::act::{Act, Done};
use super::check::broken;
use super::kept::{Pages, one, range, set};
use super::{Slip, Stage, Task, VM, World};
use crate::system::Violation;

/// In the middle of a prefault.
#[derive(Clone, Copy)]
pub(super) struct Ahead {
    /// The first page that is not reported as done.
    pub(super) next: u8,
    pub(super) step: Step,
}

#[derive(Clone, Copy)]
#[expect(clippy::large_enum_variant, reason = "a state is copied as a whole: no boxes")]
pub(super) enum Step {
    /// It holds nothing.
    Between,
    /// It holds the lock of the slots, and waits for an operation on the page.
    Waits,
    /// It has claimed pages, and is about to map this one, first seeing to its memory.
    Allocate(Hold),
    /// The page is copied first, as a write would have it: a bug.
    Copy(Hold),
    Resolve(Hold),
    /// With whether nothing was invalidated since.
    Map(Hold, Resolved, bool),
    /// With whether all went well.
    Give(Hold, bool),
}

/// Pages that it has claimed.
#[derive(Clone, Copy)]
pub(super) struct Hold {
    pub(super) answer: Answer,
    /// Those of them that were asked for end here.
    pub(super) end: u8,
    /// The page that it is at.
    pub(super) at: u8,
    /// Those that stage 2 was seen to have.
    pub(super) seen: Pages,
}

impl Ahead {
    pub(super) fn hold(&self) -> Option<Hold> {
        match self.step {
            Step::Between | Step::Waits => None,
            Step::Allocate(hold) | Step::Copy(hold) | Step::Resolve(hold) => Some(hold),
            Step::Map(hold, ..) | Step::Give(hold, _) => Some(hold),
        }
    }
}

impl World {
    /// Whether a prefault has the lock of the slots, which a slot's deletion waits for.
    pub(super) fn slots_are_read(&self) -> bool {
        let reads = |stage: Stage| match stage {
            Stage::Ahead(ahead) => !matches!(ahead.step, Step::Between),
            _ => false,
        };
        !self.setup.slips(Slip::DeletedSlotSpins)
            && self.actors.iter().any(|actor| reads(actor.stage))
    }

    /// Whether slots are being changed, which a prefault waits for.
    fn slots_change(&self) -> bool {
        let changes = |stage| matches!(stage, Stage::Unbinding | Stage::Binding);
        !self.setup.slips(Slip::DeletedSlotSpins)
            && self.actors.iter().any(|actor| changes(actor.stage))
    }

    /// The ways that a prefault can go on by.
    pub(super) fn ways_ahead(&self, ahead: Ahead) -> u8 {
        match ahead.step {
            Step::Between => u8::from(!self.slots_change()),
            Step::Waits => u8::from(self.engine.busy & 1 << ahead.next == 0),
            Step::Allocate(hold) if self.failures > 0 && self.has_hole(one(hold.at)) => 2,
            _ => 1,
        }
    }

    pub(super) fn prefault(
        &mut self,
        actor: usize,
        ahead: Ahead,
        way: u8,
    ) -> Result<(), Violation> {
        let go = |step| Ahead { step, ..ahead };
        match ahead.step {
            Step::Between | Step::Waits => self.claim_ahead(actor, ahead),
            Step::Allocate(hold) if way == 1 => {
                self.failures -= 1;
                self.say(|| format!("finds no memory for page {}", hold.at));
                self.stopped_ahead(actor, ahead, hold);
                Ok(())
            }
            Step::Allocate(hold) => self.allocate_ahead(actor, ahead, hold),
            Step::Copy(hold) => {
                self.act(Act::Unshare(one(hold.at).start())).well();
                self.say(|| format!("has a copy of page {} made", hold.at));
                self.go(actor, Stage::Ahead(go(Step::Resolve(hold))));
                Ok(())
            }
            Step::Resolve(hold) => self.resolve_ahead(actor, ahead, hold),
            Step::Map(hold, resolved, current) => {
                self.map_ahead(actor, ahead, hold, (resolved, current))
            }
            Step::Give(hold, well) => self.give_ahead(actor, ahead, hold, well),
        }
    }

    fn end_of(&self, actor: usize) -> u8 {
        match self.task(actor) {
            Some(Task::Prefault { end, .. }) => end,
            task => unreachable!("no prefault: {task:?}"),
        }
    }

    /// Takes the lock of the slots, and claims what is left as far as it is alike.
    fn claim_ahead(&mut self, actor: usize, ahead: Ahead) -> Result<(), Violation> {
        let start = self.setup.gfn(ahead.next);
        let count = u64::from(self.end_of(actor) - ahead.next);
        let gfns = GfnRange::between(start.get(), start.get() + count).expect("a few frames");
        match self.engine(|engine| engine.prefault(VM, gfns, gfns.count())) {
            Ok((answer, run, visibility)) => {
                let pages = range(ahead.next, ahead.next + small(run.count().get()));
                self.say(|| format!("may map pages {pages} ahead, as {visibility}"));
                self.check_ahead(&answer, pages, visibility)?;
                let (end, at) = (small(pages.end()), ahead.next);
                let hold = Hold { answer, end, at, seen: 0 };
                self.go(actor, Stage::Ahead(Ahead { step: Step::Allocate(hold), ..ahead }));
                Ok(())
            }
            Err(Blocked::Busy(_)) => {
                self.say(|| format!("has to wait for page {}", ahead.next));
                self.go(actor, Stage::Ahead(Ahead { step: Step::Waits, ..ahead }));
                Ok(())
            }
            Err(Blocked::Abandoned(operation)) => {
                self.say(|| "meets an operation that nobody drives, and undoes it".into());
                self.begin_undo(actor, operation, false)
            }
            Err(Blocked::Refused(refusal)) => {
                let spins = self.setup.slips(Slip::DeletedSlotSpins);
                if let (true, Refusal::NoSlot { .. }) = (spins, &refusal) {
                    self.say(|| "finds the slot gone, and looks again".into());
                    return Ok(());
                }
                self.say(|| format!("ends at page {}: {refusal}", ahead.next));
                self.done(actor);
                self.check_end_ahead(ahead.next, &refusal)
            }
        }
    }

    fn allocate_ahead(&mut self, actor: usize, ahead: Ahead, hold: Hold) -> Result<(), Violation> {
        let Some(_) = self.ours(&hold.answer, self.setup.gfn(hold.at)) else {
            return self.moved_ahead(actor, ahead, hold);
        };
        if self.has_hole(one(hold.at)) {
            self.say(|| format!("has memory for page {}", hold.at));
            self.allocate(one(hold.at))?;
        } else {
            self.say(|| format!("finds memory of page {}", hold.at));
        }
        self.take_off_direct_map(one(hold.at));
        let copies = self.setup.slips(Slip::PrefaultCopies);
        let step = if copies { Step::Copy(hold) } else { Step::Resolve(hold) };
        self.go(actor, Stage::Ahead(Ahead { step, ..ahead }));
        Ok(())
    }

    fn resolve_ahead(&mut self, actor: usize, ahead: Ahead, hold: Hold) -> Result<(), Violation> {
        let (gfn, vcpu) = (self.setup.gfn(hold.at), self.parts.vcpu(0));
        let found = self.machine.machine.resolve(vcpu, gfn.get(), Touch::Prefault);
        match found {
            Ok(resolved) if hold.answer.range().contains(resolved.bound().page) => {
                self.say(|| format!("finds gfn {gfn} in pfn {}", resolved.pfn()));
                let step = Step::Map(hold, resolved.detached(), true);
                self.go(actor, Stage::Ahead(Ahead { step, ..ahead }));
                Ok(())
            }
            _ => self.moved_ahead(actor, ahead, hold),
        }
    }

    /// The frame shows something else by now: the slot was deleted.
    fn moved_ahead(&mut self, actor: usize, ahead: Ahead, hold: Hold) -> Result<(), Violation> {
        let gfn = self.setup.gfn(hold.at);
        if self.setup.slips(Slip::DeletedSlotSpins) {
            self.say(|| format!("finds nothing at gfn {gfn} any more, and looks again"));
            self.go(actor, Stage::Ahead(Ahead { step: Step::Allocate(hold), ..ahead }));
            return Ok(());
        }
        self.stopped_ahead(actor, ahead, hold);
        broken("INV-11", format!("the slot at gfn {gfn} has gone amid a prefault"))
    }

    fn map_ahead(
        &mut self,
        actor: usize,
        ahead: Ahead,
        mut hold: Hold,
        (resolved, current): (Resolved, bool),
    ) -> Result<(), Violation> {
        let unchecked = matches!(self.setup.bug, Some(super::Bug::Machine(_)));
        if !unchecked && !current {
            self.say(|| "finds that it was invalidated meanwhile".into());
            self.go(actor, Stage::Ahead(Ahead { step: Step::Allocate(hold), ..ahead }));
            return Ok(());
        }
        let asked = self.level_ahead(hold, &resolved);
        let level = match self.act(Act::MapGuest(resolved, asked, current)) {
            Done::Mapped(level) => level,
            Done::Refused(Error::Stale { .. }) => {
                self.go(actor, Stage::Ahead(Ahead { step: Step::Allocate(hold), ..ahead }));
                return Ok(());
            }
            other => unreachable!("it is mapped, or stale: {other:?}"),
        };
        self.say(|| format!("has gfn {} mapped ahead at {level}", resolved.gfn()));
        let page = hold.at;
        let around =
            |level| PageRange::enclosing(u32::from(page).into(), level, self.setup.geometry);
        hold.at = small(around(level).end());
        // What a guest has had mapped before may be larger.
        let around = around(asked);
        hold.seen |= self.mapped_in(range(ahead.next, hold.end));
        let step = if hold.at < hold.end { Step::Allocate(hold) } else { Step::Give(hold, true) };
        self.go(actor, Stage::Ahead(Ahead { step, ..ahead }));
        let private = self.promised.private;
        let alike = [private, self.promised.owed].iter().all(|some| {
            let (here, pages) = (some & set(around), set(around));
            here == 0 || here == pages
        });
        let spte = self.machine.machine.spte(self.parts.vm, self.setup.gfn(page));
        match spte {
            _ if !alike || !self.slot_pages().contains_range(around) => broken(
                "INV-5",
                format!("page {page} is mapped ahead at {asked}, which does not fit"),
            ),
            Ok(Some(_)) => Ok(()),
            _ => broken("INV-11", format!("page {page} was mapped ahead, and is not mapped")),
        }
    }

    /// `MachineHost::level`, of the direct root.
    fn level_ahead(&self, hold: Hold, resolved: &Resolved) -> Level {
        let page = resolved.bound().page;
        let fits = |level: &Level| {
            let around = PageRange::enclosing(page, *level, self.setup.geometry);
            *level <= resolved.largest() && hold.answer.range().contains_range(around)
        };
        Level::ALL.into_iter().rfind(fits).unwrap_or(Level::Size4K)
    }

    /// It can't go on with a page: told at once if it is the first, and after the others else.
    fn stopped_ahead(&mut self, actor: usize, ahead: Ahead, hold: Hold) {
        let step = Step::Give(hold, hold.at > ahead.next);
        self.go(actor, Stage::Ahead(Ahead { step, ..ahead }));
    }

    /// Gives the claim back, lets go of the slots, and notes how far it came.
    fn give_ahead(
        &mut self,
        actor: usize,
        ahead: Ahead,
        hold: Hold,
        well: bool,
    ) -> Result<(), Violation> {
        let done = well.then_some(Response::Map);
        self.engine(|engine| engine.answered(hold.answer, done));
        let beyond = self.setup.slips(Slip::ProgressBeyond);
        let next = match well {
            _ if beyond => hold.end,
            true => hold.at.min(hold.end),
            false => ahead.next,
        };
        self.say(|| format!("gives the claim back, and is done up to page {next}"));
        if next == self.end_of(actor) || !well && !beyond {
            self.done(actor);
        } else {
            self.go(actor, Stage::Ahead(Ahead { next, step: Step::Between }));
        }
        let told = if next > ahead.next { set(range(ahead.next, next)) } else { 0 };
        match told & !hold.seen {
            0 => Ok(()),
            missing => {
                let what = format!("page {} counts as done", missing.trailing_zeros());
                broken("INV-11", format!("{what}, and was not mapped"))
            }
        }
    }

    /// The pages of a range that stage 2 has.
    fn mapped_in(&self, pages: PageRange) -> Pages {
        let machine = &self.machine.machine;
        let is_mapped = |page: u8| {
            machine.spte(self.parts.vm, self.setup.gfn(page)).is_ok_and(|spte| spte.is_some())
        };
        let all = small(pages.start().get())..small(pages.end());
        all.filter(|&page| is_mapped(page)).fold(0, |set, page| set | 1 << page)
    }

    /// What may be mapped ahead in one go, by what was promised and not by what the engine does.
    fn check_ahead(
        &self,
        answer: &Answer,
        pages: PageRange,
        visibility: Visibility,
    ) -> Result<(), Violation> {
        let (promised, all) = (&self.promised, set(answer.range()));
        if !answer.range().contains_range(pages) || !self.slot_pages().contains_range(pages) {
            return broken("INV-5", format!("pages {pages} are to be mapped ahead, unclaimed"));
        }
        let private = if visibility == Visibility::Private { all } else { 0 };
        if promised.private & all != private {
            return broken("INV-5", format!("pages {pages}, to be mapped ahead, are not alike"));
        }
        if (promised.owed | promised.quarantine | self.engine.held) & all != 0 {
            return broken(
                "INV-5",
                format!("pages {pages} are to be mapped ahead, and may not be"),
            );
        }
        Ok(())
    }

    /// A prefault has ended before a page: it has to be in the way.
    fn check_end_ahead(&self, page: u8, refusal: &Refusal) -> Result<(), Violation> {
        let (promised, bit) = (&self.promised, 1 << page);
        let right = match refusal {
            Refusal::NoSlot { .. } => !promised.bound || !set(self.slot_pages()) & bit != 0,
            Refusal::Owed { .. } => promised.owed & bit != 0,
            Refusal::Quarantined { .. } => promised.quarantine & bit != 0,
            _ => false,
        };
        if right { Ok(()) } else { broken("INV-11", format!("ended without reason: {refusal}")) }
    }

    /// What a guest has not touched is not called accessed; what nobody has written is not copied.
    pub(super) fn check_read_only(&self, accessed: Pages, apart: Pages) -> Result<(), Violation> {
        let accessed = accessed & !self.promised.used;
        if accessed != 0 {
            let page = super::check::first(accessed);
            return broken("INV-11", format!("{page} is called accessed, and nobody touched it"));
        }
        let apart = apart & !self.promised.apart;
        if apart != 0 {
            let page = super::check::first(apart);
            return broken("INV-11", format!("{page} was copied, and nobody wrote to it"));
        }
        Ok(())
    }
}

fn small(number: u64) -> u8 {
    u8::try_from(number).expect("a page of a small object")
}
