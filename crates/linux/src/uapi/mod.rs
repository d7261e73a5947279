//! The kernel's interface where no crate has it: numbers and structures, and calls that take
//! nothing else.

pub(crate) mod cachestat;
pub(crate) mod kvm;
pub(crate) mod userfaultfd;
