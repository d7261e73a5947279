//! Steps: how a host takes one, in how many holds of the machine's lock, and what goes wrong.

use polder_explored_engine::{OpId, Response, Step, Visibility};
use polder_units::PageRange;

use super::act::Act;
use super::host::References;
use super::kept::set;
use super::rmp::Part;
use super::{Came, Slip, Stage, World};
use crate::system::Violation;

/// How a host takes a step.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Way {
    /// Well.
    Well,
    /// It does nothing, and says that it failed.
    FailsUndone,
    /// It is done, and says that it failed.
    FailsDone,
    /// It is done, and its thread dies.
    Dies,
}

/// In how many holds of the machine's lock a host takes a step; unmapping flushes in one more.
/// What it does about the RMP is as many as the entries make it.
fn parts_of(step: Step) -> u8 {
    match step {
        Step::UnmapHost(_) | Step::UnmapDma(..) => 2,
        Step::Free(_) | Step::Quarantine(_) => 3,
        _ => 1,
    }
}

impl World {
    /// The ways in which a host takes a step, in its part. The kernel flushes what it has unmapped
    /// whatever else goes wrong, so nothing does between the two.
    fn ways_of_part(&self, step: Step, part: u8) -> impl Iterator<Item = Way> + use<> {
        let (unmapping, flushing) = match step {
            Step::UnmapHost(_) | Step::UnmapDma(..) => (part == 0, part == 1),
            _ => (false, false),
        };
        let (fails, dies) = (self.failures > 0, self.deaths > 0);
        // Who meets another CPU at work waits until it has let go, or gives up.
        let blocked = self.is_blocked(step, part);
        let ways = [
            (Way::Well, !blocked),
            (Way::FailsUndone, fails && !flushing),
            (Way::FailsDone, fails && !unmapping && !blocked),
            (Way::Dies, dies && !unmapping && !blocked),
        ];
        ways.into_iter().filter(|&(_, may)| may).map(|(way, _)| way)
    }

    pub(super) fn ways_of_step(&self, step: Step, part: u8) -> u8 {
        if let Step::CheckReferences(range) = step
            && !self.setup.slips(Slip::NoRetry)
            && self.references(range) == References::Transient
        {
            return 0;
        }
        u8::try_from(self.ways_of_part(step, part).count()).unwrap_or(u8::MAX)
    }

    pub(super) fn take_step(
        &mut self,
        actor: usize,
        op: OpId,
        stage: u8,
        step: Step,
        part: u8,
        way: u8,
    ) -> Result<(), Violation> {
        let way = self.ways_of_part(step, part).nth(way.into()).unwrap_or(Way::Well);
        let fails = matches!(way, Way::FailsUndone | Way::FailsDone);
        if part == 0 {
            self.note(op, step);
        }
        let mut went = Part::Failed;
        if way != Way::FailsUndone {
            went = self.perform(step, part)?;
            self.say(|| format!("{step} ({})", part_name(step, part)));
        } else {
            self.say(|| format!("is to {step}"));
        }
        let done = went != Part::Failed;
        if way == Way::Dies {
            self.die(actor, op);
            return Ok(());
        }
        if let (Step::CheckReferences(range), false, Way::Well) = (step, done, way) {
            self.came(actor, Came::Is("referenced"));
            self.check_referenced(range)?;
        }
        if let (Step::Merge(range), Way::FailsUndone) = (step, way)
            && part > 1
        {
            // A merge that can't be made is none, and what was frozen for it is taken back.
            self.failures -= 1;
            self.say(|| "which fails: the entries stay small".into());
            let part = Self::thaw_from(range);
            self.go(actor, Stage::Take(op, stage, step, part));
            return Ok(());
        }
        if fails || !done {
            self.failures -= u8::from(fails);
            self.say(|| "which fails".into());
            return self.turn_back(actor, op);
        }
        self.go(
            actor,
            match went {
                Part::Then(part) => Stage::Take(op, stage, step, part),
                _ => Stage::Taken(op, stage),
            },
        );
        Ok(())
    }

    /// What host `machine` does for a step, in one part of it.
    pub(super) fn perform(&mut self, step: Step, part: u8) -> Result<Part, Violation> {
        match step {
            Step::Assign(_) | Step::Unassign(_) | Step::Reassign(_) | Step::Smash(_) => {
                self.perform_rmp(step, part)
            }
            Step::SplitFolio(range) | Step::MergeFolio(range) if self.any_pinned(range) => {
                let what = format!("the folio of pages {range} is reshaped, and one is pinned");
                Err(Violation::new("INV-7", what))
            }
            Step::Merge(range) => self.perform_merge(range, part),
            Step::Thaw(range) => self.perform_thaw(range, part, 0),
            _ if !self.perform_plain(step, part) => Ok(Part::Failed),
            _ if part + 1 < parts_of(step) => Ok(Part::Then(part + 1)),
            _ => Ok(Part::Last),
        }
    }

    fn perform_plain(&mut self, step: Step, part: u8) -> bool {
        match (step, part) {
            (Step::UnmapHost(range), 0) => self.unmap_host(range),
            (Step::UnmapHost(range), _) => self.flush_host(range),
            (Step::UnmapGuest(range), _) => self.unmap_guest(range),
            (Step::CheckReferences(range), _) => self.references(range) == References::None,
            (Step::Protect(range, to), _) => {
                if !self.answer_by_hypervisor(range, to) {
                    return false;
                }
                match to {
                    Visibility::Private => self.promised.hardware |= set(range),
                    Visibility::Shared => self.promised.hardware &= !set(range),
                }
                true
            }
            (Step::Publish(range), _) => self.take_off_direct_map(range),
            (Step::Move(range), _) => self.act(Act::Migrate(range)).is_well(),
            (Step::MapDma(_, range), _) => self.act(Act::MapDevice(range)).is_well(),
            (Step::UnmapDma(_, range), 0) => self.act(Act::UnmapDevice(range)).is_well(),
            (Step::UnmapDma(_, range), _) => {
                let flushes = !self.setup.slips(Slip::IotlbNotFlushed);
                self.act(Act::ReleaseDevice(range, flushes)).is_well()
            }
            (Step::Free(range) | Step::Quarantine(range), 0) => self.unmap_guest(range),
            (Step::Free(range) | Step::Quarantine(range), 1) => {
                self.unmap_host(range) && self.flush_host(range)
            }
            (Step::Free(range), _) => {
                let punched = self.act(Act::Punch(range)).is_well();
                if punched {
                    self.taken.forget(set(range));
                }
                for page in range.frames().filter(|_| punched) {
                    if let Some(value) = usize::try_from(page.get())
                        .ok()
                        .and_then(|at| self.promised.values.get_mut(at))
                    {
                        *value = 0;
                    }
                }
                punched
            }
            (Step::Assign(_) | Step::Unassign(_) | Step::Reassign(_) | Step::Smash(_), _)
            | (Step::Merge(_) | Step::Thaw(_) | Step::Launch(_), _) => {
                unreachable!("one for the RMP: {step}")
            }
            (Step::PrepareSplit(folio), _) => self.act(Act::PrepareSplit(folio)).is_well(),
            (Step::SplitFolio(folio), _) => self.act(Act::SplitFolio(folio)).is_well(),
            (Step::MergeFolio(folio), _) => self.act(Act::MergeFolio(folio)).is_well(),
            (Step::ReleaseTables(folio), _) => self.act(Act::ReleaseTables(folio)).is_well(),
            (Step::Quarantine(range), _) => self.answer_host(Response::Poison, range),
        }
    }

    /// Whether the library pins a page of a range.
    fn any_pinned(&self, range: PageRange) -> bool {
        let pages = set(range);
        (0..8).any(|page| self.promised.pins[page] > 0 && pages & 1 << page != 0)
    }

    fn unmap_host(&mut self, range: PageRange) -> bool {
        self.act(Act::UnmapHost(range)).is_well()
    }

    fn flush_host(&mut self, range: PageRange) -> bool {
        self.act(Act::FlushHost(range)).is_well()
    }

    fn unmap_guest(&mut self, range: PageRange) -> bool {
        self.act(Act::ZapGuest(range)).is_well()
    }
}

pub(super) fn part_name(step: Step, part: u8) -> &'static str {
    match (step, part) {
        (Step::UnmapHost(_), 0) => "page tables",
        (Step::UnmapDma(..), 0) => "its table",
        (Step::UnmapHost(_) | Step::UnmapDma(..), _) => "flush",
        (Step::Free(_) | Step::Quarantine(_), 0) => "from the guest",
        (Step::Free(_) | Step::Quarantine(_), 1) => "from the host view",
        (Step::Quarantine(_), _) => "a marker",
        (Step::Free(_), _) => "its memory",
        _ => "in the host",
    }
}
