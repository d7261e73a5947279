//! The fault thread: `polder/src/faults.rs`.

use polder_explored_engine::{
    Answer, Blocked, OpId, Operation, Refusal, Response, TouchAnswer, Undoing, View,
};
use polder_units::{PageIndex, PageRange};

use super::act::{Act, Done};
use super::kept::set;
use super::{Came, Given, Slip, Stage, World, verdict};
use crate::system::Violation;

impl World {
    /// Whether the fault thread would answer a touch now, or undo something for it.
    pub(super) fn can_serve(&self) -> bool {
        self.has_answers() || self.setup.asks_while_busy() && self.touched != 0
    }

    /// The same, by how it should be.
    pub(super) fn has_answers(&self) -> bool {
        let engine = &*self.engine;
        let abandoned = engine.held & !engine.busy;
        let denied = engine.private | engine.failed | engine.quarantine;
        let now = !engine.held & (denied | !engine.owed);
        self.touched & (abandoned | now) != 0
    }

    /// Asks about all touches in one hold of the lock.
    pub(super) fn serve(&mut self, actor: usize) -> Result<(), Violation> {
        let mut given: [Option<Given>; 2] = [None; 2];
        let mut undo: Option<OpId> = None;
        let mut count = 0;
        for page in 0..self.setup.pages {
            if self.touched & 1 << page == 0 || count == given.len() {
                continue;
            }
            let index = PageIndex::from(u32::from(page));
            match self.engine(|engine| engine.touch(View::Host, index)) {
                TouchAnswer::Now(answer) => {
                    self.touched &= !(1 << page);
                    self.answering |= 1 << page;
                    self.say(|| match answer.response() {
                        Response::Map => format!("page {page} is to be mapped"),
                        Response::Poison => format!("page {page} is to be denied"),
                    });
                    given[count] = Some((answer, None));
                    count += 1;
                }
                TouchAnswer::Wait | TouchAnswer::Owed => {
                    self.say(|| format!("page {page} has to wait"));
                }
                TouchAnswer::Undo(operation) => {
                    self.say(|| format!("page {page} is held by an operation nobody drives"));
                    undo = Some(self.engine(|engine| engine.park(operation)));
                }
            }
        }
        if self.setup.slips(Slip::AnswerAfterGivenBack)
            && let Some((answer, _)) = given[0]
        {
            self.answering = 0;
            self.engine(|engine| engine.answered(answer, Some(answer.response())));
            if let Some((other, _)) = given[1] {
                self.touched |= 1 << other.range().start().get();
                self.engine(|engine| engine.answered(other, None));
            }
            self.say(|| "gives the answer back before it is carried out".into());
            self.go(actor, Stage::CarryOutLate(answer));
            return Ok(());
        }
        match (given[0], undo) {
            (Some(_), _) => self.go(actor, Stage::CarryOut(given, 0, undo)),
            (None, Some(op)) => return self.undo_parked(actor, op),
            (None, None) => {}
        }
        Ok(())
    }

    fn undo_parked(&mut self, actor: usize, op: OpId) -> Result<(), Violation> {
        let operation: Operation<Undoing> = self.engine.engine.resume(op);
        self.begin_undo(actor, operation, false)
    }

    /// Carries out an answer in the host view.
    pub(super) fn answer_host(&mut self, response: Response, range: PageRange) -> bool {
        let done = match response {
            Response::Map => {
                self.allocate(range).is_ok()
                    && self.take_off_direct_map(range)
                    && self.act(Act::MapHost(range)).is_well()
            }
            Response::Poison => {
                let done = self.act(Act::Poison(range));
                matches!(done, Done::Well | Done::Refused(polder_machine::Error::Exists { .. }))
            }
        };
        if done {
            // Whoever sleeps there wakes.
            self.lost &= !set(range);
        }
        done
    }

    pub(super) fn carry_out(
        &mut self,
        actor: usize,
        mut given: [Option<Given>; 2],
        at: u8,
        undo: Option<OpId>,
        way: u8,
    ) -> Result<(), Violation> {
        let at = usize::from(at);
        let Some((answer, _)) = given[at] else {
            self.go(actor, Stage::GiveBack(given, undo));
            return Ok(());
        };
        if way > 0 && way == u8::from(self.failures > 0) + 1 {
            self.die_answering(actor, given, undo);
            return Ok(());
        }
        let fails = way == 1;
        self.failures -= u8::from(fails);
        // Neighbours with the same answer by one call.
        let next: Option<Answer> = given.get(at + 1).copied().flatten().map(|(next, _)| next);
        let both = next.filter(|next| next.response() == answer.response());
        let both = both.and_then(|next| answer.range().append(next.range()));
        let range = both.unwrap_or(answer.range());
        let done = !fails && self.answer_host(answer.response(), range);
        let response = answer.response();
        self.say(|| {
            let what = if response == Response::Map { "maps" } else { "poisons" };
            format!("{what} pages {range}: {}", verdict(done))
        });
        let count = if both.is_some() { 2 } else { 1 };
        for given in given[at..at + count].iter_mut().flatten() {
            given.1 = done.then_some(response);
        }
        let over = at + count >= given.len() || given[at + count].is_none();
        let next = u8::try_from(at + count).unwrap_or(u8::MAX);
        let stage =
            if over { Stage::GiveBack(given, undo) } else { Stage::CarryOut(given, next, undo) };
        self.go(actor, stage);
        Ok(())
    }

    pub(super) fn carry_out_late(&mut self, actor: usize, answer: Answer) -> Result<(), Violation> {
        let done = self.answer_host(answer.response(), answer.range());
        self.say(|| format!("carries the answer out: {}", verdict(done)));
        self.go(actor, Stage::Idle);
        Ok(())
    }

    /// The fault thread dies before it has carried all answers out. They are given back as its
    /// stack unwinds, touches that it has not answered are kept, and another takes its place.
    fn die_answering(&mut self, actor: usize, given: [Option<Given>; 2], undo: Option<OpId>) {
        self.deaths -= 1;
        self.say(|| "dies".into());
        let mut left = given;
        if self.setup.slips(Slip::TouchForgotten) {
            for (answer, done) in left.iter_mut().filter_map(|it| it.take_if(|it| it.1.is_none())) {
                let bit = 1 << answer.range().start().get();
                self.answering &= !bit;
                self.lost |= bit;
                self.engine(|engine| engine.answered(answer, done));
            }
        }
        self.go(actor, Stage::GiveBack(left, undo));
    }

    pub(super) fn give_back(
        &mut self,
        actor: usize,
        given: [Option<Given>; 2],
        undo: Option<OpId>,
    ) -> Result<(), Violation> {
        for (answer, done) in given.into_iter().flatten() {
            let bit = 1 << answer.range().start().get();
            self.answering &= !bit;
            if done.is_none() {
                self.touched |= bit;
            }
            self.engine(|engine| engine.answered(answer, done));
        }
        self.say(|| "gives the answers back".into());
        self.go(actor, Stage::Idle);
        match undo {
            Some(op) => self.undo_parked(actor, op),
            None => Ok(()),
        }
    }

    /// What became of a request that was not granted. `None`: ask again.
    pub(super) fn blocked(&mut self, actor: usize, blocked: Blocked) -> Result<(), Violation> {
        match blocked {
            Blocked::Refused(refusal) => {
                self.say(|| format!("is refused: {refusal}"));
                self.came(actor, Came::Is(word(&refusal)));
                self.check_refusal(actor, &refusal)?;
                self.done(actor);
                Ok(())
            }
            Blocked::Busy(_) => {
                self.say(|| "has to wait".into());
                Ok(())
            }
            Blocked::Abandoned(operation) => {
                self.say(|| "meets an operation that nobody drives, and undoes it".into());
                self.begin_undo(actor, operation, false)
            }
        }
    }
}

/// A refusal by its word in a scenario.
fn word(refusal: &Refusal) -> &'static str {
    match refusal {
        Refusal::Whole { .. } => "whole",
        Refusal::Pinned { .. } => "pinned",
        Refusal::Private { .. } => "private",
        Refusal::Owed { .. } => "owed",
        Refusal::Quarantined { .. } => "quarantined",
        _ => "failed",
    }
}
