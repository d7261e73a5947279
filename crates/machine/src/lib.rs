//! A simulated machine for guest memory: what Polder runs on where there is no KVM, and what its
//! protocols are searched on.
//!
//! A [`Machine`] is data. Each call is one step of one actor (a CPU, the kernel, a device), taken
//! whole; between two calls anything else may happen, and a clone tries both orders. There is no
//! clock, no thread and no randomness in it. A driver with real threads puts it behind a mutex.
//!
//! ```text
//!  process: VMAs -> host page table -> TLB ─┐
//!  GUP, GUP-fast: host page table -> pin ───┤
//!  device: a pin, or IOMMU domain -> IOTLB ─┼─> frame ── folio: lock, refs, mapcount, pincount
//!  guest: slots -> stage 2, of a root -> TLB ┤               └─ page cache of an object
//!  the driver's trusted view: direct map ───┘
//! ```
//! Where a line reaches the frame, hardware may refuse it: the RMP, on a machine with SNP; stage 2
//! of the host, and the IOMMU, on one with pKVM.
//!
//! # Vocabulary
//! | word | here |
//! |---|---|
//! | frame, pfn | 4 KiB of physical memory, and its number |
//! | folio | a block of frames of one level, allocated and counted as one |
//! | object | a memfd or guest_memfd: a page cache from page index to folio |
//! | VMA, watched | a process's mapping of an object; one with a userfaultfd on it |
//! | slot | guest frames bound to pages of an object, as a KVM memslot |
//! | vpn, hva | a page of a process, and an address in it |
//! | root | what a vCPU's translations begin at: TDP, or shadows of tables in guest memory |
//! | trusted view | the driver's own access to an object's bytes, by offset |
//! | foreign reference | one that neither page cache nor host page tables explain |
//!
//! # What is modelled
//! - **Stale translations.** Changing a host page table or stage 2 leaves every TLB as it is; each
//!   CPU's is flushed by a step of its own. What a TLB holds works, also on frames freed since.
//! - **Counts.** As in mm/: page cache, mappings and pins hold references, stage 2 none. Who checks
//!   counts sees GUP-fast's transient references, also on folios that GUP-fast never meant.
//! - **Races.** GUP-fast is three steps. A stage-2 fault is two, with `mmu_invalidate_seq` between
//!   them. Unmapping, flushing, locking, checking and punching are a step each.
//! - **Roots.** Guest-physical addresses by TDP; linear ones by shadows of the guest's page tables,
//!   where hardware has no TDP; those of a guest's guest by shadows of the nested tables that the
//!   guest made. Write-tracking, rmap, tables out of sync, switches while the vCPU runs:
//!   `shadow.rs`, `root.rs`. A guest reads and writes its own tables as any memory.
//! - **Accessed and dirty bits** of stage 2 and of the guest's tables, as walks set them.
//! - **Dirty logs** of slots, which take what walks and the hypervisor write (`dirty.rs`).
//! - **Anonymous memory** of guests: the zero page, and copies at the first write (`anonymous.rs`).
//! - **Waiting.** Nothing blocks: a touch that must wait says why, changes nothing, and is made
//!   again.
//! - **SEV-SNP**, if enabled: the reverse map table, its instructions with every result, access
//!   checks and ciphertext. See `docs/snp.md`.
//! - **pKVM**, if enabled: a hypervisor with a table for host, itself, guests and IOMMU, and its
//!   hypercalls, which change them together or not at all. See `docs/pkvm.md`.
//! - **An IOMMU**: domains with page tables, faults, and an IOTLB that stays stale until flushed.
//! - **The direct map**, which frames can be taken out of; **migration** of folios; **exclusive
//!   pins**, beside a kernel without them.
//! - **A pool of huge pages**, and the tables that a split of one takes: see
//!   [`Machine::fill_pool`].
//! - **Memory that runs out**, by size or by [`Machine::fail_allocation`].
//! - **Bugs**, when planted: see [`Plant`].
//!
//! # What can fail
//! | what | how it shows |
//! |---|---|
//! | a touch of an absent page | [`HostExit::Fault`], [`Exit::Fault`] |
//! | a touch of a denied page | [`HostExit::Sigbus`] |
//! | an allocation | [`Error::NoMemory`]; in a fault, a `SIGBUS` |
//! | an access that the RMP does not let through | [`Refused`], and what its [`AccessFault`] says |
//! | an instruction on the RMP | an [`RmpFail`], which has its code |
//! | an access that pKVM's stage 2 or the direct map lacks | [`Refused`], likewise |
//! | a hypercall of pKVM's | a [`PkvmFail`], which has the kernel's code |
//! | memory of the hypervisor's tables | [`PkvmFail::NoMemory`], by [`Machine::fail_hypervisor`] |
//! | a device's access | [`Error::Iommu`] |
//! | a pin that another pin keeps out | [`HostExit::Pinned`] |
//! | a folio lock held by another | [`Error::Locked`], [`HostExit::Wait`] |
//! | a fault resolved before an invalidation | [`Error::Stale`] |
//! | a driver's mistake | an [`Error`] that changed nothing |
//! | a guest's mistake | an exit; no guest can make a call panic |
//! | a count of ours below what is held | a panic |
//!
//! # What is not modelled
//! - Of pKVM and the IOMMU: entries above 4K; the heads of `pkvm.rs` and `iommu.rs` have it all.
//! - A device without a domain (`dma_read`, `dma_write`) goes by what it pinned: an IOMMU in
//!   passthrough.
//! - Of SNP: VMPLs but 0, attestation, page swap and move; the head of `rmp.rs` has it
//!   all.
//! - Memory order: a step sees all earlier ones. Torn words and store buffers do not exist.
//! - An access of many pages is one step, and so is a range that is unmapped, poisoned or pinned
//!   by the slow path. To see another actor between two pages, use two calls.
//! - `mmu_gather`: the kernel frees pages only after the flush. Here the order of unmap, flush and
//!   punch is the caller's, so that a wrong order can be seen.
//! - GUP-fast's disabled interrupts keep page *tables* from being freed under it; here they are
//!   never looked at after they are gone.
//! - TLBs are direct-mapped, one a CPU, and tell a vCPU's roots apart, but no VMs or processes,
//!   each of which has its CPUs to itself. What walks pass on their way is not remembered. An entry
//!   may be evicted by another: a stale one that a search must see needs a TLB as large as the
//!   pages it looks at.
//! - Of guest page tables: NX, global pages, PAE and five levels, supervisor accesses.
//! - In host page tables: accessed and dirty bits, write protection of single entries, `mprotect`,
//!   partial `munmap`, anonymous memory (which no process maps), swap.
//! - `FOLL_LONGTERM` refuses nothing and migrates nothing; it is remembered as the pin's purpose.
//!
//! # Example
//! ```
//! use polder_machine::{Config, Exit, Machine, Side};
//! use polder_units::{Gfn, Gpa, Level, PageCount, PageIndex, PageRange};
//!
//! let mut machine = Machine::new(Config::x86_64(PageCount::from(4096)))?;
//! let object = machine.create_object(PageCount::from(1024))?;
//! let vm = machine.create_vm()?;
//! let vcpu = machine.add_vcpu(vm)?;
//! let all = PageRange::new(PageIndex::from(0), PageCount::from(1024))?;
//! machine.bind(vm, Gfn::from(0), object, all)?;
//!
//! let gpa = Gpa::new(0x20_1008);
//! let Err(Exit::Fault(fault)) = machine.vcpu(vcpu)?.write_u64(gpa, Side::Shared, 7) else {
//!     panic!("nothing is mapped yet");
//! };
//! machine.allocate(object, PageIndex::from(512), Level::Size2M)?;
//! let resolved = machine.tdp_resolve(vm, fault.gfn)?;
//! machine.tdp_map(&resolved, resolved.largest(), true)?;
//! machine.vcpu(vcpu)?.write_u64(gpa, Side::Shared, 7)?;
//!
//! let mut bytes = [0; 8];
//! machine.object_read(object, gpa.get(), &mut bytes)?;
//! assert_eq!(u64::from_le_bytes(bytes), 7);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

#![no_std]

extern crate alloc;
#[cfg(test)]
extern crate std;

mod access;
mod anonymous;
mod audit;
mod chunk;
mod direct_map;
mod dirty;
mod error;
mod folio;
mod frames;
mod guest;
mod guest_table;
mod gunyah;
mod gup;
mod host_mmu;
mod host_touch;
mod iommu;
mod machine;
mod migrate;
mod mmu;
mod nested;
mod object;
mod pkvm;
mod plant;
mod pool;
mod process;
mod reshape;
mod rmp;
mod root;
mod search;
mod shadow;
mod slab;
mod table;
mod tdp;
mod tlb;
mod userfault;
mod vm;
mod vm_ops;

pub use access::{AccessCheck, AccessFault, Path, Refused};
pub use audit::Discrepancy;
pub use error::Error;
pub use folio::{Counts, GUP_PIN_COUNTING_BIAS, LockOwner};
pub use frames::Contents;
pub use guest::{Exit, GuestFault, Op, Ran, Request, Side, Vcpu, VcpuId};
pub use guest_table::{Pte, Untranslated};
pub use gunyah::{MEM_RECLAIM, Memparcel, Transfer};
pub use gup::{GupFast, GupStep, Holder, PinKind};
pub use host_mmu::HostPte;
pub use host_touch::{HostExit, HostFault, Sigbus};
pub use iommu::IommuFault;
pub use machine::{Config, Machine};
pub use mmu::{Alias, PageFault, Touch};
pub use nested::Intercept;
pub use object::Backing;
pub use pkvm::{Ask, Component, PageState, PkvmFail, PkvmResult};
pub use plant::Plant;
pub use pool::PoolCounts;
pub use process::{Thread, View};
pub use rmp::{Asid, FirmwareFail, RmpEntry, RmpFail, RmpOwner, RmpResult, RmpSize, RmpUpdate};
pub use root::{L2, Root};
pub use slab::{DomainId, ObjectId, PinId, ProcessId, VmId};
pub use tdp::{Resolved, Spte};
pub use vm::Bound;
pub use vm_ops::VmOps;

pub use polder_units::{Hva, Vpn, VpnRange};
