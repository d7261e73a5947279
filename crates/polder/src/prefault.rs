//! Prefault: memory mapped for a guest before it touches it.

use kvm_ioctls::VcpuFd;
use polder_engine::VmId;
use polder_units::{GfnRange, PageCount};

use crate::{Error, MachineVcpu, Memory};

/// How many pages are held against operations, and slots against change, at once: 2 MiB, from one
/// multiple of it to the next, so that each can be mapped as one page.
const AT_ONCE: u64 = 512;

/// A vCPU to map memory for, as its host knows it.
#[derive(Clone, Copy, Debug)]
pub enum Vcpu<'a> {
    /// One of KVM's.
    Kvm(&'a VcpuFd),
    /// One of the simulated machine.
    Machine(&'a MachineVcpu),
}

impl<'a> From<&'a VcpuFd> for Vcpu<'a> {
    fn from(vcpu: &'a VcpuFd) -> Self {
        Self::Kvm(vcpu)
    }
}

impl<'a> From<&'a MachineVcpu> for Vcpu<'a> {
    fn from(vcpu: &'a MachineVcpu) -> Self {
        Self::Machine(vcpu)
    }
}

/// How far a prefault came. It is at least one page.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Prefaulted {
    /// The frames that were done, from the first on.
    pub done: GfnRange,
    /// Those after them, if it stopped early: a call for them goes on, or says what is in the way.
    pub left: Option<GfnRange>,
}

impl Memory {
    /// Maps guest frames for a vCPU before its guest touches them, as reads by the guest would:
    /// private pages as private, shared ones as shared. Frames are guest-physical. It may be
    /// called before the guest runs and while it runs, also for several vCPUs at once. How much
    /// is mapped is the host's affair: see `docs/prefault.md`.
    ///
    /// Like `KVM_PRE_FAULT_MEMORY` (Linux `Documentation/virt/kvm/api.rst`) it succeeds if any page
    /// was done. Pages of which an operation is under way are waited for, as a guest would.
    ///
    /// KVM does one thing at a time for a vCPU: a call for one that is in its guest waits for its
    /// next exit, and [`Memory::bind`], [`Memory::unbind`] and what changes those pages wait
    /// meanwhile. So call from the thread that runs the vCPU, or for one that is not running.
    ///
    /// # Errors
    /// What stands before the first frame: [`Refusal::NoSlot`] (`ENOENT`), [`Refusal::Owed`],
    /// [`Refusal::SourceFailed`], [`Refusal::Quarantined`]; [`Error::Interrupted`] (`EINTR`) by a
    /// signal or a kick; [`Error::WrongVcpu`]; [`Error::NotOffered`]; [`Error::Host`], by `EAGAIN`
    /// where others were at work on the page for long; of an SNP guest's private page that it was
    /// not given yet, [`Refusal::Referenced`].
    ///
    /// [`Refusal::NoSlot`]: crate::Refusal::NoSlot
    /// [`Refusal::Owed`]: crate::Refusal::Owed
    /// [`Refusal::SourceFailed`]: crate::Refusal::SourceFailed
    /// [`Refusal::Referenced`]: crate::Refusal::Referenced
    /// [`Refusal::Quarantined`]: crate::Refusal::Quarantined
    ///
    /// ```
    /// # use polder::{HostKind, Memory, Slot, Visibility, Vm, units::{Gfn, GfnRange, Gpa, PageCount, PageRange}};
    /// # let memory = Memory::builder(PageCount::from(16u32)).host(HostKind::Machine).build()?;
    /// # let vm = memory.attach(Vm::Machine)?;
    /// # memory.bind(vm, Slot(0), Gfn::from(0x100), PageRange::between(0, 16).unwrap())?;
    /// let vcpu = memory.machine_vcpu(vm)?;
    /// let frames = GfnRange::between(0x108, 0x118).unwrap();
    /// let done = memory.prefault(vm, &vcpu, frames)?;
    /// assert_eq!((done.done.count().get(), done.left.map(|left| left.count().get())), (8, Some(8)));
    /// # Ok::<_, polder::Error>(())
    /// ```
    pub fn prefault<'a>(
        &self,
        vm: VmId,
        vcpu: impl Into<Vcpu<'a>>,
        gfns: GfnRange,
    ) -> Result<Prefaulted, Error> {
        let vcpu = vcpu.into();
        match (vcpu, self.driver.host.machine()) {
            (Vcpu::Kvm(_), None) => {}
            (Vcpu::Machine(vcpu), Some(_)) if vcpu.is_of(&self.driver, vm) => {}
            _ => return Err(Error::WrongVcpu),
        }
        let mut one_by_one = false;
        let mut left = Some(gfns);
        while let Some(now) = left {
            let most = if one_by_one { 1 } else { AT_ONCE - now.start().get() % AT_ONCE };
            let most = PageCount::new(most).expect("512 at most");
            let stopped = match vcpu {
                Vcpu::Machine(vcpu) if vcpu.is_kicked() => Err((Error::Interrupted, None)),
                _ => {
                    let _unchanged = self.slots.read();
                    self.driver.prefault((vm, vcpu), now, most)
                }
            };
            match stopped {
                Ok(end) => left = GfnRange::between(end, gfns.end()),
                // Some of them may be done: one by one it shows how many.
                Err((error, Some(run)))
                    if run.count() > PageCount::ONE && error != Error::Interrupted =>
                {
                    one_by_one = true;
                }
                Err((error, _)) if now.start() == gfns.start() => return Err(error),
                Err(_) => break,
            }
        }
        let end = left.map_or(gfns.end(), |left| left.start().get());
        let done = GfnRange::between(gfns.start().get(), end);
        Ok(Prefaulted { done: done.expect("it would have failed"), left })
    }
}
