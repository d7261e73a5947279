//! A VM whose memory is one object, and a hypervisor that answers its faults.

use polder_machine::{
    Config, Contents, Error, Exit, L2, Machine, ObjectId, Pte, Resolved, Side, Touch, VcpuId, VmId,
};
use polder_units::{Gfn, Gpa, Level, PageCount, PageIndex, PageRange};

use crate::geometry;

/// Guest frames of the VM, all in one slot from 0 on.
pub(crate) const PAGES: u64 = 64;

/// What the guest runs on.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Kind {
    /// No TDP: its own tables are shadowed.
    Shadow,
    /// TDP: the tables that it has for its guest are.
    Nested,
}

/// What came of an access.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Came {
    /// The word that was read, or the one that was written.
    Done(u64),
    /// The guest's own tables refuse.
    PageFault,
    /// No slot is there.
    NoSlot,
}

pub(crate) struct Rig {
    pub(crate) machine: Machine,
    pub(crate) object: ObjectId,
    pub(crate) vm: VmId,
    pub(crate) vcpus: [VcpuId; 2],
    pub(crate) kind: Kind,
}

pub(crate) fn gfn(number: u64) -> Gfn {
    Gfn::new(number).unwrap()
}

impl Rig {
    pub(crate) fn new(kind: Kind) -> Self {
        let config = Config {
            frames: PageCount::from(256),
            geometry: geometry(),
            contents: Contents::Bytes,
            tlb_entries: 8,
            accessed_dirty: true,
        };
        let mut machine = Machine::new(config).unwrap();
        let object = machine.create_object(PageCount::new(PAGES).unwrap()).unwrap();
        Self::with(machine, object, kind)
    }

    /// The same with anonymous memory.
    pub(crate) fn anonymous(kind: Kind) -> Self {
        let mut machine = Machine::new(Config::x86_64(PageCount::from(4096))).unwrap();
        let object = machine.create_anonymous(PageCount::new(PAGES).unwrap()).unwrap();
        Self::with(machine, object, kind)
    }

    fn with(mut machine: Machine, object: ObjectId, kind: Kind) -> Self {
        let vm = match kind {
            Kind::Shadow => machine.create_vm_without_tdp(),
            Kind::Nested => machine.create_vm(),
        };
        let vm = vm.unwrap();
        let all = PageRange::between(0, PAGES).unwrap();
        machine.bind(vm, gfn(0), object, all).unwrap();
        let vcpus = [(); 2].map(|()| machine.add_vcpu(vm).unwrap());
        Self { machine, object, vm, vcpus, kind }
    }

    /// Has the tables from `table` on translate what a vCPU does.
    pub(crate) fn load(&mut self, vcpu: usize, table: u64) {
        let (vcpu, top) = (self.vcpus[vcpu], Some(gfn(table)));
        match self.kind {
            Kind::Shadow => self.machine.set_cr3(vcpu, top),
            Kind::Nested => self.machine.enter_l2(vcpu, L2 { ncr3: top, cr3: None }),
        }
        .unwrap();
    }

    /// Has the vCPU's addresses be guest frames.
    pub(crate) fn direct(&mut self, vcpu: usize) {
        match self.kind {
            Kind::Shadow => self.machine.set_cr3(self.vcpus[vcpu], None),
            Kind::Nested => self.machine.leave_l2(self.vcpus[vcpu]),
        }
        .unwrap();
    }

    /// Writes an entry before anything runs.
    pub(crate) fn pte(&mut self, table: u64, index: u16, to: u64, bits: u64) {
        let entry = Pte::new(gfn(to), bits);
        self.ready(gfn(table));
        self.machine.write_pte(self.vm, gfn(table), index, entry).unwrap();
    }

    /// Gives memory to a frame.
    pub(crate) fn ready(&mut self, gfn: Gfn) {
        let page = PageIndex::new(gfn.get()).unwrap();
        if self.machine.backing(self.object, page).unwrap().is_none() {
            let made = self.machine.allocate(self.object, page, Level::Size4K);
            made.unwrap();
        }
    }

    /// A word of a page of the root's space, read or written, with every fault answered.
    pub(crate) fn access(&mut self, vcpu: usize, page: u64, word: u64, value: Option<u64>) -> Came {
        let address = Gpa::new((page << 12) + word * 8);
        for _ in 0..20 {
            let mut cpu = self.machine.vcpu(self.vcpus[vcpu]).unwrap();
            let exit = match value {
                Some(value) => {
                    cpu.write_u64(address, Side::Shared, value).map(|()| Came::Done(value))
                }
                None => cpu.read_u64(address, Side::Shared).map(Came::Done),
            };
            match exit {
                Ok(done) => return done,
                Err(Exit::PageFault(fault)) => {
                    assert_eq!((fault.page, fault.write), (page, value.is_some()));
                    return Came::PageFault;
                }
                Err(Exit::Fault(fault)) if fault.gfn.get() >= PAGES => return Came::NoSlot,
                Err(Exit::Fault(fault)) => {
                    let touch = if fault.write { Touch::Write } else { Touch::Read };
                    self.answer(vcpu, fault.page, fault.gfn, touch);
                }
                Err(other) => panic!("{other}"),
            }
        }
        panic!("an access of page {page:#x} is not let through, however often it is answered");
    }

    fn answer(&mut self, vcpu: usize, page: u64, gfn: Gfn, touch: Touch) {
        self.ready_for(gfn, touch);
        match self.resolve(vcpu, page, touch) {
            Ok(resolved) => {
                self.machine.map(&resolved, resolved.largest(), true).unwrap();
            }
            // The next table, or the page itself, is asked for by the next fault.
            Err(Error::Table { .. } | Error::Hole { .. } | Error::NoSlot { .. }) => {}
            // The table that came into being has nothing.
            Err(Error::Untranslated { .. }) => {}
            Err(Error::ToCopy { .. }) => {}
            Err(other) => panic!("{other}"),
        }
    }

    fn ready_for(&mut self, gfn: Gfn, touch: Touch) {
        let page = PageIndex::new(gfn.get()).unwrap();
        if self.machine.zero_page().is_none() {
            self.ready(gfn);
        } else if touch == Touch::Write {
            self.machine.write_fault(self.object, page).unwrap();
        }
    }

    pub(crate) fn resolve(
        &mut self,
        vcpu: usize,
        page: u64,
        touch: Touch,
    ) -> Result<Resolved, Error> {
        self.machine.resolve(self.vcpus[vcpu], page, touch)
    }

    /// Maps ahead, as large as can be.
    pub(crate) fn prefault(&mut self, vcpu: usize, page: u64) -> Result<Level, Error> {
        let resolved = self.resolve(vcpu, page, Touch::Prefault)?;
        self.machine.map(&resolved, resolved.largest(), true)
    }

    /// The bytes of a page of guest memory, as the host has them.
    pub(crate) fn bytes(&self, gfn: u64) -> Vec<u8> {
        let mut bytes = vec![0; 1 << 12];
        self.machine.object_read(self.object, gfn << 12, &mut bytes).unwrap();
        bytes
    }

    /// A word of guest memory, as the host has it.
    pub(crate) fn word(&self, gfn: u64, word: u64) -> u64 {
        let mut bytes = [0; 8];
        self.machine.object_read(self.object, (gfn << 12) + word * 8, &mut bytes).unwrap();
        u64::from_le_bytes(bytes)
    }
}
