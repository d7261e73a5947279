//! Huge pages for a test, set aside and put back.
//!
//! Tests run beside each other, in several processes: the number of hugetlb pages is raised and
//! lowered by what each needs, under a lock of the kernel's own folder; the choice for transparent
//! ones is held as long as the test that needs it runs.

use std::fs::{self, File};
use std::path::{Path, PathBuf};

const POOL_2M: &str = "/sys/kernel/mm/hugepages/hugepages-2048kB";
const POOL_1G: &str = "/sys/kernel/mm/hugepages/hugepages-1048576kB";
const THP: &str = "/sys/kernel/mm/transparent_hugepage/hugepages-2048kB/shmem_enabled";
const THP_OF_ALL: &str = "/sys/kernel/mm/transparent_hugepage/shmem_enabled";

/// Hugetlb pages that are there for a test while it is held.
#[derive(Debug)]
pub struct HugetlbPages {
    pool: PathBuf,
    count: u64,
}

fn number(path: &Path) -> Result<u64, String> {
    let text = fs::read_to_string(path).map_err(|error| format!("{}: {error}", path.display()))?;
    text.trim().parse().map_err(|error| format!("{}: {error}", path.display()))
}

/// Holds the folder's lock.
fn lock(path: &Path) -> Result<File, String> {
    let file = File::open(path).map_err(|error| format!("{}: {error}", path.display()))?;
    file.lock().map_err(|error| format!("{}: {error}", path.display()))?;
    Ok(file)
}

impl HugetlbPages {
    /// `count` more pages of 2M.
    ///
    /// # Errors
    /// Why there are none.
    pub fn of_2m(count: u64) -> Result<Self, String> {
        Self::of(POOL_2M, count)
    }

    /// `count` more pages of 1G.
    ///
    /// # Errors
    /// Why there are none.
    pub fn of_1g(count: u64) -> Result<Self, String> {
        Self::of(POOL_1G, count)
    }

    fn of(pool: &str, count: u64) -> Result<Self, String> {
        let pool = PathBuf::from(pool);
        let file = pool.join("nr_hugepages");
        let _held = lock(&file)?;
        let before = number(&file)?;
        let mut after = before;
        // The kernel gives up soon where memory is in pieces, or full of files that were read.
        for help in [None, Some("compact_memory"), Some("drop_caches"), Some("compact_memory")] {
            if let Some(help) = help {
                let _ = fs::write(Path::new("/proc/sys/vm").join(help), "1");
            }
            fs::write(&file, (before + count).to_string())
                .map_err(|error| format!("{}: {error}", file.display()))?;
            after = number(&file)?;
            if after >= before + count {
                break;
            }
        }
        let pages = Self { pool, count: after.saturating_sub(before) };
        if pages.count == count {
            return Ok(pages);
        }
        drop(_held);
        let had = pages.count;
        Err(format!("{had} of {count} huge pages could be had: memory is in pieces, or used up"))
    }

    /// How many pages of this size nobody has, of the whole machine.
    ///
    /// # Panics
    /// If the kernel no longer says.
    pub fn free(&self) -> u64 {
        number(&self.pool.join("free_hugepages")).expect("it was there")
    }

    /// How many of those are promised.
    ///
    /// # Panics
    /// If the kernel no longer says.
    pub fn reserved(&self) -> u64 {
        number(&self.pool.join("resv_hugepages")).expect("it was there")
    }
}

impl Drop for HugetlbPages {
    fn drop(&mut self) {
        let file = self.pool.join("nr_hugepages");
        let _held = lock(&file);
        if let Ok(now) = number(&file) {
            // Who shares the machine has the rest.
            let _ = fs::write(&file, now.saturating_sub(self.count).to_string());
        }
    }
}

/// Transparent huge pages for shared memory that asks for them, while it is held.
#[derive(Debug)]
pub struct Thp {
    file: &'static str,
    before: String,
    _held: File,
}

impl Thp {
    /// Allows them.
    ///
    /// # Errors
    /// Why that can't be done.
    pub fn allow() -> Result<Self, String> {
        let file = if Path::new(THP).exists() { THP } else { THP_OF_ALL };
        let held = lock(Path::new(file))?;
        let text = fs::read_to_string(file).map_err(|error| format!("{file}: {error}"))?;
        let before = text.split_once('[').and_then(|(_, rest)| rest.split_once(']'));
        let before = before.ok_or_else(|| format!("{file}: nothing is chosen"))?.0.to_owned();
        fs::write(file, "advise").map_err(|error| format!("{file}: {error}"))?;
        Ok(Self { file, before, _held: held })
    }
}

impl Drop for Thp {
    fn drop(&mut self) {
        let _ = fs::write(self.file, &self.before);
    }
}
