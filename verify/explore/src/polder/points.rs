//! In the middle of what an actor is, for the count of overlaps.

use polder_explored_engine::{Contents, Step, Visibility};

use super::prefault::Step as Ahead;
use super::{Role, Stage, State, Task, World};
use crate::system::Point;

pub(super) const WORKS: &[&str] = &[
    "guest access",
    "host touch",
    "fault thread",
    "conversion to private",
    "conversion to shared",
    "population",
    "discard",
    "copy",
    "pin",
    "gup",
    "slot deletion",
    "private access",
    "merge",
    "split of a folio",
    "collapse of folios",
    "another CPU",
    "another process",
    "move",
    "wish",
    "device",
    "exclusive pin",
    "hypervisor",
    "pin without the lock",
    "pin of one alone",
    "prefault",
    "write to a copy",
];

const FAULTS: u8 = 2;

const fn work_of(task: Task) -> u8 {
    match task {
        Task::GuestRead(_) | Task::GuestWrite(..) => 0,
        Task::HostRead(_) | Task::HostWrite(..) => 1,
        Task::Convert { to: Visibility::Private, .. } => 3,
        Task::Convert { to: Visibility::Shared, .. } => 4,
        Task::Populate { .. } => 5,
        Task::Discard { .. } => 6,
        Task::CopyOut(_) | Task::CopyIn(..) => 7,
        Task::Pin(_) => 8,
        Task::Gup(_) => 9,
        Task::Rebind | Task::Unbind => 10,
        Task::Prefault { .. } => 24,
        Task::CopiedWrite(..) => 25,
        Task::Accept(_) | Task::AcceptLarge(_) | Task::PrivateRead(_) | Task::PrivateWrite(..) => {
            11
        }
        Task::Merge { .. } => 12,
        Task::Split(_) => 13,
        Task::Collapse(_) => 14,
        Task::Hold(..) => 15,
        Task::OtherWrite(..) => 16,
        Task::Move { .. } => 17,
        Task::Want(..) => 18,
        Task::DmaWrite(..) => 19,
        Task::PinExclusive(_) => 20,
        Task::HypervisorFails(_) => 21,
        Task::PinUnlocked(_) => 22,
        Task::PinAlone(_) => 23,
    }
}

pub(super) const STAGES: &[&str] = &[
    "",
    "ask",
    "allocate",
    "resolve",
    "map",
    "give back",
    "wait",
    "carry out",
    "drain",
    "write",
    "unmap host",
    "unmap guest",
    "check references",
    "protect",
    "free",
    "publish",
    "quarantine",
    "taken",
    "undo",
    "show",
    "copy",
    "hold",
    "fast",
    "slow",
    "unbind",
    "unbound",
    "bind",
    "give",
    "ask about a size",
    "look at an entry",
    "psmash",
    "zap",
    "give the 2M back",
    "assign",
    "unassign",
    "smash",
    "merge",
    "thaw",
    "folio locked",
    "folio zapped",
    "folio done",
    "in use",
    "reassign",
    "move",
    "map for a device",
    "take from a device",
    "donate",
    "launch",
    "prepare",
    "split",
    "merge folio",
    "release",
    "counted",
    "ask for a pin",
    "wait for pins",
];

/// The number of a stage, which is one of [`STAGES`].
fn stage(name: &str) -> u8 {
    let at = STAGES.iter().position(|&other| other == name).expect("one of the list");
    u8::try_from(at).unwrap_or(u8::MAX)
}

fn stage_of(step: Step) -> u8 {
    match step {
        Step::UnmapHost(_) => 10,
        Step::UnmapGuest(_) => 11,
        Step::CheckReferences(_) => 12,
        Step::Protect(..) => 13,
        Step::Free(_) => 14,
        Step::Publish(_) => 15,
        Step::Quarantine(_) => 16,
        Step::Assign(_) => 33,
        Step::Unassign(_) => 34,
        Step::Smash(_) => 35,
        Step::Merge(_) => 36,
        Step::Thaw(_) => 37,
        Step::Reassign(_) => 42,
        Step::Move(_) => 43,
        Step::MapDma(..) => 44,
        Step::UnmapDma(..) => 45,
        Step::Launch(_) => 47,
        Step::PrepareSplit(_) => 48,
        Step::SplitFolio(_) => 49,
        Step::MergeFolio(_) => 50,
        Step::ReleaseTables(_) => 51,
    }
}

impl World {
    pub(super) fn point_of(&self, actor: usize) -> Point {
        let State { at, stage, .. } = self.actors[actor];
        let who = &self.setup.actors[actor];
        let work = match who.tasks.get(usize::from(at)) {
            Some(&task) => work_of(task),
            None => FAULTS,
        };
        let stage = match stage {
            Stage::Idle | Stage::Dead => 0,
            Stage::GuestAsk => 1,
            Stage::GuestAllocate(..) => 2,
            Stage::GuestResolve(..) => 3,
            Stage::GuestMap(..) => 4,
            Stage::GuestGive(..) | Stage::GiveBack(..) => 5,
            Stage::Waits | Stage::GupWaits => 6,
            Stage::CarryOut(..) | Stage::CarryOutLate(_) => 7,
            Stage::Drain(_) => 8,
            Stage::Write(..) | Stage::WriteLate(_) | Stage::DirectMapLate => 9,
            Stage::Take(_, _, step, _) => stage_of(step),
            Stage::Taken(..) => 17,
            Stage::TakeBack(..) | Stage::TakenBack(..) => 18,
            Stage::Show(_) => 19,
            Stage::Copy(_) => 20,
            Stage::Copied(_) | Stage::Held(_) | Stage::GupHeld(_) => 21,
            Stage::Gup(_) => 22,
            Stage::GupSlow => 23,
            Stage::Unbinding => 24,
            Stage::Unbound => 25,
            Stage::Binding => 26,
            Stage::Ahead(ahead) => match ahead.step {
                Ahead::Between => 1,
                Ahead::Waits => 6,
                Ahead::Allocate(_) | Ahead::Copy(_) => 2,
                Ahead::Resolve(_) => 3,
                Ahead::Map(..) => 4,
                Ahead::Give(..) => 5,
            },
            Stage::Give(..) => 27,
            Stage::Donate(_) => 46,
            Stage::SizeAsk => 28,
            Stage::SizeLook(_) => 29,
            Stage::SizeSmash(..) => 30,
            Stage::SizeZap(_) => 31,
            Stage::SizeGive(_) => 32,
            Stage::FolioLocked(_) => 38,
            Stage::FolioZapped(_) => 39,
            Stage::FolioDone(..) => 40,
            Stage::Holding(..) => 41,
            Stage::Counted(_) | Stage::Looked => 52,
            Stage::AskPin => 53,
            Stage::Alone(_) => 54,
        };
        Point { work, stage }
    }

    /// Every point at which an actor can be met: what its tasks and its setup make possible.
    pub(super) fn all_points(&self, actor: usize) -> Vec<Point> {
        let dies = self.setup.deaths > 0;
        let mut points = Vec::new();
        let mut add = |work: u8, stages: &[&str]| {
            points.extend(stages.iter().map(|name| Point { work, stage: stage(name) }));
        };
        if self.role(actor) == Role::Faults {
            add(FAULTS, &["carry out", "give back"]);
            if dies {
                add(FAULTS, &["undo"]);
            }
        }
        for &task in &self.setup.actors[actor].tasks {
            add(work_of(task), &self.stages_of(task));
            // Who dies leaves his operation to whoever meets it, also before he begins his own.
            if self.may_undo(task) || dies && meets_operations(task) {
                add(work_of(task), &["undo"]);
            }
        }
        points.sort_unstable();
        points.dedup();
        points
    }

    /// The stages that a task can be met at, but for those of undoing.
    fn stages_of(&self, task: Task) -> Vec<&'static str> {
        let setup = &self.setup;
        let mut stages: Vec<&str> = match task {
            Task::GuestRead(_) | Task::GuestWrite(..) if setup.is_pkvm() => {
                vec!["ask", "allocate", "donate", "give back"]
            }
            Task::GuestRead(_) | Task::GuestWrite(..) => {
                vec!["ask", "allocate", "resolve", "map", "give back"]
            }
            Task::HostRead(_) | Task::HostWrite(..) => vec!["wait"],
            Task::Convert { to, contents, .. } => self.stages_of_conversion(to, contents),
            Task::Populate { .. } => vec!["drain", "write", "publish", "taken", "show"],
            Task::Discard { .. } => vec!["drain", "unmap host", "unmap guest", "free", "taken"],
            Task::CopyOut(_) | Task::CopyIn(..) => vec!["copy", "hold"],
            Task::Pin(_) => vec!["hold"],
            Task::PinUnlocked(_) => vec!["counted", "ask for a pin", "hold"],
            Task::PinAlone(_) => vec!["wait for pins", "hold"],
            Task::PinExclusive(_) => vec!["slow", "wait", "hold"],
            Task::Gup(_) => vec!["fast", "slow", "wait", "hold"],
            // Nothing else is claimed there.
            Task::Prefault { .. } if !setup.copied => {
                vec!["allocate", "resolve", "map", "give back", "ask", "wait"]
            }
            Task::Prefault { .. } => vec!["allocate", "resolve", "map", "give back"],
            Task::Unbind => vec!["unbind"],
            Task::Rebind => vec!["unbind", "unbound", "bind"],
            Task::Accept(_)
            | Task::AcceptLarge(_)
            | Task::PrivateRead(_)
            | Task::PrivateWrite(..) => vec![
                "ask",
                "allocate",
                "give",
                "resolve",
                "map",
                "give back",
                "ask about a size",
                "look at an entry",
                "zap",
                "psmash",
                "give the 2M back",
            ],
            Task::Merge { .. } => vec!["drain", "merge", "taken"],
            Task::Split(_) => vec!["folio locked", "folio zapped", "folio done"],
            Task::Collapse(_) => vec!["folio zapped", "folio done"],
            Task::Move { .. } => vec!["drain", "unmap host", "check references", "move", "taken"],
            Task::Hold(..) => vec!["in use"],
            Task::CopiedWrite(..)
            | Task::Want(..)
            | Task::DmaWrite(..)
            | Task::HypervisorFails(_)
            | Task::OtherWrite(..) => vec![],
        };
        if matches!(task, Task::Move { .. }) && !setup.is_pkvm() {
            stages.push("unmap guest");
        }
        stages
    }

    fn stages_of_conversion(&self, to: Visibility, contents: Contents) -> Vec<&'static str> {
        let setup = &self.setup;
        let mut stages = vec!["drain", "taken"];
        match to {
            Visibility::Private => stages.extend(["unmap host", "check references"]),
            Visibility::Shared if setup.is_pkvm() => stages.push("unmap host"),
            Visibility::Shared => stages.extend(["unmap guest", "unmap host"]),
        }
        match to {
            Visibility::Private if setup.device => stages.push("take from a device"),
            Visibility::Shared if setup.device => stages.push("map for a device"),
            _ => {}
        }
        match to {
            _ if !setup.is_snp() => stages.push("protect"),
            Visibility::Private => stages.extend(["unmap guest", "assign"]),
            Visibility::Shared => stages.push("unassign"),
        }
        if contents == Contents::Zero {
            stages.push("free");
        }
        stages
    }

    /// Whether a task may fail, and be undone.
    fn may_undo(&self, task: Task) -> bool {
        let fails = self.setup.failures > 0;
        let pins = || self.setup.actors.iter().any(|other| other.role == Role::Pinner);
        match task {
            Task::Convert { to, .. } => fails || to == Visibility::Private && pins(),
            Task::Move { .. } => fails || pins(),
            Task::Populate { .. } | Task::Discard { .. } | Task::Merge { .. } => fails,
            _ => false,
        }
    }

    /// What an actor's work is called.
    pub(super) fn work(&self, actor: usize) -> &'static str {
        WORKS[usize::from(self.point_of(actor).work)]
    }
}

/// Whether who is at a task may be handed an operation that nobody drives.
fn meets_operations(task: Task) -> bool {
    match task {
        Task::GuestRead(_)
        | Task::GuestWrite(..)
        | Task::Convert { .. }
        | Task::Populate { .. }
        | Task::Discard { .. }
        | Task::Move { .. }
        | Task::Merge { .. }
        | Task::CopyOut(_)
        | Task::CopyIn(..)
        | Task::Pin(_)
        | Task::PinUnlocked(_)
        | Task::PinAlone(_)
        | Task::Prefault { .. }
        | Task::Accept(_)
        | Task::AcceptLarge(_)
        | Task::PrivateRead(_)
        | Task::PrivateWrite(..) => true,
        Task::HostRead(_)
        | Task::HostWrite(..)
        | Task::Gup(_)
        | Task::PinExclusive(_)
        | Task::CopiedWrite(..)
        | Task::OtherWrite(..)
        | Task::Unbind
        | Task::Rebind
        | Task::Split(_)
        | Task::Collapse(_)
        | Task::Want(..)
        | Task::DmaWrite(..)
        | Task::HypervisorFails(_)
        | Task::Hold(..) => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_steps_number_is_that_of_its_name() {
        for name in ["unmap host", "quarantine", "bind"] {
            assert_eq!(STAGES[usize::from(stage(name))], name);
        }
        assert_eq!(stage("unmap host"), 10);
        assert_eq!((stage("undo"), stage("bind")), (18, 26));
        assert_eq!((stage("give"), stage("thaw"), stage("in use")), (27, 37, 41));
        assert_eq!(stage("reassign"), 42);
    }
}
