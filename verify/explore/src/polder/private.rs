//! An SNP guest's private accesses: what `polder/src/vcpu.rs` does when hardware refuses one, how a
//! page is given to its guest (`host/machine/stage2.rs`), and how a fault for a size is solved.

use polder_explored_engine::{Answer, GuestAnswer, Response, Visibility};
use polder_machine::{AccessCheck, Refused, RmpFail};
use polder_units::{GfnRange, Level, Pfn};

use super::act::{Act, Done};
use super::kept::set;
use super::rmp::{Called, Refused as NotDone};
use super::{Slip, Stage, VM, World};
use crate::system::Violation;

/// How often hardware may refuse one access, while no other CPU has the entry in use, before it
/// counts as one that never passes: more often than all the work of any configuration brings about.
/// The product's limit is a thousand.
pub(super) const MOST_REFUSALS: u8 = 6;

impl World {
    /// An access that was refused.
    pub(super) fn guest_refused(
        &mut self,
        actor: usize,
        refused: Refused,
    ) -> Result<(), Violation> {
        let (page, check) = (self.guest_page(actor), refused.check);
        self.say(|| format!("is refused page {page}: {check}"));
        if check == AccessCheck::InUse {
            // It would only meet the same again.
            return Ok(());
        }
        if check == AccessCheck::Validated {
            self.done(actor);
            let (accepted, engine) = (self.promised.accepted & 1 << page != 0, &self.engine);
            // One that is being shared is the guest's no longer.
            if accepted && (engine.held | self.promised.quarantine) & 1 << page == 0 {
                let what = format!("the guest has to accept page {page}, which it has accepted");
                return Err(Violation::new("INV-2", what));
            }
            return Ok(());
        }
        self.actors[actor].refusals += 1;
        if self.actors[actor].refusals > MOST_REFUSALS {
            let what = format!("page {page} is refused to its guest again and again: {check}");
            return Err(Violation::new("INV-8", what));
        }
        let size = matches!(check, AccessCheck::PageSize | AccessCheck::InstructionSize);
        self.go(actor, if size { Stage::SizeAsk } else { Stage::GuestAsk });
        Ok(())
    }

    /// An access that was let through is to be of the kind that was granted; reading one's own as
    /// shared, which shows ciphertext, is nobody's business.
    pub(super) fn check_side(&self, page: u8, wants: Visibility) -> Result<(), Violation> {
        let private = self.promised.private & 1 << page != 0;
        if wants == Visibility::Private && !private {
            let what = format!("the guest reaches page {page} as its own, which is shared");
            return Err(Violation::new("INV-9", what));
        }
        Ok(())
    }

    /// Assigns the page, as far as it takes.
    pub(super) fn give(
        &mut self,
        actor: usize,
        answer: Answer,
        level: Level,
    ) -> Result<(), Violation> {
        let gfn = self.setup.gfn(self.guest_page(actor));
        let Some(page) = self.ours(&answer, gfn) else {
            self.go(actor, Stage::GuestGive(answer, true));
            return Ok(());
        };
        let called = self.to_assign(page, answer.range());
        // It is looked for again at once whether anybody else is at work there.
        if self.meets_another(called) {
            self.say(|| "finds another at work on entry or folio".into());
            self.go(actor, Stage::GuestGive(answer, true));
            return Ok(());
        }
        match self.instruct(called) {
            Ok(_) => {
                let more = matches!(called, Called::Smash(..));
                self.say(|| match called {
                    Called::Nothing(_) => format!("has page {page} already"),
                    Called::Smash(head, _) => format!("smashes pfn {head}"),
                    _ => format!("is given page {page}"),
                });
                if !more {
                    self.go(actor, Stage::GuestResolve(answer, level));
                }
                Ok(())
            }
            Err(NotDone::Referenced) => {
                // The guest's access fails: the VMM's to handle.
                self.say(|| format!("finds a reference to page {page}"));
                self.go(actor, Stage::GuestGive(answer, false));
                Ok(())
            }
            Err(NotDone::Rmp(fail)) => {
                self.say(|| "is refused".into());
                let what = format!("page {page} can't be given to its guest: {fail}");
                Err(Violation::new("INV-9", what))
            }
        }
    }

    /// Whether a fault for its size has to wait for an operation.
    pub(super) fn size_waits(&self, actor: usize) -> bool {
        let around = self.around(u32::from(self.guest_page(actor)).into());
        self.engine.busy & set(around) != 0
    }

    pub(super) fn size_ask(&mut self, actor: usize) -> Result<(), Violation> {
        let gfn = self.setup.gfn(self.guest_page(actor));
        match self.engine(|engine| engine.size_fault(VM, gfn)) {
            GuestAnswer::Now(answer) => {
                self.say(|| format!("is to have the entry of pages {} smashed", answer.range()));
                self.go(actor, Stage::SizeLook(answer));
                Ok(())
            }
            GuestAnswer::Exit(fault) => {
                self.done(actor);
                Err(Violation::new("INV-8", format!("told that {fault}, wrongly")))
            }
            GuestAnswer::Wait | GuestAnswer::Owed(_) => Ok(()),
            GuestAnswer::Undo(operation) => {
                self.say(|| "meets an operation that nobody drives, and undoes it".into());
                self.begin_undo(actor, operation, false)
            }
        }
    }

    pub(super) fn size_look(&mut self, actor: usize, answer: Answer) -> Result<(), Violation> {
        let gfn = self.setup.gfn(self.guest_page(actor));
        let page = self.ours(&answer, gfn);
        if page.is_none() || self.setup.slips(Slip::SmashForgotten) {
            self.say(|| "finds nothing to smash".into());
            self.go(actor, Stage::SizeGive(answer));
            return Ok(());
        }
        let found = page.and_then(|page| self.found(page)).filter(super::rmp::Found::is_large);
        self.say(|| match found {
            Some(found) => format!("finds a large entry at pfn {}", found.head()),
            None => "finds 4K entries: the fault was spurious".into(),
        });
        let next = found.map_or(Stage::SizeZap(answer), |it| Stage::SizeSmash(answer, it.head()));
        self.go(actor, next);
        Ok(())
    }

    pub(super) fn size_smash(
        &mut self,
        actor: usize,
        answer: Answer,
        head: Pfn,
    ) -> Result<(), Violation> {
        let smashed = self.act(Act::Psmash(head));
        let again = matches!(smashed, Done::Rmp(RmpFail::InUse));
        // While another CPU is at work on it, the guest goes round.
        self.actors[actor].refusals -= u8::from(again);
        self.say(|| match smashed {
            Done::Well => format!("psmash of pfn {head}"),
            Done::Rmp(fail) => format!("psmash of pfn {head} is refused: {fail}"),
            other => unreachable!("an instruction of the RMP: {other:?}"),
        });
        self.go(
            actor,
            if self.setup.slips(Slip::SmashNotZapped) && smashed.is_well()
                || self.setup.slips(Slip::SmashErrorSpurious) && !smashed.is_well()
            {
                Stage::SizeGive(answer)
            } else {
                Stage::SizeZap(answer)
            },
        );
        if smashed.is_well() || again {
            return Ok(());
        }
        let now = self.machine.machine.rmp_entry(head);
        let large =
            now.is_some_and(|now| now.assigned && now.size == polder_machine::RmpSize::Size2M);
        if large || self.setup.slips(Slip::SmashErrorFatal) {
            let what = format!("the vCPU ends, for psmash of pfn {head} was refused");
            return Err(Violation::new("INV-8", what));
        }
        Ok(())
    }

    pub(super) fn size_zap(&mut self, actor: usize, answer: Answer) -> Result<(), Violation> {
        let gfn = self.setup.gfn(self.guest_page(actor));
        let around = GfnRange::enclosing(gfn, Level::Size2M, self.setup.geometry);
        self.act(Act::ZapGfns(around)).well();
        self.say(|| format!("takes gfns {around} out of stage 2"));
        self.go(actor, Stage::SizeGive(answer));
        Ok(())
    }

    pub(super) fn size_give(&mut self, actor: usize, answer: Answer) -> Result<(), Violation> {
        self.engine(|engine| engine.answered(answer, Some(Response::Map)));
        self.say(|| "gives the answer back".into());
        self.go(actor, Stage::Idle);
        Ok(())
    }
}
