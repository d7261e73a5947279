//! Guest memory without Polder: the same memfd, views, userfaultfds and system calls, and a loop
//! that answers each touch by mapping the page. What the benches on KVM compare Polder with.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

use polder_linux::{Continued, Error, Memfd, Nudge, Userfault, View};
use polder_units::{PageIndex, PageRange};

/// Bare memory, and the thread that answers touches of it.
pub(crate) struct Bare {
    memfd: Arc<Memfd>,
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

/// What both threads have.
struct Shared {
    trusted: View,
    guest: Userfault,
    host: Userfault,
    nudge: Nudge,
    stop: AtomicBool,
}

impl Bare {
    /// An object of `pages` pages, whose host view is watched, and its guest view if `guest_too`.
    pub(crate) fn new(pages: u32, guest_too: bool) -> Result<Self, Error> {
        let memfd = Arc::new(Memfd::new("bench", pages.into())?);
        let watched = || Userfault::new(Arc::new(View::new(&memfd)?));
        let shared = Arc::new(Shared {
            trusted: View::new(&memfd)?,
            guest: watched()?,
            host: watched()?,
            nudge: Nudge::new()?,
            stop: AtomicBool::new(false),
        });
        let all = PageRange::between(0, pages.into()).expect("an object has pages");
        shared.host.watch(all)?;
        if guest_too {
            shared.guest.watch(all)?;
        }
        let thread = polder_linux::spawn("bare-faults", {
            let shared = Arc::clone(&shared);
            move || shared.run()
        })?;
        Ok(Self { memfd, shared, thread: Some(thread) })
    }

    /// What KVM's slots show.
    pub(crate) fn guest_view(&self) -> &Arc<View> {
        self.shared.guest.view()
    }

    /// What a device model would have.
    pub(crate) fn host_view(&self) -> &Arc<View> {
        self.shared.host.view()
    }

    /// Makes the pages exist.
    pub(crate) fn populate(&self, range: PageRange) -> Result<(), Error> {
        self.shared.trusted.populate(range)
    }

    /// Fills pages and maps them in the guest view.
    pub(crate) fn bring(&self, range: PageRange, bytes: &[u8]) -> Result<(), Error> {
        self.memfd.write_at(range.start().offset(), bytes)?;
        self.shared.guest.resume(range).map(drop)
    }

    /// Frees the pages, under all views.
    pub(crate) fn free(&self, range: PageRange) -> Result<(), Error> {
        self.memfd.punch_hole(range)?;
        self.host_view().zap(range)?;
        self.guest_view().zap(range)
    }
}

impl Shared {
    fn run(&self) {
        let mut served = Ok(());
        while served.is_ok() && !self.stop.load(Ordering::Acquire) {
            served = self.serve();
        }
    }

    /// Answers the touches that wait, or waits for one.
    fn serve(&self) -> Result<(), Error> {
        use std::os::fd::AsFd;
        let fds = [self.guest.as_fd(), self.host.as_fd(), self.nudge.as_fd()];
        let [guest, host, _] = polder_linux::wait(fds, None)?;
        let mut touches: Vec<PageIndex> = Vec::new();
        for (view, touched) in [(&self.guest, guest), (&self.host, host)] {
            if touched {
                view.touches(&mut touches)?;
            }
            for page in touches.drain(..).map(PageRange::one) {
                if let Continued::Missing(_) = view.resume(page)? {
                    self.trusted.populate(page)?;
                    view.resume(page)?;
                }
            }
        }
        Ok(())
    }
}

impl Drop for Bare {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Release);
        self.shared.nudge.give();
        if let Some(thread) = self.thread.take() {
            // Should it have panicked, that was reported when it happened.
            let _ = thread.join();
        }
    }
}
