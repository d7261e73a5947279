//! Which work was interrupted where by which, of all that could be.

use std::collections::{BTreeMap, BTreeSet};

use crate::system::{Point, System};

/// Who was met where by whom: work, stage, and the kind of work that went on meanwhile.
pub type Overlaps = BTreeSet<(Point, u8)>;

/// Notes in the middle of what everybody else is while an actor takes a step.
pub(super) struct Met {
    /// By work and stage: a bit for each work that went on meanwhile.
    met: Vec<u32>,
}

/// The places of one work in that table.
const STAGES: usize = 64;

impl Met {
    pub(super) fn new<S: System>() -> Self {
        assert!(S::WORKS.len() <= 32 && S::STAGES.len() <= STAGES, "the table is too small");
        Self { met: vec![0; S::WORKS.len() * STAGES] }
    }

    #[inline]
    pub(super) fn note<S: System>(&mut self, system: &S, actor: usize) {
        let by = 1 << system.point(actor).work;
        for other in (0..system.actors()).filter(|&other| other != actor) {
            let Point { work, stage } = system.point(other);
            if stage > 0 {
                self.met[usize::from(work) * STAGES + usize::from(stage)] |= by;
            }
        }
    }

    pub(super) fn overlaps(&self) -> Overlaps {
        let mut overlaps = Overlaps::new();
        for (at, &bits) in self.met.iter().enumerate() {
            let number = |number: usize| u8::try_from(number).unwrap_or(u8::MAX);
            let point = Point { work: number(at / STAGES), stage: number(at % STAGES) };
            overlaps.extend((0..32).filter(|by| bits >> by & 1 == 1).map(|by| (point, by)));
        }
        overlaps
    }
}

/// The overlaps that the actors make possible: everybody at every point of his work, met by the
/// work of everybody else.
pub fn possible<S: System>(system: &S) -> Overlaps {
    let works: BTreeMap<usize, BTreeSet<u8>> = (0..system.actors())
        .map(|actor| (actor, system.points(actor).into_iter().map(|point| point.work).collect()))
        .collect();
    let mut all = Overlaps::new();
    for actor in 0..system.actors() {
        for point in system.points(actor).into_iter().filter(|point| point.stage > 0) {
            let others = works.iter().filter(|&(&other, _)| other != actor);
            all.extend(others.flat_map(|(_, works)| works.iter().map(move |&by| (point, by))));
        }
    }
    all
}

/// An overlap, in words.
pub fn name<S: System>((point, by): (Point, u8)) -> String {
    let (work, stage) = (S::WORKS[usize::from(point.work)], S::STAGES[usize::from(point.stage)]);
    format!("{work}, {stage}, met by {}", S::WORKS[usize::from(by)])
}
