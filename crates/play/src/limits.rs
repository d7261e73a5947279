//! How large a scenario may be, so that any file is played or refused within seconds.

/// The bytes of a scenario.
pub const BYTES_MAX: usize = 1 << 20;
/// Its steps.
pub const STEPS_MAX: usize = 2000;
/// The pages of its memory: 4 GiB.
pub const PAGES_MAX: u64 = 1 << 20;
/// The pages that all its steps and expectations name.
pub const NAMED_MAX: u64 = 1 << 22;
/// The bytes that a step reads or writes.
pub const LENGTH_MAX: u64 = 0x2000;
/// Its VMs, and each one's slots.
pub(crate) const VMS_MAX: usize = 8;
pub(crate) const SLOTS_MAX: usize = 64;
/// The actors that it declares: each is a thread.
pub(crate) const ACTORS_MAX: usize = 32;
/// How often somebody may be found waiting still; each time costs some 40 ms.
pub(crate) const WAITS_MAX: usize = 100;
/// The pages of a step whose states are looked at, from its first on.
pub(crate) const LOOKED_MAX: u64 = 4096;
