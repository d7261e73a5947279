//! The host side, trying what it must not get: private pages.
//!
//! Each page is tried by the API and by a raw touch of the host view, which survives its SIGBUS;
//! both ways, reading and writing, and by a system call that is given the page to read into.

use std::fs::File;

use polder::units::{Gfn, GfnRange, PAGE_BYTES, PageIndex};
use polder::{HostView, Memory, VmId};

use crate::scenario::HostAccess;

/// By which way the host reached a page.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Way {
    /// A read or write of the API.
    Api,
    /// A touch of the host view.
    RawTouch,
    /// A `read(2)` into the host view.
    SystemCall,
}

/// How often a touch that was denied is made again, if its page should be shown.
const TRIES: u32 = 100;

/// Tries pages on behalf of the host.
pub(crate) struct Intruder<'a> {
    memory: &'a Memory,
    vm: VmId,
    zeros: File,
}

impl<'a> Intruder<'a> {
    pub(crate) fn new(memory: &'a Memory, vm: VmId) -> std::io::Result<Self> {
        Ok(Self { memory, vm, zeros: File::open("/dev/zero")? })
    }

    /// How many of the pages the host finds otherwise than expected. Reads alone.
    pub(crate) fn probe(&self, gfns: GfnRange, expect: HostAccess) -> u64 {
        let differs = |&gfn: &Gfn| match expect {
            HostAccess::Denied => self.reads(gfn).is_some(),
            HostAccess::Readable => !self.reads_alike(gfn),
        };
        gfns.frames().filter(differs).count() as u64
    }

    /// Tries a page that is private for good by every way. Returns the first that worked.
    pub(crate) fn assault(&self, gfn: Gfn) -> Option<Way> {
        if let Some(way) = self.reads(gfn) {
            return Some(way);
        }
        let mark = [0xa5; 8];
        if self.memory.write(self.vm, gfn.gpa(), &mark).is_ok() {
            return Some(Way::Api);
        }
        let offset = self.page(gfn)?.offset();
        if self.view().touch_write(offset, &mark).is_ok() {
            return Some(Way::RawTouch);
        }
        match self.view().read_from(&self.zeros, offset, PAGE_BYTES) {
            Ok(_) => Some(Way::SystemCall),
            Err(_) => None,
        }
    }

    /// By which way a page can be read, if any.
    fn reads(&self, gfn: Gfn) -> Option<Way> {
        let mut word = [0; 8];
        if self.memory.read(self.vm, gfn.gpa(), &mut word).is_ok() {
            return Some(Way::Api);
        }
        let offset = self.page(gfn)?.offset();
        self.view().touch_read(offset, &mut word).is_ok().then_some(Way::RawTouch)
    }

    /// Whether a page can be read by every way, and reads the same.
    fn reads_alike(&self, gfn: Gfn) -> bool {
        let (mut by_api, mut by_touch) = ([0; PAGE_BYTES], [1; PAGE_BYTES]);
        let Some(page) = self.page(gfn) else { return false };
        if self.memory.read(self.vm, gfn.gpa(), &mut by_api).is_err() {
            return false;
        }
        // A huge page that the view maps as a whole is denied while a neighbour is private; those
        // change while this looks.
        let touched = (0..TRIES).find_map(|_| {
            let touched = self.view().touch_read(page.offset(), &mut by_touch).is_ok();
            (touched || !self.memory.is_shown(page)).then_some(touched)
        });
        match touched {
            Some(true) => by_api == by_touch,
            Some(false) => true,
            None => false,
        }
    }

    fn view(&self) -> HostView<'a> {
        self.memory.host_view()
    }

    fn page(&self, gfn: Gfn) -> Option<PageIndex> {
        Some(self.memory.pages_of(self.vm, GfnRange::one(gfn)).ok()?.first()?.start())
    }
}
