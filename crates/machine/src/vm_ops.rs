//! What a mapping says of itself to kernel code that knows nothing of KVM, such as userfaultfd: the
//! hooks in `vm_operations_struct` that were suggested for it (linux-mm, March 2025), as data.

use polder_units::Level;

use crate::{Error, Machine, ProcessId, Vpn};

/// The hooks' answers.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct VmOps {
    /// `vma_is_gmem`: it is guest memory, whose pages have to be published before they are seen.
    pub guest_memory: bool,
    /// `get_supported_orders`: bit n is set if it can be mapped in blocks of 2^n pages.
    pub supported_orders: u64,
}

impl Machine {
    /// What the mapping of a process at a page says of itself.
    ///
    /// # Errors
    /// [`Error::Gone`]; [`Error::NoVma`] where nothing is mapped.
    ///
    /// ```
    /// use polder_machine::{Config, Machine, View, VmOps, Vpn, VpnRange};
    /// use polder_units::{Level, PageCount, PageIndex};
    ///
    /// let mut machine = Machine::new(Config::x86_64(PageCount::from(1024)))?;
    /// let object = machine.create_object(PageCount::from(512))?;
    /// let process = machine.create_process()?;
    /// let at = VpnRange::between(512, 1024).unwrap();
    /// let view = View { largest: Level::Size2M, ..View::HOST };
    /// machine.mmap(process, at, object, PageIndex::from(0), view)?;
    /// let ops = machine.vm_ops(process, at.start())?;
    /// assert_eq!(ops, VmOps { guest_memory: true, supported_orders: 1 | 1 << 9 });
    /// # Ok::<_, polder_machine::Error>(())
    /// ```
    pub fn vm_ops(&self, process: ProcessId, vpn: Vpn) -> Result<VmOps, Error> {
        let vma = self.processes.get(process)?.vma(vpn)?;
        let levels = Level::ALL.into_iter().filter(|level| *level <= vma.view.largest);
        let order = |level| self.geometry().pages(level).get().trailing_zeros();
        let supported_orders = levels.fold(0, |orders, level| orders | 1 << order(level));
        let guest_memory = !self.objects.get(vma.object)?.anonymous;
        Ok(VmOps { guest_memory, supported_orders })
    }
}
