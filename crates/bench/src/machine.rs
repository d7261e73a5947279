//! `polder bench machine`: the simulated machine next to the memory that it simulates, and next to
//! the speed that a search over interleavings needs of it.
//!
//! Its figures are of a simulation: they say how fast one can search and test, not how fast any
//! hardware is.

use std::hint::black_box;
use std::time::Duration;

use polder_machine::{
    Asid, Config, Error, Exit, Machine, RmpFail, RmpSize, RmpUpdate, Side, VcpuId,
};
use polder_units::{Gfn, Gpa, Level, PAGE_SIZE, PageCount, PageIndex, PageRange};

use crate::turns::compare;
use crate::{Bench, Costs, Progress, Row};

pub(crate) const BENCH: Bench = Bench {
    name: "machine",
    about: "the simulated machine's accesses, walks and creation",
    run: |progress| {
        Ok(run(Duration::from_millis(20), progress).expect("a machine of sensible size"))
    },
};

/// Words read between two looks at the count.
const BATCH: u64 = 1024;

/// What every access of a case is compared with.
const PLAIN: &str = "plain memory";
/// What an SNP guest's accesses are compared with.
const NO_SNP: &str = "no snp";
/// A speed that was set as a goal.
const GOAL: &str = "goal";

fn run(turn: Duration, progress: &mut dyn FnMut(Progress)) -> Result<Vec<Row>, Error> {
    // Pages, at which level, whether each has bytes of its own, and the goal in ns an access.
    let accesses: [(&str, u32, Level, bool, f64); 4] = [
        ("tlb hit", 512, Level::Size4K, true, 1e9 / 20e6),
        ("tdp walk 4k of 1g", 1 << 18, Level::Size4K, false, 1e9 / 2e6),
        ("tdp walk 4k 256m in use", 1 << 16, Level::Size4K, true, 1e9 / 2e6),
        ("tdp walk 2m of 1g", 1 << 18, Level::Size2M, false, 1e9 / 2e6),
    ];
    // The accesses that the RMP is asked about, or not: pages, and the side. A hit asks nobody;
    // what a private hit costs more is its decryption.
    let checked: [(&str, u32, Side); 3] = [
        ("snp: tlb hit, shared", 512, Side::Shared),
        ("snp: tlb hit, private", 512, Side::Private),
        ("snp: tdp walk, private", 1 << 16, Side::Private),
    ];
    let of = accesses.len() + checked.len() + 1;
    let mut rows = Vec::new();
    for (done, (case, pages, level, written, goal)) in accesses.into_iter().enumerate() {
        progress(Progress { done, of, doing: case.to_owned() });
        let costs = read(turn, pages, level, written)?;
        rows.push(Row::of_costs(case.to_owned(), PLAIN, "ns", costs));
        rows.push(against_goal(case, "ns", goal, costs.polder));
    }
    for (done, (case, pages, side)) in (accesses.len()..).zip(checked) {
        progress(Progress { done, of, doing: case.to_owned() });
        let mut row = Row::of_costs(case.to_owned(), NO_SNP, "ns", read_snp(turn, pages, side)?);
        row.note = "simulated".to_owned();
        rows.push(row);
    }
    progress(Progress { done: of - 1, of, doing: "create 1t".to_owned() });
    let create = || black_box(Machine::new(Config::x86_64(PageCount::from(1 << 28))));
    create()?;
    let mut create = |count| (0..count).for_each(|_| drop(create()));
    let cost = compare(turn, &mut |_| (), &mut create).polder;
    rows.push(against_goal("create 1t", "ns", 50e6, cost));
    Ok(rows)
}

fn against_goal(case: &str, unit: &'static str, goal: f64, polder: f64) -> Row {
    let mut row = Row::of_costs(case.to_owned(), GOAL, unit, Costs { baseline: goal, polder });
    row.note = "simulated".to_owned();
    row
}

/// Reads of words at random places, by a vCPU and from an array of the same size.
fn read(turn: Duration, pages: u32, level: Level, written: bool) -> Result<Costs, Error> {
    let (mut machine, vcpu) = guest(pages, level, written)?;
    let bytes = u64::from(pages) * PAGE_SIZE;
    // An array of 1G would measure the host's memory, which the simulation does not touch unless
    // its pages were written.
    let most = if written { usize::MAX } else { 1 << 22 };
    let words = usize::try_from(bytes / 8).unwrap_or(usize::MAX).min(most);
    let plain: Vec<u64> = (0..).take(words).collect();
    let (mut a, mut b) = (Scattered(1), Scattered(1));
    let mut memory = |count| {
        for _ in 0..u64::from(count) * BATCH {
            let at = usize::try_from(a.next(bytes) / 8).unwrap_or(0) % words;
            black_box(plain[black_box(at)]);
        }
    };
    let mut simulated = |count| {
        let Ok(mut vcpu) = machine.vcpu(vcpu) else { return };
        for _ in 0..u64::from(count) * BATCH {
            let gpa = Gpa::new(b.next(bytes) & !7);
            let word = vcpu.read_u64(black_box(gpa), Side::Shared);
            assert!(black_box(word).is_ok(), "all of it is mapped");
        }
    };
    let Costs { baseline, polder } = compare(turn, &mut memory, &mut simulated);
    let each = |nanoseconds: f64| nanoseconds / 1024.0;
    Ok(Costs { baseline: each(baseline), polder: each(polder) })
}

/// Reads of words at random places, by a vCPU of a plain VM on a machine without SNP, and by one of
/// an SNP guest.
fn read_snp(turn: Duration, pages: u32, side: Side) -> Result<Costs, Error> {
    let (mut plain, plain_vcpu) = small_pages(pages, side, None)?;
    let (mut snp, snp_vcpu) = small_pages(pages, side, Asid::new(1))?;
    let bytes = u64::from(pages) * PAGE_SIZE;
    let reader = |machine: &mut Machine, vcpu, at: &mut Scattered, count: u32| {
        let Ok(mut vcpu) = machine.vcpu(vcpu) else { return };
        for _ in 0..u64::from(count) * BATCH {
            let word = vcpu.read_u64(black_box(Gpa::new(at.next(bytes) & !7)), side);
            assert!(black_box(word).is_ok(), "all of it is mapped");
        }
    };
    let (mut a, mut b) = (Scattered(1), Scattered(1));
    let mut without = |count| reader(&mut plain, plain_vcpu, &mut a, count);
    let mut with = |count| reader(&mut snp, snp_vcpu, &mut b, count);
    let Costs { baseline, polder } = compare(turn, &mut without, &mut with);
    let each = |nanoseconds: f64| nanoseconds / 1024.0;
    Ok(Costs { baseline: each(baseline), polder: each(polder) })
}

/// A machine whose guest, of SNP if it has an ASID, maps `pages` 4K pages and has written each once
/// as `side`.
fn small_pages(pages: u32, side: Side, asid: Option<Asid>) -> Result<(Machine, VcpuId), Error> {
    let undefined = |_: RmpFail| Error::NoSnp;
    let refused = |_: Exit| Error::NoSnp;
    let mut machine = Machine::new(Config::x86_64(PageCount::from(2 * pages)))?;
    let object = machine.create_object(pages.into())?;
    let vm = match asid {
        None => machine.create_vm()?,
        Some(asid) => {
            machine.enable_snp();
            machine.create_snp_vm(asid)?
        }
    };
    let vcpu = machine.add_vcpu(vm)?;
    let all = PageRange::between(0, pages.into()).ok_or(Error::Config)?;
    machine.bind(vm, Gfn::from(0), object, all)?;
    for (gfn, page) in (0..pages).map(|at| (Gfn::from(at), PageIndex::from(at))) {
        let pfn = machine.allocate(object, page, Level::Size4K)?;
        let resolved = machine.tdp_resolve(vm, gfn)?;
        machine.tdp_map(&resolved, Level::Size4K, true)?;
        if let (Some(asid), Side::Private) = (asid, side) {
            let update = RmpUpdate::private(asid, gfn, RmpSize::Size4K);
            machine.rmpupdate(pfn, update).map_err(undefined)?;
            let validated = machine.vcpu(vcpu)?.pvalidate(gfn, RmpSize::Size4K, true);
            validated.map_err(refused)?.map_err(undefined)?;
        }
        machine.vcpu(vcpu)?.write_u64(gfn.gpa(), side, 1).map_err(refused)?;
    }
    Ok((machine, vcpu))
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
    let step = usize::try_from(machine.geometry().pages(level).get()).unwrap_or(usize::MAX);
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

/// A fixed sequence that looks random: xorshift.
struct Scattered(u64);

impl Scattered {
    fn next(&mut self, bound: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % bound
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_case_has_a_row_for_each_of_its_baselines() {
        let rows = run(Duration::from_micros(1), &mut |_| ()).expect("machines of sensible size");
        let of = |baseline| rows.iter().filter(|row| row.baseline == baseline).count();
        assert_eq!((of(PLAIN), of(NO_SNP), of(GOAL)), (4, 3, 5));
        assert!(rows.iter().all(|row| row.polder_value > 0.0 && row.ratio.is_finite()));
    }
}
