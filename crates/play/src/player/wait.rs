//! Waiting for an actor's step to come to something, by what the watcher tells.

use std::sync::mpsc::RecvTimeoutError;
use std::time::Duration;

use polder::Moment;

use super::{Doing, Hand, PATIENCE, Player};
use crate::limits::WAITS_MAX;
use crate::names::Is;
use crate::outcome::Outcome;
use crate::watcher::Event;

/// How long is waited at once: whoever wants an end gets it soon.
const AT_ONCE: Duration = Duration::from_millis(100);

/// How often somebody has to be found waiting.
const ROUNDS: u32 = 3;

/// The same, where nobody is there to wait for: what is on its way may take long on a busy machine.
const ROUNDS_FOR_NOBODY: u32 = 500;

/// How often others may be told to wait while a step gives no sign of life: that is none of its
/// own, and comes every 20 ms.
const OTHERS_WAIT: u32 = 1000;

/// How many answers a touch needs at most.
const ANSWERS: u32 = 8;

impl Player<'_> {
    /// Waits until an actor's step has come to something.
    pub(super) fn await_actor(&mut self, number: usize, line: usize) -> Result<Outcome, String> {
        let others = self.actors.iter().enumerate().filter(|(other, _)| *other != number);
        let amid = |hand: &Hand| matches!(hand.doing, Doing::Held(_) | Doing::Waiting);
        let somebody = self.scenario.memory.owed || others.into_iter().any(|(_, hand)| amid(hand));
        let rounds = if somebody { ROUNDS } else { ROUNDS_FOR_NOBODY };
        self.others_wait = 0;
        loop {
            let hand = &mut self.actors[number];
            match &hand.doing {
                Doing::Done(outcome) => {
                    let outcome = (**outcome).clone();
                    hand.doing = Doing::Nothing;
                    return Ok(outcome);
                }
                Doing::Held(at) => return Ok(Outcome::new(Is::Held, at.clone())),
                _ if hand.found_waiting >= rounds => {
                    hand.doing = Doing::Waiting;
                    return Ok(Outcome::new(Is::Waits, ""));
                }
                _ if hand.found_waiting == 0 && self.others_wait >= OTHERS_WAIT => {
                    return Err(silent(line));
                }
                _ => self.hear(line)?,
            }
        }
    }

    /// Gives those who wait, but for one, the time to find that they need not any more.
    pub(super) fn settle(&mut self, but: Option<usize>) -> Result<(), String> {
        self.listen();
        for number in 0..self.actors.len() {
            if Some(number) == but || self.actors[number].doing != Doing::Waiting {
                continue;
            }
            self.waits += 1;
            if self.waits > WAITS_MAX {
                return Err(format!("more than {WAITS_MAX} steps while somebody waits"));
            }
            (self.actors[number].found_waiting, self.actors[number].answers) = (0, 0);
            while self.actors[number].doing == Doing::Waiting
                && self.actors[number].found_waiting < ROUNDS
            {
                self.hear(0)?;
            }
        }
        Ok(())
    }

    /// Takes in what has been told already.
    pub(super) fn listen(&mut self) {
        while let Ok(event) = self.heard.try_recv() {
            self.take_in(event);
        }
    }

    fn hear(&mut self, line: usize) -> Result<(), String> {
        let mut left = PATIENCE;
        loop {
            self.go_on()?;
            match self.heard.recv_timeout(AT_ONCE) {
                Ok(event) => {
                    self.take_in(event);
                    return Ok(());
                }
                Err(RecvTimeoutError::Timeout) if left > AT_ONCE => left -= AT_ONCE,
                Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => {
                    return Err(silent(line));
                }
            }
        }
    }

    fn take_in(&mut self, event: Event) {
        match event {
            Event::Waits(_) | Event::TouchWaits(..) => self.others_wait += 1,
            Event::Done(..) | Event::Held(..) | Event::Moment(..) => self.others_wait = 0,
        }
        match event {
            Event::Done(number, outcome) => self.actors[number].doing = Doing::Done(outcome),
            Event::Held(number, at) => self.actors[number].doing = Doing::Held(at),
            Event::Waits(number) => {
                if self.actors[number].found_waiting == 0 {
                    self.trace_of(Some(number), "waits");
                }
                self.actors[number].found_waiting += 1;
            }
            Event::TouchWaits(view, range) => {
                for number in 0..self.actors.len() {
                    let touches = self.actors[number].touches.as_ref();
                    let is_his = touches.is_some_and(|(through, pages)| {
                        *through == view && pages.iter().any(|pages| pages.overlaps(range))
                    });
                    if is_his && matches!(self.actors[number].doing, Doing::Acting | Doing::Waiting)
                    {
                        if self.actors[number].found_waiting == 0 {
                            self.trace_of(Some(number), "waits");
                        }
                        self.actors[number].found_waiting += 1;
                    }
                }
            }
            Event::Moment(number, moment) => {
                let told = moment.to_string();
                self.trace_of(number, &told);
                if let (Moment::Answer(view, _, range), None) = (moment, number) {
                    for hand in &mut self.actors {
                        let is_his = hand.touches.as_ref().is_some_and(|(through, pages)| {
                            *through == view && pages.iter().any(|pages| pages.overlaps(range))
                        });
                        // Whoever touched goes on, unless the answer can't be carried out: then it
                        // is given again and again, as where somebody has the folio locked.
                        hand.answers += u32::from(is_his);
                        hand.found_waiting =
                            if hand.answers > ANSWERS { ROUNDS_FOR_NOBODY } else { 0 };
                    }
                }
            }
        }
    }

    fn trace_of(&mut self, number: Option<usize>, told: &str) {
        let name = number.and_then(|number| {
            self.numbers.iter().find(|(_, other)| **other == number).map(|(name, _)| name.as_str())
        });
        let line = format!("{}: {told}", name.unwrap_or("fault thread"));
        if self.trace.last() != Some(&line) {
            self.trace.push(line);
        }
    }
}

fn silent(line: usize) -> String {
    format!("line {line}: the step neither ends nor is known to wait")
}
