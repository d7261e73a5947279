//! A slot that is taken out and put back: of the host first, and of the engine.

use polder_units::{Gfn, PageRange};

use super::act::Act;
use super::kept::range;
use super::{SLOT, Slip, Stage, Task, VM, World};
use crate::system::Violation;

impl World {
    pub(super) fn slot_pages(&self) -> PageRange {
        let first = self.setup.first_page;
        range(first, first + self.setup.slot_pages)
    }

    fn slot_gfn(&self) -> Gfn {
        self.setup.gfn(self.setup.first_page)
    }

    pub(super) fn unbind_host(&mut self, actor: usize) -> Result<(), Violation> {
        let zaps = !self.setup.slips(Slip::SlotNotZapped);
        self.act(Act::Unbind(self.slot_gfn(), zaps)).well();
        self.say(|| "takes the slot out of the host, and of stage 2".into());
        self.go(actor, Stage::Unbinding);
        Ok(())
    }

    pub(super) fn unbind_engine(&mut self, actor: usize) -> Result<(), Violation> {
        self.engine(|engine| engine.unbind(VM, SLOT)).expect("it is bound");
        self.promised.bound = false;
        self.say(|| "takes the slot out of the engine".into());
        if self.task(actor) == Some(Task::Unbind) {
            self.done(actor);
        } else {
            self.go(actor, Stage::Unbound);
        }
        Ok(())
    }

    pub(super) fn bind_engine(&mut self, actor: usize) -> Result<(), Violation> {
        let (gfn, pages) = (self.slot_gfn(), self.slot_pages());
        self.engine(|engine| engine.bind(VM, SLOT, gfn, pages)).expect("it was free");
        self.promised.bound = true;
        self.say(|| "puts the slot back into the engine".into());
        self.go(actor, Stage::Binding);
        Ok(())
    }

    pub(super) fn bind_host(&mut self, actor: usize) -> Result<(), Violation> {
        self.act(Act::Bind(self.slot_gfn(), self.slot_pages())).well();
        self.say(|| "puts the slot back into the host".into());
        self.done(actor);
        Ok(())
    }
}
