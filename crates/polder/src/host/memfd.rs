//! Host `memfd`: one memfd, three views.
//!
//! ```text
//!              guest view          host view             trusted view
//! who          KVM's slots         device models         Polder alone
//! shared page  mapped by faults    mapped by answers     mapped by use
//! private page mapped by faults    poisoned when touched mapped by use
//! watched      while owed          always                never
//! ```
//! Guest and host see the same page of the memfd: a conversion moves no byte. What it changes is
//! whether the page is in the host view, which a userfaultfd watches: unmapping a page there makes
//! the next touch a question to the engine.
//!
//! # Holes
//! The VMM's process has all three views, `/proc/self/mem` and the descriptor; a reference that
//! the kernel took through the host view before a conversion (`vmsplice`, direct I/O in flight)
//! can't be seen from here. This guards against bugs and stray pointers, not a hostile VMM.

use std::collections::BTreeMap;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use kvm_ioctls::VmFd;
use parking_lot::Mutex;
use polder_engine::{RangeSet, Response, Slot, Step, View as ViewKind, VmId};
use polder_linux::{Continued, Errno, KvmSlot, Memfd, Userfault, View};
use polder_units::{Gfn, Level, PAGE_SIZE, PageCount, PageIndex, PageRange};
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};

use super::{Host, Vm};
use crate::Error;

pub(crate) struct MemfdHost {
    memfd: Arc<Memfd>,
    trusted: View,
    guest: Userfault,
    host: Userfault,
    vms: Mutex<BTreeMap<VmId, Arc<VmFd>>>,
    slots: Mutex<BTreeMap<(VmId, Slot), KvmSlot>>,
    /// Pages of the guest view that are watched for good, because they are in quarantine. Held
    /// while that view's watching changes.
    kept: Mutex<RangeSet>,
    nudge: OwnedFd,
}

impl MemfdHost {
    /// An object of `pages` pages; `owed` if its contents are still to come.
    pub(crate) fn new(pages: PageCount, owed: bool) -> Result<Self, Error> {
        let memfd = Arc::new(Memfd::new("polder", pages)?);
        let trusted = View::new(&memfd)?;
        let guest = Userfault::new(Arc::new(View::new(&memfd)?)).map_err(missing)?;
        let host = Userfault::new(Arc::new(View::new(&memfd)?)).map_err(missing)?;
        let all = PageRange::between(0, pages.get()).expect("an object has pages");
        host.watch(all).map_err(missing)?;
        if owed {
            guest.watch(all).map_err(missing)?;
        }
        let nudge = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)
            .map_err(|errno| failed("eventfd", errno))?;
        Ok(Self {
            memfd,
            trusted,
            guest,
            host,
            vms: Mutex::default(),
            slots: Mutex::default(),
            kept: Mutex::default(),
            nudge,
        })
    }

    /// What KVM's slots show, for tests that look without a guest.
    #[cfg(test)]
    pub(crate) fn guest_view(&self) -> Arc<View> {
        Arc::clone(self.guest.view())
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

    /// Takes pages out of all views for good, by markers in their place.
    fn quarantine(&self, range: PageRange) -> Result<(), Error> {
        let mut kept = self.kept.lock();
        kept.insert(range);
        // Watching what is watched already is harmless.
        self.guest.watch(range)?;
        for watched in [&self.guest, &self.host] {
            watched.view().zap(range)?;
            watched.poison(range)?;
        }
        Ok(())
    }
}

impl Host for MemfdHost {
    fn take(&self, step: Step) -> Result<(), Error> {
        match step {
            Step::UnmapHost(range) => self.host.view().zap(range)?,
            Step::Free(range) => {
                self.memfd.punch_hole(range)?;
                // Markers survive that.
                self.host.view().zap(range)?;
                self.guest.view().zap(range)?;
            }
            Step::Quarantine(range) => self.quarantine(range)?,
            // A guest's mapping is right for private and shared alike, and nothing but the host
            // view enforces the difference; references from outside are not to be seen; a page
            // that was written is ready.
            Step::UnmapGuest(_) | Step::CheckReferences(_) => {}
            Step::Protect(..) | Step::Publish(_) => {}
        }
        Ok(())
    }

    fn answer(&self, view: ViewKind, response: Response, range: PageRange) -> Result<(), Error> {
        match response {
            Response::Map => self.map(view, range),
            Response::Poison => Ok(self.watched(view).poison(range)?),
        }
    }

    fn wake(&self, view: ViewKind, range: PageRange) {
        // It fails only for a range that isn't watched: then nobody waits there.
        let _ = self.watched(view).wake(range);
    }

    fn touches(
        &self,
        into: &mut Vec<(ViewKind, PageIndex)>,
        at_most: Option<Duration>,
    ) -> Result<(), Error> {
        let mut wait = [self.guest.as_fd(), self.host.as_fd(), self.nudge.as_fd()]
            .map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN));
        let at_most = at_most.and_then(|time| Timespec::try_from(time).ok());
        match poll(&mut wait, at_most.as_ref()) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(errno) => return Err(failed("poll", errno)),
        }
        // Reading an eventfd empties it; that it is empty already is no error.
        let _ = rustix::io::read(&self.nudge, &mut [0u8; 8]);
        let mut touches = Vec::new();
        for view in [ViewKind::Guest, ViewKind::Host] {
            self.watched(view).touches(&mut touches)?;
            into.extend(touches.drain(..).map(|touch| (view, touch.page)));
        }
        Ok(())
    }

    fn nudge(&self) {
        // It fails only when the counter is about to overflow: then the reader is awake.
        let _ = rustix::io::write(&self.nudge, &1u64.to_ne_bytes());
    }

    fn attach(&self, id: VmId, vm: Vm) -> Result<(), Error> {
        let Vm::Kvm(vm) = vm else {
            return Err(Error::WrongVm { host: super::HostKind::Memfd });
        };
        self.vms.lock().insert(id, vm);
        Ok(())
    }

    fn bind(&self, vm: VmId, slot: Slot, gfn: Gfn, pages: PageRange) -> Result<(), Error> {
        let fd = Arc::clone(self.vms.lock().get(&vm).expect("a VM that was attached"));
        let bound = KvmSlot::new(&fd, slot.0, gfn, self.guest.view(), pages)?;
        self.slots.lock().insert((vm, slot), bound);
        Ok(())
    }

    fn unbind(&self, vm: VmId, slot: Slot) {
        self.slots.lock().remove(&(vm, slot));
    }

    fn map_guest(&self, _: VmId, _: Gfn, _: Level, _: PageRange) -> Result<(), Error> {
        // KVM maps what is in the guest view.
        Ok(())
    }

    fn settle(&self, failed: &[PageRange]) -> Result<(), Error> {
        let mut kept = self.kept.lock();
        failed.iter().for_each(|&run| kept.insert(run));
        let mut next = 0;
        let ends = kept.runs().map(|run| (run.start().get(), run.end()));
        for (start, end) in ends.chain([(self.memfd.pages().get(), u64::MAX)]) {
            if let Some(free) = PageRange::between(next, start) {
                self.guest.unwatch(free)?;
            }
            next = end;
        }
        Ok(())
    }

    fn read(&self, offset: u64, into: &mut [u8]) -> Result<(), Error> {
        Ok(self.trusted.read(offset, into)?)
    }

    fn write(&self, offset: u64, from: &[u8]) -> Result<(), Error> {
        Ok(self.trusted.write(offset, from)?)
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

    fn host_view(&self) -> Option<*mut u8> {
        Some(self.host.view().as_ptr())
    }

    fn guest_page(&self, address: usize) -> Option<PageIndex> {
        PageIndex::new(self.guest.view().offset_of(address)? / PAGE_SIZE)
    }

    fn existing(&self) -> Result<Vec<PageRange>, Error> {
        Ok(self.memfd.existing()?)
    }
}

pub(super) fn failed(call: &'static str, errno: Errno) -> Error {
    Error::Host(polder_linux::Error { call, range: None, errno })
}

/// Says what to do where userfaultfd can't be used.
pub(super) fn missing(source: polder_linux::Error) -> Error {
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
