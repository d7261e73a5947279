//! A small VMM, and the guest it runs: the proof that a guest lives on Polder's memory.
//!
//! - [`scenario`]: what a guest does, as data: lists of [`Op`](scenario::Op).
//! - [`guest`]: an image of it that a KVM vCPU runs, and the requests a guest makes.
//! - [`run`](run()): a VM with that guest, on memory of [`polder`]; what came of it is a
//!   [`Report`].
//! - [`run_from`]: a guest on memory that is filled from a file while it runs.
//! - [`doctor`]: what this machine offers to all that.
//! - [`Accesses`]: how a guest on the simulated machine reaches its memory.
//! - [`Vm`]: a VM whose guest does what it is told, on memory that somebody else made.

mod accesses;
mod device;
pub mod doctor;
mod error;
mod from;
pub mod guest;
mod intruder;
mod kvm;
mod machine;
mod machine_check;
mod prefault;
mod report;
mod requests;
mod roots;
mod run;
pub mod scenario;
mod threads;
mod vcpu;
mod virtqueue;
mod vm;

pub use accesses::{Accepting, Accesses, Changed, Rescinded};
pub use error::RunError;
pub use from::{FromConfig, FromReport, run_from};
pub use intruder::Way;
pub use kvm::{Conversion, check_kvm};
pub use machine_check::{MachineCheck, OnFailedPage};
pub use prefault::Prefault;
pub use report::{Accelerator, Ahead, End, Failure, Progress, Report, Supervision};
pub use requests::{Expected, Next, Requests};
pub use roots::GuestRoot;
pub use run::{Config, run};
pub use virtqueue::VirtqueueStatistics;
pub use vm::{Ended, IdleVcpu, Vm};
