//! In the middle of what an actor is, for the count of overlaps.

use polder_explored_engine::{Contents, Step, Visibility};

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
        Task::Rebind => 10,
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
        let setup = &self.setup;
        let (fails, dies) = (setup.failures > 0, setup.deaths > 0);
        let pins = setup.actors.iter().any(|other| other.role == Role::Pinner);
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
        for &task in &setup.actors[actor].tasks {
            let work = work_of(task);
            // Who dies leaves his operation to whoever meets it, also before he begins his own.
            let mut undone = dies;
            match task {
                Task::GuestRead(_) | Task::GuestWrite(..) if setup.is_pkvm() => {
                    add(work, &["ask", "allocate", "donate", "give back"]);
                }
                Task::GuestRead(_) | Task::GuestWrite(..) => {
                    add(work, &["ask", "allocate", "resolve", "map", "give back"]);
                }
                Task::HostRead(_) | Task::HostWrite(..) => {
                    add(work, &["wait"]);
                    undone = false;
                }
                Task::Convert { to, contents, .. } => {
                    undone |= fails || pins && to == Visibility::Private;
                    add(
                        work,
                        match to {
                            Visibility::Private => &["unmap host", "check references"],
                            Visibility::Shared if setup.is_pkvm() => &["unmap host"],
                            Visibility::Shared => &["unmap guest", "unmap host"],
                        },
                    );
                    add(work, &["drain", "taken"]);
                    if setup.device {
                        add(
                            work,
                            match to {
                                Visibility::Private => &["take from a device"],
                                Visibility::Shared => &["map for a device"],
                            },
                        );
                    }
                    if !setup.is_snp() {
                        add(work, &["protect"]);
                    } else if to == Visibility::Private {
                        add(work, &["unmap guest", "assign"]);
                    } else {
                        add(work, &["unassign"]);
                    }
                    if contents == Contents::Zero {
                        add(work, &["free"]);
                    }
                }
                Task::Populate { .. } => {
                    undone |= fails;
                    add(work, &["drain", "write", "publish", "taken", "show"]);
                }
                Task::Discard { .. } => {
                    undone |= fails;
                    add(work, &["drain", "unmap host", "unmap guest", "free", "taken"]);
                }
                Task::CopyOut(_) | Task::CopyIn(..) => add(work, &["copy", "hold"]),
                Task::Pin(_) => add(work, &["hold"]),
                Task::PinUnlocked(_) => add(work, &["counted", "ask for a pin", "hold"]),
                Task::PinAlone(_) => add(work, &["wait for pins", "hold"]),
                Task::Gup(_) => {
                    add(work, &["fast", "slow", "wait", "hold"]);
                    undone = false;
                }
                Task::Rebind => {
                    add(work, &["unbind", "unbound", "bind"]);
                    undone = false;
                }
                Task::Accept(_)
                | Task::AcceptLarge(_)
                | Task::PrivateRead(_)
                | Task::PrivateWrite(..) => {
                    add(work, &["ask", "allocate", "give", "resolve", "map"]);
                    add(work, &["give back", "ask about a size", "look at an entry", "zap"]);
                    add(work, &["psmash", "give the 2M back"]);
                }
                Task::Merge { .. } => {
                    undone |= fails;
                    add(work, &["drain", "merge", "taken"]);
                }
                Task::Split(_) => {
                    add(work, &["folio locked", "folio zapped", "folio done"]);
                    undone = false;
                }
                Task::Collapse(_) => {
                    add(work, &["folio zapped", "folio done"]);
                    undone = false;
                }
                Task::Move { .. } => {
                    undone |= fails || pins;
                    add(work, &["drain", "unmap host", "check references", "move", "taken"]);
                    if !setup.is_pkvm() {
                        add(work, &["unmap guest"]);
                    }
                }
                Task::Want(..) | Task::DmaWrite(..) | Task::HypervisorFails(_) => undone = false,
                Task::PinExclusive(_) => {
                    add(work, &["slow", "wait", "hold"]);
                    undone = false;
                }
                Task::OtherWrite(..) => undone = false,
                Task::Hold(..) => {
                    add(work, &["in use"]);
                    undone = false;
                }
            }
            if undone {
                add(work, &["undo"]);
            }
        }
        points.sort_unstable();
        points.dedup();
        points
    }

    /// What an actor's work is called.
    pub(super) fn work(&self, actor: usize) -> &'static str {
        WORKS[usize::from(self.point_of(actor).work)]
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
