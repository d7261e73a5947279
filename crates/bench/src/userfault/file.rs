//! The file that memory is filled from, and who touches what of it.

use std::fs::File;
use std::io::Write;
use std::os::fd::AsRawFd;
use std::path::PathBuf;

use polder::units::{Gpa, PAGE_BYTES, PAGE_SIZE, PageCount};
use polder_vmm::Vm;
use polder_vmm::scenario::{Op, Pattern};

use super::Order;
use crate::BenchError;

/// 256 MiB.
const PAGES: u64 = 1 << 16;

/// Pages that a working set has, about.
const WORKING_SET: u64 = 8192;
/// The most pages of a cluster of it.
const CLUSTER: u64 = 64;
/// Pages of which each is touched.
const EACH: u64 = 16384;
/// Pages of random touches.
const RANDOM: u64 = 4096;

const PATTERN: Pattern = Pattern::Seeded { seed: 11 };

/// A file whose words are a pattern of the guest's at which they will lie; in the page cache, and
/// in our own memory, too. It has no name, so that nothing is left whatever ends this process.
pub(super) struct Image {
    file: File,
    bytes: Vec<u8>,
}

impl Image {
    pub(super) fn new() -> Result<Self, BenchError> {
        let path = std::env::temp_dir().join(format!("polder-bench-{}", std::process::id()));
        let words = (0..PAGES * PAGE_SIZE / 8).map(|word| Gpa::new(Vm::RAM.get() + 8 * word));
        let bytes: Vec<u8> = words.flat_map(|gpa| PATTERN.word(gpa).to_le_bytes()).collect();
        let make = || {
            let mut file = File::options().read(true).write(true).create_new(true).open(&path)?;
            std::fs::remove_file(&path)?;
            file.write_all(&bytes)?;
            Ok(file)
        };
        match make() {
            Ok(file) => Ok(Self { file, bytes }),
            Err(source) => Err(BenchError::File { path, source }),
        }
    }

    /// By which it can be opened anew, as long as it is there.
    pub(super) fn path(&self) -> PathBuf {
        format!("/proc/self/fd/{}", self.file.as_raw_fd()).into()
    }

    pub(super) fn pages(&self) -> PageCount {
        PageCount::new(PAGES).expect("few")
    }

    /// The bytes of a page.
    pub(super) fn page(&self, page: u64) -> &[u8; PAGE_BYTES] {
        let at = usize::try_from(page).expect("few") * PAGE_BYTES;
        self.bytes[at..][..PAGE_BYTES].try_into().expect("a page's length")
    }

    /// What each of `vcpus` does, and how many pages they touch in all. Each has a part of memory
    /// of its own.
    pub(super) fn programs(&self, order: Order, vcpus: u64) -> (Vec<Vec<Op>>, u64) {
        let part = PAGES / vcpus;
        let mut touched = 0;
        let programs = (0..vcpus).map(|vcpu| {
            let runs = runs(order, part, vcpus, 77 + vcpu);
            touched += runs.iter().map(|(_, pages)| pages).sum::<u64>();
            let check = |(page, pages): (u64, u64)| {
                let gpa = Gpa::new(Vm::RAM.get() + (vcpu * part + page) * PAGE_SIZE);
                let len = if order == Order::EachPage { 8 } else { pages * PAGE_SIZE };
                Op::Check { gpa, len, pattern: PATTERN }
            };
            runs.into_iter().map(check).chain([Op::Done]).collect()
        });
        let programs = programs.collect();
        (programs, touched)
    }
}

/// First pages and lengths of what is touched, of `part` pages; none twice.
fn runs(order: Order, part: u64, vcpus: u64, seed: u64) -> Vec<(u64, u64)> {
    let mut random = seed;
    let mut below = |limit: u64| {
        // splitmix64.
        random = random.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (random ^ (random >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (mixed ^ (mixed >> 31)) % limit
    };
    // Places are shuffled, and each holds one cluster at most.
    let (size, count) = match order {
        Order::Sequential => return vec![(0, part)],
        Order::EachPage => return (0..part.min(EACH)).map(|page| (page, 1)).collect(),
        Order::WorkingSet => (CLUSTER, 2 * WORKING_SET / CLUSTER / vcpus),
        Order::Random => (1, RANDOM / vcpus),
    };
    let mut places: Vec<u64> = (0..part / size).collect();
    for at in (1..places.len()).rev() {
        places.swap(at, usize::try_from(below(at as u64 + 1)).expect("few"));
    }
    places.truncate(usize::try_from(count).expect("few"));
    places.into_iter().map(|place| (place * size, 1 + below(size))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clusters_are_of_all_lengths_and_do_not_overlap() {
        let mut runs = runs(Order::WorkingSet, PAGES, 1, 3);
        let (least, most) =
            (runs.iter().map(|run| run.1).min(), runs.iter().map(|run| run.1).max());
        assert!(least <= Some(4) && most >= Some(61), "{least:?} {most:?}");
        let touched: u64 = runs.iter().map(|run| run.1).sum();
        assert!((WORKING_SET * 3 / 4..WORKING_SET * 5 / 4).contains(&touched), "{touched}");
        runs.sort_unstable();
        assert!(runs.windows(2).all(|pair| pair[0].0 + pair[0].1 <= pair[1].0));
    }
}
