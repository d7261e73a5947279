//! The beginning of a configuration: its engine, its machine, and who is like whom.

use polder_explored_engine::{Backing, Config, Engine, PageFacts, Population};
use polder_machine::{Machine, RmpSize, RmpUpdate, VcpuId, View as Vma, VmId, VpnRange};
use polder_units::{GfnRange, Level, PageCount, PageIndex};

use super::kept::{ASID, MOST_CPUS, Parts, range};
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

pub(super) fn engine(setup: &Setup) -> Engine {
    let population = if setup.owed { Population::Owed } else { Population::Whole };
    let mut engine = Engine::new(Config {
        pages: PageCount::from(u32::from(setup.pages)),
        geometry: setup.geometry,
        platform: setup.platform,
        in_place: true,
        host_view_level: Level::Size4K,
        backing: Backing::ANY,
        initial: PageFacts { visibility: setup.initial, population },
    });
    if let Some(Bug::Engine(bug)) = setup.bug {
        engine.plant(bug);
    }
    let pages = range(setup.first_page, setup.first_page + setup.slot_pages);
    let bound = engine.bind(VM, SLOT, setup.gfn(setup.first_page), pages);
    bound.expect("a slot of the object");
    engine
}

pub(super) fn machine(setup: &Setup) -> Result<(Machine, Parts), polder_machine::Error> {
    let pages = PageCount::from(u32::from(setup.pages));
    let frames = pages.checked_add(pages).unwrap_or(pages);
    let mut config = polder_machine::Config::symbolic(frames, setup.geometry);
    // As large as the pages that can be in it, so that nothing stale is evicted.
    config.tlb_entries = u32::from(setup.pages + setup.first_gfn).next_power_of_two();
    let mut machine = Machine::new(config)?;
    let object = machine.create_object(pages)?;
    let process = machine.create_process()?;
    let (mut threads, mut vcpus) = (1, 0);
    let vm = if setup.is_snp() {
        machine.enable_snp();
        machine.create_snp_vm(ASID)?
    } else {
        machine.create_vm()?
    };
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
    let host_view = setup.geometry.pages(Level::Size1G).get();
    let at = VpnRange::between(host_view, host_view + pages.get()).expect("a small range");
    machine.mmap(process, at, object, PageIndex::from(0), Vma::HOST)?;
    let has_other = setup.actors.iter().any(|actor| actor.role == Role::Process);
    let other = has_other.then(|| machine.create_process()).transpose()?;
    if let Some(other) = other {
        machine.mmap(other, at, object, PageIndex::from(0), Vma::PLAIN)?;
    }
    let slot = range(setup.first_page, setup.first_page + setup.slot_pages);
    machine.bind(vm, setup.gfn(setup.first_page), object, slot)?;
    if setup.huge {
        machine.allocate(object, PageIndex::from(0), Level::Size2M)?;
    }
    if setup.accepted {
        accept(setup, &mut machine, vm)?;
    }
    if let Some(Bug::Machine(plant)) = setup.bug {
        machine.plant(plant, true);
    }
    Ok((machine, Parts { object, process, other, vm, threads, vcpus, host_view }))
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
