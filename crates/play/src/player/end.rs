//! The end of a story: nobody is left amid a step, and no thread is left.

use std::sync::mpsc::RecvTimeoutError;
use std::thread::JoinHandle;

use super::{Doing, PATIENCE, Player};

/// The most that is heard of those who were amid a step when the scenario was over.
const ENDING: u32 = 100_000;

impl Player<'_> {
    /// Has everybody end: nobody is left amid a step.
    pub(super) fn end(mut self) -> Result<(), String> {
        self.listen();
        let Self { actors, heard, world, events, .. } = self;
        drop(events);
        let mut threads = Vec::new();
        let mut amid = 0;
        for hand in actors {
            amid += usize::from(hand.doing != Doing::Nothing);
            // Without anybody to resume or tell him, he goes on to his end.
            drop((hand.resume, hand.jobs));
            threads.push(hand.thread);
        }
        if amid > 0 {
            world.end();
        }
        // All threads hold an end of the channel.
        drop(world);
        // A touch whose answer fails is answered again and again: what is heard is no sign of an
        // end.
        let mut heard_since = 0;
        loop {
            match heard.recv_timeout(PATIENCE) {
                Ok(_) if heard_since < ENDING => heard_since += 1,
                Ok(_) => return Err("the scenario is over, and a step of it never ends".into()),
                Err(RecvTimeoutError::Disconnected) => break,
                Err(RecvTimeoutError::Timeout) => {
                    if threads.iter().all(JoinHandle::is_finished) {
                        break;
                    }
                    return Err("the scenario is over, and a step of it never ends".into());
                }
            }
        }
        let panicked = threads.into_iter().map(JoinHandle::join).any(|ended| ended.is_err());
        if panicked {
            Err("a thread of the player panicked: a bug of Polder's".into())
        } else {
            Ok(())
        }
    }
}
