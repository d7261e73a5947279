//! What the kernel says of the machine and of this process.

use std::fs::read_to_string;
use std::thread::available_parallelism;

/// CPU, cores and kernel, in a line.
pub(crate) fn describe() -> String {
    let cpuinfo = read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = cpuinfo.lines().find_map(|line| line.strip_prefix("model name"));
    let model = model.map_or("unknown CPU", |rest| rest.trim_start_matches([' ', '\t', ':']));
    let cores = available_parallelism().map_or(1, usize::from);
    let kernel = read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let s = if cores == 1 { "" } else { "s" };
    format!("{model}, {cores} core{s}, Linux {}", kernel.trim())
}

/// The bytes of memory that this process has in fact, or `None` if the kernel does not say. Of
/// the places that tell, this one counts and does not estimate.
pub(crate) fn resident_bytes() -> Option<u64> {
    parse_resident_bytes(&read_to_string("/proc/self/smaps_rollup").ok()?)
}

fn parse_resident_bytes(rollup: &str) -> Option<u64> {
    let line = rollup.lines().find_map(|line| line.strip_prefix("Rss:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    kib.checked_mul(1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn resident_memory_is_read() {
        let text = "55d0-7ffe ---p 00000000 00:00 0  [rollup]\nRss:     1234 kB\nPss:  9 kB\n";
        assert_eq!(parse_resident_bytes(text), Some(1234 * 1024));
        assert_eq!(parse_resident_bytes("Pss: 9 kB\n"), None);
    }

    #[test]
    fn a_machine_is_one_line() {
        assert_eq!(describe().lines().count(), 1);
        assert!(describe().contains(" core"));
    }
}
