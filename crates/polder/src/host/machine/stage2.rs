//! Stage 2 of the machine's VMs, by whatever root: what is mapped for a fault, and ahead of one.
//!
//! A page is mapped as large as folio, binding, answer and RMP allow (INV-5). A private page that
//! its guest has not been given yet is given first (`rmp.rs`), also where it never was converted.

use polder_engine::{GuestAccess, Refusal, Visibility, VmId};
use polder_linux::Errno;
use polder_machine::{Bound, Machine, Resolved, RmpFail, Root, Touch, VcpuId};
use polder_units::{AddressSpace, Gfn, GfnRange, Level, PageIndex, PageRange};

use super::{MachineHost, refused};
use crate::host::{Faulted, Shown, Translated, failed};
use crate::prefault::Span;
use crate::{Error, Vcpu};

/// How often a page that is shown ahead is tried again because others are at work on it.
const SHOW_RETRIES: u32 = 1000;

/// How many entries of a guest's tables are looked at to find where frames show.
const ALIAS_ENTRIES: u64 = 1 << 24;

/// How an attempt to map a page in stage 2 went.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Tried {
    /// At this level.
    Mapped(Level),
    /// The frame shows something else by now.
    Moved,
    /// The guest's tables say that the page was never used: a mapping ahead would hide its first
    /// use from the guest. Its memory is there.
    NeverUsed,
    /// The page's RMP entry is in use, or its folio locked.
    Later,
}

/// For whom a page is mapped, at which page of the space that his root translates, and what for.
/// Without a vCPU it is the direct root.
#[derive(Clone, Copy)]
pub(super) struct At {
    pub(super) vcpu: Option<VcpuId>,
    pub(super) page: u64,
    pub(super) touch: Touch,
}

impl At {
    /// Where a fault was.
    pub(super) fn of(faulted: Option<Faulted>, gfn: Gfn) -> Self {
        match faulted {
            None => Self { vcpu: None, page: gfn.get(), touch: Touch::Read },
            Some((vcpu, fault)) => {
                let touch = if fault.write { Touch::Write } else { Touch::Read };
                Self { vcpu: Some(vcpu), page: fault.page, touch }
            }
        }
    }
}

impl MachineHost {
    /// Maps the largest page around a frame in stage 2 that lies in `within` as a whole, once.
    ///
    /// # Errors
    /// No memory; [`Refusal::Referenced`] by whom a private page can't be taken; [`Error::Rmp`].
    pub(super) fn map(
        &self,
        id: VmId,
        access: GuestAccess,
        at: At,
        within: PageRange,
    ) -> Result<Tried, Error> {
        let GuestAccess { gfn, visibility } = access;
        let vm = self.vm(id).ok_or(Error::NoSuchVm)?;
        // Where the slot has gone or moved since the answer was given, the answer is not for what
        // the frame shows now: the guest faults again. The claim holds the pages, not the slot.
        let is_ours = |bound: Result<Bound, polder_machine::Error>| {
            bound.ok().map(|bound| bound.page).filter(|&page| within.contains(page))
        };
        let mut machine = self.lock();
        let Some(page) = is_ours(machine.bound(vm, gfn)) else { return Ok(Tried::Moved) };
        // No more memory is taken than the touch needs: the folio decides how much is mapped.
        self.allocate(&mut machine, PageRange::one(page))?;
        self.hide(&mut machine, within)?;
        drop(machine);
        if self.is_pkvm() {
            return self.donate(vm, gfn, page);
        }
        if self.is_snp() && visibility == Visibility::Private {
            match self.assign_for(page, within) {
                // Somebody else is at work on entry or folio.
                Err(Error::Rmp { fail: RmpFail::InUse, .. }) => return Ok(Tried::Later),
                Err(Error::Refused(Refusal::Referenced { references: 0, .. })) => {
                    return Ok(Tried::Later);
                }
                given => given?,
            }
        }
        let resolve = |machine: &Machine| match at.vcpu {
            None => machine.tdp_resolve(vm, gfn),
            Some(vcpu) => machine.resolve(vcpu, at.page, at.touch),
        };
        let map = |machine: &mut Machine, resolved: Result<Resolved, polder_machine::Error>| {
            let resolved = match resolved {
                // The guest has changed its tables; or the page was that of a table, which can be
                // read now.
                Ok(resolved) if resolved.gfn() != gfn => return Ok(Tried::Moved),
                Ok(resolved) => resolved,
                Err(polder_machine::Error::NotAccessed { .. }) => return Ok(Tried::NeverUsed),
                Err(_) => return Ok(Tried::Moved),
            };
            let Some(page) = is_ours(Ok(resolved.bound())) else { return Ok(Tried::Moved) };
            let level = self.level(machine, (&resolved, page), visibility, within);
            match machine.map(&resolved, level, true) {
                Ok(level) => Ok(Tried::Mapped(level)),
                Err(polder_machine::Error::Stale { .. }) => Ok(Tried::Later),
                Err(error) => Err(refused(error)),
            }
        };
        let resolved = resolve(&self.lock());
        let mut machine = self.lock();
        match map(&mut machine, resolved)? {
            // Whoever zaps other pages all the time keeps nobody from this one.
            Tried::Later => {
                let resolved = resolve(&machine);
                map(&mut machine, resolved)
            }
            tried => Ok(tried),
        }
    }

    /// The largest level at which what was resolved can be mapped (INV-5).
    fn level(
        &self,
        machine: &Machine,
        (resolved, page): (&Resolved, PageIndex),
        visibility: Visibility,
        within: PageRange,
    ) -> Level {
        let geometry = machine.geometry();
        let fits = |&level: &Level| {
            level <= resolved.largest()
                && within.contains_range(PageRange::enclosing(page, level, geometry))
                // A shared page has no entry to say a size.
                && (visibility == Visibility::Shared || self.rmp_allows(machine, resolved, level))
        };
        Level::ALL.into_iter().rfind(fits).unwrap_or(Level::Size4K)
    }

    /// Maps frames, all of one kind, ahead of their first touches. Returns the frame at which it
    /// stopped: after the last, or at one that could not be mapped though others before it were, or
    /// at one that the guest's tables show there no more; and how many were left out.
    ///
    /// # Errors
    /// Of the first frame: as [`map`](Self::map); `EAGAIN` where it shows something else by now, or
    /// others are at work on it for long; [`Error::Interrupted`] by a kick.
    pub(super) fn show_all(
        &self,
        (id, vcpu): (VmId, Vcpu<'_>),
        Shown { page: first, gfns, visibility }: Shown,
        within: PageRange,
    ) -> Result<(u64, u64), Error> {
        let geometry = self.lock().geometry();
        let mut next = gfns.start().get();
        let mut skipped = 0;
        while let Some(rest) = GfnRange::between(next, gfns.end()) {
            let gfn = rest.start();
            let access = GuestAccess { gfn, visibility };
            let page = first + (gfn.get() - gfns.start().get());
            match self.show_one((id, vcpu), access, page, within) {
                Ok(Tried::Mapped(level)) => next = GfnRange::enclosing(gfn, level, geometry).end(),
                Ok(Tried::NeverUsed) => (next, skipped) = (next + 1, skipped + 1),
                Ok(_) => return Ok((next, skipped)),
                Err(error) if gfn == gfns.start() => return Err(error),
                Err(_) => return Ok((next, skipped)),
            }
        }
        Ok((gfns.end(), skipped))
    }

    /// Maps the page around a frame, however often it takes within reason.
    fn show_one(
        &self,
        (id, vcpu): (VmId, Vcpu<'_>),
        access: GuestAccess,
        page: u64,
        within: PageRange,
    ) -> Result<Tried, Error> {
        let Vcpu::Machine(on) = vcpu else { return Err(Error::WrongVcpu) };
        let at = At { vcpu: Some(on.id()), page, touch: Touch::Prefault };
        for _ in 0..SHOW_RETRIES {
            if on.is_kicked() {
                return Err(Error::Interrupted);
            }
            match self.map(id, access, at, within)? {
                Tried::Later => crate::sync::yield_now(),
                // By another root the translation may have changed: it is looked at anew.
                Tried::Moved if on.root() == Root::Tdp => break,
                done => return Ok(done),
            }
        }
        Err(failed("a prefault of stage 2", Errno::AGAIN))
    }

    /// Where the first pages of a span are, by the tables of the vCPU's guest.
    pub(super) fn translated(
        &self,
        vcpu: Vcpu<'_>,
        span: Span,
        most: u64,
    ) -> Result<Translated, Error> {
        use polder_machine::Error::{Table, Untranslated};
        let Vcpu::Machine(vcpu) = vcpu else { return Err(Error::WrongVcpu) };
        let machine = self.lock();
        let root = machine.root(vcpu.id()).map_err(refused)?;
        if root.space() != span.space {
            let (asked, translates) = (span.space, root.space());
            return Err(Error::OtherRoot { asked, root: root.to_string(), translates });
        }
        let end = span.end.min(span.start.saturating_add(most));
        if root == Root::Tdp {
            let gfns = GfnRange::between(span.start, end);
            return Ok(Translated::At(gfns.expect("some pages of the span")));
        }
        let first = match machine.translated(vcpu.id(), span.start) {
            Ok((gfn, _)) => gfn,
            Err(Table { gfn }) => return Ok(Translated::Table(gfn)),
            Err(Untranslated { .. }) => {
                let nowhere = |page: &u64| {
                    matches!(machine.translated(vcpu.id(), *page), Err(Untranslated { .. }))
                };
                let count = (span.start..end).take_while(nowhere).count();
                return Ok(Translated::Nowhere(count as u64));
            }
            Err(error) => return Err(refused(error)),
        };
        let follows = |(gfn, page): &(u64, u64)| {
            machine.translated(vcpu.id(), *page).is_ok_and(|(there, _)| there.get() == *gfn)
        };
        let run = (first.get()..).zip(span.start..end).take_while(follows).count();
        let gfns = GfnRange::between(first.get(), first.get() + run as u64);
        Ok(Translated::At(gfns.expect("the first is one")))
    }

    /// Where the tables of the vCPU's guest show frames.
    pub(super) fn shown_at(
        &self,
        vcpu: Vcpu<'_>,
        gfns: GfnRange,
    ) -> Result<(AddressSpace, Vec<(u64, GfnRange)>), Error> {
        let Vcpu::Machine(vcpu) = vcpu else { return Err(Error::WrongVcpu) };
        let machine = self.lock();
        let root = machine.root(vcpu.id()).map_err(refused)?;
        match machine.aliases(vcpu.id(), gfns, ALIAS_ENTRIES) {
            Ok(aliases) => {
                let runs = aliases.into_iter().map(|alias| (alias.page, alias.gfns));
                Ok((root.space(), runs.collect()))
            }
            Err(polder_machine::Error::TooManyEntries { .. }) => Err(Error::NotOffered {
                what: "the guest's page tables have too many entries to search them for frames",
                way_out: "prefault the addresses that the guest uses",
            }),
            Err(error) => Err(refused(error)),
        }
    }
}
