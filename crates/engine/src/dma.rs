//! DMA: devices whose IOMMU domain maps what is shared, and nothing else.
//!
//! A device that is attached has every shared page mapped, which counts as a long-term pin by its
//! holder (Linux' `VFIO_IOMMU_MAP_DMA` pins so): the page is not discarded and not moved. Unlike
//! any other pin it stands in the way of no conversion, because the conversion itself takes it
//! away: to private, the device's mapping goes *before* references are looked for; to shared, it
//! comes last.
//!
//! A device is told in equal pieces, its *granule*, because an IOMMU takes away only what it was
//! given as a whole (`VFIO_TYPE1v2_IOMMU`: an unmapping may not cut a mapping). A conversion that
//! would cut one is refused.
//!
//! # Holes
//! A conversion to shared that drops contents has dropped them by the time that a device is told: a
//! device that fails then leaves the pages in quarantine.

use alloc::vec;
use alloc::vec::Vec;

use polder_units::{PageCount, PageRange};

use crate::operation::Program;
use crate::plant::Bug;
use crate::{
    Activity, Blocked, Engine, Holder, Operation, PageFacts, PinKind, Population, Refusal, Stage,
    Step, Visibility,
};

/// Names a device; never used twice.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct DeviceId(u64);

/// A device and whom to name.
#[derive(Clone, Debug)]
#[cfg_attr(feature = "explore", derive(Hash))]
pub(crate) struct Device {
    id: DeviceId,
    holder: Holder,
    granule: PageCount,
}

/// Waiting for what is in flight; then mapping what is shared, or taking it away.
#[derive(Debug)]
pub enum Attaching {}
/// All is done; [`Engine::finish_attach`] or [`Engine::finish_detach`] makes it true.
#[derive(Debug)]
pub enum Attached {}

impl Stage for Attaching {
    type Next = Attached;
    const INDEX: usize = 0;
}

impl Engine {
    /// Claims all pages, to map those that are shared for a device. `granule` pages are mapped and
    /// taken away at a time.
    ///
    /// # Errors
    /// Refused for a granule that is zero, no power of two, or cuts what is shared; where contents
    /// are owed, or a page is pinned exclusively; busy while an operation runs.
    pub fn attach(
        &mut self,
        granule: PageCount,
    ) -> Result<(DeviceId, Operation<Attaching>), Blocked> {
        let all = self.all();
        self.check_turn(all)?;
        if let Some(page) = self.first_page(all, |facts| facts.population == Population::Owed) {
            return Err(Refusal::Owed { page }.into());
        }
        let shared = self.shared(all);
        for &run in &shared {
            check_granule(run, granule)?;
            self.check_exclusive(run)?;
        }
        if !granule.get().is_power_of_two() {
            return Err(Refusal::Granule { range: all, granule }.into());
        }
        let id = DeviceId(self.next_id());
        let program = Program::default().stage(shared.iter().map(|&run| Step::MapDma(id, run)));
        Ok((id, self.begin(Activity::Attach, vec![all], shared, program)))
    }

    /// Makes the device known: conversions take it into account from here on.
    pub fn finish_attach(
        &mut self,
        (id, attached): (DeviceId, Operation<Attached>),
        holder: Holder,
        granule: PageCount,
    ) {
        self.finish(&attached);
        self.devices.push(Device { id, holder, granule });
    }

    /// Claims all pages, to take them away from a device.
    ///
    /// # Errors
    /// Refused for a device that is not attached; busy while an operation runs.
    pub fn detach(&mut self, id: DeviceId) -> Result<Operation<Attaching>, Blocked> {
        let all = self.all();
        self.check_turn(all)?;
        if !self.devices.iter().any(|device| device.id == id) {
            return Err(Refusal::NoSuchDevice.into());
        }
        let shared = self.shared(all);
        let program = Program::default().stage(shared.iter().map(|&run| Step::UnmapDma(id, run)));
        Ok(self.begin(Activity::Detach, vec![all], shared, program))
    }

    /// Forgets the device.
    pub fn finish_detach(&mut self, id: DeviceId, detached: Operation<Attached>) {
        self.finish(&detached);
        self.devices.retain(|device| device.id != id);
    }

    /// Refuses a range of which a device has a page mapped, naming it.
    pub(crate) fn check_dma(&self, range: PageRange) -> Result<(), Refusal> {
        let Some(device) = self.devices.first() else { return Ok(()) };
        let shared = |facts: PageFacts| facts.visibility == Visibility::Shared;
        match self.first_page(range, shared) {
            Some(page) => {
                let (kind, holder) = (PinKind::LongTerm, device.holder.clone());
                Err(Refusal::Pinned { page, kind, holder })
            }
            None => Ok(()),
        }
    }

    /// Refuses a conversion that would cut what a device has mapped, or is to map.
    pub(crate) fn check_granules(&self, parts: &[PageRange]) -> Result<(), Refusal> {
        let cut = |&part: &PageRange| {
            self.devices.iter().try_for_each(|device| check_granule(part, device.granule))
        };
        parts.iter().try_for_each(cut)
    }

    /// The steps by which devices lose pages, or get them.
    pub(crate) fn dma_steps(&self, parts: &[PageRange], to: Visibility) -> Vec<Step> {
        let step = |id, part| match to {
            Visibility::Private => Step::UnmapDma(id, part),
            Visibility::Shared => Step::MapDma(id, part),
        };
        let devices = self.devices.iter().filter(|_| !self.plants.has(Bug::DmaForgotten));
        devices.flat_map(|device| parts.iter().map(move |&part| step(device.id, part))).collect()
    }

    fn shared(&self, range: PageRange) -> Vec<PageRange> {
        let runs = self.pages.runs(range);
        let shared = runs.filter(|(_, facts)| facts.visibility == Visibility::Shared);
        shared.map(|(run, _)| run).collect()
    }
}

/// Refuses pages that are no multiple of what a device is told at a time.
fn check_granule(range: PageRange, granule: PageCount) -> Result<(), Refusal> {
    let pages = granule.get().max(1);
    let whole = range.start().get().is_multiple_of(pages) && range.end().is_multiple_of(pages);
    if whole { Ok(()) } else { Err(Refusal::Granule { range, granule }) }
}
