//! The hosts: what each gives to the cases, and which cases are not applicable to it.

mod memfd;

use crate::Host;

/// The columns of the table, in order.
pub fn hosts() -> &'static [&'static dyn Host] {
    &[&memfd::Memfd]
}
