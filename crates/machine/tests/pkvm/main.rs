//! pKVM, the IOMMU, exclusive pins, the direct map and migration, a rule a test.

#![expect(clippy::unwrap_used, reason = "a test")]

mod direct_map;
mod exclusive;
mod guests;
mod host;
mod iommu;
mod migrate;
#[path = "../numbers/mod.rs"]
mod numbers;
mod oracle;
mod planted;

use numbers::{OWNER, geometry, gfns, page, pages, vpns};
use polder_machine::{
    AccessCheck, Component, Config, DomainId, Error, Exit, HostExit, Hva, Machine, ObjectId,
    PageState, PinId, PinKind, PkvmResult, ProcessId, Refused, Side, Thread, VcpuId, View, VmId,
    Vpn,
};
use polder_units::{Gfn, Level, PAGE_SIZE, PageCount, Pfn};

const FRAMES: u32 = 16;
const PAGES: u32 = 8;

fn pfn(number: u32) -> Pfn {
    Pfn::from(number)
}

fn gfn(number: u32) -> Gfn {
    Gfn::from(number)
}

/// A machine with pKVM: an object of 8 pages in frames 0 to 7, mapped by a process at its page 0; a
/// protected guest, one that is not, and a device.
struct Rig {
    machine: Machine,
    object: ObjectId,
    process: ProcessId,
    vm: VmId,
    vcpu: VcpuId,
    plain: VmId,
    domain: DomainId,
}

impl Rig {
    fn new() -> Self {
        let mut machine = Machine::new(Config::symbolic(FRAMES.into(), geometry())).unwrap();
        machine.enable_pkvm();
        let object = machine.create_object(PageCount::from(PAGES)).unwrap();
        for at in 0..PAGES {
            assert_eq!(machine.allocate(object, page(at), Level::Size4K), Ok(pfn(at)));
        }
        let process = machine.create_process().unwrap();
        machine.mmap(process, vpns(0, 8), object, page(0), View::PLAIN).unwrap();
        let vm = machine.create_pkvm_vm().unwrap();
        machine.bind(vm, gfn(0), object, pages(0, 8)).unwrap();
        let vcpu = machine.add_vcpu(vm).unwrap();
        let plain = machine.create_vm().unwrap();
        let domain = machine.create_domain().unwrap();
        Self { machine, object, process, vm, vcpu, plain, domain }
    }

    fn thread(&self) -> Thread {
        Thread { process: self.process, index: 0 }
    }

    fn host_write(&mut self, at: u32, token: u8) -> Result<(), HostExit> {
        let hva = Hva::new(u64::from(at) * PAGE_SIZE);
        self.machine.host_write(self.thread(), hva, &[token; 8])
    }

    fn host_read(&mut self, at: u32) -> Result<u8, HostExit> {
        let mut word = [0; 8];
        let hva = Hva::new(u64::from(at) * PAGE_SIZE);
        self.machine.host_read(self.thread(), hva, &mut word)?;
        Ok(word[0])
    }

    fn guest_write(&mut self, at: u32, token: u8) -> Result<(), Exit> {
        let word = u64::from_le_bytes([token; 8]);
        self.machine.vcpu(self.vcpu).unwrap().write_u64(gfn(at).gpa(), Side::Private, word)
    }

    fn guest_read(&mut self, at: u32) -> Result<u8, Exit> {
        let read = self.machine.vcpu(self.vcpu).unwrap().read_u64(gfn(at).gpa(), Side::Private);
        Ok(read?.to_le_bytes()[0])
    }

    fn device_write(&mut self, at: u32, token: u8) -> Result<(), Error> {
        self.machine.device_write(self.domain, gfn(at).gpa(), &[token; 8])
    }

    fn device_read(&mut self, at: u32) -> Result<u8, Error> {
        let mut word = [0; 8];
        self.machine.device_read(self.domain, gfn(at).gpa(), &mut word)?;
        Ok(word[0])
    }

    fn pin(&mut self, at: u32, kind: PinKind) -> Result<PinId, HostExit> {
        let range = vpns(at.into(), u64::from(at) + 1);
        self.machine.pin_user_pages(self.process, range, true, kind)
    }

    /// Frame `at` becomes the guest's page at the same number.
    fn donate(&mut self, at: u32) -> PkvmResult {
        self.machine.host_donate_guest(self.vm, gfn(at), pfn(at))
    }

    /// The guest asks for its page `at` to be shared, and the host answers.
    fn share(&mut self, at: u32) -> PkvmResult {
        self.machine.vcpu(self.vcpu).unwrap().mem_share(gfn(at)).unwrap()?;
        let answered = self.machine.answer_guest(self.vm, gfn(at));
        self.machine.resume_guest(self.vm, gfn(at))?;
        answered
    }

    fn unshare(&mut self, at: u32) -> PkvmResult {
        self.machine.vcpu(self.vcpu).unwrap().mem_unshare(gfn(at)).unwrap()?;
        let answered = self.machine.answer_guest(self.vm, gfn(at));
        self.machine.resume_guest(self.vm, gfn(at))?;
        answered
    }

    /// What host, hypervisor, guest and IOMMU have of a frame.
    fn tables(&self, at: u32) -> (PageState, PageState, PageState, bool) {
        let state = |of| self.machine.page_state(of, pfn(at)).unwrap().0;
        let open = self.machine.is_open_to_devices(pfn(at)).unwrap();
        let guest = state(Component::Guest(self.vm));
        (state(Component::Host), state(Component::Hypervisor), guest, open)
    }
}

fn refusal(exit: &HostExit) -> Option<AccessCheck> {
    match exit {
        HostExit::Refused(Refused { check, .. }) => Some(*check),
        _ => None,
    }
}

fn vpn(number: u32) -> Vpn {
    Vpn::from(number)
}
