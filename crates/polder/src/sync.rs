//! Locks, waiting and threads: the real ones, or shuttle's in `verify/shuttle`, so that a test
//! decides who goes on at each of them.

#[cfg(not(feature = "shuttle"))]
pub(crate) use parking_lot::{Condvar, Mutex, MutexGuard};
#[cfg(not(feature = "shuttle"))]
pub(crate) use polder_linux::spawn;
#[cfg(not(feature = "shuttle"))]
pub(crate) use std::thread::{JoinHandle, sleep, yield_now};

#[cfg(feature = "shuttle")]
pub(crate) use shuttle::thread::{JoinHandle, sleep, yield_now};
#[cfg(feature = "shuttle")]
pub(crate) use shuttled::{Condvar, Mutex, MutexGuard, spawn, thread_number};

/// Whether a thread has ended.
#[cfg(not(feature = "shuttle"))]
pub(crate) fn is_finished<T>(thread: &JoinHandle<T>) -> bool {
    thread.is_finished()
}

/// Shuttle's threads don't tell.
#[cfg(feature = "shuttle")]
pub(crate) fn is_finished<T>(_: &JoinHandle<T>) -> bool {
    false
}

/// A number of the calling thread's own, from 0.
#[cfg(not(feature = "shuttle"))]
pub(crate) fn thread_number() -> usize {
    use std::sync::atomic::{AtomicUsize, Ordering};
    static NEXT: AtomicUsize = AtomicUsize::new(0);
    std::thread_local! {
        static NUMBER: usize = NEXT.fetch_add(1, Ordering::Relaxed);
    }
    NUMBER.with(|&number| number)
}

/// A number that no other thread has that is alive, small where few are: the place of the calling
/// thread in what has one for each.
#[cfg(not(feature = "shuttle"))]
#[inline(always)]
pub(crate) fn thread_place() -> usize {
    match place::MINE.get() {
        place::NONE => place::take(),
        mine => mine,
    }
}

#[cfg(feature = "shuttle")]
pub(crate) fn thread_place() -> usize {
    thread_number()
}

/// The places of threads. One is given back when its thread ends, with what the thread left in it.
#[cfg(not(feature = "shuttle"))]
mod place {
    use std::cell::Cell;
    use std::collections::BTreeSet;

    use parking_lot::Mutex;

    pub(super) const NONE: usize = usize::MAX;

    std::thread_local! {
        /// Apart from its guard, which would cost a look at every use.
        pub(super) static MINE: Cell<usize> = const { Cell::new(NONE) };
        static GUARD: Cell<Option<Guard>> = const { Cell::new(None) };
    }

    /// The places that are free: those up to the first number, but for the set.
    static FREE: Mutex<(usize, BTreeSet<usize>)> = Mutex::new((0, BTreeSet::new()));

    struct Guard(usize);

    impl Drop for Guard {
        fn drop(&mut self) {
            MINE.set(NONE);
            FREE.lock().1.insert(self.0);
        }
    }

    #[cold]
    pub(super) fn take() -> usize {
        let mut free = FREE.lock();
        let place = free.1.pop_first().unwrap_or_else(|| {
            free.0 += 1;
            free.0 - 1
        });
        drop(free);
        MINE.set(place);
        // A thread that is ending has nowhere to put the guard, and does not give its place back.
        let _ = GUARD.try_with(|guard| guard.set(Some(Guard(place))));
        place
    }
}

/// `parking_lot`'s faces of shuttle's locks.
#[cfg(feature = "shuttle")]
mod shuttled {
    use std::ops::{Deref, DerefMut};
    use std::sync::PoisonError;
    use std::time::Duration;

    use shuttle::sync;
    use shuttle::thread::{self, JoinHandle};

    #[derive(Default, Debug)]
    pub(crate) struct Mutex<T>(sync::Mutex<T>);

    /// Empty while its thread waits at a [`Condvar`], and never else.
    pub(crate) struct MutexGuard<'a, T>(Option<sync::MutexGuard<'a, T>>);

    impl<T> Mutex<T> {
        pub(crate) fn new(value: T) -> Self {
            Self(sync::Mutex::new(value))
        }

        pub(crate) fn lock(&self) -> MutexGuard<'_, T> {
            MutexGuard(Some(self.0.lock().unwrap_or_else(PoisonError::into_inner)))
        }
    }

    impl<T> Deref for MutexGuard<'_, T> {
        type Target = T;

        fn deref(&self) -> &T {
            self.0.as_ref().expect("its thread does not wait")
        }
    }

    impl<T> DerefMut for MutexGuard<'_, T> {
        fn deref_mut(&mut self) -> &mut T {
            self.0.as_mut().expect("its thread does not wait")
        }
    }

    #[derive(Default, Debug)]
    pub(crate) struct Condvar(sync::Condvar);

    impl Condvar {
        pub(crate) fn new() -> Self {
            Self::default()
        }

        pub(crate) fn wait<T>(&self, guard: &mut MutexGuard<'_, T>) {
            let locked = guard.0.take().expect("its thread does not wait");
            guard.0 = Some(self.0.wait(locked).unwrap_or_else(PoisonError::into_inner));
        }

        /// Waits without a limit: whoever is not told of what he waits for waits for ever, which
        /// shuttle reports. In the product a limit makes up for a thread that died.
        pub(crate) fn wait_for<T>(&self, guard: &mut MutexGuard<'_, T>, _: Duration) {
            self.wait(guard);
        }

        pub(crate) fn notify_one(&self) {
            self.0.notify_one();
        }

        pub(crate) fn notify_all(&self) {
            self.0.notify_all();
        }
    }

    pub(crate) fn spawn(
        name: &str,
        body: impl FnOnce() + Send + 'static,
    ) -> Result<JoinHandle<()>, polder_linux::Error> {
        Ok(thread::Builder::new().name(name.to_owned()).spawn(body).expect("shuttle has room"))
    }

    pub(crate) fn thread_number() -> usize {
        thread::current().id().into()
    }
}
