//! The product as a [`System`] to search.

use std::hash::{Hash, Hasher};

use super::kept::set;
use super::operation::pages_of;
use super::stage::Stage;
use super::{MOST, Role, State, World, points};
use crate::fold::Fold;
use crate::system::{Point, System, Violation};

impl System for World {
    const WORKS: &'static [&'static str] = points::WORKS;
    const STAGES: &'static [&'static str] = points::STAGES;

    fn actors(&self) -> usize {
        self.setup.actors.len()
    }

    fn ways(&self, actor: usize) -> u8 {
        match self.goes_first() {
            Some(first) if first != actor => 0,
            _ => self.ways_of(actor),
        }
    }

    fn turn(&self, actor: usize) -> Option<u8> {
        // Who can only die waits.
        (self.ways(actor) > 0 && self.dies_on(actor, 0).is_none()).then_some(0)
    }

    fn is_done(&self, actor: usize) -> bool {
        let State { stage, .. } = self.actors[actor];
        match stage {
            Stage::Dead => true,
            Stage::Idle if self.role(actor) == Role::Faults => self.touched & !self.forsaken() == 0,
            Stage::Idle => self.task(actor).is_none(),
            // He waits for what only the VMM can say is lost: `Memory::fail`.
            Stage::GuestAsk | Stage::Waits | Stage::GupWaits => {
                let pages = self.task(actor).map_or(0, |task| set(pages_of(task)));
                pages & self.forsaken() != 0
            }
            _ => false,
        }
    }

    fn take(&mut self, actor: usize, way: u8) -> Result<(), Violation> {
        self.go_on(actor, way)
    }

    fn check(&self) -> Result<(), Violation> {
        self.check_state()
    }

    fn fingerprint(&self) -> u64 {
        let mut hash = Fold::new();
        let state = &mut hash;
        (self.engine.hash, self.machine.hash).hash(state);
        let mut actors = [0; MOST];
        let count = self.setup.actors.len();
        for (actor, hash) in actors[..count].iter_mut().enumerate() {
            *hash = self.hash_of(actor);
        }
        // Who does the same work as his neighbour could as well be him.
        let mut first = 0;
        while first < count {
            let alike = usize::from(self.alike[first]);
            if alike > 1 {
                actors[first..first + alike].sort_unstable();
            }
            first += alike;
        }
        actors[..count].hash(state);
        self.promised.hash(state);
        (self.touched, self.answering, self.lost, self.failures, self.deaths).hash(state);
        self.taken.of(self.engine.held).hash(state);
        for (op, freed, pages) in self.journal.iter().flatten() {
            (self.engine.engine.place_of(*op), freed, pages).hash(state);
        }
        hash.finish()
    }

    fn point(&self, actor: usize) -> Point {
        self.point_of(actor)
    }

    fn points(&self, actor: usize) -> Vec<Point> {
        self.all_points(actor)
    }

    fn name(&self, actor: usize) -> String {
        self.setup.actors[actor].name.to_owned()
    }

    fn tell(&mut self) {
        self.told = Some(Box::default());
    }

    fn told(&mut self) -> String {
        self.told.as_mut().map(|told| std::mem::take(&mut told.line)).unwrap_or_default()
    }
}
