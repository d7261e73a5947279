//! What a process holds that a memory has to give back.

use std::time::Duration;

/// What is counted before a life and after it.
#[derive(Clone, Copy, PartialEq, Debug)]
pub(crate) struct Held {
    pub(crate) descriptors: usize,
    pub(crate) mappings: usize,
    pub(crate) threads: usize,
}

impl Held {
    /// Once the VM's own memory has a fault thread, which takes its name when it first runs.
    pub(crate) fn before_a_life() -> Self {
        let before = Self::until(|held| held.threads == 1);
        before.expect("the VM's own memory has a fault thread")
    }

    /// The first that is so, within a while: a thread that was joined may still be listed for a
    /// moment.
    pub(crate) fn until(is_so: impl Fn(&Self) -> bool) -> Option<Self> {
        (0..1000).map(|_| Self::now()).find(|held| {
            std::thread::sleep(Duration::from_millis(1));
            is_so(held)
        })
    }

    pub(crate) fn now() -> Self {
        let entries = |path| std::fs::read_dir(path).expect("procfs").flatten();
        // KVM has threads of its own in the process. One that has just ended has no name any more.
        let name = |task: std::fs::DirEntry| std::fs::read_to_string(task.path().join("comm"));
        let ours = |name: &String| name.trim() == "polder-faults";
        let maps = std::fs::read_to_string("/proc/self/maps").expect("procfs");
        Self {
            descriptors: entries("/proc/self/fd").count(),
            mappings: maps.lines().filter(|line| line.contains("/memfd:polder")).count(),
            threads: entries("/proc/self/task").flat_map(name).filter(ours).count(),
        }
    }
}
