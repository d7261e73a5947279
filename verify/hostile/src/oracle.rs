//! What a VM's memory is, worked out page by page from the requests of its guest.

use polder::Visibility;
use polder::units::{Gfn, GfnRange, Gpa, PAGE_BYTES, PAGE_SIZE};
use polder_vmm::guest::{DeviceRequest, Request};
use polder_vmm::scenario::HostAccess;

/// Where the pages are: half of them at one place, half at another, with a hole in between.
pub(crate) const SLOTS: [(u64, u64); 2] = [(0x1000, 0), (0x1000 + HALF + 2, HALF)];
/// Pages of a slot.
pub(crate) const HALF: u64 = 4;
/// Pages.
pub(crate) const PAGES: u64 = 8;
const _: () = assert!(PAGES == 2 * HALF);

/// A small number as an index.
fn index(number: u64) -> usize {
    usize::try_from(number).expect("a small number")
}

const EINVAL: i64 = -22;
const EFAULT: i64 = -14;
const EOPNOTSUPP: i64 = -95;

/// The oracle.
#[derive(Debug)]
pub(crate) struct Oracle {
    pub(crate) private: [bool; 8],
    pub(crate) bytes: Vec<u8>,
}

impl Oracle {
    pub(crate) fn new() -> Self {
        Self { private: [true; 8], bytes: vec![0; 8 * PAGE_BYTES] }
    }

    pub(crate) fn is_private(&self, page: u64) -> bool {
        self.private[index(page)]
    }

    pub(crate) fn page_bytes(&self, page: u64) -> &[u8] {
        &self.bytes[index(page) * PAGE_BYTES..][..PAGE_BYTES]
    }

    /// The page behind a frame.
    fn page(gfn: Gfn) -> Option<usize> {
        let inside = |&(first, page): &(u64, u64)| {
            let offset = gfn.get().checked_sub(first)?;
            (offset < HALF).then_some(index(page + offset))
        };
        SLOTS.iter().find_map(inside)
    }

    /// Where the bytes of an address lie, if they are memory and, as asked, shared.
    pub(crate) fn place(&self, gpa: Gpa, len: u64, shared: bool) -> Option<Vec<usize>> {
        let end = gpa.get().checked_add(len)?;
        let reaches = |at: u64| {
            let page = Self::page(Gpa::new(at).gfn())?;
            let place = page * PAGE_BYTES + index(at % PAGE_SIZE);
            (!shared || !self.private[page]).then_some(place)
        };
        (gpa.get()..end).map(reaches).collect()
    }

    /// What becomes of a request, and what it is answered.
    pub(crate) fn answer(&mut self, request: Request) -> Option<i64> {
        Some(match request {
            Request::Convert { pages, to } => self.convert(pages, to == Visibility::Private),
            Request::Probe { pages, .. } if pages.count().get() > 4096 => EINVAL,
            Request::Probe { pages, expect } => {
                let differs = |&gfn: &Gfn| {
                    let readable = Self::page(gfn).is_some_and(|page| !self.private[page]);
                    readable != (expect == HostAccess::Readable)
                };
                pages.frames().filter(differs).count().try_into().expect("4096 at most")
            }
            Request::Doorbell { request } => self.ring(request),
            // Nothing can point to this memory.
            Request::Notify { .. } => EOPNOTSUPP,
            // Nobody says what should be there.
            Request::Digest { .. } => EINVAL,
            // It was given none.
            Request::MachineCheck { .. } => EINVAL,
            Request::Done { .. } | Request::Failed { .. } | Request::Exception { .. } => {
                return None;
            }
        })
    }

    fn convert(&mut self, pages: GfnRange, private: bool) -> i64 {
        // Longer than all memory, and so not to be looked at one by one.
        if pages.count().get() > PAGES {
            return EINVAL;
        }
        let Some(pages) = pages.frames().map(Self::page).collect::<Option<Vec<_>>>() else {
            return EINVAL;
        };
        pages.into_iter().for_each(|page| self.private[page] = private);
        0
    }

    /// The device: an answer is the payload with every bit flipped.
    fn ring(&mut self, gpa: Gpa) -> i64 {
        let Some(request) = self.place(gpa, DeviceRequest::BYTES, true) else { return EFAULT };
        let words = std::array::from_fn(|word| {
            let byte = |at: usize| self.bytes[request[word * 8 + at]];
            u64::from_le_bytes(std::array::from_fn(byte))
        });
        let status = match DeviceRequest::parse(words) {
            Err(_) => EINVAL,
            Ok(DeviceRequest { source, len, destination, .. }) => {
                let payload = self.place(source, len, true);
                match (payload, self.place(destination, len, true)) {
                    (Some(payload), Some(answer)) => {
                        let payload: Vec<u8> = payload.iter().map(|&at| !self.bytes[at]).collect();
                        answer.iter().zip(payload).for_each(|(&at, byte)| self.bytes[at] = byte);
                        0
                    }
                    _ => EFAULT,
                }
            }
        };
        let at = request.len() - 8;
        request[at..].iter().zip(status.to_le_bytes()).for_each(|(&at, byte)| {
            self.bytes[at] = byte;
        });
        0
    }
}
