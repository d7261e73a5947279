//! What is mapped before a guest touches it: all of its memory, or a range; before it starts, or
//! while it runs.

use std::sync::atomic::{AtomicBool, Ordering};

use polder::units::{GfnRange, PageCount};
use polder::{Memory, Prefaulted, Vcpu, VmId};

use crate::RunError;
use crate::report::{Ahead, End, Progress, Supervision};
use crate::threads::Threads;
use crate::vcpu::Ran;

/// How much is mapped between two looks at the supervisor: 64 MiB.
const PART: u64 = 1 << 14;

/// What is to be mapped ahead.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Prefault {
    /// These guest frames, or all of memory.
    pub gfns: Option<GfnRange>,
    /// While the guest runs; else before it starts.
    pub running: bool,
}

impl Prefault {
    /// The frames of a VM's memory that are meant, slot by slot.
    ///
    /// # Errors
    /// [`RunError::NoMemoryThere`] if a range names none.
    fn frames(self, memory: &Memory, vm: VmId) -> Result<Vec<GfnRange>, RunError> {
        let mut bound: Vec<GfnRange> = memory
            .bindings()
            .into_iter()
            .filter(|(of, ..)| *of == vm)
            .map(|(_, _, binding)| binding.gfns())
            .collect();
        bound.sort_by_key(|gfns| gfns.start());
        let Some(gfns) = self.gfns else { return Ok(bound) };
        let covered = bound.iter().filter_map(|it| it.intersection(gfns));
        let covered = covered.fold(0, |sum, part| sum + part.count().get());
        if covered < gfns.count().get() {
            return Err(RunError::NoMemoryThere { gfns });
        }
        Ok(bound.into_iter().filter_map(|it| it.intersection(gfns)).collect())
    }

    /// Maps them, part by part, telling the supervisor how far it is. What was done; nothing if it
    /// was stopped.
    pub(crate) fn map(
        self,
        (memory, vm): (&Memory, VmId),
        vcpu: Vcpu<'_>,
        mut supervise: impl FnMut(Ahead) -> Supervision,
    ) -> Result<Result<Ahead, Supervision>, RunError> {
        let all = self.frames(memory, vm)?;
        let of = all.iter().fold(0, |sum, gfns| sum + gfns.count().get());
        let mut ahead = Ahead { done: 0, of, skipped: 0 };
        for gfns in all {
            let mut left = Some(gfns);
            while let Some(now) = left {
                match supervise(ahead) {
                    Supervision::GoOn => {}
                    stop => return Ok(Err(stop)),
                }
                let count = now.count().min(PageCount::new(PART).expect("64 MiB"));
                let part = GfnRange::new(now.start(), count).expect("a part of it");
                let came = memory.prefault(vm, vcpu, part).map_err(RunError::Memory)?;
                ahead.take(&came);
                left = GfnRange::between(came.done.end(), gfns.end());
            }
        }
        Ok(Ok(ahead))
    }
}

/// How a guest's run ended.
type Ended = (End, Vec<Ran>);

/// Runs a guest, and has memory mapped ahead of it for `vcpu`, which runs no guest: before it, or
/// beside it. How it ended, and what was mapped.
pub(crate) fn run<S: FnMut(Progress) -> Supervision>(
    prefault: Option<Prefault>,
    (of, threads): ((&Memory, VmId), &Threads<'_>),
    vcpu: Option<Vcpu<'_>>,
    mut supervise: S,
    run: impl FnOnce(S) -> Result<Ended, RunError>,
) -> Result<(Ended, Option<Ahead>), RunError> {
    let (Some(prefault), Some(vcpu)) = (prefault, vcpu) else {
        return Ok((run(supervise)?, None));
    };
    let stop = &AtomicBool::new(false);
    match prefault {
        prefault if !prefault.running => {
            let tell = |ahead| supervise(Progress { ahead: Some(ahead), ..threads.progress() });
            match prefault.map(of, vcpu, tell)? {
                Ok(ahead) => Ok((run(supervise)?, Some(ahead))),
                Err(Supervision::TimeOut) => Ok(((End::TimedOut, Vec::new()), None)),
                Err(_) => Ok(((End::Interrupted, Vec::new()), None)),
            }
        }
        prefault => std::thread::scope(|scope| {
            let stopped = move |_| match stop.load(Ordering::Acquire) {
                true => Supervision::Interrupt,
                false => Supervision::GoOn,
            };
            let beside = std::thread::Builder::new()
                .name("prefault".to_owned())
                .spawn_scoped(scope, move || prefault.map(of, vcpu, stopped))
                .map_err(RunError::Thread)?;
            let ended = run(supervise);
            stop.store(true, Ordering::Release);
            let ahead = beside.join().map_err(|_| RunError::Panicked)?;
            Ok((ended?, ahead?.ok()))
        }),
    }
}

impl Ahead {
    fn take(&mut self, came: &Prefaulted) {
        self.done += came.done.count().get();
        self.skipped += came.skipped.get();
    }
}
