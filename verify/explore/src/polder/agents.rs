//! Who else is at work on folios and on the RMP: the kernel's memory management, other CPUs.

use polder_machine::{HostExit, RmpSize};
use polder_units::{Level, PageIndex, PageRange, Pfn};

use super::act::{Act, Done};
use super::{Stage, Task, World};
use crate::system::Violation;

impl World {
    fn pfn(&self, page: u8) -> Option<Pfn> {
        let page = PageIndex::from(u32::from(page));
        let backing = self.machine.machine.backing(self.parts.object, page).ok()?;
        backing.map(|backing| backing.pfn)
    }

    /// Whether the kernel has the folio at a frame locked.
    pub(super) fn locked(&self, pfn: Pfn) -> bool {
        let machine = &self.machine.machine;
        self.actors[..self.setup.actors.len()].iter().any(|state| match state.stage {
            Stage::FolioLocked(held) | Stage::FolioZapped(held) | Stage::FolioDone(held, _) => {
                match (machine.counts(held), machine.counts(pfn)) {
                    (Ok(held), Ok(one)) => held.pfn == one.pfn,
                    _ => false,
                }
            }
            _ => false,
        })
    }

    pub(super) fn any_locked(&self, range: PageRange) -> bool {
        let Ok(mut folios) = self.machine.machine.folios(self.parts.object, range) else {
            return false;
        };
        folios.any(|(_, backing)| self.locked(backing.pfn))
    }

    pub(super) fn folio_is_locked(&self, page: u8) -> bool {
        self.pfn(page).is_some_and(|pfn| self.locked(pfn))
    }

    pub(super) fn lock_folio(&mut self, actor: usize, page: u8) -> Result<(), Violation> {
        let Some(pfn) = self.pfn(page) else {
            self.say(|| format!("finds no folio at page {page}"));
            self.done(actor);
            return Ok(());
        };
        self.act(Act::Lock(pfn)).well();
        self.say(|| format!("locks the folio of page {page}"));
        // Stage 2 may keep 4K of what becomes larger.
        let splits = matches!(self.task(actor), Some(Task::Split(_)));
        self.go(actor, if splits { Stage::FolioLocked(pfn) } else { Stage::FolioZapped(pfn) });
        Ok(())
    }

    /// What is to be split is taken out of stage 2, until it is.
    pub(super) fn zap_folio(&mut self, actor: usize, pfn: Pfn) -> Result<(), Violation> {
        if let Some(gfns) = self.task(actor).and_then(|task| {
            let Task::Split(page) = task else { return None };
            self.shown(self.around(PageIndex::from(u32::from(page))))
        }) {
            self.act(Act::BeginZap(gfns)).well();
            self.say(|| format!("keeps gfns {gfns} out of stage 2"));
        }
        self.go(actor, Stage::FolioZapped(pfn));
        Ok(())
    }

    pub(super) fn reshape_folio(&mut self, actor: usize, pfn: Pfn) -> Result<(), Violation> {
        let (act, page, zapped) = match self.task(actor) {
            Some(Task::Split(page)) => {
                let page = PageIndex::from(u32::from(page));
                (Act::Split(page), page, self.shown(self.around(page)).is_some())
            }
            Some(Task::Collapse(page)) => {
                let page = PageIndex::from(u32::from(page));
                (Act::Collapse(page), page, false)
            }
            task => unreachable!("no work on a folio: {task:?}"),
        };
        let done = self.act(act);
        self.say(|| match done {
            Done::Refused(error) => format!("leaves the folio as it is: {error}"),
            _ => format!("has another folio at page {page} now"),
        });
        self.go(actor, Stage::FolioDone(pfn, zapped));
        Ok(())
    }

    pub(super) fn unlock_folio(
        &mut self,
        actor: usize,
        pfn: Pfn,
        zapped: bool,
    ) -> Result<(), Violation> {
        if zapped {
            self.act(Act::EndZap).well();
        }
        self.act(Act::Unlock(pfn)).well();
        self.say(|| "unlocks it".into());
        self.done(actor);
        Ok(())
    }

    /// Another process writes to a page. The kernel lets it have whatever the file has; hardware
    /// does not let it write what is a guest's.
    pub(super) fn other_write(
        &mut self,
        actor: usize,
        page: u8,
        value: u8,
    ) -> Result<(), Violation> {
        let given = self.reach().given & 1 << page != 0;
        match self.act(Act::OtherWrite(self.parts.vpn(page), value)) {
            Done::Well => {
                self.say(|| format!("writes {value} to page {page}"));
                self.done(actor);
                if given {
                    let what = format!("page {page} is the guest's, and another process writes it");
                    return Err(Violation::new("INV-1", what));
                }
                self.wrote(page, value);
                if self.promised.private & 1 << page != 0 {
                    self.promised.unknown |= 1 << page;
                }
            }
            Done::HostExit(HostExit::Wait { .. }) => {}
            Done::HostExit(exit) => {
                self.say(|| format!("is stopped at page {page}: {exit}"));
                self.done(actor);
            }
            other => unreachable!("a write: {other:?}"),
        }
        Ok(())
    }

    pub(super) fn copied_write(
        &mut self,
        actor: usize,
        page: u8,
        value: u8,
    ) -> Result<(), Violation> {
        self.act(Act::CopiedWrite(u32::from(page).into(), value)).well();
        self.say(|| format!("writes {value} to its page {page}"));
        self.promised.apart |= 1 << page;
        self.done(actor);
        Ok(())
    }

    fn entry(&self, page: u8, large: bool) -> Option<(Pfn, RmpSize)> {
        let pfn = self.pfn(page)?;
        if !large {
            return Some((pfn, RmpSize::Size4K));
        }
        let pages = self.setup.geometry.pages(Level::Size2M).get();
        Some((Pfn::new(pfn.get() - pfn.get() % pages)?, RmpSize::Size2M))
    }

    pub(super) fn can_hold(&self, page: u8, large: bool) -> bool {
        self.entry(page, large).is_none_or(|(pfn, size)| !self.in_use(pfn, size))
    }

    pub(super) fn hold(&mut self, actor: usize, page: u8, large: bool) -> Result<(), Violation> {
        let Some((pfn, size)) = self.entry(page, large) else {
            self.done(actor);
            return Ok(());
        };
        self.act(Act::Hold(pfn, size)).well();
        self.say(|| format!("has the rmp entry of pfn {pfn}, {size:?}, in use"));
        self.go(actor, Stage::Holding(pfn, size));
        Ok(())
    }

    pub(super) fn let_go(&mut self, actor: usize, pfn: Pfn) -> Result<(), Violation> {
        self.act(Act::LetGo(pfn)).well();
        self.say(|| "lets go of it".into());
        self.done(actor);
        Ok(())
    }
}
