//! Reads of a file by io_uring: straight into pinned guest memory, next to a bounce buffer.
//!
//! The baseline is what a VMM does that can't have the kernel write guest memory: it reads into
//! fixed buffers of its own, by a ring like Polder's and as many transfers at a time, and copies
//! each into guest memory (through the `vm-memory` traits) when it is over. The file is in the page
//! cache, and too large for those of the processor.

use std::fs::File;
use std::io::Write;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;

use kvm_ioctls::Kvm;
use polder::guest_memory::GuestMemory;
use polder::{Error, Holder, Memory, OnBusy, Slot};
use polder_linux::{Memfd, Transfer, View};
use polder_units::{Gfn, PAGE_SIZE, PageRange};
use polder_vmm::RunError;
use vm_memory::GuestAddress;

use super::{HOLDER, Scale};
use crate::turns::compare;
use crate::{BenchError, Row};

/// Bytes of each transfer, and how many there are at a time: a device's queue, and as many as make
/// 16M.
pub(super) const SIZES: [Size; 3] = [
    Size { name: "4K", bytes: 4 << 10, depth: 128 },
    Size { name: "64K", bytes: 64 << 10, depth: 128 },
    Size { name: "1M", bytes: 1 << 20, depth: 16 },
];

/// What is read at a time.
#[derive(Clone, Copy)]
pub(super) struct Size {
    pub(super) name: &'static str,
    bytes: u32,
    depth: u32,
}

/// Bytes of the file.
const FILE: u64 = 64 << 20;

/// Guest memory, and a buffer as large.
struct Places {
    memory: Arc<Memory>,
    guest: GuestMemory,
    bounce: Arc<View>,
    all: PageRange,
}

impl Places {
    /// For all transfers of a size.
    fn new(size: Size) -> Result<Self, BenchError> {
        let pages = u64::from(size.depth) * u64::from(size.bytes) / PAGE_SIZE;
        let all = PageRange::between(0, pages).expect("not empty");
        let memory = Arc::new(Memory::builder(all.count()).shared().build()?);
        let kvm = |error: kvm_ioctls::Error| RunError::Kvm(error.into());
        let vm = Kvm::new().and_then(|kvm| kvm.create_vm()).map_err(kvm)?;
        let vm = memory.attach(Arc::new(vm))?;
        memory.bind(vm, Slot(0), Gfn::from(0), all)?;
        let guest = memory.guest_memory(vm, Holder::new(HOLDER), OnBusy::Wait)?;
        let memfd = Arc::new(Memfd::new("bounce", all.count())?);
        let bounce = Arc::new(View::new(&memfd)?);
        bounce.populate(all)?;
        Ok(Self { memory, guest, bounce, all })
    }
}

/// The row of a size.
pub(super) fn row(scale: &Scale, size: Size) -> Result<Row, BenchError> {
    let Size { name, depth, .. } = size;
    let file = file()?;
    let places = Places::new(size)?;
    let mut polder = places.memory.ring(Holder::new(HOLDER), depth, OnBusy::Refuse)?;
    polder.register(&[places.all])?;
    let mut bare = polder_linux::Ring::new(&places.bounce, depth)?;
    bare.register(&[places.all])?;
    let mut bounced = |count| {
        each_batch(count, size, |batch| {
            bounce(&mut bare, &places, file.as_fd(), batch).expect("the file is there");
        });
    };
    let mut pinned = |count| {
        each_batch(count, size, |batch| {
            read(&mut polder, file.as_fd(), batch).expect("nobody converts");
        });
    };
    let mut costs = compare(scale.turn, &mut bounced, &mut pinned);
    costs.baseline /= f64::from(depth);
    costs.polder /= f64::from(depth);
    let case = format!("pinned io_uring read, {name}");
    let note = format!("{depth} at a time, of a file in the page cache");
    Ok(Row { note, ..Row::of_costs(case, "a bounce buffer", "ns", costs) })
}

/// Transfers at a time: where each is in the file, and its bytes.
type Batch = [(u64, u32)];

/// The places in the file of as many transfers as there are at a time.
fn each_batch(count: u32, size: Size, mut each: impl FnMut(&Batch)) {
    let mut batch = vec![(0, size.bytes); size.depth as usize];
    let mut at = 0;
    for _ in 0..count {
        for (place, bytes) in &mut batch {
            *place = at;
            at = (at + u64::from(*bytes)) % FILE;
        }
        each(&batch);
    }
}

fn read<'a>(ring: &mut polder::Ring<'a>, file: BorrowedFd<'a>, batch: &Batch) -> Result<(), Error> {
    for (place, &(at, size)) in (0_u64..).zip(batch) {
        ring.read(file, at, place * u64::from(size), size, place)?;
    }
    ring.submit(u32::MAX)?;
    while let Some(done) = ring.complete() {
        assert!(done.result.is_ok_and(|count| u64::from(count) > 0), "{done:?}");
    }
    Ok(())
}

fn bounce<'a>(
    ring: &mut polder_linux::Ring<'a>,
    places: &Places,
    file: BorrowedFd<'a>,
    batch: &Batch,
) -> Result<(), polder_linux::Error> {
    for (place, &(at, size)) in (0_u64..).zip(batch) {
        let offset = place * u64::from(size);
        let transfer = Transfer { into_memory: true, at, offset, count: size, buffer: Some(0) };
        ring.queue(file, transfer, offset).expect("as many as there is room for");
    }
    ring.submit(ring.in_flight())?;
    while let Some(done) = ring.completion() {
        let count = done.result.map_or(0, |count| usize::try_from(count).expect("a size"));
        assert!(count > 0, "{done:?}");
        let guest = places.guest.get_slice(GuestAddress(done.tag), count);
        let guest = guest.expect("it is shared");
        places.bounce.slice(done.tag, count, ()).copy_to_volatile_slice(guest);
    }
    Ok(())
}

/// A file that is gone when it is closed.
fn file() -> Result<File, BenchError> {
    let path = std::env::temp_dir().join(format!("polder-bench-ring-{}", std::process::id()));
    let make = || {
        let mut file = File::options().read(true).write(true).create_new(true).open(&path)?;
        std::fs::remove_file(&path)?;
        let megabyte: Vec<u8> = (0..1_u32 << 20).map(|at| at.to_le_bytes()[0] | 1).collect();
        (0..FILE >> 20).try_for_each(|_| file.write_all(&megabyte))?;
        Ok(file)
    };
    make().map_err(|source| BenchError::File { path, source })
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use polder_require::require;

    use super::*;
    use crate::tests::{Facility, found};

    #[test]
    fn both_ways_bring_the_same_bytes() {
        let size = Size { name: "64K", bytes: 64 << 10, depth: 16 };
        let places = Places::new(size).and_then(|places| {
            places.memory.ring(Holder::new(HOLDER), size.depth, OnBusy::Refuse)?;
            Ok(places)
        });
        let Some(places) = require(Facility::IoUring, places) else { return };
        let file = file().expect("a file");
        let batch: Vec<_> = (100..116).map(|at| (at, size.bytes)).collect();
        let bytes = || {
            let mut bytes = vec![0; batch.len() * size.bytes as usize];
            places.memory.host_view().touch_read(0, &mut bytes).expect("it is shared");
            bytes
        };
        let mut bare = polder_linux::Ring::new(&places.bounce, size.depth).expect("as before");
        bare.register(&[places.all]).expect("no more than before");
        bounce(&mut bare, &places, file.as_fd(), &batch).expect("the file is there");
        let bounced = bytes();
        places.memory.host_view().touch_write(0, &vec![0; bounced.len()]).expect("it is shared");
        let mut ring =
            places.memory.ring(Holder::new(HOLDER), size.depth, OnBusy::Refuse).expect("as before");
        ring.register(&[places.all]).expect("no more than before");
        read(&mut ring, file.as_fd(), &batch).expect("the file is there");
        assert!(bounced == bytes() && bounced[0] == 101, "{}", bounced[0]);
    }

    #[test]
    fn a_row_is_measured() {
        let scale = Scale { pages: 0, held: &[], turn: Duration::from_millis(1) };
        let rows = row(&scale, SIZES[0]).map(|row| vec![row]);
        let Some(rows) = found(Facility::IoUring, rows) else { return };
        assert!(rows[0].polder_value > 0.0);
    }
}
