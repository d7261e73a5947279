//! What a guest's addresses are on the simulated machine: the root that its vCPUs run on.
//!
//! On another root than TDP the guest has page tables of large pages that map each address to the
//! same guest frame, so that a program means the same memory on every root. They lie in memory of
//! their own, far above a program's, which Polder is not told of, as a kernel's own.

use polder::machine::{Intercept, L2, Pte};
use polder::units::{AddressSpace, Geometry, Gfn, GfnRange, L2Gfn, Level, Lpn, PageRange};
use polder::units::{Frame, FrameRange, GuestPage};
use polder::{Error, MachineVcpu, Memory, Prefaulted, Vcpu, VmId};

/// The root that a guest of the simulated machine runs on.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum GuestRoot {
    /// Two-dimensional paging.
    Tdp,
    /// A CPU without it: the guest's page tables are shadowed.
    Shadow,
    /// The program is that of a guest's guest, whose nested page tables are shadowed.
    Nested,
}

/// Where the tables are: at 8 TiB.
const TABLES: u32 = 1 << 31;

/// Which 512G a table of 1G pages maps, for each.
const MAPPED: [u16; 2] = [0, 8];

impl GuestRoot {
    /// Every one.
    pub const ALL: [Self; 3] = [Self::Tdp, Self::Shadow, Self::Nested];

    /// The addresses that it translates.
    pub const fn space(self) -> AddressSpace {
        match self {
            Self::Tdp => AddressSpace::Gpa,
            Self::Shadow => AddressSpace::Linear,
            Self::Nested => AddressSpace::L2Gpa,
        }
    }

    /// A VM whose guests run on it.
    pub(crate) const fn vm(self) -> polder::Vm {
        match self {
            Self::Tdp | Self::Nested => polder::Vm::Machine,
            Self::Shadow => polder::Vm::MachineWithoutTdp,
        }
    }

    /// Gives a VM the guest's page tables.
    pub(crate) fn set_up(self, memory: &Memory, id: VmId) -> Result<(), Error> {
        if self == Self::Tdp {
            return Ok(());
        }
        let vm = memory.simulated_vm(id)?;
        let set_up = memory.simulated(|machine, _, _| {
            let tables = PageRange::between(0, 1 + MAPPED.len() as u64).expect("some pages");
            let object = machine.create_object(tables.count())?;
            machine.bind(vm, Gfn::from(TABLES), object, tables)?;
            for page in tables.frames() {
                machine.allocate(object, page, Level::Size4K)?;
            }
            let gibibyte = Geometry::X86_64.pages(Level::Size1G).get();
            for (table, at) in (TABLES + 1..).zip(MAPPED) {
                machine.write_pte(
                    vm,
                    Gfn::from(TABLES),
                    at,
                    Pte::new(Gfn::from(table), Pte::ALL),
                )?;
                for index in 0..512 {
                    let first = (u64::from(at) * 512 + u64::from(index)) * gibibyte;
                    let page =
                        Pte::new(Gfn::new(first).expect("below 2^52"), Pte::ALL | Pte::LARGE);
                    machine.write_pte(vm, Gfn::from(table), index, page)?;
                }
            }
            Ok(())
        })?;
        set_up.map_err(Error::Machine)
    }

    /// Has a vCPU run on it.
    pub(crate) fn load(self, vcpu: &MachineVcpu) -> Result<(), Error> {
        let top = Some(Gfn::from(TABLES));
        match self {
            Self::Tdp => Ok(()),
            Self::Shadow => vcpu.carry_out(Intercept::Cr3(top)),
            Self::Nested => vcpu.carry_out(Intercept::Vmrun(L2 { ncr3: top, cr3: None })),
        }
    }

    /// [`Memory::prefault`] of the pages at which the guest has these frames.
    ///
    /// # Errors
    /// As that.
    pub fn prefault<'a>(
        self,
        (memory, vm): (&Memory, VmId),
        vcpu: impl Into<Vcpu<'a>>,
        gfns: GfnRange,
    ) -> Result<Prefaulted, Error> {
        let vcpu = vcpu.into();
        match self {
            Self::Tdp => memory.prefault(vm, vcpu, gfns),
            Self::Shadow => memory.prefault(vm, vcpu, same::<Gfn, Lpn>(gfns)).map(by_frames),
            Self::Nested => memory.prefault(vm, vcpu, same::<Gfn, L2Gfn>(gfns)).map(by_frames),
        }
    }
}

/// The pages of the same numbers in another space.
fn same<A: Frame, B: Frame>(range: FrameRange<A>) -> FrameRange<B> {
    FrameRange::between(range.start().get(), range.end()).expect("as good a range there")
}

fn by_frames<P: GuestPage>(came: Prefaulted<P>) -> Prefaulted {
    let Prefaulted { done, skipped, left } = came;
    Prefaulted { done: same(done), skipped, left: left.map(same) }
}
