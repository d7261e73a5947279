//! Copies by the library's callers.

use polder_explored_engine::InFlight;
use polder_units::PAGE_SIZE;

use super::act::Act;
use super::guest::token;
use super::kept::one;
use super::{Came, Slip, Stage, Task, World};
use crate::system::{System, Violation};

impl World {
    pub(super) fn claim_copy(&mut self, actor: usize, page: u8) -> Result<(), Violation> {
        if self.setup.slips(Slip::CopyUnclaimed) {
            let private = self.engine.private & 1 << page != 0;
            self.say(|| format!("looks at page {page}, and claims nothing"));
            if private {
                self.done(actor)
            } else {
                self.go(actor, Stage::Copy(None))
            }
            return Ok(());
        }
        let copy = self.engine(|engine| {
            let copying = engine.copy(&[one(page)])?;
            Ok(copying.park().next())
        });
        match copy {
            Ok(in_flight) => {
                self.say(|| format!("claims page {page} for a copy"));
                self.go(actor, Stage::Copy(in_flight));
                Ok(())
            }
            Err(blocked) => self.blocked(actor, blocked),
        }
    }

    pub(super) fn copy(
        &mut self,
        actor: usize,
        in_flight: Option<InFlight>,
    ) -> Result<(), Violation> {
        match self.task(actor) {
            Some(Task::CopyIn(page, value)) => {
                let pages = one(page);
                self.allocate(pages)?;
                self.act(Act::Fill { pages, offset: 0, len: 8, token: value }).well();
                self.say(|| format!("copies {value} to page {page}"));
                self.check_access("the API", page, true)?;
                self.wrote(page, value);
            }
            Some(Task::CopyOut(page)) => {
                let mut word = [0; 8];
                let offset = u64::from(page) * PAGE_SIZE;
                let object = self.parts.object;
                let read = self.machine.machine.object_read(object, offset, &mut word);
                read.expect("a page of the object");
                let word = u64::from_le_bytes(word);
                self.say(|| format!("copies from page {page}: {}", token(word)));
                self.came(actor, Came::Read(word));
                self.check_read("the API", page, word, true)?;
            }
            task => unreachable!("no copy: {task:?}"),
        }
        self.go(actor, Stage::Copied(in_flight));
        Ok(())
    }

    pub(super) fn copied(
        &mut self,
        actor: usize,
        in_flight: Option<InFlight>,
    ) -> Result<(), Violation> {
        let others = || (0..self.actors()).filter(|&other| other != actor);
        let kept = self.setup.slips(Slip::LastCopyKept) && others().all(|it| self.is_done(it));
        if let Some(in_flight) = in_flight
            && !kept
        {
            let copying = polder_explored_engine::Copying::resume(in_flight);
            self.engine(|engine| engine.copied(copying));
        }
        self.say(|| if kept { "keeps its claim" } else { "gives the copy back" }.into());
        self.done(actor);
        Ok(())
    }
}
