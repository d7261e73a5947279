//! What a pointer reaches that a device keeps longer than its `vm-memory` slice, once the guest has
//! taken the page back. What it is about is in `docs/security.md`.

use std::os::unix::process::ExitStatusExt;
use std::process::Command;
use std::sync::Arc;

use polder::units::{Gfn, PageCount, PageRange};
use polder::vm_memory::{GuestAddress, GuestMemoryBackend};
use polder::{Contents, Holder, Memory, OnBusy, PageSize, Slot, Visibility};
use polder_require::{Facility, HugetlbPages, require};

const SECRET: &[u8; 6] = b"secret";
const PAGE: u32 = 3;
const AT: u32 = PAGE * 4096;

/// A pointer that was kept from a slice of a page that is the guest's now, with a secret in it; and
/// what it points into.
struct Kept {
    pointer: *const [u8; 6],
    memory: Arc<Memory>,
}

fn kept(page_size: PageSize) -> Option<Kept> {
    let kvm = kvm_ioctls::Kvm::new().and_then(|kvm| kvm.create_vm());
    let kvm = require(Facility::Kvm, kvm)?;
    let memory = Memory::builder(PageCount::from(512)).page_size(page_size).build();
    let memory = Arc::new(require(Facility::Userfault, memory)?);
    let vm = memory.attach(Arc::new(kvm)).expect("a new VM");
    let all = PageRange::between(0, 512).expect("not empty");
    memory.bind(vm, Slot(0), Gfn::from(0), all).expect("nothing else is bound");
    let page = PageRange::one(PAGE.into());
    let to = |to| memory.convert(page, to, Contents::Preserve, OnBusy::Refuse);
    to(Visibility::Shared).expect("nobody has it");
    let guest = memory.guest_memory(vm, Holder::new("virtio-net"), OnBusy::Wait).expect("a slot");
    let regions = guest.regions();
    let slice = regions.get_slice(GuestAddress(AT.into()), 6).expect("the page is shared");
    let pointer = slice.ptr_guard_mut().as_ptr().cast_const().cast();
    to(Visibility::Private).expect_err("the slice has it pinned");
    drop(slice);
    to(Visibility::Private).expect("nobody has it any more");
    memory.preload(page, SECRET).expect("the guest has not begun");
    Some(Kept { pointer, memory })
}

impl Kept {
    fn is_of_the_host_view(&self) -> bool {
        let view = self.memory.host_view().as_ptr().expect("it is memory of this process");
        self.pointer.addr() == view.addr() + AT as usize
    }

    fn read(&self) -> [u8; 6] {
        // SAFETY: it points into a view of the memory, which is mapped as long as that is there.
        // If the page is not shown there the touch raises SIGBUS, which a test is about.
        unsafe { self.pointer.read_volatile() }
    }
}

/// The host view shows a hugetlb page only while all of it is shared, so slices point elsewhere.
#[test]
fn a_pointer_kept_from_a_slice_of_a_hugetlb_page_reads_the_guests_secret() {
    let Some(_pages) = require(Facility::HugePages, HugetlbPages::of_2m(1)) else { return };
    let Some(kept) = kept(PageSize::Huge2M) else { return };
    assert!(!kept.is_of_the_host_view());
    assert_eq!(&kept.read(), SECRET);
}

/// The touch of [`a_pointer_kept_from_a_slice_of_a_small_page_ends_the_process`], in one of its
/// own.
#[test]
fn kept_pointer() {
    if std::env::var_os("POLDER_KEPT_POINTER").is_some() {
        println!("read {:?}", kept(PageSize::Small).expect("its parent has checked").read());
    }
}

#[test]
fn a_pointer_kept_from_a_slice_of_a_small_page_ends_the_process() {
    let Some(kept) = kept(PageSize::Small) else { return };
    assert!(kept.is_of_the_host_view());
    let itself = std::env::current_exe().expect("procfs");
    let child = Command::new(itself)
        .args(["--exact", "kept_pointer", "--nocapture"])
        .env("POLDER_KEPT_POINTER", "1")
        .output()
        .expect("our own program starts");
    assert_eq!(child.status.signal(), Some(libc::SIGBUS), "{child:?}");
}
