//! The baseline: one thread that copies a page for each fault.

use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use polder::Memory;
use polder::units::PageCount;
use polder_linux::{KvmSlot, Memfd, Nudge, Userfault, View};
use polder_vmm::Vm;
use polder_vmm::scenario::Op;

use super::file::Image;
use super::{all, timed};
use crate::BenchError;

/// How long the programs take, in seconds.
pub(super) fn turn(image: &Image, programs: &[Vec<Op>]) -> Result<f64, BenchError> {
    let vm = Vm::new(polder::HostKind::Memfd)?;
    let pages = all(image.pages());
    let view = Arc::new(View::new(&Arc::new(Memfd::new("peer", image.pages())?))?);
    let userfault = Userfault::new(Arc::clone(&view))?;
    userfault.watch(pages)?;
    let kvm = vm.kvm().expect("it is KVM's");
    let _slot = KvmSlot::new(kvm, 0, Vm::RAM.gfn(), &view, pages)?;
    // The guest's requests need some; it makes none about it.
    let memory = Memory::builder(PageCount::ONE).build()?;
    let id = vm.attach(&memory)?;

    let (stop, nudge) = (AtomicBool::new(false), Nudge::new()?);
    std::thread::scope(|scope| {
        let handler = scope.spawn(|| handle(image, &userfault, &stop, &nudge));
        let seconds = timed(&vm, (&memory, id), programs);
        stop.store(true, Ordering::Release);
        nudge.give();
        handler.join().expect("it does not panic")?;
        seconds
    })
}

fn handle(
    image: &Image,
    userfault: &Userfault,
    stop: &AtomicBool,
    nudge: &Nudge,
) -> Result<(), BenchError> {
    let mut touches = Vec::new();
    while !stop.load(Ordering::Acquire) {
        polder_linux::wait([userfault.as_fd(), nudge.as_fd()], None)?;
        userfault.touches(&mut touches)?;
        for page in touches.drain(..) {
            userfault.copy(page, image.page(page.get()))?;
        }
    }
    Ok(())
}
