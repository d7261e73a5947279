//! Contents that are owed: how they land, and who is shown them.

use polder_engine::{Answer, Operation, Population, Published};
use polder_units::{PAGE_BYTES, PageRange};

use super::{Driver, Land, Landing};
use crate::watch::{Moment, Reached};
use crate::{Error, OnBusy};

impl Driver {
    /// Fills pages that are owed with `bytes`, and zeros after them.
    pub(crate) fn populate(&self, range: PageRange, bytes: &[u8]) -> Result<(), Error> {
        let writing = self.claim(OnBusy::Wait, |engine| engine.populate(range))?;
        let (engine, writing) = self.drain(writing)?;
        drop(engine);
        let written = self.host.views().write(range.start().offset(), bytes);
        self.dirty.wrote_pages(range);
        if let Err(error) = written {
            return Err(self.fail(writing, error));
        }
        self.tell(Moment::Reached(Reached::Written));
        let (mut engine, published) = self.perform(self.engine(), writing, Reached::Published)?;
        let answer = engine.finish_population(published);
        drop(engine);
        match answer {
            Some(answer) => self.show_populated(answer),
            // What a view can map as a whole alone is not whole yet.
            None => self.released(),
        }
        Ok(())
    }

    fn show_populated(&self, answer: Answer) {
        let (view, response, range) = (answer.view(), answer.response(), answer.range());
        let mut given = Land { driver: self, landing: Some(Landing::Answer(answer, None)) };
        // Should it fail, whoever waits is answered one by one.
        given.done(self.host.views().answer(view, response, range).is_ok());
    }

    /// Makes pages whole with `bytes`, or zeros for `None`, and shows those of `shown`; of all that
    /// are still owed and held by nobody. Each run is told by `note` before anybody sees it. What
    /// can't be written now for want of memory is owed as before.
    pub(crate) fn land(
        &self,
        range: PageRange,
        bytes: Option<&[u8]>,
        shown: PageRange,
        note: impl Fn(PageRange),
    ) {
        let mut left = Some(range);
        while let Some(rest) = left {
            let claimed = {
                let mut engine = self.engine();
                engine.first_owed(rest).map(|owed| (owed, engine.populate(owed)))
            };
            let Some((owed, claimed)) = claimed else { break };
            left = PageRange::between(owed.end(), rest.end());
            let Ok(writing) = claimed else { continue };
            let Ok((engine, writing)) = self.drain(writing) else { continue };
            drop(engine);
            if let Some(bytes) = bytes {
                let skipped = owed.start().offset() - range.start().offset();
                let from = usize::try_from(skipped).expect("within the bytes of a slice");
                let length = usize::try_from(owed.count().get()).expect("a part") * PAGE_BYTES;
                let written =
                    self.host.views().fill(owed.start().offset(), &bytes[from..][..length]);
                if let Err(error) = written {
                    self.fail(writing, error);
                    continue;
                }
            }
            self.dirty.wrote_pages(owed);
            self.tell(Moment::Reached(Reached::Written));
            let published = self.perform(self.engine(), writing, Reached::Published);
            let Ok((engine, published)) = published else { continue };
            drop(engine);
            note(owed);
            self.show(published, shown);
        }
    }

    /// Ends a population, and lets those go on who wait for a page of `shown` in the guest view.
    fn show(&self, published: Operation<Published>, shown: PageRange) {
        let Some(answer) = self.engine().finish_population_showing(published, shown) else {
            return self.released();
        };
        let (view, response, range) = (answer.view(), answer.response(), answer.range());
        let mut given = Land { driver: self, landing: Some(Landing::Answer(answer, None)) };
        self.tell(Moment::Answer(view, response, range));
        let done = self.host.views().answer(view, response, range).is_ok();
        given.done(done);
        if done {
            // They go on, and need no other answer.
            let answered = self.forget_touches(view, range);
            (0..answered).for_each(|_| self.counters.answered(view, response));
        }
    }

    /// Says that the contents of pages will not come.
    pub(crate) fn fail_source(&self, range: PageRange) -> Result<(), Error> {
        self.claim(OnBusy::Wait, |engine| engine.fail(range))?;
        self.released();
        Ok(())
    }

    /// Says that nothing is owed any more.
    pub(crate) fn settle(&self) -> Result<(), Error> {
        let (owed, failed) = self.claim(OnBusy::Wait, |engine| {
            let all = PageRange::between(0, engine.config().pages.get()).expect("memory has pages");
            let runs = engine.pages().runs(all);
            let owed = runs.filter(|(_, facts)| facts.population == Population::Owed);
            let owed: Vec<PageRange> = owed.map(|(run, _)| run).collect();
            engine.settle()?;
            Ok((owed, engine.failed().runs().collect::<Vec<_>>()))
        })?;
        owed.into_iter().for_each(|run| self.dirty.wrote_pages(run));
        // Who waits is let go whether or not the host goes on watching.
        let settled = self.host.settle(&failed);
        self.released();
        settled.and_then(|()| self.collapse_all())
    }
}
