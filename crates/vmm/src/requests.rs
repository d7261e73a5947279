//! What becomes of a guest's requests.

use polder::guest_memory::GuestMemory;
use polder::units::{GfnRange, Gpa};
use polder::{Memory, OnBusy, VmId};

use crate::device;
use crate::guest::{Request, RequestError};
use crate::intruder::Intruder;
use crate::machine_check::MachineChecks;
use crate::report::Failure;
use crate::scenario::Outcome;
use crate::virtqueue::{Virtqueue, VirtqueueStatistics};

/// The most pages that one request has the host try: what it costs is the host's time.
const MOST_PROBED: u64 = 4096;

/// What a vCPU does next.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Next {
    /// Goes on, with this answer.
    Answer(i64),
    /// Stops: its program came to its end, with so many checks passed.
    Done {
        /// The checks that passed.
        checks_passed: u64,
    },
    /// Stops: a check failed, after so many had passed.
    Failed {
        /// What failed.
        failure: Failure,
        /// The checks that passed before.
        checks_passed: u64,
    },
}

/// The [digest](crate::scenario::digest) of what should be in that many bytes at an address, if
/// anything should.
pub type Expected<'a> = &'a (dyn Fn(Gpa, u64) -> Option<u64> + Sync);

/// Answers the requests of one VM's guest.
pub struct Requests<'a> {
    memory: &'a Memory,
    vm: VmId,
    intruder: Intruder<'a>,
    /// None where no device can point to the memory.
    virtqueue: Option<Virtqueue>,
    expected: Option<Expected<'a>>,
    /// None where a guest that touches a page which has failed is stopped.
    machine_checks: Option<MachineChecks>,
}

impl<'a> Requests<'a> {
    /// Of this VM of this memory.
    ///
    /// # Errors
    /// Of opening `/dev/zero`, which the host reads from when it tries a page.
    pub fn new(memory: &'a Memory, vm: VmId) -> std::io::Result<Self> {
        Ok(Self {
            memory,
            vm,
            intruder: Intruder::new(memory, vm)?,
            virtqueue: None,
            expected: None,
            machine_checks: None,
        })
    }

    /// With a device on a virtqueue in this guest memory.
    pub(crate) fn with_virtqueue(self, guest: GuestMemory) -> Self {
        Self { virtqueue: Some(Virtqueue::new(guest)), ..self }
    }

    /// What the device on the virtqueue has done.
    pub(crate) fn virtqueue(&self) -> Option<VirtqueueStatistics> {
        self.virtqueue.as_ref().map(Virtqueue::statistics)
    }

    /// Has digests compared with these.
    pub(crate) fn expect(&mut self, expected: Expected<'a>) {
        self.expected = Some(expected);
    }

    /// Has the guest take machine checks.
    pub(crate) fn give_machine_checks(&mut self) {
        self.machine_checks = Some(MachineChecks::default());
    }

    /// Those that it took, if it takes any.
    pub(crate) fn machine_checks(&self) -> Option<&MachineChecks> {
        self.machine_checks.as_ref()
    }

    /// The memory that the requests are about.
    pub(crate) fn memory(&self) -> (&'a Memory, VmId) {
        (self.memory, self.vm)
    }

    /// Answers one request of vCPU `vcpu`.
    pub fn answer(&self, vcpu: u32, request: Result<Request, RequestError>) -> Next {
        match request {
            Err(error) => {
                if error.is_conversion() {
                    self.memory.count_refusal();
                }
                Next::Answer(i64::from(error.errno()))
            }
            Ok(Request::Convert { pages, to }) => Next::Answer(self.convert(pages, to)),
            Ok(Request::Probe { pages, .. }) if pages.count().get() > MOST_PROBED => {
                Next::Answer(i64::from(Outcome::Invalid.code()))
            }
            Ok(Request::Probe { pages, expect }) => {
                Next::Answer(self.intruder.probe(pages, expect).cast_signed())
            }
            Ok(Request::Doorbell { request }) => {
                Next::Answer(i64::from(device::ring(self.memory, self.vm, request).code()))
            }
            Ok(Request::Notify { queue, size }) => {
                let notified = self.virtqueue.as_ref().map(|it| it.notify(queue, size));
                Next::Answer(i64::from(notified.unwrap_or(Outcome::Unsupported).code()))
            }
            Ok(Request::Done { checks_passed }) => Next::Done { checks_passed },
            Ok(Request::Digest { gpa, len, digest, op }) => {
                self.digest(vcpu, (gpa, len), digest, op)
            }
            Ok(Request::MachineCheck { gpa, .. }) => {
                let taken = self.machine_checks.as_ref().is_some_and(|it| it.take(vcpu, gpa));
                let outcome = if taken { Outcome::Done } else { Outcome::Invalid };
                Next::Answer(i64::from(outcome.code()))
            }
            Ok(Request::Failed { op, gpa, expected, found, checks_passed }) => Next::Failed {
                failure: Failure::Check { vcpu, op, gpa, expected, found },
                checks_passed,
            },
            Ok(Request::Exception { vector, rip, cr2, error }) => Next::Failed {
                failure: Failure::Exception { vcpu, vector, rip, cr2, error },
                checks_passed: 0,
            },
        }
    }

    /// Compares a digest. Where nothing is expected, nothing can be right.
    fn digest(&self, vcpu: u32, (gpa, len): (Gpa, u64), found: u64, op: u64) -> Next {
        match self.expected.and_then(|expected| expected(gpa, len)) {
            None => Next::Answer(i64::from(Outcome::Invalid.code())),
            Some(expected) if expected == found => Next::Answer(0),
            Some(expected) => Next::Failed {
                failure: Failure::Check { vcpu, op, gpa, expected, found },
                checks_passed: 0,
            },
        }
    }

    fn convert(&self, gfns: GfnRange, to: polder::Visibility) -> i64 {
        let contents = self.memory.keeps_most(to);
        let converted = self.memory.convert_gfns(self.vm, gfns, to, contents, OnBusy::Wait);
        match converted {
            Ok(_) => 0,
            Err(error) => -i64::from(error.errno() as i32),
        }
    }
}
