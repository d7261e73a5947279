//! A host whose steps and answers fail or panic, as is planned.

use super::*;

/// What a step that is chosen to does instead of succeeding.
#[derive(Clone, Copy, PartialEq)]
pub(super) enum Trouble {
    /// It is done, and reports a failure that may pass.
    Fail,
    /// It is done, and reports a failure that will not.
    Refuse,
    /// It is done, and panics: the operation is abandoned.
    Panic,
}

/// A host, in trouble from some step on.
pub(super) struct Troubled {
    pub(super) host: Box<dyn Host>,
    pub(super) trouble: Trouble,
    /// How many steps go well first, and how many go wrong then.
    pub(super) plan: Arc<Mutex<(usize, usize)>>,
    /// How many answers go wrong.
    pub(super) answers: Arc<AtomicUsize>,
    pub(super) unbinding: Arc<Unbinding>,
}

/// What happens while a slot is taken away.
#[derive(Default)]
pub(super) struct Unbinding {
    /// Whether it can't be.
    pub(super) slot_stays: AtomicBool,
    /// Called once, when the slot has gone from the host, or just before that fails.
    pub(super) meanwhile: Mutex<Option<Box<dyn FnOnce() + Send>>>,
}

impl Troubled {
    fn go_wrong(&self) -> Result<(), Error> {
        let errno = match self.trouble {
            Trouble::Fail => polder_linux::Errno::NOMEM,
            Trouble::Refuse => polder_linux::Errno::INVAL,
            Trouble::Panic => panic!("as was planned"),
        };
        Err(polder_linux::Error { call: "planned", range: None, errno }.into())
    }
}

impl Host for Troubled {
    fn take(&self, step: Step) -> Result<(), Error> {
        self.host.take(step)?;
        let mut plan = self.plan.lock();
        if plan.0 > 0 {
            plan.0 -= 1;
        } else if plan.1 > 0 {
            plan.1 -= 1;
            drop(plan);
            return self.go_wrong();
        }
        Ok(())
    }

    fn views(&self) -> &dyn Views {
        self
    }

    fn attach(&self, id: VmId, vm: Vm) -> Result<(), Error> {
        self.host.attach(id, vm)
    }

    fn bind(&self, vm: VmId, slot: Slot, gfn: Gfn, pages: PageRange) -> Result<(), Error> {
        self.host.bind(vm, slot, gfn, pages)
    }

    fn unbind(&self, vm: VmId, slot: Slot) -> Result<(), Error> {
        let stays = self.unbinding.slot_stays.load(Ordering::SeqCst);
        if !stays {
            self.host.unbind(vm, slot)?;
        }
        if let Some(meanwhile) = self.unbinding.meanwhile.lock().take() {
            meanwhile();
        }
        if stays { self.go_wrong() } else { Ok(()) }
    }

    fn log_dirty(&self, on: bool) -> Result<(), Error> {
        self.host.log_dirty(on)
    }

    fn take_dirty(&self, into: &crate::dirty::Marks) -> Result<(), Error> {
        self.host.take_dirty(into)
    }

    fn map_guest(
        &self,
        vm: VmId,
        access: GuestAccess,
        faulted: Option<Faulted>,
        range: PageRange,
    ) -> Result<bool, Error> {
        self.host.map_guest(vm, access, faulted, range)
    }

    fn smash(&self, vm: VmId, gfn: Gfn, within: PageRange) -> Result<crate::host::Smashed, Error> {
        self.host.smash(vm, gfn, within)
    }

    fn machine(&self) -> Option<&MachineHost> {
        self.host.machine()
    }

    fn show(
        &self,
        vm: VmId,
        vcpu: Vcpu<'_>,
        shown: Shown,
        range: PageRange,
    ) -> Result<(u64, u64), Error> {
        self.host.show(vm, vcpu, shown, range)
    }

    fn settle(&self, failed: &[PageRange]) -> Result<(), Error> {
        self.host.settle(failed)
    }

    fn pool(&self) -> Option<polder_engine::pool::PoolCounts> {
        self.host.pool()
    }

    fn existing(&self) -> Result<Vec<PageRange>, Error> {
        self.host.existing()
    }
}

impl Views for Troubled {
    fn answer(&self, view: View, response: Response, range: PageRange) -> Result<(), Error> {
        let left = self.answers.load(Ordering::SeqCst);
        if left > 0 {
            self.answers.store(left - 1, Ordering::SeqCst);
            self.go_wrong()?;
        }
        self.host.views().answer(view, response, range)
    }

    fn wake(&self, view: View, range: PageRange) {
        self.host.views().wake(view, range);
    }

    fn touches(
        &self,
        into: &mut Vec<(View, PageIndex)>,
        at_most: Option<Duration>,
    ) -> Result<bool, Error> {
        self.host.views().touches(into, at_most)
    }

    fn nudge(&self) {
        self.host.views().nudge();
    }

    fn read(&self, offset: u64, into: &mut [u8]) -> Result<(), Error> {
        self.host.views().read(offset, into)
    }

    fn write(&self, offset: u64, from: &[u8]) -> Result<(), Error> {
        self.host.views().write(offset, from)
    }

    fn touch_read(&self, offset: u64, into: &mut [u8]) -> Result<(), Error> {
        self.host.views().touch_read(offset, into)
    }

    fn touch_write(&self, offset: u64, from: &[u8]) -> Result<(), Error> {
        self.host.views().touch_write(offset, from)
    }

    fn touch_from(&self, file: BorrowedFd<'_>, offset: u64, count: usize) -> Result<usize, Error> {
        self.host.views().touch_from(file, offset, count)
    }

    fn host_view(&self) -> Option<&std::sync::Arc<polder_linux::View>> {
        self.host.views().host_view()
    }

    fn guest_page(&self, address: usize) -> Option<PageIndex> {
        self.host.views().guest_page(address)
    }
}
