//! Huge pages for a test, set aside and put back.
//!
//! Tests run beside each other, in several processes: the number of hugetlb pages is raised and
//! lowered by what each needs, under a lock of the kernel's own folder. Whoever has some holds
//! another lock, shared: a discard gives a page back for the moment until it is promised again, and
//! a test that empties the pool, or takes all that is free, would have it. Such a test holds that
//! lock alone. The choice for transparent pages is held as long as the test that needs it runs.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::time::Duration;

const POOL_2M: &str = "/sys/kernel/mm/hugepages/hugepages-2048kB";
const POOL_1G: &str = "/sys/kernel/mm/hugepages/hugepages-1048576kB";
/// Whose lock is held by who changes their number, and by who has some of them.
const NUMBER: &str = "nr_hugepages";
const HAVE: &str = "resv_hugepages";
const THP: &str = "/sys/kernel/mm/transparent_hugepage/hugepages-2048kB/shmem_enabled";
const THP_OF_ALL: &str = "/sys/kernel/mm/transparent_hugepage/shmem_enabled";

/// Hugetlb pages that are there for a test while it is held.
#[derive(Debug)]
pub struct HugetlbPages {
    pool: PathBuf,
    /// Those that were not there before.
    count: u64,
    /// The lock of those who have some, shared or alone.
    _held: File,
}

fn number(path: &Path) -> Result<u64, String> {
    let text = fs::read_to_string(path).map_err(|error| format!("{}: {error}", path.display()))?;
    text.trim().parse().map_err(|error| format!("{}: {error}", path.display()))
}

fn open(path: &Path) -> Result<File, String> {
    File::open(path).map_err(|error| format!("{}: {error}", path.display()))
}

/// Holds a file's lock, as the only one.
fn lock(path: &Path) -> Result<File, String> {
    let file = open(path)?;
    file.lock().map_err(|error| format!("{}: {error}", path.display()))?;
    Ok(file)
}

/// Holds the lock of those who have pages of a pool.
fn share(pool: &Path) -> Result<File, String> {
    let path = pool.join(HAVE);
    let file = open(&path)?;
    file.lock_shared().map_err(|error| format!("{}: {error}", path.display()))?;
    Ok(file)
}

impl HugetlbPages {
    /// `count` more pages of 2M.
    ///
    /// # Errors
    /// Why there are none.
    pub fn of_2m(count: u64) -> Result<Self, String> {
        // The kernel gives up soon where memory is in pieces, or full of files that were read.
        let compact = Some("compact_memory");
        let helps = [None, compact, Some("drop_caches"), compact];
        Self::of(POOL_2M, count, &helps, share(Path::new(POOL_2M))?)
    }

    /// `count` pages of 2M, the only ones that are free and not promised, and no other test has any
    /// while they are held. Waits for those that do, and for who else has some, for `at_most` at
    /// most.
    ///
    /// # Errors
    /// Why there are none.
    pub fn of_2m_alone(count: u64, at_most: Duration) -> Result<Self, String> {
        const PAUSE: Duration = Duration::from_millis(20);
        let (pool, mut left) = (Path::new(POOL_2M), at_most);
        loop {
            let held = open(&pool.join(HAVE))?;
            let alone = held.try_lock().is_ok();
            if alone && number(&pool.join("free_hugepages"))? <= number(&pool.join(HAVE))? {
                return Self::of(POOL_2M, count, &[None], held);
            }
            drop(held);
            let others = || "others have huge pages set aside, all the time".to_owned();
            left = left.checked_sub(PAUSE).ok_or_else(others)?;
            std::thread::sleep(PAUSE);
        }
    }

    /// Takes them away again, as an administrator may: what is promised of them stays so.
    ///
    /// # Panics
    /// If the kernel no longer listens.
    pub fn shrink(&mut self) {
        let file = self.pool.join(NUMBER);
        let _changes = lock(&file).expect("it was there");
        let now = number(&file).expect("it was there");
        let count = std::mem::take(&mut self.count);
        fs::write(file, now.saturating_sub(count).to_string()).expect("it was there");
    }

    /// `count` pages of 1G: free ones that were set aside at boot, or else more.
    ///
    /// # Errors
    /// Why there are none.
    pub fn of_1g(count: u64) -> Result<Self, String> {
        let pool = PathBuf::from(POOL_1G);
        let held = lock(&pool.join(HAVE))?;
        if number(&pool.join("free_hugepages"))? >= number(&pool.join(HAVE))? + count {
            return Ok(Self { pool, count: 0, _held: held });
        }
        // Memory that was not in one piece a moment ago is not made so by asking again, and the
        // kernel searches all of it.
        static NONE: OnceLock<String> = OnceLock::new();
        if let Some(why) = NONE.get() {
            return Err(why.clone());
        }
        let pages = Self::of(POOL_1G, count, &[None], held);
        pages.inspect_err(|why| drop(NONE.set(why.clone())))
    }

    fn of(pool: &str, count: u64, helps: &[Option<&str>], held: File) -> Result<Self, String> {
        let pool = PathBuf::from(pool);
        let file = pool.join(NUMBER);
        let changes = lock(&file)?;
        let before = number(&file)?;
        let mut after = before;
        for help in helps {
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
        drop(changes);
        let had = after.saturating_sub(before);
        let pages = Self { pool, count: had, _held: held };
        if had == count {
            return Ok(pages);
        }
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
        number(&self.pool.join(HAVE)).expect("it was there")
    }
}

impl Drop for HugetlbPages {
    fn drop(&mut self) {
        if self.count == 0 {
            return;
        }
        let file = self.pool.join(NUMBER);
        let _changes = lock(&file);
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
