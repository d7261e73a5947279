//! A guest of KVM that times its own accesses, and tells in a log.

use std::time::Duration;

use polder::units::{Gpa, PAGE_SIZE, PageRange};
use polder::{HostKind, Memory, Slot, Visibility, VmId};
use polder_linux::KvmSlot;
use polder_vmm::scenario::{HostAccess, Op, Pattern, WORD};
use polder_vmm::{End, IdleVcpu, RunError, Supervision, Vm};

use crate::BenchError;
use crate::apart::Apart;
use crate::bare::Bare;

/// Where Polder's memory is for the guest, and where bare memory is.
pub(crate) const POLDER: Gpa = Gpa::new(256 << 20);
pub(crate) const BARE: Gpa = Gpa::new(512 << 20);

/// Where memory is that the guest does not read.
pub(crate) const BESIDE: Gpa = Gpa::new(768 << 20);
const BARE_BESIDE: Gpa = Gpa::new(784 << 20);

/// The log has a word for each page that is timed.
const LOG: Gpa = Vm::RAM;
const LOG_PAGES: u64 = 128;

/// A VM with a log, and what else is bound to it.
pub(crate) struct Guest {
    vm: Vm,
    log: Memory,
    id: VmId,
    ticks_per_us: f64,
}

impl Guest {
    pub(crate) fn new() -> Result<Self, BenchError> {
        let vm = Vm::new(HostKind::Memfd)?;
        let pages = PageRange::between(0, LOG_PAGES).expect("the log has pages");
        let log = Memory::builder(pages.count()).shared().build()?;
        let id = vm.attach(&log)?;
        log.bind(id, Slot(0), LOG.gfn(), pages)?;
        let IdleVcpu::Kvm(vcpu) = vm.idle_vcpu(&log, id)? else {
            unreachable!("a VM of KVM's has vCPUs of KVM's")
        };
        let khz = vcpu.get_tsc_khz().map_err(|error| RunError::Vm {
            call: "KVM_GET_TSC_KHZ",
            source: std::io::Error::from_raw_os_error(error.errno()),
        })?;
        Ok(Self { vm, log, id, ticks_per_us: f64::from(khz) / 1e3 })
    }

    /// Shows memory of Polder's at [`POLDER`].
    pub(crate) fn bind(&self, memory: &Memory) -> Result<VmId, BenchError> {
        let id = self.vm.attach(memory)?;
        let all = PageRange::between(0, memory.pages().get()).expect("memory has pages");
        memory.bind(id, Slot(1), POLDER.gfn(), all)?;
        Ok(id)
    }

    /// A vCPU that runs no guest, for memory that knows the VM as `id`.
    pub(crate) fn idle_vcpu(&self, memory: &Memory, id: VmId) -> Result<IdleVcpu, BenchError> {
        Ok(self.vm.idle_vcpu(memory, id)?)
    }

    /// Shows bare memory at [`BARE`], until the slot is dropped.
    pub(crate) fn bind_bare(&self, bare: &Bare, pages: PageRange) -> Result<KvmSlot, BenchError> {
        let polder::Vm::Kvm(fd) = self.vm.fd() else { unreachable!("a VM of KVM's") };
        Ok(KvmSlot::new(&fd, 2, BARE.gfn(), bare.guest_view(), pages)?)
    }

    /// Makes the VM known to memory that is to be bound at [`BESIDE`].
    pub(crate) fn attach(&self, memory: &Memory) -> Result<VmId, BenchError> {
        Ok(self.vm.attach(memory)?)
    }

    /// Shows bare memory where the guest does not read it.
    pub(crate) fn bind_bare_beside(
        &self,
        bare: &Bare,
        pages: PageRange,
    ) -> Result<KvmSlot, BenchError> {
        let polder::Vm::Kvm(fd) = self.vm.fd() else { unreachable!("a VM of KVM's") };
        Ok(KvmSlot::new(&fd, 4, BARE_BESIDE.gfn(), bare.guest_view(), pages)?)
    }

    /// Has the guest convert a page of its own over and over. Returns the microseconds of each
    /// request to private, to shared, and for what the page is already.
    pub(crate) fn own_requests(&self, times: u32) -> Result<[Vec<f64>; 3], BenchError> {
        // The last page of the log's memory, where no time is written.
        let gpa = Gpa::new(LOG.get() + (LOG_PAGES - 1) * PAGE_SIZE);
        let log = |at: u64| Gpa::new(LOG.get() + at * WORD);
        let times = u64::from(times);
        let convert = |to, at| Op::TimeConvert { gpa, pages: 1, to, log: log(at) };
        let each = |turn: u64| {
            let [first, second, third] = [0, 1, 2].map(|at| 3 * turn + at);
            // The host has it mapped, as a device would.
            let looked = Op::Probe { gpa, pages: 1, expect: HostAccess::Readable };
            let to_private = convert(Visibility::Private, first);
            let nothing = convert(Visibility::Private, third);
            [looked, to_private, nothing, convert(Visibility::Shared, second)]
        };
        let program = (0..times).flat_map(each).chain([Op::Done]).collect();
        self.run(&[program])?;
        let words = self.read(0, 3 * times)?;
        let kind = |at| words.iter().skip(at).step_by(3).map(|&it| self.microseconds(it)).collect();
        Ok([kind(0), kind(1), kind(2)])
    }

    /// Has the guest read the first word of `pages` pages from `gpa` on, each of its vCPUs a share
    /// of them. Returns the microseconds of each.
    pub(crate) fn time(&self, gpa: Gpa, pages: u32, vcpus: u32) -> Result<Vec<f64>, BenchError> {
        let share = u64::from(pages / vcpus);
        let on = |base: Gpa, bytes: u64| Gpa::new(base.get() + bytes);
        let program = |vcpu| {
            let log = on(LOG, vcpu * share * WORD);
            let time = Op::Time { gpa: on(gpa, vcpu * share * PAGE_SIZE), pages: share, log };
            vec![time, Op::Done]
        };
        let programs: Vec<Vec<Op>> = (0..u64::from(vcpus)).map(program).collect();
        self.run(&programs)?;
        let mut words = self.read(0, share * u64::from(vcpus))?;
        Ok(words.drain(..).map(|ticks| self.microseconds(ticks)).collect())
    }

    /// Has the guest write the first `bytes` bytes at each address, one after the other.
    pub(crate) fn fill(&self, at: &[Gpa], bytes: u64) -> Result<(), BenchError> {
        let fill = |&gpa| Op::Fill { gpa, len: bytes, pattern: Pattern::Seeded { seed: 1 } };
        self.run(&[at.iter().map(fill).chain([Op::Done]).collect()])
    }

    /// Has the guest read the first word of `pages` pages from `gpa` on over and over, while
    /// `operation` is done again and again: `times` times, each after `prepare`. Returns the
    /// longest time from one read to the next around each, in microseconds.
    pub(crate) fn stand_still(
        &self,
        (gpa, pages): (Gpa, u32),
        times: u32,
        mut prepare: impl FnMut() -> Result<(), BenchError>,
        mut operation: impl FnMut() -> Result<(), BenchError>,
    ) -> Result<Vec<f64>, BenchError> {
        let until = Gpa::new(LOG.get() + 2 * WORD);
        let op = Op::StandStill { gpa, pages: pages.into(), log: LOG, until };
        self.write(0, &[0, 0, 0])?;
        let apart = Apart::new();
        std::thread::scope(|scope| {
            let guest = scope.spawn(|| {
                apart.iter().for_each(Apart::elsewhere);
                self.run(&[vec![op, Op::Done]])
            });
            // Until the guest has read all pages since now, or is at its end.
            let pass = || {
                let start = self.read(0, 1)?[0];
                while self.read(0, 1)?[0].wrapping_sub(start) <= u64::from(pages)
                    && !guest.is_finished()
                {
                    std::thread::sleep(Duration::from_micros(20));
                }
                Ok::<(), BenchError>(())
            };
            let mut sample = || {
                prepare()?;
                pass()?;
                self.write(1, &[0])?;
                operation()?;
                // For as long that what the machine does anyway is in every sample.
                std::thread::sleep(Duration::from_micros(100));
                pass()?;
                Ok(self.microseconds(self.read(1, 1)?[0]))
            };
            let samples = (0..times).map(|_| sample()).collect();
            let stopped = self.write(2, &[1]);
            guest.join().expect("a guest's thread does not panic")?;
            stopped?;
            samples
        })
    }

    fn run(&self, programs: &[Vec<Op>]) -> Result<(), BenchError> {
        let ended = self.vm.run((&self.log, self.id), programs, |_| Supervision::GoOn)?;
        assert_eq!(ended.end, End::Ok, "a guest that only reads");
        Ok(())
    }

    fn microseconds(&self, ticks: u64) -> f64 {
        ticks as f64 / self.ticks_per_us
    }

    /// Words of the log.
    fn read(&self, first: u64, count: u64) -> Result<Vec<u64>, BenchError> {
        let count = usize::try_from(count * WORD).expect("a part of the log");
        let mut bytes = vec![0; count];
        self.log.read(self.id, Gpa::new(LOG.get() + first * WORD), &mut bytes)?;
        let (words, _) = bytes.as_chunks();
        Ok(words.iter().map(|&word| u64::from_le_bytes(word)).collect())
    }

    fn write(&self, first: u64, words: &[u64]) -> Result<(), BenchError> {
        let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
        Ok(self.log.write(self.id, Gpa::new(LOG.get() + first * WORD), &bytes)?)
    }
}
