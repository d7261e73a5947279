//! The views of an object: how its bytes are reached, and touches that wait to be answered.
//!
//! ```text
//!              guest view          host view             trusted view
//! who          KVM's slots         device models         Polder alone
//! shared page  mapped by faults    mapped by answers     mapped by use
//! private page (host by host)      poisoned when touched (host by host)
//! watched      while owed          always                never
//! ```

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::time::Duration;

use polder_engine::{RangeSet, Response, View as ViewKind};
use polder_linux::{Continued, Errno, GuestMemfd, HugetlbPool, Memfd, Nudge, Userfault, View};
use polder_units::{Geometry, Level, PAGE_SIZE, PageCount, PageIndex, PageRange};

use crate::sync::Mutex;
use crate::{Error, PageSize};

/// How the bytes of an object are reached, and who touches them.
pub(crate) trait Views: Send + Sync {
    /// Carries out an answer on pages of a view.
    fn answer(&self, view: ViewKind, response: Response, range: PageRange) -> Result<(), Error>;

    /// Lets whoever touches the pages touch again.
    fn wake(&self, view: ViewKind, range: PageRange);

    /// Adds the touches that wait to be answered; waits for one, for [`Views::nudge`], or until
    /// `at_most` has passed. Whether it was nudged, which it then is no more.
    fn touches(
        &self,
        into: &mut Vec<(ViewKind, PageIndex)>,
        at_most: Option<Duration>,
    ) -> Result<bool, Error>;

    /// Makes a waiting [`Views::touches`] return.
    fn nudge(&self);

    /// Copies bytes of the object out, unchecked: the caller holds a claim on them.
    fn read(&self, offset: u64, into: &mut [u8]) -> Result<(), Error>;

    /// Copies bytes of the object in, unchecked: the caller holds a claim on them.
    fn write(&self, offset: u64, from: &[u8]) -> Result<(), Error>;

    /// The same, of whole pages that nobody has seen yet.
    fn fill(&self, offset: u64, from: &[u8]) -> Result<(), Error> {
        self.write(offset, from)
    }

    /// Reads through the host view, as a device model's pointer does. The bytes lie in the object.
    fn touch_read(&self, offset: u64, into: &mut [u8]) -> Result<(), Error>;

    /// Writes through the host view.
    fn touch_write(&self, offset: u64, from: &[u8]) -> Result<(), Error>;

    /// Has the kernel read a file into the host view.
    fn touch_from(&self, file: BorrowedFd<'_>, offset: u64, count: usize) -> Result<usize, Error>;

    /// The host view, if it is memory of this process.
    fn host_view(&self) -> Option<&Arc<View>>;

    /// Where pages that are pinned are touched, if that is memory of this process: the host view,
    /// or, where that shows huge pages as a whole or not at all, the trusted one.
    fn pinned_view(&self) -> Option<&Arc<View>> {
        self.host_view()
    }

    /// The page at an address in the guest view, if that is memory of this process.
    fn guest_page(&self, address: usize) -> Option<PageIndex>;
}

/// The three views of a memfd.
pub(crate) struct MemfdViews {
    memfd: Arc<Memfd>,
    trusted: Arc<View>,
    guest: Userfault,
    host: Userfault,
    /// Held while the guest view's watching changes.
    watching: Mutex<Watching>,
    nudge: Nudge,
    /// Huge pages are freed as a whole: what is less of one is made zeros.
    freed: Level,
}

/// What is watched of the guest view.
struct Watching {
    /// All of it: something may still be owed.
    all: bool,
    /// For good: pages in quarantine, and those whose source failed.
    kept: RangeSet,
}

impl MemfdViews {
    /// A new memfd of `pages` pages, and its views; the guest's is watched if contents are `owed`.
    pub(super) fn new(
        name: &str,
        pages: PageCount,
        owed: bool,
        size: PageSize,
    ) -> Result<Self, Error> {
        let memfd = Arc::new(match size.reserved() {
            None => Memfd::new(name, pages)?,
            Some(level) => {
                Memfd::hugetlb(name, pages, level).map_err(|error| no_pages(error, level, pages))?
            }
        });
        let of_size =
            || if size == PageSize::Thp { View::of_huge_pages(&memfd) } else { View::new(&memfd) };
        let trusted = Arc::new(of_size()?);
        let guest = Userfault::new(Arc::new(of_size()?)).map_err(missing)?;
        let host = Userfault::new(Arc::new(View::new(&memfd)?)).map_err(missing)?;
        let nudge = Nudge::new()?;
        let watching = Mutex::new(Watching { all: owed, kept: RangeSet::default() });
        let freed = size.level();
        let views = Self { memfd, trusted, guest, host, watching, nudge, freed };
        views.host.watch(views.all()).map_err(missing)?;
        if owed {
            views.guest.watch(views.all()).map_err(missing)?;
        }
        Ok(views)
    }

    pub(super) fn memfd(&self) -> &Memfd {
        &self.memfd
    }

    /// What KVM's slots show.
    pub(crate) fn guest_view(&self) -> &Arc<View> {
        self.guest.view()
    }

    /// Shows a guest_memfd instead of the memfd, in all views, none of which is watched any more;
    /// unless a page of the memfd exists, whose bytes would be seen no more. Whether it did.
    ///
    /// # Errors
    /// Of `mmap`: then each view shows what it did, or nothing if that can't be done either.
    pub(super) fn show_instead(&self, guest_memfd: &GuestMemfd) -> Result<bool, Error> {
        // Last the one that answers are given by, so that none makes pages of the guest_memfd.
        let views = [self.guest.view().as_ref(), self.host.view().as_ref(), &self.trusted];
        let mut shown = 0;
        let done = views.iter().try_for_each(|view| {
            shown += 1;
            view.show(guest_memfd)
        });
        let empty = done.and_then(|()| Ok(self.memfd.existing()?.is_empty()));
        if empty != Ok(true) {
            views[..shown].iter().try_for_each(|view| view.show_memfd())?;
            self.host.watch(self.all())?;
        }
        // Who waits for an answer touches again: what it was about is gone.
        for watched in [&self.guest, &self.host] {
            let _ = watched.wake(self.all());
        }
        Ok(empty?)
    }

    /// The size of the object.
    pub(super) fn pages(&self) -> PageCount {
        self.memfd.pages()
    }

    /// All of the object.
    pub(super) fn all(&self) -> PageRange {
        PageRange::between(0, self.pages().get()).expect("an object has pages")
    }

    /// Takes pages out of the host view; they stay in the memfd. Lifts markers too.
    pub(super) fn unmap_host(&self, range: PageRange) -> Result<(), Error> {
        Ok(self.host.view().zap(range)?)
    }

    /// Makes pages zeros under every view, and frees them; of huge pages those that are in the
    /// range as a whole, for a hole in one would split it, or be none.
    pub(super) fn free(&self, range: PageRange) -> Result<(), Error> {
        let pages = Geometry::X86_64.pages(self.freed).get();
        let (start, end) = (range.start().get().next_multiple_of(pages), range.end());
        let whole = PageRange::between(start, end - end % pages);
        if let Some(whole) = whole {
            self.memfd.punch_hole(whole)?;
            if self.memfd.granule() > Level::Size4K {
                // They are still promised to this memory, unless somebody was faster.
                let level = self.memfd.granule();
                let reserved = self.memfd.reserve(whole);
                reserved.map_err(|error| no_pages(error, level, whole.count()))?;
            }
        }
        for part in whole.map_or([Some(range), None], |whole| range.without(whole)) {
            part.map_or(Ok(()), |part| self.zero(part))?;
        }
        // Markers survive that.
        let around = self.granules(range);
        self.host.view().zap(around)?;
        let marked = {
            let watching = self.watching.lock();
            watching.all || watching.kept.first_in(around).is_some()
        };
        if marked { Ok(self.guest.view().zap(around)?) } else { Ok(()) }
    }

    /// Makes those pages zeros that exist.
    fn zero(&self, range: PageRange) -> Result<(), Error> {
        static ZEROS: [u8; 1 << 16] = [0; 1 << 16];
        let existing = match self.memfd.granule() {
            Level::Size4K => self.memfd.existing_in(range)?,
            // A hole in a file of those is not told of; the page is reserved.
            Level::Size2M | Level::Size1G => vec![range],
        };
        for run in existing {
            let (mut at, end) = (run.start().offset(), run.end() * PAGE_SIZE);
            while at < end {
                let count = (end - at).min(ZEROS.len() as u64);
                let count = usize::try_from(count).expect("at most the length of an array");
                self.trusted.write(at, &ZEROS[..count])?;
                at += count as u64;
            }
        }
        Ok(())
    }

    /// All of the pages that the views map together with some of a range.
    fn granules(&self, range: PageRange) -> PageRange {
        let pages = Geometry::X86_64.pages(self.memfd.granule()).get();
        let (start, end) = (range.start().get(), range.end());
        PageRange::between(start - start % pages, end.next_multiple_of(pages)).unwrap_or(range)
    }

    /// The runs of pages that exist.
    pub(super) fn existing(&self) -> Result<Vec<PageRange>, Error> {
        if self.memfd.granule() == Level::Size4K {
            return Ok(self.memfd.existing()?);
        }
        // Whoever brings one has it mapped: the guest in its view, all others by the trusted one.
        let mut existing = RangeSet::default();
        for view in [&self.trusted, self.guest.view()] {
            view.present()?.into_iter().for_each(|run| existing.insert(run));
        }
        Ok(existing.runs().collect())
    }

    /// How many pages the guest view maps by entries of 2M; of transparent huge pages.
    pub(super) fn mapped_huge(&self) -> Option<PageCount> {
        self.guest.view().mapped_huge().and_then(PageCount::new)
    }

    /// The 2M pages of which something exists, of transparent huge pages. While something may be
    /// owed there are none: a touch of the guest view is told to the fault threads, whose answer
    /// maps 4K.
    pub(super) fn in_pieces(&self) -> Result<Vec<PageRange>, Error> {
        let pages = Geometry::X86_64.pages(Level::Size2M).get();
        let transparent = self.freed == Level::Size2M && self.memfd.granule() == Level::Size4K;
        if !transparent || self.watching.lock().all {
            return Ok(Vec::new());
        }
        let (mut found, mut next) = (Vec::new(), 0);
        for run in self.memfd.existing()? {
            let first = (run.start().get() / pages).max(next);
            next = run.end().div_ceil(pages);
            let numbers = (first..next).filter(|number| (number + 1) * pages <= self.pages().get());
            found.extend(numbers.filter_map(|it| PageRange::between(it * pages, (it + 1) * pages)));
        }
        Ok(found)
    }

    /// Has the kernel make one huge page of a 2M page, and map it in the guest view by one entry.
    ///
    /// # Errors
    /// `EBUSY` while a part of it is watched there; of `madvise(MADV_COLLAPSE)`.
    pub(super) fn collapse(&self, page: PageRange) -> Result<(), Error> {
        let watching = self.watching.lock();
        if watching.all || watching.kept.first_in(page).is_some() {
            return Err(super::failed("madvise(MADV_COLLAPSE)", Errno::BUSY));
        }
        Ok(self.guest.view().collapse(page)?)
    }

    /// Takes pages out of all views for good, by markers in their place. All of it is done that
    /// can be.
    pub(super) fn quarantine(&self, range: PageRange) -> Result<(), Error> {
        let mut watching = self.watching.lock();
        watching.kept.insert(range);
        let cut = |watched: &Userfault| {
            watched.view().zap(range)?;
            Ok(watched.poison(range)?)
        };
        let host = cut(&self.host);
        // Watching what is watched already is harmless.
        let guest = self.guest.watch(range).map_err(Error::from).and_then(|()| cut(&self.guest));
        host.and(guest)
    }

    /// Stops watching the guest view, but for pages in quarantine and those that `failed`.
    pub(super) fn settle(&self, failed: &[PageRange]) -> Result<(), Error> {
        let mut watching = self.watching.lock();
        failed.iter().for_each(|&run| watching.kept.insert(self.granules(run)));
        let mut next = 0;
        let ends = watching.kept.runs().map(|run| (run.start().get(), run.end()));
        for (start, end) in ends.chain([(self.memfd.pages().get(), u64::MAX)]) {
            if let Some(free) = PageRange::between(next, start) {
                self.guest.unwatch(free)?;
            }
            next = end;
        }
        watching.all = false;
        Ok(())
    }

    /// Maps whole pages into the guest view, so that no touch of them is told to anybody. The
    /// caller has an answer in flight on them: none of them may be touched where it is watched, for
    /// that touch may have to wait for an operation that waits for this answer.
    pub(super) fn show(&self, range: PageRange) -> Result<(), Error> {
        let (watched, free) = {
            let watching = self.watching.lock();
            match watching.all {
                true => (vec![range], Vec::new()),
                false => (watching.kept.within(range).collect(), outside(&watching.kept, range)),
            }
        };
        for part in free {
            self.guest.view().populate_read(part)?;
        }
        // Who is shown a part of a granule is shown all of it.
        let pages = Geometry::X86_64.pages(self.memfd.granule()).get();
        let whole = |part: PageRange| {
            let start = part.start().get().next_multiple_of(pages);
            PageRange::between(start, part.end() - part.end() % pages)
        };
        for part in watched.into_iter().filter_map(whole) {
            match self.map(ViewKind::Guest, part) {
                // Settled a moment ago: not all of it is watched any more.
                Err(Error::Host(error)) if error.errno == Errno::NOENT => self.show(part)?,
                shown => shown?,
            }
        }
        Ok(())
    }

    fn watched(&self, view: ViewKind) -> &Userfault {
        match view {
            ViewKind::Guest => &self.guest,
            ViewKind::Host => &self.host,
        }
    }

    /// Maps pages into a view, making those that don't exist yet.
    fn map(&self, view: ViewKind, range: PageRange) -> Result<(), Error> {
        let mut left = Some(range);
        while let Some(rest) = left {
            match self.watched(view).resume(rest)? {
                Continued::Mapped => return Ok(()),
                Continued::Missing(page) => {
                    left = PageRange::between(page.get(), rest.end());
                    self.trusted.populate(left.unwrap_or(rest))?;
                }
            }
        }
        Ok(())
    }
}

/// The runs of `range` that are not in `set`.
pub(super) fn outside(set: &RangeSet, range: PageRange) -> Vec<PageRange> {
    let mut outside = Vec::new();
    let mut next = range.start().get();
    for run in set.within(range) {
        outside.extend(PageRange::between(next, run.start().get()));
        next = run.end();
    }
    outside.extend(PageRange::between(next, range.end()));
    outside
}

impl Views for MemfdViews {
    fn answer(&self, view: ViewKind, response: Response, range: PageRange) -> Result<(), Error> {
        let done = match response {
            Response::Map => self.map(view, range),
            Response::Poison => self.watched(view).poison(range).map_err(Error::from),
        };
        match done {
            // Not watched any more: who touches needs no answer of ours, only to be told so.
            Err(Error::Host(error)) if error.errno == Errno::NOENT => {
                self.wake(view, range);
                Ok(())
            }
            done => done,
        }
    }

    fn wake(&self, view: ViewKind, range: PageRange) {
        // It can fail only for a range that is none of the view's.
        let _ = self.watched(view).wake(range);
    }

    fn touches(
        &self,
        into: &mut Vec<(ViewKind, PageIndex)>,
        at_most: Option<Duration>,
    ) -> Result<bool, Error> {
        let fds = [self.guest.as_fd(), self.host.as_fd(), self.nudge.as_fd()];
        let [guest, host, nudged] = polder_linux::wait(fds, at_most)?;
        if nudged {
            self.nudge.take();
        }
        let mut touches = Vec::new();
        let touched = [(ViewKind::Guest, guest), (ViewKind::Host, host)];
        for (view, _) in touched.into_iter().filter(|&(_, touched)| touched) {
            self.watched(view).touches(&mut touches)?;
            into.extend(touches.drain(..).map(|page| (view, page)));
        }
        Ok(nudged)
    }

    fn nudge(&self) {
        self.nudge.give();
    }

    fn read(&self, offset: u64, into: &mut [u8]) -> Result<(), Error> {
        Ok(self.trusted.read(offset, into)?)
    }

    fn write(&self, offset: u64, from: &[u8]) -> Result<(), Error> {
        Ok(self.trusted.write(offset, from)?)
    }

    /// By the memfd itself, not by the trusted view, of which each page would be a fault. Huge
    /// pages come by that view only: hugetlb has no `pwrite`, and shmem takes its advice from a
    /// mapping.
    fn fill(&self, offset: u64, from: &[u8]) -> Result<(), Error> {
        match self.freed {
            Level::Size4K => Ok(self.memfd.write_at(offset, from)?),
            Level::Size2M | Level::Size1G => self.write(offset, from),
        }
    }

    fn touch_read(&self, offset: u64, into: &mut [u8]) -> Result<(), Error> {
        Ok(self.host.view().read(offset, into)?)
    }

    fn touch_write(&self, offset: u64, from: &[u8]) -> Result<(), Error> {
        Ok(self.host.view().write(offset, from)?)
    }

    fn touch_from(&self, file: BorrowedFd<'_>, offset: u64, count: usize) -> Result<usize, Error> {
        Ok(self.host.view().read_from(file, offset, count)?)
    }

    fn host_view(&self) -> Option<&Arc<View>> {
        Some(self.host.view())
    }

    fn pinned_view(&self) -> Option<&Arc<View>> {
        let whole = self.memfd.granule() > Level::Size4K;
        Some(if whole { &self.trusted } else { self.host.view() })
    }

    fn guest_page(&self, address: usize) -> Option<PageIndex> {
        PageIndex::new(self.guest.view().offset_of(address)? / PAGE_SIZE)
    }
}

/// Says how many huge pages there are where they are too few.
fn no_pages(source: polder_linux::Error, level: Level, pages: PageCount) -> Error {
    let asked = pages.get() / Geometry::X86_64.pages(level).get();
    match source.errno {
        Errno::NOMEM => {
            let available = HugetlbPool::read(level).unwrap_or_default().available();
            Error::HugePages { level, asked, available, pending: 0 }
        }
        Errno::NODEV | Errno::INVAL | Errno::NOENT | Errno::NOSYS => Error::Missing {
            what: "this kernel has no hugetlb pages of the size that was asked for",
            way_out: "use PageSize::Thp or Small (--page-size thp or 4k); 1G pages take a CPU with pdpe1gb, \
                and CONFIG_HUGETLBFS",
            source,
        },
        _ => source.into(),
    }
}

/// Says what to do where userfaultfd can't be used.
fn missing(source: polder_linux::Error) -> Error {
    match source.errno {
        Errno::PERM | Errno::ACCESS => Error::Missing {
            what: "this host watches memory by userfaultfd, which this user may not use",
            way_out: "run as root, give the user read and write access to /dev/userfaultfd, \
                      or set vm.unprivileged_userfaultfd=1",
            source,
        },
        Errno::NOSYS | Errno::INVAL => Error::Missing {
            what: "this host needs a userfaultfd that can poison, which this kernel lacks",
            way_out: "use Linux 6.6 or newer with CONFIG_USERFAULTFD",
            source,
        },
        _ => source.into(),
    }
}
