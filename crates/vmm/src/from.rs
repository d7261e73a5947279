//! A guest on memory that is filled from a file while it runs.
//!
//! The guest reads every byte, a part of it straight through and a part of it here and there, and
//! tells digests of what it found. They are compared with the file, which is read for that once
//! more, by another way than the memory's source.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use polder::source::{Source, SourceFailure};
use polder::units::{ByteSize, Gpa, PAGE_SIZE, PageCount, PageRange};
use polder::{HostKind, Memory, PageSize, ReadAhead, Slot, SourceStatistics, Statistics, VmId};

use crate::guest::DIGEST_LEN_MAX;
use crate::machine_check::{MachineCheck, OnFailedPage};
use crate::report::{Accelerator, End, Failure, Progress, Supervision};
use crate::scenario::{
    BOOT_END, MMIO_END, MMIO_START, Op, Random, ScenarioError, VCPUS_MAX, WORD, digest,
};
use crate::{RunError, Vm};

/// The least and the most bytes of a digest.
const CHUNK_MIN: u64 = 64 << 10;
const CHUNK_MAX: u64 = DIGEST_LEN_MAX;

/// The most digests of a run: the ops have to fit beside the guest's code.
const DIGESTS_MAX: u64 = 8 << 10;

/// The most memory: its page tables and ops fit beside the guest's code.
const MEMORY_MAX: u64 = DIGESTS_MAX * CHUNK_MAX;

/// What to fill memory from, and how.
#[derive(Clone, Debug)]
pub struct FromConfig {
    /// On which host.
    pub host: HostKind,
    /// What the memory is filled from.
    pub source: Arc<dyn Source>,
    /// The file that it should come to.
    pub file: PathBuf,
    /// The memory, which the file is as large as.
    pub pages: PageCount,
    /// Which pages it is made of.
    pub page_size: PageSize,
    /// How many vCPUs.
    pub vcpus: u32,
    /// Decides the order in which the guest reads.
    pub seed: u64,
    /// How much is read ahead.
    pub read_ahead: ReadAhead,
    /// How long the guest waits for a page at most.
    pub deadline: Duration,
    /// Whether what the guest has not come to yet is brought meanwhile.
    pub fill: bool,
    /// What becomes of the guest when it touches a page that did not come.
    pub on_failed_page: OnFailedPage,
}

/// What came of it.
#[derive(Clone, Debug)]
pub struct FromReport {
    /// What ran the guest.
    pub accelerator: Accelerator,
    /// What its memory was made of in fact.
    pub page_size: PageSize,
    /// How it ended.
    pub end: End,
    /// The digests that were right.
    pub checks_passed: u64,
    /// What happened to the memory.
    pub memory: Statistics,
    /// What came from the source.
    pub source: SourceStatistics,
    /// What did not.
    pub failures: Vec<SourceFailure>,
    /// Pages that nobody has asked for.
    pub owed: PageCount,
    /// The machine checks that the guest was given.
    pub machine_checks: Vec<MachineCheck>,
}

/// Runs a guest that reads all of its memory, until it ends, or the supervisor has it stopped.
///
/// # Errors
/// A [`RunError`] with a way out.
pub fn run_from(
    config: &FromConfig,
    supervise: impl FnMut(Progress<'_>) -> Supervision,
) -> Result<FromReport, RunError> {
    let vcpus = u8::try_from(config.vcpus).ok().filter(|vcpus| (1..=VCPUS_MAX).contains(vcpus));
    let Some(vcpus) = vcpus else {
        return Err(ScenarioError::Vcpus { vcpus: config.vcpus }.into());
    };
    if config.pages.get() > MEMORY_MAX / PAGE_SIZE {
        return Err(RunError::TooLarge { most: ByteSize::new(MEMORY_MAX) });
    }
    let file = File::open(&config.file)
        .map_err(|source| RunError::Source { path: config.file.clone(), source })?;
    let vm = Vm::new(config.host)?;
    let (memory, id) = memory(config, &vm).map_err(RunError::Memory)?;
    if config.fill {
        memory.fill();
    }
    let expected = |gpa: Gpa, len: u64| {
        let mut bytes = vec![0; usize::try_from(len).ok()?];
        file.read_exact_at(&mut bytes, offset(gpa)?).ok()?;
        let words = bytes.chunks_exact(size_of::<u64>());
        Some(digest(words.map(|word| u64::from_le_bytes(word.try_into().expect("8 bytes")))))
    };
    let programs = programs(config.pages, vcpus, config.seed);
    let on_failed_page = config.on_failed_page;
    let (ended, machine_checks) =
        vm.run_expecting((&memory, id), &programs, (&expected, on_failed_page), supervise)?;
    let untaken = machine_checks.iter().find(|it| !it.taken);
    let end = match (ended.end, untaken) {
        (End::Ok, Some(it)) => {
            End::Failed(Failure::MachineCheckLost { vcpu: it.vcpu, page: it.page })
        }
        (end, _) => end,
    };
    Ok(FromReport {
        accelerator: match config.host {
            HostKind::Memfd | HostKind::GuestMemfd => Accelerator::Kvm,
            HostKind::Machine => Accelerator::Machine,
        },
        page_size: memory.page_size(),
        end,
        checks_passed: ended.checks_passed,
        memory: memory.statistics(),
        source: memory.source_statistics(),
        failures: memory.source_failures(),
        owed: memory.owed(),
        machine_checks,
    })
}

/// Memory that is owed from the source, as this VM's.
fn memory(config: &FromConfig, vm: &Vm) -> Result<(Memory, VmId), polder::Error> {
    let memory = Memory::builder(config.pages)
        .host(config.host)
        .page_size(config.page_size)
        .source(Arc::clone(&config.source))
        .read_ahead(config.read_ahead)
        .fault_deadline(config.deadline)
        .build()?;
    let id = vm.attach(&memory)?;
    for (slot, (gpa, pages)) in (0..).map(Slot).zip(places(config.pages)) {
        memory.bind(id, slot, gpa.gfn(), pages)?;
    }
    Ok((memory, id))
}

/// Where pages lie: from 2 MiB on, with the devices' hole passed over.
fn places(pages: PageCount) -> Vec<(Gpa, PageRange)> {
    let low = (MMIO_START - BOOT_END) / PAGE_SIZE;
    let parts = [(BOOT_END, 0, pages.get().min(low)), (MMIO_END, low, pages.get())];
    let parts = parts.into_iter();
    parts
        .filter_map(|(gpa, start, end)| Some((Gpa::new(gpa), PageRange::between(start, end)?)))
        .collect()
}

/// The byte of the file at an address.
fn offset(gpa: Gpa) -> Option<u64> {
    match gpa.get() {
        gpa if gpa < MMIO_START => gpa.checked_sub(BOOT_END),
        gpa => Some(gpa.checked_sub(MMIO_END)? + (MMIO_START - BOOT_END)),
    }
}

/// What each vCPU does: its part of memory, the first half of it in order and the second half in
/// any.
fn programs(pages: PageCount, vcpus: u8, seed: u64) -> Vec<Vec<Op>> {
    let bytes = pages.get() * PAGE_SIZE;
    let chunk = (bytes / DIGESTS_MAX).next_multiple_of(PAGE_SIZE).clamp(CHUNK_MIN, CHUNK_MAX);
    let mut digests = Vec::new();
    for (gpa, range) in places(pages) {
        let len = range.count().get() * PAGE_SIZE;
        let starts = (0..len).step_by(usize::try_from(chunk).expect("at most 16 MiB"));
        digests.extend(
            starts.map(|at| Op::Digest { gpa: Gpa::new(gpa.get() + at), len: chunk.min(len - at) }),
        );
    }
    let mut random = Random::new(seed);
    let each = digests.len().div_ceil(usize::from(vcpus)).max(1);
    let mut programs: Vec<Vec<Op>> = digests.chunks(each).map(<[Op]>::to_vec).collect();
    programs.resize(usize::from(vcpus), Vec::new());
    for program in &mut programs {
        let (first, second) = (program.len() / 2, program.len());
        for at in (first + 1..second).rev() {
            let other =
                first + usize::try_from(random.below((at - first + 1) as u64)).expect("an index");
            program.swap(at, other);
        }
        program.push(Op::Done);
    }
    programs
}

const _: () = assert!(CHUNK_MIN.is_multiple_of(WORD));

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_byte_is_read_once_wherever_it_lies() {
        for (pages, vcpus) in [(1u64, 1u8), (1, 4), (17, 2), (16384, 3), (3 << 18, 4)] {
            let count = PageCount::new(pages).unwrap();
            let programs = programs(count, vcpus, 5);
            assert_eq!(programs.len(), usize::from(vcpus));
            let mut seen: Vec<(u64, u64)> = programs
                .iter()
                .flatten()
                .filter_map(|op| match op {
                    Op::Digest { gpa, len } => Some((offset(*gpa).unwrap(), *len)),
                    _ => None,
                })
                .collect();
            seen.sort_unstable();
            let mut next = 0;
            for (at, len) in &seen {
                assert_eq!(*at, next);
                next += len;
            }
            assert_eq!(next, pages * PAGE_SIZE);
            assert!(seen.len() as u64 <= DIGESTS_MAX + 2);
            assert!(programs.iter().all(|ops| ops.last() == Some(&Op::Done)));
        }
    }
}
