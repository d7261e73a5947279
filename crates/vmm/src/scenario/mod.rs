//! What a guest does: one list of [`Op`]s per vCPU, over a fixed [`Layout`] of its memory.
//!
//! | term | is |
//! |---|---|
//! | op | one step of a guest: fill, check, convert, ... |
//! | program | the ops of one vCPU, ending in [`Op::Done`] |
//! | check | what an op verifies; a failed one stops the guest, passed ones are counted |
//! | area | 4 MiB of memory whose pages one vCPU converts, and nobody else touches |
//!
//! All memory starts zero, and private where it can be. A scenario is decided by its [`Config`]
//! alone: the same memory size, vCPU count and seed give the same ops. KVM runs them as machine
//! code (see [`guest`](crate::guest)), the simulated machine interprets them.
//!
//! Hole: a vCPU verifies its own area after each of its steps, and so meets damage done to other
//! memory only when that memory's owner looks.

mod area;
mod device;
mod generate;
mod layout;
mod op;
mod random;
mod refusal;
#[cfg(test)]
mod tests;
mod virtqueue;

pub use generate::{Config, Conversions, Scenario, ScenarioError};
pub use layout::{BOOT_END, Layout, MEMORY_MAX, MEMORY_MIN, MMIO_END, MMIO_START, VCPUS_MAX, ram};
pub(crate) use op::PATTERN_FACTOR;
pub use op::{HostAccess, Op, Outcome, Pattern, Visibility, WORD, digest, pattern};
pub(crate) use random::Random;
