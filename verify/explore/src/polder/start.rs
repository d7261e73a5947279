//! The beginning of a configuration: its engine, its machine, and who is like whom.

use polder_explored_engine::{Backing, Config, Engine, Holder, PageFacts, Population, Visibility};
use polder_machine::{
    DomainId, Machine, ObjectId, PinKind, ProcessId, RmpSize, RmpUpdate, VcpuId, View as Vma, VmId,
    VpnRange,
};
use polder_units::{GfnRange, Level, PageCount, PageIndex};

use super::kept::{ASID, MOST_CPUS, Parts, one, range};
use super::setup::{Actor, Bug, Role, Setup};
use super::{MOST, SLOT, VM};

/// How many actors from each one on are of a kind and have the same tasks.
pub(super) fn alike(setup: &Setup) -> [u8; MOST] {
    let mut alike = [1; MOST];
    let kind = |actor: &Actor| std::mem::discriminant(&actor.role);
    for (at, one) in setup.actors.iter().enumerate() {
        let like = |other: &&Actor| kind(other) == kind(one) && other.tasks == one.tasks;
        let count = setup.actors[at..].iter().take_while(like).count();
        alike[at] = u8::try_from(count).unwrap_or(1);
    }
    alike
}

/// The level of a folio that is all of the memory.
pub(super) fn pooled_level(setup: &Setup) -> Level {
    let is_all = |level: &Level| setup.geometry.pages(*level).get() == setup.pages.into();
    Level::ALL.into_iter().find(is_all).expect("memory of the pool is one folio")
}

pub(super) fn engine(setup: &Setup) -> Engine {
    let population = if setup.owed { Population::Owed } else { Population::Whole };
    let mut engine = Engine::new(Config {
        pages: PageCount::from(u32::from(setup.pages)),
        geometry: setup.geometry,
        platform: setup.platform,
        in_place: true,
        host_view_level: Level::Size4K,
        backing: if setup.pooled { Backing::split(pooled_level(setup)) } else { Backing::ANY },
        initial: PageFacts { visibility: setup.initial, population },
    });
    if let Some(Bug::Engine(bug)) = setup.bug {
        engine.plant(bug);
    }
    let pages = range(setup.first_page, setup.first_page + setup.slot_pages);
    let bound = engine.bind(VM, SLOT, setup.gfn(setup.first_page), pages);
    bound.expect("a slot of the object");
    if setup.device {
        attach(&mut engine);
    }
    engine
}

/// Attaches the device: what it has mapped from the first on, the machine begins with.
fn attach(engine: &mut Engine) {
    let Ok((id, attaching)) = engine.attach(PageCount::ONE) else {
        unreachable!("nothing is at work, and nothing owed")
    };
    let mut step = engine.next_step(&attaching);
    while step.is_some() {
        step = engine.step_taken(&attaching);
    }
    let attached = engine.advance(attaching);
    engine.finish_attach((id, attached), Holder::new("device"), PageCount::ONE);
}

/// Creates the device, and maps for it what is shared at first.
fn device(
    setup: &Setup,
    machine: &mut Machine,
    object: ObjectId,
) -> Result<(DomainId, ProcessId), polder_machine::Error> {
    let process = machine.create_process()?;
    let domain = machine.create_domain()?;
    let shared = if setup.initial == Visibility::Shared { setup.pages } else { 0 };
    for page in 0..shared {
        let pin = machine.pin_object_pages(process, object, one(page), PinKind::LongTerm)?;
        machine.iommu_map(domain, u32::from(page).into(), pin)?;
    }
    Ok((domain, process))
}

/// The frames, at the most that a configuration can use.
fn frames(setup: &Setup) -> PageCount {
    let pages = PageCount::from(u32::from(setup.pages));
    let add = |frames: PageCount, more| frames.checked_add(more).expect("a small machine");
    let mut frames = add(pages, pages);
    if setup.copied {
        // A copy of each, and the page of zeros.
        frames = add(frames, add(pages, PageCount::ONE));
    }
    if setup.pooled {
        // Of tables, all that can be used and prepared.
        frames = add(frames, pages);
    }
    frames
}

pub(super) fn machine(setup: &Setup) -> Result<(Machine, Parts), polder_machine::Error> {
    let pages = PageCount::from(u32::from(setup.pages));
    let mut config = polder_machine::Config::symbolic(frames(setup), setup.geometry);
    // As large as the pages that can be in it, so that nothing stale is evicted.
    config.tlb_entries = u32::from(setup.pages + setup.first_gfn).next_power_of_two();
    config.accessed_dirty = setup.maps_ahead();
    let mut machine = Machine::new(config)?;
    let (object, copied) = match setup.copied {
        false => (machine.create_object(pages)?, None),
        true => copied_object(setup, &mut machine)?,
    };
    let process = machine.create_process()?;
    let vm = vm(setup, &mut machine)?;
    let (threads, vcpus) = cpus(setup, &mut machine, process, vm)?;
    let host_view = setup.geometry.pages(Level::Size1G).get();
    let at = VpnRange::between(host_view, host_view + pages.get()).expect("a small range");
    if copied.is_none() {
        machine.mmap(process, at, object, PageIndex::from(0), Vma::HOST)?;
    }
    let has_other = setup.actors.iter().any(|actor| actor.role == Role::Process);
    let other = has_other.then(|| machine.create_process()).transpose()?;
    if let Some(other) = other {
        machine.mmap(other, at, object, PageIndex::from(0), Vma::PLAIN)?;
    }
    let slot = range(setup.first_page, setup.first_page + setup.slot_pages);
    machine.bind(vm, setup.gfn(setup.first_page), object, slot)?;
    allocate(setup, &mut machine, object, vm)?;
    let device = setup.device.then(|| device(setup, &mut machine, object)).transpose()?;
    if let Some(Bug::Machine(plant)) = setup.bug {
        machine.plant(plant, true);
    }
    Ok((machine, Parts { object, process, other, copied, device, vm, threads, vcpus, host_view }))
}

fn vm(setup: &Setup, machine: &mut Machine) -> Result<VmId, polder_machine::Error> {
    if setup.is_snp() {
        machine.enable_snp();
        machine.create_snp_vm(ASID)
    } else if setup.is_pkvm() {
        machine.enable_pkvm();
        machine.create_pkvm_vm()
    } else {
        machine.create_vm()
    }
}

/// A thread or a vCPU for each actor that runs on one. How many of each there are.
fn cpus(
    setup: &Setup,
    machine: &mut Machine,
    process: ProcessId,
    vm: VmId,
) -> Result<(u16, u16), polder_machine::Error> {
    let (mut threads, mut vcpus) = (1, 0);
    for actor in &setup.actors {
        match actor.role {
            Role::Vcpu(_) => {
                machine.add_vcpu(vm)?;
                vcpus += 1;
            }
            Role::Thread(index) if index >= threads => {
                machine.add_thread(process)?;
                threads += 1;
            }
            _ => {}
        }
    }
    assert!(usize::from(threads.max(vcpus)) < MOST_CPUS, "a CPU without a hash");
    Ok((threads, vcpus))
}

/// The memory that is there from the first on, and whose it is.
fn allocate(
    setup: &Setup,
    machine: &mut Machine,
    object: ObjectId,
    vm: VmId,
) -> Result<(), polder_machine::Error> {
    if setup.pooled {
        let level = pooled_level(setup);
        machine.fill_pool(level, 1);
        machine.allocate_from_pool(object, PageIndex::from(0), level)?;
    } else if setup.huge {
        machine.allocate(object, PageIndex::from(0), Level::Size2M)?;
    }
    if setup.accepted {
        accept(setup, machine, vm)?;
    }
    for page in 0..setup.donated {
        let pfn = machine.allocate(object, u32::from(page).into(), Level::Size4K)?;
        machine.host_donate_guest(vm, setup.gfn(page), pfn)?;
    }
    Ok(())
}

/// The token in memory that others have, too.
const COPIED: u8 = 3;

/// What is in the pages at first.
pub(super) fn values(setup: &Setup) -> [u8; 8] {
    let mut values = [0; 8];
    if setup.copied {
        values[..usize::from(setup.pages) - 1].fill(COPIED);
    }
    values
}

/// Anonymous memory, all but the last page of which was written, and its copy.
fn copied_object(
    setup: &Setup,
    machine: &mut Machine,
) -> Result<(ObjectId, Option<ObjectId>), polder_machine::Error> {
    let object = machine.create_anonymous(PageCount::from(u32::from(setup.pages)))?;
    for page in range(0, setup.pages - 1).frames() {
        machine.write_fault(object, page)?;
        machine.object_write(object, page.offset(), &[COPIED; 8])?;
    }
    let copy = machine.fork_anonymous(object)?;
    Ok((object, Some(copy)))
}

/// Gives the pages of the one large folio to an SNP guest, which accepts them.
fn accept(setup: &Setup, machine: &mut Machine, vm: VmId) -> Result<(), polder_machine::Error> {
    let large = setup.geometry.pages(Level::Size2M);
    let gfn = setup.gfn(0);
    let resolved = machine.tdp_resolve(vm, gfn)?;
    let update = RmpUpdate::private(ASID, gfn, RmpSize::Size2M);
    assert!(setup.huge && machine.rmpupdate(resolved.pfn(), update).is_ok(), "nobody has it yet");
    machine.tdp_map(&resolved, Level::Size2M, true)?;
    let accepted = machine.vcpu(VcpuId { vm, index: 0 })?.pvalidate(gfn, RmpSize::Size2M, true);
    assert!(matches!(accepted, Ok(Ok(true))), "it is mapped and given: {accepted:?}");
    let gfns = GfnRange::new(gfn, large).expect("a small range");
    machine.tdp_zap(vm, gfns).map(|_| ())
}
