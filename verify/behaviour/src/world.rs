//! What a case stands on: memory of its host, a guest on it, and touches of it.

use std::sync::atomic::{AtomicBool, Ordering};

use polder::kvm::{self, GuestMemfd, kvm_create_guest_memfd};
use polder::units::{
    Geometry, Gfn, GfnRange, Gpa, Level, PAGE_BYTES, PAGE_SIZE, PageCount, PageIndex, PageRange,
};
use polder::{
    Builder, Contents, Error, GuestExit, HostKind, Memory, OnBusy, PageFacts, PageSize, Platform,
    Population, Refusal, Slot, Visibility, VmId,
};
use polder_require::Facility;
use polder_vmm::scenario::{HostAccess, Op, Outcome, Pattern, pattern};
use polder_vmm::{End, Ended};

use crate::host::{Guest, Host, Inside, Trouble, Way};
use crate::{Ran, Skipped};

/// A host, in the words of the cases.
#[derive(Clone, Copy)]
pub struct World<'a>(&'a dyn Host);

/// Where a case's memory begins in its guest, unless it says otherwise: a multiple of 2 MiB.
pub(crate) const BASE: u64 = 0x1000;

impl<'a> World<'a> {
    /// The world of a host.
    pub fn new(host: &'a dyn Host) -> Self {
        Self(host)
    }

    /// Which host.
    pub fn kind(&self) -> HostKind {
        self.0.kind()
    }

    /// Builds memory of the host; that it is refused is the case's affair.
    ///
    /// # Errors
    /// [`Skipped`] where this machine lacks what the host needs.
    pub fn try_build(&self, builder: Builder) -> Result<Result<Memory, Error>, Skipped> {
        self.build_on(builder.platform(self.0.platform()))
    }

    fn build_on(&self, builder: Builder) -> Result<Result<Memory, Error>, Skipped> {
        let built = builder.host(self.0.kind()).build();
        if let Ok(memory) = &built {
            self.0.prepare(memory);
        }
        match built.as_ref().err().and_then(|error| self.0.missing(error)) {
            Some(skipped) => Err(skipped),
            None => Ok(built),
        }
    }

    /// Memory of `pages` pages, private and whole.
    ///
    /// # Errors
    /// [`Skipped`].
    pub fn memory(&self, pages: u64) -> Result<Memory, Skipped> {
        self.build(self.builder(pages))
    }

    /// The same for a platform that the case is about.
    ///
    /// # Errors
    /// [`Skipped`].
    pub fn memory_for(&self, platform: Platform, pages: u64) -> Result<Memory, Skipped> {
        let built = self.build_on(self.builder(pages).platform(platform))?;
        Ok(built.expect("memory of a sensible size"))
    }

    /// The same for a platform that tells private accesses of a guest from shared ones: the
    /// column's, or else the software-protected one.
    ///
    /// # Errors
    /// [`Skipped`].
    pub fn memory_apart(&self, pages: u64) -> Result<Memory, Skipped> {
        match self.0.platform() {
            Platform::Plain => self.memory_for(Platform::SwProtected, pages),
            platform => self.memory_for(platform, pages),
        }
    }

    /// Memory whose contents are owed: private, where private pages can be owed.
    ///
    /// # Errors
    /// [`Skipped`].
    pub fn owed(&self, pages: u64) -> Result<Memory, Skipped> {
        let builder = self.builder(pages).owed();
        let private = self.0.platform().host_fills_private();
        self.build(if private { builder } else { builder.shared() })
    }

    /// Memory of so many pages, of what the host's is made of: of whole huge pages where it is of
    /// those, which may be more.
    pub fn builder(&self, pages: u64) -> Builder {
        let size = self.0.page_size();
        let whole = size.reserved().map_or(1, |level| Geometry::X86_64.pages(level).get());
        Memory::builder(count(pages.next_multiple_of(whole))).page_size(size)
    }

    /// The pages that the host's view shows together, or not at all.
    pub fn granules(&self) -> Scale {
        match (self.0.page_size().reserved(), self.0.kind()) {
            (Some(level), HostKind::Memfd | HostKind::GuestMemfd) => Scale::of(level),
            _ => Scale::of(Level::Size4K),
        }
    }

    /// The pages that memory is made of.
    pub fn folios(&self) -> Scale {
        Scale::of(match self.0.page_size() {
            PageSize::Small => Level::Size4K,
            PageSize::Thp | PageSize::Huge2M => Level::Size2M,
            PageSize::Huge1G => Level::Size1G,
        })
    }

    /// How often a row tries what takes luck to be met. Huge pages take the road that 4K pages
    /// take, whose column tries it `times` times.
    pub fn rounds(&self, times: u64) -> u64 {
        if self.0.page_size() == PageSize::Small { times } else { times.div_ceil(10) }
    }

    fn build(&self, builder: Builder) -> Result<Memory, Skipped> {
        Ok(self.try_build(builder)?.expect("memory of a sensible size"))
    }

    /// A VM without memory.
    ///
    /// # Errors
    /// [`Skipped`].
    pub fn guest(&self) -> Result<Box<dyn Guest>, Skipped> {
        self.0.guest()
    }

    /// A VM in which all of `memory` is bound, from guest frame 0x1000 on, by slot 0.
    ///
    /// # Errors
    /// [`Skipped`].
    pub fn bound(&self, memory: Memory) -> Result<Bound, Skipped> {
        let guest = self.0.guest()?;
        let vm = guest.attach(&memory);
        memory.bind(vm, Slot(0), gfn(BASE), all(&memory)).expect("a VM's first slot");
        Ok(Bound { memory, vm, guest })
    }

    /// A VM without memory, and the kernel's interface to what it is to have.
    ///
    /// # Errors
    /// [`Skipped`].
    pub fn kernel(&self) -> Result<(kvm::Vm, Box<dyn Guest>), Skipped> {
        let guest = self.0.guest()?;
        Ok((kvm::Vm::new(guest.fd(), self.0.kind(), self.0.platform()), guest))
    }

    /// A guest_memfd, by the kernel's interface.
    ///
    /// # Errors
    /// [`Skipped`].
    pub fn guest_memfd(&self, vm: &kvm::Vm, size: u64, flags: u64) -> Result<GuestMemfd, Skipped> {
        let args = kvm_create_guest_memfd { size, flags, ..Default::default() };
        match vm.create_guest_memfd(args) {
            Ok(memfd) => Ok(memfd),
            Err(failed) => {
                let lacks = failed.why.as_ref().and_then(|why| self.0.missing(why));
                Err(lacks.unwrap_or_else(|| panic!("{failed}")))
            }
        }
    }

    /// Calls `run`, while the host is in trouble. Returns what it returned.
    ///
    /// # Errors
    /// [`Skipped`].
    pub fn in_trouble<T: Send>(
        &self,
        trouble: Trouble,
        run: impl Fn() -> T + Sync,
    ) -> Result<T, Skipped> {
        let mut returned = None;
        self.0.in_trouble(trouble, &mut || returned = Some(run()))?;
        Ok(returned.expect("the host calls it"))
    }

    /// Nothing, where it can be told of each page whether it takes up memory.
    ///
    /// # Errors
    /// [`Skipped`]: the pages of a guest_memfd are told of by `cachestat`.
    pub fn existing_is_told(&self, memory: &Memory) -> Result<(), Skipped> {
        match memory.resident() {
            Err(Error::Host(error)) if error.call == "cachestat" => {
                Err(Skipped { facility: Facility::Cachestat, why: error.to_string() })
            }
            _ => Ok(()),
        }
    }

    /// [`Host::mapped`].
    pub fn mapped(&self, memory: &Memory, range: PageRange) -> Vec<PageIndex> {
        self.0.mapped(memory, range)
    }

    /// [`Host::taken`].
    pub fn taken(&self, memory: &Memory) -> u64 {
        self.0.taken(memory)
    }

    /// [`Host::inherited`].
    pub fn inherited(&self, memory: &Memory) -> Vec<String> {
        self.0.inherited(memory)
    }

    /// [`Host::reaches`].
    pub fn reaches(&self, way: Way) -> bool {
        self.0.reaches(way)
    }

    /// [`Host::inside`], where the case applies only to hosts that have it.
    pub fn inside(&self) -> &dyn Inside {
        self.0.inside().expect("a host without it declares the case not applicable")
    }
}

/// Pages by the number of the larger page that they lie in.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Scale(u64);

impl Scale {
    fn of(level: Level) -> Self {
        Self(Geometry::X86_64.pages(level).get())
    }

    /// Whether one is a page of 4K.
    pub(crate) fn is_small(self) -> bool {
        self.0 == 1
    }

    /// The pages of so many.
    pub(crate) fn count(self, of: u64) -> u64 {
        of * self.0
    }

    /// The first page of one.
    pub(crate) fn first(self, of: u64) -> u64 {
        of * self.0
    }

    /// The pages of one.
    pub(crate) fn page(self, of: u64) -> PageRange {
        self.pages(of, of + 1)
    }

    /// The pages of those from `start` to before `end`.
    pub(crate) fn pages(self, start: u64, end: u64) -> PageRange {
        pages(start * self.0, end * self.0)
    }
}

/// Memory that a guest has.
pub struct Bound {
    /// The memory.
    pub memory: Memory,
    /// The VM's name there.
    pub vm: VmId,
    /// The VM.
    pub guest: Box<dyn Guest>,
}

impl Bound {
    /// The ops that convert frames full of a seed's pattern, and leave them full of it: a host that
    /// can't keep it has zeros there, which are filled again.
    pub fn converted(&self, gfns: GfnRange, to: Visibility, seed: u64) -> Vec<Op> {
        let mut ops = vec![convert(gfns, to)];
        if !keeps(&self.memory) {
            ops.extend([zero(gfns), fill(gfns, seed)]);
        }
        ops
    }

    /// The same after a conversion that the VMM asked for.
    pub fn refill(&self, range: PageRange, seed: u64) {
        if !keeps(&self.memory) {
            self.passes([zero(gfns(range)), fill(gfns(range), seed)]);
        }
    }

    /// Runs a guest of one vCPU.
    pub fn run(&self, ops: impl IntoIterator<Item = Op>) -> Ended {
        let program = ops.into_iter().chain([Op::Done]).collect();
        self.guest.run((&self.memory, self.vm), &[program])
    }

    /// Runs a guest, all of whose checks pass.
    pub fn passes(&self, ops: impl IntoIterator<Item = Op>) {
        self.pass(vec![ops.into_iter().collect()]);
    }

    /// Runs a guest of several vCPUs, all of whose checks pass.
    pub fn pass(&self, mut programs: Vec<Vec<Op>>) {
        programs.iter_mut().for_each(|ops| ops.push(Op::Done));
        let ended = self.guest.run((&self.memory, self.vm), &programs);
        let Ended { end, faults, .. } = ended;
        assert_eq!((end, faults.as_slice()), (End::Ok, [].as_slice()), "the guest");
    }
}

/// Pages `[start..end)` of an object.
pub(crate) fn pages(start: u64, end: u64) -> PageRange {
    PageRange::between(start, end).expect("a range in a case")
}

/// One page.
pub(crate) fn page(page: u64) -> PageRange {
    pages(page, page + 1)
}

/// All of an object.
pub(crate) fn all(memory: &Memory) -> PageRange {
    pages(0, memory.pages().get())
}

pub(crate) fn count(pages: u64) -> PageCount {
    PageCount::new(pages).expect("a number of pages in a case")
}

pub(crate) fn gfn(number: u64) -> Gfn {
    Gfn::new(number).expect("a frame in a case")
}

/// The guest frames of pages that are bound from [`BASE`] on.
pub(crate) fn gfns(range: PageRange) -> GfnRange {
    let start = BASE + range.start().get();
    GfnRange::between(start, start + range.count().get()).expect("frames of small memory")
}

/// What `range` is now.
pub(crate) fn facts(memory: &Memory, range: PageRange) -> Vec<(PageRange, PageFacts)> {
    memory.facts(range).expect("pages of the object")
}

/// Converts, contents kept where the host can; waits for others.
pub(crate) fn to(memory: &Memory, range: PageRange, to: Visibility) -> Result<u64, Error> {
    let owed = |run: &(PageRange, PageFacts)| run.1.population == Population::Owed;
    let contents = match memory.keeps_most(to) {
        // Zeros would be contents: nothing would be owed any more.
        Contents::Zero if memory.facts(range).is_ok_and(|runs| runs.iter().any(owed)) => {
            Contents::Unspecified
        }
        contents => contents,
    };
    if memory.platform().guest_decides() {
        return by_guest(memory, range, to);
    }
    memory.convert(range, to, contents, OnBusy::Wait).map(PageCount::get)
}

/// Has the guest convert pages by hypercalls of its own; what nobody sees yet is bound for that.
fn by_guest(memory: &Memory, range: PageRange, to: Visibility) -> Result<u64, Error> {
    if memory.bindings().is_empty() {
        let vm = memory.attach(polder::Vm::Machine)?;
        memory.bind(vm, Slot(0), gfn(BASE), all(memory))?;
    }
    let mut bindings = memory.bindings().into_iter();
    let found = bindings.find_map(|(vm, _, binding)| {
        let into = range.start().get().checked_sub(binding.pages().start().get())?;
        let first = binding.gfns().start().get() + into;
        let gfns = GfnRange::between(first, first + range.count().get())?;
        binding.pages().contains_range(range).then_some((vm, gfns))
    });
    // Pages past the end nobody sees.
    let beyond = || Error::Refused(Refusal::Beyond { range, pages: memory.pages() });
    let (vm, gfns) = found.ok_or_else(beyond)?;
    match memory.machine_vcpu(vm)?.convert(gfns, to) {
        Ok(pages) => Ok(pages.get()),
        Err(GuestExit::Failed(error)) => Err(error),
        Err(other) => panic!("the guest's own request: {other}"),
    }
}

/// Whether conversions can keep what is in the pages, both ways.
pub(crate) fn keeps(memory: &Memory) -> bool {
    let kept = |to| memory.keeps_most(to) == Contents::Preserve;
    kept(Visibility::Private) && kept(Visibility::Shared)
}

/// Makes all of an object shared.
pub(crate) fn share_all(memory: &Memory) {
    to(memory, all(memory), Visibility::Shared).expect("nothing stands in the way");
}

/// A page's bytes, by a raw touch; by the API where a raw one meets [`Together`].
pub(crate) fn touch(memory: &Memory, page: u64) -> Result<Vec<u8>, Error> {
    match together(memory, page) {
        None => return raw_touch(memory, page),
        Some(Together::Waits) => {}
        Some(Together::Denied) => {
            let raw = raw_touch(memory, page);
            assert!(raw.is_err(), "page {page:#x} is shown, and with it what is not");
        }
    }
    let mut bytes = vec![0; PAGE_BYTES];
    by_api(memory, page, |vm, gpa| memory.read(vm, gpa, &mut bytes))?;
    Ok(bytes)
}

/// A page's bytes, by a raw touch and no other.
pub(crate) fn raw_touch(memory: &Memory, page: u64) -> Result<Vec<u8>, Error> {
    let mut bytes = vec![0; PAGE_BYTES];
    memory.host_view().touch_read(page * PAGE_SIZE, &mut bytes)?;
    Ok(bytes)
}

/// What a raw touch of a page meets because the host's view shows a huge page as a whole.
#[derive(PartialEq, Eq)]
enum Together {
    /// Another page of it is not shared.
    Denied,
    /// The contents of another are still to come.
    Waits,
}

fn together(memory: &Memory, page: u64) -> Option<Together> {
    let view = granule(memory);
    if view == Level::Size4K {
        return None;
    }
    let page = PageIndex::new(page).filter(|page| page.get() < memory.pages().get())?;
    let around = PageRange::enclosing(page, view, Geometry::X86_64);
    let runs = facts(memory, around);
    let (_, own) = runs.iter().find(|(run, _)| run.contains(page)).expect("all of its pages");
    let shared = |facts: &PageFacts| facts.visibility == Visibility::Shared;
    match own.population {
        _ if !shared(own) => None,
        _ if !runs.iter().all(|(_, facts)| shared(facts)) => Some(Together::Denied),
        _ if !memory.is_shown(page) => Some(Together::Denied),
        Population::Whole if runs.iter().any(|run| run.1.population == Population::Owed) => {
            Some(Together::Waits)
        }
        _ => None,
    }
}

/// The smallest page that the host's view shows.
fn granule(memory: &Memory) -> Level {
    match memory.page_size().reserved() {
        Some(level) if memory.simulated(|_, _, _| ()).is_err() => level,
        _ => Level::Size4K,
    }
}

/// Has the API reach a page by a binding that shows it. What nobody sees yet is bound for that.
fn by_api<T>(memory: &Memory, page: u64, reach: impl FnOnce(VmId, Gpa) -> T) -> T {
    let shown = || {
        memory.bindings().into_iter().find_map(|(vm, _, binding)| {
            let into = page.checked_sub(binding.pages().start().get())?;
            let at = Gfn::new(binding.gfns().start().get() + into)?;
            binding.gfns().contains(at).then_some((vm, at.gpa()))
        })
    };
    let (vm, gpa) = shown().unwrap_or_else(|| {
        let guest = polder_vmm::Vm::new(HostKind::Memfd).expect("a VM of KVM's");
        let vm = guest.attach(memory).expect("memory of this host");
        memory.bind(vm, Slot(0), gfn(BASE), all(memory)).expect("a VM's first slot");
        shown().expect("all of it is bound")
    });
    reach(vm, gpa)
}

/// The byte that all of a page holds; `None` where the touch is denied.
///
/// # Panics
/// If the page holds different bytes.
pub(crate) fn byte(memory: &Memory, page: u64) -> Option<u8> {
    let bytes = touch(memory, page).ok()?;
    let uniform = bytes.iter().all(|byte| *byte == bytes[0]);
    assert!(uniform, "page {page:#x} holds bytes of several kinds");
    Some(bytes[0])
}

/// [`byte`] of every page of a range.
pub(crate) fn bytes(memory: &Memory, range: PageRange) -> Vec<Option<u8>> {
    range.frames().map(|page| byte(memory, page.get())).collect()
}

/// Whether each page of a range holds that byte, or is denied.
pub(crate) fn all_are(memory: &Memory, range: PageRange, expected: Option<u8>) -> bool {
    range.frames().all(|page| byte(memory, page.get()) == expected)
}

/// Fills a page, in the way in which [`touch`] reads one.
pub(crate) fn put(memory: &Memory, page: u64, byte: u8) {
    let bytes = [byte; PAGE_BYTES];
    let put = match together(memory, page) {
        None => memory.host_view().touch_write(page * PAGE_SIZE, &bytes),
        Some(_) => by_api(memory, page, |vm, gpa| memory.write(vm, gpa, &bytes)),
    };
    put.expect("a shared page");
}

/// The bytes of a guest frame that holds a seeded pattern.
pub(crate) fn seeded(gfn: Gfn, seed: u64) -> Vec<u8> {
    let start = gfn.gpa().get();
    let words = (start..start + PAGE_SIZE).step_by(8);
    words.flat_map(|gpa| pattern(polder::units::Gpa::new(gpa), seed).to_le_bytes()).collect()
}

/// Whether the pages, bound from [`BASE`] on, hold a seeded pattern by a raw touch.
pub(crate) fn holds(memory: &Memory, range: PageRange, seed: u64) -> bool {
    let frames = range.frames().zip(gfns(range).frames());
    frames.into_iter().all(|(page, gfn)| touch(memory, page.get()) == Ok(seeded(gfn, seed)))
}

/// The op that fills frames with a seeded pattern.
pub(crate) fn fill(gfns: GfnRange, seed: u64) -> Op {
    let (gpa, len) = (gfns.start().gpa(), gfns.count().get() * PAGE_SIZE);
    Op::Fill { gpa, len, pattern: Pattern::Seeded { seed } }
}

/// The op that checks for it.
pub(crate) fn check(gfns: GfnRange, seed: u64) -> Op {
    let (gpa, len) = (gfns.start().gpa(), gfns.count().get() * PAGE_SIZE);
    Op::Check { gpa, len, pattern: Pattern::Seeded { seed } }
}

/// The op that checks for zeros.
pub(crate) fn zero(gfns: GfnRange) -> Op {
    let (gpa, len) = (gfns.start().gpa(), gfns.count().get() * PAGE_SIZE);
    Op::Check { gpa, len, pattern: Pattern::Zero }
}

/// The op that asks for a conversion, which is done.
pub(crate) fn convert(gfns: GfnRange, to: Visibility) -> Op {
    let (gpa, pages) = (gfns.start().gpa(), gfns.count().get());
    Op::Convert { gpa, pages, to, expect: Outcome::Done }
}

/// The op that has the host try frames, by the API and by a raw touch.
pub(crate) fn probe(gfns: GfnRange, expect: HostAccess) -> Op {
    Op::Probe { gpa: gfns.start().gpa(), pages: gfns.count().get(), expect }
}

/// Does two things at once. Both end, or the cell hangs and fails for that.
pub(crate) fn meanwhile<A: Send, B>(
    one: impl FnOnce() -> A + Send,
    other: impl FnOnce() -> B,
) -> (A, B) {
    std::thread::scope(|scope| {
        let one = scope.spawn(one);
        let other = other();
        match one.join() {
            Ok(one) => (one, other),
            Err(panic) => std::panic::resume_unwind(panic),
        }
    })
}

/// The end of a case that has passed.
pub(crate) const PASSED: Ran = Ok(());

/// Ends other threads, also where this one panics.
pub(crate) struct Stop<'a>(pub(crate) &'a AtomicBool);

impl Drop for Stop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}
