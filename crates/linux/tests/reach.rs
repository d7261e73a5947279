//! Who reaches a page that the host view denies: the ways that need `unsafe` to be tried. What they
//! are about is in `docs/security.md`.

use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::Arc;

use polder_linux::{Errno, GuestMemfd, Memfd, Userfault, View};
use polder_require::{Facility, require};
use polder_units::{PageCount, PageRange};
use rustix::mm::{MapFlags, ProtFlags};

fn page(at: u64) -> PageRange {
    PageRange::between(at, at + 1).expect("a range in the test")
}

/// A memfd of two pages of `secret`, a view of it, and a watched one from which page 0 was taken.
fn denied(secret: u8) -> Option<(Arc<Memfd>, View, Userfault)> {
    let memfd = Arc::new(Memfd::new("polder-test", PageCount::from(2)).expect("memfd_create"));
    let trusted = View::new(&memfd).expect("mmap");
    let host = Arc::new(View::new(&memfd).expect("mmap"));
    let host = require(Facility::Userfault, Userfault::new(host))?;
    trusted.write(0, &[secret; 2 * 4096]).expect("nobody watches this view");
    host.watch(PageRange::between(0, 2).expect("two pages")).expect("UFFDIO_REGISTER of shmem");
    host.poison(page(0)).expect("UFFDIO_POISON");
    assert!(host.view().read(0, &mut [0]).is_err(), "the host view denies it");
    Some((memfd, trusted, host))
}

/// Maps a page of the memfd anew, and reads its first byte.
fn by_second_mapping(memfd: &Memfd) -> u8 {
    let flags = MapFlags::SHARED;
    // SAFETY: a new mapping, where there is none; nothing else knows of it.
    let at = unsafe {
        rustix::mm::mmap(core::ptr::null_mut(), 4096, ProtFlags::READ, flags, memfd.as_fd(), 0)
    };
    let at = at.expect("a second mapping");
    // SAFETY: it is mapped, readable, and of a file that does not shrink.
    let byte = unsafe { at.cast::<u8>().read_volatile() };
    // SAFETY: the mapping made above, to which no reference exists.
    unsafe { rustix::mm::munmap(at, 4096) }.expect("munmap");
    byte
}

#[test]
fn a_second_mapping_of_the_descriptor_shows_what_the_host_view_denies() {
    let Some((memfd, ..)) = denied(0x5a) else { return };
    assert_eq!(by_second_mapping(&memfd), 0x5a);
}

#[test]
fn a_forked_child_has_the_descriptor_and_can_map_it() {
    let Some((memfd, ..)) = denied(0x5b) else { return };
    // SAFETY: the child makes system calls and ends; it takes no lock.
    let child = unsafe { libc::fork() };
    if child == 0 {
        let reached = by_second_mapping(&memfd) == 0x5b;
        // SAFETY: ends the child at once.
        unsafe { libc::_exit(i32::from(reached)) };
    }
    let mut status = 0;
    // SAFETY: waits for our own child.
    assert_eq!(unsafe { libc::waitpid(child, &raw mut status, 0) }, child);
    assert!(libc::WIFEXITED(status) && libc::WEXITSTATUS(status) == 1, "{status:#x}");
}

/// Has the kernel refer to page 0 by the host view, in which it is mapped first.
fn vmsplice(host: &Userfault) -> OwnedFd {
    host.view().zap(page(0)).expect("MADV_DONTNEED lifts the marker");
    host.resume(page(0)).expect("UFFDIO_CONTINUE");
    let (out, into) = rustix::pipe::pipe().expect("pipe");
    let iovec = libc::iovec { iov_base: host.view().as_ptr().cast(), iov_len: 4096 };
    // SAFETY: the bytes lie in the view, which stays mapped; the kernel only refers to the page.
    let spliced = unsafe { libc::vmsplice(into.as_raw_fd(), &raw const iovec, 1, 0) };
    assert_eq!(spliced, 4096, "{}", std::io::Error::last_os_error());
    host.view().zap(page(0)).expect("MADV_DONTNEED");
    host.poison(page(0)).expect("UFFDIO_POISON");
    assert!(host.view().read(0, &mut [0]).is_err(), "cut off, as by a conversion to private");
    out
}

fn first_byte(pipe: &OwnedFd) -> u8 {
    let mut byte = [0];
    assert_eq!(rustix::io::read(pipe, &mut byte), Ok(1));
    byte[0]
}

#[test]
fn a_reference_that_vmsplice_took_reads_what_is_written_after_the_host_was_cut_off() {
    let Some((_memfd, trusted, host)) = denied(1) else { return };
    let pipe = vmsplice(&host);
    trusted.write(0, &[0x77]).expect("as the guest writes its private page");
    assert_eq!(first_byte(&pipe), 0x77);
}

/// Where private pages are other memory, the shared page is freed at the conversion.
#[test]
fn a_reference_that_vmsplice_took_keeps_the_old_page_where_that_was_freed() {
    let Some((memfd, trusted, host)) = denied(1) else { return };
    let pipe = vmsplice(&host);
    memfd.punch_hole(page(0)).expect("fallocate");
    trusted.write(0, &[0x77]).expect("nobody watches this view");
    assert_eq!(first_byte(&pipe), 1, "what the host had anyway");
}

/// Closed to the host: by mapping, by reading, by writing.
#[test]
fn a_guest_memfd_of_private_pages_can_neither_be_mapped_nor_read_nor_written() {
    let made = kvm_ioctls::Kvm::new().and_then(|kvm| kvm.create_vm());
    let Some(vm) = require(Facility::Kvm, made) else { return };
    let made = GuestMemfd::new(&vm, PageCount::from(1));
    let Some(memfd) = require(Facility::SharedGuestMemfd, made) else { return };
    let flags = ProtFlags::READ | ProtFlags::WRITE;
    // SAFETY: a new mapping, where there is none; it is refused.
    let mapped = unsafe {
        rustix::mm::mmap(core::ptr::null_mut(), 4096, flags, MapFlags::SHARED, memfd.as_fd(), 0)
    };
    assert_eq!(mapped.map(|_| ()), Err(Errno::NODEV));
    assert!(rustix::io::pread(memfd.as_fd(), &mut [0], 0).is_err());
    assert!(rustix::io::pwrite(memfd.as_fd(), &[0], 0).is_err());
}
