//! The guest as a KVM vCPU runs it: 64-bit long mode, its ops interpreted in ring 3.
//!
//! ```text
//! ring 3   interpreter: fill, check, load, store     native, also where ring 0 is emulated
//!             | ud2 at the gate                      the one way down that works everywhere
//! ring 0   stub: IN from PORT, or the hypercall      number and arguments stay in registers
//!             | KVM_EXIT_IO or KVM_EXIT_HYPERCALL
//! VMM      Request::from_port, Request::from_hypercall
//! ```
//!
//! On a para-virtual KVM (shadow paging, no VMX or SVM below) ring 0 is emulated one instruction
//! at a time and `syscall`, `int n` and port I/O from ring 3 do not work. So all work is in ring 3
//! and ring 0 is a few instructions of the plainest kind: no SSE, no POPCNT, no CMPXCHG16B. Where
//! KVM has the CPU's own virtualization the same image runs as well.
//!
//! Nothing here waits with a limit: a guest whose vCPU 2 has failed leaves vCPU 0 waiting for its
//! flag. The VMM stops all vCPUs at the first final request that is not [`Request::Done`].
//!
//! Any other exception goes to a stub that reports it ([`Request::Exception`]), so that a guest
//! never ends in a silent triple fault, unless it is the [`Program`] that does just that.

mod boot;
mod code;
mod image;
mod interpreter;
mod probe;
mod record;
mod request;
mod stub;
mod tables;

pub use boot::VcpuStart;
pub use code::{Program, Transport};
pub use image::{Chunk, Image, ImageError};
pub use probe::HypercallProbe;
pub(crate) use record::mask;
pub use request::{
    DEVICE_LEN_MAX, DEVICE_PENDING, DIGEST_LEN_MAX, DeviceRequest, DeviceRequestError,
    KVM_HC_MAP_GPA_RANGE, MAP_GPA_RANGE_ENCRYPTED, PORT, Request, RequestError, STATUS_OFFSET,
    number,
};
