//! How fast the machine is: `cargo run --release -p polder-machine --example speed`.
//!
//! One line a case: what one operation took (the median of nine rounds) and how many a second.

use std::hash::{DefaultHasher, Hash, Hasher};
use std::hint::black_box;
use std::time::Duration;

use polder_machine::{Config, Error, Machine, Op, Side, VcpuId, View, VpnRange};
use polder_units::{Geometry, Gfn, Gpa, Level, PageCount, PageIndex, PageRange};

#[expect(clippy::disallowed_methods, reason = "it measures")]
fn timed(work: impl FnOnce()) -> Duration {
    let start = std::time::Instant::now();
    work();
    start.elapsed()
}

/// Times `work`, which does `count` operations, and prints the median of nine rounds.
fn case(name: &str, count: u64, mut work: impl FnMut()) {
    let mut rounds: Vec<_> = (0..9).map(|_| timed(&mut work)).collect();
    rounds.sort();
    let nanoseconds = rounds[rounds.len() / 2].as_secs_f64() * 1e9 / count as f64;
    println!("{name:36} {nanoseconds:12.1} ns {:14.0} /s", 1e9 / nanoseconds);
}

/// A machine whose guest maps `pages` pages from gfn 0 on at `level`, each page written once if
/// `written`.
fn guest(pages: u32, level: Level, written: bool) -> Result<(Machine, VcpuId), Error> {
    let mut machine = Machine::new(Config::x86_64(PageCount::from(2 * pages)))?;
    let object = machine.create_object(pages.into())?;
    let vm = machine.create_vm()?;
    let vcpu = machine.add_vcpu(vm)?;
    let all = PageRange::between(0, pages.into()).ok_or(Error::Config)?;
    machine.bind(vm, Gfn::from(0), object, all)?;
    let step = machine.geometry().pages(level).get();
    let step = usize::try_from(step).unwrap_or(usize::MAX);
    for gfn in (0..pages).step_by(step).map(Gfn::from) {
        let page = PageIndex::new(gfn.get()).ok_or(Error::Config)?;
        machine.allocate(object, page, level)?;
        let resolved = machine.tdp_resolve(vm, gfn)?;
        machine.tdp_map(&resolved, level, true)?;
    }
    for gfn in (0..if written { pages } else { 0 }).map(Gfn::from) {
        machine.object_write(object, gfn.gpa().get(), &[1])?;
    }
    Ok((machine, vcpu))
}

/// A fixed sequence that looks random.
fn scattered(state: &mut u64) -> u64 {
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    *state
}

fn reads(name: &str, pages: u32, level: Level, written: bool) -> Result<(), Error> {
    let (mut machine, vcpu) = guest(pages, level, written)?;
    let count = 1_000_000;
    let mut state = 88_172_645_463_325_252;
    case(name, count, || {
        let Ok(mut vcpu) = machine.vcpu(vcpu) else { return };
        for _ in 0..count {
            let at = scattered(&mut state);
            let gpa = Gpa::new(((at % u64::from(pages)) << 12) | ((at >> 40) & 0xff8));
            let _ = black_box(vcpu.read_u64(gpa, Side::Shared));
        }
    });
    Ok(())
}

fn copies() -> Result<(), Error> {
    let (mut machine, vcpu) = guest(256, Level::Size4K, true)?;
    let mut buffer = vec![0; 64 << 10];
    case("read 64K, TLB hits", 1000, || {
        let Ok(mut vcpu) = machine.vcpu(vcpu) else { return };
        for at in 0..1000 {
            let _ = vcpu.read(Gpa::new((at % 15) << 16), Side::Shared, black_box(&mut buffer));
        }
    });
    let program: std::sync::Arc<[Op]> = (0..100_000)
        .map(|at| Op::Write { gpa: Gpa::new((at % 256) << 12), side: Side::Shared, value: at })
        .collect();
    case("step of a guest's program (write)", 100_000, || {
        let _ = machine.load(vcpu, program.clone());
        let Ok(mut vcpu) = machine.vcpu(vcpu) else { return };
        while vcpu.step().is_ok() {}
    });
    Ok(())
}

fn states() -> Result<(), Error> {
    let geometry = Geometry::new(4, 2).ok_or(Error::Config)?;
    let mut machine = Machine::new(Config::symbolic(PageCount::from(16), geometry))?;
    let object = machine.create_object(PageCount::from(8))?;
    machine.allocate(object, PageIndex::from(0), Level::Size2M)?;
    let process = machine.create_process()?;
    let at = VpnRange::between(0, 8).ok_or(Error::Config)?;
    machine.mmap(process, at, object, PageIndex::from(0), View::HOST)?;
    machine.host_map(process, at.start(), Level::Size4K)?;
    let vm = machine.create_vm()?;
    machine.add_vcpu(vm)?;
    machine.add_vcpu(vm)?;
    machine.bind(vm, Gfn::from(0), object, PageRange::between(0, 8).ok_or(Error::Config)?)?;
    let resolved = machine.tdp_resolve(vm, Gfn::from(0))?;
    machine.tdp_map(&resolved, Level::Size2M, true)?;
    case("clone a machine of 16 frames", 10_000, || {
        for _ in 0..10_000 {
            black_box(machine.clone());
        }
    });
    case("hash a machine of 16 frames", 10_000, || {
        for _ in 0..10_000 {
            let mut hasher = DefaultHasher::new();
            machine.hash(&mut hasher);
            black_box(hasher.finish());
        }
    });
    Ok(())
}

fn main() -> Result<(), Error> {
    reads("read u64, TLB hits", 512, Level::Size4K, true)?;
    reads("read u64, TDP walks, 4K of 1G", 1 << 18, Level::Size4K, false)?;
    reads("read u64, TDP walks, 4K, 256M in use", 1 << 16, Level::Size4K, true)?;
    reads("read u64, TDP walks, 2M of 1G", 1 << 18, Level::Size2M, false)?;
    copies()?;
    states()?;
    let terabyte = PageCount::from(1 << 28);
    case("create a 1T machine", 1, || {
        let _ = black_box(Machine::new(Config::x86_64(terabyte)));
    });
    case("a 1T guest of 1G pages", 1, || {
        let _ = black_box(guest_of_1g_pages());
    });
    case("allocate, map, fault 4K (each)", 1 << 16, || {
        let _ = black_box(guest(1 << 16, Level::Size4K, false));
    });
    Ok(())
}

/// A terabyte of object, bound and mapped, in 1G pages.
fn guest_of_1g_pages() -> Result<Machine, Error> {
    Ok(guest(1 << 28, Level::Size1G, false)?.0)
}
