//! How faults scale with vCPUs, **modelled**: one event queue next to exits of the vCPU that
//! faulted (KVM userfault), which no released kernel has.
//!
//! Every vCPU faults again as soon as it was answered. A fault takes a time of its own, which all
//! vCPUs spend side by side (though the more they are, the more they get in each other's way), and
//! a part that one does at a time: for the queue, its lock, its reader and a look at everybody who
//! waits on it, which takes longer the more they are; for exits, what KVM itself does one at a
//! time.
//!
//! The times are fitted to what was published with `KVM_CAP_MEM_FAULT_NOWAIT` (kvm list, 2023: one
//! userfaultfd for all memory next to exits, on 256 CPUs), which each row tells, too.

use std::time::Duration;

use crate::Row;

/// Nanoseconds.
struct Times {
    /// Each vCPU's own, were it alone.
    parallel: u64,
    /// The power of the number of vCPUs by which that grows.
    crowd: f64,
    /// One at a time.
    serial: u64,
    /// More of the same, for each vCPU that waits, in hundredths.
    waiter: u64,
}

const QUEUE: Times = Times { parallel: 230, crowd: 0.0, serial: 6_360, waiter: 8_370 };
const EXITS: Times = Times { parallel: 2_690, crowd: 0.45, serial: 248, waiter: 0 };

/// vCPUs, and what was published for them: thousands of faults a second by one queue, and by exits.
const PUBLISHED: [(u32, f64, f64); 5] = [
    (1, 150.0, 340.0),
    (4, 210.0, 809.0),
    (16, 130.0, 1595.0),
    (64, 86.0, 3482.0),
    (256, 36.0, 4012.0),
];

pub(super) fn rows() -> Vec<Row> {
    PUBLISHED.map(row).to_vec()
}

fn row((vcpus, queue, exits): (u32, f64, f64)) -> Row {
    let (baseline_value, polder_value) = (rate(&QUEUE, vcpus), rate(&EXITS, vcpus));
    Row {
        case: format!("{vcpus} vcpus, exits for faults (modelled)"),
        baseline: "one event queue (modelled)",
        unit: "faults/s",
        baseline_value,
        polder_value,
        ratio: polder_value / baseline_value,
        note: format!("modelled; published: {queue} and {exits} thousand"),
    }
}

/// Faults a second, of a long time.
fn rate(times: &Times, vcpus: u32) -> f64 {
    const FAULTS: u64 = 20_000;
    // When each vCPU comes to the part that one does at a time.
    let parallel = Duration::from_nanos(times.parallel).mul_f64(f64::from(vcpus).powf(times.crowd));
    let parallel = u64::try_from(parallel.as_nanos()).unwrap_or(u64::MAX);
    let mut ready = vec![parallel; vcpus as usize];
    let mut free = 0;
    for _ in 0..FAULTS {
        let next = (0..ready.len()).min_by_key(|&vcpu| ready[vcpu]).unwrap_or(0);
        let start = ready[next].max(free);
        let waiting = ready.iter().filter(|&&at| at <= start).count() as u64;
        free = start + times.serial + times.waiter * waiting / 100;
        ready[next] = free + parallel;
    }
    FAULTS as f64 / (free as f64 / 1e9)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_model_is_near_what_was_published() {
        for (vcpus, queue, exits) in PUBLISHED {
            for (times, published) in [(&QUEUE, queue), (&EXITS, exits)] {
                let ratio = rate(times, vcpus) / (1e3 * published);
                assert!((0.65..1.2).contains(&ratio), "{vcpus}: {ratio}");
            }
        }
    }
}
