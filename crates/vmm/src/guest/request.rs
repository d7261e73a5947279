//! What a guest asks of the VMM, and how it is written in registers and in memory.
//!
//! A request by port is one 4-byte `IN` from [`PORT`]. Its registers are those of a KVM hypercall:
//! the number in RAX, arguments in RBX, RCX, RDX, RSI. The VMM reads them with `KVM_GET_REGS` at
//! the `KVM_EXIT_IO` and answers with the IN's data: 0 or a negative errno, as a 32-bit number that
//! the guest sign-extends. `KVM_HC_MAP_GPA_RANGE` may come as a hypercall as well.
//!
//! | number | request | RBX | RCX | RDX | RSI | RDI |
//! |---|---|---|---|---|---|---|
//! | 12 | convert | gpa | pages | attributes | | |
//! | 0x100 | probe | gpa | pages | 0: denied, 1: readable | | |
//! | 0x101 | doorbell | gpa of a [`DeviceRequest`] | | | | |
//! | 0x102 | done | checks passed | | | | |
//! | 0x103 | failed | op index | gpa | expected | found | checks passed |
//! | 0x104 | exception | vector | rip | cr2 | error code | |
//! | 0x105 | notify | gpa of a virtqueue | descriptors | | | |
//! | 0x106 | digest | gpa | bytes | digest | op index | |
//! | 0x107 | machine check | gpa of the bank | status of the bank | | | |
//!
//! Done, failed and exception are final: the VMM stops the vCPU. Resumed nevertheless, it says the
//! same again.
//!
//! All of this is an allegation: a hostile guest puts anything in its registers. Only
//! [`Request::parse`] and [`DeviceRequest::parse`] make a checked type of it. What they can't know
//! is where memory ends: a range that parses may still lie outside.

use kvm_bindings::kvm_regs;
use polder_units::{GfnRange, Gpa, PAGE_SHIFT, PAGE_SIZE, RangeError};

use crate::scenario::{HostAccess, Visibility, WORD};

/// The port of requests.
pub const PORT: u16 = 0xe0;

/// The hypercall's number, which is its number by port too.
pub const KVM_HC_MAP_GPA_RANGE: u64 = 12;

/// `KVM_MAP_GPA_RANGE_ENCRYPTED`: the attribute bit of a request to become private.
pub const MAP_GPA_RANGE_ENCRYPTED: u64 = 1 << 4;

/// Attribute bits 0 to 3: the preferred page size, 0 to 2. A hint that we do not take.
const PAGE_SIZE_MASK: u64 = 0xf;
const PAGE_SIZE_LAST: u64 = 2;

/// Numbers of requests, by port only.
pub mod number {
    /// Have the host try pages.
    pub const PROBE: u64 = 0x100;
    /// Ring the device's doorbell.
    pub const DOORBELL: u64 = 0x101;
    /// The program ended.
    pub const DONE: u64 = 0x102;
    /// A check failed.
    pub const FAILED: u64 = 0x103;
    /// An exception was taken.
    pub const EXCEPTION: u64 = 0x104;
    /// Have the device look at its virtqueue.
    pub const NOTIFY: u64 = 0x105;
    /// Have a digest compared.
    pub const DIGEST: u64 = 0x106;
    /// A machine check was taken, and what it met abandoned.
    pub const MACHINE_CHECK: u64 = 0x107;
}

/// A request that makes sense, though perhaps not for memory that exists.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Request {
    /// Pages are to become private or shared.
    Convert {
        /// The pages.
        pages: GfnRange,
        /// What they are to become.
        to: Visibility,
    },
    /// The host is to try pages.
    Probe {
        /// The pages.
        pages: GfnRange,
        /// What it is to find.
        expect: HostAccess,
    },
    /// The device is to look at the [`DeviceRequest`] at this address.
    Doorbell {
        /// The request's address, a multiple of 8.
        request: Gpa,
    },
    /// The device is to look at the virtqueue at this address.
    Notify {
        /// Its descriptors' address.
        queue: Gpa,
        /// How many descriptors it has, as the guest says.
        size: u64,
    },
    /// A digest is to be compared with what should be there.
    Digest {
        /// The first byte.
        gpa: Gpa,
        /// The length in bytes: words, at most [`DIGEST_LEN_MAX`].
        len: u64,
        /// What the guest found.
        digest: u64,
        /// The op's index in its program.
        op: u64,
    },
    /// A machine check was taken; the program went on with its next op.
    MachineCheck {
        /// The address that the bank had.
        gpa: Gpa,
        /// What `IA32_MCi_STATUS` was.
        status: u64,
    },
    /// The program ended.
    Done {
        /// The checks that passed.
        checks_passed: u64,
    },
    /// A check failed, and the program stopped.
    Failed {
        /// The op's index in its program.
        op: u64,
        /// The address the op failed at.
        gpa: Gpa,
        /// The word or answer that was expected.
        expected: u64,
        /// The word or answer that was found.
        found: u64,
        /// The checks that passed before.
        checks_passed: u64,
    },
    /// An exception was taken, and the program stopped.
    Exception {
        /// Its vector.
        vector: u64,
        /// Where.
        rip: u64,
        /// The address of a page fault.
        cr2: u64,
        /// Its error code, or 0.
        error: u64,
    },
}

/// The most bytes that a digest is of: 16 MiB.
pub const DIGEST_LEN_MAX: u64 = 16 << 20;

/// Why registers are no request.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, thiserror::Error)]
pub enum RequestError {
    /// An access of the port that is not an IN of 4 bytes, or of another port.
    #[error("{kind} of {bytes} bytes at port {port:#x}; a request is an IN of 4 at 0xe0")]
    Access {
        /// IN or OUT.
        kind: &'static str,
        /// The port.
        port: u16,
        /// Bytes, in all elements.
        bytes: usize,
    },
    /// No request has this number.
    #[error("no request has the number {number:#x}")]
    Number {
        /// The number.
        number: u64,
    },
    /// The pages are no range.
    #[error("not a range of pages")]
    Range(#[source] RangeError),
    /// More pages than there are.
    #[error("{pages:#x} pages reach past the end of the address space")]
    Pages {
        /// The number of pages.
        pages: u64,
    },
    /// Attributes that are reserved, or a page size that is none.
    #[error("attributes {attributes:#x} have reserved bits; private is 0x10, shared is 0")]
    Attributes {
        /// The attributes.
        attributes: u64,
    },
    /// An expectation that is neither.
    #[error("expectation {expect:#x} is neither 0, denied, nor 1, readable")]
    Expectation {
        /// The expectation.
        expect: u64,
    },
    /// A digest of bytes that are no words, or of too many.
    #[error("a digest is of up to 16M of words, not of {len:#x} bytes at {gpa}")]
    Digest {
        /// The address.
        gpa: Gpa,
        /// The length in bytes.
        len: u64,
    },
    /// A device request at no multiple of 8.
    #[error("a device request lies at a multiple of 8, not at {gpa}")]
    Doorbell {
        /// The address.
        gpa: Gpa,
    },
}

impl RequestError {
    /// What the guest is told: -ENOSYS for what is no request, else -EINVAL.
    pub const fn errno(&self) -> i32 {
        match self {
            Self::Access { .. } | Self::Number { .. } => -38,
            _ => -22,
        }
    }
}

impl RequestError {
    /// Whether it was meant to be a request to convert.
    pub const fn is_conversion(&self) -> bool {
        matches!(self, Self::Range(_) | Self::Pages { .. } | Self::Attributes { .. })
    }
}

impl Request {
    /// The request of a `KVM_EXIT_IO`: `read` is whether it was IN, `bytes` how many it was of in
    /// all, `regs` is what `KVM_GET_REGS` gives now.
    ///
    /// # Errors
    /// [`RequestError::Access`] if it isn't an IN of 4 bytes from [`PORT`], and as
    /// [`Request::parse`].
    pub fn from_port(
        (read, port, bytes): (bool, u16, usize),
        regs: &kvm_regs,
    ) -> Result<Self, RequestError> {
        if (read, port, bytes) != (true, PORT, 4) {
            let kind = if read { "IN" } else { "OUT" };
            return Err(RequestError::Access { kind, port, bytes });
        }
        Self::parse(regs.rax, [regs.rbx, regs.rcx, regs.rdx, regs.rsi, regs.rdi])
    }

    /// The request of a `KVM_EXIT_HYPERCALL`: only `KVM_HC_MAP_GPA_RANGE` comes this way.
    ///
    /// # Errors
    /// [`RequestError::Number`] for any other number, and as [`Request::parse`].
    pub fn from_hypercall(number: u64, args: [u64; 6]) -> Result<Self, RequestError> {
        if number != KVM_HC_MAP_GPA_RANGE {
            return Err(RequestError::Number { number });
        }
        Self::parse(number, [args[0], args[1], args[2], args[3], 0])
    }

    /// The request with this number and these arguments.
    ///
    /// # Errors
    /// A [`RequestError`] that says which argument makes no sense.
    pub fn parse(number: u64, args: [u64; 5]) -> Result<Self, RequestError> {
        let [a, b, c, d, e] = args;
        Ok(match number {
            KVM_HC_MAP_GPA_RANGE => {
                let reserved = !(PAGE_SIZE_MASK | MAP_GPA_RANGE_ENCRYPTED);
                if c & reserved != 0 || c & PAGE_SIZE_MASK > PAGE_SIZE_LAST {
                    return Err(RequestError::Attributes { attributes: c });
                }
                let private = c & MAP_GPA_RANGE_ENCRYPTED != 0;
                let to = if private { Visibility::Private } else { Visibility::Shared };
                Self::Convert { pages: pages(a, b)?, to }
            }
            number::PROBE => {
                let expect = match c {
                    0 => HostAccess::Denied,
                    1 => HostAccess::Readable,
                    expect => return Err(RequestError::Expectation { expect }),
                };
                Self::Probe { pages: pages(a, b)?, expect }
            }
            number::DOORBELL if !a.is_multiple_of(WORD) => {
                return Err(RequestError::Doorbell { gpa: Gpa::new(a) });
            }
            number::DOORBELL => Self::Doorbell { request: Gpa::new(a) },
            number::MACHINE_CHECK => Self::MachineCheck { gpa: Gpa::new(a), status: b },
            number::NOTIFY => Self::Notify { queue: Gpa::new(a), size: b },
            number::DONE => Self::Done { checks_passed: a },
            number::FAILED => {
                Self::Failed { op: a, gpa: Gpa::new(b), expected: c, found: d, checks_passed: e }
            }
            number::EXCEPTION => Self::Exception { vector: a, rip: b, cr2: c, error: d },
            number::DIGEST => {
                let (gpa, words) = (Gpa::new(a), a.is_multiple_of(WORD) && b.is_multiple_of(WORD));
                if !words || b == 0 || b > DIGEST_LEN_MAX || gpa.checked_add(b).is_none() {
                    return Err(RequestError::Digest { gpa, len: b });
                }
                Self::Digest { gpa, len: b, digest: c, op: d }
            }
            number => return Err(RequestError::Number { number }),
        })
    }
}

fn pages(gpa: u64, pages: u64) -> Result<GfnRange, RequestError> {
    if pages > 1 << (u64::BITS - PAGE_SHIFT) {
        return Err(RequestError::Pages { pages });
    }
    // The whole space is 2^64 bytes, which only starts at 0 and is no memory we have.
    let size = pages.checked_mul(PAGE_SIZE).ok_or(RequestError::Pages { pages })?;
    GfnRange::from_bytes(gpa, size).map_err(RequestError::Range)
}

/// The status of a device request that nobody has answered: positive, and so no answer.
pub const DEVICE_PENDING: i64 = 1;

/// The longest payload: 1 MiB.
pub const DEVICE_LEN_MAX: u64 = 1 << 20;

/// Where in a device request the status lies, in bytes.
pub const STATUS_OFFSET: u64 = 32;

/// Which of its words the status is.
pub(super) const STATUS_WORD: i32 = 4;

/// A device request as it lies in shared memory: five little-endian words, the number, the
/// payload's address, the length of payload and answer in bytes, the answer's address, and the
/// status. Of the request, the device writes the status alone: 0, or a negative errno.
///
/// The device reads all of the payload before it writes any of the answer, and writes nothing of
/// the answer if it may not reach all of both: -EFAULT then. -EINVAL is for a request that does not
/// parse. A request that it may not even read is answered at the doorbell, with -EFAULT.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct DeviceRequest {
    /// The request's number.
    pub id: u64,
    /// The payload's address.
    pub source: Gpa,
    /// The length in bytes of payload and answer: a multiple of 8, not 0, at most
    /// [`DEVICE_LEN_MAX`].
    pub len: u64,
    /// The answer's address.
    pub destination: Gpa,
}

/// Why a device request makes no sense.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, thiserror::Error)]
pub enum DeviceRequestError {
    /// The length is none.
    #[error("device request {id} is of {len:#x} bytes; expected a multiple of 8 up to 1M")]
    Len {
        /// The request's number.
        id: u64,
        /// The length in bytes.
        len: u64,
    },
    /// An address is no multiple of 8, or the bytes from there reach past the address space.
    #[error("device request {id} has no {len:#x} bytes of words at {gpa}")]
    Address {
        /// The request's number.
        id: u64,
        /// The address.
        gpa: Gpa,
        /// The length in bytes.
        len: u64,
    },
}

impl DeviceRequest {
    /// Bytes of a device request, the status included.
    pub const BYTES: u64 = STATUS_OFFSET + WORD;

    /// The request that these words are; the status is not looked at.
    ///
    /// # Errors
    /// [`DeviceRequestError`] if the length is none, or an address has no such bytes.
    pub fn parse(words: [u64; 5]) -> Result<Self, DeviceRequestError> {
        let [id, source, len, destination, _status] = words;
        if len == 0 || !len.is_multiple_of(WORD) || len > DEVICE_LEN_MAX {
            return Err(DeviceRequestError::Len { id, len });
        }
        let [source, destination] = [source, destination].map(Gpa::new);
        for gpa in [source, destination] {
            if !gpa.get().is_multiple_of(WORD) || gpa.checked_add(len).is_none() {
                return Err(DeviceRequestError::Address { id, gpa, len });
            }
        }
        Ok(Self { id, source, len, destination })
    }

    /// The words of a new request, with the status pending.
    pub const fn words(&self) -> [u64; 5] {
        let status = DEVICE_PENDING.cast_unsigned();
        [self.id, self.source.get(), self.len, self.destination.get(), status]
    }
}

#[cfg(test)]
#[path = "request_tests.rs"]
mod tests;
