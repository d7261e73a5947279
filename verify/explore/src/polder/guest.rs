//! A guest's access: the CPU's, then `Driver::guest_fault` and `MachineHost::map_guest`.

use polder_explored_engine::{Answer, GuestAccess, GuestAnswer, MemoryFault, Response, Visibility};
use polder_machine::{Exit, Resolved, RmpFail, RmpSize, Side};
use polder_units::{Gfn, Level, PageIndex, PageRange};

use super::act::{Act, Done};
use super::kept::set;
use super::{Bug, Came, Role, Slip, Stage, Task, VM, World};
use crate::system::Violation;

impl World {
    /// The page that a guest's task is about.
    pub(super) fn guest_page(&self, actor: usize) -> u8 {
        match self.task(actor) {
            Some(Task::GuestRead(page) | Task::GuestWrite(page, _)) => page,
            Some(
                Task::Accept(page)
                | Task::AcceptLarge(page)
                | Task::PrivateRead(page)
                | Task::PrivateWrite(page, _),
            ) => page,
            task => unreachable!("no access of a guest: {task:?}"),
        }
    }

    fn vcpu(&self, actor: usize) -> polder_machine::VcpuId {
        match self.role(actor) {
            Role::Vcpu(index) => self.parts.vcpu(index),
            role => unreachable!("no vCPU: {role:?}"),
        }
    }

    pub(super) fn guest_access(&mut self, actor: usize, task: Task) -> Result<(), Violation> {
        let (vcpu, page) = (self.vcpu(actor), self.guest_page(actor));
        let gfn = self.setup.gfn(page);
        if self.setup.maps_ahead() {
            let huge = self.setup.huge;
            self.promised.used |=
                if huge { set(self.around(u32::from(page).into())) } else { 1 << page };
        }
        let machine = &self.machine.machine;
        let mapped = machine.spte(self.parts.vm, gfn).is_ok_and(|spte| spte.is_some());
        let wants = wants(task);
        let side = if wants == Visibility::Private { Side::Private } else { Side::Shared };
        if !mapped && machine.remembered_by_guest(vcpu, gfn, side).is_none() {
            self.say(|| format!("touches gfn {gfn}, and is stopped"));
            self.go(actor, Stage::GuestAsk);
            return Ok(());
        }
        let outcome = self.act(match task {
            Task::GuestWrite(_, value) | Task::PrivateWrite(_, value) => {
                Act::GuestWrite(vcpu, gfn, side, value)
            }
            Task::Accept(_) => Act::Pvalidate(vcpu, gfn, RmpSize::Size4K),
            Task::AcceptLarge(_) => Act::Pvalidate(vcpu, gfn, RmpSize::Size2M),
            _ => Act::GuestRead(vcpu, gfn, side),
        });
        if let Done::GuestExit(Exit::Refused(refused)) = outcome {
            return self.guest_refused(actor, refused);
        }
        if self.setup.is_snp() {
            self.check_side(page, wants)?;
        }
        self.access_made(actor, task, outcome)
    }

    /// What an access came to that hardware let through, or that stage 2 stopped.
    fn access_made(&mut self, actor: usize, task: Task, outcome: Done) -> Result<(), Violation> {
        let (page, wants) = (self.guest_page(actor), wants(task));
        let gfn = self.setup.gfn(page);
        match (outcome, task) {
            (Done::Read(word), _) => {
                self.say(|| format!("reads gfn {gfn}: {}", token(word)));
                self.came(actor, Came::Read(word));
                if wants == Visibility::Shared && !self.setup.is_pkvm() {
                    self.check_secret("the guest, as shared,", page, word)?;
                }
                // What it reads of its own as shared is ciphertext.
                let own = self.promised.private & 1 << page != 0;
                if own == (wants == Visibility::Private) || !self.setup.is_snp() {
                    self.check_read("the guest", page, word, false)?;
                }
            }
            (Done::Well, Task::AcceptLarge(_)) => {
                self.say(|| format!("accepts 2M at gfn {gfn}"));
                self.promised.accepted |= set(self.around(u32::from(page).into()));
            }
            (Done::Rmp(RmpFail::SizeMismatch), Task::AcceptLarge(_)) => {
                self.say(|| format!("is told that gfn {gfn} is of 4K pages"));
            }
            (Done::Well, Task::Accept(_)) => {
                self.say(|| format!("accepts gfn {gfn}"));
                self.promised.accepted |= 1 << page;
            }
            (Done::Well, Task::GuestWrite(_, value) | Task::PrivateWrite(_, value)) => {
                self.say(|| format!("writes {value} at gfn {gfn}"));
                self.check_access("the guest", page, false)?;
                self.wrote(page, value);
            }
            (Done::GuestExit(Exit::Fault(_)), _) => {
                self.go(actor, Stage::GuestAsk);
                return Ok(());
            }
            (outcome, _) => unreachable!("a guest's access: {outcome:?}"),
        }
        self.done(actor);
        Ok(())
    }

    /// Whether the engine would let a guest's fault wait.
    pub(super) fn guest_waits(&self, actor: usize) -> bool {
        !self.setup.asks_while_busy() && self.guest_has_to_wait(actor)
    }

    /// The same, by how it should be.
    pub(super) fn guest_has_to_wait(&self, actor: usize) -> bool {
        let bit = 1 << self.guest_page(actor);
        let engine = &*self.engine;
        if !self.promised.bound {
            return false;
        }
        engine.busy & bit != 0
            || engine.held & bit == 0
                && engine.owed & bit != 0
                && (engine.failed | engine.quarantine) & bit == 0
    }

    pub(super) fn guest_ask(&mut self, actor: usize) -> Result<(), Violation> {
        let page = self.guest_page(actor);
        let (gfn, bit) = (self.setup.gfn(page), 1 << page);
        let visibility = self.task(actor).map_or(Visibility::Shared, wants);
        let access = GuestAccess { gfn, visibility };
        match self.engine(|engine| engine.guest_fault(VM, access)) {
            GuestAnswer::Exit(fault) => {
                self.say(|| format!("is told that {fault}"));
                let right = match fault {
                    MemoryFault::Unbound(_) => !self.promised.bound,
                    MemoryFault::Quarantined(_) => self.promised.quarantine & bit != 0,
                    MemoryFault::Mismatch { wanted, .. } => {
                        (wanted == Visibility::Private) != (self.promised.private & bit != 0)
                    }
                    MemoryFault::SourceFailed(_) => false,
                };
                self.done(actor);
                match right {
                    true => Ok(()),
                    false => Err(Violation::new("INV-8", format!("told that {fault}, wrongly"))),
                }
            }
            GuestAnswer::Now(answer) => {
                let (count, geometry) = (answer.range().count(), self.setup.geometry);
                let of_level = |level: &Level| geometry.pages(*level) == count;
                let Some(level) = Level::ALL.into_iter().find(of_level) else {
                    let what = format!("pages {} are no page of any level", answer.range());
                    return Err(Violation::new("INV-5", what));
                };
                self.say(|| format!("is to have pages {} at {level}", answer.range()));
                self.go(actor, Stage::GuestAllocate(answer, level));
                self.check_level(&answer, level, gfn)
            }
            GuestAnswer::Wait | GuestAnswer::Owed(_) => {
                self.say(|| "has to wait".into());
                Ok(())
            }
            GuestAnswer::Undo(operation) => {
                self.say(|| "meets an operation that nobody drives, and undoes it".into());
                self.begin_undo(actor, operation, false)
            }
        }
    }

    /// INV-5, by what the slot and the promises say, and not by what the engine does.
    fn check_level(&self, answer: &Answer, level: Level, gfn: Gfn) -> Result<(), Violation> {
        let (range, setup) = (answer.range(), &self.setup);
        let count = setup.geometry.pages(level).get();
        let pages = set(range);
        let wrong = |what: &str| {
            let what = format!("gfn {gfn} is to be mapped at {level} by pages {range}, {what}");
            Err(Violation::new("INV-5", what))
        };
        let apart = setup.first_gfn.abs_diff(setup.first_page);
        if !u64::from(apart).is_multiple_of(count) {
            return wrong("which are not congruent with it");
        }
        if !self.slot_pages().contains_range(range) {
            return wrong("of which the slot has a part only");
        }
        if level > Level::Size4K && self.engine.held & pages != 0 {
            return wrong("of which an operation holds a part");
        }
        for some in [self.promised.private, self.promised.owed, self.promised.quarantine] {
            if some & pages != 0 && some & pages != pages {
                return wrong("which are not alike");
            }
        }
        Ok(())
    }

    pub(super) fn ours(&self, answer: &Answer, gfn: Gfn) -> Option<PageIndex> {
        let bound = self.machine.machine.bound(self.parts.vm, gfn).ok()?;
        answer.range().contains(bound.page).then_some(bound.page)
    }

    pub(super) fn is_hole(&self, answer: Answer) -> bool {
        self.has_hole(answer.range())
    }

    pub(super) fn guest_allocate(
        &mut self,
        actor: usize,
        answer: Answer,
        level: Level,
        way: u8,
    ) -> Result<(), Violation> {
        if way == 1 {
            self.failures -= 1;
            self.say(|| "finds no memory".into());
            self.go(actor, Stage::GuestGive(answer, false));
            return Ok(());
        }
        let gfn = self.setup.gfn(self.guest_page(actor));
        let Some(page) = self.ours(&answer, gfn) else {
            self.say(|| format!("finds that gfn {gfn} shows another page now"));
            self.go(actor, Stage::GuestGive(answer, true));
            return Ok(());
        };
        self.say(|| format!("has memory for page {page}"));
        self.allocate(PageRange::one(page))?;
        self.take_off_direct_map(PageRange::one(page));
        let private = self.task(actor).is_some_and(|task| wants(task) == Visibility::Private);
        self.go(
            actor,
            if private && self.setup.is_snp() {
                Stage::Give(answer, level)
            } else if self.setup.is_pkvm() {
                Stage::Donate(answer)
            } else {
                Stage::GuestResolve(answer, level)
            },
        );
        Ok(())
    }

    pub(super) fn guest_resolve(
        &mut self,
        actor: usize,
        answer: Answer,
        level: Level,
    ) -> Result<(), Violation> {
        let gfn = self.setup.gfn(self.guest_page(actor));
        let resolved = self.machine.machine.tdp_resolve(self.parts.vm, gfn);
        match resolved {
            Ok(resolved) if answer.range().contains(resolved.bound().page) => {
                self.say(|| format!("finds gfn {gfn} in pfn {}", resolved.pfn()));
                self.go(actor, Stage::GuestMap(answer, level, resolved.detached(), true));
            }
            _ => {
                self.say(|| format!("finds nothing at gfn {gfn} any more"));
                self.go(actor, Stage::GuestGive(answer, true));
            }
        }
        Ok(())
    }

    pub(super) fn guest_map(
        &mut self,
        actor: usize,
        answer: Answer,
        level: Level,
        (resolved, current): (Resolved, bool),
    ) -> Result<(), Violation> {
        let unchecked = matches!(self.setup.bug, Some(Bug::Machine(_)));
        if self.setup.slips(Slip::NeverMapped) {
            self.say(|| "maps nothing".into());
        } else if !unchecked && !current {
            self.say(|| "finds that it was invalidated meanwhile".into());
        } else {
            let level = self.level_of(actor, &resolved, level);
            let mapped = self.act(Act::MapGuest(resolved, level, current));
            self.say(|| match mapped {
                Done::Mapped(level) => format!("has gfn {} mapped at {level}", resolved.gfn()),
                Done::Refused(error) => error.to_string(),
                other => unreachable!("it is mapped or not: {other:?}"),
            });
        }
        self.go(actor, Stage::GuestGive(answer, true));
        Ok(())
    }

    pub(super) fn guest_give(
        &mut self,
        actor: usize,
        answer: Answer,
        mapped: bool,
    ) -> Result<(), Violation> {
        self.engine(|engine| engine.answered(answer, mapped.then_some(Response::Map)));
        self.say(|| "gives the answer back".into());
        // Without memory the call fails, and the VMM decides.
        if mapped {
            self.go(actor, Stage::Idle)
        } else {
            self.done(actor)
        }
        Ok(())
    }
}

/// As what a guest means a page.
pub(super) fn wants(task: Task) -> Visibility {
    match task {
        Task::Accept(_) | Task::AcceptLarge(_) | Task::PrivateRead(_) | Task::PrivateWrite(..) => {
            Visibility::Private
        }
        _ => Visibility::Shared,
    }
}

/// A page's word, as a trace says it.
pub(super) fn token(word: u64) -> String {
    let bytes = word.to_le_bytes();
    if bytes.iter().all(|&byte| byte == bytes[0]) {
        return bytes[0].to_string();
    }
    format!("half {} and half {}", bytes[0], bytes[7])
}
