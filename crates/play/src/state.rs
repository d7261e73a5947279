//! What is so of pages, as Polder and the machine know it.

use std::fmt;
use std::sync::Arc;

use polder::machine::{HostPte, Machine, ObjectId, ProcessId, RmpEntry, VcpuId, VmId as MachineVm};
use polder::units::{Level, PageIndex, PageRange, Pfn};
use polder::{Memory, PageFacts, Population, Visibility, VmId};

use crate::scenario::{HostView, Look, Mapped};

/// A VM's names: at Polder, and on the machine.
pub(crate) type VmNames = (Option<VmId>, Option<MachineVm>);

/// What is so of one page.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct PageState {
    /// Private or shared.
    pub visibility: Visibility,
    /// Owed or whole.
    pub population: Population,
    /// Whether it is in quarantine.
    pub quarantined: bool,
    /// The VMs that wish it to be the other way, by their place in the scenario.
    pub unmet: Vec<usize>,
    /// The names of the VMs.
    pub vms: Arc<[String]>,
    /// What only the simulated machine shows.
    pub inside: Option<Inside>,
}

/// What the simulated machine has of a page.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Inside {
    /// What the host view has in its place.
    pub host_view: HostView,
    /// At which level each VM's stage 2 maps it, by the VM's place in the scenario.
    pub stage2: Vec<Mapped>,
    /// Whether that was used.
    pub accessed: Vec<bool>,
    /// Its folio.
    pub folio: Mapped,
    /// Its RMP entry, where there is an RMP.
    pub rmp: Option<RmpState>,
    /// References that page cache and mappings do not explain.
    pub foreign: u64,
}

/// An RMP entry.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct RmpState {
    /// Its size, if it is assigned.
    pub entry: Mapped,
    /// Whether its guest has validated it.
    pub validated: bool,
}

impl PageState {
    fn vm(&self, vm: usize) -> &str {
        self.vms.get(vm).map_or("", String::as_str)
    }
}

impl fmt::Display for PageState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.visibility)?;
        if self.population == Population::Owed {
            f.write_str(", owed")?;
        }
        if self.quarantined {
            f.write_str(", in quarantine")?;
        }
        for vm in &self.unmet {
            write!(f, ", {} wishes it {}", self.vm(*vm), self.visibility.other())?;
        }
        let Some(inside) = &self.inside else { return Ok(()) };
        match inside.folio {
            Mapped::No => f.write_str(", no memory")?,
            Mapped::At(Level::Size4K) => {}
            Mapped::At(level) => write!(f, ", {level} folio")?,
        }
        match inside.host_view {
            HostView::Absent => {}
            HostView::Mapped => f.write_str(", in the host view")?,
            HostView::Denied => f.write_str(", denied in the host view")?,
        }
        let many = inside.stage2.len() > 1;
        for (vm, mapped) in inside.stage2.iter().enumerate() {
            if let Mapped::At(level) = mapped {
                let who = if many { self.vm(vm) } else { "guest" };
                write!(f, ", {who} maps {level}")?;
            }
        }
        if let Some(RmpState { entry: Mapped::At(level), validated }) = inside.rmp {
            write!(f, ", rmp {level}{}", if validated { " validated" } else { "" })?;
        }
        match inside.foreign {
            0 => Ok(()),
            _ => f.write_str(", referred to"),
        }
    }
}

/// Looks at pages of the object, each by itself; those beyond it are left out.
pub(crate) fn states(
    memory: &Memory,
    (vms, names): (&[VmNames], &Arc<[String]>),
    range: PageRange,
) -> Vec<(u64, PageState)> {
    let all = PageRange::between(0, memory.pages().get());
    let Some(range) = all.and_then(|all| all.intersection(range)) else { return Vec::new() };
    let facts = memory.facts(range).unwrap_or_default();
    let quarantined = memory.quarantined();
    let wishes = memory.unmet();
    let mut states = Vec::new();
    for (run, PageFacts { visibility, population }) in facts {
        for page in run.frames() {
            let quarantined = quarantined.iter().any(|run| run.contains(page));
            let differs = |vm: &usize| {
                wishes.iter().any(|(id, _, wish)| {
                    vms.get(*vm).is_some_and(|(vm, _)| *vm == Some(*id))
                        && wish.pages.contains(page)
                })
            };
            let unmet = (0..vms.len()).filter(differs).collect();
            let state = PageState {
                visibility,
                population,
                quarantined,
                unmet,
                vms: Arc::clone(names),
                inside: None,
            };
            states.push((page.get(), state));
        }
    }
    // On another host there is nothing more to see.
    let _ = memory.simulated(|machine, object, process| {
        for (page, state) in &mut states {
            let Some(page) = PageIndex::new(*page) else { continue };
            state.inside = Some(inside(machine, (object, process), vms, page));
        }
    });
    states
}

fn inside(
    machine: &Machine,
    (object, process): (ObjectId, ProcessId),
    vms: &[VmNames],
    page: PageIndex,
) -> Inside {
    let one = PageRange::one(page);
    let view = machine.views_of(object, one).find(|(id, _)| *id == process);
    let pte = view.and_then(|(_, vpns)| machine.host_pte(process, vpns.start()).ok());
    let backing = machine.backing(object, page).ok().flatten();
    let shown: Vec<_> = machine.gfns_of(object, one).collect();
    // By the root of the VM's first vCPU, if it has any: pages have the same numbers in each space.
    let spte = |vm: MachineVm| {
        let (_, gfns) = shown.iter().find(|(id, _)| *id == vm)?;
        let gfn = gfns.start();
        let by_root = machine.mapped(VcpuId { vm, index: 0 }, gfn.get());
        by_root.or_else(|_| machine.spte(vm, gfn)).ok().flatten()
    };
    let sptes: Vec<_> = vms.iter().map(|(_, vm)| vm.and_then(spte)).collect();
    let stage2 = sptes.iter().map(|spte| spte.map_or(Mapped::No, |spte| Mapped::At(spte.level)));
    // What has no memory has no entry, where there are any.
    let no_entry = machine.rmp_entry(Pfn::from(0)).map(|_| RmpEntry::HYPERVISOR);
    let entry = backing.map_or(no_entry, |backing| machine.rmp_entry(backing.pfn));
    Inside {
        host_view: match pte {
            Some(HostPte::Mapped { .. }) => HostView::Mapped,
            Some(HostPte::Poison) => HostView::Denied,
            Some(HostPte::None) | None => HostView::Absent,
        },
        stage2: stage2.collect(),
        accessed: sptes.iter().map(|spte| spte.is_some_and(|spte| spte.accessed)).collect(),
        folio: backing.map_or(Mapped::No, |backing| Mapped::At(backing.level)),
        rmp: entry.map(|entry| RmpState {
            entry: if entry.assigned { Mapped::At(entry.size.level()) } else { Mapped::No },
            validated: entry.validated,
        }),
        foreign: backing
            .and_then(|backing| machine.counts(backing.pfn).ok())
            .map_or(0, |counts| counts.foreign()),
    }
}

impl Look {
    /// What is not so of a page.
    pub(crate) fn unmet(&self, state: &PageState) -> Option<String> {
        fn differs<T: PartialEq + fmt::Display>(
            what: &str,
            expected: Option<T>,
            found: Option<T>,
        ) -> Option<String> {
            let expected = expected.filter(|expected| found.as_ref() != Some(expected))?;
            let found = found.map_or("not to be seen here".to_owned(), |found| found.to_string());
            Some(format!("{what} is {found}, and \"{expected}\" was expected"))
        }
        let population = |population| match population {
            Population::Owed => "owed",
            Population::Whole => "whole",
        };
        let inside = state.inside.as_ref();
        let rmp = inside.and_then(|inside| inside.rmp);
        differs("it", self.visibility, Some(state.visibility))
            .or_else(|| {
                let (expected, found) =
                    (self.population.map(population), population(state.population));
                differs("its population", expected, Some(found))
            })
            .or_else(|| {
                let is_unmet = state.unmet.contains(&self.vm);
                let wanted = if is_unmet { state.visibility.other() } else { state.visibility };
                differs("the wish", self.wanted, Some(wanted))
            })
            .or_else(|| differs("the host view", self.host_view, inside.map(|it| it.host_view)))
            .or_else(|| {
                let found = inside.and_then(|inside| inside.stage2.get(self.vm).copied());
                differs("stage 2", self.stage2, found)
            })
            .or_else(|| {
                let found = inside.and_then(|inside| inside.accessed.get(self.vm).copied());
                differs("accessed", self.accessed, found)
            })
            .or_else(|| differs("the folio", self.folio, inside.map(|it| it.folio)))
            .or_else(|| differs("the RMP entry", self.rmp, rmp.map(|rmp| rmp.entry)))
            .or_else(|| differs("validated", self.validated, rmp.map(|rmp| rmp.validated)))
    }
}
