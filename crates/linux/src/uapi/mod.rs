//! The kernel's interface where no crate has it: numbers and structures, nothing else.

pub(crate) mod userfaultfd;
