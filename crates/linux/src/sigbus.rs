//! SIGBUS, made a result.
//!
//! Two things of Polder's raise it. A copy that meets a poisoned page, or no memory, ends early
//! (see `copy`). A vCPU whose guest touches a page that is poisoned in the guest's view: KVM_RUN
//! returns `EINTR` and the thread gets a SIGBUS with code `BUS_MCEERR_AR` and the page's address,
//! which becomes [`Exit::MemoryFailure`](crate::Exit::MemoryFailure).
//!
//! Any other SIGBUS goes on to the handler that was there before, or ends the process as it
//! would have.

use core::cell::Cell;
use core::mem::MaybeUninit;
use core::ptr;
use std::sync::OnceLock;

use crate::copy::way_out;

/// What SIGBUS did before, kept to go on to.
struct Before(libc::sigaction);

static BEFORE: OnceLock<Before> = OnceLock::new();

thread_local! {
    /// Whether this thread is in KVM_RUN.
    static IN_GUEST: Cell<bool> = const { Cell::new(false) };
    /// Where its guest last met a poisoned page.
    static MEMORY_FAILURE: Cell<Option<usize>> = const { Cell::new(None) };
}

/// Makes the handler known to the kernel; once for the process, however often it is called.
pub fn install() {
    BEFORE.get_or_init(|| {
        let mut action = MaybeUninit::<libc::sigaction>::zeroed();
        let mut before = MaybeUninit::<libc::sigaction>::zeroed();
        // SAFETY: all zeros is a sigaction: no flags, empty mask, default handler.
        let new = unsafe { action.assume_init_mut() };
        new.sa_sigaction = handle as *const () as usize;
        new.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK | libc::SA_RESTART;
        // SAFETY: `new` is a valid sigaction whose handler has the type that SA_SIGINFO asks for,
        // `before` has room for one.
        let done = unsafe { libc::sigaction(libc::SIGBUS, new, before.as_mut_ptr()) };
        assert_eq!(done, 0, "sigaction of SIGBUS with valid arguments can't fail");
        // SAFETY: the successful call filled it.
        Before(unsafe { before.assume_init() })
    });
}

/// Calls KVM_RUN, and returns beside its result the host address at which the guest met a poisoned
/// page, if it did: KVM_RUN has failed with `EINTR`, `EAGAIN` or `EHWPOISON` then. A SIGBUS of that
/// kind outside of this is a stray touch of the VMM's own, and goes to the handler before ours.
pub fn in_guest<T>(run: impl FnOnce() -> T) -> (T, Option<usize>) {
    install();
    IN_GUEST.set(true);
    let result = run();
    IN_GUEST.set(false);
    (result, MEMORY_FAILURE.take())
}

extern "C" fn handle(signal: i32, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    let context = context.cast::<libc::ucontext_t>();
    // SAFETY: the kernel passes a SA_SIGINFO handler a ucontext of the interrupted thread, which
    // nobody else refers to.
    let registers = unsafe { &mut (*context).uc_mcontext.gregs };
    let at = &mut registers[libc::REG_RIP as usize];
    if let Some(exit) = usize::try_from(*at).ok().and_then(way_out) {
        *at = i64::try_from(exit).unwrap_or(*at);
        return;
    }
    // SAFETY: the kernel passes a SA_SIGINFO handler a siginfo.
    let info_here = unsafe { &*info };
    let code = info_here.si_code;
    // SAFETY: the siginfo of a SIGBUS has an address.
    let address = unsafe { info_here.si_addr() };
    if code == libc::BUS_MCEERR_AR && IN_GUEST.get() {
        MEMORY_FAILURE.set(Some(address.addr()));
        return;
    }
    go_on(signal, info, context.cast());
}

/// Does what would have been done without us.
fn go_on(signal: i32, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    let Some(Before(before)) = BEFORE.get() else { return };
    match before.sa_sigaction {
        libc::SIG_DFL | libc::SIG_IGN => {
            // The touch is made again when we return, and this time has its effect.
            // SAFETY: `before` is the valid sigaction that the kernel gave us.
            unsafe { libc::sigaction(signal, before, ptr::null_mut()) };
        }
        handler if before.sa_flags & libc::SA_SIGINFO != 0 => {
            type Handler = extern "C" fn(i32, *mut libc::siginfo_t, *mut libc::c_void);
            // SAFETY: with SA_SIGINFO, the kernel had it as a handler of this type.
            let handler = unsafe { core::mem::transmute::<usize, Handler>(handler) };
            handler(signal, info, context);
        }
        handler => {
            // SAFETY: without SA_SIGINFO, the kernel had it as a handler of this type.
            let handler = unsafe { core::mem::transmute::<usize, extern "C" fn(i32)>(handler) };
            handler(signal);
        }
    }
}
