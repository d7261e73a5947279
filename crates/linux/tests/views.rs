//! What becomes of a touch that is denied, of a child, and of a stray pointer.

use std::os::unix::process::ExitStatusExt;
use std::process::Command;
use std::sync::Arc;

use polder_linux::{Continued, Memfd, Touched, Userfault, View};
use polder_require::{Facility, require};
use polder_units::{PageCount, PageIndex, PageRange};

fn pages(start: u64, end: u64) -> PageRange {
    PageRange::between(start, end).expect("a range in the test")
}

fn view(count: u32) -> Arc<View> {
    let memfd = Arc::new(Memfd::new("polder-test", PageCount::from(count)).expect("memfd_create"));
    Arc::new(View::new(&memfd).expect("mmap"))
}

fn watched(count: u32) -> Option<Userfault> {
    let userfault = require(Facility::Userfault, Userfault::new(view(count)))?;
    userfault.watch(pages(0, count.into())).expect("UFFDIO_REGISTER of shmem");
    Some(userfault)
}

#[test]
fn a_copy_ends_at_the_first_byte_denied() {
    let Some(userfault) = watched(4) else { return };
    let view = userfault.view();
    let other = View::new(view.memfd()).expect("mmap");
    other.write(0, &[3; 3 * 4096]).expect("nobody watches this view");
    assert_eq!(userfault.resume(pages(0, 3)), Ok(Continued::Mapped));
    assert_eq!(userfault.resume(pages(0, 4)), Ok(Continued::Missing(PageIndex::from(3))));
    view.zap(pages(2, 3)).expect("MADV_DONTNEED");
    userfault.poison(pages(2, 3)).expect("UFFDIO_POISON");
    let mut bytes = [0; 3 * 4096];
    assert_eq!(view.read(100, &mut bytes[100..]), Err(Touched { offset: 2 * 4096 }));
    assert_eq!((bytes[99], bytes[100], bytes[8191], bytes[8192]), (0, 3, 3, 0));
    assert_eq!(view.write(8192, &[1]), Err(Touched { offset: 8192 }));
    view.zap(pages(2, 3)).expect("MADV_DONTNEED lifts the marker");
    assert_eq!(userfault.resume(pages(2, 3)), Ok(Continued::Mapped));
    assert_eq!(view.read(8192, &mut bytes[..1]), Ok(()));
    assert_eq!(bytes[0], 3);
}

#[test]
fn a_child_has_no_view() {
    let view = view(1);
    view.write(0, &[1]).expect("nobody watches this view");
    // SAFETY: the child does nothing but touch memory and end.
    let child = unsafe { libc::fork() };
    if child == 0 {
        let denied = view.read(0, &mut [0]).is_err();
        // SAFETY: ends the child at once.
        unsafe { libc::_exit(i32::from(denied)) };
    }
    let mut status = 0;
    // SAFETY: waits for our own child.
    assert_eq!(unsafe { libc::waitpid(child, &raw mut status, 0) }, child);
    assert!(libc::WIFSIGNALED(status), "the child read the view: {status:#x}");
    assert_eq!(libc::WTERMSIG(status), libc::SIGSEGV);
}

/// The touch of [`a_stray_touch_of_a_denied_page_ends_the_process`], in a process of its own.
#[test]
fn stray_touch() {
    if std::env::var_os("POLDER_STRAY_TOUCH").is_none() {
        return;
    }
    let userfault = watched(1).expect("its parent has checked");
    userfault.poison(pages(0, 1)).expect("UFFDIO_POISON");
    // SAFETY: the view is mapped; the touch raises SIGBUS, which is the point.
    let byte = unsafe { userfault.view().as_ptr().read_volatile() };
    println!("read {byte}");
}

#[test]
fn a_stray_touch_of_a_denied_page_ends_the_process() {
    if watched(1).is_none() {
        return;
    }
    let itself = std::env::current_exe().expect("procfs");
    let child = Command::new(itself)
        .args(["--exact", "stray_touch", "--nocapture"])
        .env("POLDER_STRAY_TOUCH", "1")
        .output()
        .expect("our own program starts");
    assert_eq!(child.status.signal(), Some(libc::SIGBUS), "{child:?}");
}

#[test]
fn a_memfd_keeps_its_size_and_knows_what_exists() {
    let memfd = Arc::new(Memfd::new("polder-test", PageCount::from(8)).expect("memfd_create"));
    assert!(rustix::fs::ftruncate(&memfd, 4096).is_err(), "sealed");
    let view = View::new(&memfd).expect("mmap");
    assert_eq!(memfd.existing(), Ok(vec![]));
    view.write(4096, &[1; 2 * 4096]).expect("nobody watches this view");
    view.populate(pages(7, 8)).expect("MADV_POPULATE_WRITE");
    assert_eq!(memfd.existing(), Ok(vec![pages(1, 3), pages(7, 8)]));
    memfd.punch_hole(pages(2, 8)).expect("fallocate");
    assert_eq!(memfd.existing(), Ok(vec![pages(1, 2)]));
    assert!(view.zap(pages(8, 9)).is_err() && memfd.punch_hole(pages(1, 2)).is_ok());
}
