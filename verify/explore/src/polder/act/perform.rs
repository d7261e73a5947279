//! Acts done: by the machine's kernel, its hardware, its firmware or its hypervisor.

use polder_machine::{
    Ask, Component, Error, Hva, LockOwner, Machine, ObjectId, PinKind, PkvmFail, RmpResult,
    RmpSize, Thread, VmId, Vpn, VpnRange,
};
use polder_units::{Gfn, GfnRange, Level, PAGE_SIZE, PageIndex, PageRange, Pfn, PfnRange};

use super::{Act, Done};
use crate::polder::kept::Parts;

/// Polder's driver.
const DRIVER: LockOwner = LockOwner(0);

/// The kernel, and CPUs, that Polder knows nothing of.
const OTHERS: LockOwner = LockOwner(1);

impl Act {
    /// Does it.
    pub(in crate::polder) fn perform(self, machine: &mut Machine, parts: &Parts) -> Done {
        let (object, process, vm) = (parts.object, parts.process, parts.vm);
        let plain = |done: Result<(), Error>| Done::of(done, |()| Done::Well, Done::Refused);
        let rmp = |done: RmpResult| Done::of(done, |()| Done::Well, Done::Rmp);
        let hva = |vpn: Vpn| Hva::new(vpn.get() * PAGE_SIZE);
        match self {
            Self::HostRead(thread, vpn) => {
                let mut word = [0; 8];
                let read = machine.host_read(thread, hva(vpn), &mut word);
                Done::of(read, |()| Done::Read(u64::from_le_bytes(word)), Done::HostExit)
            }
            Self::HostWrite(thread, vpn, token) => {
                let written = machine.host_write(thread, hva(vpn), &[token; 8]);
                Done::of(written, |()| Done::Well, Done::HostExit)
            }
            Self::OtherWrite(vpn, token) => {
                let process = parts.other.expect("a setup with another process");
                let thread = Thread { process, index: 0 };
                let written = machine.host_write(thread, hva(vpn), &[token; 8]);
                Done::of(written, |()| Done::Well, Done::HostExit)
            }
            Self::CopiedWrite(page, token) => {
                let copied = parts.copied.expect("a setup whose pages are copied");
                let bytes = &[token; 8];
                plain(
                    machine
                        .write_fault(copied, page)
                        .and_then(|()| machine.object_write(copied, page.offset(), bytes)),
                )
            }
            Self::Unshare(page) => plain(machine.write_fault(object, page)),
            Self::GuestRead(vcpu, gfn, side) => {
                let mut vcpu = machine.vcpu(vcpu).expect("it was added");
                Done::of(vcpu.read_u64(gfn.gpa(), side), Done::Read, Done::GuestExit)
            }
            Self::GuestWrite(vcpu, gfn, side, token) => {
                let mut vcpu = machine.vcpu(vcpu).expect("it was added");
                let word = u64::from_le_bytes([token; 8]);
                let written = vcpu.write_u64(gfn.gpa(), side, word);
                Done::of(written, |()| Done::Well, Done::GuestExit)
            }
            Self::Pvalidate(vcpu, gfn, size) => {
                let mut vcpu = machine.vcpu(vcpu).expect("it was added");
                match vcpu.pvalidate(gfn, size, true) {
                    Ok(result) => rmp(result.map(|_| ())),
                    Err(exit) => Done::GuestExit(exit),
                }
            }
            Self::Allocate(pages) => {
                plain(pages.frames().try_for_each(|page| match machine.backing(object, page)? {
                    Some(_) => Ok(()),
                    None => machine.allocate(object, page, Level::Size4K).map(|_| ()),
                }))
            }
            Self::Fill { pages, offset, len, token } => {
                let bytes = &[token; 8][..usize::from(len)];
                plain(pages.frames().try_for_each(|page| {
                    let at = page.get() * PAGE_SIZE + u64::from(offset);
                    machine.object_write(object, at, bytes)
                }))
            }
            Self::TakeOffDirectMap(pages) => {
                plain(pages.frames().try_for_each(|page| match machine.backing(object, page)? {
                    Some(backing) => machine.direct_map_remove(PfnRange::one(backing.pfn)),
                    None => Ok(()),
                }))
            }
            Self::MapHost(pages) => {
                plain(machine.host_map_range(process, parts.vpns(pages)).map(|_| ()))
            }
            Self::Poison(pages) => plain(machine.host_poison(process, parts.vpns(pages))),
            Self::UnmapHost(pages) => plain(
                machine
                    .host_unmap(process, parts.vpns(pages))
                    .and_then(|_| machine.zap_object(object, pages))
                    .map(|_| ()),
            ),
            Self::FlushHost(pages) => plain(machine.flush_object(object, pages)),
            Self::ZapGuest(pages) => {
                // Where the hypervisor keeps stage 2 there is nothing to take out.
                let ours = machine.page_state(Component::Host, Pfn::from(0)).is_err();
                let shown = machine.gfns_of(object, pages).filter(|_| ours);
                let gfns: Vec<_> = shown.collect();
                let mut zap = |(vm, gfns)| machine.tdp_zap(vm, gfns).map(|_| ());
                plain(gfns.into_iter().try_for_each(&mut zap))
            }
            Self::UnmapProcesses(pages) => plain(machine.zap_object(object, pages).map(|_| ())),
            Self::ZapGfns(gfns) => plain(machine.tdp_zap(vm, gfns).map(|_| ())),
            Self::BeginZap(gfns) => plain(
                machine
                    .invalidate_begin(vm, gfns)
                    .and_then(|()| machine.tdp_unmap(vm, gfns))
                    .and_then(|_| machine.flush_vm(vm, gfns)),
            ),
            Self::EndZap => plain(machine.invalidate_end(vm)),
            Self::Rmpupdate(pfn, update) => rmp(machine.rmpupdate(pfn, update)),
            Self::Psmash(pfn) => rmp(machine.psmash(pfn)),
            Self::Unsmash(pfn) => {
                let merged = machine.page_unsmash(pfn);
                let given = merged.and_then(|()| machine.page_reclaim(pfn, RmpSize::Size2M));
                Done::of(given, |()| Done::Well, Done::Firmware)
            }
            Self::Reclaim(pfn, size) => {
                Done::of(machine.page_reclaim(pfn, size), |()| Done::Well, Done::Firmware)
            }
            Self::Hold(pfn, size) => rmp(machine.rmp_hold(pfn, size, OTHERS)),
            Self::LetGo(pfn) => rmp(machine.rmp_release(pfn, OTHERS)),
            Self::Lock(pfn) => plain(machine.lock_folio(pfn, OTHERS)),
            Self::Unlock(pfn) => plain(machine.unlock_folio(pfn, OTHERS)),
            Self::Split(page) => plain(machine.split_folio(object, page, OTHERS).map(|_| ())),
            Self::Collapse(page) => {
                plain(machine.merge_folios(object, page, Level::Size2M, OTHERS))
            }
            Self::PrepareSplit(folio) => {
                let level = level_of(machine, folio);
                plain(machine.prepare_split(object, folio.start(), level))
            }
            Self::SplitFolio(folio) => plain(split(machine, object, folio)),
            Self::MergeFolio(folio) => {
                let (page, level) = (folio.start(), level_of(machine, folio));
                match machine.merge_folios_keeping_tables(object, page, level, DRIVER) {
                    Err(Error::Exists { .. }) => Done::Well,
                    merged => plain(merged),
                }
            }
            Self::ReleaseTables(folio) => {
                let level = level_of(machine, folio);
                machine.release_tables(object, folio.start(), level);
                Done::Well
            }
            Self::Punch(pages) => plain(punch(machine, object, pages)),
            Self::MapGuest(resolved, level, current) => {
                let resolved = if current { resolved.renewed(machine) } else { resolved };
                Done::of(machine.tdp_map(&resolved, level, true), Done::Mapped, Done::Refused)
            }
            Self::Gup(gup) => Done::of(gup.step(machine), Done::Gup, Done::Refused),
            Self::Pin(vpn) => {
                let page = VpnRange::one(vpn);
                let pinned = machine.pin_user_pages(process, page, true, PinKind::LongTerm);
                Done::of(pinned, Done::Pinned, Done::HostExit)
            }
            Self::Unpin(pin) => plain(machine.unpin(pin)),
            Self::PinExclusive(vpn) => {
                let page = VpnRange::one(vpn);
                let pinned = machine.pin_user_pages(process, page, true, PinKind::Exclusive);
                Done::of(pinned, Done::Pinned, Done::HostExit)
            }
            Self::Donate(page, gfn) => plain(donate(machine, parts, page, gfn)),
            Self::Ask(gfn, share) => {
                let mut vcpu = machine.vcpu(parts.vcpu(0)).expect("it was added");
                let asked = if share { vcpu.mem_share(gfn) } else { vcpu.mem_unshare(gfn) };
                match asked {
                    Ok(asked) => plain(asked.map_err(Error::from)),
                    Err(exit) => Done::GuestExit(exit),
                }
            }
            Self::Answer(gfns, share) => plain(answer(machine, vm, gfns, share)),
            Self::Resume(gfns) => plain(gfns.frames().try_for_each(|gfn| {
                machine.resume_guest(vm, gfn)?;
                Ok(())
            })),
            Self::HypervisorFails(nth) => {
                machine.fail_hypervisor(Some(nth.into()));
                Done::Well
            }
            Self::Migrate(pages) => plain(migrate(machine, object, pages)),
            Self::MapDevice(pages) => {
                let (domain, process) = parts.device.expect("a setup with a device");
                plain(pages.frames().try_for_each(|page| {
                    let one = PageRange::one(page);
                    let kind = PinKind::LongTerm;
                    let pin = machine.pin_object_pages(process, object, one, kind)?;
                    let mapped = machine.iommu_map(domain, at_device(page), pin);
                    if mapped.is_err() {
                        machine.unpin(pin)?;
                    }
                    mapped
                }))
            }
            Self::UnmapDevice(pages) => {
                let (domain, _) = parts.device.expect("a setup with a device");
                plain(pages.frames().try_for_each(|page| {
                    machine.iommu_unmap(domain, GfnRange::one(at_device(page))).map(|_| ())
                }))
            }
            Self::ReleaseDevice(pages, flushes) => {
                let (domain, process) = parts.device.expect("a setup with a device");
                plain(pages.frames().try_for_each(|page| {
                    if flushes {
                        machine.flush_iotlb(domain, GfnRange::one(at_device(page)))?;
                    }
                    let Some(backing) = machine.backing(object, page)? else { return Ok(()) };
                    let mut holders = machine.holders_of(PfnRange::one(backing.pfn));
                    let pin = holders.find(|it| it.process == process).map(|it| it.pin);
                    drop(holders);
                    pin.map_or(Ok(()), |pin| machine.unpin(pin))
                }))
            }
            Self::DeviceWrite(gfn, token) => {
                let (domain, _) = parts.device.expect("a setup with a device");
                plain(machine.device_write(domain, gfn.gpa(), &[token; 8]))
            }
            Self::Bind(gfn, pages) => plain(machine.bind(vm, gfn, object, pages)),
            Self::Unbind(gfn, zaps) => plain(machine.unbind(vm, gfn).and_then(|gfns| {
                if zaps { machine.tdp_zap(vm, gfns).map(|_| ()) } else { Ok(()) }
            })),
        }
    }
}

/// Where the device has a page.
fn at_device(page: PageIndex) -> Gfn {
    Gfn::new(page.get()).expect("a small number")
}

/// `MachineHost::donate`, after its look at the references.
fn donate(machine: &mut Machine, parts: &Parts, page: PageIndex, gfn: Gfn) -> Result<(), Error> {
    if machine.spte(parts.vm, gfn)?.is_some() {
        return Ok(());
    }
    machine.zap_object(parts.object, PageRange::one(page))?;
    machine.flush_object(parts.object, PageRange::one(page))?;
    let Some(backing) = machine.backing(parts.object, page)? else { return Ok(()) };
    Ok(machine.host_donate_guest(parts.vm, gfn, backing.pfn)?)
}

/// `MachineHost::answer_guest`.
fn answer(machine: &mut Machine, vm: VmId, gfns: GfnRange, share: bool) -> Result<(), Error> {
    for gfn in gfns.frames() {
        match (machine.asked_by_guest(vm, gfn), share) {
            (Some((Ask::Share, false)), true) | (Some((Ask::Unshare, false)), false) => {
                machine.answer_guest(vm, gfn)?;
            }
            (Some((Ask::Share, true)), false) | (Some((Ask::Unshare, true)), true) => {
                machine.take_back_answer(vm, gfn)?;
            }
            (Some((Ask::Share | Ask::Unshare, _)), _) => {}
            _ => return Err(PkvmFail::NotAsked.into()),
        }
    }
    Ok(())
}

/// `MachineHost::move_folios`.
fn migrate(machine: &mut Machine, object: ObjectId, pages: PageRange) -> Result<(), Error> {
    let folios: Vec<_> = machine.folios(object, pages)?.collect();
    for (page, backing) in folios {
        machine.lock_folio(backing.pfn, OTHERS)?;
        let moved = machine.migrate_folio(object, page, OTHERS);
        machine.unlock_folio(moved.unwrap_or(backing.pfn), OTHERS)?;
        moved?;
    }
    Ok(())
}

fn level_of(machine: &Machine, folio: PageRange) -> Level {
    let is = |level: &Level| machine.geometry().pages(*level) == folio.count();
    Level::ALL.into_iter().find(is).expect("a folio's pages")
}

/// Splits a folio to those of the next level, unless it is split.
fn split(machine: &mut Machine, object: ObjectId, folio: PageRange) -> Result<(), Error> {
    let page = folio.start();
    let backing =
        |machine: &Machine| machine.backing(object, page)?.ok_or(Error::Hole { object, page });
    let there = backing(machine)?;
    if there.level < level_of(machine, folio) {
        return Ok(());
    }
    machine.lock_folio(there.pfn, DRIVER)?;
    let split = machine.split_folio(object, page, DRIVER);
    let now = backing(machine)?;
    machine.unlock_folio(now.pfn, DRIVER)?;
    split.map(|_| ())
}

/// Frees the folios of a range; a part of one, which can't be freed, is made zeros.
fn punch(machine: &mut Machine, object: ObjectId, pages: PageRange) -> Result<(), Error> {
    let geometry = machine.geometry();
    // Whoever has the frames next has them zeroed that way.
    for page in pages.frames() {
        if let Some(backing) = machine.backing(object, page)? {
            machine.direct_map_restore(PfnRange::one(backing.pfn));
        }
    }
    let folios: Vec<_> = machine
        .folios(object, pages)?
        .map(|(page, backing)| PageRange::enclosing(page, backing.level, geometry))
        .collect();
    folios.into_iter().filter_map(|folio| folio.intersection(pages)).try_for_each(|part| {
        match machine.punch(object, part, None) {
            Err(Error::Part { .. }) => machine.zero(object, part),
            punched => punched.map(|_| ()),
        }
    })
}
