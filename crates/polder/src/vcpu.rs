//! A vCPU of the simulated machine, to run a guest's accesses on.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use polder_engine::{GuestAccess, MemoryFault, Visibility, VmId};
use polder_machine::{Exit, Machine, Side, VcpuId};
use polder_units::Gpa;

use crate::Error;
use crate::driver::Driver;

/// Why a guest's access was not made. No byte of it was.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum GuestExit {
    /// It is for the VMM to handle.
    #[error("the guest's access is refused: {0}")]
    MemoryFault(MemoryFault),
    /// It waited for something, and was kicked.
    #[error("the vCPU was kicked")]
    Kicked,
    /// The machine could not map the page.
    #[error(transparent)]
    Failed(Error),
}

/// A vCPU of the simulated machine. Its accesses go through a TLB and stage 2; what they don't
/// let through is answered by the engine, as a fault on any host.
pub struct MachineVcpu {
    driver: Arc<Driver>,
    vm: VmId,
    id: VcpuId,
    kicked: Arc<AtomicBool>,
}

impl MachineVcpu {
    pub(crate) fn new(driver: &Arc<Driver>, vm: VmId) -> Result<Self, Error> {
        let host = driver.host.machine().ok_or(Error::NotSimulated)?;
        let machine_vm = host.vm(vm).ok_or(Error::NoSuchVm)?;
        let id = host.lock().add_vcpu(machine_vm).map_err(Error::Machine)?;
        Ok(Self { driver: Arc::clone(driver), vm, id, kicked: Arc::default() })
    }

    /// What makes an access that is not let through at once return [`GuestExit::Kicked`], once set.
    pub fn kicker(&self) -> Arc<AtomicBool> {
        Arc::clone(&self.kicked)
    }

    /// Whether it is of this VM of this memory.
    pub(crate) fn is_of(&self, driver: &Arc<Driver>, vm: VmId) -> bool {
        Arc::ptr_eq(&self.driver, driver) && self.vm == vm
    }

    pub(crate) fn is_kicked(&self) -> bool {
        self.kicked.load(Ordering::Acquire)
    }

    /// Reads guest memory, as private or as shared.
    ///
    /// # Errors
    /// [`GuestExit`]; the buffer is unchanged.
    pub fn read(&self, gpa: Gpa, side: Visibility, into: &mut [u8]) -> Result<(), GuestExit> {
        self.access(side, |machine, id, side| Ok(machine.vcpu(id)?.read(gpa, side, into)?))
    }

    /// Writes guest memory, as private or as shared.
    ///
    /// # Errors
    /// [`GuestExit`]; nothing was written.
    pub fn write(&self, gpa: Gpa, side: Visibility, from: &[u8]) -> Result<(), GuestExit> {
        self.access(side, |machine, id, side| Ok(machine.vcpu(id)?.write(gpa, side, from)?))
    }

    fn access(
        &self,
        visibility: Visibility,
        mut access: impl FnMut(&mut Machine, VcpuId, Side) -> Result<(), Stop>,
    ) -> Result<(), GuestExit> {
        let host = self.driver.host.machine().expect("made on the simulated machine");
        let side = match visibility {
            Visibility::Private => Side::Private,
            Visibility::Shared => Side::Shared,
        };
        loop {
            let exit = access(&mut host.lock(), self.id, side);
            let fault = match exit {
                Ok(()) => return Ok(()),
                Err(Stop::Exit(Exit::Fault(fault))) => fault,
                Err(Stop::Exit(other)) => unreachable!("an access does not end in: {other}"),
                Err(Stop::Machine(error)) => return Err(GuestExit::Failed(Error::Machine(error))),
            };
            let access = GuestAccess { gfn: fault.gfn, visibility };
            let kicked = || self.kicked.load(Ordering::Acquire);
            match self.driver.guest_fault(self.vm, access, kicked) {
                Ok(None) if kicked() => return Err(GuestExit::Kicked),
                Ok(None) => {}
                Ok(Some(fault)) => return Err(GuestExit::MemoryFault(fault)),
                Err(error) => return Err(GuestExit::Failed(error)),
            }
        }
    }
}

/// What an access of the machine's stops with.
#[derive(Debug)]
enum Stop {
    Exit(Exit),
    Machine(polder_machine::Error),
}

impl From<Exit> for Stop {
    fn from(exit: Exit) -> Self {
        Self::Exit(exit)
    }
}

impl From<polder_machine::Error> for Stop {
    fn from(error: polder_machine::Error) -> Self {
        Self::Machine(error)
    }
}

impl fmt::Debug for MachineVcpu {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MachineVcpu").field("vm", &self.vm).finish_non_exhaustive()
    }
}
