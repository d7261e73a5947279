//! pKVM and devices: what the guest asks for, donations, DMA, and their invariants.

use polder_explored_engine::{Answer, Visibility};
use polder_machine::{Error, PkvmFail};
use polder_units::{GfnRange, PageRange, Pfn, PfnRange};

use super::act::{Act, Done};
use super::check::{broken, first};
use super::host::References;
use super::kept::{Pages, Reach, one, set};
use super::operation::pages_of;
use super::{Stage, Task, VM, World};
use crate::system::Violation;

impl World {
    fn gfns(&self, start: u8, end: u8) -> GfnRange {
        let first = self.setup.gfn(start);
        GfnRange::between(first.get(), first.get() + u64::from(end - start)).expect("a few pages")
    }

    /// The guest's hypercalls before a conversion of pages: whether it is the guest that asks. What
    /// is so already, or not its own yet, needs no asking.
    pub(super) fn ask_hypervisor(&mut self, start: u8, end: u8, to: Visibility) -> bool {
        if !self.setup.is_pkvm() {
            return false;
        }
        for page in start..end {
            let gfn = self.setup.gfn(page);
            self.act(Act::Ask(gfn, to == Visibility::Shared));
        }
        true
    }

    /// `Step::Protect`, where a hypervisor has the say; whether it was done.
    pub(super) fn answer_by_hypervisor(&mut self, pages: PageRange, to: Visibility) -> bool {
        if !self.setup.is_pkvm() {
            return true;
        }
        let number = |page: u64| u8::try_from(page).unwrap_or(u8::MAX);
        let gfns = self.gfns(number(pages.start().get()), number(pages.end()));
        self.act(Act::Answer(gfns, to == Visibility::Shared)).is_well()
    }

    /// The guest goes on after what it asked for was answered.
    pub(super) fn resume_guest(&mut self, task: Task) {
        if let (Task::Convert { start, end, .. }, true) = (task, self.setup.is_pkvm()) {
            let gfns = self.gfns(start, end);
            self.act(Act::Resume(gfns)).well();
        }
    }

    /// Whether a donation has to wait for a reference that is soon gone.
    pub(super) fn donation_waits(&self, actor: usize) -> bool {
        self.references(one(self.guest_page(actor))) == References::Transient
    }

    /// `MachineHost::donate`.
    pub(super) fn donate(&mut self, actor: usize, answer: Answer) -> Result<(), Violation> {
        let page = self.guest_page(actor);
        let gfn = self.setup.gfn(page);
        if self.references(one(page)) == References::Held {
            self.say(|| format!("finds a reference to page {page}"));
            self.go(actor, Stage::GuestGive(answer, false));
            return Ok(());
        }
        let donated = self.act(Act::Donate(u32::from(page).into(), gfn));
        self.say(|| match donated {
            Done::Well => format!("is donated page {page}"),
            Done::Refused(error) => format!("is not donated page {page}: {error}"),
            other => unreachable!("a donation: {other:?}"),
        });
        let out_of_memory = matches!(donated, Done::Refused(Error::Pkvm(PkvmFail::NoMemory)));
        self.go(actor, Stage::GuestGive(answer, donated.is_well()));
        if donated.is_well() || out_of_memory {
            return Ok(());
        }
        broken("INV-9", format!("page {page} can't be donated: {donated:?}"))
    }

    /// The VMM wishes.
    pub(super) fn want(&mut self, actor: usize, page: u8, to: Visibility) -> Result<(), Violation> {
        let gfns = self.gfns(page, page + 1);
        match self.engine(|engine| engine.want(VM, gfns, to)) {
            Ok(()) => {
                self.say(|| format!("wishes page {page} to be {to}"));
                self.done(actor);
                Ok(())
            }
            Err(blocked) => self.blocked(actor, blocked),
        }
    }

    /// The device writes a page: through, or stopped by its domain.
    pub(super) fn dma_write(&mut self, actor: usize, page: u8, value: u8) -> Result<(), Violation> {
        let written = self.act(Act::DeviceWrite(u32::from(page).into(), value));
        self.done(actor);
        match written {
            Done::Well => {
                self.say(|| format!("writes {value} to page {page}"));
                // The guest has asked to share it, and the hardware was told.
                if self.told_shared() & 1 << page == 0 {
                    self.check_access("the device", page, true)?;
                }
                self.wrote(page, value);
                Ok(())
            }
            Done::Refused(Error::Iommu(_)) => {
                self.say(|| format!("is stopped at page {page}"));
                Ok(())
            }
            other => {
                self.say(|| format!("is refused page {page}"));
                broken("INV-9", format!("the device has page {page} mapped, and: {other:?}"))
            }
        }
    }

    pub(super) fn hypervisor_fails(&mut self, actor: usize, nth: u8) -> Result<(), Violation> {
        self.act(Act::HypervisorFails(nth)).well();
        self.say(|| format!("has memory for {nth} entries more"));
        self.done(actor);
        Ok(())
    }

    /// Whether a page is pinned by who is about to look again.
    pub(super) fn pinned_in_passing(&self, page: u8) -> bool {
        self.references(one(page)) == References::Transient
    }

    /// Whether what is referred to a frame for is the device's mapping.
    pub(super) fn only_the_device(&self, pfn: Pfn) -> bool {
        let Some((_, process)) = self.parts.device else { return false };
        let mut holders = self.machine.machine.holders_of(PfnRange::one(pfn));
        holders.all(|holder| holder.process == process)
    }

    /// Whether the device keeps a page of what is to be moved or dropped.
    pub(super) fn device_keeps(&self, task: Task) -> bool {
        let keeps = Task::PinAlone(0);
        let kinds = [Task::Move { start: 0, end: 0 }, Task::Discard { start: 0, end: 0 }, keeps];
        let kind = std::mem::discriminant(&task);
        kinds.iter().any(|other| std::mem::discriminant(other) == kind)
            && self.device_has(set(pages_of(task)))
    }

    /// Whether the device has one of the pages mapped.
    pub(super) fn device_has(&self, pages: Pages) -> bool {
        self.setup.device && pages & !self.promised.private != 0
    }

    /// What a conversion that has not ended has told the hardware is shared: the device may have it
    /// already, and whoever asked for the conversion has to put up with that, should it fail yet.
    fn told_shared(&self) -> Pages {
        self.engine.held & !self.promised.hardware
    }

    /// What of pKVM and of devices has to be so in every state.
    pub(super) fn check_pkvm(&self, reach: &Reach) -> Result<(), Violation> {
        let (private, out) = (self.promised.private, self.promised.quarantine);
        let reached = private & !self.told_shared() | self.promised.hardware;
        let reached = reached & reach.device & !out;
        if reached != 0 {
            let page = first(reached);
            return broken("INV-1", format!("{page} is private, and the device reaches it"));
        }
        if reach.told {
            return broken("INV-10", "what a guest wrote as its own is left where the host reads");
        }
        // The host has a page mapped that it would be refused.
        let refused = reach.host & reach.donated & !out;
        if refused != 0 && self.setup.is_pkvm() {
            let page = first(refused);
            return broken("INV-9", format!("{page} is the guest's, and the host has it mapped"));
        }
        Ok(())
    }

    /// What of pKVM has to be so while nothing is in flight.
    pub(super) fn check_pkvm_at_rest(&self, reach: &Reach, out: Pages) -> Result<(), Violation> {
        if !self.setup.is_pkvm() {
            return Ok(());
        }
        let private = self.promised.private;
        let apart = (reach.donated & !private | reach.lent & private) & !out;
        if apart != 0 {
            let page = first(apart);
            return broken("INV-9", format!("the hypervisor has {page} for what it is not"));
        }
        Ok(())
    }
}
