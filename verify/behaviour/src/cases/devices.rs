//! Devices behind an IOMMU, which have what is shared mapped.

use std::sync::{Arc, Mutex};

use polder::units::{PageCount, PageRange};
use polder::{Dma, Error, Holder, OnBusy, PinKind, Refusal, Visibility};

use crate::Section::Devices;
use crate::world::{PASSED, World, byte, count, page, pages, put, to};
use crate::{Case, Ran};

pub(crate) const FAILS: &str =
    "a device that fails fails the conversion by name, and has in the end what it had";
pub(crate) const REACHES: &str = "a device reaches what is shared, and of what is private nothing";
pub(crate) const TOLD: &str =
    "a device is told of what is shared after, and of what is private before, in equal pieces";

pub(super) const CASES: &[Case] = &[
    Case::new(Devices, TOLD, told),
    Case::new(Devices, FAILS, fails),
    Case::new(
        Devices,
        "what a device has mapped is not discarded, and the device is named",
        not_discarded,
    ),
    Case::new(Devices, "a conversion that cuts a piece of a device's is refused", cut),
    Case::new(Devices, REACHES, reaches),
];

/// Notes what it is told, and whether the host could read the first page by then.
#[derive(Default)]
struct Told {
    pieces: Mutex<Vec<(bool, PageRange)>>,
    /// How many more it takes before it fails.
    fails: Mutex<Option<usize>>,
}

impl Told {
    fn tell(&self, map: bool, pages: PageRange) -> Result<(), Error> {
        let mut fails = self.fails.lock().expect("nobody panics");
        if *fails == Some(0) {
            *fails = None;
            return Err(Error::Interrupted);
        }
        *fails = fails.map(|left| left - 1);
        self.pieces.lock().expect("nobody panics").push((map, pages));
        Ok(())
    }

    fn take(&self) -> Vec<(bool, PageRange)> {
        std::mem::take(&mut self.pieces.lock().expect("nobody panics"))
    }
}

impl Dma for Told {
    fn map(&self, pages: PageRange) -> Result<(), Error> {
        self.tell(true, pages)
    }

    fn unmap(&self, pages: PageRange) -> Result<(), Error> {
        self.tell(false, pages)
    }
}

fn told(w: &World<'_>) -> Ran {
    let bound = w.bound(w.memory(16)?)?;
    let memory = &bound.memory;
    to(memory, pages(4, 8), Visibility::Shared).expect("nothing is in the way");
    let told = Arc::new(Told::default());
    let device = memory.attach_dma(Holder::new("nic"), count(2), told.clone());
    let device = device.expect("what is shared is of whole pieces");
    assert_eq!(told.take(), [(true, pages(4, 6)), (true, pages(6, 8))], "what is shared already");
    to(memory, pages(8, 12), Visibility::Shared).expect("nothing is in the way");
    assert_eq!(told.take(), [(true, pages(8, 10)), (true, pages(10, 12))]);
    to(memory, pages(6, 10), Visibility::Private).expect("a device is in no conversion's way");
    assert_eq!(told.take(), [(false, pages(6, 8)), (false, pages(8, 10))]);
    // What was so already it is not told again.
    to(memory, pages(4, 12), Visibility::Shared).expect("nothing is in the way");
    assert_eq!(told.take(), [(true, pages(6, 8)), (true, pages(8, 10))]);
    device.detach().expect("it lets go");
    assert_eq!(told.take().len(), 4, "each piece once");
    to(memory, pages(4, 12), Visibility::Private).expect("nothing is in the way");
    assert_eq!(told.take(), []);
    PASSED
}

fn fails(w: &World<'_>) -> Ran {
    let bound = w.bound(w.memory(8)?)?;
    let memory = &bound.memory;
    let told = Arc::new(Told::default());
    let device = memory.attach_dma(Holder::new("nic"), PageCount::ONE, told.clone());
    let device = device.expect("nothing is shared");
    for nth in 0..4 {
        *told.fails.lock().expect("nobody panics") = Some(nth);
        let refused = to(memory, pages(0, 4), Visibility::Shared).expect_err("it fails");
        let Error::Device { holder, .. } = refused else { panic!("{refused}") };
        assert_eq!(holder, Holder::new("nic"));
        let (mapped, unmapped): (Vec<_>, Vec<_>) = told.take().into_iter().partition(|it| it.0);
        assert_eq!((mapped.len(), unmapped.len()), (nth, nth));
        assert_eq!(byte(memory, 0), None, "it is private still");
    }
    to(memory, pages(0, 4), Visibility::Shared).expect("it does not fail");
    put(memory, 0, 3);
    told.take();
    for nth in 0..4 {
        *told.fails.lock().expect("nobody panics") = Some(nth);
        to(memory, pages(0, 4), Visibility::Private).expect_err("it fails");
        let (mapped, unmapped): (Vec<_>, Vec<_>) = told.take().into_iter().partition(|it| it.0);
        assert_eq!((mapped.len(), unmapped.len()), (nth, nth));
        assert_eq!(byte(memory, 0), Some(3), "it is shared still");
    }
    device.detach().expect("it lets go");
    PASSED
}

fn not_discarded(w: &World<'_>) -> Ran {
    let bound = w.bound(w.memory(8)?)?;
    let memory = &bound.memory;
    to(memory, pages(2, 4), Visibility::Shared).expect("nothing is in the way");
    put(memory, 2, 3);
    let holder = Holder::new("nic");
    let device = memory.attach_dma(holder.clone(), PageCount::ONE, Arc::new(Told::default()));
    let device = device.expect("of whole pieces");
    let pinned = Refusal::Pinned { page: page(2).start(), kind: PinKind::LongTerm, holder };
    assert_eq!(memory.discard(pages(0, 8), OnBusy::Wait), Err(pinned.into()));
    assert_eq!(byte(memory, 2), Some(3));
    drop(device);
    assert_eq!(memory.discard(pages(0, 8), OnBusy::Wait), Ok(()));
    PASSED
}

fn cut(w: &World<'_>) -> Ran {
    let bound = w.bound(w.memory(8)?)?;
    let memory = &bound.memory;
    let device = memory.attach_dma(Holder::new("nic"), count(4), Arc::new(Told::default()));
    let device = device.expect("nothing is shared");
    let refused = to(memory, pages(0, 2), Visibility::Shared);
    let granule = Refusal::Granule { range: pages(0, 2), granule: count(4) };
    assert_eq!(refused, Err(granule.into()));
    assert_eq!(byte(memory, 0), None);
    to(memory, pages(4, 8), Visibility::Shared).expect("a whole piece");
    device.detach().expect("it lets go");
    // What is shared is to be of whole pieces when it is attached, too.
    to(memory, pages(4, 5), Visibility::Private).expect("nothing is in the way");
    let refused = memory.attach_dma(Holder::new("nic"), count(4), Arc::new(Told::default()));
    assert!(matches!(refused, Err(Error::Refused(Refusal::Granule { .. }))));
    PASSED
}

fn reaches(w: &World<'_>) -> Ran {
    let bound = w.bound(w.memory(8)?)?;
    let memory = &bound.memory;
    to(memory, pages(2, 4), Visibility::Shared).expect("nothing is in the way");
    let device = memory.simulated_device(Holder::new("nic")).expect("memory of this host");
    let mut seen = [0; 8];
    assert!(device.write(page(2).start().offset(), &[5; 8]).is_ok());
    assert!(device.read(page(4).start().offset(), &mut seen).is_err());
    let mut first = [0];
    memory.host_view().touch_read(page(2).start().offset(), &mut first).expect("a shared page");
    assert_eq!(first, [5]);
    to(memory, pages(2, 4), Visibility::Private).expect("a device is in no conversion's way");
    assert!(device.write(page(2).start().offset(), &[6; 8]).is_err(), "its IOTLB forgets, too");
    to(memory, pages(2, 4), Visibility::Shared).expect("nothing is in the way");
    assert!(device.write(page(2).start().offset(), &[7; 8]).is_ok());
    assert_eq!(w.inside().audit(memory), Ok(()));
    device.detach().expect("it lets go");
    PASSED
}
