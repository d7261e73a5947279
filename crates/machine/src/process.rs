//! Processes: threads, VMAs onto objects, fork and exit.
//!
//! A VMA is *watched* if a userfaultfd is registered on it: a touch of a page that its page table
//! does not map becomes a [`HostFault`](crate::HostFault) for the driver. What is not watched, the
//! kernel fills by itself from the page cache, allocating if there is a hole.

use alloc::vec::Vec;

use polder_units::{Level, PageIndex, PageRange};

use crate::host_mmu::HostEntry;
use crate::table::{Found, Table};
use crate::tlb::Tlb;
use crate::{Error, Machine, ObjectId, ProcessId, Vpn, VpnRange};

/// How a process sees an object.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct View {
    /// Touches of pages that are not mapped go to the driver, not to the kernel.
    pub watched: bool,
    /// The process may write.
    pub writable: bool,
    /// A forked child has no copy of it (`MADV_DONTFORK`).
    pub dont_fork: bool,
    /// The largest level that it can be mapped at (thread 4's hook for supported orders).
    pub largest: Level,
}

impl View {
    /// The view of device models: watched, writable, not inherited, of 4K pages.
    pub const HOST: Self =
        Self { watched: true, writable: true, dont_fork: true, largest: Level::Size4K };
    /// A plain shared mapping, as any process makes one.
    pub const PLAIN: Self =
        Self { watched: false, writable: true, dont_fork: false, largest: Level::Size4K };
}

#[derive(Clone, Hash)]
pub(crate) struct Vma {
    pub(crate) range: VpnRange,
    pub(crate) object: ObjectId,
    pub(crate) first: PageIndex,
    pub(crate) view: View,
}

impl Vma {
    /// The object's page at `vpn`, which lies in the VMA.
    pub(crate) fn page_of(&self, vpn: Vpn) -> Option<PageIndex> {
        PageIndex::new(self.first.get() + vpn.get().checked_sub(self.range.start().get())?)
    }

    /// Where the object's page `page` is mapped, if it is.
    pub(crate) fn vpn_of(&self, page: PageIndex) -> Option<Vpn> {
        let offset = page.checked_sub(self.first)?;
        let vpn = Vpn::new(self.range.start().get() + offset.get())?;
        self.range.contains(vpn).then_some(vpn)
    }

    /// Where the object's pages `range` are mapped.
    fn vpns_of(&self, range: PageRange) -> Option<VpnRange> {
        let pages = PageRange::new(self.first, self.range.count()).ok()?.intersection(range)?;
        VpnRange::new(self.vpn_of(pages.start())?, pages.count()).ok()
    }
}

#[derive(Clone, Hash)]
pub(crate) struct Process {
    pub(crate) vmas: Vec<Vma>,
    pub(crate) table: Table<HostEntry>,
    pub(crate) threads: Vec<Tlb>,
}

impl Process {
    pub(crate) fn vma(&self, vpn: Vpn) -> Result<&Vma, Error> {
        self.vmas.iter().find(|vma| vma.range.contains(vpn)).ok_or(Error::NoVma { vpn })
    }

    pub(crate) fn uses(&self, object: ObjectId) -> bool {
        self.vmas.iter().any(|vma| vma.object == object)
    }

    pub(crate) fn maps(&self, vpn: Vpn) -> bool {
        self.table.get(vpn.get()).is_some_and(|found| found.entry.is_mapped())
    }

    pub(crate) fn vmas_onto(
        &self,
        object: ObjectId,
        range: PageRange,
    ) -> impl Iterator<Item = VpnRange> {
        let vmas = self.vmas.iter().filter(move |vma| vma.object == object);
        vmas.filter_map(move |vma| vma.vpns_of(range))
    }

    /// Cuts markers so that one ends at `number`: a marker of part of a range must stay.
    pub(crate) fn cut_marker(&mut self, number: u64) {
        while let Some(Found { start, entry: HostEntry::Poison, .. }) = self.table.get(number)
            && start != number
        {
            self.table.split(number, |entry, _| *entry);
        }
    }
}

/// One thread of a process, on a CPU of its own.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Thread {
    /// Its process.
    pub process: ProcessId,
    /// Its number in the process, from 0.
    pub index: u16,
}

impl Machine {
    /// Creates a process with one thread, number 0, and nothing mapped.
    ///
    /// # Errors
    /// [`Error::TooMany`].
    pub fn create_process(&mut self) -> Result<ProcessId, Error> {
        let threads = alloc::vec![Tlb::new(self.config.tlb_entries)];
        let table = Table::new(self.config.geometry);
        self.processes.insert(Process { vmas: Vec::new(), table, threads })
    }

    /// Adds a thread to a process.
    ///
    /// # Errors
    /// [`Error::Gone`]; [`Error::TooMany`] above 2^16.
    pub fn add_thread(&mut self, process: ProcessId) -> Result<Thread, Error> {
        let tlb = Tlb::new(self.config.tlb_entries);
        let threads = &mut self.processes.get_mut(process)?.threads;
        let index = u16::try_from(threads.len()).map_err(|_| Error::TooMany("thread"))?;
        threads.push(tlb);
        Ok(Thread { process, index })
    }

    /// Ends a process: its mappings are dropped. Its pins stay (a ring, a device holds them).
    ///
    /// # Errors
    /// [`Error::Gone`].
    pub fn exit_process(&mut self, process: ProcessId) -> Result<(), Error> {
        self.drop_entries(process, (0, u64::MAX), false)?;
        self.processes.remove(process).map(|_| ())
    }

    /// Maps the object from page `first` on at `at`. Nothing is faulted in.
    ///
    /// The range may reach past the object's end: a touch there is a `SIGBUS`.
    ///
    /// # Errors
    /// [`Error::Exists`] if another VMA overlaps; [`Error::Space`]; [`Error::Anonymous`];
    /// [`Error::Gone`].
    pub fn mmap(
        &mut self,
        process: ProcessId,
        at: VpnRange,
        object: ObjectId,
        first: PageIndex,
        view: View,
    ) -> Result<(), Error> {
        if self.objects.get(object)?.anonymous {
            return Err(Error::Anonymous { object });
        }
        self.in_space(at.end())?;
        self.in_space(first.get() + at.count().get())?;
        let vmas = &mut self.processes.get_mut(process)?.vmas;
        if let Some(other) = vmas.iter().find_map(|vma| vma.range.intersection(at)) {
            return Err(Error::Exists { number: other.start().get() });
        }
        let after = vmas.partition_point(|vma| vma.range.start() < at.start());
        vmas.insert(after, Vma { range: at, object, first, view });
        Ok(())
    }

    /// Takes away the VMA at `vpn` with its entries and markers, and flushes it.
    ///
    /// # Errors
    /// [`Error::NoVma`]; [`Error::Gone`].
    pub fn munmap(&mut self, process: ProcessId, vpn: Vpn) -> Result<(), Error> {
        let range = self.processes.get(process)?.vma(vpn)?.range;
        self.drop_entries(process, (range.start().get(), range.end()), false)?;
        self.processes.get_mut(process)?.vmas.retain(|vma| vma.range != range);
        self.flush_process(process, range)
    }

    /// Forks: the child has the VMAs that are not `dont_fork`, with empty page tables, and none of
    /// them is watched (a userfaultfd without `UFFD_FEATURE_EVENT_FORK` does not follow).
    ///
    /// # Errors
    /// [`Error::Gone`]; [`Error::TooMany`].
    pub fn fork(&mut self, process: ProcessId) -> Result<ProcessId, Error> {
        let parent = self.processes.get(process)?;
        let inherited = parent.vmas.iter().filter(|vma| !vma.view.dont_fork).cloned();
        let vmas =
            inherited.map(|vma| Vma { view: View { watched: false, ..vma.view }, ..vma }).collect();
        let child = self.create_process()?;
        self.processes.get_mut(child)?.vmas = vmas;
        Ok(child)
    }

    pub(crate) fn tlb_mut(&mut self, thread: Thread) -> Result<&mut Tlb, Error> {
        let threads = &mut self.processes.get_mut(thread.process)?.threads;
        let gone = Error::Gone { what: "thread", number: u32::from(thread.index) };
        threads.get_mut(usize::from(thread.index)).ok_or(gone)
    }
}
