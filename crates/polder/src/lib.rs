//! A virtual machine's memory: private and shared pages in one object, converted in place.
//!
//! ```no_run
//! use std::sync::Arc;
//! use polder::kvm_ioctls::Kvm;
//! use polder::units::{ByteSize, Gfn, Gpa, GfnRange};
//! use polder::{Contents, Memory, OnBusy, Slot, Visibility};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let vm = Arc::new(Kvm::new()?.create_vm()?);
//! let memory = Memory::builder("64M".parse::<ByteSize>()?.pages()?).build()?;
//! let vm = memory.attach(vm)?;
//! memory.bind(vm, Slot(0), Gfn::from(0), memory.all_pages())?;
//!
//! let page = GfnRange::one(Gpa::new(0x1000).gfn());
//! assert!(memory.write(vm, Gpa::new(0x1000), b"hello").is_err()); // private: the guest's alone
//! memory.convert_gfns(vm, page, Visibility::Shared, Contents::Preserve, OnBusy::Wait)?;
//! memory.write(vm, Gpa::new(0x1000), b"hello")?;
//! # Ok(())
//! # }
//! ```
//!
//! # Contents
//!
//! | to | see |
//! |---|---|
//! | make memory, for a host and a kind of VM | [`Memory::builder`], [`Builder`], [`HostKind`], [`Platform`] |
//! | show it to a VM | [`Memory::attach`], [`Memory::bind`], [`Memory::unbind`] |
//! | make pages private and shared | [`Memory::convert`], [`Memory::convert_gfns`], [`Contents`]; wishes: [`Memory::want`] |
//! | copy bytes | [`Memory::read`], [`Memory::write`] |
//! | give device models pointers | [`Memory::guest_memory`] with the traits of `vm-memory`; [`Memory::host_view`], [`HostView`]; pages that have to stay shared: [`Memory::pin`], [`Memory::pinner`], [`Pin`] |
//! | give a device behind an IOMMU what is shared | [`Memory::attach_dma`], [`Dma`] |
//! | have the kernel read files straight into pages | [`Memory::ring`], [`Ring`]; [`HostView::read_from`] |
//! | drop contents | [`Memory::discard`] |
//! | fill memory while the guest runs, by touch | from a file, or what you have: [`Builder::source`], [`Source`](trait@Source), [`source::FileSource`], [`Memory::fill`], [`Memory::fetch`] |
//! | the same by your own hand | [`Builder::owed`], [`Memory::populate`], [`Memory::fail`], [`Memory::settle`] |
//! | put bytes onto private pages before the guest begins | [`Memory::preload`], [`Memory::launch`] |
//! | map ahead of a guest's touches, keep it in memory | [`Memory::prefault`], [`Memory::lock`] |
//! | have huge pages | [`Builder::page_size`], [`PageSize`], [`Memory::collapse_all`], [`Memory::merge`], [`HugePool`] |
//! | move pages to other memory | [`Memory::move_pages`] |
//! | run a vCPU, handle its exits | [`linux::in_guest`], [`Memory::guest_fault`], [`MemoryFault`], [`Memory::page_of_failure`] |
//! | learn why | [`Memory::explain`], [`Explanation`]; [`Error`], [`Refusal`], [`Error::way_out`] |
//! | log what is written, to snapshot or migrate it | [`Memory::start_dirty_log`], [`Memory::take_dirty_log`], [`DirtyPages`] |
//! | count | [`Memory::statistics`], [`Memory::facts`], [`Memory::resident`] |
//! | speak the kernel's names and error codes | [`kvm`] |
//! | run a guest on the simulated machine | [`MachineVcpu`], [`Memory::simulated`], [`machine`] |
//! | see an operation from inside | [`Memory::watch`], [`Watch`] |
//!
//! A whole VMM is `examples/tiny_vmm.rs`; how to put Polder into one that exists, step by step, is
//! in `docs/vmm.md`, and what a device model does in `docs/devices.md`.
//!
//! # What fails
//! Every call that can fail returns an [`Error`] and has then changed nothing, unless it says so: a
//! conversion is all or nothing. What is refused names the page and who holds it.
//! [`Error::errno`] is the kernel's code for it, [`Error::way_out`] what to do about it.
//!
//! # Inside
//! [`Memory`] is the engine ([`polder_engine`]: what may happen, and in which order), a host (where
//! the bytes live and what cuts people off from them) and a driver between the two. The engine's
//! lock is never held across a system call, nor while guest memory is touched.

/// The README's Rust is compiled.
#[cfg(doctest)]
#[doc = include_str!("../../../README.md")]
struct Readme;

/// So is the VMM of `docs/vmm.md`.
#[cfg(doctest)]
#[doc = include_str!("../../../docs/vmm.md")]
struct Vmm;

/// So is the migration of `docs/dirty-log.md`.
#[cfg(doctest)]
#[doc = include_str!("../../../docs/dirty-log.md")]
struct DirtyLog;

/// So is the device of `docs/devices.md`.
#[cfg(doctest)]
#[doc = include_str!("../../../docs/devices.md")]
struct Devices;

mod dirty;
mod dma;
mod driver;
mod error;
mod explain;
mod faults;
pub mod guest_memory;
mod host;
mod host_view;
mod huge_pool;
pub mod kvm;
mod memory;
mod move_pages;
mod page_size;
mod pager;
mod pin;
mod prefault;
mod read_ahead;
mod ring;
pub mod source;
mod statistics;
mod sync;
mod unpinned;
mod vcpu;
mod watch;

/// The crate of the VMs and vCPUs that [`Memory::attach`] and [`Memory::prefault`] take, in the
/// version that they are of.
pub use kvm_ioctls;
#[cfg(feature = "plant")]
pub use polder_engine::Bug;
pub use polder_engine::pool::{self, PoolCounts};
pub use polder_engine::{
    Binding, Contents, Errno, FolioCounts, Holder, LevelLimits, Limit, MemoryFault, PageFacts,
    PinId, PinKind, Platform, Population, Refusal, ReshapeCounts, Response, Slot, Step, View,
    Visibility, VmId, Wish,
};
/// The kernel's interfaces, made safe. A VMM wants [`linux::in_guest`] around `VcpuFd::run`: a
/// guest's touch of a page that did not come (its source failed, or it is in quarantine) is a
/// SIGBUS for the vCPU's thread, which would end the process. With it, the touch is told beside the
/// exit, and [`Memory::page_of_failure`] names the page.
pub use polder_linux as linux;
/// The simulated machine, for who looks into it by [`Memory::simulated`].
pub use polder_machine as machine;
/// The numbers of guest memory, each a type of its own.
pub use polder_units as units;
/// The crate whose traits [`guest_memory`] has, in the version that it has them of.
pub use vm_memory;

pub use dirty::DirtyPages;
pub use dma::{Device, Dma, SimulatedDevice};
pub use error::Error;
pub use explain::{
    BindingFacts, ClaimFacts, Explanation, HostState, MappingLimit, PastOperation, PinFacts,
    RmpFacts,
};
pub use host::machine::KernelPin;
pub use host::{HostKind, Vm};
pub use host_view::HostView;
pub use huge_pool::HugePool;
pub use memory::{Builder, Memory, OnBusy};
pub use page_size::{PageSize, UnknownPageSize};
pub use pager::SourceStatistics;
pub use pin::{DeadPin, Pin, Pinner};
pub use prefault::{Prefaulted, Vcpu};
pub use read_ahead::ReadAhead;
pub use ring::{Completed, Ring};
pub use source::{Delivery, Source};
pub use statistics::{RmpStatistics, Statistics};
pub use vcpu::{GuestExit, MachineVcpu};
pub use watch::{Delays, Moment, Reached, UnknownStage, Watch};
