//! The whole public API, called with any arguments, in any order, by several threads at once: what
//! fails, fails with a typed error; nothing panics, nothing hangs, and nothing is left behind: no
//! descriptor, no mapping, no thread, no pin.
//!
//! In a program of its own: what is left behind is counted by the process.

use std::collections::BTreeMap;
use std::fs::File;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use polder::kvm::{self, kvm_create_guest_memfd, kvm_memory_attributes2, kvm_pre_fault_memory};
use polder::units::{Gfn, GfnRange, Gpa, Level, PageCount, PageIndex, PageRange};
use polder::{
    Contents, Delays, Holder, HostKind, Memory, OnBusy, Pin, PinKind, Platform, Slot, Vcpu,
    Visibility, Vm, VmId,
};
use polder_require::{Facility, require};
use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};

/// Pages of each memory.
const PAGES: u64 = 96;

/// A call: which, and numbers to make its arguments of.
type Call = (u8, [u64; 4]);

fn number() -> impl Strategy<Value = u64> {
    prop_oneof![
        12 => 0..PAGES + 4,
        2 => prop::sample::select(vec![
            0x1000, 0xfff, 1 << 20, 1 << 30, 1 << 40, (1 << 52) - 1, 1 << 52, 1 << 63, u64::MAX,
            u64::MAX - 4095,
        ]),
        1 => any::<u64>(),
    ]
}

fn call() -> impl Strategy<Value = Call> {
    (any::<u8>(), [number(), number(), number(), number()])
}

fn visibility(word: u64) -> Visibility {
    if word.is_multiple_of(2) { Visibility::Private } else { Visibility::Shared }
}

fn contents(word: u64) -> Contents {
    [Contents::Preserve, Contents::Zero, Contents::Unspecified][index(word)]
}

/// One of three.
fn index(word: u64) -> usize {
    usize::try_from(word % 3).expect("below 3")
}

fn on_busy(word: u64) -> OnBusy {
    if word.is_multiple_of(2) { OnBusy::Wait } else { OnBusy::Refuse }
}

/// A range that may lie anywhere, if these numbers can be one.
fn pages(start: u64, count: u64) -> Option<PageRange> {
    PageRange::new(PageIndex::new(start)?, PageCount::new(count % 200)?).ok()
}

fn gfns(start: u64, count: u64) -> Option<GfnRange> {
    GfnRange::new(Gfn::new(start)?, PageCount::new(count % 200)?).ok()
}

/// What a thread has: pins that it holds across calls.
struct Hand<'m> {
    memory: &'m Memory,
    vms: &'m [VmId],
    fresh: &'m dyn Fn() -> Vm,
    pins: Vec<Pin<'m>>,
}

impl Hand<'_> {
    /// One of the VMs that the memory knows, or any other.
    fn vm(&self, word: u64) -> VmId {
        let at = usize::try_from(word % 8).expect("below 8");
        self.vms.get(at).copied().unwrap_or(VmId(u32::try_from(word % 1000).expect("below 1000")))
    }

    /// Makes a call. Which errors come is not asked, but that they can be told.
    fn call(&mut self, (which, [a, b, c, d]): Call) -> Option<String> {
        let memory = self.memory;
        let error = |result: Result<(), polder::Error>| {
            result.err().map(|error| {
                format!("{error} {} {:?} {error:?}", error.errno() as i32, error.way_out())
            })
        };
        let (vm, slot) = (self.vm(a), Slot(u32::try_from(d % 40_000).expect("small")));
        match which % 33 {
            0 => error(memory.bind(vm, slot, Gfn::new(b)?, pages(c, d)?)),
            1 => error(memory.unbind(vm, slot)),
            2 => {
                let (range, how) = (pages(a, b)?, contents(d));
                error(memory.convert(range, visibility(c), how, on_busy(a)).map(|_| ()))
            }
            3 => {
                let (range, how) = (gfns(b, c)?, contents(d));
                error(memory.convert_gfns(vm, range, visibility(d), how, on_busy(c)).map(|_| ()))
            }
            4 => error(memory.want(vm, gfns(b, c)?, visibility(d))),
            5 => error(memory.wanted(vm, gfns(b, c)?).map(|_| ())),
            6 => error(memory.discard(pages(a, b)?, on_busy(c))),
            7 => error(memory.merge(pages(a, b)?, on_busy(c))),
            8 => {
                let bytes = vec![7; usize::try_from(c % 9000).expect("small")];
                error(memory.populate(pages(a, b)?, &bytes))
            }
            9 => error(memory.fail(pages(a, b)?)),
            10 => error(memory.settle()),
            11 => {
                let mut bytes = vec![0; usize::try_from(c % 9000).expect("small")];
                error(memory.read(vm, Gpa::new(b.wrapping_mul(512)), &mut bytes))
            }
            12 => {
                let bytes = vec![1; usize::try_from(c % 9000).expect("small")];
                error(memory.write(vm, Gpa::new(b.wrapping_mul(512)), &bytes))
            }
            13 | 14 => {
                let kind = if c.is_multiple_of(2) { PinKind::Short } else { PinKind::LongTerm };
                let pinned = memory.pin(pages(a, b)?, kind, Holder::new("the test"));
                error(pinned.map(|pin| self.pins.push(pin)))
            }
            15 | 16 => {
                self.pins.pop();
                None
            }
            17 => {
                let fault = memory.guest_fault(vm, Gpa::new(b.wrapping_mul(4096)), visibility(c));
                error(fault.map(|_| ()))
            }
            18 => error(memory.facts(pages(a, b)?).map(|_| ())),
            19 => error(memory.explain(PageIndex::new(a)?).map(|told| drop(told.to_string()))),
            20 => error(memory.explain_gpa(vm, Gpa::new(b)).map(|_| ())),
            21 => error(memory.pages_of(vm, gfns(b, c)?).map(|_| ())),
            22 => {
                let mut bytes = vec![0; usize::try_from(b % 9000).expect("small")];
                error(memory.host_view().touch_read(a.wrapping_mul(512), &mut bytes))
            }
            23 => {
                let bytes = vec![2; usize::try_from(b % 9000).expect("small")];
                error(memory.host_view().touch_write(a.wrapping_mul(512), &bytes))
            }
            24 => {
                let zeros = File::open("/dev/zero").expect("a device of every Linux");
                let count = usize::try_from(b % 9000).expect("small");
                error(memory.host_view().read_from(&zeros, a.wrapping_mul(512), count).map(|_| ()))
            }
            25 => {
                memory.count_refusal();
                let _ = (memory.bindings(), memory.unmet(), memory.quarantined());
                let _ = (memory.platform(), memory.is_in_place(), memory.keeps_most(visibility(a)));
                let _ = (memory.statistics(), memory.pages(), memory.page_of_failure(0x1000));
                let _ = (memory.host_view().as_ptr(), memory.host_view().length());
                let delays = Delays::new(a, Duration::from_micros(b % 50));
                let _ = memory.watch(Arc::new(delays));
                error(memory.existing().and_then(|_| memory.resident()).map(|_| ()))
            }
            26 => {
                let new = if a.is_multiple_of(2) { (self.fresh)() } else { Vm::Machine };
                error(memory.attach(new).map(|_| ()))
            }
            27 => error(memory.simulated_vm(vm).map(|_| ())),
            28 => error(memory.simulated(|machine, _, _| machine.audit().expect("INV-9"))),
            29 => {
                let vcpu = match memory.machine_vcpu(vm) {
                    Ok(vcpu) => vcpu,
                    Err(refused) => return error(Err(refused)),
                };
                let (gpa, side) = (Gpa::new(b.wrapping_mul(512)), visibility(c));
                let mut bytes = vec![0; usize::try_from(d % 9000).expect("small")];
                // It waits for contents that are owed until it is kicked.
                vcpu.kicker().store(c.is_multiple_of(3), Ordering::Release);
                let _ = vcpu.read(gpa, side, &mut bytes).err().map(|exit| exit.to_string());
                let _ = vcpu.write(gpa, side, &bytes).err().map(|exit| exit.to_string());
                let _ = vcpu.pvalidate(Gfn::new(b)?, Level::Size4K, true);
                let done = memory.prefault(vm, Vcpu::Machine(&vcpu), gfns(b, c)?);
                error(done.map(|_| ()))
            }
            30 => build(a, b, c, d).and_then(|built| error(built.map(|_| ()))),
            31 => face(self.fresh, [a, b, c, d]),
            _ => {
                let vcpu = match self.vms.first().map(|&vm| memory.machine_vcpu(vm)) {
                    Some(Ok(vcpu)) => vcpu,
                    _ => return None,
                };
                // A vCPU of one VM, for another.
                error(memory.prefault(vm, &vcpu, gfns(b, c)?).map(|_| ()))
            }
        }
    }
}

/// Memory of any size, on any host.
fn build(a: u64, b: u64, c: u64, d: u64) -> Option<Result<Memory, polder::Error>> {
    let builder = Memory::builder(PageCount::new(a)?);
    let hosts = [HostKind::Memfd, HostKind::GuestMemfd, HostKind::Machine];
    let host = hosts[index(b)];
    // The machine makes a frame for each page.
    if host == HostKind::Machine && (1 << 16..1 << 44).contains(&a) {
        return None;
    }
    let platforms = [Platform::Plain, Platform::SwProtected, Platform::Snp];
    let builder = builder.host(host).platform(platforms[index(c)]);
    let builder = if d.is_multiple_of(2) { builder } else { builder.shared() };
    let builder = if d.is_multiple_of(3) { builder.owed() } else { builder };
    Some(builder.build())
}

/// The kernel's interface, from the beginning to the end.
fn face(fresh: &dyn Fn() -> Vm, [a, b, c, d]: [u64; 4]) -> Option<String> {
    let new = fresh();
    let host = if matches!(new, Vm::Machine) { HostKind::Machine } else { HostKind::Memfd };
    let vm = kvm::Vm::new(new, host, Platform::Plain);
    let told = |failed: kvm::Failed| format!("{failed} {failed:?}");
    // The machine makes a frame for each page that is mapped.
    let size = if a.is_multiple_of(4) && a > 1 << 50 { a } else { (a % 64) * 4096 + a % 2 };
    let args = kvm_create_guest_memfd { size, flags: b % 5, ..Default::default() };
    let memfd = match vm.create_guest_memfd(args) {
        Ok(memfd) => memfd,
        Err(failed) => return Some(told(failed)),
    };
    let region = kvm::kvm_userspace_memory_region2 {
        slot: u32::try_from(c % 3).expect("below 3"),
        flags: if d.is_multiple_of(5) { u32::MAX } else { kvm::KVM_MEM_GUEST_MEMFD },
        guest_phys_addr: c.wrapping_mul(4096),
        memory_size: size.min(d.wrapping_mul(4096)),
        guest_memfd_offset: b.wrapping_mul(4096) % 0x4000,
        guest_memfd: if d.is_multiple_of(7) { 9 } else { memfd.fd() },
        ..Default::default()
    };
    let mut told_all = String::new();
    let mut tell = |result: Result<(), kvm::Failed>| {
        told_all.extend(result.err().map(told));
    };
    tell(vm.set_user_memory_region2(region));
    let mut attributes = kvm_memory_attributes2 {
        offset: b.wrapping_mul(4096),
        size: c.wrapping_mul(4096),
        attributes: if d.is_multiple_of(9) { d } else { 8 * (d % 2) },
        flags: a % 4,
        ..Default::default()
    };
    tell(memfd.set_memory_attributes2(&mut attributes));
    let signed = |word: u64| word.wrapping_mul(4096).cast_signed();
    tell(memfd.fallocate(u32::try_from(a % 5).expect("below 5"), signed(b), signed(c)));
    tell(memfd.mmap().map(|view| drop(view.touch_read(b, &mut [0; 8]))));
    tell(vm.exit(c.wrapping_mul(4096), d.is_multiple_of(2)).map(|_| ()));
    if let Ok(vcpu) = memfd.memory().machine_vcpu(memfd.vm()) {
        let (gpa, size) = (c.wrapping_mul(4096), d.wrapping_mul(4096));
        let mut range = kvm_pre_fault_memory { gpa, size, ..Default::default() };
        tell(vm.pre_fault_memory(&vcpu, &mut range));
    }
    if b.is_multiple_of(2) {
        drop(memfd);
    }
    let gone = kvm::kvm_userspace_memory_region2 { memory_size: 0, ..region };
    tell(vm.set_user_memory_region2(gone));
    Some(told_all)
}

/// What the process has: descriptors, mappings of memory, threads.
fn possessions() -> BTreeMap<&'static str, usize> {
    let count = |folder: &str| std::fs::read_dir(folder).expect("procfs").count();
    let maps = std::fs::read_to_string("/proc/self/maps").expect("procfs");
    let of = |what: &str| maps.lines().filter(|line| line.contains(what)).count();
    BTreeMap::from([
        ("descriptors", count("/proc/self/fd")),
        ("threads", count("/proc/self/task")),
        ("mappings", of("memfd:polder") + of("kvm-gmem")),
    ])
}

/// Memory of a host, with two VMs that know it, one of them bound to a part.
fn memory(host: HostKind, owed: bool, fresh: &dyn Fn() -> Vm) -> Option<(Memory, Vec<VmId>)> {
    let builder = Memory::builder(PageCount::new(PAGES).expect("a count")).host(host);
    let builder = if owed { builder.owed() } else { builder };
    let memory = require(Facility::Userfault, builder.build())?;
    let vms = [(); 2].map(|()| memory.attach(fresh()).expect("a VM of its kind"));
    memory.bind(vms[0], Slot(0), Gfn::from(0), PageRange::between(0, 64)?).expect("free");
    Some((memory, vms.to_vec()))
}

/// When dropped, says that a thread is at its end, also by a panic.
struct CountOut<'a>(&'a AtomicUsize);

impl Drop for CountOut<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Release);
    }
}

/// Runs the calls of each thread.
fn run(host: HostKind, owed: bool, threads: &[Vec<Call>], fresh: &(dyn Fn() -> Vm + Sync)) {
    let Some((memory, vms)) = memory(host, owed, fresh) else { return };
    let running = AtomicUsize::new(threads.len());
    let told = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        for calls in threads {
            let (memory, vms, running, told) = (&memory, &vms, &running, &told);
            scope.spawn(move || {
                let _counted = CountOut(running);
                let mut hand = Hand { memory, vms, fresh, pins: Vec::new() };
                for &call in calls {
                    let text = hand.call(call);
                    told.fetch_add(text.map_or(0, |text| text.len()), Ordering::Relaxed);
                }
            });
        }
        // Who touches what is owed waits for it: here it comes, and comes again.
        while running.load(Ordering::Acquire) > 0 {
            std::thread::sleep(Duration::from_millis(2));
            let _ = memory.settle();
        }
    });
    // No pin and no claim is left.
    let all = PageRange::between(0, PAGES).expect("pages");
    let quarantined = memory.quarantined();
    assert_eq!(quarantined, [], "nothing fails here that could not be undone");
    let shared = memory.convert(all, Visibility::Shared, Contents::Unspecified, OnBusy::Refuse);
    assert!(shared.is_ok(), "{shared:?}");
    let private = memory.convert(all, Visibility::Private, Contents::Unspecified, OnBusy::Refuse);
    assert!(private.is_ok(), "{private:?}");
    memory.discard(all, OnBusy::Refuse).expect("nobody holds it");
}

#[test]
fn any_calls_in_any_order_by_several_threads_end_in_typed_errors_and_leave_nothing_behind() {
    let kvm = kvm_ioctls::Kvm::new();
    let kvm = require(Facility::Kvm, kvm);
    let of_kvm = || Vm::Kvm(Arc::new(kvm.as_ref().expect("asked").create_vm().expect("a VM")));
    let of_machine = || Vm::Machine;
    let mut hosts: Vec<(HostKind, &(dyn Fn() -> Vm + Sync))> =
        vec![(HostKind::Machine, &of_machine)];
    if kvm.is_some() {
        hosts.push((HostKind::Memfd, &of_kvm));
    }
    // What is made once and kept: the handler of SIGBUS, thread locals.
    for (host, fresh) in &hosts {
        run(*host, true, &[vec![(22, [0, 8, 0, 0])]], *fresh);
    }
    let cases = std::env::var("PROPTEST_CASES").ok().and_then(|cases| cases.parse().ok());
    for (host, fresh) in hosts {
        let config = Config { cases: cases.unwrap_or(40), ..Config::default() };
        let calls = prop::collection::vec(prop::collection::vec(call(), 0..60), 1..4);
        let before = possessions();
        TestRunner::new(config)
            .run(&(any::<bool>(), calls), |(owed, threads)| {
                run(host, owed, &threads, fresh);
                Ok(())
            })
            .unwrap_or_else(|error| panic!("host {host}: {error}"));
        // A thread that has ended is listed a moment longer.
        for _ in 0..200 {
            if possessions() == before {
                break;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        assert_eq!(possessions(), before, "host {host}");
    }
}
