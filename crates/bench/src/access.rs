//! `polder bench access`: a device model's reads through the traits of `vm-memory`, next to that
//! crate's own memory.

use std::hint::black_box;
use std::sync::Arc;
use std::time::Duration;

use kvm_ioctls::Kvm;
use polder::guest_memory::GuestMemory;
use polder::units::{Gfn, PAGE_SIZE, PageCount, PageRange};
use polder::{Contents, Holder, Memory, OnBusy, Slot, Visibility};
use polder_vmm::RunError;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use crate::turns::compare;
use crate::{Bench, BenchError, Measured, Progress, Row};

pub(crate) const BENCH: Bench =
    Bench { name: "access", about: "reads of guest memory through the vm-memory traits", run };

const TURN: Duration = Duration::from_millis(40);
const MEMORY: usize = 64 << 20;

/// Bytes of a read, and over how many bytes the reads are spread.
const CASES: &[(&str, usize, usize)] = &[
    ("64-byte read", 64, 16 << 10),
    ("64-byte read, spread over 64M", 64, MEMORY),
    ("4K slice", 4 << 10, 1 << 20),
    ("4K slice, spread over 64M", 4 << 10, MEMORY),
    ("64K slice", 64 << 10, 1 << 20),
    ("1M slice", 1 << 20, MEMORY),
];

fn run(progress: &mut dyn FnMut(Progress)) -> Measured {
    let theirs: GuestMemoryMmap =
        GuestMemoryMmap::from_ranges(&[(GuestAddress(0), MEMORY)]).expect("64M of memory");
    let ours = polder()?;
    let bytes = vec![7; MEMORY];
    theirs.write_slice(&bytes, GuestAddress(0)).expect("it is as large");
    ours.write_slice(&bytes, GuestAddress(0)).expect("it is shared");
    let case = |(index, &(case, size, spread)): (usize, &(&str, usize, usize))| {
        progress(Progress { done: index, of: CASES.len(), doing: case.into() });
        let costs = compare(TURN, &mut |count| read(&theirs, count, size, spread), &mut |count| {
            read(&ours, count, size, spread)
        });
        Row::of_costs(case.into(), "vm-memory's mmap", "ns", costs)
    };
    Ok(CASES.iter().enumerate().map(case).collect())
}

/// Shared memory on a memfd, as `vm-memory` sees it. No VM runs. A page after it is private, so
/// that the memory is not all of one kind, and each read has to look closer.
fn polder() -> Result<GuestMemory, BenchError> {
    let pages = MEMORY as u64 / PAGE_SIZE;
    let object = PageCount::new(pages + 1).expect("few pages");
    let memory = Arc::new(Memory::builder(object).shared().build()?);
    let kvm = |error: kvm_ioctls::Error| RunError::Kvm(error.into());
    let vm = Kvm::new().and_then(|kvm| kvm.create_vm()).map_err(kvm)?;
    let vm = memory.attach(Arc::new(vm))?;
    let all = PageRange::between(0, pages).expect("not empty");
    let last = PageRange::between(pages, pages + 1).expect("one page");
    memory.convert(last, Visibility::Private, Contents::Preserve, OnBusy::Wait)?;
    memory.bind(vm, Slot(0), Gfn::from(0), all)?;
    Ok(memory.guest_memory(vm, Holder::new("a device"), OnBusy::Wait)?)
}

/// Reads that take turns among the places of a buffer, in an order that no prefetcher knows.
fn read<M: Bytes<GuestAddress>>(memory: &M, count: u32, size: usize, spread: usize)
where
    M::E: std::fmt::Debug,
{
    let mut into = vec![0; size];
    let places = spread / size;
    let mut at = 0_usize;
    for _ in 0..count {
        at = (at * 5 + 3) % places;
        let address = GuestAddress(black_box((at * size) as u64));
        memory.read_slice(&mut into, address).expect("it is shared");
        black_box(&into);
    }
}
