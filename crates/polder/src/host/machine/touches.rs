//! Touches of the machine's host view, and the object's bytes.
//!
//! Nothing in the machine waits: a touch that has to wait queues itself for the fault threads, and
//! is made again once something was answered.

use std::os::fd::BorrowedFd;
use std::time::Duration;

use polder_engine::{Response, View};
use polder_linux::Errno;
use polder_machine::{AccessCheck, Hva, Machine, Sigbus, Thread};
use polder_units::{PAGE_BYTES, PAGE_SIZE, PageIndex, PageRange};

use super::{CPUS, HOST_VIEW, MachineHost, refused};
use crate::Error;
use crate::host::failed;
use crate::host::views::Views;

/// How long a touch that waits goes without being made again.
const TOUCH_AGAIN: Duration = Duration::from_millis(20);

/// How often an access is made again that finds another CPU at work on the page's RMP entry: soon
/// it is not, and nobody who may touch a page is to be told that he may not.
const IN_USE_RETRIES: u32 = 200;

/// How long is waited in between.
const IN_USE_PAUSE: Duration = Duration::from_millis(1);

impl MachineHost {
    /// Makes a touch by the host view until it is made or denied.
    fn touch(
        &self,
        offset: u64,
        mut touch: impl FnMut(&mut Machine, Thread, Hva) -> Result<(), polder_machine::HostExit>,
    ) -> Result<(), Error> {
        use polder_machine::HostExit;
        let thread = Thread { process: self.process, index: cpu() };
        let hva = Hva::new(HOST_VIEW * PAGE_SIZE + offset);
        let mut retries = IN_USE_RETRIES;
        loop {
            let before = self.events.lock().answers;
            let exit = touch(&mut self.lock(), thread, hva);
            match exit {
                Ok(()) => return Ok(()),
                Err(HostExit::Fault(fault)) => {
                    self.wait_for_answer((View::Host, fault.page), before)
                }
                Err(HostExit::Wait { .. }) => crate::sync::yield_now(),
                Err(HostExit::Sigbus { vpn, why }) => {
                    let page = vpn.get() - HOST_VIEW;
                    let touched = (page * PAGE_SIZE).max(offset);
                    return Err(match why {
                        Sigbus::NoMemory => failed("a touch of the host view", Errno::NOMEM),
                        Sigbus::Poisoned | Sigbus::Beyond => {
                            polder_linux::Touched { offset: touched }.into()
                        }
                    });
                }
                Err(HostExit::Invalid(error)) => return Err(refused(error)),
                Err(HostExit::Refused(by)) if by.check == AccessCheck::InUse && retries > 0 => {
                    retries -= 1;
                    crate::sync::sleep(IN_USE_PAUSE);
                }
                Err(HostExit::Pinned { .. }) => unreachable!("a touch is no pin"),
                Err(HostExit::Segv { .. } | HostExit::Refused(_)) => {
                    return Err(polder_linux::Touched { offset }.into());
                }
            }
        }
    }

    /// Queues a touch and waits until something was answered since `before`.
    fn wait_for_answer(&self, touch: (View, PageIndex), before: u64) {
        let mut events = self.events.lock();
        if events.answers == before {
            events.touches.insert(touch);
            self.queued.notify_one();
            self.answered.wait_for(&mut events, TOUCH_AGAIN);
        }
    }

    pub(super) fn answered(&self) {
        self.events.lock().answers += 1;
        self.answered.notify_all();
    }
}

impl Views for MachineHost {
    fn answer(&self, view: View, response: Response, range: PageRange) -> Result<(), Error> {
        let done = match (view, response) {
            (View::Host, Response::Map) => self.map_host(range),
            (View::Host, Response::Poison) => self.poison(range),
            // A guest's faults don't come this way: see `map_guest`.
            (View::Guest, _) => Ok(()),
        };
        self.answered();
        done
    }

    fn wake(&self, _: View, _: PageRange) {
        self.answered();
    }

    fn touches(
        &self,
        into: &mut Vec<(View, PageIndex)>,
        at_most: Option<Duration>,
    ) -> Result<bool, Error> {
        let mut events = self.events.lock();
        if events.touches.is_empty() && !events.nudged {
            match at_most {
                Some(time) => {
                    self.queued.wait_for(&mut events, time);
                }
                None => self.queued.wait(&mut events),
            }
        }
        into.extend(std::mem::take(&mut events.touches));
        Ok(std::mem::take(&mut events.nudged))
    }

    fn nudge(&self) {
        self.events.lock().nudged = true;
        self.queued.notify_all();
    }

    fn read(&self, offset: u64, into: &mut [u8]) -> Result<(), Error> {
        let machine = self.lock();
        match self.hides {
            true => machine.object_read_mapped(self.object, offset, into),
            false => machine.object_read(self.object, offset, into),
        }
        .map_err(refused)
    }

    fn write(&self, offset: u64, from: &[u8]) -> Result<(), Error> {
        let Some(last) = from.len().checked_sub(1) else { return Ok(()) };
        let (first, last) = (offset / PAGE_SIZE, (offset + last as u64) / PAGE_SIZE);
        let range = PageRange::between(first, last + 1).expect("bytes of the object");
        let mut retries = IN_USE_RETRIES;
        loop {
            let mut machine = self.lock();
            self.allocate(&mut machine, range)?;
            let written = match self.hides {
                true => machine.object_write_mapped(self.object, offset, from),
                false => machine.object_write(self.object, offset, from),
            };
            match written {
                Err(polder_machine::Error::Refused(by))
                    if by.check == AccessCheck::InUse && retries > 0 =>
                {
                    retries -= 1;
                }
                written => return written.map_err(refused),
            }
            drop(machine);
            crate::sync::sleep(IN_USE_PAUSE);
        }
    }

    fn touch_read(&self, offset: u64, into: &mut [u8]) -> Result<(), Error> {
        // A CPU copies upwards and stops where it is stopped: a page is one access here.
        let mut left = into;
        let mut offset = offset;
        while !left.is_empty() {
            let (now, rest) = left.split_at_mut(in_page(offset, left.len()));
            self.touch(offset, |machine, thread, hva| machine.host_read(thread, hva, now))?;
            offset += now.len() as u64;
            left = rest;
        }
        Ok(())
    }

    fn touch_write(&self, offset: u64, from: &[u8]) -> Result<(), Error> {
        let (mut left, mut offset) = (from, offset);
        while !left.is_empty() {
            let (now, rest) = left.split_at(in_page(offset, left.len()));
            self.touch(offset, |machine, thread, hva| machine.host_write(thread, hva, now))?;
            offset += now.len() as u64;
            left = rest;
        }
        Ok(())
    }

    fn touch_from(&self, file: BorrowedFd<'_>, offset: u64, count: usize) -> Result<usize, Error> {
        // The kernel fills page by page, and reads nothing that it has no place for.
        let mut done = 0;
        while done < count {
            let at = offset + done as u64;
            let mut bytes = [0; PAGE_BYTES];
            let page = &mut bytes[..in_page(at, count - done)];
            match self.touch_read(at, &mut page[..1]) {
                Ok(()) => {}
                Err(_) if done > 0 => break,
                Err(_) => return Err(failed("read", Errno::FAULT)),
            }
            let came = rustix::io::retry_on_intr(|| rustix::io::read(file, &mut *page))
                .map_err(|errno| failed("read", errno))?;
            self.touch_write(at, &page[..came])?;
            done += came;
            if came < page.len() {
                break;
            }
        }
        Ok(done)
    }

    fn host_view(&self) -> Option<&std::sync::Arc<polder_linux::View>> {
        None
    }

    fn guest_page(&self, _: usize) -> Option<PageIndex> {
        None
    }
}

/// How many of `count` bytes at `offset` lie in its page.
fn in_page(offset: u64, count: usize) -> usize {
    let rest = PAGE_SIZE - offset % PAGE_SIZE;
    usize::try_from(rest).map_or(count, |rest| rest.min(count))
}

/// The simulated CPU that the calling thread runs on.
fn cpu() -> u16 {
    u16::try_from(crate::sync::thread_number() % usize::from(CPUS)).expect("a remainder of CPUS")
}
