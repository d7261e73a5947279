//! Touches of memory by the host.

use polder::units::{Geometry, Gfn, Gpa, Level, PAGE_BYTES, PAGE_SIZE, PageIndex, PageRange};
use polder::{Error, HostKind, Memory, PageFacts, Population, Slot, Visibility, VmId};
use polder_vmm::scenario::pattern;

use super::{BASE, all, each_of, facts, gfn};

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

/// [`byte`] of every page of a small range.
pub(crate) fn bytes(memory: &Memory, range: PageRange) -> Vec<Option<u8>> {
    range.frames().map(|page| byte(memory, page.get())).collect()
}

/// Whether each page of a range holds that byte, or is denied.
pub(crate) fn all_are(memory: &Memory, range: PageRange, expected: Option<u8>) -> bool {
    each_of(range).all(|page| byte(memory, page) == expected)
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

/// Fills each page of a range.
pub(crate) fn put_all(memory: &Memory, range: PageRange, byte: u8) {
    each_of(range).for_each(|page| put(memory, page, byte));
}

/// The bytes of a guest frame that holds a seeded pattern.
pub(crate) fn seeded(gfn: Gfn, seed: u64) -> Vec<u8> {
    let mut bytes = vec![0; PAGE_BYTES];
    let mut gpa = gfn.gpa().get();
    // No iterators: unoptimized, they are half of the time that the table takes.
    for word in bytes.chunks_exact_mut(8) {
        word.copy_from_slice(&pattern(Gpa::new(gpa), seed).to_le_bytes());
        gpa += 8;
    }
    bytes
}

/// Whether the pages, bound from [`BASE`] on, hold a seeded pattern by a raw touch.
pub(crate) fn holds(memory: &Memory, range: PageRange, seed: u64) -> bool {
    each_of(range).all(|page| touch(memory, page) == Ok(seeded(gfn(BASE + page), seed)))
}
