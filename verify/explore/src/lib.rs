//! A search over the interleavings of Polder's protocols.
#![allow(missing_docs)]
mod fold;
pub mod planted;
pub mod polder;
pub mod search;
pub mod system;
