//! Two threads that never have the same CPU: one that is timed, and one that does something to it.
//!
//! The scheduler may put both on one CPU where others are busy, and leaves them there. What is timed
//! is then how the one takes the CPU from the other: each time that it wakes.

use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};

/// A thread that keeps to one CPU until this is dropped.
pub(crate) struct Apart {
    /// The CPUs that it had.
    all: CpuSet,
    /// Those that others may have meanwhile.
    others: CpuSet,
}

impl Apart {
    /// Keeps the calling thread to one of its CPUs. `None` if it has one only, or more than can be
    /// told: then all is left to the scheduler.
    pub(crate) fn new() -> Option<Self> {
        let all = sched_getaffinity(None).ok()?;
        let own = (0..CpuSet::MAX_CPU).find(|&cpu| all.is_set(cpu))?;
        let (mut one, mut others) = (CpuSet::new(), all);
        one.set(own);
        others.unset(own);
        if others.count() == 0 {
            return None;
        }
        sched_setaffinity(None, &one).ok()?;
        Some(Self { all, others })
    }

    /// Keeps the calling thread, and those that it starts from here on, to the other CPUs.
    pub(crate) fn elsewhere(&self) {
        // They were the process's a moment ago. Were they taken away since, the figures are coarser.
        let _ = sched_setaffinity(None, &self.others);
    }
}

impl Drop for Apart {
    fn drop(&mut self) {
        // As above.
        let _ = sched_setaffinity(None, &self.all);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_threads_have_no_cpu_in_common_and_the_first_has_its_own_back() {
        let cpus = || sched_getaffinity(None).expect("a thread's CPUs can be asked for");
        let before = cpus();
        let Some(apart) = Apart::new() else { return };
        let here = cpus();
        let there = std::thread::scope(|scope| {
            let thread = scope.spawn(|| {
                apart.elsewhere();
                cpus()
            });
            thread.join().expect("it does not panic")
        });
        assert_eq!((here.count(), there.count()), (1, before.count() - 1));
        assert!(!(0..CpuSet::MAX_CPU).any(|cpu| here.is_set(cpu) && there.is_set(cpu)));
        drop(apart);
        assert!(cpus() == before);
    }
}
