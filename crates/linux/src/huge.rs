//! What the kernel says of huge pages: pools of hugetlb pages, transparent ones of shared memory,
//! and how a view is mapped.
//!
//! A file that can't be read is no answer, not an error: these are for reports and refusals.

use std::fs;

use polder_units::{Level, PAGE_SHIFT};

use crate::View;

const POOLS: &str = "/sys/kernel/mm/hugepages";
const THP: &str = "/sys/kernel/mm/transparent_hugepage";

/// The kernel's pool of hugetlb pages of one size.
#[derive(Clone, Copy, Default, PartialEq, Eq, Debug)]
pub struct HugetlbPool {
    /// All of them.
    pub total: u64,
    /// Those that nobody has.
    pub free: u64,
    /// Those of the free ones that are promised.
    pub reserved: u64,
}

impl HugetlbPool {
    /// Reads it; `None` if the kernel has no such pages.
    pub fn read(level: Level) -> Option<Self> {
        let number = |file| {
            let text = fs::read_to_string(format!("{}/{file}", Self::folder(level)?)).ok()?;
            text.trim().parse().ok()
        };
        Some(Self {
            total: number("nr_hugepages")?,
            free: number("free_hugepages")?,
            reserved: number("resv_hugepages")?,
        })
    }

    /// Where the kernel tells of it; `None` for pages of 4K.
    pub fn folder(level: Level) -> Option<String> {
        let kib = match level {
            Level::Size4K => return None,
            Level::Size2M => 2048,
            Level::Size1G => 1_048_576,
        };
        Some(format!("{POOLS}/hugepages-{kib}kB"))
    }

    /// How many more can be had.
    pub const fn available(&self) -> u64 {
        self.free.saturating_sub(self.reserved)
    }
}

/// Whether shared memory that asks for transparent huge pages of 2M gets them.
pub fn shmem_huge_pages() -> bool {
    let chosen = |file: &str| {
        let text = fs::read_to_string(format!("{THP}/{file}")).unwrap_or_default();
        let chosen = text.split_once('[').and_then(|(_, rest)| rest.split_once(']'));
        chosen.map(|(chosen, _)| chosen.to_owned()).unwrap_or_default()
    };
    let yes = |choice: &str| ["always", "within_size", "advise"].contains(&choice);
    let of_all = chosen("shmem_enabled");
    match (of_all.as_str(), chosen("hugepages-2048kB/shmem_enabled").as_str()) {
        // These two overrule what is chosen for a size.
        ("deny", _) => false,
        ("force", _) => true,
        // Before the sizes had choices of their own there was the one for all.
        (of_all, "inherit" | "") => yes(of_all),
        (_, of_size) => yes(of_size),
    }
}

impl View {
    /// How many 4 KiB pages of it this process has mapped by entries of 2M and more
    /// (`ShmemPmdMapped` of `/proc/self/smaps`). `None` if it can't be read.
    pub fn mapped_huge(&self) -> Option<u64> {
        let (start, end) = (self.address(), self.address() + self.length());
        let smaps = fs::read_to_string("/proc/self/smaps").ok()?;
        let (mut within, mut kib) = (false, 0);
        for line in smaps.lines() {
            if let Some(range) = mapping(line) {
                within = start <= range.0 && range.1 <= end;
            } else if within && let Some(rest) = line.strip_prefix("ShmemPmdMapped:") {
                kib += rest.trim().strip_suffix(" kB")?.trim().parse::<u64>().ok()?;
            }
        }
        Some((kib << 10) >> PAGE_SHIFT)
    }
}

/// The addresses of a mapping, of the line that begins it.
fn mapping(line: &str) -> Option<(usize, usize)> {
    let (start, end) = line.split_once(' ')?.0.split_once('-')?;
    Some((usize::from_str_radix(start, 16).ok()?, usize::from_str_radix(end, 16).ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mapping_is_told_from_its_fields() {
        assert_eq!(mapping("7f00-7f10 rw-s 00000000 00:01 5 /memfd:x"), Some((0x7f00, 0x7f10)));
        assert_eq!(mapping("ShmemPmdMapped:     2048 kB"), None);
        assert_eq!(mapping("VmFlags: rd wr sh"), None);
    }

    #[test]
    fn there_is_no_pool_of_small_pages() {
        assert_eq!(HugetlbPool::read(Level::Size4K), None);
    }
}
