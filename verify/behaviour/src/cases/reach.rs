//! Who reaches a private page, and who does not. Whether a way leads there is the host's to say
//! ([`Host::reaches`]), and `docs/security.md` has it as a table; a row tries it. That a way leads
//! somewhere at all is tried on a shared page.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::process::Command;

use polder::units::{PAGE_SIZE, PageIndex};
use polder::{Memory, Visibility};
use polder_require::Facility;

use crate::Section::Reach;
use crate::host::Way;
use crate::world::{PASSED, World, all, fill, gfns, seeded, to};
use crate::{Case, Ran, Skipped};

pub(crate) const MEM_HOST_VIEW: &str =
    "who reaches: the process, by /proc/self/mem of the host view";
pub(crate) const MEM_OTHER_VIEWS: &str =
    "who reaches: the process, by /proc/self/mem of any other mapping of the memory";
pub(crate) const DESCRIPTOR: &str = "who reaches: the process, by the memory's descriptors";
pub(crate) const TRACED_HOST_VIEW: &str =
    "who reaches: another process that may ptrace, by the host view";
pub(crate) const TRACED_OTHER_VIEWS: &str =
    "who reaches: another process that may ptrace, by any other mapping of the memory";

const POINTER: &str = "who reaches: a device model, by a pointer into the host view";
const SYSTEM_CALL: &str = "who reaches: a device model, by a system call on the host view";
const API: &str = "who reaches: the VMM, by the API";

/// The rows, and what each tries.
const WAYS: [(&str, Way); 8] = [
    (POINTER, Way::Pointer),
    (SYSTEM_CALL, Way::SystemCall),
    (API, Way::Api),
    (MEM_HOST_VIEW, Way::Mem { host_view: true }),
    (MEM_OTHER_VIEWS, Way::Mem { host_view: false }),
    (DESCRIPTOR, Way::Descriptor),
    (TRACED_HOST_VIEW, Way::Traced { host_view: true }),
    (TRACED_OTHER_VIEWS, Way::Traced { host_view: false }),
];

pub(super) const CASES: &[Case] = &[
    Case::new(Reach, WAYS[0].0, |w| row(w, WAYS[0].1)),
    Case::new(Reach, WAYS[1].0, |w| row(w, WAYS[1].1)),
    Case::new(Reach, WAYS[2].0, |w| row(w, WAYS[2].1)),
    Case::new(Reach, WAYS[3].0, |w| row(w, WAYS[3].1)),
    Case::new(Reach, WAYS[4].0, |w| row(w, WAYS[4].1)),
    Case::new(Reach, WAYS[5].0, |w| row(w, WAYS[5].1)),
    Case::new(Reach, WAYS[6].0, |w| row(w, WAYS[6].1)),
    Case::new(Reach, WAYS[7].0, |w| row(w, WAYS[7].1)),
];

/// The way that a row tries, if it is one about who reaches a page.
pub fn way_of(case: &Case) -> Option<Way> {
    WAYS.iter().find(|(name, _)| *name == case.name).map(|(_, way)| *way)
}

/// Tries a way on a page that the guest has written and that is private, and on a shared one.
fn row(w: &World<'_>, way: Way) -> Ran {
    let shown = w.granules();
    let bound = w.bound(w.memory(shown.count(4))?)?;
    let memory = &bound.memory;
    to(memory, shown.page(1), Visibility::Shared).expect("no pins");
    bound.passes([fill(gfns(all(memory)), 7)]);
    let secret = |at: u64| {
        let frame = gfns(shown.page(at)).start();
        <[u8; 8]>::try_from(&seeded(frame, 7)[..8]).expect("eight bytes")
    };
    // What is not mapped is brought by a touch; a look from outside brings nothing.
    memory.host_view().touch_read(shown.first(1) * PAGE_SIZE, &mut [0]).expect("a shared page");
    let reaches = |at: u64| -> Result<bool, Skipped> {
        let found = look(memory, way, shown.page(at).start())?;
        Ok(found.contains(&secret(at)))
    };
    assert!(reaches(1)?, "the way leads nowhere, not even to a shared page");
    assert_eq!(reaches(2)?, w.reaches(way), "whether it leads to a private page");
    PASSED
}

/// What a way finds at a page: the first word, by each mapping or descriptor that it is tried by.
fn look(memory: &Memory, way: Way, page: PageIndex) -> Result<Vec<[u8; 8]>, Skipped> {
    let mut word = [0; 8];
    let offset = page.offset();
    let once = |found: bool, word| Ok(found.then_some(word).into_iter().collect());
    match way {
        Way::Pointer => {
            let touched = memory.host_view().touch_read(offset, &mut word);
            once(touched.is_ok(), word)
        }
        Way::SystemCall => {
            // The kernel writes zeros into the page: what it may not touch keeps its bytes.
            let zeros = File::open("/dev/zero").expect("a device of every Linux");
            let written = memory.host_view().read_from(&zeros, offset + 8, 8);
            let touched = memory.host_view().touch_read(offset, &mut word);
            once(written.is_ok() && touched.is_ok(), word)
        }
        Way::Api => {
            let (vm, _, binding) = *memory.bindings().first().expect("it is bound");
            let into = page.get() - binding.pages().start().get();
            let gpa = binding.gfns().start().gpa().checked_add(into * PAGE_SIZE);
            let read = memory.read(vm, gpa.expect("a small address"), &mut word);
            once(read.is_ok(), word)
        }
        Way::Mem { host_view } => {
            let mem = File::open("/proc/self/mem").expect("procfs");
            let at = addresses(memory, page, host_view).into_iter();
            Ok(at.filter_map(|at| mem.read_exact_at(&mut word, at).ok().map(|()| word)).collect())
        }
        Way::Descriptor => {
            let opened = descriptors().into_iter().filter_map(|path| File::open(path).ok());
            let read =
                opened.filter_map(|file| file.read_exact_at(&mut word, offset).ok().map(|()| word));
            Ok(read.collect())
        }
        Way::Traced { host_view } => {
            let mut found = Vec::new();
            for at in addresses(memory, page, host_view) {
                found.extend(by_another_process(at)?);
            }
            Ok(found)
        }
    }
}

/// Where a page is mapped in this process: in the host view, or everywhere else.
fn addresses(memory: &Memory, page: PageIndex, host_view: bool) -> Vec<u64> {
    let host = memory.host_view().as_ptr().expect("memory of this process").addr() as u64;
    let maps = std::fs::read_to_string("/proc/self/maps").expect("procfs");
    let hex = |text: &str| u64::from_str_radix(text, 16).ok();
    // start-end flags offset device inode name
    let mappings: Vec<(u64, u64, u64, &str)> = maps
        .lines()
        .filter_map(|line| {
            let mut words = line.split_whitespace();
            let (start, end) = words.next()?.split_once('-')?;
            let (offset, inode) = (words.nth(1)?, words.nth(1)?);
            Some((hex(start)?, hex(end)?, hex(offset)?, inode))
        })
        .collect();
    let of = mappings.iter().find(|(start, end, ..)| (*start..*end).contains(&host));
    let inode = of.expect("the host view").3;
    let at = mappings.iter().filter(|it| it.3 == inode).filter_map(|(start, end, offset, _)| {
        let at = start + page.offset().checked_sub(*offset)?;
        (at < *end).then_some(at)
    });
    at.filter(|at| (*at == host + page.offset()) == host_view).collect()
}

/// The descriptors of this process that are memory.
fn descriptors() -> Vec<std::path::PathBuf> {
    let entries = std::fs::read_dir("/proc/self/fd").expect("procfs").flatten();
    let is_memory = |path: &std::path::PathBuf| {
        let link = std::fs::read_link(path).unwrap_or_default();
        let link = link.to_string_lossy();
        link.contains("memfd:polder") || link.contains("kvm-gmem")
    };
    entries.map(|entry| entry.path()).filter(is_memory).collect()
}

/// What another process reads of our memory, by `/proc/PID/mem`: as a debugger does.
fn by_another_process(at: u64) -> Result<Option<[u8; 8]>, Skipped> {
    let own = std::process::id();
    let dd = Command::new("dd")
        .args([&format!("if=/proc/{own}/mem"), "bs=8", "count=1", &format!("skip={at}")])
        .args(["iflag=skip_bytes", "status=none"])
        .output();
    let skipped = |why: String| Skipped { facility: Facility::Ptrace, why };
    let dd = dd.map_err(|error| skipped(format!("no dd to try it with: {error}")))?;
    let said = String::from_utf8_lossy(&dd.stderr);
    if said.contains("ermission") || said.contains("not permitted") {
        return Err(skipped(format!("this user may not look into another process: {said}")));
    }
    Ok(<[u8; 8]>::try_from(dd.stdout.as_slice()).ok())
}
